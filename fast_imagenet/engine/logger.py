"""The record of a run: what was asked, where it ran, one line an evaluated epoch, and its curves.

Files in the run's folder: config.json, environment.json, log.jsonl (one line an evaluated epoch,
the same keys every time, none null), steps.jsonl (the loss of every step), at the end summary.json
and curves.png; TensorBoard's event files where it is installed. The JSON files name no machine,
user or folder outside the repository: a record can be published. Two are for the machine alone and
become part of no record: paths.json, where the run found its files, and TensorBoard's, whose names
hold the host.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import platform
import subprocess
import uuid
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fast_imagenet.files import write_atomically, write_json

REPOSITORY = Path(__file__).resolve().parents[2]

# Accuracies in percent, losses in nats; ema_: of the averaged weights; plain_: 224 px, one crop, no
# flip; without plain_: size, crop and flip as configured; seconds: of this epoch's training.
LOG_KEYS = (
    "epoch",
    "train_loss",
    "val_loss",
    "val_loss_ema",
    "plain_top1",
    "plain_top5",
    "top1",
    "top5",
    "ema_plain_top1",
    "ema_plain_top5",
    "ema_top1",
    "ema_top5",
    "lr",
    "resolution",
    "images_per_second",
    "data_wait_share",
    "memory_gb",
    "seconds",
    "eval_seconds",
    "total_seconds",
)

PATHS = "paths.json"  # in the run's folder only
PACKAGES = ("torch", "torchvision", "ffcv", "numba", "timm", "numpy", "pillow", "safetensors")


class RunLogError(ValueError):
    """A folder or a record is not acceptable. The message is one sentence."""


class RunLog:
    """Writes the record of one run; every method does nothing when `enabled` is false.

    Args:
        folder: the run's folder, made when missing.
        config: nested dict of the settings, written as config.json.
        resume: the folder may hold an earlier part of this run.
        enabled: true on rank 0 only.
        tensorboard: write event files too, where the package is installed.
        wandb_project: Weights & Biases project, '' for none.

    Raises:
        RunLogError: the folder holds a run and `resume` is false; its log is damaged; wandb is
            asked for and not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        config: dict | None = None,
        resume: bool = False,
        enabled: bool = True,
        tensorboard: bool = True,
        wandb_project: str = "",
    ) -> None:
        self.folder, self.enabled = Path(folder), enabled
        self._log, self._steps = self.folder / "log.jsonl", self.folder / "steps.jsonl"
        self._tensorboard, self._writer, self._wandb = tensorboard, None, None
        if not enabled:
            return
        if self._log.exists() and not resume:
            raise RunLogError(
                f"{folder} already holds a run (log.jsonl); continue it with "
                f"training.resume=auto, or choose another logging.folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        drop_torn_line(self._log)
        drop_torn_line(self._steps)
        _check_lines(self._log, dict.fromkeys(LOG_KEYS, (int, float)))
        _check_lines(self._steps, {"first_step": int, "losses": list})
        write_json(self.folder / "config.json", redact_paths(config or {}))
        write_json(self.folder / PATHS, real_paths(config or {}))
        self._write_environment()
        if wandb_project:
            self._wandb = _start_wandb(wandb_project, self.folder, redact_paths(config or {}))

    def write(self, **record: Any) -> None:
        """Append one epoch to log.jsonl; it is on the disk when this returns.

        Args:
            record: LOG_KEYS at least; the same keys at every call; finite numbers, bool or str.
        Raises:
            RunLogError: a key is missing, new, null or not finite.
        """
        if not self.enabled:
            return
        record = {key: _plain_value(key, value) for key, value in record.items()}
        lines = read_jsonl(self._log)
        _check_keys(record, lines[0] if lines else dict.fromkeys(LOG_KEYS), exact=bool(lines))
        _append_line(self._log, record)
        self._mirror(record)

    def write_steps(self, first_step: int, losses: list[float]) -> None:
        """Append the losses of consecutive steps to steps.jsonl; what they replace is dropped.

        Args:
            first_step: number of the first of them since the start of the run, from 0.
            losses: one a step.
        Raises:
            RunLogError: a loss is not finite.
        """
        if not self.enabled:
            return
        losses = [_plain_value(f"loss of step {first_step + i}", x) for i, x in enumerate(losses)]
        lines = read_jsonl(self._steps)
        kept = [
            {**line, "losses": line["losses"][: first_step - line["first_step"]]}
            for line in lines
            if line["first_step"] < first_step
        ]
        if kept != lines:
            _rewrite_lines(self._steps, kept)
        _append_line(self._steps, {"first_step": first_step, "losses": losses})

    def truncate_after(self, epoch: int) -> None:
        """Drop the lines of epochs that will be done again: all later than `epoch`."""
        if not self.enabled:
            return
        lines = read_jsonl(self._log)
        kept = [line for line in lines if line["epoch"] <= epoch]
        if len(kept) < len(lines):
            _rewrite_lines(self._log, kept)

    def last(self) -> dict:
        """The last line of log.jsonl.

        Raises:
            RunLogError: there is none.
        """
        lines = read_jsonl(self._log)
        if not lines:
            raise RunLogError(f"{self._log} has lost its lines; restore it")
        return lines[-1]

    def finish(self, summary: dict) -> None:
        """Write curves.png, then summary.json, the last file of a finished run; close the rest."""
        if not self.enabled:
            return
        plot_curves(self._log, self.folder / "curves.png", summary.get("cut_short", ""))
        write_json(self.folder / "summary.json", redact_paths(summary))
        self.close()

    def close(self) -> None:
        """Close TensorBoard and W&B; can be called at any time and more than once."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._writer = self._wandb = None

    def _write_environment(self) -> None:
        path, now = self.folder / "environment.json", environment()
        old = _parse_object(path.read_bytes(), str(path)) if path.exists() else {}
        earlier = old.pop("earlier", [])
        earlier = earlier if isinstance(earlier, list) else []
        if old and old != now:  # a run that was resumed elsewhere says so
            earlier = [*earlier, old]
        write_json(path, {**now, **({"earlier": earlier} if earlier else {})})

    def _mirror(self, record: dict) -> None:
        """The same record for TensorBoard and W&B, step = epoch."""
        numeric = {k: v for k, v in record.items() if not isinstance(v, str) and k != "epoch"}
        if self._tensorboard and self._writer is None:
            self._writer = _start_tensorboard(self.folder, record["epoch"])
            self._tensorboard = self._writer is not None
        if self._writer is not None:
            for key, value in numeric.items():
                self._writer.add_scalar(key, value, record["epoch"])
            self._writer.flush()
        if self._wandb is not None:
            self._wandb.log(numeric, step=record["epoch"])


# ------------------------------------------------------------------------------------------------
# Lines of JSON
# ------------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> list[dict]:
    """All lines of a log; an absent file is an empty one.

    Raises:
        RunLogError: a line is not a JSON object.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [_parse_object(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


def epoch_line(folder: str | Path, epoch: int) -> dict | None:
    """The whole line of an epoch, counted from 1, in the log of a run's folder; None without one.

    Raises:
        RunLogError: a line before its last is not a JSON object.
    """
    path = Path(folder, "log.jsonl")
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    lines = [_parse_object(line, f"a line of {path}") for line in whole]
    return next((line for line in lines if line.get("epoch") == epoch), None)


def _parse_object(content: bytes, where: str) -> dict:
    try:
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise RunLogError(f"{where} is damaged ({error}); restore it or delete it") from error
    return value


def _check_lines(path: Path, kinds: dict[str, Any]) -> None:
    """Refuse a log that a run cannot go on in, before the first step and not after the last.

    Raises:
        RunLogError: a line lacks one of the keys `kinds`, or its value is of another kind.
    """
    for number, line in enumerate(read_jsonl(path), 1):
        for key, kind in kinds.items():
            if not isinstance(line.get(key), kind):
                raise RunLogError(
                    f"line {number} of {path} is damaged ({key} is {line.get(key)!r:.40}); "
                    f"restore it or delete it"
                )


def drop_torn_line(path: Path) -> None:
    """Remove an unfinished last line, which a killed process leaves; warns when there was one."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        warnings.warn(
            f"the last line of {path} is incomplete (the process was killed) and is dropped",
            stacklevel=3,
        )
        write_atomically(path, lambda file: file.write(whole))


def _append_line(path: Path, record: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _rewrite_lines(path: Path, records: list[dict]) -> None:
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_atomically(path, lambda file: file.write(text.encode()))


def _plain_value(key: str, value: Any) -> Any:
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise RunLogError(f"log key {key} is {value!r}; a log holds finite numbers and text only")


def _check_keys(record: dict, expected: dict, exact: bool) -> None:
    missing = [key for key in expected if key not in record]
    extra = [key for key in record if key not in expected] if exact else []
    if missing or extra:
        problems = [f"lacks {', '.join(missing)}"] * bool(missing)
        problems += [f"has the new {', '.join(extra)}"] * bool(extra)
        raise RunLogError(f"the log record {' and '.join(problems)}; every line has the same keys")


# ------------------------------------------------------------------------------------------------
# Where it ran
# ------------------------------------------------------------------------------------------------


def environment() -> dict:
    """Code, versions and hardware of this process, without its owner: no host, user or folder."""
    # of a study the first runs' records are there before the last run begins
    changes = _git("status", "--porcelain", "--", ":/", ":(top,exclude)records")
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(changes),  # untracked files count: the run may import them
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda or "none",
        "device": _device_name(),
        "devices_on_node": torch.cuda.device_count(),
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def real_paths(config: dict) -> dict[str, str]:
    """'section.key' -> absolute path of what a run reads: what `redact_paths` takes out."""
    keys = (("data", "train_dataset"), ("data", "val_dataset"), ("model", "checkpoint"))
    found = {f"{section}.{key}": config.get(section, {}).get(key) for section, key in keys}
    return {name: os.path.abspath(Path(path).expanduser()) for name, path in found.items() if path}


def redact_paths(value: Any) -> Any:
    """A copy of nested settings whose absolute paths say nothing of the machine.

    Paths inside the repository become relative to it; of others only '.../name' is left.
    """
    if isinstance(value, dict):
        return {key: redact_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_paths(item) for item in value]
    if not isinstance(value, str) or not value.startswith(("/", "~")):
        return value
    path = Path(value).expanduser()
    if path.is_relative_to(REPOSITORY):
        return str(path.relative_to(REPOSITORY))
    return f".../{path.name}"


def _git(*arguments: str) -> str:
    """Output of a git command in the repository, '' where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ------------------------------------------------------------------------------------------------
# TensorBoard and W&B
# ------------------------------------------------------------------------------------------------


def _start_tensorboard(folder: Path, epoch: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # purge_step: what an interrupted run wrote of the epochs done again disappears from the plots
    return SummaryWriter(str(folder), purge_step=epoch)


def _start_wandb(project: str, folder: Path, config: dict):
    try:
        import wandb
    except ImportError as error:
        raise RunLogError(
            f"logging.wandb={project} needs the package wandb; pip install wandb, or leave "
            f"logging.wandb empty"
        ) from error
    name = folder / "wandb_run_id"
    if not name.exists():
        write_atomically(name, lambda file: file.write(uuid.uuid4().hex[:12].encode()))
    return wandb.init(
        project=project, dir=str(folder), config=config, id=name.read_text(), resume="allow"
    )


# ------------------------------------------------------------------------------------------------
# Curves
# ------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREEN = "#1f5fa8", "#d9641e", "#2f8f5b"


def plot_curves(log_jsonl: str | Path, png: str | Path, note: str = "") -> None:
    """Draw a log.jsonl: accuracy against epochs and time, losses, schedules, speed.

    Args:
        log_jsonl: as RunLog writes it, one epoch at least.
        png: image to write, about 1500 x 1350 px.
        note: words for its title, as that the run was a trial.
    Raises:
        RunLogError: the log is empty or damaged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    lines = read_jsonl(log_jsonl)
    if not lines:
        raise RunLogError(f"{log_jsonl} is empty: there is nothing to draw before the first epoch")
    log = {key: [line[key] for line in lines] for key in lines[0]}
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
    title = _title(log, f"{times[-1]:.1f} {unit}") + (f"; {note}" if note else "")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    write_atomically(png, lambda file: figure.savefig(file, format="png"))


def _title(log: dict, time: str) -> str:
    epochs = f"{log['epoch'][-1]} epoch{'s' * (log['epoch'][-1] != 1)}"
    raw = f"top-1 {log['plain_top1'][-1]:.2f} % plain, {log['top1'][-1]:.2f} % as configured"
    if _has_ema(log):
        average = f"{log['ema_plain_top1'][-1]:.2f} % and {log['ema_top1'][-1]:.2f} %"
        raw += f" (averaged weights {average})"
    return f"{raw}\nafter {epochs} in {time}"


def _has_ema(log: dict) -> bool:
    """Without an average its columns repeat the raw ones and would only hide them."""
    return log["ema_top1"] != log["top1"] or log["val_loss_ema"] != log["val_loss"]


def _draw_accuracy(axes, log: dict, x: list, unit: str) -> None:
    views = [("plain_", BLUE, "plain"), ("", ORANGE, "as configured")]
    if _has_ema(log):
        ema = [(f"ema_{name}", color, f"{label}, EMA") for name, color, label in views]
        views = [*ema, *((name, color, f"{label}, raw") for name, color, label in views)]
    curves = {}  # by values: of two equal curves one would hide the other
    for name, color, label in views:
        curves.setdefault(tuple(log[f"{name}top1"]), (color, []))[1].append(label)
    for values, (color, labels) in curves.items():
        style = "--" if labels[0].endswith("raw") else "-"
        text = f"{' and '.join(labels)}: {values[-1]:.2f} %"
        axes.plot(x, values, style, color=color, label=text, **_dots(x))
    axes.legend(loc="lower right", frameon=False, title="top-1, at the end")
    _decorate(axes, f"top-1 accuracy against {unit}, %", unit)


def _draw_losses(axes, log: dict) -> None:
    curves = [("train_loss", GREEN, "-", "training"), ("val_loss", BLUE, "-", "validation")]
    if _has_ema(log):
        curves[1] = ("val_loss", BLUE, "--", "validation, raw")
        curves.append(("val_loss_ema", BLUE, "-", "validation, EMA"))
    for key, color, style, label in curves:
        axes.plot(log["epoch"], log[key], style, color=color, label=label, **_dots(log["epoch"]))
    axes.legend(frameon=False)
    _decorate(axes, "loss, nats", "epoch")


def _draw_speed(axes, log: dict) -> None:
    x, right = log["epoch"], axes.twinx()
    axes.plot(x, log["images_per_second"], color=GREEN, **_dots(x))
    share = [100 * value for value in log["data_wait_share"]]
    right.plot(x, share, color=ORANGE, **_dots(x))
    axes.set_ylim(0, 1.15 * max(log["images_per_second"]))
    right.set_ylim(0, max(10, 1.15 * max(share)))
    axes.set_ylabel("images/s", color=GREEN)
    right.set_ylabel("time waiting for data, %", color=ORANGE)
    right.spines[["top", "left"]].set_visible(False)
    _decorate(axes, "training speed and waiting for data", "epoch")


def _draw_schedule(axes, log: dict, key: str, title: str, drawstyle: str = "default") -> None:
    axes.plot(log["epoch"], log[key], color=BLUE, drawstyle=drawstyle, **_dots(log["epoch"]))
    axes.set_ylim(0, 1.1 * max(log[key]) or 1)
    _decorate(axes, title, "epoch")


def _dots(x: list) -> dict:
    """A short run is drawn with its points: one epoch alone would be invisible as a line."""
    return {"linewidth": 1.6, "marker": "o" if len(x) <= 30 else "", "markersize": 3.5}


def decorate(axes, title: str, xlabel: str) -> None:
    """Title, label of the x axis and a quiet grid: how every plot of the project looks."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _decorate(axes, title: str, xlabel: str) -> None:
    decorate(axes, title, xlabel)
    axes.xaxis.get_major_locator().set_params(integer=xlabel == "epoch")
    axes.set_xlim(left=0)
