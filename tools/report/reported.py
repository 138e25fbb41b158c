"""What others reported: records/reported.yaml, one block a source and protocol.

A number is shown with who reported it and under which protocol, and never mixed with ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fast_imagenet.config import read_yaml
from tools.report.records import RecordError

VIEWS = ("plain", "configured", "other")
BLOCK_KEYS = {"by", "source", "data", "network", "protocol", "view", "hardware", "note", "results"}
OPTIONAL = {"hardware", "note"}
RESULT_KEYS = {"config", "recipe", "epochs", "top1", "top5", "spread", "minutes", "network"}


@dataclass(frozen=True)
class Report:
    """One number that somebody reported.

    Attributes:
        by: who, in a few words; source: where it can be read.
        data: key of `Reported.data`.
        network: as they call it.
        protocol: how they tested.
        view: which of our protocols is theirs: plain, configured or other.
        config: stem of our config of the same recipe, '' for none; recipe: its name where it has
            no config.
        epochs: of training.
        top1, top5: percent; spread: standard deviation of top1; minutes: of training. None where
            they say nothing.
    """

    by: str
    source: str
    data: str
    network: str
    protocol: str
    view: str
    epochs: float
    top1: float
    hardware: str = ""
    note: str = ""
    config: str = ""
    recipe: str = ""
    top5: float | None = None
    spread: float | None = None
    minutes: float | None = None

    @property
    def number(self) -> str:
        """'77.12 ± 0.11', with the digits of the file."""
        return f"{self.top1}" + (f" ± {self.spread}" if self.spread is not None else "")


@dataclass(frozen=True)
class Reported:
    """The file.

    Attributes:
        data: data set -> {'images': training images, 'note': what to know}.
        readme: stems of the configs that the README's table shows, in its order.
        reports: in the order of the file.
    """

    data: dict[str, dict]
    readme: list[str]
    reports: list[Report]

    def of_config(self, stem: str) -> list[Report]:
        return [report for report in self.reports if report.config == stem]


def read_reported(path: str | Path) -> Reported:
    """Read and check the file.

    Raises:
        RecordError: it is missing, no YAML, or an entry is incomplete.
    """
    path = Path(path)
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise RecordError(f"{error}") from error
    if not isinstance(content, dict) or set(content) != {"data", "readme", "blocks"}:
        raise RecordError(f"{path} must have the keys data, readme and blocks")
    reports = []
    for number, block in enumerate(content["blocks"], 1):
        reports += _reports(block, content["data"], f"block {number} of {path}")
    return Reported(content["data"], content["readme"], reports)


def _reports(block: dict, data: dict, where: str) -> list[Report]:
    wrong = (set(block) - BLOCK_KEYS) | (BLOCK_KEYS - OPTIONAL - set(block))
    if wrong:
        raise RecordError(f"{where}: {', '.join(sorted(wrong))} is missing or unknown")
    if block["view"] not in VIEWS or block["data"] not in data:
        raise RecordError(f"{where}: view is one of {', '.join(VIEWS)}, data one of {list(data)}")
    shared = {key: value for key, value in block.items() if key != "results"}
    for result in block["results"]:
        named = ("config" in result) != ("recipe" in result)
        numbers = all(isinstance(result.get(key), (int, float)) for key in ("epochs", "top1"))
        if set(result) - RESULT_KEYS or not named or not numbers:
            raise RecordError(
                f"{where}: {result} needs config or recipe, epochs and top1, and may have "
                f"{', '.join(sorted(RESULT_KEYS))}"
            )
    return [Report(**shared | result) for result in block["results"]]
