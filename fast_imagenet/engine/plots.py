"""The curves of a run, and how every plot of the project looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fast_imagenet.engine.json_lines import RunLogError, read_jsonl
from fast_imagenet.engine.progress import accuracy_text
from fast_imagenet.files import write_atomically

# Neighbors differ in gray, too; series of one plot also in mark and line, for print without color.
BLUE, ORANGE, GREEN = "#1b4f91", "#e8842c", "#2f8f5b"
COLORS = (BLUE, ORANGE, GREEN, "#c9a227", "#9b3d8f", "#2a9d9d", "#c2416b", "#5c6770")
MARKS = "osD^vP*X<>"
GRAY = "#8f959e"
LINES = ("-", "--", "-.", ":")  # through the gaps of one line another is seen
BLOCKS = 600  # of the loss of steps: more points would be a band

Log = dict[str, list[float]]


class Curve(NamedTuple):
    """One line of a panel; hollow: thin, with rings around the marks of another; `x`: its own."""

    label: str
    y: Sequence[float]
    color: str = BLUE
    line: str = "-"
    mark: str = "o"
    hollow: bool = False
    x: Sequence[float] | None = None


def plot_curves(log_jsonl: str | Path, png: str | Path, note: str = "") -> None:
    """Draw a log.jsonl and the steps.jsonl beside it: accuracy, losses, speed, schedules.

    Args:
        log_jsonl: as RunLog writes it, one epoch at least.
        png: image to write, about 1500 x 1900 px.
        note: for its title, as that it was a smoke run.
    Raises:
        RunLogError: a file is damaged, or the log empty.
    """
    lines, path = read_jsonl(log_jsonl), Path(log_jsonl)
    if not lines:
        raise RunLogError(f"{path} is empty: there is nothing to draw before the first epoch")
    figure = draw_curves(lines, read_jsonl(path.with_name("steps.jsonl")), note)
    write_atomically(png, lambda file: figure.savefig(file, format="png"))


def draw_curves(lines: list[dict[str, Any]], steps: list[dict[str, Any]], note: str = "") -> Any:
    """The figure of `plot_curves`; what a log of another version does not hold has no panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    log, last = _columns(lines), lines[-1]
    log["data_wait_share"] = [100 * value for value in log.get("data_wait_share", [])]
    hours = last.get("total_seconds", 0) >= 3600
    unit, seconds = ("hours", 3600) if hours else ("minutes", 60)
    times = [value / seconds for value in log.get("total_seconds", [])]
    accuracies = _accuracies(log)
    panels = [
        ("top-1, %", accuracies, log["epoch"], "epoch"),
        ("top-1, %", accuracies * (len(times) > 1), times, f"{unit}, training and evaluation"),
        ("loss, nats", _losses(log, steps), log["epoch"], "epoch"),
    ]
    for key, label in (
        ("images_per_second", "training speed, images/s"),
        ("data_wait_share", "waiting for data, % of training time"),
        ("lr", "learning rate at the end of the epoch"),
        ("resolution", "training resolution, px"),
    ):
        panels.append((label, [Curve("", log.get(key, []))], log["epoch"], "epoch"))
    # one point of these says nothing
    panels = [panel for panel in panels if [c for c in panel[1] if c.label or len(c.y) > 1]]
    rows = -(-len(panels) // 2)
    figure = Figure(
        figsize=(11.5, 0.7 + 3.5 * rows), dpi=130, layout=ConstrainedLayoutEngine(h_pad=0.12)
    )
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels, 1):
        _draw_panel(figure.add_subplot(rows, 2, number), *panel)
    figure.suptitle(_title(last, f" in {times[-1]:.1f} {unit}" if times else "", note))
    return figure


def _columns(lines: list[dict[str, Any]]) -> Log:
    """Keys with a number in any line; NaN where a line has none, as of weights not evaluated."""
    log: Log = {key: [] for line in lines for key in line}
    for line in lines:
        for key, values in log.items():
            values.append(value if isinstance(value := line.get(key), (int, float)) else math.nan)
    return {key: values for key, values in log.items() if not np.isnan(values).all()}


def _title(last: dict[str, Any], time: str, note: str) -> str:
    text = f"after {last['epoch']} epoch{'s' * (last['epoch'] != 1)}{time}"
    text += f"; {note}" if note else ""
    scored = {"ema_plain_top1", "ema_top1"} <= last.keys()
    return f"top-1 {accuracy_text(last)}\n{text}" if scored else text


def _has_ema(log: Log) -> bool:
    """Without an EMA its columns repeat the raw ones and would only hide them."""
    pairs = (("ema_top1", "top1"), ("val_loss_ema", "val_loss"))
    return any(log.get(ema, log.get(raw)) != log.get(raw) for ema, raw in pairs)


def _accuracies(log: Log) -> list[Curve]:
    """Raw weights first, below; of equal curves one under both names: it would hide the other."""
    views = {"plain_top1": Curve("standard eval", (), BLUE, "-", "o")}
    views["top1"] = Curve("config eval", (), ORANGE, "--", "s")
    kinds = {"": ", raw", "ema_": ", EMA"} if _has_ema(log) else {"": ""}
    curves: dict[tuple[float, ...], Curve] = {}
    for prefix, kind in kinds.items():
        for key, view in views.items():
            values, label = tuple(log.get(prefix + key, ())), view.label + kind
            if first := curves.get(values):
                curves[values] = first._replace(label=f"{first.label} and {view.label}")
            elif values:
                curves[values] = view._replace(label=label, y=values, hollow=kind == ", raw")
    return [c._replace(label=f"{c.label}: {c.y[-1]:.2f} %") for c in curves.values()]


def _losses(log: Log, steps: list[dict[str, Any]]) -> list[Curve]:
    kinds = {"train_loss": Curve("training", (), GREEN, "-", "D")}
    kinds["val_loss"] = Curve("validation", (), BLUE, "--")
    if _has_ema(log):
        kinds["val_loss_ema"] = Curve("validation, EMA", (), BLUE, "--")
        kinds["val_loss"] = Curve("validation, raw", (), BLUE, "--", hollow=True)
    curves = [curve._replace(y=log[key]) for key, curve in kinds.items() if key in log]
    losses = [loss for line in steps for loss in line["losses"]]
    if len(losses) < 2:
        return curves
    # a line of steps.jsonl is an epoch; a loss stands where its step ends
    counts = [len(line["losses"]) for line in steps]
    x = [k + np.arange(1, n + 1) / n for k, n in enumerate(counts)]
    count = min(BLOCKS, len(losses))
    blocks = (np.array_split(values, count) for values in (losses, np.concatenate(x)))
    means, places = ([block.mean() for block in parts] for parts in blocks)
    size = -(-len(losses) // count)
    label = f"training, means of {size} steps" if size > 1 else "training, every step"
    return [Curve(label, means, GRAY, mark="", x=places), *curves]


def _draw_panel(axes: Any, label: str, curves: list[Curve], x: list[float], xlabel: str) -> None:
    for curve in curves:
        style: dict[str, Any] = dict(color=curve.color, linestyle=curve.line, label=curve.label)
        style |= dict(linewidth=0.7) if curve.x is not None else dict(linewidth=1.6)
        style |= dict(markersize=7, markerfacecolor="none", linewidth=1) if curve.hollow else {}
        # one epoch alone would be invisible as a line
        few = bool(np.isfinite(curve.y).sum() <= 30)
        axes.plot(curve.x or x, curve.y, marker=curve.mark * few, **dict(markersize=3.5) | style)
    if curves[0].label:
        legend(axes, columns=2)
    else:
        axes.set_ylim(0, 1.1 * np.nanmax(curves[0].y) or 1)
    decorate(axes, label, xlabel)
    if xlabel == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(left=0)


def decorate(axes: Any, title: str, xlabel: str) -> None:
    """What the y axis shows, above it; the label of the x axis; a quiet grid."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(axes: Any, columns: int = 1) -> None:
    """Below the label of the x axis, where no line can be."""
    from matplotlib.transforms import ScaledTranslation

    below = ScaledTranslation(0, -38 / 72, axes.figure.dpi_scale_trans)
    style = dict(loc="upper left", borderaxespad=0, frameon=False, fontsize=8.5, ncols=columns)
    axes.legend(bbox_to_anchor=(0, 0), bbox_transform=axes.transAxes + below, **style)
