"""A terminal that is not UTF-8 ends no program: what it cannot show is written as its code."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.tools.test_report import make_run

pytestmark = pytest.mark.slow

# variables, and a name for folders; a locale whose file names are ASCII refuses other paths
ENVIRONMENTS = [
    ({"PYTHONIOENCODING": "ascii"}, "läufe_ü"),
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "runs"),
]


def call(environment, *words):
    """(stdout, stderr) of a program that must end well."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode("ascii"), done.stderr.decode("ascii")


def flags_of(folder):
    return [f"--data.{split}_dataset={folder / f'{split}.beton'}" for split in ("train", "val")]


@pytest.mark.parametrize(("environment", "name"), ENVIRONMENTS)
def test_a_run_and_its_page(tiny_beton, tmp_path, environment, name):
    small = ["--config=tests/smoke.yaml", "--model.arch=timm/test_resnet", "--lr.lr_peak_epoch=0"]
    small += ["--training.epochs=1", "--logging.progress=true"]
    folder = shutil.copytree(tiny_beton, tmp_path / name / "data")
    run = tmp_path / name / "run"
    out, err = call(
        environment, "train_imagenet.py", *small, *flags_of(folder), f"--logging.folder={run}"
    )
    assert "top-1" in out and "images of 10 classes" in out and "importing PyTorch" in err
    words = ["-m", "tools.report", "page", run, f"--val={folder / 'val.beton'}"]
    assert "page.html" in call(environment, *words)[0]


@pytest.mark.parametrize(("environment", "name"), ENVIRONMENTS)
def test_data_is_written_checked_and_shown(tiny_beton, tmp_path, environment, name):
    out = tmp_path / name
    write = ["--source.kind=synthetic", "--source.split=val", "--write.limit=20"]
    assert "20 images" in call(environment, "write_dataset.py", *write, f"--write.folder={out}")[0]
    found = call(environment, "-m", "fast_imagenet.beton", "verify", out / "val.beton")[0]
    assert "no fault found" in found
    words = ["--config=tests/smoke.yaml", f"--out={out / 'a.png'}", *flags_of(tiny_beton)]
    assert "px" in call(environment, "-m", "tools.preview", *words)[0]


@pytest.mark.parametrize(("environment", "name"), ENVIRONMENTS)
def test_records_and_the_doctor(tmp_path, environment, name):
    run = make_run(tmp_path / name)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "reported.yaml").write_bytes(
        (ROOT / "records" / "reported.yaml").read_bytes()
    )
    place = ["--folder", tmp_path / "records", "--label", "better"]
    add = call(environment, "-m", "tools.report", "add", run, *place)[0]
    assert "added" in add
    code = "from fast_imagenet.program import run_program; from tools import doctor as d;"
    code += (
        "d.CHECKS = {'': lambda: [d.Finding('disk', 'ok', '1 GB in /gr\\xf6\\xdfe')]};"
        "run_program('doctor', lambda: d.main([]))"
    )
    assert "1 GB in /gr\\xf6\\xdfe" in call(environment, "-c", code)[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("words", [["-m", "fast_imagenet.beton", "verify"], ["train_imagenet.py"]])
def test_output_into_a_file_on_a_full_disk_ends_no_program(tiny_beton, tmp_path, words):
    small = ["--config=tests/smoke.yaml", "--model.arch=timm/test_resnet", "--lr.lr_peak_epoch=0"]
    small += ["--training.epochs=1", *flags_of(tiny_beton), f"--logging.folder={tmp_path / 'run'}"]
    words = words + (small if "train_imagenet.py" in words else [tiny_beton / "val.beton"])
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    lines = [line for line in done.stderr.splitlines() if "importing PyTorch" not in line]
    assert (done.returncode, len(lines)) == (0, 1), done.stderr
    assert "the output is incomplete: No space left on device" in done.stderr
    assert "train_imagenet.py" not in words or (tmp_path / "run" / "weights.safetensors").exists()
