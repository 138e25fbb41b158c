"""python -m tools.report: tables are those of the records, and only runs become records."""

import base64
import hashlib
import io
import json
import math
import re
import shutil
import statistics
import sys
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

import train_imagenet
from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.engine.logger import LOG_KEYS
from fast_imagenet.engine.work import work_of
from fast_imagenet.program import errors_as_sentences
from tests.conftest import ROOT, SMOKE
from tests.figures import check_figure
from tests.test_shipped_configs import settings
from tools.report import __main__ as report
from tools.report.add import add_run
from tools.report.choosing import choices_of, hours_text
from tools.report.page import Mistake, Mistakes, class_names, find_mistakes, render_page
from tools.report.plots import COLORS, PLOTS, draw, draw_figure, is_current, plot_data
from tools.report.records import REQUIRED, read_entry, read_run, spread
from tools.report.tables import BEGIN, END, render_readme, render_results
from tools.report.yaml_files import RecordError, read_reported

RECORDS = ROOT / "records"
README = f"""# Title

{BEGIN}
{END}

Both reach <!-- record small/2030-01-01_machine standard -->?<!-- end of record -->.
"""
REPORTED = """
data:
  ImageNet: {images: 1000, note: Many.}
readme: [rn50_16_epochs]
blocks:
  - by: others
    source: their page
    data: ImageNet
    network: ResNet-50
    protocol: 256 px + flip
    eval: config
    results: [{config: rn50_16_epochs, epochs: 16, pixels: 17.8, top1: 73.8, spread: 0.2}]
"""


def make_run(folder: Path, top1=50.0, seed=0, epochs=3, **settings) -> Path:
    """A folder as train_imagenet.py leaves it; `settings`: 'section__key' -> value."""
    config = {
        "model": {"arch": "resnet18"},
        "data": {"train_dataset": "/home/somebody/train.beton", "num_workers": 2},
        "training": {"epochs": epochs, "seed": seed, "max_steps": 0},
        "ema": {"decay": 0.0},
        "resolution": {"min_res": 48, "max_res": 64, "start_ramp": 0, "end_ramp": 1},
        "validation": {"resolution": 96, "lr_tta": True, "plain_resolution": 64},
        "logging": {"folder": "runs/small"},
    }
    for name, value in settings.items():
        section, _, key = name.partition("__")
        config[section][key] = value
    lines = []
    for epoch in range(1, epochs + 1):
        line = dict.fromkeys(LOG_KEYS, 0.25) | {"epoch": epoch, "seconds": 10.0}
        line |= {"images_per_second": 100.0, "total_seconds": 12.0 * epoch}
        line |= {"plain_top1": top1 - epochs + epoch, "top1": top1 + 1, "ema_plain_top1": top1 + 2}
        lines.append(line | {"ema_top1": top1 + 3, "lr": 0.1 / epoch, "train_loss": 2.0 / epoch})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps(config))
    environment = {"commit": "0123456789", "dirty": False, "device": "Some CPU", "cores": 2}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def make_place(root: Path) -> Path:
    """A repository with one record of two seeds."""
    for seed, top1 in enumerate((50.0, 51.0)):
        make_run(root / f"records/small/2030-01-01_machine/seed{seed}", top1, seed)
    (root / "records/reported.yaml").write_text(REPORTED)
    (root / "README.md").write_text(README)
    (root / "docs").mkdir()
    return root


@pytest.fixture
def place(tmp_path):
    """Root of a repository whose tables are not written yet."""
    return make_place(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The same with its tables: to be copied, not changed."""
    root = make_place(tmp_path_factory.mktemp("built"))
    assert run(root) == 0
    return root


def run(place: Path, *words: str) -> int:
    return call(*words, f"--folder={place / 'records'}")


def call(*words: str) -> int:
    """The exit status of the command, its error on stderr."""
    try:
        with errors_as_sentences("report"):
            return report.main(list(words))
    except SystemExit as end:  # a sentence: status 1
        print(end.code, file=sys.stderr)
        return 1


# ---- this repository -----------------------------------------------------------------------------


def test_what_is_committed_is_what_the_records_say(capsys):
    status = run(ROOT, "--check")
    assert status == 0, capsys.readouterr().err


def test_spreads_of_the_records_are_those_of_their_logs():
    book = report.open_book(RECORDS)
    entries = [*book.rows.values(), *book.studies.values()]
    groups = [group for entry in entries for group in entry.groups]
    assert len(groups) >= 3 and book.studies
    text = (ROOT / "docs/results.md").read_text()
    for group in groups:
        logs = [group.folder / "log.jsonl", *sorted(group.folder.glob("seed*/log.jsonl"))]
        last = [json.loads(p.read_text().splitlines()[-1]) for p in logs if p.is_file()]
        key = "ema_plain_top1" if group.runs[0].ema else "plain_top1"
        tops = [line[key] for line in last]
        cell = f"{statistics.mean(tops):.2f}"
        cell += f" ± {statistics.stdev(tops):.2f}" if len(tops) > 1 else ""
        assert cell in text
        assert len(tops) == len(group.runs)


def test_reported_numbers_stand_in_the_headers_of_their_configs():
    reported = read_reported(RECORDS / "reported.yaml")
    named = [one for one in reported.reports if one["config"] and one["eval"] != "other"]
    assert len(named) >= 20
    for one in named:
        (path,) = ROOT.glob(f"*_configs/{one['config']}.yaml")
        header, cfg = path.read_text().split("\n\n")[0], settings(path)
        pixels = work_of(cfg).training * one["epochs"] / cfg.training.epochs
        assert one["pixels"] == pytest.approx(pixels, rel=0.05), path
        for value in (one["top1"], one["top5"], one["minutes"]):
            ours = one["by"].startswith("reference") and value == one["minutes"]
            if value is not None and not ours:
                assert re.search(rf"\b{re.escape(f'{value:g}')}0?\b", header), (path, value)


def test_records_name_no_folder_and_no_machine_of_their_owner():
    for path in RECORDS.rglob("*.json*"):
        assert not re.search(r'"(/|~)', path.read_text()), path


# ---- tables --------------------------------------------------------------------------------------


def test_build_check_and_a_new_seed(built, place, capsys):
    assert run(place, "--check") == 1
    assert capsys.readouterr().err.count(" does not match records/") == 2 + len(PLOTS)
    readme = (built / "README.md").read_text()
    assert "| small | ResNet-18, own data | **50.5 ± 0.7** at 64 px (2 seeds) |" in readme
    assert "**51.5 ± 0.7** at 96 px + flip (2 seeds)" in readme
    assert "standard -->50.5 ± 0.7<!-- end" in readme
    shutil.copytree(built, place, dirs_exist_ok=True)
    assert run(place, "--check") == 0
    make_run(place / "records/small/2030-01-01_machine/seed2", 54.0, 2)
    assert run(place, "--check") == 1
    assert run(place) == 0
    assert "51.7 ± 2.1" in (place / "README.md").read_text()
    assert run(place, "--check") == 0


@pytest.mark.parametrize("name", ["README.md", "docs/results.md", *PLOTS])
def test_an_edit_by_hand_is_seen(built, tmp_path, name, capsys):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    if path.suffix == ".png":
        path.write_bytes(path.read_bytes().replace(b"Data-Digest", b"Data-Diges?"))
    else:
        path.write_text(path.read_text().replace("50.5", "60.5").replace("73.8", "79.8"))
    assert run(tmp_path, "--check") == 1
    stale = [line for line in capsys.readouterr().err.splitlines() if "does not match" in line]
    assert stale == [f"{name} does not match records/"]


def test_reported_and_measured_stand_apart(place):
    (place / "rn50_configs").mkdir()
    (place / "rn50_configs/rn50_16_epochs.yaml").write_text("")
    book = report.open_book(place / "records")
    assert "73.8" not in render_readme(README, book)  # measured rows only
    results = render_results(book)
    assert "| ResNet-50 | 16 | 17.8 | 73.8 ± 0.2 | | | 256 px + flip | others | no |" in results
    assert "[rn50_16_epochs](../rn50_configs/rn50_16_epochs.yaml)" in results
    assert "| small | ResNet-18 | own data | **50.50 ± 0.71** at 64 px (2 seeds) |" in results
    make_run(place / "records/rn50_16_epochs/2030-01-01_machine", 70.0)
    results = render_results(report.open_book(place / "records"))
    measured = (
        "| ResNet-18 | ImageNet | **70.00** at 64 px (1 seed) | **71.00** at 96 px + flip (1 seed)"
    )
    assert f"{measured} | 0.6 | 73.8 ± 0.2 | 256 px + flip | others, ResNet-50 |" in results
    assert "| 256 px + flip | others | yes |" in results


def test_averaged_weights_are_the_result_where_there_is_an_average(place):
    folder = make_run(place / "other", 60.0, ema__decay=0.99)
    numbers = read_run(folder).numbers
    assert (numbers["standard"], numbers["config"]) == (62.0, 63.0)
    assert numbers["images"] == 3 * 1000 / 1000 and numbers["minutes"] == pytest.approx(0.6)
    assert numbers["data_wait"] == pytest.approx(25)


def test_groups_beside_each_other(place):
    second = place / "records/small/2030-01-02_ours"
    make_run(second, 58.0)
    with pytest.raises(RecordError, match='write "main": true'):
        read_entry(place / "records/small")
    (second / "group.json").write_text('{"label": "ours <&|", "main": true}')
    entry = read_entry(place / "records/small")
    assert [group.label for group in entry.groups] == ["ours <&|", "2030-01-01_machine"]
    readme = render_readme(README, report.open_book(place / "records"))
    assert "| small, ours &lt;&amp;\\| | ResNet-18, own data | **58.0** at 64 px (1 seed)" in readme
    assert readme.count("| small") == 1
    (place / "records/small/2030-01-01_machine/group.json").write_text('{"readme": true}')
    assert render_readme(README, report.open_book(place / "records")).count("| small") == 2


def test_times_of_a_busy_machine_are_not_shown(place):
    group = place / "records/small/2030-01-01_machine"
    (group / "group.json").write_text('{"timed": false}')
    book = report.open_book(place / "records")
    results = render_results(book)
    assert "| 0.6 |" not in results and results.count("not timed") == 1 + 3 * 3
    assert [one["minutes"] for one in plot_data(book)["docs/results_accuracy.png"]] == [[]]


def test_without_a_record_a_plot_is_removed(built, place):
    shutil.copytree(built, place, dirs_exist_ok=True)
    shutil.rmtree(place / "records/small")
    (place / "README.md").write_text(f"{BEGIN}\n{END}\n")
    book = report.open_book(place / "records")
    report.build(book)
    assert not (place / "docs/results_accuracy.png").exists() and not report.stale(book)
    assert "No plot of accuracy against epochs and time: there is no record" in render_results(book)


def test_what_a_killed_copy_left_is_not_a_record(place):
    make_run(place / "records/small/2030-01-01_machine/.seed2.partial", seed=2)
    make_run(place / "records/.small/2030-01-01_machine")
    (entry,) = report.open_book(place / "records").rows.values()
    assert [len(group.runs) for group in entry.groups] == [2]


def test_a_study_compares_its_groups(place):
    for top1, name in ((50.0, "plain"), (53.0, "mixup")):
        for seed in (0, 1):
            folder = place / f"records/parts/2030-01-01_machine/{name}/seed{seed}"
            make_run(folder, top1 + seed, seed, training__label_smoothing=top1 / 100)
    (place / "records/parts/2030-01-01_machine/plain/group.json").write_text('{"main": true}')
    (place / "records/parts/study.yaml").write_text("title: What each is worth")
    book = report.open_book(place / "records")
    results = render_results(book)
    error = math.sqrt(2 * 0.5 / 2)
    what = "training.label\\_smoothing 0.53"
    assert f"| mixup | {what} | 53.50 ± 0.71 | +3.00 ± {error:.2f} |" in results
    assert "| plain | | 50.50 ± 0.71 | |" in results
    assert "## What each is worth" in results
    assert "parts" not in render_readme(README, book)
    asked = f"{README}\n<!-- study parts -->\nold words\n<!-- end of study -->\nthe end\n"
    written = render_readme(asked, book)
    assert f"| mixup | 53.50 ± 0.71 | +3.00 ± {error:.2f} | " in written
    assert "old words" not in written and "\n<!-- end of study -->\nthe end\n" in written
    assert render_readme(written, book) == written
    with pytest.raises(RecordError, match="shows the study bits; those with records: parts"):
        render_readme(asked.replace("study parts", "study bits"), book)
    listed = replace(book, reported=replace(book.reported, readme=["parts"]))
    assert "| mixup | ResNet-18, own data | **53.5 ± 0.7** at" in render_readme(README, listed)


def test_what_is_superseded_is_marked(place):
    group = place / "records/small/2030-01-01_machine"
    (group / "group.json").write_text('{"superseded": "a newer one is better."}')
    make_run(place / "records/parts/plain")
    (place / "records/parts/study.yaml").write_text("title: Parts\nsuperseded: it has one seed.")
    book = report.open_book(place / "records")
    results = render_results(book)
    assert "| small (superseded) |" in render_readme(README, book)
    assert "| small (superseded) |" in results
    assert "machine) (superseded)\n\n**Superseded**: a newer one is better.\n\n<details>" in results
    assert "## Parts (superseded)\n\n**Superseded**: it has one seed.\n\n<details>" in results


# ---- which config to run -------------------------------------------------------------------------


def test_choices_are_those_of_the_headers():
    """The first card's hours are those of the header, which is held to its settings elsewhere."""
    reported = read_reported(RECORDS / "reported.yaml")
    choices = choices_of(ROOT, reported)
    page = (ROOT / "docs/choosing.md").read_text()
    named = [x for x in reported.reports if x["config"] and x["data"] == "ImageNet"]
    assert len(choices) == len(named) >= 18 and next(iter(reported.cards)) == "RTX 5060 Ti"
    for choice in choices:
        (path,) = ROOT.glob(f"*_configs/{choice.report['config']}.yaml")
        header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines())
        time = header.split("Time: ")[1]
        hours, *others = map(hours_text, choice.hours.values())
        assert re.match(rf"{hours.split()[0]} hours (\(\S+ days\) )?on one RTX 5060 Ti", time)
        estimate = choice.hours["RTX 5060 Ti"] / 3.3
        known = {"ffcv-imagenet": choice.report.get("minutes"), "MosaicML": 27}
        minutes = known.get(choice.report["by"])
        gpus = 1 if choice.report["network"] == "ResNet-18" else 8
        reported_hours = gpus * minutes / 60 if minutes else None
        assert choice.hours["A100"] == pytest.approx(reported_hours or estimate)
        cells = " | ".join([hours, *others, "43", f"{choice.disk_rate:.0f}"])
        assert f"| {cells} |" in page
    best = [c.report["config"] for c in choices if c.is_best and c.report["network"] == "ResNet-50"]
    readme = (ROOT / "README.md").read_text().split("<!-- choosing -->")[1].split("<!-- end")[0]
    assert re.findall(r"\[(rn50\w+)\]", readme) == best and "rn50_32_epochs_mild" in best


def test_a_header_without_its_numbers_is_refused(place):
    (place / "rn50_configs").mkdir()
    (place / "rn50_configs/rn50_16_epochs.yaml").write_text("# nothing\n\na: 1")
    path = place / "records/reported.yaml"
    path.write_text(REPORTED + "\ncards: {GPU: {speed: 1, source: me}}\n")
    with pytest.raises(RecordError, match="has no `Time: ... hours on one RTX"):
        report.stale(report.open_book(place / "records"))


def test_the_demo_is_not_a_row_of_imagenette(place):
    (place / "imagenette_configs").mkdir()
    (place / "imagenette_configs/demo.yaml").write_text("")
    make_run(place / "records/demo/2030-01-01_machine", 70.0)
    results = render_results(report.open_book(place / "records"))
    readme = render_readme(README, report.open_book(place / "records"))
    assert "| [demo](imagenette_configs/demo.yaml) | ResNet-18, synthetic images |" in readme
    assert "| small | ResNet-18, own data |" in readme
    assert "| [demo](../imagenette_configs/demo.yaml) | ResNet-18 | synthetic images |" in results
    about = place / "records/demo/2030-01-01_machine/group.json"
    about.write_text('{"data": "mine"}')
    assert "| mine |" in render_results(report.open_book(place / "records"))


def test_a_study_names_all_its_machines_and_commits(place):
    for seed, device, commit in (
        (0, "GPU one", "a" * 40),
        (1, "GPU one", "a" * 40),
        (2, "two", "b"),
    ):
        make_run(place / f"records/parts/plain/seed{seed}", seed=seed)
        path = place / f"records/parts/plain/seed{seed}/environment.json"
        about = {"device": device, "devices_on_node": int(seed < 2), "cores": 8, "torch": "2.0"}
        path.write_text(json.dumps(about | {"commit": commit, "dirty": seed == 2}))
    (place / "records/parts/study.yaml").write_text("title: What each is worth")
    results = render_results(report.open_book(place / "records"))
    assert "; 2 on GPU one, 1 GPU; torch 2.0 and 1 on two, 8 cores; torch 2.0; " in results
    assert "; commit aaaaaaa, b and uncommitted changes." in results


def test_numbers_in_prose_that_no_record_has_are_refused(place):
    book = report.open_book(place / "records")
    for old, new in (("machine standard", "machine speed"), ("small/2030", "large/2030")):
        with pytest.raises(RecordError, match="README.md shows"):
            render_readme(README.replace(old, new), book)
    with pytest.raises(RecordError, match="needs one line"):
        render_readme(README.replace(END, ""), book)


def test_spread_is_the_sample_deviation():
    assert spread([1.0, 2.0, 4.0]).text(3) == "2.333 ± 1.528"
    assert spread([1.25]).text() == "1.2"
    assert spread([59.35, 60.60, 59.90]).text() == "60.0 ± 0.6"


# ---- plots ---------------------------------------------------------------------------------------


def test_plots_are_the_same_bytes_and_know_their_numbers(built):
    plots = plot_data(report.open_book(built / "records"))
    assert list(plots) == list(PLOTS)
    for name, series in plots.items():
        png = (built / name).read_bytes()
        assert draw(name, series) == png and len(png) < 100_000
        assert is_current(built / name, series)
        assert not is_current(built / name, [*series, 1])


def pixels(png: bytes, height: float, color: str) -> int:
    """How many pixels of the upper part have about this color."""
    with Image.open(io.BytesIO(png)) as image:
        rgb = np.asarray(image.convert("RGB"), int)[: int(image.height * height)]
    return int((abs(rgb - [int(color[i : i + 2], 16) for i in (1, 3, 5)]).sum(2) < 60).sum())


CURVE = {"epochs": [1, 2, 3, 4], "seeds": 3, "top1": [30.0, 50.0, 60.0, 70.0]}
CURVE |= {"deviation": [1.0, 1.0, 1.0, 1.0], "minutes": []}
ONE_POINT = {"epochs": [4], "seeds": 3, "top1": [70.0], "deviation": [0.1], "minutes": []}


def test_no_series_of_accuracy_is_hidden_and_no_panel_is_empty():
    shapes = [ONE_POINT, CURVE, CURVE, ONE_POINT]
    series = [{"title": f"row {k}"} | shape for k, shape in enumerate(shapes)]
    png = draw("docs/results_accuracy.png", series)
    counts = [pixels(png, 0.6, COLORS[k]) for k in range(len(series))]
    assert min(counts) > 10, counts
    with Image.open(io.BytesIO(png)) as image:  # one panel: its curve spans the page
        rgb = np.asarray(image.convert("RGB"), int)[: int(image.height * 0.6)]
    blue = np.flatnonzero((abs(rgb - [0x1B, 0x4F, 0x91]).sum(2) < 60).any(0))
    assert blue.max() > 0.8 * rgb.shape[1]
    timed = [one | {"minutes": one["epochs"]} for one in series]
    counts = [pixels(draw("docs/results_accuracy.png", timed), 0.6, COLORS[k]) for k in range(4)]
    assert min(counts) > 20, counts


def test_no_point_of_pixels_is_hidden():
    points = {"data": "ImageNet", "measured": True, "points": [(0.15, 78.0, 0.0)]}
    series = [{"title": f"row {k}"} | points for k in range(4)]
    series.append({"title": "line"} | points | {"points": [(0.15, 78.0, 0.0), (2.0, 70.0, 0.0)]})
    apart = [one | {"points": [(10.0 ** (j - 1), 60.0, 0.0)]} for j, one in enumerate(series)]
    name = "docs/results_pixels.png"
    for color in COLORS[:4]:  # a mark among the others is as large as alone
        whole = pixels(draw(name, apart), 0.6, color)
        assert pixels(draw(name, series), 0.6, color) > 0.8 * whole > 20


def test_plots_of_this_repository_can_be_read():
    for name, series in plot_data(report.open_book(RECORDS)).items():
        check_figure(figure := draw_figure(name, series))
        assert figure.bbox.width <= 1200
    without = {key: [one for one in series if ("bars" in one) != key] for key in (True, False)}
    for some in without.values():  # the overview of rates alone, of reports alone
        check_figure(draw_figure("docs/overview.png", some))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (dict(epochs=3, training__epochs=4), "finished 3 of 4 epochs"),
        (dict(training__max_steps=9), "max_steps=9 cut it short"),
        (dict(seed=0), "has seed 0, as another"),
        (dict(validation__resolution=128), "differ in validation.resolution"),
        (dict(model__arch="resnet50"), "differ in model.arch"),
    ],
)
def test_a_seed_that_does_not_fit_is_refused(place, damage, sentence):
    make_run(place / "records/small/2030-01-01_machine/seed2", **{"seed": 2} | damage)
    with pytest.raises(RecordError, match=sentence):
        report.open_book(place / "records")


def test_workers_paths_and_logging_may_differ(place):
    free = dict(data__num_workers=7, data__train_dataset="x.beton", logging__folder="runs/b")
    make_run(place / "records/small/2030-01-01_machine/seed2", seed=2, **free)
    assert len(read_entry(place / "records/small").groups[0].runs) == 3


def test_another_number_of_images_is_refused(place):
    log = make_run(place / "records/small/2030-01-01_machine/seed2", seed=2) / "log.jsonl"
    log.write_text(log.read_text().replace('"seconds": 10.0', '"seconds": 11.0'))
    with pytest.raises(RecordError, match="saw 1,100 images per epoch"):
        report.open_book(place / "records")


@pytest.mark.parametrize(
    ("key", "value"), [("epoch", 10**30), ("epoch", 1.5), ("epoch", 0), ("lr", 1e300)]
)
def test_a_number_that_cannot_be_is_refused_at_once(place, key, value):
    """A hundred thousand epochs at most: all of them are counted through."""
    log = make_run(place / "records/small/2030-01-01_machine/seed2", seed=2) / "log.jsonl"
    lines = [json.loads(line) | {key: value} for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RecordError, match=f"line 1 of .* has {key}={value}".replace("+", r"\+")):
        report.open_book(place / "records")


@pytest.mark.parametrize(
    "changed", [{"training": 5}, {"validation": {"every": 0}}, {"validation": {"crop_ratio": "y"}}]
)
def test_settings_of_another_kind_are_refused(place, changed):
    run = make_run(place / "records/small/2030-01-01_machine/seed2", seed=2)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | changed))
    with pytest.raises(RecordError, match="config.json has .*; restore it"):
        report.open_book(place / "records")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty"),
        ("{", "line 1 of .* is damaged"),
        ('{"epoch": 1}', "line 1 of .* has no number for seconds"),
    ],
)
def test_a_damaged_log_is_refused(place, content, sentence):
    (make_run(place / "run") / "log.jsonl").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_run(place / "run")


def test_records_of_other_versions_stay_readable(place, capsys):
    """An older one has no key for a newer metric, a newer one has keys that are not known yet."""
    run_folder = make_run(place / "records/small/2030-01-01_machine/seed2", 54.0, 2)
    log = run_folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    dropped = set(LOG_KEYS) - {*REQUIRED, "plain_top1", "top1", "total_seconds"}
    assert {"memory_gb", "data_wait_share", "top5", "lr", "ema_top1"} <= dropped
    for line in lines:
        for key in dropped:
            del line[key]
    log.write_text("".join(json.dumps(line | {"a_new_metric": 0.5}) + "\n" for line in lines))
    (run_folder / "environment.json").write_text('{"a_new_fact": [1], "device": "Some CPU"}')
    assert run(place) == 0 and run(place, "--check") == 0
    results = (place / "docs/results.md").read_text()
    assert "| 2 | 54.00 | not logged | 55.00 | not logged | 0.6 | 100.0 | not logged |" in results
    assert "| 0 | 50.00 | 0.25 | 51.00 | 0.25 | 0.6 | 100.0 | 25.0 | 3 | 0.2 |" in results
    assert "| 51.67 ± 2.08 | not logged | 52.67 ± 2.08 | not logged | 0.6 ± 0.0 |" in results
    assert "51.7 ± 2.1" in (place / "README.md").read_text()
    assert call("page", str(run_folder)) == 0
    page = Reader((run_folder / "page.html").read_text())
    assert "0.5" in page.text and "peak memory" not in page.text
    book = report.open_book(place / "records")
    for name, series in plot_data(book).items():
        check_figure(draw_figure(name, series))
    for line in lines:
        del line["top1"]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(place) == 1
    assert (
        "line 1 of" in (printed := capsys.readouterr().err) and "has no number for top1" in printed
    )


def test_a_gap_in_the_log_is_seen(place):
    log = make_run(place / "run") / "log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[2]]) + "\n")
    assert "gaps or repeats" in read_run(place / "run").unfinished()


def test_a_run_with_rare_evaluations_is_whole(place):
    folder = make_run(place / "run", epochs=5, validation__every=3)
    lines = (folder / "log.jsonl").read_text().splitlines()
    for kept, words in (
        ([3, 5], ""),
        ([2, 3, 5], ""),  # it was cut once, and resumed
        ([5], "gaps or repeats"),
        ([3, 3, 5], "gaps or repeats"),
        ([3], "has finished 3 of 5"),
    ):
        (folder / "log.jsonl").write_text("".join(lines[n - 1] + "\n" for n in kept))
        reason = read_run(folder).unfinished()
        assert words in reason and bool(words) == bool(reason)


def test_unknown_keys_of_group_json_and_reported_yaml_are_refused(place):
    group = place / "records/small/2030-01-01_machine/group.json"
    for content in ('{"lable": "x"}', '{"main": 1}', "[]", "{"):
        group.write_text(content)
        with pytest.raises(ValueError, match="group.json"):
            report.open_book(place / "records")
    group.unlink()
    path = place / "records/reported.yaml"
    for old, new in (
        ("by: others", "buy: others"),
        ("eval: config", "eval: best"),
        ("top1: 73.8", "top1: high"),
        ("config: rn50_16_epochs", "top5: 90"),
        ("readme:", "read_me:"),
        ("blocks:", "blocks: ["),
    ):
        path.write_text(REPORTED.replace(old, new))
        with pytest.raises(ValueError, match=r"reported\.yaml"):
            report.open_book(place / "records")


# ---- add -----------------------------------------------------------------------------------------


def test_add_makes_a_row_and_copies_no_weights_and_no_paths(place, capsys):
    source = make_run(place / "runs/mine", 57.0, seed=4)
    for name in ("weights.safetensors", "last.pt", "events.out.tfevents.1.host"):
        (source / name).write_bytes(b"0")
    (source / "steps.jsonl").write_text('{"first_step": 0, "losses": [1.0]}\n')
    (source / "summary.json").write_text('{"out": "/home/somebody/x"}')
    assert run(place, "add", str(source), "--name=mine", "--label=all new") == 0
    shown = capsys.readouterr().out
    assert "| 4 | 57.00 |" in shown and "all new" in shown
    (seed,) = (place / "records/mine").glob("*/seed4")
    assert re.fullmatch(r"20\d\d-\d\d-\d\d_2-core-some-cpu", seed.parent.name)
    assert sorted(path.name for path in seed.iterdir()) == [
        *("config.json", "environment.json", "log.jsonl", "steps.jsonl", "summary.json")
    ]
    text = "".join(path.read_text() for path in seed.iterdir())
    assert "somebody" not in text and ".../train.beton" in text
    readme = render_readme(README, report.open_book(place / "records"))
    assert "| mine, all new | ResNet-18, own data | **57.0**" in readme


def test_add_puts_seeds_together_and_a_second_group_aside(place):
    for seed in (0, 1):
        source = make_run(place / f"runs/{seed}", 60.0 + seed, seed, logging__folder="runs/small")
        assert run(place, "add", str(source), "--group=2030-02-02_ours", "--label=ours") == 0
    about = json.loads((place / "records/small/2030-02-02_ours/group.json").read_text())
    assert about == {"main": False, "label": "ours"}
    entry = read_entry(place / "records/small")
    assert [len(group.runs) for group in entry.groups] == [2, 2]
    assert entry.groups[0].folder.name == "2030-01-01_machine"


@pytest.mark.parametrize(
    ("words", "settings", "sentence"),
    [
        ([], dict(training__epochs=9), "finished 3 of 9 epochs; --unfinished takes it"),
        (["--name=../x"], {}, "is not a folder name"),
        ([], dict(logging__folder=""), "--name="),
        (["--group=2030-01-01_machine"], dict(seed=1), "seed1 exists already"),
        (
            ["--group=2030-01-01_machine"],
            dict(seed=2, model__arch="x"),
            "differ in model.arch",
        ),
        (["--group=b", "--main"], {}, None),
    ],
)
def test_add_refuses_what_is_not_a_record_and_leaves_nothing(
    place, words, settings, sentence, capsys
):
    source = make_run(place / "runs/small", **settings)
    before = sorted(place.rglob("*"))
    status = run(place, "add", str(source), *words)
    if sentence is None:
        assert status == 0
        return
    assert status == 1 and sentence in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before


def test_add_writes_nothing_where_there_are_no_records(place, capsys):
    source, elsewhere = make_run(place / "runs/mine"), place / "elsewhere"
    assert call("--folder", str(elsewhere), "add", str(source)) == 1
    assert "holds no reported.yaml" in capsys.readouterr().err
    assert not elsewhere.exists()


def test_add_that_fails_leaves_nothing(place, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    source = make_run(place / "runs/mine")
    monkeypatch.setattr("tools.report.add.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        add_run(source, place / "records")
    assert not list(place.rglob("*partial*"))


def test_add_takes_an_unfinished_run_on_request_and_the_row_names_it(place):
    source = make_run(place / "runs/cut", training__epochs=9)
    assert run(place, "add", str(source), "--name=cut", "--unfinished") == 0
    text = render_readme(README, report.open_book(place / "records"))
    assert "(1 seed; it has finished 3 of 9 epochs)" in text


def test_add_takes_the_words_for_a_dataset(place):
    source = make_run(place / "runs/mine", 88.0, epochs=5, model__arch="resnet50")
    assert run(place, "add", str(source), "--name=mine", "--data=a <b>") == 0
    results = render_results(report.open_book(place / "records"))
    assert "| mine | ResNet-50 | a &lt;b&gt; | **88.00** at 64 px" in results


def test_a_run_without_its_settings_is_not_a_record(place, capsys):
    source = make_run(place / "runs/lost")
    (source / "config.json").unlink()
    assert run(place, "add", str(source), "--name=lost") == 1
    assert "there is no config.json" in capsys.readouterr().err


def test_a_folder_without_records_is_refused(tmp_path, capsys):
    assert call(f"--folder={tmp_path}") == 1
    assert "run this in the repository's folder" in capsys.readouterr().err


def test_the_documented_keys_are_those_of_the_code():
    from tools.report.records import GROUP_KEYS

    text = (RECORDS / "README.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == list(GROUP_KEYS)
    example = re.search(r'^    (\{"label.*\})$', text, re.M)[1]
    assert set(yaml.safe_load(example)) <= set(GROUP_KEYS)


# ---- page ----------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags that are open, every attribute, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.attributes, self.tags, self.text = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "img", "br", "line", "polyline", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "polyline"):  # <line/>
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def trained(tiny_beton, tmp_path_factory):
    """A finished run on the tiny data; its evaluation has eight batches."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = [f"--config={SMOKE}", "--model.arch=timm/test_resnet", f"--logging.folder={folder}"]
    words += [f"--data.{s}_dataset={tiny_beton / f'{s}.beton'}" for s in ("train", "val")]
    words += ["--training.max_steps=0", "--training.epochs=1", "--lr.lr_peak_epoch=0"]
    words += ["--training.batch_size=40", "--validation.batch_size=4"]
    train_imagenet.main(train_imagenet.read_settings(words))
    return folder


@pytest.mark.slow
def test_the_page_shows_the_mistakes_of_the_weights(trained, tiny_beton, capsys):
    words = ["page", str(trained), f"--val={tiny_beton / 'val.beton'}", "--worst=5"]
    assert call(*words) == 0
    assert f"{trained / 'page.html'}: 0." in capsys.readouterr().out
    text = (trained / "page.html").read_text()
    page, last = Reader(text), read_run(trained).log[-1]
    assert page.open == [] and page.tags.count("script") == 1
    assert f"standard eval at 32 px: top-1 {last['plain_top1']:.2f} % of 30." in page.text
    assert "not the number of the log" not in page.text
    assert page.tags.count("figure") == 5
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith("data:image/") for value in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text).replace("http-equiv", "")
    cells = re.findall(r'<td style="[^"]*">(\d*)</td>', text)
    assert len(cells) == 100 and sum(int(cell or 0) for cell in cells) == 30
    right = sum(int(cell or 0) for cell in cells[::11])
    assert 100 * right / 30 == pytest.approx(last["plain_top1"])


@pytest.mark.parametrize("older", [False, True])
def test_the_page_of_a_run_finds_its_data_anywhere_and_no_record_does(
    trained, tiny_beton, tmp_path, capsys, older
):
    out = tmp_path / "page.html"
    assert call("page", str(trained), f"--out={out}") == 0  # the data is in no repository
    assert "not shown" not in capsys.readouterr().out
    assert " % of 30." in Reader(out.read_text()).text
    (tmp_path / "records").mkdir()
    add_run(trained, tmp_path / "records", name="a", group="b")
    for file in (path for path in (tmp_path / "records").rglob("*") if path.is_file()):
        assert str(tiny_beton.parent) not in file.read_text(), file
    moved = shutil.copytree(trained, tmp_path / "moved")
    shutil.rmtree(tmp_path / "records")
    if older:  # a version whose config.json had no paths
        config, paths = {}, {"data.val_dataset": "/somebody/elsewhere/val.beton"}
        (moved / "paths.json").write_text(json.dumps(paths))
    else:
        config = json.loads((moved / "config.json").read_text())
        config["data"]["val_dataset"] = "/somebody/elsewhere/val.beton"
    (moved / "config.json").write_text(json.dumps(config))
    assert call("page", str(moved), f"--out={out}") == 0
    printed, page = capsys.readouterr().out, Reader(out.read_text()).text
    why = "the validation data, val.beton, is not where the run had it; name it with --val."
    assert f"the network's mistakes are not shown, they were not computed: {why}" in printed
    assert "the run had it at /somebody/elsewhere/val.beton" in printed
    assert f"Not shown, the mistakes were not computed: {why}" in page and "/somebody" not in page


def test_mistakes_of_a_fine_tuned_run_are_those_of_its_own_weights(trained, tiny_beton):
    """Not those of the weights that it began with, nor of another new head."""
    files = trained / "weights.safetensors", tiny_beton / "val.beton"
    run = read_run(trained)
    began = run.settings["model"] | {"pretrained": True, "new_head": True, "use_ema": False}
    tuned = replace(run, settings=run.settings | {"model": began})
    own, found = (find_mistakes(one, *files, 30).worst for one in (run, tuned))
    assert [one.label_probability for one in own] == [one.label_probability for one in found]


def test_a_network_without_a_mistake_is_reported_as_such(trained):
    labels_n = np.array([0, 0, 0, 1, 1, 1, 1])
    run, perfect = read_run(trained), Mistakes(["a", "b"], labels_n, labels_n, [], "weights on val")
    assert "No mistake: all 7 are correct." in render_page(run, perfect, "", {})


def test_mistakes_are_those_of_every_sample_alone(trained, tiny_beton):
    """Against an image at a time: the square of the thumbnail is the one that was tested."""
    run, val = read_run(trained), tiny_beton / "val.beton"
    found = find_mistakes(run, trained / "weights.safetensors", val, 30)
    file, wrong = BetonFile(val), np.count_nonzero(found.labels_n != found.guesses_n)
    assert len(found.worst) == wrong > 5
    probabilities = [mistake.label_probability for mistake in found.worst]
    assert probabilities == sorted(probabilities)
    for mistake in found.worst:
        assert file.labels[mistake.sample] == mistake.label != mistake.guess
        assert mistake.guess_probability >= mistake.label_probability
        stored, shown = file.image(mistake.sample), Image.open(io.BytesIO(mistake.jpeg))
        side = int(0.875 * min(stored.shape[:2]))
        top, left = ((length - side) // 2 for length in stored.shape[:2])
        cut = Image.fromarray(stored[top : top + side, left : left + side])
        cut.thumbnail((176, 176))
        assert np.abs(np.asarray(cut, int) - np.asarray(shown, int)).mean() < 15  # JPEG of noise
    images = [int(n) for _, _, n, _ in found.confused(99)]
    assert sum(images) == wrong and images == sorted(images, reverse=True)


def test_confusions_of_many_classes_take_the_memory_of_the_images():
    labels_n = np.array([9, 9, 9, 9, 20_000, 20_000, 7])
    guesses_n = np.array([1, 1, 2, 9, 20_000, 3, 7])
    names = [f"class {k}" for k in range(21_841)]
    tracemalloc.start()
    found = Mistakes(names, labels_n, guesses_n, [], "weights on val")
    assert found.confused(2) == [
        ("class 9", "class 1", "2", "50.0%"),
        ("class 9", "class 2", "1", "25.0%"),
    ]
    assert found.classes() == [
        ("class 9", "25.0%", "4", "class 1"),
        ("class 20000", "50.0%", "2", "class 3"),
        ("class 7", "100.0%", "1", ""),
    ]
    assert found.top1 == pytest.approx(300 / 7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6  # a matrix has 3.8e9 bytes


def test_classes_have_the_names_of_timm():
    source = SimpleNamespace(classes=["n02012849", "n03126707", "n01484850", "a"])
    names = ["crane (n02012849)", "crane (n03126707)", "great white shark", "a", "class 4"]
    assert class_names(source, 5) == names


def test_nothing_of_a_run_becomes_markup(place):
    evil = "\"><script>alert(1)</script><b a='"
    source = make_run(place / "run", model__arch=evil, logging__folder=f"runs/{evil[2:]}")
    (source / "environment.json").write_text(json.dumps({"device": evil, "commit": evil}))
    mistake = Mistake(7, 0, 1, 0.001, 0.9, b"jpeg")
    labels_n, guesses_n = np.arange(10) // 5, np.array([0, 0, 0, 1, 1, 0, 1, 1, 1, 1])
    found = Mistakes([evil, "b"], labels_n, guesses_n, [mistake], evil)
    text = render_page(read_run(source), found, "", {"model.arch": evil[::-1]})
    page = Reader(text)
    assert page.open == [] and "b a" not in page.tags and page.tags.count("script") == 1
    script = re.search("<script>(.*)</script>", text, re.S)[1]
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{checksum}';" in text
    assert not {name for name, _ in page.attributes} & {"a", "onload", "onerror"}
    assert page.text.count("alert(1)") >= 6
    assert "taken for" in page.text and "top-1 70.00 % of 10. The log has 50.00 %" in page.text


def test_a_page_without_weights_gives_the_reason_and_a_running_run_has_one(place, capsys):
    source = make_run(place / "run", training__epochs=9)
    (source / "steps.jsonl").write_text('{"first_step": 0, "losses": [3.0, 2.0, 1.0]}\n')
    out = place / "a.html"
    assert call("page", str(source), f"--out={out}") == 0
    assert "weights.safetensors is not in the folder of the run" in capsys.readouterr().out
    page = Reader(out.read_text())
    assert "Not finished: it has finished 3 of 9 epochs." in page.text
    assert "Bound by data: 25 % of training time" in page.text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--val=nowhere.beton"], "--val=nowhere.beton does not exist"),
        (["--weights=nowhere.pt"], "--weights=nowhere.pt does not exist"),
        (["--out=page.png"], "does not end in .html"),
    ],
)
def test_a_page_of_files_that_are_not_there_is_refused(place, words, sentence, capsys):
    source = make_run(place / "run")
    assert call("page", str(source), *words) == 1
    assert sentence in capsys.readouterr().err
    assert not (source / "page.html").exists()
