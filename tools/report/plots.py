"""Plots for docs/, from records and reported numbers only."""

from __future__ import annotations

import hashlib
import io
import json
import math
import statistics
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from benchmarks import table
from fast_imagenet.engine.plots import COLORS, LINES, MARKS, decorate, legend
from tools.report.records import Group, spread

if TYPE_CHECKING:
    from tools.report.tables import Book

# below the root; their captions: tables.md.j2
ACCURACY, PIXELS = "docs/results_accuracy.png", "docs/results_pixels.png"
PLOTS = ACCURACY, PIXELS, OVERVIEW = ACCURACY, PIXELS, "docs/overview.png"
NEAR = 0.18  # inches between marks on the x axis: what is nearer would be covered
DRAWING = 7  # raised when the same numbers are drawn otherwise: older files are not current then
DIGEST = "Data-Digest"  # key in the PNG: of the numbers drawn, so that a check needs no pixels

Series = list[dict[str, Any]]
Point = tuple[float, float]


def plot_data(book: Book) -> dict[str, Series]:
    """What each plot shows, as JSON values: path -> a list of series; empty: there is no plot."""
    groups = book.groups
    curves = [_curve(group, book.title(group)) for group in groups]
    few = _points(book, book.readme_rows)
    few = [one for one in few if one["measured"] or len(one["points"]) > 1]
    few = [one | {"title": ", ".join(one["title"].split(", ")[:3])} for one in few]
    overview = [*_rates(book.root), *few] if groups else []
    return {ACCURACY: curves, PIXELS: _points(book, groups), OVERVIEW: overview}


def _rates(root: Path) -> Series:
    """The newest rates of loaders, the fastest way of each library."""
    for file in sorted(root.glob(f"benchmarks/results/*/{table.LOADER}.json"))[-1:]:
        result = json.loads(file.read_text())
        bars = table.fastest_of_each(table.chart_bars(result))
        return [{"bars": bars, "label": table.chart_label(result)}]
    return []


def digest(series: Series) -> str:
    """Of what a plot shows."""
    return hashlib.sha256(json.dumps([DRAWING, series], sort_keys=True).encode()).hexdigest()


def is_current(path: Path, series: Series) -> bool:
    """Whether a PNG shows these numbers; where there are none, that there is no file."""
    if not path.is_file() or not series:
        return not (series or path.exists())
    try:
        with Image.open(path) as image:
            return image.info.get(DIGEST) == digest(series)
    except OSError:
        return False


def draw(name: str, series: Series) -> bytes:
    """The PNG of one of PLOTS, of one series at least; the same bytes for the same numbers."""
    file, figure = io.BytesIO(), draw_figure(name, series)
    texts = {DIGEST: digest(series), "Software": None}
    figure.savefig(file, format="png", metadata=texts, pil_kwargs={"optimize": True})
    return file.getvalue()


def draw_figure(name: str, series: Series) -> Figure:
    """One of PLOTS, before it is an image."""
    drawing, height = {
        ACCURACY: (_draw_accuracy, 4.4 + 0.2 * len(series)),
        PIXELS: (_draw_points, 4 * len({one.get("data") for one in series}) + 0.2 * len(series)),
        OVERVIEW: (_draw_overview, 7),
    }[name]
    figure = Figure(figsize=(10, height), dpi=120 if name == OVERVIEW else 90, layout="constrained")
    drawing(figure, series)
    return figure


def _draw_overview(figure: Figure, series: Series) -> None:
    """Rates of loaders beside accuracy against pixels; one of them alone fills the figure."""
    rates = [one for one in series if "bars" in one]
    points = [one for one in series if "bars" not in one]
    parts = figure.subfigures(1, bool(rates) + bool(points), squeeze=False)[0].tolist()
    if rates:
        table.draw_bars(parts.pop(0).subplots(), rates[0]["bars"], rates[0]["label"])
    if points:
        _draw_points(parts.pop(), points)


def _curve(group: Group, title: str) -> dict[str, Any]:
    """Standard top-1 after the epochs that every seed evaluated: mean, deviation, minutes."""
    key, clock = f"{group.runs[0].ema}plain_top1", "total_seconds"
    logs = [{line["epoch"]: line for line in run.log} for run in group.runs]
    epochs = sorted(set.intersection(*map(set, logs)))
    tops = [spread([log[epoch][key] for log in logs]) for epoch in epochs]
    timed = group.timed and all(run.column(clock) for run in group.runs)
    return {
        "title": title,
        "epochs": epochs,
        "seeds": len(logs),
        "top1": [round(top.mean, 4) for top in tops],
        "deviation": [round(top.deviation or 0.0, 4) for top in tops],
        "minutes": [round(statistics.fmean(log[epoch][clock] / 60 for log in logs), 3)
                    for epoch in epochs if timed],
    }  # fmt: skip


def _points(book: Book, groups: list[Group]) -> Series:
    """Top-1 over pixels, in epochs of 160 px: a series per title of a report, and per group."""
    series: dict[tuple[str, str, bool], list[tuple[float, ...]]] = {}
    for report in book.reported.reports:
        key = report["data"], report["title"], False
        series.setdefault(key, []).append((report["pixels"], report["top1"], 0.0))
    for group in (group for group in groups if group.logged("pixels")):
        key = book.data(group), book.title(group), True
        top = group.spread("standard")
        pixels = round(group.spread("pixels").mean, 4)
        point = (pixels, round(top.mean, 4), round(top.deviation or 0.0, 4))
        series.setdefault(key, []).append(point)
    keys = ("data", "title", "measured")
    return [dict(zip(keys, key, strict=True)) | {"points": sorted(series[key])} for key in series]


def _draw_accuracy(figure: Figure, series: Series) -> None:
    hours = any(max(one["minutes"], default=0) >= 120 for one in series)
    unit, scale = ("hours", 60) if hours else ("minutes", 1)
    times = [[minutes / scale for minutes in one["minutes"]] for one in series]
    axes = figure.subplots(1, 1 + any(times), sharey=True, squeeze=False)[0]
    _draw_curves(axes[0], series, [one["epochs"] for one in series])
    legend(axes[0])
    decorate(axes[0], "standard top-1 against epochs, %", "epoch")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    if any(times):
        _draw_curves(axes[1], series, times)
        decorate(axes[1], f"standard top-1 against {unit}, %", f"{unit}, training and evaluation")


def _draw_curves(axes: Axes, series: Series, xs: list[list[float]]) -> None:
    """Mean and deviation of every series over its `xs`, empty where it was not timed."""
    curves = [list(zip(x, one["top1"], strict=False)) for x, one in zip(xs, series, strict=True)]
    for k, (one, x, place) in enumerate(zip(series, xs, side_by_side(curves, 9), strict=True)):
        color, top, error = COLORS[k % len(COLORS)], one["top1"], one["deviation"]
        label = f"{one['title']}: {top[-1]:.1f} %, {one['seeds']} seed{'s' * (one['seeds'] > 1)}"
        style: dict[str, Any] = dict(color=color, label=label)
        if len(x) == 1:
            style |= dict(
                fmt=MARKS[k % len(MARKS)], markeredgecolor="white", markersize=7, zorder=4
            )
            axes.errorbar([place], top, yerr=error, **style)
        elif x:
            low, high = np.subtract(top, error), np.add(top, error)
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            mark, line = MARKS[k % len(MARKS)], LINES[k % len(LINES)]
            style |= dict(fmt=mark + line, markersize=4, linewidth=1.6)
            axes.errorbar(x, top, **style)


def side_by_side(series: list[list[Point]], axis: float, log: bool = False) -> list[float]:
    """A place on the x axis for every series of one point (x, y), so that none covers another's.

    Args: axis: length of the x axis, inches.
    """
    scaled = [[(math.log10(x) if log else x, y) for x, y in one] for one in series]
    every = [point for one in scaled for point in one]
    width, height = (max(v) - min(v) or 1.0 for v in zip(*every, strict=True)) if every else (1, 1)
    scaled = [[(x / width, y / height) for x, y in one] for one in scaled]
    taken, places = [point for one in scaled if len(one) > 1 for point in one], []
    for one in scaled:
        x = _free_place(*one[0], taken, NEAR / axis) if len(one) == 1 else 0.0
        taken += [(x, one[0][1])] if len(one) == 1 else []
        places.append(10 ** (x * width) if log else x * width)
    return places


def _free_place(x: float, y: float, taken: list[Point], near: float) -> float:
    """The nearest place beside (x, y) where nothing is; all in fractions of the axes."""
    for shift in (near * sign * number for number in count() for sign in (1, -1)):
        if all(abs(x + shift - a) > 0.99 * near or abs(y - b) > 0.04 for a, b in taken):
            return x + shift
    raise AssertionError("unreachable: the axis has no end")


def _draw_points(figure: Figure, series: Series) -> None:
    names = list(dict.fromkeys(one["data"] for one in series))
    for ax, data in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        shown = [one for one in series if one["data"] == data]
        width = figure.bbox.width / figure.dpi
        places = side_by_side([[p[:2] for p in one["points"]] for one in shown], width, log=True)
        for k, (one, place) in enumerate(zip(shown, places, strict=True)):
            x, y, error = zip(*one["points"], strict=True)
            color, mine, several = COLORS[k % len(COLORS)], one["measured"], len(x) > 1
            style: dict[str, Any] = dict(color=color, linewidth=0.8, zorder=3 + mine)
            style |= dict(markersize=8 if mine else 5.5)
            style |= dict(markerfacecolor=color if mine else "white")
            style |= dict(label=f"measured here: {one['title']}" if mine else one["title"])
            style |= dict(fmt=MARKS[k % len(MARKS)] + "-" * several)
            ax.errorbar(x if several else place, y, error if any(error) else None, **style)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        legend(ax)
        moved = any(len(one["points"]) == 1 and not math.isclose(place, one["points"][0][0])
                    for one, place in zip(shown, places, strict=True))  # fmt: skip
        note = "; equal ones side by side" * moved
        decorate(ax, f"{data}: top-1 against pixels, %", f"pixels seen, epochs of 160 px{note}")
