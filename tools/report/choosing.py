"""Which config to run: what others report for it, and how long it takes, from its header.

The header's hours are those of its settings and of engine/work.py, the model that `python -m
tools.plan` counts with: tests/test_shipped_configs.py holds them together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.report.yaml_files import RecordError, Reported

DATA = "ImageNet"
A100S = {"one": 1, "eight": 8}  # of a report's hardware
HOURS = re.compile(r"^# Time: ([\d.,]+) hours .*on one RTX 5060 Ti", re.M)


@dataclass(frozen=True)
class Choice:
    """A report for one of our configs, and what a run of that config takes."""

    report: dict[str, Any]  # one of `Reported.reports`
    hours: dict[str, float]  # card -> training and evaluation; estimates but for reported A100s
    disk_rate: float  # MB/s that the first card's run reads, where memory does not hold the data
    is_best: bool  # no other report for the network reaches as much with fewer pixels


def choices_of(root: Path, reported: Reported) -> list[Choice]:
    """Reports for shipped configs on ImageNet, by network and top-1; [] without cards."""
    reports = [one for one in reported.reports if one["config"] and one["data"] == DATA]
    reports.sort(key=lambda one: (one["network"] != "ResNet-50", one["top1"]))
    choices = []
    for one in reports if reported.cards else []:
        hours = hours_of(root, one["config"])
        rate_mb = 1e3 * reported.data[DATA]["gigabytes"] * one["epochs"] / (3600 * hours)
        each = {card: hours / float(about["speed"]) for card, about in reported.cards.items()}
        gpus = A100S.get(str(one.get("hardware")).partition(" A100")[0], 0)
        if gpus and one.get("minutes"):
            each["A100"] = gpus * one["minutes"] / 60  # reported
        others = [x for x in reports if x is not one and x["network"] == one["network"]]
        beaten = any(x["top1"] >= one["top1"] and x["pixels"] <= one["pixels"] for x in others)
        choices.append(Choice(one, each, rate_mb, not beaten))
    return choices


def hours_of(root: Path, config: str) -> float:
    """Training and evaluation on one RTX 5060 Ti, as the config's header states them."""
    (path,) = root.glob(f"*_configs/{config}.yaml")
    if not (found := HOURS.search(path.read_text())):
        raise RecordError(f"{path}: its header has no `Time: ... hours on one RTX 5060 Ti`; add it")
    return float(found[1].replace(",", ""))


def hours_text(hours: float) -> str:
    """'7.6', '340 (14 days)'."""
    days = f" ({hours / 24:.0f} days)" if hours > 48 else ""
    return two_digits(hours) + days


def two_digits(value: float) -> str:
    """'7.6', '35', '340'."""
    return f"{float(f'{value:.2g}'):,g}"
