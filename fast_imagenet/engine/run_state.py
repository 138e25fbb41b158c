"""A run on disk: the checkpoint that it resumes from, and those that it leaves."""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from shutil import copyfile
from types import SimpleNamespace
from typing import Any

import numpy as np

from fast_imagenet.engine.checkpoint import FORMAT, load_run_checkpoint, save_checkpoint
from fast_imagenet.engine.distributed import Distributed
from fast_imagenet.engine.finite import refuse_not_finite
from fast_imagenet.engine.schedules import lr_schedule
from fast_imagenet.engine.train_state import TrainState
from fast_imagenet.engine.weights import load_into, refuse_misfit
from fast_imagenet.models.origin import input_norm
from fast_imagenet.validation import differences

PARTS = ("ema", "optimizer", "scaler")  # of a TrainState, each with a state_dict
SAMPLED = 32  # places in an epoch at which two schedules are compared
MOMENTS = ("momentum_buffer", "exp_avg")  # of an optimizer, shaped as the weight


@dataclass
class Position:
    """Where a run stands; a checkpoint holds these keys."""

    epoch: int = 0  # finished ones
    step: int = 0  # of the epoch under way, as the three below
    losses: list[float] = field(default_factory=list)
    spent: float = 0.0  # seconds of training
    waited: float = 0.0  # of these for data
    best: float = -1.0  # top-1
    seconds: float = 0.0  # of the finished epochs, evaluation included

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1} after {self.step} steps of it"

    def check(self, epochs: int, steps: int) -> None:
        """It must be a place in a run of `epochs` epochs of `steps` steps.

        Raises:
            ValueError: names the value and its rule.
        """
        limits = {"epoch": epochs, "step": steps if self.epoch != epochs else 0}
        for key, limit in limits.items():
            value = getattr(self, key)
            if type(value) is not int or not 0 <= value <= limit:
                raise ValueError(f"{key} is {value!r:.40}, not a whole number from 0 to {limit}")
        for key, low, high in (
            *(("best", -1.0, 100.0), ("seconds", 0.0, math.inf), ("spent", 0.0, math.inf)),
            ("waited", 0.0, self.spent),
        ):
            number = getattr(self, key)
            if type(number) not in (int, float) or not low <= number <= high or number == math.inf:
                raise ValueError(f"{key} is {number!r:.40}, not a number from {low:g} to {high:g}")
        if type(self.losses) is not list or len(self.losses) != self.step:
            count = len(self.losses) if type(self.losses) is list else type(self.losses).__name__
            raise ValueError(f"losses are {count}, not one for each of {self.step} steps")
        if not all(type(loss) is float and math.isfinite(loss) for loss in self.losses):
            raise ValueError("a loss is not a finite number")
        if self.step and not self.spent:
            raise ValueError(f"spent is 0 s after {self.step} steps")


@dataclass
class RunCheckpoints:
    """last.pt and best.pt of a run.

    Args:
        folder: of the run.
        state: what is saved and restored.
        config: settings of the run, nested; those of a checkpoint must agree.
        data: what must not change about the data: `data_identity`. What is unknown, here or in the
            checkpoint, may be anything.
        distributed: every rank calls the methods, rank 0 writes.
    """

    folder: Path
    state: TrainState
    config: dict[str, Any]
    data: dict[str, Any]
    distributed: Distributed

    def restore(self, resume: str, steps: int, defaults: dict[str, Any] | None = None) -> Position:
        """Load the run so far into `state`.

        Args:
            resume: 'none', 'auto' (last.pt of the folder, if it is there) or a checkpoint's path.
            steps: of an epoch.
            defaults: of all settings, for a checkpoint from before one of them was there.
        Returns:
            Where the run stands; its beginning without a checkpoint.
        Raises:
            CheckpointError: the file is damaged or another network's.
            ValueError: it was made with other settings (the message lists them), or its values are
                impossible.
        """
        last = self.folder / "last.pt"
        path = last if resume == "auto" else Path(resume)
        if resume == "none" or (path == last and not last.exists()):
            _refuse_lost_checkpoint(self.folder)
            return Position()
        saved, keys = load_run_checkpoint(path), [key.name for key in fields(Position)]
        if missing := [k for k in ("model", "config", "data", *PARTS, *keys) if k not in saved]:
            raise ValueError(
                f"{path} is not a checkpoint of a run: {', '.join(missing)} is missing; give a "
                f"last.pt, or start from weights with model.checkpoint"
            )
        try:
            if not (changed := self._differences(saved, defaults)):
                position = Position(**{key: saved[key] for key in keys})
                position.check(self.config["training"]["epochs"], steps)
                _load_parts(saved, self.state)
                return position
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} cannot be resumed from ({reason}); use another one"
            ) from error
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(changed)}); restore them, or start "
            f"afresh in another logging.folder, from these weights with model.checkpoint={path}"
        )

    def _differences(self, saved: dict[str, Any], defaults: dict[str, Any] | None) -> list[str]:
        """Settings, data and mean and std of the images that a checkpoint has differently."""
        changed = differences(saved["config"], self.config, defaults)
        changed = [_why_no_longer(one, saved, self.config) for one in changed]
        changed = [one for one in changed if one]
        known = [k for k, v in self.data.items() if None not in (v, saved["data"].get(k))]
        before, now = ({key: d[key] for key in known} for d in (saved["data"], self.data))
        changed += differences({"data": before}, {"data": now})
        norm = list(input_norm(self.state.model))
        norm_before = [tuple(saved["info"][key]) for key in ("mean", "std")]
        text = f"mean and std of the images: {norm_before} -> {norm}"
        return changed + [text] * (norm_before != norm)

    def save(self, position: Position, best: bool = False) -> None:
        """Write last.pt, and best.pt before it when `best`; each whole or not at all.

        Running statistics of batch norm are averaged over the ranks first: they are linear in what
        each rank saw, so a run that is resumed ends with the same mean.

        Raises:
            CheckpointError: a file cannot be written; the previous one stays.
            FileNotFoundError: the folder has been removed.
            NotFinite: a weight is not finite; nothing is written.
        """
        self.distributed.average_statistics(self.state)
        self.refuse_not_finite(position)
        if not self.distributed.is_main:
            return
        if not self.folder.is_dir():  # made anew, it would hold no settings and no log of the run
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self.folder))
        content: dict[str, Any] = {"format": FORMAT, "model": self.state.model.state_dict()}
        content |= {part: getattr(self.state, part).state_dict() for part in PARTS}
        content |= {"config": self.config, "data": self.data, "info": self.info()} | vars(position)
        # best.pt first: a run killed between the two evaluates its epoch again, and writes both
        for name in ["best.pt", "last.pt"] if best else ["last.pt"]:
            save_checkpoint(self.folder / name, content)

    def refuse_not_finite(self, position: Position) -> None:
        """As finite.refuse_not_finite, of the weights and their EMA."""
        average = {f"ema.{name}": value for name, value in self.state.ema.state_dict().items()}
        refuse_not_finite(self.state.model.state_dict() | average, str(position))

    def info(self) -> dict[str, Any]:
        """What a file of weights records about its network, so that nobody has to assume it."""
        mean, std = input_norm(self.state.model)
        return {
            "arch": self.config["model"]["arch"],
            "num_classes": self.data.get("num_classes"),
            "classes": self.data["classes"],
            "use_blurpool": self.config["training"]["use_blurpool"],
            "blur_max_pool": self.config["training"]["blur_max_pool"],
            "mean": list(mean),
            "std": list(std),
        }


def _why_no_longer(change: str, saved: dict[str, Any], config: dict[str, Any]) -> str:
    """A change of the settings; '' where it makes the run longer and leaves what is done as it was.

    That is so where the learning rate has been the same until here, as with step, or on the flat
    part of flat_cosine. Resolutions and the EMA's decay do not depend on the length.
    """
    if not change.startswith("training.epochs: "):
        return change
    before, now = saved["config"]["training"]["epochs"], config["training"]["epochs"]
    lr, done = SimpleNamespace(**config["lr"]), saved["epoch"] + bool(saved["step"])
    short, long = (lr_schedule(lr, epochs, 1.0) for epochs in (before, now))
    places = np.linspace(0, done, SAMPLED * done + 1)  # with the next step: no decay has begun
    if now > before and all(short(place) == long(place) for place in places):
        return ""
    return f"{change}, under which lr.lr_schedule_type={lr.lr_schedule_type} has other rates so far"


def data_identity(train: Any, val: Any) -> dict[str, Any]:
    """What must stay the same about the data of two loaders for a run to resume."""
    return {
        "classes": train.classes,
        "num_classes": train.num_classes,
        "images": train.num_samples,
        "content": train.content,
        "val_images": val.num_samples,
        "val_content": val.content,
    }


def _load_parts(saved: dict[str, Any], state: TrainState) -> None:
    """Weights, EMA, optimizer and scaler of a checkpoint.

    Raises:
        ValueError: one of them does not fit this run, or is not finite.
    """
    refuse_misfit(state.ema.state_dict(), saved["ema"], "the EMA")
    options = [_options(group) for group in state.optimizer.param_groups]
    load_into(state.model, saved["model"])
    for part in PARTS:
        getattr(state, part).load_state_dict(saved[part])
    for group, built in zip(state.optimizer.param_groups, options, strict=True):
        if (found := _options(group)) != built:
            raise ValueError(f"its optimizer has {found}, not {built} as the settings")
    for weight, entries in state.optimizer.state.items():
        for name, value in entries.items():
            misfit = name in MOMENTS and value is not None and value.shape != weight.shape
            if misfit or (hasattr(value, "isfinite") and not value.isfinite().all()):
                raise ValueError(f"{name} of its optimizer is not finite or of another shape")


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Options of a group that the settings decide; others are the optimizer's own counters."""
    fixed = ("weight_decay", "momentum", "dampening", "nesterov", "betas", "eps", "lr_scale")
    return {key: group[key] for key in fixed if key in group}


def refuse_finished_without_log(resume: str, folder: Path, at: str) -> None:
    """A finished run can end again in its own folder, where its log is, and in no other.

    Args:
        resume: as RunCheckpoints.restore.
        folder: of the run.
        at: where it ended, in words.

    Raises:
        ValueError: `folder` has no log.
    """
    if (folder / "log.jsonl").exists():
        return
    weights, ended = resume, f"training.resume={resume} is where its run ended, {at}: there is "
    ended += f"nothing left to train into logging.folder={folder}"
    if resume == "auto":
        weights = str(folder / "last.pt")
        ended = f"{folder} holds a finished run, {at}, without its log.jsonl: bring that back"
    raise ValueError(
        f"{ended}; a larger training.epochs continues it where its schedule allows; "
        f"model.checkpoint={weights} begins a new run with its weights, in another "
        f"logging.folder, or evaluates them with training.eval_only=1"
    )


def fork_log(checkpoint: Path, folder: Path) -> None:
    """Begin the record of a run that is resumed elsewhere with the record so far.

    Args:
        checkpoint: that it is resumed from, in the folder of a run, or where there is no log.
        folder: of the new run.
    """
    for name in ("steps.jsonl", "environment.json", "log.jsonl"):
        if (source := checkpoint.parent / name).is_file():
            copyfile(source, folder / name)


def _refuse_lost_checkpoint(folder: Path) -> None:
    log = folder / "log.jsonl"
    # one line may be: a run can end between its first line and its first checkpoint
    if log.exists() and log.read_bytes().count(b"\n") > 1:
        raise ValueError(
            f"{folder} holds the log of a run and no last.pt to resume from; bring it back, or "
            f"start afresh in another logging.folder"
        )


def last_checkpoint(folder: Path) -> str:
    """Which checkpoint of a run is the last one, in words."""
    path = folder / "last.pt"
    if not path.exists():
        return "no checkpoint had been written yet"
    return f"the last good checkpoint, {path}, is unchanged"
