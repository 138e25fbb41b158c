"""A run on disk: the checkpoint that it goes on from, and the one that it leaves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fast_imagenet.checkpoint import CheckpointError, load_checkpoint, load_into, save_checkpoint
from fast_imagenet.checks import differences
from fast_imagenet.guard import CALM, NotFinite

FRESH = {
    "epoch": 0,  # finished ones
    "step": 0,  # of the epoch under way, as the three below
    "losses": [],
    "spent": 0.0,  # seconds of training
    "waited": 0.0,  # of these for data
    "best": -1.0,  # top-1
    "seconds": 0.0,  # of the finished epochs, evaluation included
}
LATER = {"waited"}  # what checkpoints of an older version may lack
PARTS = ("ema", "optimizer", "scaler")  # of the training, each with a state_dict


def restore_run(
    resume: str,
    folder: str,
    model: nn.Module,
    training,
    config: dict,
    data: dict,
    defaults: dict | None = None,
) -> dict:
    """Load the run so far into its parts.

    Args:
        resume: 'none', 'auto' (last.pt of `folder`, if it is there) or a checkpoint's path.
        folder: the run's folder.
        model: the raw network; its weights are overwritten.
        training: an object with PARTS; they are overwritten.
        config: settings of this run, nested; they must agree with the checkpoint's.
        data: what must not change about the data: its class list, its number of images, the
            checksum of its content; what a checkpoint of an older version lacks may be anything.
        defaults: of all settings, for a checkpoint from before one of them was there.

    Returns:
        The keys of FRESH: where the run stands; FRESH itself without a checkpoint.

    Raises:
        CheckpointError: the file is damaged or another network's.
        ValueError: it was made with other settings; the message lists them.
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
        known = {key: value for key, value in data.items() if key in state["data"]}
        changed += differences({"data": state["data"]}, {"data": known})
        if not changed:
            load_into(model, state["model"])
            for part in PARTS:
                getattr(training, part).load_state_dict(state[part])
            return {key: type(fresh)(state.get(key, fresh)) for key, fresh in FRESH.items()}
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be gone on from ({error}); use another one") from error
    raise ValueError(
        f"{path} was made with other settings ({'; '.join(changed)}); restore them, or start "
        f"afresh in another logging.folder"
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


@torch.no_grad()
def refuse_wild_weights(model: nn.Module, training, state: dict) -> None:
    """A step of finite loss can still leave weights that are not: such a run is never saved.

    Raises:
        NotFinite: names the tensor and the place in the run.
    """
    average = {f"ema.{name}": value for name, value in training.ema.state_dict().items()}
    tensors = model.state_dict() | average
    fine = {k: v.isfinite().all() for k, v in tensors.items() if v.is_floating_point()}
    flags = torch.stack(list(fine.values())).tolist()  # one wait for the device
    wild = [name for name, good in zip(fine, flags, strict=True) if not good]
    if wild:
        raise NotFinite(
            f"{wild[0]} is not finite in epoch {state['epoch'] + 1} after {state['step']} steps of "
            f"it; {CALM}"
        )


def save_run(
    folder: str,
    model: nn.Module,
    training,
    config: dict,
    data: dict,
    ranks,
    state: dict,
    best: bool = False,
) -> None:
    """Write last.pt, and best.pt as well when `best`; each whole or not at all.

    Every rank calls it, rank 0 writes. Running statistics of batch norm are averaged over the ranks
    first: they are linear in what each rank saw, so a run that goes on ends with the same mean.

    Args:
        folder, model, training, config, data: as restore_run.
        ranks: who writes, and whose statistics are averaged.
        state: the keys of FRESH.
        best: this is the best epoch so far.

    Raises:
        CheckpointError: a file cannot be written; the previous one stays.
        NotFinite: a weight is not finite; nothing is written.
    """
    buffers = dict(model.named_buffers())
    ranks.average(buffers)
    average = training.ema.state_dict()
    ranks.average({name: average[name] for name in buffers if name in average})
    refuse_wild_weights(model, training, state)
    if not ranks.is_main:
        return
    parts = {part: getattr(training, part).state_dict() for part in PARTS}
    info = {"use_blurpool": config["training"]["use_blurpool"], "classes": data["classes"]}
    whole = {"model": model.state_dict(), **parts, "config": config, "data": data, "info": info}
    whole |= state
    for name in ["last.pt", "best.pt"] if best else ["last.pt"]:
        save_checkpoint(Path(folder, name), whole)
