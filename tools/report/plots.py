"""Plots for docs/, from records and reported numbers only."""

from __future__ import annotations

import hashlib
import io
import json
import math
import statistics
from itertools import count
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fast_imagenet.engine.logger import decorate
from tools.report.records import Group

BESIDE = "Points that would cover each other stand side by side."
# file below the root -> (title, caption)
PLOTS = {
    "docs/results_accuracy.png": (
        "accuracy against epochs and time",
        "Plain top-1 after each evaluated epoch, mean and standard deviation over the seeds. "
        f"{BESIDE} Time is shown for runs that had the machine to themselves.",
    ),
    "docs/results_images_seen.png": (
        "accuracy against images seen",
        "Top-1 at the end against images seen. Filled: measured here, plain protocol. Hollow: "
        "reported, each under its own protocol, so compare points of one line only. "
        f"{BESIDE}",
    ),
    "docs/results_throughput.png": (
        "throughput",
        "Training images a second, median over the epochs, and the share of the time of training "
        "that was waiting for data.",
    ),
}
COLORS = ("#1f5fa8", "#d9641e", "#2f8f5b", "#8a4f9e", "#b58900", "#c2416b", "#2a9d9d", "#5c6770")
MARKS = "osD^vP*X<>"
LINES = ("-", "--", "-.", ":")
NEAR = 0.04  # of an axis: what is nearer would be covered by a mark
DRAWING = 2  # raised when the same numbers are drawn otherwise: older files are not current then
DIGEST = "Data-Digest"  # key in the PNG: of the numbers drawn, so that a check needs no pixels


def plot_data(book) -> dict[str, list]:
    """What each plot shows, as JSON values: path -> a list of series; empty: there is no plot."""
    groups = [group for entry in book.rows for group in entry.groups]
    return {
        "docs/results_accuracy.png": [_curve(group, _title(book, group)) for group in groups],
        "docs/results_images_seen.png": _points(book, groups),
        "docs/results_throughput.png": [
            {
                "title": _title(book, group),
                "rate": _rounded(group.spread("images_per_second")),
                "wait": _rounded(group.spread("data_wait")),
            }
            for group in groups
            if group.timed
        ],
    }


def digest(series: list) -> str:
    """Of what a plot shows."""
    return hashlib.sha256(json.dumps([DRAWING, series], sort_keys=True).encode()).hexdigest()


def is_current(path: Path, series: list) -> bool:
    """Whether a PNG shows these numbers; where there are none, that there is no file."""
    if not path.is_file() or not series:
        return not (series or path.exists())
    try:
        with Image.open(path) as image:
            return image.info.get(DIGEST) == digest(series)
    except OSError:
        return False


def draw(name: str, series: list) -> bytes:
    """The PNG of one of PLOTS; the same bytes for the same numbers and versions.

    Args:
        series: of `plot_data`, one at least.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing, height = {
        "docs/results_accuracy.png": (_draw_accuracy, 4.4 + 0.17 * len(series)),
        "docs/results_images_seen.png": (_draw_points, 5.8),
        "docs/results_throughput.png": (_draw_bars, 1.2 + 0.4 * len(series)),
    }[name]
    figure = Figure(figsize=(10, height), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    drawing(figure, series)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return fewer_colors(file, {DIGEST: digest(series)})


def fewer_colors(png: io.BytesIO, texts: dict[str, str]) -> bytes:
    """The same image in 200 colours, a third of the bytes, with no text but `texts`."""
    info, file = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_text(key, text)
    with Image.open(png) as image:
        few = image.convert("RGB").quantize(200, method=Image.Quantize.MAXCOVERAGE)
    few.save(file, "PNG", optimize=True, pnginfo=info)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------


def _title(book, group: Group) -> str:
    several = len(book.entry(group.name).groups) > 1 or "label" in group.about
    return f"{group.name}{f', {group.label}' if several else ''}"


def _curve(group: Group, title: str) -> dict:
    """Plain top-1 after the epochs that every seed evaluated: mean, deviation, minutes."""
    key = "ema_plain_top1" if group.runs[0].averaged else "plain_top1"
    logs = [{line["epoch"]: line for line in run.log} for run in group.runs]
    epochs = sorted(set.intersection(*map(set, logs)))
    values = [[log[epoch][key] for log in logs] for epoch in epochs]
    minutes = [[log[epoch]["total_seconds"] / 60 for log in logs] for epoch in epochs]
    return {
        "title": title,
        "epochs": epochs,
        "seeds": len(group.runs),
        "top1": [round(statistics.fmean(v), 4) for v in values],
        "deviation": [round(statistics.stdev(v), 4) if len(v) > 1 else 0.0 for v in values],
        "minutes": [round(statistics.fmean(v), 3) for v in minutes] if group.timed else [],
    }


def _points(book, groups: list[Group]) -> list[dict]:
    series = {}
    for report in book.reported.reports:
        title = f"{report.by}, {report.network}, {report.protocol}"
        series.setdefault((report.data, title, False), []).append(
            (report.epochs * book.reported.data[report.data]["images"] / 1e6, report.top1, 0.0)
        )
    for group in groups:
        top, key = group.spread("plain"), (book.data(group), _title(book, group), True)
        millions = round(group.spread("images").mean / 1000, 6)
        series.setdefault(key, []).append((millions, round(top.mean, 4), top.deviation or 0.0))
    return [
        {"data": data, "title": title, "measured": measured, "points": sorted(points)}
        for (data, title, measured), points in series.items()
    ]


def _rounded(spread) -> list[float]:
    return [round(spread.mean, 3), round(spread.deviation or 0.0, 3)]


# ------------------------------------------------------------------------------------------------
# Drawing
# ------------------------------------------------------------------------------------------------


def _draw_accuracy(figure, series: list[dict]) -> None:
    timed = any(one["minutes"] for one in series)
    axes = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    hours = any(max(one["minutes"], default=0) >= 120 for one in series)
    unit = "hours" if hours else "minutes"
    _draw_curves(axes[0], series, [one["epochs"] for one in series])
    decorate(axes[0], "plain top-1 against epochs, %", "epoch")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    if timed:
        times = [[m / (60 if hours else 1) for m in one["minutes"]] for one in series]
        _draw_curves(axes[1], series, times)
        decorate(axes[1], f"plain top-1 against {unit}, %", f"{unit}, training and evaluation")
    place = dict(loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0)
    handles, labels = axes[0].get_legend_handles_labels()  # lines first, then single points
    known = dict(zip(labels, handles, strict=True))
    labels = [_label(one) for one in series]
    axes[0].legend([known[label] for label in labels], labels, **place, frameon=False, fontsize=8)


def _label(one: dict) -> str:
    seeds = f"{one['seeds']} seed{'s' * (one['seeds'] > 1)}"
    return f"{one['title']}: {one['top1'][-1]:.1f} %, {seeds}"


def _draw_curves(axes, series: list[dict], xs: list[list[float]]) -> None:
    """Mean and deviation of every series; none covers another wholly.

    Args:
        xs: of every series; empty where it is not shown.
    """
    pairs = [list(zip(x, one["top1"], strict=False)) for x, one in zip(xs, series, strict=True)]
    points = [pair[0] if len(pair) == 1 else None for pair in pairs]
    lines = [point for pair in pairs if len(pair) > 1 for point in pair]
    places = side_by_side(points, lines)
    for k, (one, x) in enumerate(zip(series, xs, strict=True)):
        if not x:  # it was not timed
            continue
        color, top, error = COLORS[k % len(COLORS)], one["top1"], one["deviation"]
        style = dict(color=color, label=_label(one))
        if len(x) == 1:
            style |= dict(fmt=MARKS[k % len(MARKS)], markersize=7, markeredgecolor="white")
            axes.errorbar([places[k]], top, yerr=error, **style, zorder=4)
            continue
        low = [a - b for a, b in zip(top, error, strict=True)]
        high = [a + b for a, b in zip(top, error, strict=True)]
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        dashes = LINES[k % len(LINES)]  # through the gaps of one line another is seen
        axes.plot(x, top, dashes, **style, linewidth=1.6, marker="o", markersize=3)


def side_by_side(points: list, others: list, log: bool = False) -> list[float | None]:
    """Places on the x axis for single points, so that none covers another or one of `others`.

    Args:
        points: (x, y), or None for what is not a single point.
        others: (x, y) that stay where they are.
        log: the x axis is logarithmic.
    """
    every = [(math.log10(x) if log else x, y) for x, y in [*others, *filter(None, points)]]
    width, height = (max(v) - min(v) or 1.0 for v in zip(*every, strict=True)) if every else (1, 1)
    scaled = [(x / width, y / height) for x, y in every]
    taken, waiting, places = scaled[: len(others)], scaled[len(others) :], []
    for point in points:
        if point:
            taken.append(_free_place(*waiting.pop(0), taken))
        place = taken[-1][0] * width if point else None
        places.append(10**place if point and log else place)
    return places


def _free_place(x: float, y: float, taken: list) -> tuple[float, float]:
    """The nearest place beside (x, y) where nothing is; all in fractions of the axes."""
    for shift in (NEAR * sign * number for number in count() for sign in (1, -1)):
        if all(abs(x + shift - a) > 0.99 * NEAR or abs(y - b) > NEAR for a, b in taken):
            return x + shift, y
    raise AssertionError("unreachable: the axis has no end")


def _draw_points(figure, series: list[dict]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    names = list(dict.fromkeys(one["data"] for one in series)) or [""]
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, data in zip(axes, names, strict=True):
        shown = [one for one in series if one["data"] == data]
        single = [one["points"][0][:2] if len(one["points"]) == 1 else None for one in shown]
        others = [p[:2] for one in shown if len(one["points"]) > 1 for p in one["points"]]
        places = side_by_side(single, others, log=True)
        for k, (one, place) in enumerate(zip(shown, places, strict=True)):
            _draw_series(ax, one, k, place)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        place = dict(loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0)
        ax.legend(**place, frameon=False, fontsize=8)
        decorate(ax, f"{data}: top-1 against images seen, %", "million images seen")


def _draw_series(axes, one: dict, k: int, place: float | None) -> None:
    x, y, error = zip(*one["points"], strict=True)
    x = x if place is None else (place,)
    color, mine = COLORS[k % len(COLORS)], one["measured"]
    style = dict(color=color, linewidth=0.8, markersize=8 if mine else 5.5, zorder=3 + mine)
    style |= dict(markerfacecolor=color if mine else "white", label=one["title"])
    mark = MARKS[k % len(MARKS)] + ("-" if len(x) > 1 else "")
    axes.errorbar(x, y, yerr=error if any(error) else None, fmt=mark, **style)


def _draw_bars(figure, series: list[dict]) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    titles = [one["title"] for one in series]
    for ax, key, color, title in (
        (axes[0], "rate", COLORS[0], "training images/s"),
        (axes[1], "wait", COLORS[1], "time waiting for data, %"),
    ):
        values, errors = zip(*(one[key] for one in series), strict=True)
        bars = ax.barh(titles, values, xerr=errors, color=color, height=0.6)
        ax.bar_label(bars, fmt="%.4g", padding=4, fontsize=9)
        ax.margins(x=0.2)
        decorate(ax, title, "")
        ax.grid(False, axis="y")
    axes[0].invert_yaxis()
