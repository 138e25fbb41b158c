"""README's tables and numbers, docs/results.md and docs/choosing.md: cells for tables.md.j2."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2

from tools.report.choosing import choices_of, hours_text
from tools.report.plots import plot_data
from tools.report.records import Entry, Group, Run
from tools.report.yaml_files import RecordError, Reported

BEGIN = "<!-- results: written by python -m tools.report -->"
END = "<!-- end of results -->"
# A number in prose: <!-- record backends/DATE/ffcv standard -->60.5 ± 0.9<!-- end of record -->
INLINE = re.compile(r"(<!-- record (\S+) (\w+) -->)(.*?)(<!-- end of record -->)", re.S)
# A study's table: <!-- study ablation --> alone in its line, then <!-- end of study -->
STUDY = re.compile(r"(<!-- study (\S+) -->\n)(.*?)(<!-- end of study -->)", re.S)
# Which config to run: alone in their lines
CHOOSING = re.compile(r"(<!-- choosing -->\n).*?(<!-- end of choosing -->)", re.S)
NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50"}
FOLDERS = {"rn50_configs": "ImageNet", "rn18_configs": "ImageNet"}
FOLDERS |= {"imagenette_configs": "Imagenette"}
DATA = {
    "demo": "synthetic images",
    "rn50_12_epochs_fine_tuning": "own images",
}  # of configs that are not for their folder's dataset
COLUMNS = {"standard": 2, "standard_top5": 2, "config": 2, "config_top5": 2, "minutes": 1}
COLUMNS |= {"images_per_second": 1, "data_wait": 1, "images": 0, "memory_gb": 1}  # -> digits


@dataclass(frozen=True)
class Book:
    """All that the tables are made of."""

    root: Path  # folder of README.md, docs/ and the folders of configs
    records: Path
    rows: dict[str, Entry]  # of configs, by name
    studies: dict[str, Entry]
    reported: Reported

    @property
    def groups(self) -> list[Group]:
        """All groups of the rows."""
        return [group for entry in self.rows.values() for group in entry.groups]

    @property
    def datasets(self) -> list[str]:
        """Those of reported.yaml, then those of the rows."""
        ours = [self.data(entry.groups[0]) for entry in self.rows.values()]
        return list(dict.fromkeys([*self.reported.data, *ours]))

    @property
    def readme_rows(self) -> list[Group]:
        """Groups of what reported.yaml lists, studies whole; then of all other configs."""
        entries = self.studies | self.rows
        listed = [name for name in self.reported.readme if name in entries]
        groups = [g for name in dict.fromkeys([*listed, *self.rows]) for g in entries[name].groups]
        main = {entry.groups[0].folder for entry in self.rows.values()}
        return [g for g in groups
                if g.name in self.studies or g.folder in main or g.about.get("readme")]  # fmt: skip

    def config(self, stem: str) -> Path | None:
        """The shipped config of that name, below the root."""
        found = [Path(folder, f"{stem}.yaml") for folder in FOLDERS]
        return next((path for path in found if (self.root / path).is_file()), None)

    def data(self, group: Group) -> str:
        """The dataset of a group: what it says, or that of its config or its config's folder."""
        config = self.config(group.name)
        known = DATA.get(group.name) or (FOLDERS[config.parent.name] if config else "own data")
        return group.about.get("data") or known

    def title(self, group: Group) -> str:
        """The name of a group's config, and its label where it has one or is one of several.

        Of a study's group the label alone.
        """
        if group.name in self.studies:
            return group.label
        labeled = "label" in group.about or len(self.rows[group.name].groups) > 1
        return f"{group.name}{f', {group.label}' if labeled else ''}"

    def run_name(self, group: Group, up: str = "") -> str:
        """A group in a table of several configs: config, label, whether it is superseded."""
        if group.name in self.studies:
            return safe(self.title(group))
        label = f", {safe(group.label)}" if self.title(group) != group.name else ""
        late = " (superseded)" if group.about.get("superseded") else ""
        return f"{self.config_link(group.name, up)}{label}{late}"

    def link(self, group: Group, up: str, text: str) -> str:
        """A link to a record; `up`: '../' in a file of docs/."""
        path = self.records.name / group.folder.relative_to(self.records)
        return f"[{safe(text)}]({up}{path})"

    def config_link(self, name: str, up: str = "") -> str:
        """The name of a config, as a link where it is shipped."""
        path = self.config(name)
        return f"[{name}]({up}{path})" if path else safe(name)


def safe(text: Any) -> str:
    """Text of a record as a cell: no markup, no end of the cell."""
    text = re.sub(r"([\\`*_\[\]|<>#&])", r"\\\1", " ".join(str(text).split()))
    return text.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


@cache
def templates() -> jinja2.Environment:
    """The templates of this folder: HTML is escaped, Markdown through the filter md."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name == "page.html.j2",
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"md": safe, "base64": lambda data: b64encode(data).decode()}
    environment.filters["sha256"] = lambda text: b64encode(sha256(text.encode()).digest()).decode()
    functions = (description, changed, difference, network_name, machines, hours_text)
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {"columns": COLUMNS, "known_data": list(FOLDERS.values())}
    return environment


def _markdown(macro: str, *values: Any) -> str:
    text = getattr(templates().get_template("tables.md.j2").module, macro)(*values)
    text = re.sub(r" +$", "", text, flags=re.M)
    return re.sub(r"\|  (?=\|)", "| ", text).rstrip()  # an empty cell


def render_readme(text: str, book: Book) -> str:
    """README.md with its tables and the numbers in its prose renewed."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise RecordError(f"README.md needs one line `{BEGIN}` and, after it, one `{END}`")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    text = "\n".join([f"{head}{BEGIN}", _markdown("readme", book), f"{END}{tail}"])
    text = CHOOSING.sub(lambda match: match[1] + short_choosing(book) + match[2], text)
    return renew(text, book)


def renew(text: str, book: Book) -> str:
    """A document with the numbers in its prose and the tables of its studies renewed."""
    text = INLINE.sub(lambda match: _inline(match, book), text)
    return STUDY.sub(lambda match: _study(match, book), text)


def _inline(match: re.Match[str], book: Book) -> str:
    start, place, key, _, end = match.groups()
    groups = [*book.groups, *(group for entry in book.studies.values() for group in entry.groups)]
    found = next((group for group in groups if group.folder == book.records / place), None)
    if found is None or not found.logged(key):
        known = ", ".join(found.runs[0].numbers) if found else "no group of records/"
        raise RecordError(f"README.md shows {key} of {place}: {known}")
    return f"{start}{found.spread(key).text()}{end}"


def _study(match: re.Match[str], book: Book) -> str:
    start, name, _, end = match.groups()
    if name not in book.studies:
        known = ", ".join(book.studies) or "none"
        raise RecordError(f"README.md shows the study {name}; those with records: {known}")
    return f"{start}{_markdown('readme_study', book.studies[name])}\n{end}"


def short_choosing(book: Book) -> str:
    """README's part of docs/choosing.md."""
    return _markdown("choosing_short", book, choices_of(book.root, book.reported)) + "\n"


def render_choosing(book: Book) -> str:
    """docs/choosing.md."""
    return _markdown("choosing", book, choices_of(book.root, book.reported)) + "\n"


def render_results(book: Book) -> str:
    """docs/results.md."""
    return _markdown("results", book, plot_data(book)) + "\n"


def render_runs(book: Book, entry: Entry) -> str:
    """Every run of one config, as docs/results.md shows them."""
    return _markdown("runs", book, entry)


def changed(group: Group, entry: Entry) -> str:
    """Settings that are not those of the first group."""
    one, other = (g.runs[0].counting_settings for g in (group, entry.groups[0]))
    names = [key for key in one if key in other and one[key] != other[key]]
    return ", ".join(f"{safe(key)} {safe(one[key])}" for key in names)


def difference(group: Group, entry: Entry) -> str:
    """From the first group, of the means of standard top-1, ± its standard error."""
    one, two = (g.spread("standard") for g in (group, entry.groups[0]))
    if group is entry.groups[0]:
        return ""
    text = f"{one.mean - two.mean:+.2f}"
    if one.deviation is None or two.deviation is None:
        return f"{text} (spread unknown)"
    error = math.hypot(one.deviation / one.count**0.5, two.deviation / two.count**0.5)
    return f"{text} ± {error:.2f}"


def network_name(run: Run) -> str:
    """'ResNet-50', or the name of the settings."""
    arch = run.setting("model.arch", "unknown")
    return NETWORKS.get(arch.rpartition("/")[2]) or safe(arch)


def description(group: Group, groups: Sequence[Group] = ()) -> str:
    """What, where and by which code, in one line; `groups`: those whose machines are listed."""
    run = group.runs[0]
    found = [r.environment for g in groups or [group] for r in g.runs if r.environment]
    parts = [f"{network_name(run)}, {run.numbers['epochs']} epochs"]
    parts += [f"standard eval {run.protocol('standard')}, config eval {run.protocol('config')}"]
    parts += ["EMA weights" if run.ema else "raw weights"]
    runs = [run for g in groups or [group] for run in g.runs]
    parts += filter(None, [machines(runs, versions=True)])
    commits = dict.fromkeys(
        f"{one.get('commit', 'unknown')[:7]}{' and uncommitted changes' * bool(one.get('dirty'))}"
        for one in found
    )
    parts += [safe(f"commit {', '.join(commits)}")] if found else []
    return " ".join([f"{'; '.join(parts)}.", *filter(None, [group.about.get("note")])])


def machines(runs: Sequence[Run], versions: bool = False) -> str:
    """Devices of runs, where they are several with the number of runs that each had."""
    counts = Counter(_machine(run.environment, versions) for run in runs if run.environment)
    alone = len(counts) == 1
    return " and ".join(where if alone else f"{counts[where]} on {where}" for where in counts)


def _machine(environment: dict[str, Any], with_versions: bool) -> str:
    gpus, cores = environment.get("devices_on_node", 0), environment.get("cores", "?")
    place = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else f"{cores} cores"
    versions = [f"{k} {environment[k]}" for k in ("torch", "ffcv", "python") if k in environment]
    where = f"{environment.get('device', 'unknown')}, {place}"
    return safe(f"{where}; {', '.join(versions)}" if with_versions else where)
