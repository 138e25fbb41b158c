"""Set-up: the lists of packages agree, imports are pinned, scripts say what is wrong."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.doctor import judge_pair, read_pins

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = read_pins((ROOT / "requirements.txt").read_text())
EXTRAS = PROJECT["optional-dependencies"]
BOUNDS = {
    canonicalize_name(bound.name): bound
    for group in (PROJECT["dependencies"], *EXTRAS.values())
    for bound in map(Requirement, group)
    if bound.name != PROJECT["name"]  # an extra that includes others
}
# imported only when asked for, or by a peer of benchmarks/requirements.txt
OPTIONAL = {
    "wandb",
    "albumentations",
    "kornia_rs",
    "nvidia",
    "simplejpeg",
    "tensorflow",
    "torchcodec",
}
# Installed by another package: llvmlite by numba, packaging by pytest
COMES_ALONG = {"llvmlite", "packaging"}
# Rooms that a program of stock FFCV uses: docs/operations.md
BASE_ROOMS = (
    "ops",
    "beton",
    "native",
    "data/ffcv_loader",
    "data/augmentation",
    "rng",
    "sources/base",
)
# Where the packages of an extra may be imported besides the scripts, tools and tests
EXTRA_ROOMS = {
    "parquet": ("sources/parquet",),
    "logging": ("engine/logger",),
    "wandb": ("engine/logger",),
}


def tracked_files() -> list[Path]:
    """Files of the repository, those not yet committed included, ignored ones not."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


# ------------------------------------------------------------------------------------------------
# Packages
# ------------------------------------------------------------------------------------------------


def test_every_line_of_requirements_is_an_exact_pin():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    assert lines == [f"{name}=={version}" for name, version in PINS.items()]
    assert len({canonicalize_name(name) for name in PINS}) == len(lines)


def test_conda_installs_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == [f"{name}=={version}" for name, version in PINS.items()]
    assert {"python=3.11", "pip", "cxx-compiler", "pkg-config"} <= set(conda)


def test_lower_bounds_name_the_same_packages_and_admit_the_pins():
    assert sorted(BOUNDS.keys() - OPTIONAL) == sorted(canonicalize_name(name) for name in PINS)
    for name, version in PINS.items():
        bound = BOUNDS[canonicalize_name(name)]
        assert [part.operator for part in bound.specifier] == [">="], f"{bound} is no lower bound"
        assert version in bound.specifier


def test_torch_and_torchvision_are_pairs():
    assert judge_pair(PINS["torch"], PINS["torchvision"]).state == "ok"
    lowest = [next(iter(BOUNDS[name].specifier)).version for name in ("torch", "torchvision")]
    assert lowest == ["2.11", "0.26"]
    assert judge_pair(*lowest).state == "ok"
    assert PROJECT["requires-python"] == ">=3.11"


@pytest.mark.skipif(
    VENV.is_symlink() or Path(sys.prefix) != VENV, reason="only .venv holds the pins"
)
def test_what_is_installed_is_what_is_pinned():
    installed = {name: metadata.version(name).partition("+")[0] for name in PINS}
    assert installed == PINS


def test_everything_that_is_imported_is_pinned():
    provides = metadata.packages_distributions()
    pinned = {canonicalize_name(name) for name in PINS}
    allowed = pinned | COMES_ALONG
    own = {"fast_imagenet", "tools", "tests", "benchmarks", "scripts"}
    own.add("own_posterize")  # tests/ops/test_own_operation.py writes it
    own |= {path.stem for path in ROOT.glob("*.py")} | {p.stem for p in ROOT.glob("*/*.py")}
    unknown = {}
    for path in tracked_files():
        for name in imported_names(path) - own - set(sys.stdlib_module_names):
            packages = {canonicalize_name(package) for package in provides.get(name, [name])}
            if name not in OPTIONAL and not packages & allowed:
                unknown.setdefault(name, path.relative_to(ROOT).as_posix())
    assert unknown == {}


def extra_of(package: str) -> str:
    """The first extra that lists a package itself, or '' for a package of the base."""
    for extra, lines in EXTRAS.items():
        if package in {canonicalize_name(Requirement(line).name) for line in lines}:
            return extra
    return ""


def test_the_operations_need_no_extra():
    """Someone who installs the wheel for the operations installs neither timm nor pyarrow."""
    provides = metadata.packages_distributions()
    found = {}
    for path in sorted((ROOT / "fast_imagenet").rglob("*.py")):
        room = path.relative_to(ROOT / "fast_imagenet").as_posix().removesuffix(".py")
        for name in imported_names(path) - set(sys.stdlib_module_names) - {"fast_imagenet"}:
            packages = {canonicalize_name(package) for package in provides.get(name, [name])}
            for extra in {extra_of(package) for package in packages} - {""}:
                found.setdefault(extra, set()).add(room)
    base = {room for rooms in found.values() for room in rooms if room.startswith(BASE_ROOMS)}
    assert base == set()
    assert found.keys() <= {"train", *EXTRA_ROOMS}
    for extra, rooms in EXTRA_ROOMS.items():
        assert found.get(extra, set()) <= set(rooms)


def imported_names(path: Path) -> set[str]:
    """First parts of the modules that a Python file imports, anywhere in it."""
    if path.suffix != ".py":
        return set()
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ffcv.loader,cv2,torch", "cv2,torch,ffcv.loader"])
def test_two_opencvs_live_in_one_process(order):
    """FFCV's library links the system's OpenCV, its Python code imports another one."""
    code = f"""
import importlib
for name in {order!r}.split(","):
    importlib.import_module(name)
import cv2, numpy as np
from ffcv.libffcv import imdecode, resize_crop
image = np.full((32, 48, 3), (200, 100, 50), np.uint8)
jpeg = cv2.imencode(".jpg", image[:, :, ::-1])[1].reshape(-1)
out, small = np.zeros_like(image), np.zeros((16, 16, 3), np.uint8)
imdecode(jpeg, out, 32, 48, 32, 48)
resize_crop(out, 0, 32, 0, 32, small)
assert np.abs(small.astype(int) - (200, 100, 50)).max() <= 3
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_ffcv_links_only_what_it_uses():
    (library,) = [file for file in metadata.files("ffcv") if file.name.startswith("_libffcv")]
    linked = set(re.findall(rb"libopencv_(\w+)\.so", library.locate().read_bytes()))
    assert linked == {b"core", b"imgproc"}


# ------------------------------------------------------------------------------------------------
# Scripts
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def bare_clone(tmp_path):
    """bare_clone(**stubs): set-up in a copy, with commands replaced by one-line scripts."""

    def run(**stubs: str) -> subprocess.CompletedProcess:
        (tmp_path / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
        shutil.copy(ROOT / "requirements.txt", tmp_path)
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, line in stubs.items():
            stub = tmp_path / "bin" / name.replace("_", "-")
            stub.write_text(f"#!/bin/sh\n{line}\n")
            stub.chmod(0o755)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "scripts/setup.sh"],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "PYTHON": str(tmp_path / "bin/py")},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_setup_wants_python_311(bare_clone):
    done = bare_clone(py="exit 1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "is not Python 3.11 or later; choose one: make setup PYTHON=" in done.stderr


def test_setup_without_rights_says_in_one_line_what_to_run(bare_clone):
    done = bare_clone(
        py=f'exec {sys.executable} "$@"', id="echo 1000", sudo="exit 1", pkg_config="exit 1"
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "run first: sudo apt-get install -y libopencv-dev libturbojpeg0-dev" in done.stderr


VENV_PYTHON = """#!/bin/sh
case "$*" in
    --version) echo Python 3.11.9;;
    *freeze*) grep ^ffcv== requirements.txt;;
    *"--editable ."*) touch built;;
    *"import fast_imagenet.native"*) test -f built;;
esac
"""


def test_setup_compiles_the_library_when_it_is_missing_or_its_flags_changed(
    bare_clone, tmp_path, monkeypatch
):
    """With a .venv whose Python only notes that this repository was installed."""
    interpreter = tmp_path / ".venv/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(VENV_PYTHON)
    interpreter.chmod(0o755)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)

    def compiles():
        done = bare_clone(py='case "$*" in --version) echo Python 3.11.9;; esac', pkg_config="")
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.endswith("setup: ready\n")

    assert compiles() and not compiles()
    (tmp_path / "built").unlink()  # as after `git clean -x`, or with a changed C file
    assert compiles() and not compiles()
    (tmp_path / "setup.py").write_text("")
    assert compiles() and not compiles()
    monkeypatch.setenv("FAST_IMAGENET_PATHS", "plain")
    assert compiles() and not compiles()


def test_setup_shows_why_apt_failed(bare_clone):
    done = bare_clone(
        py=f'exec {sys.executable} "$@"',
        id="echo 0",
        pkg_config="exit 1",
        apt_get='echo "E: no such mirror"; exit 100',
    )
    assert done.returncode == 1
    assert done.stdout == "setup: installing with apt: libopencv-dev libturbojpeg0-dev\n"
    assert "E: no such mirror" in done.stderr
    assert "setup: failed, for the reason above: apt-get update" in done.stderr


@pytest.mark.skipif(
    VENV.is_symlink() or not (VENV / "setup.state").exists(), reason="`make setup` was not run here"
)
def test_setup_does_nothing_the_second_time():
    command = ["make", "--no-print-directory", "setup"]  # a make below `make test` names its folder
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("setup", "bash scripts/setup.sh"),
        ("demo", "python train_imagenet.py --config demo.yaml"),
        ("demo", "python write_dataset.py --source.kind=synthetic --write.folder=data/demo"),
        ("test", "python -m pytest -n 2"),
        ("test-fast", 'python -m pytest -n 2 --dist loadfile -m "not slow"'),
        ("lint", "ruff check ."),
        ("lint", "ruff format --check ."),
        ("lint", "python -m mypy"),
        ("lint", "clang-format --dry-run --Werror"),
        ("doctor", "python -m tools.doctor"),
        ("clean", "rm -rf .venv"),
    ],
)
def test_make_targets(target, command):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert command in done.stdout


def test_make_alone_lists_every_target():
    command = ["make", "--no-print-directory"]  # this test may itself be run by make
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines()] == targets
    assert re.findall(r"^([a-z-]+):.*  ## ", makefile, re.M) == targets


def test_both_cis_call_the_same_commands():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    public = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run", "") for step in public["jobs"]["test"]["steps"]]
    commands = [step for step in steps if step.startswith("make")]
    assert commands == ["make setup", "make lint", "make test"]
    assert re.findall(r"^make .*", script.read_text(), re.M) == commands[1:]


# ------------------------------------------------------------------------------------------------
# The repository
# ------------------------------------------------------------------------------------------------


def test_no_file_names_a_place_of_one_machine():
    # brackets, so that the pattern does not find itself
    place = re.compile(rb"/wor[k]/(main|shared)|/roo[t]/|pyp[i]\.org|pythonhoste[d]\.org")
    found = {}
    for path in tracked_files():
        if match := place.search(path.read_bytes()):
            found[path.relative_to(ROOT).as_posix()] = match[0]
    assert found == {}


def test_licence_is_the_one_stated():
    assert PROJECT["license"] == "MIT"
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n\nCopyright (c) 2026 the fast-imagenet authors\n")


def test_photographs_and_data_files_are_ignored():
    names = ["data/train.beton", "x.beton", ".venv/bin/python", "runs/a/log.jsonl"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout.split() == names
    assert not [path for path in tracked_files() if path.suffix in (".beton", ".JPEG", ".jpg")]


@pytest.mark.parametrize("script", ["train_imagenet.py", "write_dataset.py"])
def test_a_python_without_the_packages_is_told_where_they_are(script):
    command = [sys.executable, "-S", script, "--help"]  # -S: without site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"for {sys.executable}: `make setup`" in done.stderr
    assert f".venv/bin/python {script}" in done.stderr
