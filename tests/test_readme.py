"""What README.md names exists, and its measurements equal those of the records it points to."""

import json
import re
import statistics
import subprocess
import sys

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = README.split("<!-- results:")[1].split("<!-- end of results -->")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in RESULTS.splitlines()
    if line.startswith("| [")
]
# What benchmarks/table.py and tools/report write, each held to its source by its own test
WRITTEN = [
    r"<!-- results: written by.*?<!-- end of results -->",
    r"<!-- performance: written by.*?<!-- end of performance -->",
    r"<!-- record \S+ \w+ -->.*?<!-- end of record -->",
    r"<!-- study \S+ -->.*?<!-- end of study -->",
]
COMMANDS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
LINKS = re.findall(r"\]\(([^)#]+)\)", README)


def test_results_table_has_its_rows():
    assert len(ROWS) >= 10 and all(len(row) == 8 for row in ROWS)
    assert sum(row[7] != "" for row in ROWS) >= 1


@pytest.mark.parametrize("row", ROWS, ids=[row[0].split("]")[0][1:] for row in ROWS])
def test_row_agrees_with_its_record(row):
    """Without the code that wrote the row."""
    config = ROOT / re.search(r"\((.*?)\)", row[0])[1]
    assert config.is_file()
    if not row[7]:
        assert row[2] == row[3] == "not measured here" and row[4]
        return
    record = ROOT / re.search(r"\((.*)\)", row[7])[1]
    assert record.parent.name == config.stem
    logs = sorted(record.glob("seed*/log.jsonl")) or [record / "log.jsonl"]
    last = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    settings = json.loads((logs[0].parent / "config.json").read_text())
    assert {line["epoch"] for line in last} == {settings["training"]["epochs"]}
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
    assert all(re.search(pattern, README, re.S) for pattern in [*WRITTEN, *NO_PROSE[:4]])
    for text in ("it reached 78.2 there", "lower by 3 %", "2x the rate", "78 ± 1"):
        assert free_numbers(f"`0.1` {text}") != []


# results.md and performance.md are held to their sources by tests of their own; LOG.md is a diary
OTHERS = {ROOT / f"docs/{name}.md" for name in ("results", "performance", "LOG")}
DOCS = sorted({*ROOT.glob("docs/*.md"), *ROOT.glob("*s/README.md")} - OTHERS)


@pytest.mark.parametrize("path", DOCS, ids=[path.stem for path in DOCS])
def test_no_number_stands_free_in_the_docs(path):
    assert len(DOCS) >= 6
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
        assert f"{backend} standard -->{means[backend]:.1f} ± {spread:.1f}<!--" in README
    assert abs(means["ffcv"] - means["torchvision"]) < 1


@pytest.mark.parametrize("link", [link for link in LINKS if "://" not in link])
def test_link_leads_somewhere(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_code_imports_what_is_there(page):
    blocks = re.findall(r"```py(?:thon)?\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    imports = [line for line in lines if line.startswith("from fast_imagenet")]
    assert imports
    exec("\n".join(imports), {})


def test_commands_name_targets_scripts_and_configs_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    lines = [line for block in COMMANDS for line in block.splitlines() if line.strip()]
    assert len(lines) == 6
    for line in lines:
        if target := re.match(r"make (\w+)", line):
            assert re.search(rf"^{target[1]}:", makefile, flags=re.M), line
        for script in re.findall(r"\b(\w+\.py)\b", line):
            assert (ROOT / script).is_file(), line
        for config in re.findall(r"--config (\S+\.yaml)", line):
            assert len(list(ROOT.glob(f"*_configs/{config}"))) == 1, line


def test_settings_named_in_the_text_exist():
    named = re.findall(r"`(?:--)?((?:data|model|logging|training|augment|lr)\.\w+)", README)
    assert len(named) >= 5
    assert len(set(named)) >= 5
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
