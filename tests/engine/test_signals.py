"""Signals before, during and after a run."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fast_imagenet.engine.signals import SignalWatch
from fast_imagenet.program import STOPPED
from tests.agents import free_port
from tests.conftest import ROOT


def test_a_signal_is_answered_when_nobody_reads_the_errors():
    program = """
import signal, time
from fast_imagenet.engine.signals import stop_at_once
from fast_imagenet.terminal import ignore_broken_pipe
stop_at_once()
ignore_broken_pipe()
signal.raise_signal(signal.SIGTERM)
time.sleep(60)
"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=write, timeout=50)
    os.close(write)
    assert done.returncode == STOPPED


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_before_the_run_began_asks_to_start_again(name):
    code = f"""
import signal, time
from fast_imagenet.engine.signals import SignalWatch, stop_at_once
stop_at_once()
signal.raise_signal(signal.{name})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (STOPPED, "")
    assert done.stderr == (
        f"stopped by {name} before the run began; start the same command again\n"
    )


@pytest.mark.parametrize("error", ["", "raise ValueError('of the test')"])
def test_a_signal_after_the_run_reports_no_stop(error):
    """On the way out, as what was opened is closed: the failure keeps its status and message."""
    code = f"""
import signal, time
from fast_imagenet.engine.signals import SignalWatch, stop_at_once
stop_at_once()
try:
    with SignalWatch() as signals:
        signal.raise_signal(signal.SIGTERM)
        print(signals.received)
        {error}
finally:
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        signal.raise_signal(signal.Signals[name])
    time.sleep(1)  # for the thread that is notified of signals
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (int(bool(error)), "SIGTERM\n")
    assert "before the run began" not in done.stderr
    assert ("ValueError: of the test" in done.stderr) == bool(error)


@pytest.mark.slow
@pytest.mark.parametrize(("error", "status"), [("ValueError('of the test')", 1), ("Stopped()", 75)])
def test_a_failed_program_ends_whatever_hangs_on_its_way_out(error, status):
    code = f"""
import atexit, time
from fast_imagenet.engine import signals
signals.CLOSE_SECONDS = 2
atexit.register(time.sleep, 100)
signals.stop_at_once()
with signals.SignalWatch():
    raise {error.replace("Stopped", "signals.Stopped")}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status
    assert f"ended by force 2 s after: {error}" in done.stderr


@pytest.mark.slow
def test_a_rank_that_waits_for_the_others_obeys_a_signal():
    """The wait is inside torch, where Python's handlers do not run."""
    code = """
from fast_imagenet.engine.signals import stop_at_once
stop_at_once()
from fast_imagenet.engine.distributed import init_distributed
print("waits", flush=True)
init_distributed()
"""
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | place | {"MASTER_PORT": str(free_port())},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "waits\n"
        time.sleep(2)  # until it does
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode == STOPPED
    assert "stopped by SIGTERM before the run began" in said


def test_a_second_interrupt_ends_at_once():
    with SignalWatch() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_watch_in_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: SignalWatch().__enter__().__exit__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
