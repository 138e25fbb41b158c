"""A run on disk: the checkpoint that it goes on from, and the one that it leaves."""

from __future__ import annotations

import errno
import math
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from fast_imagenet.engine.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_into,
    refuse_misfit,
    save_checkpoint,
)
from fast_imagenet.engine.distributed import Distributed
from fast_imagenet.engine.finite import refuse_not_finite
from fast_imagenet.engine.logger import epoch_line
from fast_imagenet.models.origin import IMAGENET, input_norm
from fast_imagenet.validation import differences

FRESH = {
    "epoch": 0,  # finished ones
    "step": 0,  # of the epoch under way, as the three below
    "losses": [],
    "spent": 0.0,  # seconds of training
    "waited": 0.0,  # of these for data
    "best": -1.0,  # top-1
    "seconds": 0.0,  # of the finished epochs, evaluation included
}
LATER = {"waited"}  # what may be missing from checkpoints of an older version
PARTS = ("ema", "optimizer", "scaler")  # of the training, each with a state_dict
MOMENTS = ("momentum_buffer", "exp_avg")  # of an optimizer, shaped as the weight


def restore_run(
    resume: str,
    folder: str,
    model: nn.Module,
    training,
    config: dict,
    data: dict,
    defaults: dict | None = None,
    *,
    steps: int,
) -> dict:
    """Load the run so far into its parts.

    Args:
        resume: 'none', 'auto' (last.pt of `folder`, if it is there) or a checkpoint's path.
        folder: the run's folder.
        model: the raw network; its weights are overwritten.
        training: an object with PARTS; they are overwritten.
        config: settings of this run, nested; they must agree with the checkpoint's.
        data: what must not change about the data: `data_identity`; what is missing from a
            checkpoint of an older version, or unknown, may be anything.
        defaults: of all settings, for a checkpoint from before one of them was there.
        steps: of an epoch.

    Returns:
        The keys of FRESH: where the run stands; FRESH itself without a checkpoint.

    Raises:
        CheckpointError: the file is damaged or another network's.
        ValueError: it was made with other settings (the message lists them), or says of itself
            what cannot be.
    """
    last = Path(folder, "last.pt")
    path = last if resume == "auto" else Path(resume)
    if resume == "none" or (path == last and not last.exists()):
        _refuse_lost_checkpoint(Path(folder))
        return {**FRESH, "losses": []}
    state = load_checkpoint(path)
    needed = [key for key in ("model", "config", "data", *PARTS, *FRESH) if key not in LATER]
    if missing := [key for key in needed if key not in state]:
        raise ValueError(
            f"{path} is no checkpoint of a run: it lacks {', '.join(missing)}; give a last.pt, or "
            f"start from weights with model.checkpoint"
        )
    try:
        changed = differences(state["config"], config, defaults)
        both = [k for k, v in data.items() if v is not None and state["data"].get(k) is not None]
        before, now = ({key: d[key] for key in both} for d in (state["data"], data))
        changed += differences({"data": before}, {"data": now})
        changed += _other_norm(state.get("info", {}), input_norm(model))
        if not changed:
            place = {key: state.get(key, fresh) for key, fresh in FRESH.items()}
            _refuse_impossible(place, config["training"]["epochs"], steps)
            _load_parts(state, model, training)
            return place
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be resumed from ({error}); use another one") from error
    raise ValueError(
        f"{path} was made with other settings ({'; '.join(changed)}); restore them, or start "
        f"afresh in another logging.folder"
    )


def data_identity(train, val) -> dict:
    """What must stay the same about the data of two loaders for a run to resume."""
    return {
        "classes": train.classes,
        "num_classes": train.num_classes,
        "images": train.num_samples,
        "content": train.content,
        "val_images": val.num_samples,
        "val_content": val.content,
    }


def _other_norm(info: dict, norm: tuple) -> list[str]:
    """How mean and std of a checkpoint's images differ from this run's; where it has none: [].

    Those from before it had any are of ImageNet's.
    """
    before = [tuple(info.get(k, d)) for k, d in zip(("mean", "std"), IMAGENET, strict=True)]
    return [f"mean and std of the images: {before} -> {list(norm)}"] * (before != list(norm))


def _refuse_impossible(place: dict, epochs: int, steps: int) -> None:
    """Where a run stands must be a place in it.

    Args:
        place: the keys of FRESH, as a file has them.
        epochs: of the run.
        steps: of an epoch.

    Raises:
        ValueError: names the value and its rule.
    """
    whole = {"epoch": epochs, "step": steps if place["epoch"] != epochs else 0}
    for key, most in whole.items():
        if type(place[key]) is not int or not 0 <= place[key] <= most:
            raise ValueError(f"{key} is {place[key]!r:.40}, not a whole number from 0 to {most}")
    for key, least, most in (
        *(("best", -1.0, 100.0), ("seconds", 0.0, math.inf), ("spent", 0.0, math.inf)),
        ("waited", 0.0, place["spent"]),
    ):
        number = place[key]
        if type(number) not in (int, float) or not least <= number <= most or number == math.inf:
            raise ValueError(f"{key} is {number!r:.40}, not a number from {least:g} to {most:g}")
    losses, step = place["losses"], place["step"]
    if type(losses) is not list or len(losses) != step:
        count = len(losses) if type(losses) is list else type(losses).__name__
        raise ValueError(f"losses are {count}, not one for each of {step} steps")
    if not all(type(loss) is float and math.isfinite(loss) for loss in losses):
        raise ValueError("a loss is not a finite number")
    if step and not place["spent"]:
        raise ValueError(f"spent is 0 s after {step} steps")


def _load_parts(state: dict, model: nn.Module, training) -> None:
    """Weights, EMA, optimizer and scaler of a checkpoint.

    Raises:
        ValueError: one of them does not fit this run, or is not finite.
    """
    average = training.ema.state_dict()
    refuse_misfit(average, state["ema"], "the EMA")
    options = [_options(group) for group in training.optimizer.param_groups]
    load_into(model, state["model"])
    for part in PARTS:
        getattr(training, part).load_state_dict(state[part])
    for group, built in zip(training.optimizer.param_groups, options, strict=True):
        if (found := _options(group)) != built:
            raise ValueError(f"its optimizer has {found}, and the settings say {built}")
    for weight, entries in training.optimizer.state.items():
        for name, value in entries.items():
            misfit = name in MOMENTS and value is not None and value.shape != weight.shape
            wild = isinstance(value, torch.Tensor) and not value.isfinite().all()
            if misfit or wild:
                raise ValueError(f"{name} of its optimizer is not finite or of another shape")


def _options(group: dict) -> dict:
    """Options of a group that the settings decide; others are the optimizer's own counters."""
    fixed = ("weight_decay", "momentum", "dampening", "nesterov", "betas", "eps")
    return {key: group[key] for key in fixed if key in group}


def catch_up_best(folder: str, state: dict) -> None:
    """Make best.pt of last.pt where that is the best epoch, and best.pt is older or missing.

    Args:
        folder: of the run; it resumes from its last.pt.
        state: of last.pt.

    Raises:
        CheckpointError: best.pt cannot be written.
    """
    best, last = Path(folder, "best.pt"), Path(folder, "last.pt")
    line = epoch_line(folder, state["epoch"]) or {}
    if state["step"] or line.get("ema_top1") != state["best"]:
        return
    with suppress(CheckpointError):
        if load_checkpoint(best).get("best") == state["best"]:
            return
    save_checkpoint(best, load_checkpoint(last))


def refuse_finished_elsewhere(resume: str, folder: str, at: str) -> None:
    """A finished run can end again in its own folder, where its log is, and in no other.

    Args:
        resume, folder: as restore_run.
        at: where it ended, in words.

    Raises:
        ValueError: `folder` has no log; it is removed if it is empty.
    """
    place = Path(folder)
    if resume in ("none", "auto") or (place / "log.jsonl").exists():
        return
    with suppress(OSError):  # made for this run
        place.rmdir()
    raise ValueError(
        f"training.resume={resume} is where its run ended, {at}: there is nothing left to train "
        f"into logging.folder={folder}; to evaluate it, set training.eval_only=1 and "
        f"model.checkpoint={resume}"
    )


def _refuse_lost_checkpoint(folder: Path) -> None:
    log = folder / "log.jsonl"
    # one line may be: a run can end between its first line and its first checkpoint
    if log.exists() and log.read_bytes().count(b"\n") > 1:
        raise ValueError(
            f"{folder} holds the log of a run and no last.pt to go on from; bring it back, or "
            f"start afresh in another logging.folder"
        )


def last_good(folder: str | Path) -> str:
    """Which checkpoint of a run is the last one, in words."""
    path = Path(folder, "last.pt")
    if not path.exists():
        return "no checkpoint had been written yet"
    try:
        state = load_checkpoint(path)
        place = f"epoch {state['epoch'] + 1}, after {state['step']} steps of it"
    except (CheckpointError, KeyError, TypeError):
        return f"{path} is as it was"
    return f"the last good checkpoint, {path} ({place}), is as it was"


def run_info(config: dict, data: dict, model: nn.Module) -> dict:
    """What a file of weights says about its network, so that nobody has to assume it.

    Args:
        config: settings of the run, nested.
        data: its classes and num_classes.
        model: the network, raw or wrapped.
    """
    mean, std = input_norm(model)
    return {
        "arch": config["model"]["arch"],
        "num_classes": data.get("num_classes"),
        "classes": data["classes"],
        "use_blurpool": config["training"]["use_blurpool"],
        "mean": list(mean),
        "std": list(std),
    }


def refuse_wild_weights(model: nn.Module, training, state: dict) -> None:
    """As finite.refuse_not_finite, of a run's weights and their EMA."""
    average = {f"ema.{name}": value for name, value in training.ema.state_dict().items()}
    place = f"epoch {state['epoch'] + 1} after {state['step']} steps of it"
    refuse_not_finite(model.state_dict() | average, place)


def save_run(
    folder: str,
    model: nn.Module,
    training,
    config: dict,
    data: dict,
    distributed: Distributed,
    state: dict,
    best: bool = False,
) -> None:
    """Write last.pt, and best.pt before it when `best`; each whole or not at all.

    Every rank calls it, rank 0 writes. Running statistics of batch norm are averaged over the ranks
    first: they are linear in what each rank saw, so a run that goes on ends with the same mean.

    Args:
        folder, model, training, config, data: as restore_run.
        distributed: who writes, and whose statistics are averaged.
        state: the keys of FRESH.
        best: this is the best epoch so far.

    Raises:
        CheckpointError: a file cannot be written; the previous one stays.
        FileNotFoundError: the folder has been removed.
        NotFinite: a weight is not finite; nothing is written.
    """
    buffers = dict(model.named_buffers())
    distributed.all_reduce_mean(buffers)
    average = training.ema.state_dict()
    distributed.all_reduce_mean({name: average[name] for name in buffers if name in average})
    refuse_wild_weights(model, training, state)
    if not distributed.is_main:
        return
    if not Path(folder).is_dir():  # made anew, it would hold no settings and no log of the run
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))
    parts = {part: getattr(training, part).state_dict() for part in PARTS}
    info = run_info(config, data, model)
    whole = {"model": model.state_dict(), **parts, "config": config, "data": data, "info": info}
    whole |= state
    # best.pt first: a run killed between the two evaluates its epoch again, and writes both
    for name in ["best.pt", "last.pt"] if best else ["last.pt"]:
        save_checkpoint(Path(folder, name), whole)
