"""The YAML files of records/: study.yaml (a comparison) and reported.yaml (others' numbers).

study.yaml has a title, perhaps a note and, where another study has replaced it, `superseded`, which
says by what; docs/results.md shows them. It may have a plan, which `python -m tools.study` carries
out (all of these keys, or none of them):

    config: rn18_64px_16_epochs.yaml              what every run starts from: one name or several
    settings: {training.epochs: 10}               over it, for every run
    seeds: [0, 1, 2]
    write: [{source.split: train, write.limit: 3156}, {source.split: val}]    calls of write_dataset
    groups:                                       the others are compared with the first
      - {name: recipe, label: baseline}
      - {name: no_smoothing, label: no label smoothing, settings: {training.label_smoothing: 0}}
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_imagenet.config import read_yaml

STUDY = "study.yaml"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
OWN_SETTINGS = {"training.seed", "logging.folder", "data.train_dataset", "data.val_dataset"}
PLAN_KEYS = {"config": (str, list), "settings": dict, "seeds": list, "write": list, "groups": list}
GROUP_KEYS = {"name": str, "label": str, "settings": dict}
EVALS = ("standard", "config", "other")
# by: who, source: where it can be read, network: as they call it, protocol: how they evaluated
BLOCK_KEYS: dict[str, Any] = dict.fromkeys(
    ("by", "source", "data", "network", "protocol", "eval"), str
)
OPTIONAL = {"hardware", "note"}
BLOCK_KEYS |= dict.fromkeys(OPTIONAL, str)
# config: ours of the same recipe, recipe: its name where we have none; pixels: in epochs of 160 px;
# spread: of top1, in percent
NUMBERS = ("epochs", "pixels", "top1", "top5", "spread", "minutes")
RESULT_KEYS: dict[str, Any] = dict.fromkeys(("config", "recipe", "network"), str)
RESULT_KEYS |= dict.fromkeys(NUMBERS, (int, float))


class RecordError(ValueError):
    """A record is damaged, unfinished or contradicts another. The message is one sentence."""


def check_keys(
    content: Any, kinds: dict[str, Any], required: Iterable[str], where: Path | str
) -> dict[str, Any]:
    """`content` if it is a mapping with all required and no unknown keys, else RecordError."""
    if not isinstance(content, dict):
        raise RecordError(f"{where}: {content!r} is not a mapping of {', '.join(kinds)}")
    wrong = [f"{key}" for key, value in content.items()
             if key not in kinds or not isinstance(value, kinds[key])]  # fmt: skip
    missing = sorted(set(required) - set(content))
    if wrong or missing:
        what = f"{', '.join(wrong)} is unknown or of another kind" if wrong else ""
        what = what or f"{', '.join(missing)} is missing"
        raise RecordError(f"{where}: {what}; the keys are {', '.join(kinds)}")
    return content


def flags_of(settings: dict[str, Any]) -> list[str]:
    """'section.key' -> value, as words of a command line."""
    texts = {key: str(x).lower() if isinstance(x, bool) else str(x) for key, x in settings.items()}
    return [f"--{key}={text}" for key, text in texts.items()]


@dataclass(frozen=True)
class GroupPlan:
    """A group: the name of its folder, its label, its settings over those of the study."""

    name: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Content of a study.yaml; without a plan all after superseded is empty."""

    title: str
    note: str = ""
    superseded: str = ""  # why it is not the answer any more
    config: tuple[str, ...] = ()  # YAML files of every run, later ones win
    settings: dict[str, Any] = field(default_factory=dict)  # 'section.key' -> value, over them
    seeds: tuple[int, ...] = ()
    write: tuple[dict[str, Any], ...] = ()  # settings of the calls of write_dataset.py
    groups: tuple[GroupPlan, ...] = ()

    def place(self, name: str) -> int:
        """Position of a group in the plan; after all others when it is not there."""
        names = [group.name for group in self.groups]
        return names.index(name) if name in names else len(names)


def read_study(path: Path) -> Study | None:
    """The study of a file, checked; None when there is no file."""
    if not path.is_file():
        return None
    kinds = {"title": str, "note": str, "superseded": str} | PLAN_KEYS
    content = check_keys(read_yaml(path), kinds, {"title"}, path)
    if not set(content) & set(PLAN_KEYS):
        return Study(**content)
    check_keys(content, kinds, PLAN_KEYS, path)
    plans = [check_keys(group, GROUP_KEYS, {"name", "label"}, path) for group in content["groups"]]
    content["groups"] = [GroupPlan(**plan) for plan in plans]
    if isinstance(content["config"], str):
        content["config"] = [content["config"]]
    parts: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in content.items()}
    study = Study(**parts)
    _check_plan(study, path)
    return study


def _check_plan(study: Study, path: Path) -> None:
    seeds, names = list(study.seeds), [group.name for group in study.groups]
    listed = ", ".join(names)
    own = OWN_SETTINGS & set(study.settings).union(*(group.settings for group in study.groups))
    rules = [
        (bool(seeds) and all(type(seed) is int and seed >= 0 for seed in seeds),
         f"seeds={seeds} must be whole numbers from 0, at least one"),
        (len(set(seeds)) == len(seeds), f"seeds={seeds} has one twice"),
        (0 < len(set(names)) == len(names),
         f"groups need different names, at least one: {listed}"),
        (all(FOLDER_NAME.fullmatch(name) for name in names),
         f"a group's name becomes a folder: letters, digits, _ . + - only: {listed}"),
        (all(isinstance(one, dict) for one in study.write),
         f"write={list(study.write)} must be a list of mappings of write_dataset's settings"),
        (not own, f"{', '.join(sorted(own))} is set by the study itself: remove it"),
    ]  # fmt: skip
    if broken := [sentence for holds, sentence in rules if not holds]:
        raise RecordError(f"{path}: {'; '.join(broken)}")


@dataclass(frozen=True)
class Reported:
    """Content of reported.yaml, in the order of the file."""

    data: dict[str, dict[str, Any]]  # dataset -> {'images': training images, 'note': words}
    readme: list[str]  # stems of the configs and names of the studies in README's table
    reports: list[dict[str, Any]]  # BLOCK_KEYS and RESULT_KEYS, '' or None for what is missing
    cards: dict[str, dict[str, Any]]  # GPU -> {'speed': in units of the first, 'source': words}


def read_reported(path: Path) -> Reported:
    """Read and check the file."""
    kinds = {"data": dict, "readme": list, "blocks": list}
    content = check_keys(read_yaml(path), kinds | {"cards": dict}, kinds, path)
    reports = []
    for number, block in enumerate(content["blocks"], 1):
        reports += _reports(block, content["data"], f"block {number} of {path}")
    return Reported(content["data"], content["readme"], reports, content.get("cards", {}))


def _reports(block: dict[str, Any], data: dict[str, Any], where: str) -> list[dict[str, Any]]:
    check_keys(block, BLOCK_KEYS | {"results": list}, {*BLOCK_KEYS, "results"} - OPTIONAL, where)
    if block["eval"] not in EVALS or block["data"] not in data:
        raise RecordError(f"{where}: eval is one of {', '.join(EVALS)}, data one of {list(data)}")
    for result in block["results"]:
        check_keys(result, RESULT_KEYS, {"epochs", "pixels", "top1"}, where)
        if ("config" in result) == ("recipe" in result):
            raise RecordError(f"{where}: {result} needs either config or recipe")
    # titles of numbers that can be compared are equal
    blank = dict.fromkeys(OPTIONAL | {"config", "recipe"}, "") | dict.fromkeys(NUMBERS)
    reports = [blank | block | result for result in block.pop("results")]
    return [one | {"title": f"{one['by']}, {one['network']}, {one['protocol']}"} for one in reports]
