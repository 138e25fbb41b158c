"""The limit on the wait for a batch."""

import re
import signal
import subprocess
import sys
import time

import pytest

from fast_imagenet.engine.watchdog import Watchdog
from fast_imagenet.program import STALLED
from tests.conftest import ROOT, SMOKE


@pytest.mark.slow
def test_a_stalled_loader_ends_the_process_with_its_stacks():
    code = """
import time
from fast_imagenet.engine.watchdog import Watchdog
def batches():
    yield 1
    time.sleep(60)
with Watchdog(0.4) as watchdog:
    for batch in watchdog.watch(batches()):
        print("batch", batch, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == STALLED and done.stdout == "batch 1\n"
    assert "no batch came for 0.4 s" in done.stderr and "--data.timeout" in done.stderr
    assert re.search(r'File "<string>", line 6 in batches', done.stderr)


@pytest.mark.slow
def test_time_in_which_the_process_is_stopped_is_no_stall():
    code = """
import time
from fast_imagenet.engine.watchdog import Watchdog
def batches():
    print("waits", flush=True)
    for _ in range(10):
        time.sleep(0.15)
    yield 1
with Watchdog(3) as watchdog:
    print(list(watchdog.watch(batches())))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "[1]\n"), errors


@pytest.mark.slow
def test_a_run_without_batches_ends_with_its_stacks(tiny_beton, tmp_path):
    """The whole command, its loader stuck in a call that nothing can end."""
    code = f"""
import time, train_imagenet
from fast_imagenet.data import ffcv_loader as loader
def stuck(samples): time.sleep(100)
make = loader.TrainLoader.__init__
def make_stuck(self, *args, **options):
    make(self, *args, **options)
    self._operations[0].before_batch = stuck
loader.TrainLoader.__init__ = make_stuck
train_imagenet.main(train_imagenet.read_settings([
    "--config={SMOKE}", "--model.arch=timm/test_resnet", "--data.timeout=1.5",
    "--training.use_blurpool=false", "--logging.folder={tmp_path}/run",
    "--data.train_dataset={tiny_beton}/train.beton", "--data.val_dataset={tiny_beton}/val.beton",
]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == STALLED, done.stderr
    assert "no batch came for 1.5 s" in done.stderr
    assert ", line 4 in stuck" in done.stderr and "in train_epoch" in done.stderr  # both threads


def test_slow_steps_are_no_stall():
    with Watchdog(0.2) as watchdog:
        for _ in watchdog.watch(iter([1, 2])):
            time.sleep(0.5)
