"""Lines of JSON: log.jsonl and steps.jsonl of a run."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from fast_imagenet.files import write_atomically


class RunLogError(ValueError):
    """A folder or a record is not acceptable. The message is one sentence."""


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a log; an absent file is an empty one.

    Raises:
        RunLogError: a line is not a JSON object.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [parse_object(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


def epoch_line(folder: str | Path, epoch: int) -> dict[str, Any] | None:
    """The whole line of an epoch, counted from 1, in the log of a run's folder; None without one.

    Raises:
        RunLogError: a line before its last is not a JSON object.
    """
    path = Path(folder, "log.jsonl")
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    lines = [parse_object(line, f"a line of {path}") for line in whole]
    return next((line for line in lines if line.get("epoch") == epoch), None)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; {} without the file. Raises: RunLogError."""
    return parse_object(path.read_bytes(), str(path)) if path.exists() else {}


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `content`.

    Raises:
        RunLogError: it is not one; names `where` it stands.
    """
    try:
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise RunLogError(f"{where} is damaged ({error}); restore it or delete it") from error
    return value


def check_lines(path: Path, kinds: dict[str, Any]) -> None:
    """Refuse a log that a run cannot continue, before the first step and not after the last.

    Raises:
        RunLogError: one of the keys `kinds` is missing in a line, or its value is of another kind.
    """
    for number, line in enumerate(read_jsonl(path), 1):
        for key, kind in kinds.items():
            if not isinstance(line.get(key), kind):
                raise RunLogError(
                    f"line {number} of {path} is damaged ({key} is {line.get(key)!r:.40}); "
                    f"restore it or delete it"
                )


def drop_torn_line(path: Path) -> None:
    """Remove an unfinished last line, which a killed process leaves; warns when there was one."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        warnings.warn(
            f"the last line of {path} is incomplete (the process was killed) and is dropped",
            stacklevel=3,
        )
        write_atomically(path, lambda file: file.write(whole))


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add one line; it is on the disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rewrite_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace all lines at one instant."""
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_atomically(path, lambda file: file.write(text.encode()))
