"""Trainers that start within a second: forked from a process that has the imports behind it.

Each is train_imagenet.py itself, run as the main program in a session of its own. What a fork
leaves out is the seconds in which Python reads torch and numba; some lives of every part are
started as a user does it, so that those seconds are hit, too.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "omp"}
CONTEXT = multiprocessing.get_context("forkserver")


class Trainer:
    """A forked train_imagenet.py with what the parts use of subprocess.Popen.

    Args: flags: of the command. environment: what is added to the environment.
    """

    def __init__(self, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.args = ["train_imagenet.py", *flags]
        handle, name = tempfile.mkstemp(suffix=".stderr")
        os.close(handle)
        self._file, self._text = Path(name), None  # what it says on standard error
        mark, ready = CONTEXT.Pipe(duplex=False)
        arguments = self.args, environment or {}, name, ready
        self._process = CONTEXT.Process(target=_train, args=arguments)
        with _one_thread():
            self._process.start()
        self.pid = self._process.pid
        ready.close()
        with mark:
            mark.recv()  # from here on it answers signals

    @property
    def returncode(self) -> int | None:
        """Exit status; negative = killed by that signal; None = it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As returncode."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait for the end; what it said on standard error.

        Raises: subprocess.TimeoutExpired.
        """
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        if self._text is None:
            self._text = self._file.read_text(errors="replace")
            self._file.unlink()
        return None, self._text


@contextmanager
def _one_thread() -> Iterator[None]:
    """For the process that all are forked from: it is started with the first of them."""
    CONTEXT.set_forkserver_preload(["__main__", "tests.torture.preload"])
    before = {key: os.environ.get(key) for key in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


def _train(arguments: list[str], environment: dict[str, str], said: str, ready) -> None:
    import torch

    from fast_imagenet.engine.signals import stop_at_once
    from fast_imagenet.processes import SIGNALS

    os.setsid()
    # After a fork the first caller makes torch's pool anew: of two at a time, one would find none.
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the workers' server blocks them
    os.environ.update(ONE_THREAD | environment)
    os.chdir(ROOT)
    for descriptor, name in ((1, os.devnull), (2, said)):
        target = os.open(name, os.O_WRONLY)
        os.dup2(target, descriptor)
        os.close(target)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stop_at_once()
    ready.send(True)
    ready.close()
    sys.argv = arguments
    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
