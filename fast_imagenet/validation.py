"""Combinations of valid settings that cannot work, found before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fast_imagenet.arch_names import unknown_arch

# The least value of each variable that torchrun sets.
RANK_VARIABLES = {
    "WORLD_SIZE": 1,
    "LOCAL_WORLD_SIZE": 1,
    "RANK": 0,
    "LOCAL_RANK": 0,
    "MASTER_PORT": 0,
}


def validate(cfg: SimpleNamespace) -> list[str]:
    """What is wrong with the settings of train_imagenet.py together, one sentence each.

    Args:
        cfg: the tree of settings, each valid on its own.

    Returns:
        Sentences that name the values, the rule and the fix; empty when the run can start.
        Checks whether data files exist; opens none.
    """
    of_ranks = list(_rank_problems())
    problems = [*of_ranks, *_choice_problems(cfg), *_file_problems(cfg)]
    if not cfg.training.eval_only:
        # without a valid number of ranks the part of a batch that one of them gets is unknown
        problems += () if of_ranks else _batch_problems(cfg)
        problems += [*_schedule_problems(cfg), *_step_problems(cfg)]
    return problems


def _rank_problems() -> Iterator[str]:
    """What is wrong with the environment that torchrun sets, and others by hand."""
    given = {name: text for name in RANK_VARIABLES if (text := os.environ.get(name)) is not None}
    for name, text in given.items():
        if not (text.isdecimal() and len(text) < 8 and int(text) >= RANK_VARIABLES[name]):
            what = f"{name}={text!r} in the environment is not a valid number"
            yield f"{what}: unset it, or start with torchrun"
            return
    rank, world = int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if rank >= world:
        what = f"RANK={rank} in the environment is not below WORLD_SIZE={world}"
        yield f"{what}: unset both, or start with torchrun"
    if world > 1 and missing:
        what = f"WORLD_SIZE={world} is in the environment and {', '.join(missing)} not"
        yield f"{what}: unset it, or start with torchrun"


def _batch_problems(cfg: SimpleNamespace) -> Iterator[str]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch, micro = cfg.training.batch_size, cfg.training.micro_batch_size
    per_rank = batch // world
    per_pass = micro or per_rank
    if batch % world:
        yield f"training.batch_size={batch} does not divide by {world} ranks: choose a multiple"
    if micro and per_rank % micro:
        what = f"training.micro_batch_size={micro} does not divide the {per_rank} images of a rank"
        yield f"{what}: choose a divisor"
    if (cfg.augment.mixup > 0 or cfg.augment.cutmix > 0) and per_pass % 2:
        what = f"augment.mixup and augment.cutmix pair images, but a forward pass has {per_pass}"
        yield f"{what}: choose an even batch"


def _schedule_problems(cfg: SimpleNamespace) -> Iterator[str]:
    lr, size, augment = cfg.lr, cfg.resolution, cfg.augment
    if lr.lr_peak_epoch >= cfg.training.epochs:
        yield (
            f"lr.lr_peak_epoch={lr.lr_peak_epoch} is not before the end of the run, "
            f"training.epochs={cfg.training.epochs}: lower lr.lr_peak_epoch; to try the beginning "
            f"of a run, leave both and set training.max_steps"
        )
    if size.start_ramp > size.end_ramp:
        what = f"resolution.start_ramp={size.start_ramp} is after"
        yield f"{what} resolution.end_ramp={size.end_ramp}: swap them"
    if size.min_res != size.max_res and size.start_ramp == size.end_ramp == 0:
        yield (
            f"resolution.min_res={size.min_res} is never used while resolution.start_ramp and "
            f"resolution.end_ramp are 0: set it to resolution.max_res={size.max_res} too, or set "
            f"the ramp"
        )
    if augment.crop_min_area > augment.crop_max_area:
        what = f"augment.crop_min_area={augment.crop_min_area} is above"
        yield f"{what} augment.crop_max_area={augment.crop_max_area}: swap them"


def _step_problems(cfg: SimpleNamespace) -> Iterator[str]:
    augment, training = cfg.augment, cfg.training
    if augment.policy == "rand_augment_timm" and augment.policy_magnitude > 10:
        yield (
            f"augment.policy_magnitude={augment.policy_magnitude:g} is on a scale to 30, that of "
            f"augment.policy=rand_augment_timm ends at 10: lower it"
        )
    if augment.flip_mode == "alternating" and augment.flip != 0.5:
        what = f"augment.flip={augment.flip:g}, but augment.flip_mode=alternating mirrors half of"
        yield f"{what} the images: set augment.flip to 0.5"
    if training.bce_threshold and not training.loss.startswith("bce"):
        what = f"training.bce_threshold={training.bce_threshold:g} is of binary losses, not of"
        yield f"{what} training.loss={training.loss}: set that to bce or bce_mean"
    if training.bce_threshold and training.label_smoothing:
        what = f"training.label_smoothing={training.label_smoothing:g} has no effect under"
        yield f"{what} training.bce_threshold, which makes targets 0 or 1: set it to 0"
    if training.blur_max_pool and not training.use_blurpool:
        yield "training.blur_max_pool is a part of training.use_blurpool: switch that on too"
    if cfg.ema.every > 1 and not cfg.ema.decay:
        yield f"ema.every={cfg.ema.every} needs an EMA, and ema.decay=0: set it"
    if training.nesterov and training.momentum == 0:
        yield "training.nesterov needs momentum, and training.momentum=0: raise it"
    if training.nesterov and training.optimizer != "sgd":
        what = f"training.nesterov belongs to training.optimizer=sgd, not to {training.optimizer}"
        yield f"{what}: switch it off"


def _choice_problems(cfg: SimpleNamespace) -> Iterator[str]:
    backend = cfg.data.backend
    if fault := unknown_arch(cfg.model.arch):
        yield f"model.arch={cfg.model.arch} is {fault}"
    if cfg.data.transforms == "gpu" and backend != "torchvision":
        what = f"data.transforms=gpu needs data.backend=torchvision, not {backend}"
        yield f"{what}: change one of them"
    if backend == "torchvision" and not cfg.data.in_memory:
        yield (
            "data.in_memory=false needs data.backend=ffcv: with torchvision the order is fully "
            "random; leave it out, or change the backend"
        )
    if backend == "torchvision" and cfg.data.resize == "area":
        yield "data.resize=area needs data.backend=ffcv: torchvision has bilinear and bicubic"
    yield from _weights_problems(cfg)


def _weights_problems(cfg: SimpleNamespace) -> Iterator[str]:
    model, training, places = cfg.model, cfg.training, getattr(cfg, "_places", {})

    def is_meant(
        key: str,
    ) -> bool:  # not where a config says it of the training of an evaluated file
        evaluated = training.eval_only and model.checkpoint
        return not evaluated or places.get(key) == "command line"

    if model.checkpoint and model.pretrained and is_meant("model.pretrained"):
        what = f"model.pretrained=true and model.checkpoint={model.checkpoint} both name weights"
        yield f"{what}: leave one out"
    if training.eval_only and training.dry_run:
        yield "training.dry_run checks a training, and training.eval_only is none: drop one of them"
    if training.eval_only and model.new_head and is_meant("model.new_head"):
        yield "model.new_head draws a head that nothing has trained: leave it out of an evaluation"
    if model.checkpoint or model.pretrained:
        return
    if training.eval_only:
        yield (
            "training.eval_only has nothing to evaluate: set model.checkpoint to a file, or "
            "model.pretrained=true"
        )
    for key, value, default in (
        ("model.new_head", model.new_head, False),
        ("training.freeze", training.freeze, "none"),
    ):
        if value != default:
            what = f"{key}={value} is for weights that are given, and there are none"
            yield f"{what}: set model.checkpoint or model.pretrained"


def _file_problems(cfg: SimpleNamespace) -> Iterator[str]:
    folder, resume, weights = Path(cfg.logging.folder), cfg.training.resume, cfg.model.checkpoint
    eval_only, is_file = cfg.training.eval_only, resume not in ("none", "auto")
    for key in ["val_dataset"] if eval_only else ["train_dataset", "val_dataset"]:
        yield from _data_problems(cfg, key, Path(getattr(cfg.data, key)))
    if weights and not Path(weights).is_file():
        yield f"model.checkpoint={weights} is not a file: check the path"
    if is_file and not Path(resume).is_file():
        yield f"training.resume={resume} is not a file: use none, auto or a checkpoint"
    starts_anew = resume == "none" or (is_file and Path(resume).parent != folder)
    # in its first epoch, and before its first evaluation, a run has no log
    is_run = any((folder / name).exists() for name in ("log.jsonl", "last.pt"))
    if is_run and starts_anew and not eval_only:
        yield (
            f"logging.folder={folder} already holds a run: add --training.resume=auto to resume "
            f"it, or choose another folder"
        )
    if report := cfg.logging.eval_json:
        yield from unwritable("logging.eval_json", report)
        if not eval_only:
            what = f"logging.eval_json={report} is written by training.eval_only"
            yield f"{what}: set that too, or leave it out"
        if Path(report).is_dir():
            yield f"logging.eval_json={report} is a folder: add the name of a file"
    if not eval_only and not _can_be_made(folder):
        yield f"logging.folder={folder} cannot be made or written to: choose another folder"


def _data_problems(cfg: SimpleNamespace, key: str, path: Path) -> Iterator[str]:
    """Problems of data.train_dataset or data.val_dataset."""
    name = f"data.{key}={getattr(cfg.data, key)}"
    if not path.exists():
        yield f"{name} does not exist: run write_dataset.py or set the path"
    elif path.is_dir() and cfg.data.backend == "ffcv":
        inside = path / f"{key.removesuffix('_dataset')}.beton"
        fix = "convert it with write_dataset.py, or read it as it is with data.backend=torchvision"
        fix = f"set it to {inside}" if inside.is_file() else fix
        yield f"{name} is a folder, and data.backend=ffcv reads .beton files: {fix}"


def unwritable(flag: str, path: str) -> list[str]:
    """The problem with a file that is to be written, none where its folder can be written to."""
    folder = Path(path).absolute().parent
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return []
    what = f"{flag}={path}: {folder} is not a folder that can be written to"
    return [f"{what}; make it, or choose another"]


def _can_be_made(folder: Path) -> bool:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


# Settings that may change when a run is resumed: they decide speed or place, not the weights.
FREE_ON_RESUME = {
    *("data.check_pages", "data.num_workers", "data.timeout"),
    *("data.train_dataset", "data.val_dataset"),
    *("training.checkpoint_minutes", "training.compile", "training.dry_run", "training.eval_only"),
    *("training.max_steps", "training.resume", "validation.batch_size", "validation.every"),
}


def differences(
    old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any] | None = None
) -> list[str]:
    """Settings that decide the weights and differ between two runs.

    Args:
        old, new: nested dictionaries {section: {key: value}}.
        defaults: the same of all settings: what `old` had where it is of a version without one.

    Returns:
        Entries 'section.key: old -> new', sorted; section `logging` and FREE_ON_RESUME left out.
    """
    before, after = _flat(defaults or {}) | _flat(old), _flat(new)
    names = sorted((before.keys() | after.keys()) - FREE_ON_RESUME)
    pairs = [(name, before.get(name), after.get(name)) for name in names]
    return [f"{name}: {a} -> {b}" for name, a, b in pairs if a != b]


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, keys in tree.items()
        if section != "logging"
        for key, value in keys.items()
    }
