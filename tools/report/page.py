"""A run as one HTML file (page.html.j2): opens from a mail or a memory stick."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import train_imagenet
from fast_imagenet.engine.logger import LOG_KEYS, plot_curves, read_jsonl
from fast_imagenet.files import write_atomically
from tools.report.mistakes import Mistakes, find_files, find_mistakes, real_val
from tools.report.records import Run, read_run
from tools.report.tables import NETWORKS, templates
from tools.report.yaml_files import RecordError


def write_page(
    folder: Path,
    out: Path | None = None,
    val: str | None = None,
    weights: Path | None = None,
    worst: int = 24,
) -> list[str]:
    """Write the page of a run, finished or not; returns what was written and what is missing in it.

    Args:
        out: the file; default: page.html in the folder.
        val, weights: default: those of the run.
        worst: how many misclassified images are shown.
    Raises:
        ValueError: the folder holds no run, or weights and data do not exist or fit the run.
    """
    run = read_run(folder)
    out = out or run.folder / "page.html"
    if out.suffix != ".html":
        raise RecordError(f"--out={out} does not end in .html: the page is HTML")
    files, mistakes, notes = find_files(run, val, weights), None, []
    if isinstance(files, str):
        notes = [f"the network's mistakes are not shown, they were not computed: {files}"]
        if (real := real_val(run)) and not Path(real).exists():
            notes.append(f"the run had it at {real}")
    else:
        mistakes = find_mistakes(run, *files, worst)
    entries = train_imagenet.SETTINGS.entries
    defaults = {".".join(key): str(param.default) for key, param in entries.items()}
    page = render_page(run, mistakes, files if isinstance(files, str) else "", defaults).encode()
    write_atomically(out, lambda file: file.write(page))
    return [f"{out}: {len(page) / 1e6:.2f} MB", *notes]


def render_page(run: Run, found: Mistakes | None, missing: str, defaults: dict[str, str]) -> str:
    """The HTML of a run; `missing`: why no mistakes were found; `defaults`: of settings by name."""
    name = Path(run.setting("logging.folder", "")).name or run.folder.absolute().name
    arch = run.setting("model.arch", "unknown network")
    values = dict(name=name, network=NETWORKS.get(arch, arch), run=run, numbers=run.numbers)
    values |= dict(found=found, missing=missing, defaults=defaults)
    page = templates().get_template("page.html.j2")
    return page.render(values, curves=_curves(run), loss=_loss(run))


def _curves(run: Run) -> bytes:
    """The PNG of the curves; empty where a log of another version has not all that they show."""
    if not all(map(run.column, LOG_KEYS)):
        return b""
    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder, "curves.png")
        plot_curves(run.folder / "log.jsonl", png)
        return png.read_bytes()


def _loss(run: Run) -> dict[str, Any]:
    """Loss of the steps as a line, means of at most 600 blocks; {} for fewer than two steps."""
    lines = read_jsonl(run.folder / "steps.jsonl")
    losses = np.array([loss for line in lines for loss in line["losses"]])
    if len(losses) < 2:
        return {}
    means = np.array([block.mean() for block in np.array_split(losses, min(600, len(losses)))])
    low, high = means.min(), max(means.max(), means.min() + 1e-6)
    x, y = np.linspace(50, 1085, len(means)), 200 - 180 * (means - low) / (high - low)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    size = -(-len(losses) // len(means))
    label = f"training loss of {len(losses):,} steps" + (f", means of {size}" if size > 1 else "")
    marks = [(20, high), (110, (low + high) / 2), (200, low)]
    return {"points": points, "label": label, "marks": marks}
