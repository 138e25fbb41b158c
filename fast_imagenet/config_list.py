"""What the shipped configs say of themselves, in the comments at their heads."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

PARTS = ("Expected", "Pixels", "Evaluation", "Hardware", "Time")  # of a head, in this order
_SPAN = re.compile(r"([\d.,]+ (?:hours|minutes)(?: \([^)]*\))?(?: on [^,;.]+?)?) with evaluation")


def head_text(path: Path) -> str:
    """The first comments of a config in one line, without `#`."""
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def head_parts(path: Path) -> dict[str, str]:
    """{'Expected': 'top-1 76.6 ...', 'Time': ...}: those of PARTS that its head has."""
    words = re.split(rf"\b({'|'.join(PARTS)}): ", head_text(path))
    return {name: text.strip() for name, text in zip(words[1::2], words[2::2], strict=True)}


def hours_of(path: Path) -> str:
    """How long a run takes, as its head says: '13 hours on one RTX 5060 Ti'; '' if it does not."""
    found = _SPAN.search(head_parts(path).get("Time", ""))
    return found[1] if found else ""


def list_configs(folders: Sequence[Path]) -> str:
    """Every config of some folders: its name, hours and expected result."""
    lines = []
    for folder in folders:
        lines += ["", f"{Path(folder).name}/"]
        for path in sorted(Path(folder).glob("*.yaml"), key=_in_natural_order):
            expected = head_parts(path).get("Expected", "not stated")
            expected = re.split(r"; |\. (?=[A-Z])", expected)[0].rstrip(".")
            text = f"{hours_of(path) or 'time not stated'}; expected: {expected}"
            body = textwrap.wrap(text, 98, initial_indent=" " * 34, subsequent_indent=" " * 34)
            lines += [f"  {path.stem.ljust(31)} {body[0].lstrip()}", *body[1:]]
    note = "Times are estimates with evaluation; the comments in each file say from what."
    return "\n".join([*lines[1:], "", note])


def _in_natural_order(path: Path) -> list[tuple[int, str]]:
    return [(int(part or 0) if part.isdecimal() else 0, part)
            for part in re.split(r"(\d+)", path.stem)]  # fmt: skip
