"""A study: its plan is read strictly, and carried out run by run into records."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.conftest import ROOT, SMOKE
from tests.tools.test_report import make_run
from tools import study as script
from tools.report.records import read_entry
from tools.report.yaml_files import RecordError, read_study

PLAN = {
    "title": "What each is worth",
    "config": [str(SMOKE)],
    "settings": {
        "model.arch": "resnet18",
        "training.epochs": 3,
        "training.max_steps": 0,
        "validation.lr_tta": True,
    },
    "seeds": [0, 1],
    "write": [{"source.kind": "synthetic", "source.split": "train", "write.limit": 80}],
    "groups": [
        {"name": "recipe", "label": "the recipe"},
        {"name": "high", "label": "four times the rate", "settings": {"lr.lr": 0.5}},
    ],
}


def write_plan(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(PLAN | changes))))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"titel": "x"}, "titel is unknown"),
        ({"seeds": 3}, "seeds is unknown or of another kind"),
        ({"groups": [{"name": "a"}]}, "label is missing"),
        ({"groups": []}, "at least one"),
        ({"groups": [{"name": "a", "label": "x"}] * 2}, "different names"),
        ({"groups": ["a"]}, "'a' is not a mapping"),
        ({"groups": [{"name": "../a", "label": "x"}]}, "becomes a folder"),
        ({"seeds": [0, 0]}, "has one twice"),
        ({"seeds": []}, "at least one"),
        ({"seeds": ["a"]}, "whole numbers"),
        ({"write": [3]}, "list of mappings"),
        ({"settings": {"training.seed": 5}}, "training.seed is set by the study itself"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path, changes, words):
    with pytest.raises(RecordError, match=words):
        read_study(write_plan(tmp_path, **changes) / "study.yaml")


def test_a_plan_without_a_part_is_refused(tmp_path):
    plan = {key: value for key, value in PLAN.items() if key != "seeds"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(RecordError, match="seeds is missing"):
        read_study(tmp_path / "study.yaml")
    (tmp_path / "study.yaml").write_text("title: [")
    with pytest.raises(ValueError, match="cannot be read"):
        read_study(tmp_path / "study.yaml")
    assert read_study(tmp_path / "none.yaml") is None


def test_every_group_gets_the_first_seed_before_any_gets_the_second(tmp_path):
    study = read_study(write_plan(tmp_path / "parts") / "study.yaml")
    jobs = script.jobs_of(study, tmp_path / "parts", tmp_path / "runs", tmp_path / "data")
    order = [("recipe", 0), ("high", 0), ("recipe", 1), ("high", 1)]
    assert [(job.group, job.seed) for job in jobs] == order
    flags = jobs[3].flags
    assert {"--lr.lr=0.5", "--training.seed=1", "--validation.lr_tta=true"} <= set(flags)
    assert f"--data.train_dataset={tmp_path}/data/train.beton" in flags
    assert not any(flag.startswith("--lr.lr") for flag in jobs[0].flags)


def test_a_misspelt_setting_is_reported_before_anything_is_trained(tmp_path, capsys):
    groups = [*PLAN["groups"], {"name": "wrong", "label": "x", "settings": {"lr.rate": 1}}]
    with pytest.raises(SystemExit) as end:
        script.main([str(write_plan(tmp_path / "parts", groups=groups))])
    assert end.value.code == 2 and "lr.rate" in capsys.readouterr().err


def test_groups_stand_in_the_order_of_the_plan(tmp_path):
    folder = write_plan(tmp_path / "parts")
    for group, smoothing in (("high", 0.5), ("recipe", 0.125)):
        make_run(folder / group / "seed0", training__label_smoothing=smoothing)
    assert [group.folder.name for group in read_entry(folder).groups] == ["recipe", "high"]


def test_wrong_calls(tmp_path, capsys):
    folder = str(write_plan(tmp_path / "parts"))
    for words, message in (
        (["--lr.lr=1"], "only --training.checkpoint_minutes="),
        (["--lanes=0"], "--lanes=0 must be 1 or more"),
        (["--lanes=2", "--timed"], "--timed with --lanes=2"),
    ):
        with pytest.raises(SystemExit):
            script.main([folder, *words])
        assert message in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "study.yaml").write_text("title: x\n")
    for name, message in (
        ("none", "none is not a folder: give one that holds a study.yaml"),
        ("empty", "empty holds no study.yaml: write the plan of the study into it"),
        ("words", "study.yaml is not a plan: it needs groups"),
    ):
        assert script.main([str(tmp_path / name)]) == 2 and message in capsys.readouterr().err


# of make_run, as the smoke config plans
SIZES = ("resolution__min_res", "resolution__max_res")
SIZES += ("validation__resolution", "validation__plain_resolution")
SAME = dict.fromkeys(SIZES, 32) | {"resolution__end_ramp": 0}


def one_group(folder, **changes):
    return write_plan(folder, seeds=[0], groups=PLAN["groups"][:1], **changes)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"training__label_smoothing": 0.5}, "training.label_smoothing=0.5, planned 0.1"),
        ({"validation__lr_tta": False}, "validation.lr_tta=False, planned True"),
        ({"seed": 1}, "training.seed=1, planned 0"),
    ],
)
def test_a_record_of_other_settings_is_refused(tmp_path, capsys, theirs, message):
    folder = one_group(tmp_path / "parts")
    make_run(folder / "recipe" / "seed0", **SAME)
    assert script.main([str(folder), "--list"]) == 0
    assert capsys.readouterr().out.startswith("done ")
    make_run(folder / "recipe" / "seed0", **SAME | theirs)
    assert script.main([str(folder), "--list"]) == 2
    printed = capsys.readouterr().err
    assert (
        f"{folder}/recipe/seed0" in printed
        and message in printed
        and "remove the record" in printed
    )


def test_a_record_of_other_data_is_refused(tmp_path, capsys):
    folder = one_group(tmp_path / "parts")
    make_run(folder / "recipe" / "seed0", **SAME)
    for limit, status in ((80, 0), (40, 2)):
        about = {"write": [PLAN["write"][0] | {"write.limit": limit, "write.workers": 1}]}
        (folder / "recipe" / "group.json").write_text(json.dumps(about))
        assert script.main([str(folder), "--list"]) == status
    assert "write: the data" in capsys.readouterr().err


def test_data_of_other_settings_is_refused(tmp_path, tiny_beton, capsys):
    for changes, message in (
        ({"write.max_side": 64}, "write.max_side=400, planned 64"),
        ({"write.limit": 40}, "write.limit=80, planned 40"),
        ({"source.on_error": "skip"}, "source.on_error=fail, planned skip"),
        ({"source.kind": "imagenette"}, "source.kind=synthetic, planned imagenette"),
    ):
        folder = one_group(tmp_path / "parts", write=[PLAN["write"][0] | changes])
        assert script.main([str(folder), f"--data={tiny_beton}"]) == 2
        printed = capsys.readouterr().err
        assert (
            f"{tiny_beton}/train.beton was written with other settings" in printed
            and message in printed
        )


@pytest.mark.slow
def test_data_that_a_study_wrote_is_compared_whole(tmp_path, capfd):
    data, write = tmp_path / "data", PLAN["write"][0] | {"write.limit": 20}

    def writes(**changes):
        folder = one_group(tmp_path / "parts", write=[write | changes])
        script.write_data(read_study(folder / "study.yaml"), data, "")

    writes()
    first = (data / "train.beton").read_bytes()
    writes(**{"write.workers": 1})  # changes no byte
    assert (data / "train.beton").read_bytes() == first
    for changes in ({"write.limit": 30}, {"source.synthetic_train": 50}, {"write.seed": 1}):
        with pytest.raises(RecordError, match=next(iter(changes))):
            writes(**changes)
    capfd.readouterr()
    (data / "study_data.json").unlink()
    writes()
    assert "cannot compare source.split, source.classes" in capfd.readouterr().out


def command(folder, data, *flags):
    places = [f"--data={data}", f"--runs={folder.parent / 'runs'}", "--lanes=2"]
    return [sys.executable, "-m", "tools.study", str(folder), *places, *flags]


@pytest.mark.slow
def test_a_study_is_carried_out_once(tmp_path, tiny_beton, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of this process
    settings = PLAN["settings"] | {"training.epochs": 1, "lr.lr_peak_epoch": 0.5}
    folder = write_plan(tmp_path / "records/parts", seeds=[0], settings=settings)
    done = subprocess.run(
        command(folder, tiny_beton), cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 runs done" in done.stdout
    recipe, high = read_entry(folder).groups
    assert (recipe.label, high.label) == ("the recipe", "four times the rate")
    assert high.runs[0].setting("lr.lr") == 0.5 and recipe.runs[0].setting("lr.lr") == 0.125
    assert not recipe.timed  # two lanes
    assert recipe.about["write"] == PLAN["write"]
    places = [str(folder), f"--data={tiny_beton}", f"--runs={tmp_path / 'records/runs'}"]
    assert script.main([*places, "--list"]) == 0
    assert (message := capsys.readouterr().out).count("done") == 2 and "missing" not in message
    assert script.main(places) == 0 and "all 2 runs are done already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_study_resumes(tmp_path, tiny_beton):
    settings = PLAN["settings"] | {"training.epochs": 400}
    folder = write_plan(tmp_path / "records/parts", seeds=[0], settings=settings)
    with subprocess.Popen(
        command(folder, tiny_beton), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        logs = [tmp_path / f"records/runs/{group}/seed0/log.jsonl" for group in ("recipe", "high")]
        deadline = time.monotonic() + 150
        while not all(log.exists() for log in logs) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        message = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and message.count("resumes when") == 2, message
    assert not (folder / "recipe").exists()
    for log in logs:
        last = log.parent / "last.pt"
        assert last.exists() and json.loads(log.read_text().splitlines()[-1])["epoch"] < 400
    assert not os.path.exists(folder / "high")


LAUGHS = ["- &a0 [x, x, x, x, x, x, x, x, x]"]
LAUGHS += [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "module"),
    [("study.yaml", "tools.study FOLDER --list"),
     ("reported.yaml", "tools.report --folder FOLDER --check")],
)  # fmt: skip
def test_aliases_cannot_fill_the_memory(tmp_path, name, module):
    """A few hundred bytes that stand for gigabytes are refused, within two gigabytes."""
    laughs = {"study.yaml": "", "reported.yaml": "data: {}\nreadme: []\nblocks:\n"}[name]
    (tmp_path / name).write_text(laughs + "\n".join(LAUGHS))
    words = [word.replace("FOLDER", str(tmp_path)) for word in module.split()]
    limits = f"ulimit -d 2000000; ulimit -t 60; exec {sys.executable} -m {shlex.join(words)}"
    done = subprocess.run(["sh", "-c", limits], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert f"{tmp_path / name} cannot be read" in done.stderr
    assert "alias *a0: aliases are not read" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "title: \xff",
        "title: a\ntitle: b\n",  # the last would win in silence
        "title: a\nsettings: {lr.lr: 1, lr.lr: 2}\n",
        "title: !!int ''",
        "title: !!timestamp x",
        "title: !!python/name:os.system ''",
        "title: 9" + ":59" * 400 + ".5",
        "title: " + "9" * 5000,
        "? {a: b}\n: c",
        "# " + "x" * 100_000,
    ],
)
def test_a_plan_that_cannot_be_read_is_one_sentence(tmp_path, capsys, text):
    (tmp_path / "study.yaml").write_bytes(text.encode("latin-1"))
    assert script.main([str(tmp_path), "--list"]) == 2
    assert f"study: {tmp_path}/study.yaml cannot be read" in capsys.readouterr().err
