"""Combinations of valid settings that cannot work, found before anything heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

from fast_imagenet.arch_names import unknown_arch


def validate(cfg: SimpleNamespace) -> list[str]:
    """What is wrong with the settings of train_imagenet.py together, one sentence each.

    Args:
        cfg: the tree of settings, each valid on its own.

    Returns:
        Sentences that name the values, the rule and the fix; empty when the run can start.
        Looks whether data files exist; opens none.
    """
    rules = _rank_rules() + _choice_rules(cfg) + _file_rules(cfg)
    if not cfg.training.eval_only:
        rules += _batch_rules(cfg) + _schedule_rules(cfg) + _step_rules(cfg)
    return [sentence for broken, sentence in rules if broken]


def _batch_rules(cfg: SimpleNamespace) -> list[tuple[bool, str]]:
    if _rank_rules():
        return []  # into how many parts a batch goes is not known
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch, micro = cfg.training.batch_size, cfg.training.micro_batch_size
    per_rank = batch // world
    step = micro or per_rank
    mixing = cfg.augment.mixup > 0 or cfg.augment.cutmix > 0
    return [
        (
            batch % world != 0,
            f"training.batch_size={batch} does not divide by {world} ranks: choose a multiple",
        ),
        (
            micro > 0 and per_rank % micro != 0,
            f"training.micro_batch_size={micro} does not divide the {per_rank} images of a rank: "
            f"choose a divisor",
        ),
        (
            mixing and step % 2 != 0,
            f"augment.mixup and augment.cutmix pair images, but a forward pass has {step}: "
            f"choose an even batch",
        ),
    ]


def _rank_rules() -> list[tuple[bool, str]]:
    """What is wrong with the environment that torchrun sets, and others by hand."""
    least = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "MASTER_PORT": 0}
    given = {name: text for name in least if (text := os.environ.get(name)) is not None}
    for name, text in given.items():
        if not (text.isdecimal() and len(text) < 8 and int(text) >= least[name]):
            what = f"{name}={text!r} in the environment is no number of its kind"
            return [(True, f"{what}: unset it, or start with torchrun")]
    rank, world = int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1))
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    return [
        (True, sentence)
        for broken, sentence in (
            (
                rank >= world,
                f"RANK={rank} in the environment is not below WORLD_SIZE={world}: unset both, or "
                f"start with torchrun",
            ),
            (
                world > 1 and bool(lacking),
                f"WORLD_SIZE={world} is in the environment and {', '.join(lacking)} not: unset "
                f"it, or start with torchrun",
            ),
        )
        if broken
    ]


def _schedule_rules(cfg: SimpleNamespace) -> list[tuple[bool, str]]:
    lr, size, augment = cfg.lr, cfg.resolution, cfg.augment
    return [
        (
            lr.lr_peak_epoch >= cfg.training.epochs,
            f"lr.lr_peak_epoch={lr.lr_peak_epoch} is not before the end of the run, "
            f"training.epochs={cfg.training.epochs}: lower lr.lr_peak_epoch",
        ),
        (
            size.start_ramp > size.end_ramp,
            f"resolution.start_ramp={size.start_ramp} is after "
            f"resolution.end_ramp={size.end_ramp}: swap them",
        ),
        (
            size.min_res != size.max_res and size.start_ramp == size.end_ramp == 0,
            f"resolution.min_res={size.min_res} is never used while resolution.start_ramp and "
            f"resolution.end_ramp are 0: set it to resolution.max_res={size.max_res} too, or set "
            f"the ramp",
        ),
        (
            augment.crop_min_area > augment.crop_max_area,
            f"augment.crop_min_area={augment.crop_min_area} is above "
            f"augment.crop_max_area={augment.crop_max_area}: swap them",
        ),
    ]


def _step_rules(cfg: SimpleNamespace) -> list[tuple[bool, str]]:
    augment = cfg.augment
    return [
        (
            augment.policy == "rand_augment_timm" and augment.policy_magnitude > 10,
            f"augment.policy_magnitude={augment.policy_magnitude:g} is of 30, and "
            f"augment.policy=rand_augment_timm counts to 10: lower it",
        ),
        (
            cfg.training.nesterov and cfg.training.momentum == 0,
            "training.nesterov needs momentum, and training.momentum=0: raise it",
        ),
        (
            cfg.training.nesterov and cfg.training.optimizer != "sgd",
            f"training.nesterov belongs to training.optimizer=sgd, not to "
            f"{cfg.training.optimizer}: switch it off",
        ),
    ]


def _choice_rules(cfg: SimpleNamespace) -> list[tuple[bool, str]]:
    wrong_arch = unknown_arch(cfg.model.arch)
    return [
        (wrong_arch is not None, f"model.arch={cfg.model.arch} is {wrong_arch}"),
        (
            cfg.data.transforms == "gpu" and cfg.data.backend != "torchvision",
            f"data.transforms=gpu needs data.backend=torchvision, not {cfg.data.backend}: "
            f"change one of them",
        ),
        (
            cfg.data.backend == "torchvision" and not cfg.data.in_memory,
            "data.in_memory=false needs data.backend=ffcv: with torchvision the order is fully "
            "random; leave it out, or change the backend",
        ),
        (
            cfg.training.eval_only and not cfg.model.checkpoint,
            "training.eval_only has nothing to evaluate: set model.checkpoint to a file",
        ),
    ]


def _file_rules(cfg: SimpleNamespace) -> list[tuple[bool, str]]:
    training, folder = cfg.training, Path(cfg.logging.folder)
    resume, holds_a_run = training.resume, (folder / "log.jsonl").exists()
    elsewhere = resume not in ("none", "auto") and Path(resume).parent != folder
    used = ["val_dataset"] if training.eval_only else ["train_dataset", "val_dataset"]
    datasets = {key: getattr(cfg.data, key) for key in used}
    rules = [_data_rule(cfg, key, Path(path)) for key, path in datasets.items()]
    return [
        *rules,
        (
            bool(cfg.model.checkpoint) and not Path(cfg.model.checkpoint).is_file(),
            f"model.checkpoint={cfg.model.checkpoint} is not a file: check the path",
        ),
        (
            training.resume not in ("none", "auto") and not Path(training.resume).is_file(),
            f"training.resume={training.resume} is not a file: use none, auto or a checkpoint",
        ),
        (
            holds_a_run and (resume == "none" or elsewhere) and not training.eval_only,
            f"logging.folder={folder} already holds a run: add --training.resume=auto to go on, "
            f"or choose another folder",
        ),
        (
            not training.eval_only and not _can_be_made(folder),
            f"logging.folder={folder} cannot be made or written to: choose another folder",
        ),
    ]


def _data_rule(cfg: SimpleNamespace, key: str, path: Path) -> tuple[bool, str]:
    """Rule for data.train_dataset or data.val_dataset."""
    name = f"data.{key}={getattr(cfg.data, key)}"
    if not path.exists():
        return True, f"{name} does not exist: run write_dataset.py or set the path"
    inside = path / f"{key.removesuffix('_dataset')}.beton"
    fix = "convert it with write_dataset.py, or read it as it is with data.backend=torchvision"
    if inside.is_file():
        fix = f"set it to {inside}"
    return (
        path.is_dir() and cfg.data.backend == "ffcv",
        f"{name} is a folder, and data.backend=ffcv reads .beton files: {fix}",
    )


def unwritable(flag: str, path: str) -> tuple[bool, str]:
    """Rule for a file that is to be written: (whether its folder refuses, the sentence)."""
    folder = Path(path).absolute().parent
    return (
        not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)),
        f"{flag}={path}: {folder} is no folder that can be written to; make it, or choose another",
    )


def _can_be_made(folder: Path) -> bool:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


# Settings that may change when a run goes on: they decide speed or place, not the weights.
FREE_ON_RESUME = {
    "data.check_pages",
    "data.num_workers",
    "data.timeout",
    "data.train_dataset",
    "data.val_dataset",
    "training.checkpoint_minutes",
    "training.compile",
    "training.eval_only",
    "training.max_steps",
    "training.resume",
    "validation.batch_size",
    "validation.every",
}


def differences(old: dict, new: dict, defaults: dict | None = None) -> list[str]:
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


def _flat(tree: dict) -> dict:
    return {
        f"{section}.{key}": value
        for section, keys in tree.items()
        if section != "logging"
        for key, value in keys.items()
    }
