"""The curves of a run, and how every plot of the project looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast_imagenet.engine.json_lines import RunLogError, read_jsonl
from fast_imagenet.engine.metrics import raw_keys
from fast_imagenet.engine.progress import accuracy_text
from fast_imagenet.files import write_atomically

BLUE, ORANGE, GREEN = "#1f5fa8", "#d9641e", "#2f8f5b"


def plot_curves(log_jsonl: str | Path, png: str | Path, note: str = "") -> None:
    """Draw a log.jsonl: accuracy against epochs and time, losses, schedules, speed.

    Args:
        log_jsonl: as RunLog writes it, one epoch at least.
        png: image to write, about 1500 x 1350 px.
        note: for its title, as that it was a smoke run.
    Raises:
        RunLogError: the log is empty or damaged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    lines = read_jsonl(log_jsonl)
    if not lines:
        raise RunLogError(f"{log_jsonl} is empty: there is nothing to draw before the first epoch")
    # before the end of a run, raw weights may not have been evaluated
    log = {k: [line.get(k, math.nan) for line in lines] for k in (*lines[-1], *raw_keys())}
    unit, seconds = ("hours", 3600) if log["total_seconds"][-1] >= 3600 else ("minutes", 60)
    times = [value / seconds for value in log["total_seconds"]]
    figure = Figure(figsize=(11.5, 10.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 2)
    _draw_accuracy(axes[0, 0], log, log["epoch"], "epoch")
    _draw_accuracy(axes[0, 1], log, times, unit)
    _draw_losses(axes[1, 0], log)
    _draw_speed(axes[1, 1], log)
    _draw_schedule(axes[2, 0], log, "lr", "learning rate at the end of the epoch")
    _draw_schedule(axes[2, 1], log, "resolution", "training resolution, pixels", "steps-pre")
    title = _title(lines[-1], f"{times[-1]:.1f} {unit}") + (f"; {note}" if note else "")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    write_atomically(png, lambda file: figure.savefig(file, format="png"))


def _title(last: dict[str, Any], time: str) -> str:
    epochs = f"{last['epoch']} epoch{'s' * (last['epoch'] != 1)}"
    return f"top-1 {accuracy_text(last)}\nafter {epochs} in {time}"


def _has_ema(log: dict[str, list[Any]]) -> bool:
    """Without an EMA its columns repeat the raw ones and would only hide them."""
    return log["ema_top1"] != log["top1"] or log["val_loss_ema"] != log["val_loss"]


def _draw_accuracy(axes: Any, log: dict[str, list[Any]], x: list[float], unit: str) -> None:
    views = [("plain_", BLUE, "standard eval"), ("", ORANGE, "config eval")]
    if _has_ema(log):
        ema = [(f"ema_{name}", color, f"{label}, EMA") for name, color, label in views]
        views = [*ema, *((name, color, f"{label}, raw") for name, color, label in views)]
    curves: dict[
        tuple[float, ...], tuple[str, list[str]]
    ] = {}  # by values: of two equal curves one would hide the other
    for name, color, label in views:
        if math.isnan(log[f"{name}top1"][-1]):
            continue
        curves.setdefault(tuple(log[f"{name}top1"]), (color, []))[1].append(label)
    for values, (color, labels) in curves.items():
        style = "--" if labels[0].endswith("raw") else "-"
        text = f"{' and '.join(labels)}: {values[-1]:.2f} %"
        axes.plot(x, values, style, color=color, label=text, **_dots(values))
    axes.legend(loc="lower right", frameon=False, title="top-1, at the end")
    _decorate(axes, f"top-1 accuracy against {unit}, %", unit)


def _draw_losses(axes: Any, log: dict[str, list[Any]]) -> None:
    curves = [("train_loss", GREEN, "-", "training"), ("val_loss", BLUE, "-", "validation")]
    if _has_ema(log):
        curves[1] = ("val_loss", BLUE, "--", "validation, raw")
        curves.append(("val_loss_ema", BLUE, "-", "validation, EMA"))
    for key, color, style, label in curves:
        if math.isnan(log[key][-1]):
            continue
        axes.plot(log["epoch"], log[key], style, color=color, label=label, **_dots(log[key]))
    axes.legend(frameon=False)
    _decorate(axes, "loss, nats", "epoch")


def _draw_speed(axes: Any, log: dict[str, list[Any]]) -> None:
    x, right = log["epoch"], axes.twinx()
    axes.plot(x, log["images_per_second"], color=GREEN, **_dots(x))
    percent = [100 * value for value in log["data_wait_share"]]
    right.plot(x, percent, color=ORANGE, **_dots(x))
    axes.set_ylim(0, 1.15 * max(log["images_per_second"]))
    right.set_ylim(0, max(10, 1.15 * max(percent)))
    axes.set_ylabel("images/s", color=GREEN)
    right.set_ylabel("time waiting for data, %", color=ORANGE)
    right.spines[["top", "left"]].set_visible(False)
    _decorate(axes, "training speed and waiting for data", "epoch")


def _draw_schedule(
    axes: Any, log: dict[str, list[Any]], key: str, title: str, drawstyle: str = "default"
) -> None:
    axes.plot(log["epoch"], log[key], color=BLUE, drawstyle=drawstyle, **_dots(log["epoch"]))
    axes.set_ylim(0, 1.1 * max(log[key]) or 1)
    _decorate(axes, title, "epoch")


def _dots(values: Sequence[float]) -> dict[str, Any]:
    """A short run is drawn with its points: one epoch alone would be invisible as a line."""
    known = sum(not math.isnan(value) for value in values)
    return {"linewidth": 1.6, "marker": "o" if known <= 30 else "", "markersize": 3.5}


def decorate(axes: Any, title: str, xlabel: str) -> None:
    """Title, label of the x axis and a quiet grid: how every plot of the project looks."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _decorate(axes: Any, title: str, xlabel: str) -> None:
    decorate(axes, title, xlabel)
    axes.xaxis.get_major_locator().set_params(integer=xlabel == "epoch")
    axes.set_xlim(left=0)
