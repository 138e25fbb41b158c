"""The parts of `make torture`, with a few cases each; the full numbers are in records/torture/."""

import json
import subprocess
import sys
import tempfile

import pytest

from tests.conftest import ROOT
from tests.torture import __main__ as torture
from tests.torture import files, images, training, writer

pytestmark = pytest.mark.slow


def test_cut_and_flipped_files_are_refused():
    found = files.damages(24, None, images=20)
    assert found["refused"] == found["damages"] == 24 and not found["missed"]


def test_fuzzed_tables_crash_neither_check_nor_loader_nor_trainer():
    found = files.fuzzed_tables(40, 1, None)
    assert found["files"] == 40 and found["refused"] >= 20
    assert not found["crashes_and_hangs"] and not found["trainer_crashed"]


def test_damaged_images_are_refused_or_decoded_as_libturbojpeg_does(monkeypatch):
    monkeypatch.setattr(images.fuzz, "paths", lambda: {"plain": []})  # all: tests/native
    found = images.damaged(200)
    assert torture.PARTS["damaged_images"][1](found), found
    assert found["files"] > 200 and found["sound"] > 20 and found["ours"] > 20
    assert not torture.PARTS["damaged_images"][1](found | {"accepted": 1})


def test_a_crash_of_the_watched_process_is_counted(tmp_path):
    code = "import os; print('{}', flush=True); os.abort()"
    lines, why = files._watch([sys.executable, "-c", code])
    assert lines == [{}] and why.startswith("status -6")


def test_a_killed_writer_leaves_nothing():
    found = writer.writer_kills(3, None, images=60)
    assert torture.PARTS["writer_kills"][1](found), found
    assert [run["victim"] for run in found["runs"]] == list(writer.VICTIMS)


def test_errors_of_the_loader_surface():
    pytest.importorskip("fast_imagenet.data.ffcv_loader")
    found = training.loader_errors(2)
    assert found["surfaced_within_2_s"] == found["with_its_traceback"] == 2


def test_a_broken_promise_ends_with_1_and_is_in_the_result(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(
        torture.PARTS, "damages", (lambda *_: {"refused": 3, "damages": 4}, lambda r: False)
    )
    result = tmp_path / "result.json"
    assert torture.main(["--only", "damages", f"--json={result}"]) == 1
    assert json.loads(result.read_text())["damages"]["held"] is False
    assert "damages: BROKEN" in capsys.readouterr().out


def test_two_runs_that_differ_are_seen(tmp_path, quick_run):
    first, second = (
        quick_run(f"--training.seed={seed}", folder=tmp_path / str(seed)) for seed in (1, 2)
    )
    assert training.differences(first, first) == []
    assert {"model", "losses", "weights.safetensors"} <= set(training.differences(first, second))


def test_a_record_names_no_folder_of_the_machine(tmp_path):
    text = f"{ROOT}/train_imagenet.py --config=x {tempfile.gettempdir()}/tmpab12_c/out/train.beton"
    assert torture.without_paths(text) == "train_imagenet.py --config=x out/train.beton"


def test_make_torture_runs_the_module():
    done = subprocess.run(
        ["make", "-n", "torture"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "-m tests.torture" in done.stdout
