"""Signals: before a run they end the process at once, during it they are obeyed between two steps.

A run looks for a signal between two steps, never inside one: what is saved is always a whole step,
and `--training.resume=auto` resumes with the very next.
"""

from __future__ import annotations

import faulthandler
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from fast_imagenet.config import interpreter
from fast_imagenet.processes import SIGNALS
from fast_imagenet.program import LOWER_MEMORY, STOPPED, errors_as_sentences

CLOSE_SECONDS = 10  # from the failure of a program to its end, whatever does not close

_is_program = False  # not tests, not a notebook: `stop_at_once` was called
_over: str | None = None  # how the run ended: 'done' or 'failed'; None: it did not


class Stopped(Exception):  # noqa: N818  not an error: the run is saved
    """The run was asked to stop. The message names the signal."""


def stop_at_once() -> None:
    """Until a SignalWatch is entered, a signal ends this process with status STOPPED."""

    global _is_program, _over
    _is_program, _over = True, None
    once = threading.Lock()  # two threads may be notified of one signal

    def end(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if _over == "failed":  # it ends within CLOSE_SECONDS, with the status of its failure
            return
        if _over == "done":
            _end_process(0)
        if once.acquire(timeout=1):
            text = f"stopped by {name} before the run began; start the same command again\n"
            sys.stderr.write(text)
            sys.stderr.flush()
        os._exit(STOPPED)  # no clean-up: it may wait for a loader that is being built

    def end_from_outside() -> None:
        while number := os.read(reader, 1):
            if signal.getsignal(number[0]) is end:  # no SignalWatch is entered
                end(number[0], None)

    for number in SIGNALS:
        signal.signal(number, end)
    # The main thread may be inside a call that waits for other ranks: Python's handler waits, too.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget_wakeup)  # not a worker's signals
    threading.Thread(target=end_from_outside, name="signals", daemon=True).start()


def _forget_wakeup() -> None:
    signal.set_wakeup_fd(-1)


def _end_process(status: int) -> None:
    with suppress(Exception):  # the signal may have come in the middle of a write
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _end_by_force(error: BaseException) -> None:
    time.sleep(CLOSE_SECONDS)
    print(f"ended by force {CLOSE_SECONDS:g} s after: {error!r}", file=sys.stderr)
    _end_process(STOPPED if isinstance(error, Stopped) else 1)


class SignalWatch:
    """Records the first of SIGNALS while it is entered; a second SIGINT raises KeyboardInterrupt.

    Left by an error, it ends the program after CLOSE_SECONDS, whatever hangs on its way out.

    Args:
        record: False leaves signals to `stop_at_once`, since there is nothing to save.
    Attributes: received: name of the first signal, or ''.
    """

    def __init__(self, record: bool = True) -> None:
        self.received, self._record = "", record

    def __enter__(self) -> SignalWatch:
        self._handlers, self._wakeup = {}, -1
        if self._record and threading.current_thread() is threading.main_thread():
            self._wakeup = signal.set_wakeup_fd(-1)  # the thread of `stop_at_once` rests
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        global _over
        _over = "failed" if error else "done"
        if error and _is_program:
            threading.Thread(target=_end_by_force, args=(error,), daemon=True).start()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name

    def stopped(self) -> Stopped:
        """The exception to raise once the run is saved."""
        return Stopped(self.received or "a signal to another rank")


@contextmanager
def exit_statuses(name: str) -> Iterator[None]:
    """Around a training program: as errors_as_sentences, and STOPPED after a signal.

    Raises: SystemExit.
    """
    faulthandler.enable()  # SIGBUS, when the data file is cut meanwhile, would end without a word
    try:
        with errors_as_sentences(
            name,
            "interrupted; the last checkpoint resumes with --training.resume=auto",
            out_of_memory=LOWER_MEMORY,
            disk_full=", then start again with --training.resume=auto",
        ):
            yield
    except Stopped as stop:
        more = [flag for flag in ["--training.resume=auto"] if flag not in sys.argv]
        alone = [] if "LOCAL_RANK" in os.environ else [interpreter()]  # else torchrun's command
        command = shlex.join(alone + sys.argv + more)
        print(f"stopped by {stop}, saved; resume with {command}", file=sys.stderr)
        sys.exit(STOPPED)
