"""What README.md names exists, and its measurements equal those of the records it points to."""

import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import train_imagenet
import write_dataset
from tests import make_sources
from tests.conftest import ROOT, SMOKE

README = (ROOT / "README.md").read_text()
RESULTS = README.split("<!-- results:")[1].split("<!-- end of results -->")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in RESULTS.splitlines()
    if "[record](" in line
]
# What benchmarks/table.py and tools/report write, each held to its source by its own test
WRITTEN = [
    r"<!-- results: written by.*?<!-- end of results -->",
    r"<!-- performance: written by.*?<!-- end of performance -->",
    r"<!-- record \S+ \w+ -->.*?<!-- end of record -->",
    r"<!-- study \S+ -->.*?<!-- end of study -->",
    r"<!-- choosing -->.*?<!-- end of choosing -->",
]
COMMANDS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)


def test_it_is_read_in_a_few_minutes():
    """At most 900 words, as a reader of the page sees them."""
    text = re.sub(r"<!--.*?-->", "", README, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    assert 500 < sum(bool(re.search(r"\w", word)) for word in text.split()) <= 900


def test_results_table_has_its_rows():
    assert len(ROWS) >= 6 and all(len(row) == 7 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0].replace("/", " ") for row in ROWS])
def test_row_agrees_with_its_record(row):
    """Without the code that wrote the row."""
    record = ROOT / re.search(r"\((.*)\)", row[6])[1]
    if config := re.search(r"\((.*_configs.*?)\)", row[0]):
        assert (ROOT / config[1]).is_file() and record.parent.name == Path(config[1]).stem
    logs = sorted(record.glob("seed*/log.jsonl")) or [record / "log.jsonl"]
    last = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    settings = json.loads((logs[0].parent / "config.json").read_text())
    assert {line["epoch"] for line in last} == {settings["training"]["epochs"]}
    machines = [json.loads((log.parent / "environment.json").read_text()) for log in logs]
    assert all(one["device"] in row[5] for one in machines)
    ema = "ema_" if settings["ema"]["decay"] else ""
    for cell, key in ((row[2], f"{ema}plain_top1"), (row[3], f"{ema}top1")):
        tops = [line[key] for line in last]
        spread = f" ± {statistics.stdev(tops):.1f}" if len(tops) > 1 else ""
        assert cell.startswith(f"**{statistics.mean(tops):.1f}{spread}** at ")
        assert cell.endswith(f"({len(tops)} seed{'s' * (len(tops) > 1)})")


NO_PROSE = [r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"arXiv \d+\.\d+"]
# versions, which nobody measures
NO_PROSE += [r"Python 3\.\d+ to 3\.\d+"]
NO_PROSE += [r"(?:FFCV|libturbojpeg|torchrun|Kubernetes) \(?\d+\.[\d.]+"]
MEASUREMENT = re.compile(r".{0,30}(?:\d+\.\d|± ?\d|\d+ ?%|\dx\b).{0,30}")


def free_numbers(text: str) -> list[str]:
    """Measurements in prose that no record has written."""
    for pattern in [*WRITTEN, *NO_PROSE]:
        text = re.sub(pattern, "", text, flags=re.S)
    return MEASUREMENT.findall(text)


def test_no_number_stands_free():
    """A measurement in prose is written from its record: between markers, or not at all."""
    assert free_numbers(README) == []
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *DOCS))
    for pattern in [*WRITTEN, *NO_PROSE[:4]]:
        assert re.search(pattern, pages, re.S) or "study" in pattern
    for text in ("it reached 78.2 there", "lower by 3 %", "2x the rate", "78 ± 1"):
        assert free_numbers(f"`0.1` {text}") != []


# these are held to their sources by tests of their own; LOG.md is a diary
OTHERS = {ROOT / f"docs/{name}.md" for name in ("results", "choosing", "performance", "LOG")}
DOCS = sorted({*ROOT.glob("docs/*.md"), *ROOT.glob("*s/README.md")} - OTHERS)


@pytest.mark.parametrize("path", DOCS, ids=[path.stem for path in DOCS])
def test_no_number_stands_free_in_the_docs(path):
    assert len(DOCS) >= 7
    assert free_numbers(path.read_text()) == []


def test_no_line_begins_with_a_marker_of_a_number():
    """Markdown would take the rest of the line for HTML, and end the paragraph."""
    assert re.findall(r"^\s*<!-- record .*", README, re.M) == []


def test_backends_agree_as_the_record_says():
    folder = ROOT / "records/backends/2026-11-22_2-core-epyc"
    table = (folder / "README.md").read_text()
    means = {}
    for backend in ("ffcv", "torchvision"):
        logs = [folder / backend / f"seed{seed}/log.jsonl" for seed in (0, 1, 2)]
        tops = [json.loads(log.read_text().splitlines()[-1])["plain_top1"] for log in logs]
        means[backend], spread = statistics.mean(tops), statistics.stdev(tops)
        cells = [f"{value:.2f}" for value in (*tops, means[backend], spread)]
        assert f"| {backend} | {' | '.join(cells)} |" in table
    assert abs(means["ffcv"] - means["torchvision"]) < 1


PAGES = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path.name != "LOG.md"]


def links(page: Path) -> list[str]:
    """What a page links inside the repository, without code."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=[path.name for path in PAGES])
def test_links_lead_somewhere(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        goal = (page.parent / name) if name else page
        assert goal.exists(), link
        titles = re.findall(r"^#+ (.*)", goal.read_text(), re.M) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in slugs, link


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        found = {
            (page.parent / link.split("#")[0]).resolve() for page in new for link in links(page)
        }
        new = {page for page in found if page.suffix == ".md"} - reached
    assert {path.name for path in ROOT.glob("docs/*.md")} - {page.name for page in reached} == set()


@pytest.mark.parametrize("page", ["docs/training.md", "docs/operations.md"])
def test_code_imports_what_is_there(page):
    blocks = re.findall(r"```py(?:thon)?\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    imports = [line for line in lines if line.startswith("from fast_imagenet")]
    assert imports
    exec("\n".join(imports), {})


def test_commands_name_targets_scripts_and_configs_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    lines = [line for block in COMMANDS for line in block.splitlines() if line.strip()]
    assert len(lines) == 3
    for line in lines:
        if target := re.match(r"make (\w+)", line):
            assert re.search(rf"^{target[1]}:", makefile, flags=re.M), line
        for script in re.findall(r"\b(\w+\.py)\b", line):
            assert (ROOT / script).is_file(), line
        for config in re.findall(r"--config (\S+\.yaml)", line):
            assert len(list(ROOT.glob(f"*_configs/{config}"))) == 1, line


@pytest.mark.slow
def test_the_quick_start_runs(tmp_path, monkeypatch):
    """Its commands in their order, in this process and on small data; make without installing."""
    make_sources.make_image_folder(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    demo = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    lines = "".join(COMMANDS).replace("make demo", demo.replace("$(PY)", ".venv/bin/python"), 1)
    for line in lines.replace("/path/to/imagenet", str(tmp_path / "images")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] and "=" in words[0]:
            monkeypatch.setenv(*words.pop(0).split("="))
        if words[1:2] == ["write_dataset.py"]:
            write_dataset.main([*words[2:], "--write.limit=64"])
        elif words[1:2] == ["train_imagenet.py"]:
            flags = ["--config", str(SMOKE), "--model.arch=timm/test_resnet"]
            train_imagenet.main(train_imagenet.read_settings([*words[2:], *flags]))
        else:
            assert words in ([], ["rm", "-rf", "runs/demo"])
    for run in ("demo", "rn50_32_epochs_mild"):
        assert Path(f"runs/{run}/weights.safetensors").is_file()


def test_settings_named_in_the_text_exist():
    text = "".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    named = re.findall(
        r"`(?:--)?((?:data|model|logging|training|augment|lr)\.(?!safetensors)\w+)[=`]", text
    )
    assert len(set(named)) >= 15
    command = [sys.executable, "train_imagenet.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [name for name in named if f"--{name} " not in done.stdout] == []


def test_file_tree_names_what_is_there():
    tree = README.split("```\ntrain_imagenet.py")[1].split("```")[0]
    tree = "train_imagenet.py" + tree
    folder = ROOT
    for line in tree.splitlines():
        folder = ROOT / "fast_imagenet" if line.startswith("  ") else ROOT
        names = re.split(r" {2,}", line.strip())[0].split()
        for name in names:
            assert (folder / name).exists(), line
