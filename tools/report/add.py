"""A run becomes a record: what a reader needs to trace its numbers, and nothing of its owner."""

from __future__ import annotations

import json
import re
import shutil
from datetime import date
from pathlib import Path
from typing import Any

from fast_imagenet.engine.json_lines import read_jsonl, read_object
from fast_imagenet.environment import redact_paths
from fast_imagenet.files import write_json
from tools.report.records import Run, group_file_with, read_run
from tools.report.yaml_files import FOLDER_NAME, RecordError


def add_run(
    source: Path,
    records: Path,
    *,
    name: str | None = None,
    group: str | None = None,
    about: dict[str, Any] | None = None,
) -> Path:
    """Copy a run into `records`/name/group/seedN, and return that folder.

    Weights, checkpoints and TensorBoard's files (they name the host) stay where they are; so does
    curves.png, which can be drawn again from the log. Absolute paths are cut to their last part.

    Args:
        source: folder of a run.
        name: of the row; default: last part of the run's logging.folder.
        group: of runs that differ in their seed; default: date and machine.
        about: for group.json, over what it holds; 'unfinished': True takes a run cut short.
    Raises:
        ValueError: the run is unfinished or damaged, its place is taken, or its settings are not
            those of its group. Nothing is written then.
    """
    run, about = read_run(source), about or {}
    if (reason := run.unfinished()) and not about.get("unfinished"):
        raise RecordError(f"{source} is not a finished run: {reason}; --unfinished takes it anyway")
    name = _checked(name or Path(run.setting("logging.folder", "")).name, "--name")
    folder = records / name / _checked(group or _default_group(run), "--group")
    place = folder / f"seed{run.seed}"
    if place.exists() or (folder / "log.jsonl").exists():
        taken = place if place.exists() else folder
        raise RecordError(f"{taken} exists already; choose another --group, or remove it")
    about = group_file_with(folder, run, about)
    _write(run, place)
    if about:
        write_json(folder / "group.json", about)
    return place


def _default_group(run: Run) -> str:
    """'2026-11-22_2-core-amd-epyc': the day the log was last written, and the machine."""
    day = date.fromtimestamp((run.folder / "log.jsonl").stat().st_mtime)
    device = re.sub(r"[^a-z0-9]+", "-", run.environment.get("device", "unknown").lower())
    gpus, cores = run.environment.get("devices_on_node", 0), run.environment.get("cores")
    count = f"{gpus}x-" if gpus > 1 else f"{cores}-core-" if cores and not gpus else ""
    return f"{day}_{count}{device.strip('-')[:40]}"


def _checked(name: str, flag: str) -> str:
    if not FOLDER_NAME.fullmatch(name):
        raise RecordError(f"{flag}={name} is not a folder name: letters, digits, _ . + - only")
    return name


def _write(run: Run, place: Path) -> None:
    """All files at once: a copy that fails leaves nothing."""
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_files(run, partial)
        partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_files(run: Run, folder: Path) -> None:
    summary = read_object(run.folder / "summary.json")
    objects = {"config": run.settings, "environment": run.environment, "summary": summary}
    for name, content in objects.items():
        if content:
            write_json(folder / f"{name}.json", redact_paths(content))
    logs = {"log.jsonl": run.log, "steps.jsonl": read_jsonl(run.folder / "steps.jsonl")}
    for name, lines in logs.items():
        if lines:
            text = "".join(json.dumps(redact_paths(line)) + "\n" for line in lines)
            (folder / name).write_text(text, encoding="utf-8")
