"""`make doctor`: its verdicts on made-up numbers; that it runs where nothing is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools import doctor
from tools.doctor import Finding

REPOSITORY = Path(__file__).resolve().parents[2]
GB = 10**9


@pytest.mark.parametrize(
    ("torch", "vision", "state"),
    [
        ("2.14.1+cu130", "0.29.2+cu132", "ok"),
        ("2.11.0", "0.26.0", "ok"),
        ("2.14.1", "0.28.0", "warning"),
        ("2.10.0", "0.25.0", "missing"),
        ("3.0.0", "1.0.0", "ok"),
    ],
)
def test_torch_pair(torch, vision, state):
    finding = doctor.judge_pair(torch, vision)
    assert finding.state == state
    assert (finding.fix != "") == (state != "ok")


@pytest.mark.parametrize(
    ("affinity", "total", "quota", "state", "word"),
    [
        (8, 8, None, "ok", "8 usable of 8"),
        (8, 64, 8.0, "ok", "8 usable of 64"),
        (8, 8, 2.5, "warning", "--data.num_workers=2"),
        (8, 8, 0.5, "warning", "--data.num_workers=1"),
        (2, 8, None, "warning", "2 usable of 8"),
    ],
)
def test_cores(affinity, total, quota, state, word):
    finding = doctor.judge_cores(affinity, total, quota)
    assert finding.state == state
    assert word in finding.found + finding.fix


@pytest.mark.parametrize(
    ("total", "limit", "file_bytes", "state", "word"),
    [
        (32 * GB, None, 0, "ok", "32.0 GB"),
        (32 * GB, None, 27 * GB, "ok", "32.0 GB"),
        (32 * GB, None, 29 * GB, "warning", "--data.in_memory=false"),
        (64 * GB, 16 * GB, 0, "ok", "16.0 GB of 64.0"),
        (64 * GB, 4 * GB, 0, "warning", "4.0 GB of 64.0"),
    ],
)
def test_memory(total, limit, file_bytes, state, word):
    finding = doctor.judge_memory(total, limit, file_bytes)
    assert finding.state == state
    assert word in finding.found + finding.fix


@pytest.mark.parametrize(
    ("finding", "state"),
    [
        (doctor.judge_disk(51 * GB, ROOT), "ok"),
        (doctor.judge_disk(49 * GB, ROOT), "warning"),
        (doctor.judge_shared_memory(8 * GB), "ok"),
        (doctor.judge_shared_memory(64 * 2**20), "warning"),
        (doctor.judge_numba({"layer": "omp", "threads": 8}), "ok"),
        (doctor.judge_numba({"layer": "workqueue", "threads": 8}), "warning"),
        (doctor.judge_numba({"error": "boom"}), "missing"),
        (doctor.judge_ffcv({"modules": ["core", "imgproc"], "cv2": "5"}), "ok"),
        (doctor.judge_ffcv({"modules": list("abcdefghijkl"), "cv2": "5"}), "warning"),
        (doctor.judge_ffcv({"error": "boom"}), "missing"),
        (doctor.judge_library({"path": "avx2", "built": ["avx2"], "best": "avx2"}), "ok"),
        (doctor.judge_library({"path": "plain", "built": ["plain"], "best": "avx2"}), "warning"),
        (doctor.judge_library({"error": "boom"}), "missing"),
    ],
)
def test_thresholds(finding, state):
    assert finding.state == state
    assert finding.found
    assert (finding.fix != "") == (state != "ok")


def test_a_wrong_path_of_the_library_is_no_matter_of_set_up(monkeypatch):
    monkeypatch.setenv("FAST_IMAGENET_NATIVE", "wrong")
    assert doctor.judge_library({"error": "boom"}).fix == "unset FAST_IMAGENET_NATIVE"
    monkeypatch.delenv("FAST_IMAGENET_NATIVE")
    assert doctor.judge_library({"error": "boom"}).fix == "run `make setup`"


def test_gpus():
    good = {"name": "A", "bytes": 16 * GB, "bf16": True, "works": True}
    rows = [good, {**good, "bf16": False}, {**good, "works": False}]
    assert [f.state for f in doctor.judge_gpus(rows, "13.0", True)] == ["ok", "warning", "warning"]
    assert "A, 16.0 GB, bf16" in next(doctor.judge_gpus([good], "13.0", True)).found
    assert "sees no GPU" in next(doctor.judge_gpus([], "13.0", True)).found
    assert "CPU" in next(doctor.judge_gpus([], None, False)).found


def test_packages_against_pins():
    pins = doctor.read_pins("# a comment\ntorch==2.14.1\nPyYAML==6.0.3\n\n# more\nnot a pin\n")
    assert pins == {"torch": "2.14.1", "PyYAML": "6.0.3"}
    assert doctor.judge_packages(pins, {"torch": "2.14.1+cu130", "PyYAML": "6.0.3"}).state == "ok"
    other = doctor.judge_packages(pins, {"torch": "2.13.0", "PyYAML": "6.0.3"})
    assert (other.state, "torch 2.13.0 (tested: 2.14.1)" in other.found) == ("warning", True)
    assert doctor.judge_packages(pins, {"torch": "2.14.1"}).state == "missing"
    many = doctor.judge_packages({f"p{i}": "1" for i in range(9)}, {})
    assert many.found.endswith("p4 and 4 more")


def test_container_limits(tmp_path):
    assert doctor.cpu_quota(tmp_path) is None
    assert doctor.memory_limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("8000000000\n")
    assert doctor.cpu_quota(tmp_path) == 1.5
    assert doctor.memory_limit(tmp_path) == 8 * GB
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.cpu_quota(tmp_path) is None
    assert doctor.memory_limit(tmp_path) is None


def test_container_limits_of_the_older_kind(tmp_path):
    for name, text in (
        ("cpu/cpu.cfs_quota_us", "200000\n"),
        ("cpu/cpu.cfs_period_us", "100000\n"),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert doctor.cpu_quota(tmp_path) == 2.0
    assert doctor.memory_limit(tmp_path) is None


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import nonsense_xyz", "ModuleNotFoundError: No module named 'nonsense_xyz'"),
        ("import os; os.abort()", "killed by signal 6"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("raise SystemExit(3)", "exit status 3"),
    ],
)
def test_probes_outlive_what_they_try(code, error):
    seconds = 1 if "sleep" in code else 60
    assert error in doctor.probe(code, seconds)["error"]


def test_probe_takes_the_last_line():
    code = 'import os; print("noise"); print(\'{"a": "%s"}\' % os.environ["X"])'
    assert doctor.probe(code, X="1") == {"a": "1"}


def test_a_failing_check_does_not_stop_the_others(monkeypatch, capsys):
    def check_luck():
        raise OSError("bad luck")

    def check_fine():
        yield Finding("fine", "ok", "yes")

    monkeypatch.setattr(doctor, "CHECKS", {"luck": check_luck, "fine": check_fine})
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "warning  luck                the check failed: OSError: bad luck" in out
    assert "ok       fine                yes" in out
    assert out.endswith("doctor: 0 missing, 1 warning\n")


def test_the_summary_counts_every_finding(monkeypatch, capsys):
    found = [Finding("a", "missing", "x", "y"), *[Finding("b", "warning", "x", "y")] * 2]
    monkeypatch.setattr(doctor, "CHECKS", {"all": lambda: found})
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.endswith("doctor: 1 missing, 2 warnings\n")


@pytest.mark.slow
def test_here_everything_required_is_there(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    names = ["Python", "packages", "libturbojpeg", "FFCV", "native library", "torch, torchvision",
             "GPU", "numba threads", "cores", "memory", "disk", "/dev/shm"]  # fmt: skip
    assert [name for name in names if f" {name} " not in out] == []
    assert "the check failed" not in out


def test_it_runs_where_nothing_is_installed(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True
    )
    done = subprocess.run(
        [str(tmp_path / "bare/bin/python"), "-m", "tools.doctor"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)  # what it does
    assert "missing  FFCV                ModuleNotFoundError: No module named 'ffcv'" in done.stdout
    assert "No module named 'torch'" in done.stdout
    assert "fix: run `make setup`" in done.stdout


@pytest.mark.parametrize("place", ["closed", "/dev/full"])
def test_it_needs_nobody_who_reads_its_output(tmp_path, place):
    code = "from fast_imagenet.program import run_program; from tools import doctor as d\n"
    code += "import sys; d.CHECKS = {}; done = open(sys.argv[1], 'w')\n"
    code += "run_program('doctor', lambda: done.write(str(d.main([]))) and 0)"
    out = ">&-" if place == "closed" else f">{place}"
    shell = ["sh", "-c", f'exec "$@" {out}', "sh"]
    command = [*shell, sys.executable, "-c", code, tmp_path / "status"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, (tmp_path / "status").read_text()) == (0, "0"), done.stderr
    assert "Traceback" not in done.stderr
