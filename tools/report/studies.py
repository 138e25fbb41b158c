"""study.yaml: groups of runs that differ in a few settings, and what they were planned to be.

    title: What each ingredient is worth          heading in docs/results.md
    note: Half of the images, 10 epochs.        words below it; may be left out

With a plan, which `python -m tools.study` carries out (all of these, or none):

    config: rn18_64px_16_epochs.yaml              what every run starts from: one name or several
    settings: {training.epochs: 10}               over it, for every run
    seeds: [0, 1, 2]
    write: [{source.split: train, write.limit: 3156}, {source.split: val}]    calls of write_dataset
    groups:                                       the first is what the others are set against
      - {name: recipe, label: the recipe}
      - {name: no_smoothing, label: no label smoothing, settings: {training.label_smoothing: 0}}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fast_imagenet.config import read_yaml
from tools.report.errors import RecordError

FILE = "study.yaml"
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
OWN = {"training.seed", "logging.folder", "data.train_dataset", "data.val_dataset"}
PLAN_KEYS = {"config": (str, list), "settings": dict, "seeds": list, "write": list, "groups": list}
KEYS = {"title": str, "note": str} | PLAN_KEYS
GROUP_KEYS = {"name": str, "label": str, "settings": dict}


@dataclass(frozen=True)
class GroupPlan:
    """A group: its folder's name, its label, its settings over those of the study."""

    name: str
    label: str
    settings: dict


@dataclass(frozen=True)
class Study:
    """Content of a study.yaml.

    Attributes:
        title, note: words.
        configs: YAML files of every run, the last wins; empty without a plan.
        settings: 'section.key' -> value, over them.
        seeds: of every group.
        write: settings of the calls of write_dataset.py that make the data.
        groups: in their order; empty without a plan.
    """

    title: str
    note: str = ""
    configs: tuple[str, ...] = ()
    settings: dict | None = None
    seeds: tuple[int, ...] = ()
    write: tuple[dict, ...] = ()
    groups: tuple[GroupPlan, ...] = ()

    def place(self, name: str) -> int:
        """Where a group of this name stands in the plan; after all others when it is not there."""
        names = [group.name for group in self.groups]
        return names.index(name) if name in names else len(names)


def read_study(path: Path) -> Study | None:
    """The study of a file; None when there is no file.

    Raises:
        RecordError: it is no YAML, or a key is missing, unknown or of another kind.
    """
    if not path.is_file():
        return None
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise RecordError(f"{error}") from error
    _check(content, KEYS, {"title"}, path)
    planned = set(content) & set(PLAN_KEYS)
    if not planned:
        return Study(content["title"], content.get("note", ""))
    _check(content, KEYS, {"title", *PLAN_KEYS}, path)
    groups = _groups(content["groups"], path)
    _check_values(content, groups, path)
    return Study(
        content["title"],
        content.get("note", "").strip(),
        tuple([content["config"]] if isinstance(content["config"], str) else content["config"]),
        content["settings"],
        tuple(content["seeds"]),
        tuple(content["write"]),
        groups,
    )


def _check_values(content: dict, groups: tuple[GroupPlan, ...], path: Path) -> None:
    seeds, names = content["seeds"], [group.name for group in groups]
    own = {key for one in (content["settings"], *(g.settings for g in groups)) for key in one} & OWN
    rules = [
        (
            all(type(seed) is int and seed >= 0 for seed in seeds) and bool(seeds),
            f"seeds={seeds} must be whole numbers from 0, one at least",
        ),
        (len(set(seeds)) == len(seeds), f"seeds={seeds} has one twice"),
        (
            bool(names) and len(set(names)) == len(names),
            f"groups need different names, one at least: {', '.join(names)}",
        ),
        (
            all(NAME.fullmatch(name) for name in names),
            f"a group's name becomes a folder: letters, digits, _ . + - only: {', '.join(names)}",
        ),
        (
            all(isinstance(one, dict) for one in content["write"]),
            f"write={content['write']} must be a list of mappings of write_dataset's settings",
        ),
        (not own, f"{', '.join(sorted(own))} is set by the study itself: take it out"),
    ]
    if broken := [sentence for holds, sentence in rules if not holds]:
        raise RecordError(f"{path}: {'; '.join(broken)}")


def _groups(found: list, path: Path) -> tuple[GroupPlan, ...]:
    for group in found:
        _check(group, GROUP_KEYS, {"name", "label"}, path)
    return tuple(GroupPlan(g["name"], g["label"], g.get("settings", {})) for g in found)


def _check(content, kinds: dict, needed: set[str], path: Path) -> None:
    if not isinstance(content, dict):
        raise RecordError(f"{path}: {content!r} is no mapping of {', '.join(kinds)}")
    wrong = [key for key, value in content.items()
             if key not in kinds or not isinstance(value, kinds[key])]  # fmt: skip
    if wrong or (missing := needed - set(content)):
        what = f"{', '.join(map(str, wrong))} is unknown or of another kind" if wrong else ""
        what = what or f"{', '.join(sorted(missing))} is missing"
        raise RecordError(f"{path}: {what}; the keys are {', '.join(kinds)}")
