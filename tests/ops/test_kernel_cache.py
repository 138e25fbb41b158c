"""Compiled kernels are kept where that is possible and safe, and run where it is not."""

import os
import shutil
import stat
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tools.doctor import KERNEL_PROBE

USE = """
from fast_imagenet.ops.geometry import shift_map  # soon compiled
assert shift_map(1.0, 2.0) == (1.0, 0.0, -1.0, 0.0, 1.0, -2.0)
print("fine")
"""


@pytest.fixture
def start(tmp_path):
    """start(code) -> stderr of a process where neither the package nor the home can be written."""
    package = tmp_path / "there" / "fast_imagenet"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fast_imagenet", package, ignore=skip)
    for folder in (package, package / "ops"):  # where no folder can be made, not even by root
        (folder / "__pycache__").write_text("")
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"HOME": "/proc/none", "TMPDIR": str(tmp_path / "tmp")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "PYTHONPATH"):
        environment.pop(name, None)

    def run(code=USE, printed="fine"):
        command = [sys.executable, "-c", code]
        options = dict(capture_output=True, text=True, timeout=300, env=environment)
        done = subprocess.run(command, cwd=package.parent, **options)
        assert done.returncode == 0 and printed in done.stdout, done.stderr[-2000:]
        return done.stderr

    return run


def folder_of(tmp_path):
    return tmp_path / "tmp" / f"fast_imagenet_kernels_{os.getuid()}"


@pytest.mark.slow
def test_a_private_folder_is_taken_noted_once_and_used_again(start, tmp_path):
    notes = start()
    folder = folder_of(tmp_path)
    assert notes.count("note:") == 1 and f"compiled kernels are kept in {folder}" in notes
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*shift_map*.nbc")}
    assert kept
    start(USE + KERNEL_PROBE, printed=f'"folder": "{folder}')
    assert kept == {path: path.stat().st_mtime_ns for path in folder.rglob("*shift_map*.nbc")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["open to others", "link", "file"])
def test_a_folder_that_is_not_private_is_not_used(start, tmp_path, kind):
    folder, elsewhere = folder_of(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if kind == "open to others":
        folder.mkdir()
        folder.chmod(0o755)
    elif kind == "link":
        folder.symlink_to(elsewhere)
    else:
        folder.write_text("")
    notes = start(USE + KERNEL_PROBE, printed='"folder": null')
    assert notes.count("note:") == 1 and f"{folder}" in notes and "every start compiles" in notes
    assert not list(elsewhere.iterdir()) and not (folder.is_dir() and list(folder.iterdir()))


@pytest.mark.slow
def test_a_damaged_cache_costs_time_only(start, tmp_path):
    start()
    (index,) = folder_of(tmp_path).rglob("*shift_map*.nbi")
    index.write_bytes(b"damaged")
    assert "the cache of compiled kernels failed" in start()
