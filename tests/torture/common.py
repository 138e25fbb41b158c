"""What the parts share: command lines, processes watched to their end, real pictures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 240  # seconds after which a command counts as hanging


_STARTED: list[subprocess.Popen] = []


def start(script: str, *flags: str) -> subprocess.Popen:
    """A script of the repository in a session of its own, one thread, its messages in a pipe."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "omp"},
        # below a background shell, Ctrl-C would be ignored by inheritance
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    _STARTED.append(process)
    return process


def kill_what_runs() -> None:
    """For the end of an interrupted torture: nothing that it has started goes on."""
    for process in _STARTED:
        if process.poll() is None:
            kill_session(process)


def end(process: subprocess.Popen) -> str:
    """Wait for the end of a process and return what it said.

    Raises:
        TimeoutError: it hangs; it is killed with all its children.
    """
    try:
        return process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        kill_session(process)
        raise TimeoutError(f"{process.args} did not end within {PATIENCE} s") from None


def kill_session(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def succeed(script: str, *flags: str) -> float:
    """Run a script that must succeed; returns its seconds.

    Raises:
        RuntimeError: it did not, with what it said.
    """
    begin = time.monotonic()
    process = start(script, *flags)
    said = end(process)
    if process.returncode:
        raise RuntimeError(f"{script} {' '.join(flags)} ended with {process.returncode}: {said}")
    return time.monotonic() - begin


def source_flags(photos: Path | None) -> list[str]:
    """Photographs of Imagenette where there are any, else drawn pictures."""
    if photos is None:
        return ["--source.kind=synthetic"]
    return ["--source.kind=image_folder", f"--source.path={photos / 'imagenette'}"]
