"""A run as one HTML file: no network, no script; opens from a mail or a memory stick.

Whatever comes from a run, a file or a data set is escaped, and the page's policy forbids scripts
and every address but `data:`, so that a class called <script> is only a class.
"""

from __future__ import annotations

import base64
import html
import io
import tempfile
from pathlib import Path

import numpy as np

from fast_imagenet.engine.logger import plot_curves, read_jsonl
from fast_imagenet.files import write_atomically
from tools.report.mistakes import Mistakes, Picture, find_files, find_mistakes, real_val
from tools.report.plots import fewer_colors
from tools.report.records import RecordError, Run, read_run, unfinished
from tools.report.tables import NETWORKS

SHOWN_CLASSES, SHOWN_PAIRS, LARGEST_MATRIX = 20, 20, 20

STYLE = """
:root { color-scheme: light; --ink: #1c1e24; --muted: #5f6470; --rule: #dcdcd6; --blue: #1f5fa8; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fcfcfa;
  max-width: 1120px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; } h2 { margin: 2.6rem 0 .6rem; }
p.lead, figcaption, .muted { color: var(--muted); }
p.note { border-left: 3px solid #d9641e; padding-left: .8rem; }
img, svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .18rem .7rem .18rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }
th { font-weight: 600; } td.n, th.n { text-align: right; }
.scroll { overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: .8rem;
  margin: 1.4rem 0; }
.tile { border: 1px solid var(--rule); border-radius: 6px; padding: .6rem .8rem; background: #fff; }
.tile b { display: block; font-size: 1.35rem; }
.sections { columns: 3 300px; column-gap: 2rem; font-size: .9rem; }
table.values { margin-bottom: 1.2rem; width: 100%; table-layout: fixed; }
.sections tr { break-inside: avoid; } .sections tr:has(th) { break-after: avoid; }
.changed { font-weight: 600; color: var(--blue); }
.images { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(176px, 1fr)); }
figure { margin: 0; } figure img { width: 100%; background: #eee; display: block; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; } figcaption b { color: var(--ink); }
.columns { display: flex; flex-wrap: wrap; gap: 2.5rem; }
.matrix td { text-align: center; padding: .2rem .45rem; border: 1px solid #fff; min-width: 1.6rem; }
.matrix th { border: 0; font-weight: 400; } .matrix thead th { writing-mode: vertical-rl; }
@media print { body { max-width: none; } h2 { break-after: avoid; }
  figure { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def write_page(
    folder: Path,
    out: Path | None = None,
    val: str | None = None,
    weights: Path | None = None,
    worst: int = 24,
) -> list[str]:
    """Write the page of a run.

    Args:
        folder: of the run, finished or not.
        out: the file; default: page.html in the folder.
        val: validation data, .beton or folder; default: that of the run's settings.
        weights: any file that `load_weights` reads; default: weights.safetensors of the folder.
        worst: images shown.
    Returns:
        Sentences on what was written and what is missing in it.
    Raises:
        RecordError: the folder holds no run, or a file that was asked for is not there.
        ValueError: weights and data do not fit the run.
    """
    run = read_run(folder)
    out = out or run.folder / "page.html"
    if out.suffix != ".html":
        raise RecordError(f"--out={out} does not end in .html: the page is HTML")
    script, missing = _script()
    mistakes = None
    files = missing or find_files(run, val, weights)
    if isinstance(files, str):
        missing = files
    else:
        mistakes = find_mistakes(script, run, *files, worst)
    text = render_page(run, mistakes, missing, _defaults(script))
    write_atomically(out, lambda file: file.write(text.encode()))
    notes = [f"the network's mistakes are not shown, they were not looked for: {missing}"]
    if not missing:
        notes = []
    elif (real := real_val(run)) and not Path(real).exists():
        notes.append(f"the run had it at {real}")
    return [f"{out}: {len(text.encode()) / 1e6:.2f} MB", *notes]


def _script():
    """(train_imagenet, '') or (None, why its mistakes cannot be found)."""
    try:
        import train_imagenet
    except ModuleNotFoundError as error:
        if error.name != "train_imagenet":
            raise
        return None, "train_imagenet.py is not here, and the network is built by it."
    return train_imagenet, ""


def _defaults(script) -> dict[str, str]:
    entries = script.SETTINGS.entries if script else {}
    return {".".join(key): str(param.default) for key, param in entries.items()}


def render_page(run: Run, mistakes: Mistakes | None, missing: str, defaults: dict) -> str:
    """The HTML of a run.

    Args:
        mistakes: None where they could not be found; `missing` says why.
        defaults: of the settings, by name, to mark those that differ.
    """
    name = Path(run.setting("logging.folder", "")).name or run.folder.absolute().name
    parts = [
        f"<h1>{_text(name)}</h1>",
        f'<p class="lead">{_text(_lead(run))}</p>',
        *(
            [f'<p class="note">Not finished: {_text(reason)}.</p>']
            if (reason := unfinished(run))
            else []
        ),
        _tiles(run),
        _waiting(run),
        "<h2>Curves</h2>",
        _curves(run),
        _steps(run),
        "<h2>What the network gets wrong</h2>",
        _mistakes(run, mistakes)
        if mistakes
        else f'<p class="note">Not shown, as they were not looked for: {_text(missing)}</p>',
        "<h2>Settings</h2>",
        _settings(run, defaults),
        "<h2>Environment</h2>",
        _environment(run),
        "<h2>Every epoch</h2>",
        _log(run),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(name)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


# ------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------


def _lead(run: Run) -> str:
    arch, epochs = run.setting("model.arch", "unknown network"), run.numbers["epochs"]
    where = run.environment.get("device", "an unknown machine")
    commit = run.environment.get("commit", "")[:7]
    changed = " with uncommitted changes" if run.environment.get("dirty") else ""
    code = f", commit {commit}{changed}" if commit else ""
    return f"{NETWORKS.get(arch, arch)}, {epochs} epochs, {where}{code}"


def _tiles(run: Run) -> str:
    n, weights = run.numbers, "averaged weights" if run.averaged else "raw weights"
    tiles = [
        (f"{n['plain']:.2f} %", f"top-1, plain {run.protocol('plain')}, {weights}"),
        (f"{n['configured']:.2f} %", f"top-1, {run.protocol('configured')}, as configured"),
        (f"{n['plain_top5']:.2f} %", "top-5, plain"),
        (_duration(n["minutes"]), "training and evaluation"),
        (f"{n['images_per_second']:,.0f}", "images/s, median over the epochs"),
        (f"{n['data_wait']:.1f} %", "of training time waiting for data"),
        (f"{n['images']:,.0f}", "thousand images seen"),
        (f"{n['memory_gb']:.1f} GB", "peak memory"),
    ]
    cells = [f'<div class="tile"><b>{_text(a)}</b>{_text(b)}</div>' for a, b in tiles]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _duration(minutes: float) -> str:
    return f"{minutes / 60:.1f} h" if minutes >= 120 else f"{minutes:.1f} min"


def _waiting(run: Run) -> str:
    """A sentence where the loader holds the run up."""
    worst = max(run.log, key=lambda line: line["data_wait_share"])
    if run.numbers["data_wait"] <= 20:
        return ""
    return (
        f'<p class="note">Bound by data: {run.numbers["data_wait"]:.0f} % of training time was '
        f"waiting, {worst['data_wait_share']:.0%} in epoch {worst['epoch']}. Raise "
        f"data.num_workers, write smaller images (write.max_side) or lighten section augment.</p>"
    )


def _curves(run: Run) -> str:
    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder, "curves.png")
        plot_curves(run.folder / "log.jsonl", png)
        content = fewer_colors(io.BytesIO(png.read_bytes()), {})
    return f'<img src="{_data(content, "png")}" alt="accuracy, losses, speed, learning rate">'


def _steps(run: Run) -> str:
    """Loss of the steps as a line, means of at most 600 blocks."""
    lines = read_jsonl(run.folder / "steps.jsonl")
    losses = np.array([loss for line in lines for loss in line["losses"]])
    if len(losses) < 2:
        return ""
    blocks = np.array_split(losses, min(600, len(losses)))
    means = np.array([block.mean() for block in blocks])
    low, high = means.min(), max(means.max(), means.min() + 1e-6)
    x = np.linspace(50, 1085, len(means))
    y = 200 - 180 * (means - low) / (high - low)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    size = -(-len(losses) // len(blocks))
    marks = "".join(
        f'<text x="44" y="{place + 4}" text-anchor="end">{value:.2f}</text>'
        f'<line x1="50" x2="1085" y1="{place}" y2="{place}" stroke="#e4e4e4"/>'
        for place, value in ((20, high), (110, (low + high) / 2), (200, low))
    )
    label = f"training loss of {len(losses):,} steps" + (f", means of {size}" if size > 1 else "")
    return (
        '<svg viewBox="0 0 1100 235" role="img" font-size="12" fill="#5f6470">'
        f"<title>{label}</title>{marks}"
        f'<polyline points="{points}" fill="none" stroke="#2f8f5b" stroke-width="1.4"/>'
        f'<text x="50" y="228">{label}</text></svg>'
    )


def _mistakes(run: Run, found: Mistakes) -> str:
    total, logged = int(found.counts_kk.sum()), run.numbers["plain"]
    text = f"{found.source}, plain {run.protocol('plain')}: top-1 {found.top1:.2f} % of {total:,}."
    differs = abs(found.top1 - logged) > 0.1
    text += f" The log says {logged:.2f} %." if differs else ""
    note = "" if not differs else (
        '<p class="note">That is not the number of the log: other weights or images, or a '
        "version that decodes and resizes them differently.</p>"
    )  # fmt: skip
    figures = "".join(_figure(image, found.names) for image in found.worst)
    shown = len(found.worst)
    right = f"<p>No mistake: all {total:,} are right.</p>" if found.top1 == 100 else ""
    heading = f"The {shown} images whose true class got the smallest share" if shown else ""
    return "\n".join([
        f"<p>{_text(text)}</p>{note}",
        f'<h3>{heading}</h3><div class="images">{figures}</div>' if shown else right,
        f'<div class="columns"><div>{_pairs(found)}</div><div>{_classes(found)}</div></div>',
        _matrix(found),
    ])  # fmt: skip


def _figure(image: Picture, names: list[str]) -> str:
    label, guess = _text(names[image.label]), _text(names[image.guess])
    return (
        f'<figure><img src="{_data(image.jpeg, "jpeg")}" alt="{label}, taken for {guess}">'
        f"<figcaption><b>{label}</b> {image.label_share:.2%}<br>taken for <b>{guess}</b> "
        f"{image.guess_share:.0%}<br>sample {image.sample}</figcaption></figure>"
    )


def _pairs(found: Mistakes) -> str:
    sums = found.counts_kk.sum(1)
    rows = [
        [found.names[label], found.names[guess], f"{n:,}", f"{n / sums[label]:.1%}"]
        for label, guess, n in found.confused()[:SHOWN_PAIRS]
    ]
    heads = ["true", "taken for", "pictures", "of the class"]
    return f"<h3>Most confused</h3>{_table(heads, rows)}" if rows else ""


def _classes(found: Mistakes) -> str:
    rows = [
        [found.names[k], f"{right / count:.1%}", f"{count:,}"]
        for k, count, right in found.classes()[:SHOWN_CLASSES]
    ]
    title = "Hardest classes" if len(found.names) > SHOWN_CLASSES else "Classes, hardest first"
    return f"<h3>{title}</h3>{_table(['class', 'right', 'pictures'], rows)}"


def _matrix(found: Mistakes) -> str:
    """Every class against every other, where that can be read."""
    if len(found.names) > LARGEST_MATRIX:
        return ""
    heads = "".join(f"<th>{_text(name)}</th>" for name in found.names)
    rows = []
    for k, counts in enumerate(found.counts_kk):
        shares = counts / max(1, counts.sum())
        pairs = enumerate(zip(counts, shares, strict=True))
        cells = "".join(_cell(int(n), share, k == j) for j, (n, share) in pairs)
        rows.append(f"<tr><th>{_text(found.names[k])}</th>{cells}</tr>")
    return (
        f"<h3>Confusion: a row is the true class, a column what it was taken for</h3>"
        f'<div class="scroll"><table class="matrix"><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(count: int, share: float, right: bool) -> str:
    color = "31, 95, 168" if right else "217, 100, 30"
    depth = share if right else min(1.0, 5 * share)  # a fifth of a class astray is full orange
    ink = "#fff" if depth > 0.6 else "#1c1e24"
    style = f"background: rgba({color}, {depth:.2f}); color: {ink}"
    return f'<td style="{style}">{count or ""}</td>'


def _settings(run: Run, defaults: dict) -> str:
    if not run.settings:
        return '<p class="muted">There is no config.json.</p>'
    tables = []
    for section, values in run.settings.items():
        rows = []
        for key, value in values.items():
            default = defaults.get(f"{section}.{key}")
            changed = default is not None and default != str(value)
            mark = f' class="changed" title="default: {_text(default)}"' if changed else ""
            rows.append(f"<tr><td>{_text(key)}</td><td{mark}>{_text(value)}</td></tr>")
        tables.append(_values(rows, section))
    said = '<p class="muted">Blue: not the default.</p>' if defaults else ""
    return f'{said}<div class="sections">{"".join(tables)}</div>'


def _environment(run: Run) -> str:
    if not run.environment:
        return '<p class="muted">There is no environment.json.</p>'
    pairs = [(key, value) for key, value in run.environment.items() if key != "earlier"]
    rows = [f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in pairs]
    earlier = run.environment.get("earlier", [])
    note = f"<p>Resumed; {len(earlier)} other environments before this one.</p>" if earlier else ""
    return f'{note}<div class="sections">{_values(rows)}</div>'


def _log(run: Run) -> str:
    keys = list(run.log[0])
    rows = [[_number(line.get(key, "")) for key in keys] for line in run.log]
    table = _table([key.replace("_", " ") for key in keys], rows)
    summary = f"<summary>{len(run.log)} lines of log.jsonl</summary>"
    return f'<details>{summary}<div class="scroll">{table}</div></details>'


# ------------------------------------------------------------------------------------------------
# Pieces of HTML
# ------------------------------------------------------------------------------------------------


def _text(value) -> str:
    return html.escape(str(value), quote=True)


def _number(value) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """A table with a head; columns whose first cell begins with a digit stand on the right."""
    right = [value[:1].isdigit() for value in rows[0]] if rows else [False] * len(heads)

    def line(tag: str, values: list[str]) -> str:
        pairs = zip(values, right, strict=True)
        cells = [f"<{tag}{' class=n' * n}>{_text(value)}</{tag}>" for value, n in pairs]
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table>{line('th', heads)}{''.join(line('td', row) for row in rows)}</table>"


def _values(rows: list[str], title: str = "") -> str:
    """A table of names and values; `rows`: ready HTML."""
    head = f"<tr><th colspan=2>{_text(title)}</th></tr>" if title else ""
    return f'<table class="values">{head}{"".join(rows)}</table>'
