"""What the parts share: command lines, processes watched to their end, real images."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.torture.warm import ONE_THREAD, ROOT, Trainer

PATIENCE = 240  # seconds after which a command counts as hanging


_STARTED: list = []


def start(script: str, *flags: str) -> subprocess.Popen:
    """A script of the repository in a session of its own, one thread, its messages in a pipe."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | ONE_THREAD,
        # below a background shell, Ctrl-C would be ignored by inheritance
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    _STARTED.append(process)
    return process


def start_trainer(*flags: str, cold: bool = False):
    """train_imagenet.py with these flags: forked, or, cold, as a user starts it."""
    if cold:
        return start("train_imagenet.py", *flags)
    _STARTED.append(Trainer(*flags))
    return _STARTED[-1]


def kill_what_runs() -> None:
    """For the end of an interrupted torture: nothing that it has started goes on."""
    for process in _STARTED:
        if process.poll() is None:
            kill_session(process)


def end(process) -> str:
    """Wait for the end of a process and return what it said.

    Raises:
        TimeoutError: it hangs; it is killed with all its children.
    """
    try:
        return process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        kill_session(process)
        raise TimeoutError(f"{process.args} did not end within {PATIENCE} s") from None


def kill_session(process) -> None:
    """Kill a process of `start` or `start_trainer` with all its children."""
    with contextlib.suppress(ProcessLookupError):  # it had just ended
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def succeed(script: str, *flags: str) -> float:
    """Run a script that must succeed; returns its seconds.

    Raises:
        RuntimeError: it did not, with what it said.
    """
    return _finish(script, flags, time.monotonic(), start(script, *flags))


def train(*flags: str, cold: bool = False) -> float:
    """As `succeed`, for `start_trainer`."""
    begin = time.monotonic()
    return _finish("train_imagenet.py", flags, begin, start_trainer(*flags, cold=cold))


def _finish(script: str, flags: tuple, begin: float, process) -> float:
    said = end(process)
    if process.returncode:
        raise RuntimeError(f"{script} {' '.join(flags)} ended with {process.returncode}: {said}")
    return time.monotonic() - begin


def source_flags(photos: Path | None) -> list[str]:
    """Photographs of Imagenette where there are any, else synthetic images."""
    if photos is None:
        return ["--source.kind=synthetic"]
    return ["--source.kind=image_folder", f"--source.path={photos / 'imagenette'}"]
