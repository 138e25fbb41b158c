"""The record of a run: what was asked, where it ran, one line per evaluated epoch, and its curves.

Files in the run's folder: config.json, environment.json, log.jsonl (one line per evaluated epoch,
the same keys every time, none null; where there is an EMA, those of raw weights in the last line
only), steps.jsonl (the loss of every step), at the end summary.json and curves.png; TensorBoard's
event files where it is installed. config.json names the files of the data by their absolute paths;
the other JSON files name no machine, user or folder. `python -m tools.report add` makes a record of
them that can be published.

To add a logger, write a Sink (a Tracker where it takes values of steps), put it into SINKS and
declare its setting in section `logging`.
"""

from __future__ import annotations

import math
import numbers
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fast_imagenet.engine.json_lines import (
    RunLogError,
    append_line,
    check_lines,
    drop_torn_line,
    read_jsonl,
    read_object,
    rewrite_lines,
)
from fast_imagenet.engine.metrics import RAW_AT_THE_END, RECORD_VERSION, metric_keys, raw_keys
from fast_imagenet.engine.plots import plot_curves
from fast_imagenet.environment import environment, redact_paths, with_real_paths
from fast_imagenet.files import write_atomically, write_json

# seconds: of this epoch's training. What metrics add (metrics.py): accuracies in percent, losses in
# nats; ema_: of the EMA weights; plain_: of the standard eval, else of the config eval.
RUN_KEYS = (
    *("epoch", "train_loss", "lr", "resolution", "images_per_second", "data_wait_share"),
    *("memory_gb", "seconds", "eval_seconds", "total_seconds"),
)


def record_keys(version: int | None = None) -> tuple[str, ...]:
    """Keys that every line of a log has, in a record of a version; None: of the newest."""
    return (*RUN_KEYS, *metric_keys(version))


LOG_KEYS = record_keys()


def record_version(environment: dict[str, Any]) -> int:
    """Version of the record that an environment.json belongs to; the first had no such key."""
    version = environment.get("record_version", 1)
    return version if type(version) is int else 1


class Sink:
    """Where the lines of a run's log go.

    Args:
        folder: of the run.
        config: settings, nested.
        version: of the record.
        steps: of an epoch.
    """

    def __init__(self, folder: Path, config: dict[str, Any], version: int, steps: int) -> None:
        self.folder, self.version, self.steps = folder, version, steps

    @classmethod
    def wanted(cls, config: dict[str, Any]) -> bool:
        """Whether the settings ask for it, and it can be had."""
        return True

    def write(self, record: dict[str, Any]) -> None:
        """One evaluated epoch: plain numbers, bool and str.

        After a resume an epoch may come again: what was written of it before no longer holds.
        """
        raise NotImplementedError

    def finish(self, summary: dict[str, Any]) -> None:
        """The run has reached its end, with this result; `close` follows."""

    def close(self) -> None:
        """The process stops here; the run may be resumed."""


class JsonLines(Sink):
    """log.jsonl: what plots, reports and resumed runs read.

    Raises:
        RunLogError: it cannot be continued; by `write`, too: a key is missing or new.
    """

    def __init__(self, folder: Path, config: dict[str, Any], version: int, steps: int) -> None:
        super().__init__(folder, config, version, steps)
        self._path, self._keys = folder / "log.jsonl", record_keys(version)
        # with an EMA, of the last line only
        self._optional = raw_keys() if config.get("ema", {}).get("decay") else []
        drop_torn_line(self._path)
        needed = [key for key in self._keys if key not in self._optional]
        check_lines(self._path, dict.fromkeys(needed, (int, float)))

    def write(self, record: dict[str, Any]) -> None:
        lines = read_jsonl(self._path)
        _check_keys(record, lines[0] if lines else self._keys, self._optional, exact=bool(lines))
        append_line(self._path, record)


class Tracker(Sink):
    """A program that shows runs: values against the steps of the run, in groups train/ and val/."""

    def write(self, record: dict[str, Any]) -> None:
        evaluated = {*metric_keys(), "eval_seconds"}
        apart = ("epoch", "lr", "images_per_second")  # log_step has the last two
        numbers = {k: v for k, v in record.items() if not isinstance(v, str) and k not in apart}
        named = {f"{'val' if k in evaluated else 'train'}/{k}": v for k, v in numbers.items()}
        self.log(named, record["epoch"] * self.steps)

    def log(self, values: dict[str, float], step: int) -> None:
        """Values after so many steps of the run; steps come in order, after a resume again."""
        raise NotImplementedError

    def show(self, grid_hwc: np.ndarray) -> None:
        """Training images as one, uint8 [h, w, 3], at the beginning of a run."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """Event files in the run's folder, where TensorBoard is installed."""

    _open: Any = None

    @classmethod
    def wanted(cls, config: dict[str, Any]) -> bool:
        if not config.get("logging", {}).get("tensorboard"):
            return False
        with suppress(ImportError):
            import torch.utils.tensorboard  # noqa: F401

            return True
        return False

    def _writer(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if self._open is None:
            # purge_step: what an interrupted run wrote of steps done again leaves the plots
            self._open = SummaryWriter(str(self.folder), purge_step=step)
        return self._open

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer(step).add_scalar(key, value, step)

    def write(self, record: dict[str, Any]) -> None:
        super().write(record)
        self._open.flush()

    def show(self, grid_hwc: np.ndarray) -> None:
        self._writer(0).add_image("train/images", grid_hwc, 0, dataformats="HWC")

    def finish(self, summary: dict[str, Any]) -> None:
        rows = "".join(f"| {key} | {value} |\n" for key, value in summary.items())
        step = summary.get("epoch", 0) * self.steps
        # a run that was killed at its end has its last values already: they are not purged
        self._writer(step + 1).add_text("val/summary", f"| | |\n|---|---|\n{rows}", step)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, the same one after a resume; WANDB_MODE=offline needs no network.

    Raises:
        RunLogError: the package is not installed.
    """

    def __init__(self, folder: Path, config: dict[str, Any], version: int, steps: int) -> None:
        super().__init__(folder, config, version, steps)
        project, name = config["logging"]["wandb"], folder / "wandb_run_id"
        try:
            import wandb
        except ImportError as error:
            raise RunLogError(
                f"logging.wandb={project} needs the package wandb; pip install '.[wandb]', or "
                f"leave logging.wandb empty"
            ) from error
        if not name.exists():
            write_atomically(name, lambda file: file.write(uuid.uuid4().hex[:12].encode()))
        options = {"config": redact_paths(config), "id": name.read_text(), "resume": "allow"}
        self._wandb = wandb
        self._run = wandb.init(project=project, dir=str(folder), **options)

    @classmethod
    def wanted(cls, config: dict[str, Any]) -> bool:
        return bool(config.get("logging", {}).get("wandb"))

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def show(self, grid_hwc: np.ndarray) -> None:
        self._run.log({"train/images": self._wandb.Image(grid_hwc)}, step=0)

    def finish(self, summary: dict[str, Any]) -> None:
        rows = [[key, str(value)] for key, value in summary.items()]
        self._run.log({"val/summary": self._wandb.Table(columns=["key", "value"], data=rows)})

    def close(self) -> None:
        self._run.finish()


SINKS: tuple[type[Sink], ...] = (JsonLines, TensorBoard, WeightsAndBiases)


class RunLog:
    """Writes the record of one run; every method does nothing when `enabled` is false.

    Args:
        folder: the run's folder, made when missing.
        config: nested dict of the settings, written as config.json.
        resume: the folder may hold an earlier part of this run.
        enabled: true on rank 0 only.
        steps: of an epoch.

    Raises:
        RunLogError: the folder holds a run and `resume` is false; its log is damaged; a sink is
            asked for and not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        config: dict[str, Any] | None = None,
        resume: bool = False,
        enabled: bool = True,
        steps: int = 1,
    ) -> None:
        self.folder, self.enabled = Path(folder), enabled
        self._log, self._steps = self.folder / "log.jsonl", self.folder / "steps.jsonl"
        self._sinks: list[Sink] = []
        self._trackers: list[Tracker] = []
        self._newer: set[str] = set()  # keys that the record of this run is too old for
        if not enabled:
            return
        if self._log.exists() and not resume:
            raise RunLogError(
                f"{folder} already holds a run (log.jsonl); resume it with training.resume=auto, "
                f"or choose another logging.folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "summary.json").unlink(missing_ok=True)  # of a run that is made longer
        drop_torn_line(self._steps)
        config, before = config or {}, read_object(self.folder / "environment.json")
        version = RECORD_VERSION
        if self._log.exists():
            version = max(RAW_AT_THE_END, record_version(before))
        self._newer = set(record_keys()) - set(record_keys(version))
        check_lines(self._steps, {"first_step": int, "losses": list})
        wanted = [sink for sink in SINKS if sink.wanted(config)]
        self._sinks = [sink(self.folder, config, version, steps) for sink in wanted]
        self._trackers = [sink for sink in self._sinks if isinstance(sink, Tracker)]
        write_json(self.folder / "config.json", with_real_paths(config))
        (self.folder / "paths.json").unlink(missing_ok=True)  # of an earlier version
        self._write_environment(before, version)

    def _write_environment(self, before: dict[str, Any], version: int) -> None:
        """Where the run is resumed elsewhere, the earlier places stay."""
        now = {"record_version": version, **environment()}
        earlier = before.pop("earlier", [])
        earlier = earlier if isinstance(earlier, list) else []
        if before and {"record_version": version, **before} != now:
            earlier = [*earlier, before]
        now |= {"earlier": earlier} if earlier else {}
        write_json(self.folder / "environment.json", now)

    def write(self, **record: Any) -> dict[str, Any]:
        """Give one epoch to all sinks; it is on the disk when this returns.

        Args:
            record: LOG_KEYS at least; the same keys at every call; finite numbers, bool or str.
        Returns:
            What was written: a resumed run has no metric that is newer than its record.
        Raises:
            RunLogError: a key is missing, new, null or not finite.
        """
        known = {key: value for key, value in record.items() if key not in self._newer}
        record = {key: _plain_value(key, value) for key, value in known.items()}
        for sink in self._sinks:
            sink.write(record)
        return record

    @property
    def follows_steps(self) -> bool:
        """Whether `log_step` and `show_images` reach anybody."""
        return bool(self._trackers)

    def log_step(self, step: int, **values: float) -> None:
        """Give values after so many steps of the run to the trackers, in group train/."""
        for tracker in self._trackers:
            tracker.log({f"train/{key}": value for key, value in values.items()}, step)

    def show_images(self, images_bhwc: np.ndarray) -> None:
        """Give training images, uint8 and b a square number, to the trackers as one image."""
        side = math.isqrt(len(images_bhwc))
        rows = [np.concatenate(list(row), axis=1) for row in np.split(images_bhwc, side)]
        for tracker in self._trackers:
            tracker.show(np.concatenate(rows))

    def write_steps(self, first_step: int, losses: list[float]) -> None:
        """Append the losses of consecutive steps to steps.jsonl; what they replace is dropped.

        Args:
            first_step: number of the first of them since the start of the run, from 0.
            losses: one per step.
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
            rewrite_lines(self._steps, kept)
        append_line(self._steps, {"first_step": first_step, "losses": losses})

    def truncate_after(self, epoch: int) -> None:
        """Drop the lines of epochs that will be done again: all later than `epoch`."""
        lines = read_jsonl(self._log) if self.enabled else []
        kept = [line for line in lines if line["epoch"] <= epoch]
        if len(kept) < len(lines):
            rewrite_lines(self._log, kept)

    def last(self) -> dict[str, Any]:
        """The last line of log.jsonl.

        Raises:
            RunLogError: there is none.
        """
        lines = read_jsonl(self._log)
        if not lines:
            raise RunLogError(f"{self._log} has lost its lines; restore it")
        return lines[-1]

    def finish(self, summary: dict[str, Any]) -> None:
        """Write curves.png, then summary.json, the last file of a finished run; close the sinks."""
        if not self.enabled:
            return
        plot_curves(self._log, self.folder / "curves.png", summary.get("cut_short", ""))
        for sink in self._sinks:
            sink.finish(redact_paths(summary))
        write_json(self.folder / "summary.json", redact_paths(summary))
        self.close()

    def close(self) -> None:
        """Close the sinks; can be called at any time and more than once."""
        self._trackers = []
        while self._sinks:
            self._sinks.pop().close()


def _plain_value(key: str, value: Any) -> Any:
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise RunLogError(f"log key {key} is {value!r}; a log holds finite numbers and text only")


def _check_keys(
    record: dict[str, Any], expected: Iterable[str], optional: list[str], exact: bool
) -> None:
    missing = [key for key in expected if key not in record and key not in optional]
    extra = [key for key in record if key not in expected and key not in optional] * exact
    if missing or extra:
        problems = [f"{', '.join(missing)} is missing"] * bool(missing)
        problems += [f"{', '.join(extra)} is new"] * bool(extra)
        raise RunLogError(
            f"in the log record {' and '.join(problems)}; every line has the same keys"
        )
