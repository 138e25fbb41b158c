"""A run on disk: the checkpoint that it goes on from, and the one that it leaves."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fast_imagenet.checkpoint import load_checkpoint, load_into, save_checkpoint
from fast_imagenet.checks import differences

FRESH = {"epoch": 0, "best": -1.0, "seconds": 0.0}
PARTS = ("ema", "optimizer", "scaler")  # of the training, each with a state_dict


def restore_run(resume: str, folder: str, model: nn.Module, training, config: dict) -> dict:
    """Load the run so far into its parts.

    Args:
        resume: 'none', 'auto' (last.pt of `folder`, if it is there) or a checkpoint's path.
        folder: the run's folder.
        model: the raw network; its weights are overwritten.
        training: an object with PARTS; they are overwritten.
        config: settings of this run, nested; they must agree with the checkpoint's.

    Returns:
        {'epoch': finished, 'best': top-1 in percent, 'seconds': spent}; FRESH without a checkpoint.

    Raises:
        CheckpointError: the file is damaged or another network's.
        ValueError: it was made with other settings; the message lists them.
    """
    last = Path(folder, "last.pt")
    path = last if resume == "auto" else Path(resume)
    if resume == "none" or (path == last and not last.exists()):
        return dict(FRESH)
    state = load_checkpoint(path)
    if missing := [key for key in ("model", "config", *PARTS, *FRESH) if key not in state]:
        raise ValueError(
            f"{path} is no checkpoint of a run: it lacks {', '.join(missing)}; give a last.pt, or "
            f"start from weights with model.checkpoint"
        )
    if changed := differences(state["config"], config):
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(changed)}); restore them, or start "
            f"afresh in another logging.folder"
        )
    load_into(model, state["model"])
    for part in PARTS:
        getattr(training, part).load_state_dict(state[part])
    return {key: state[key] for key in FRESH}


def save_run(
    folder: str, model: nn.Module, training, config: dict, classes: list[str] | None, state: dict,
    *, best: bool,
) -> None:  # fmt: skip
    """Write last.pt, and best.pt as well when `best`; each whole or not at all.

    Args:
        folder, model, training, config: as restore_run.
        classes: class list of the data.
        state: the keys of FRESH.
        best: this is the best epoch so far.
    """
    parts = {part: getattr(training, part).state_dict() for part in PARTS}
    whole = {"model": model.state_dict(), **parts, "config": config, "classes": classes, **state}
    for name in ["last.pt", "best.pt"] if best else ["last.pt"]:
        save_checkpoint(Path(folder, name), whole)
