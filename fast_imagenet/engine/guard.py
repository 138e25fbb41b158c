"""What ends a run in good order: a signal, a stall, a second run in its folder, a wild loss.

A run looks at these between two steps (`StepMonitor`), never inside one: what is saved is always a
whole step, and `--training.resume=auto` resumes with the very next.
"""

from __future__ import annotations

import faulthandler
import fcntl
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from fast_imagenet.config import format_error
from fast_imagenet.processes import SIGNALS
from fast_imagenet.terminal import FULL

if TYPE_CHECKING:
    import torch

STOPPED = 75  # exit status: stopped on request, the same command goes on (sysexits: EX_TEMPFAIL)
STALLED = 70  # exit status: no batch came (sysexits: EX_SOFTWARE)
AGREE_STEPS = 10  # several ranks ask each other after so many steps at most ...
AGREE_SECONDS = 4.0  # ... and after so much time, of the slowest; one rank looks after every step
FINITE_STEPS = 50  # reading the losses waits for the device
ANOTHER = "a signal to another rank"
CALM = "lower lr.lr or set training.clip_grad"
CLOSE_SECONDS = 10  # from the failure of a program to its end, whatever does not close

_is_program = False  # not tests, not a notebook: `stop_at_once` was called
_over: str | None = None  # how the run under guard ended: 'done' or 'failed'; None: it did not


class Stopped(Exception):  # noqa: N818  no error: the run is saved
    """The run was asked to stop. The message names the signal."""


def stop_at_once() -> None:
    """Until a Guard is entered, a signal ends this process with status STOPPED: nothing to save."""

    global _is_program, _over
    _is_program, _over = True, None
    once = threading.Lock()  # two threads may be told of one signal

    def end(number: int, frame=None) -> None:
        name = signal.Signals(number).name
        if _over == "failed":  # it ends within CLOSE_SECONDS, with the status of its failure
            return
        if _over == "done":
            _end_process(0)
        if once.acquire(timeout=1):
            said = f"stopped by {name} before the run began; start the same command again\n"
            sys.stderr.write(said)
            sys.stderr.flush()
        os._exit(STOPPED)  # no clean-up: it may wait for a loader that is being built

    def end_from_outside() -> None:
        while number := os.read(noted, 1):
            if signal.getsignal(number[0]) is end:  # no Guard is entered
                end(number[0])

    for number in SIGNALS:
        signal.signal(number, end)
    # The main thread may be inside a call that waits for other ranks: Python's handler waits, too.
    noted, note = os.pipe()
    os.set_blocking(note, False)
    signal.set_wakeup_fd(note, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # not a worker's signals
    threading.Thread(target=end_from_outside, name="signals", daemon=True).start()


def _end_process(status: int) -> None:
    with suppress(Exception):  # the signal may have come in the middle of a write
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _end_by_force(error: BaseException) -> None:
    time.sleep(CLOSE_SECONDS)
    print(f"ended by force {CLOSE_SECONDS:g} s after: {error!r}", file=sys.stderr)
    _end_process(STOPPED if isinstance(error, Stopped) else 1)


class Guard:
    """Notes signals and limits the wait for a batch, while it is entered.

    Left by an error, it ends the program after CLOSE_SECONDS, whatever hangs on its way out.

    Args:
        seconds: longest wait for one batch; after it all stacks are printed and the process ends
        with status STALLED, since a thread that hangs in C cannot be ended otherwise. Time in which
        the process is stopped or the machine asleep does not count.
        obeys: notes signals; False: leaves them alone, nothing is to be saved.
        at_stall: called before the process ends so, to remove what must not stay.
    Attributes: signal: name of the first signal that came, or ''.

    The first of SIGNALS is noted; a second SIGINT raises KeyboardInterrupt.
    """

    def __init__(self, seconds: float = 300, obeys: bool = True, at_stall=None) -> None:
        self.seconds, self.signal, self._obeys, self._at_stall = seconds, "", obeys, at_stall
        self._wait, self._waits = 0, count(1)  # number of the wait under way; 0: none is
        self._end = threading.Event()

    def __enter__(self) -> Guard:
        self._before, self._told = {}, -1
        if self._obeys and threading.current_thread() is threading.main_thread():
            self._told = signal.set_wakeup_fd(-1)  # the thread of `stop_at_once` has a rest
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        threading.Thread(target=self._watch_clock, name="guard", daemon=True).start()
        return self

    def __exit__(self, kind=None, error=None, trace=None) -> None:
        global _over
        self._end.set()
        _over = "failed" if error else "done"
        if error and _is_program:
            threading.Thread(target=_end_by_force, args=(error,), daemon=True).start()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)

    def _note(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number).name

    def _watch_clock(self) -> None:
        tick, wait, waited, before = min(1.0, self.seconds / 4), 0, 0.0, time.monotonic()
        while not self._end.wait(tick):
            now = time.monotonic()
            if self._wait != wait:
                wait, waited = self._wait, 0.0
            elif wait:
                waited += min(now - before, 2 * tick)  # longer: this process did not run
            before = now
            if waited > self.seconds:
                self._end_stalled()

    def _end_stalled(self) -> None:
        again = "resume with --training.resume=auto" if self._obeys else "start the command again"
        print(
            f"no batch came for {self.seconds:g} s: the disk, a worker or the loader hangs "
            f"(stacks below). Fix it and {again}, or allow longer waits with --data.timeout",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        if self._at_stall:
            with suppress(OSError):
                self._at_stall()
        os._exit(STALLED)

    def watch(self, batches: Iterable, agreement: Agreement | None = None, asked=0) -> Iterator:
        """The batches, none waited for longer than `seconds`.

        Args:
            agreement: with it, all ranks stop at the same batch after a signal to one of them.
            asked: batches, the same on all ranks, before which they may ask each other.

        Raises: Stopped: a signal came.
        """
        batches = iter(batches)
        for number in count():
            if number < asked and agreement.ask(int(bool(self.signal))):
                raise Stopped(self.signal or ANOTHER)
            self._wait = next(self._waits)
            try:
                batch = next(batches, None)
            finally:
                self._wait = 0
            if batch is None:
                return
            yield batch


class Agreement:
    """Ranks that ask each other now and then, all after the same step, how far to go.

    Asking makes the ranks wait for each other, so fast steps are not asked after each; slow ones
    are, since a signal must be obeyed within seconds.

    Args: ranks: must call `ask` equally often.
    """

    def __init__(self, ranks) -> None:
        self._ranks, self._left, self._every = ranks, 1, 1
        self._since = time.monotonic()

    def ask(self, wish: int) -> int | None:
        """The largest wish of the ranks, the same on all; None: they do not ask each other now."""
        if self._ranks.world_size == 1:
            return wish
        self._left -= 1
        if self._left:
            return None
        milliseconds = round(1000 * (time.monotonic() - self._since) / self._every)
        largest, slowest = self._ranks.most(wish), self._ranks.most(milliseconds)
        fitting = int(1000 * AGREE_SECONDS / max(1, slowest))
        self._every = self._left = min(AGREE_STEPS, max(1, fitting))
        self._since = time.monotonic()
        return largest


class StepMonitor:
    """Called after every step: looks at the losses, saves from time to time, stops on request.

    Args:
        guard: whose signal is obeyed.
        ranks: all of them stop at the same step.
        minutes: between checkpoints inside an epoch; 0 = none.
        save: called with the mean loss of every step since `begin`.
    """

    def __init__(self, guard: Guard, ranks, minutes: float, save) -> None:
        self._guard, self._ranks, self._save = guard, ranks, save
        self._agreement = Agreement(ranks)
        self._seconds = 60 * minutes or math.inf
        self._due = time.monotonic() + self._seconds

    def __call__(self, step: int, losses: list[torch.Tensor]) -> None:
        """After `step` steps of the run; losses: of this rank, one a step since its last start.

        Raises:
            Stopped: a signal came and the run is saved.
            NotFinite: a loss is not finite; nothing is saved.
        """
        due = time.monotonic() >= self._due
        wish = self._agreement.ask(2 if self._guard.signal else int(due))
        if not wish and step % FINITE_STEPS:
            return
        means = mean_losses(losses, step - len(losses), self._ranks)
        if wish:
            self._save(means)
            self._due = time.monotonic() + self._seconds
        if wish == 2:
            raise Stopped(self._guard.signal or ANOTHER)


class NotFinite(ValueError):  # noqa: N818  as Stopped
    """A loss or a weight is not finite. The message names the step and what to change."""


def mean_losses(losses: list[torch.Tensor], first_step: int, ranks) -> list[float]:
    """Losses of consecutive steps, averaged over the ranks; waits for the device.

    Raises:
        NotFinite: one is not finite; names its step.
    """
    import torch  # not above: `stop_at_once` is called before the seconds that this takes

    if not losses:
        return []
    stacked = torch.stack(losses)
    ranks.average({"losses": stacked})
    means = stacked.tolist()
    wild = [step for step, loss in enumerate(means, first_step) if not math.isfinite(loss)]
    if wild:
        raise NotFinite(f"the loss is not finite from step {wild[0]} on; {CALM}")
    return means


def resource_hint(error: BaseException) -> str | None:
    """What was too small and which setting to change, as a sentence; None: it is another fault."""
    text = str(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}  # torch may not be imported yet
    if kinds & {"OutOfMemoryError", "MemoryError"} or "DefaultCPUAllocator" in text:
        lower = "training.micro_batch_size (images per forward pass) or validation.batch_size"
        return f"{text or 'out of memory'}\nLower {lower}"
    if "WorkerError" in kinds:
        return text
    if isinstance(error, OSError) and error.errno in FULL:
        return (
            f"{error.strerror}{f': {error.filename}' if error.filename else ''}; make room or move "
            f"the run's folder. last.pt is whole: go on with --training.resume=auto"
        )
    # a path that the system refuses: rights, a folder that was removed or replaced, a failing disk
    return format_error(error) if isinstance(error, OSError) and error.filename else None


@contextmanager
def lock_folder(folder: str | Path, enabled: bool = True) -> Iterator[None]:
    """Keep other runs out of `folder` for as long as this lasts; a killed process keeps nobody out.

    The folder itself is locked: nothing is left in it. Where a file system cannot do that, nobody
    is kept out.

    Raises:
        ValueError: another process holds it; nothing was touched.
    """
    if not enabled:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"{folder} is in use by another process; wait for it, stop it or choose another "
            f"logging.folder"
        ) from None
    except OSError:  # NFS locks only files open for writing
        pass
    try:
        yield
    finally:
        os.close(descriptor)
