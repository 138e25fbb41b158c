"""One run at a time in a folder."""

import subprocess
import sys

import pytest

from fast_imagenet.engine.run_lock import lock_folder
from tests.conftest import ROOT


def test_a_folder_has_one_run_at_a_time(tmp_path, quick_run):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, fast_imagenet.engine.run_lock as g\n"
         f"with g.lock_folder({str(tmp_path / 'run')!r}): print(flush=True); sys.stdin.read()"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    with pytest.raises(ValueError, match="run is in use by another process; wait for it"):
        quick_run(folder=tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    holder.kill()  # a killed run keeps nobody out
    holder.communicate()
    with lock_folder(tmp_path / "run"):
        pass
