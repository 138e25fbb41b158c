"""README's table, the numbers in its prose, and docs/results.md."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.report.plots import PLOTS, plot_data
from tools.report.records import TIMES, Entry, Group, RecordError, Run
from tools.report.reported import Report, Reported

BEGIN = "<!-- results: written by python -m tools.report -->"
END = "<!-- end of results -->"
# A number in prose: <!-- record backends/DATE/ffcv plain -->60.5 ± 0.9<!-- end of record -->
INLINE = re.compile(r"(<!-- record (\S+) (\w+) -->)(.*?)(<!-- end of record -->)", re.S)
# A study's table: <!-- study ablation --> alone in its line, then <!-- end of study -->
STUDY = re.compile(r"(<!-- study (\S+) -->\n)(.*?)(<!-- end of study -->)", re.S)
NOT_HERE = "not measured here"
NO_PLOT = dict.fromkeys(PLOTS, "there is no record yet")
NO_PLOT["docs/results_throughput.png"] = "no row was measured on a machine at rest"
NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50"}
FOLDERS = {
    "rn50_configs": "ImageNet",
    "rn18_configs": "ImageNet",
    "imagenette_configs": "Imagenette",
}
DATA = {"demo": "drawn images"}  # of configs that are not for their folder's data set


@dataclass(frozen=True)
class Book:
    """All that the tables are made of.

    Attributes:
        root: folder of README.md, docs/ and the folders of configs.
        records: its folder of records.
    """

    root: Path
    records: Path
    entries: list[Entry]
    reported: Reported

    def config(self, stem: str) -> Path | None:
        """The shipped config of that name."""
        found = [self.root / folder / f"{stem}.yaml" for folder in FOLDERS]
        return next((path for path in found if path.is_file()), None)

    def data(self, group: Group) -> str:
        """The data set of a group: what it says, or that of its config or its config's folder."""
        config = self.config(group.name)
        known = DATA.get(group.name) or (FOLDERS[config.parent.name] if config else "own data")
        return group.about.get("data") or known

    @property
    def rows(self) -> list[Entry]:
        """Entries that are rows, not studies."""
        return [entry for entry in self.entries if entry.study is None]

    def entry(self, name: str) -> Entry | None:
        return next((entry for entry in self.rows if entry.name == name), None)

    def link(self, group: Group, start: Path) -> str:
        """Path of a record as written in a file of folder `start`."""
        path = self.records.name / group.folder.relative_to(self.records)
        return f"{'' if start == self.root else '../'}{path}"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A table of markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    lines.insert(1, "|---" * len(heads) + "|")
    return [re.sub(r"\|  (?=\|)", "| ", line) for line in lines]


def safe(text: str) -> str:
    """Text of a record as a cell: no markup, no end of the cell."""
    text = re.sub(r"([\\`*_\[\]|<>#&])", r"\\\1", " ".join(str(text).split()))
    return text.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


# ------------------------------------------------------------------------------------------------
# README.md
# ------------------------------------------------------------------------------------------------


def readme_table(book: Book) -> list[str]:
    """One row a config: those that reported.yaml lists, then every other one with a record."""
    heads = ["config", "network", "measured, plain", "measured, configured", "reported"]
    heads += ["its protocol", "reported by", "record"]
    names = [*book.reported.readme, *(entry.name for entry in book.rows)]
    rows = []
    for name in dict.fromkeys(names):
        entry = book.entry(name)
        shown = (
            [g for g in entry.groups if g is entry.main or g.about.get("readme")] if entry else []
        )
        rows += [_readme_row(book, name, group) for group in shown or [None]]
    return table(heads, rows)


def _readme_row(book: Book, name: str, group: Group | None) -> list[str]:
    reports = [report for report in book.reported.of_config(name) if report.view != "other"]
    network = reports[0].network if reports else ""
    if group:
        network = network_name(group.runs[0])
    several = group and len(book.entry(name).groups) > 1
    label = f", {safe(group.label)}" if group and (several or "label" in group.about) else ""
    if group and (data := book.data(group)) not in FOLDERS.values():
        label += f", {safe(data)}"
    views = [f"**{group.spread(view).text()}** at {protocol(group, view)} ({group.seeds})"
             if group else NOT_HERE for view in ("plain", "configured")]  # fmt: skip
    theirs = [report.network for report in reports if report.network != network]
    by = ", ".join(dict.fromkeys([report.by for report in reports] + theirs))
    return [
        config_link(book, name, book.root) + label,
        network,
        *views,
        ", ".join(report.number for report in reports),
        ", ".join(report.protocol for report in reports),
        by,
        f"[record]({book.link(group, book.root)})" if group else "",
    ]


def render_readme(text: str, book: Book) -> str:
    """README.md with its tables and the numbers in its prose renewed.

    Raises:
        RecordError: it has not one pair of markers, or shows a number or study without records.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise RecordError(f"README.md needs one line `{BEGIN}` and, after it, one `{END}`")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    lines = [BEGIN, *readme_table(book), END]
    text = INLINE.sub(lambda match: _inline(match, book), head + "\n".join(lines) + tail)
    return STUDY.sub(lambda match: _study_table(match, book), text)


def _inline(match: re.Match, book: Book) -> str:
    start, place, key, _, end = match.groups()
    groups = [group for entry in book.entries for group in entry.groups]
    found = [group for group in groups if group.folder == book.records / place]
    if not found or key not in found[0].runs[0].numbers:
        known = ", ".join(found[0].runs[0].numbers) if found else "no group of records/"
        raise RecordError(f"README.md shows {key} of {place}: {known}")
    return f"{start}{found[0].spread(key).text()}{end}"


def _study_table(match: re.Match, book: Book) -> str:
    start, name, _, end = match.groups()
    entry = next((entry for entry in book.entries if entry.study and entry.name == name), None)
    if entry is None:
        known = ", ".join(entry.name for entry in book.entries if entry.study) or "none"
        raise RecordError(f"README.md shows the study {name}; those with records: {known}")
    heads = ["", "plain top-1", "against the first", "configured top-1", "seeds"]
    rows = [[safe(group.label), group.spread("plain").text(2), difference(group, entry.main),
             group.spread("configured").text(2), f"{len(group.runs)}"]
            for group in entry.groups]  # fmt: skip
    return "\n".join([start.rstrip(), *table(heads, rows), end])


# ------------------------------------------------------------------------------------------------
# docs/results.md
# ------------------------------------------------------------------------------------------------

HEAD = """# Results

Written by `python -m tools.report` from [records/](../records) and
[records/reported.yaml](../records/reported.yaml); a test fails when it is not current. Top-1 and
top-5 in percent. *Reported* is somebody else's number under their protocol. *Measured* is a record
of this repository, of the last epoch and never of the best: mean ± sample standard deviation over
the seeds; one seed has no spread. *Plain*: one centre crop, no flip. *Configured*: test side, crop
and flip of the config. Minutes are training and evaluation, on the machine the record names."""


def render_results(book: Book) -> str:
    """docs/results.md."""
    lines = [HEAD, ""]
    sets = [book.data(entry.main) for entry in book.rows]
    for data in dict.fromkeys([*book.reported.data, *sets]):
        lines += data_section(book, data)
    lines += ["## Plots", ""]
    for path, series in plot_data(book).items():
        title, text = PLOTS[path]
        here = [f"![{title}]({Path(path).name})", "", text]
        lines += [*(here if series else [f"No plot of {title}: {NO_PLOT[path]}."]), ""]
    lines += ["## Every measured run", ""]
    for entry in book.rows:
        lines += entry_section(book, entry)
    for entry in book.entries:
        if entry.study is not None:
            lines += study_section(book, entry)
    lines += sources_section(book.reported)
    return "\n".join(lines).rstrip() + "\n"


def data_section(book: Book, data: str) -> list[str]:
    """Reported and measured side by side, for one data set."""
    heads = ["recipe", "network", "epochs", "reported top-1", "top-5", "minutes", "its protocol"]
    heads += ["reported by", "measured, plain", "measured, configured", "minutes", "record"]
    reports = [report for report in book.reported.reports if report.data == data]
    groups = [g for e in book.rows for g in e.groups if book.data(g) == data]
    rows, shown = [], set()
    for report in reports:
        entry = book.entry(report.config) if report.config not in shown else None
        mine = _measured(book, entry.main, report) if entry else [NOT_HERE, NOT_HERE, "", ""]
        if report.config in shown and book.entry(report.config):
            mine = ["as above", "as above", "", ""]
        shown.add(report.config)
        rows.append([*_reported(book, report), *mine])
    rows += [
        [*_unreported(book, group), *_measured(book, group)]
        for group in groups
        if group.name not in shown or group is not book.entry(group.name).main
    ]
    note = book.reported.data.get(data, {}).get("note", "")
    return [f"## {safe(data)}", "", *([note, ""] if note else []), *table(heads, rows), ""]


def _reported(book: Book, report: Report) -> list[str]:
    name = report.recipe or config_link(book, report.config, book.root / "docs")
    cells = [name, report.network, f"{report.epochs:g}", report.number]
    cells += ["" if value is None else f"{value}" for value in (report.top5, report.minutes)]
    return [*cells, report.protocol, report.by]


def _unreported(book: Book, group: Group) -> list[str]:
    name = f"{config_link(book, group.name, book.root / 'docs')}, {safe(group.label)}"
    epochs = f"{group.runs[0].numbers['epochs']}"
    return [name, network_name(group.runs[0]), epochs, "not reported", "", "", "", ""]


def _measured(book: Book, group: Group, report: Report | None = None) -> list[str]:
    ours = network_name(group.runs[0])  # named where they trained another one
    other = f"{ours}, " if report and report.network != ours else ""
    views = [f"**{group.spread(view).text(2)}** at {protocol(group, view)} ({other}{group.seeds})"
             for view in ("plain", "configured")]  # fmt: skip
    link = f"[{safe(group.label)}]({book.link(group, book.root / 'docs')})"
    return [*views, group.text("minutes"), link]


RUN_HEADS = ["seed", "plain top-1", "top-5", "configured top-1", "top-5", "minutes", "images/s"]
RUN_HEADS += ["waiting for data, %", "images seen, thousands", "memory, GB"]
RUN_KEYS = ("plain", "plain_top5", "configured", "configured_top5", "minutes", "images_per_second")
RUN_KEYS += ("data_wait", "images", "memory_gb")
DIGITS = {"minutes": 1, "images_per_second": 1, "data_wait": 1, "images": 0, "memory_gb": 1}


def entry_section(book: Book, entry: Entry) -> list[str]:
    """Every run of a config."""
    lines = []
    for group in entry.groups:
        link = book.link(group, book.root / "docs")
        title = config_link(book, entry.name, book.root / "docs")
        lines += [f"### {title}: [{safe(group.label)}]({link})", "", group_words(group), ""]
        rows = [[f"{run.seed}", *(_digits(group, run, key) for key in RUN_KEYS)]
                for run in group.runs]  # fmt: skip
        if len(group.runs) > 1:
            spreads = [group.text(key, DIGITS.get(key, 2)) for key in RUN_KEYS]
            rows.append([f"mean ± deviation of {len(group.runs)}", *spreads])
        lines += [*table(RUN_HEADS, rows), ""]
    return lines


def study_section(book: Book, entry: Entry) -> list[str]:
    """Groups of a study, each against its main one."""
    heads = ["", "settings", "plain top-1", "against the first", "configured top-1", "seeds"]
    heads += ["minutes", "images/s", "record"]
    rows = []
    for group in entry.groups:
        cells = [safe(group.label), changed(group, entry.main), group.spread("plain").text(2)]
        cells += [difference(group, entry.main), group.spread("configured").text(2)]
        cells += [f"{len(group.runs)}"]
        cells += [group.text(key) for key in ("minutes", "images_per_second")]
        link = book.link(group, book.root / "docs")
        rows.append([*cells, f"[{safe(group.folder.name)}]({link})"])
    note = entry.study.note.strip()
    words = [note if note[-1] in ".!?" else f"{note}."] if note else []
    runs = [run for group in entry.groups for run in group.runs]
    words.append(group_words(entry.main, runs))
    lines = [f"## {safe(entry.study.title)}", "", " ".join(words), ""]
    return [*lines, *table(heads, rows), ""]


def changed(group: Group, main: Group) -> str:
    """Settings that are not those of the first group."""
    one, other = group.runs[0].counting_settings(), main.runs[0].counting_settings()
    names = [key for key in one if key in other and one[key] != other[key]]
    return ", ".join(f"{safe(key)} {safe(one[key])}" for key in names)


def difference(group: Group, main: Group) -> str:
    """Difference of the means of plain top-1 ± its standard error, '' for the first itself."""
    if group is main:
        return ""
    one, two = group.spread("plain"), main.spread("plain")
    text = f"{one.mean - two.mean:+.2f}"
    if one.deviation is None or two.deviation is None:
        return f"{text} (spread unknown)"
    error = math.hypot(one.deviation / one.count**0.5, two.deviation / two.count**0.5)
    return f"{text} ± {error:.2f}"


def sources_section(reported: Reported) -> list[str]:
    """Where the reported numbers come from."""
    lines = ["## Reported by", ""]
    seen = {}
    for report in reported.reports:
        details = "; ".join(filter(None, (report.hardware, report.note, report.source)))
        seen.setdefault(f"{report.by}, {report.network}, {report.protocol}", details)
    lines += [f"- {name}: {details}" for name, details in seen.items()]
    return lines


# ------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------


def config_link(book: Book, name: str, start: Path) -> str:
    """The name of a config, as a link where it is shipped."""
    path = book.config(name)
    if path is None:
        return safe(name)
    up = "" if start == book.root else "../"
    return f"[{name}]({up}{path.relative_to(book.root)})"


def network_name(run: Run) -> str:
    """'ResNet-50', or the name of the settings."""
    arch = run.setting("model.arch", "unknown")
    return NETWORKS.get(arch.rpartition("/")[2]) or safe(arch)


def protocol(group: Group, view: str) -> str:
    return group.runs[0].protocol(view) or "unknown size"


def group_words(group: Group, runs: Sequence[Run] = ()) -> str:
    """What, where and by which code, in one line.

    Args:
        group: what is told about.
        runs: those whose machines and commits are told, where they are more than the group's.
    """
    run = group.runs[0]
    environments = [r.environment for r in runs or group.runs if r.environment]
    parts = [_machines(environments), _commits(environments)] if environments else []
    network = f"{network_name(run)}, {run.numbers['epochs']} epochs"
    views = f"plain {protocol(group, 'plain')}, configured {protocol(group, 'configured')}"
    weights = "average of the weights" if run.averaged else "raw weights"
    text = "; ".join([network, views, weights, *parts])
    note = group.about.get("note", "")
    return f"{text}.{f' {note}' if note else ''}"


def _machines(environments: list[dict]) -> str:
    """Devices and versions; how many runs each had, where they are several."""
    counts = Counter(map(_machine, environments))
    if len(counts) == 1:
        return next(iter(counts))
    return " and ".join(f"{count} on {words}" for words, count in counts.items())


def _machine(environment: dict) -> str:
    gpus = environment.get("devices_on_node", 0)
    place = f"{gpus} GPU" if gpus else f"{environment.get('cores', '?')} cores"
    names = [name for name in ("torch", "ffcv", "python") if name in environment]
    versions = ", ".join(f"{name} {environment[name]}" for name in names)
    return safe(f"{environment.get('device', 'unknown')}, {place}; {versions}")


def _commits(environments: list[dict]) -> str:
    commits = dict.fromkeys(
        f"{e.get('commit', 'unknown')[:7]}{' and uncommitted changes' * bool(e.get('dirty'))}"
        for e in environments
    )
    return safe(f"commit {', '.join(commits)}")


def _digits(group: Group, run: Run, key: str) -> str:
    value = f"{run.numbers[key]:,.{DIGITS.get(key, 2)}f}"
    return "not timed" if key in TIMES and not group.timed else value
