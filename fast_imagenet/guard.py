"""What ends a run in good order: a signal, a stall, a second run in its folder, a wild loss.

A run looks at these between two steps (`Pauses`), never inside one: what is saved is always a whole
step, and `--training.resume=auto` goes on with the very next.
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
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STOPPED = 75  # exit status: stopped on request, the same command goes on (sysexits: EX_TEMPFAIL)
STALLED = 70  # exit status: no batch came (sysexits: EX_SOFTWARE)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGREE_STEPS = 10  # several ranks ask each other that often; one rank looks after every step
FINITE_STEPS = 50  # reading the losses waits for the device


class Stopped(Exception):  # noqa: N818  no error: the run is saved
    """The run was asked to stop. The message names the signal."""


def stop_at_once() -> None:
    """Until a Guard is entered, a signal ends this process with status STOPPED: nothing to save."""

    def end(number: int, frame) -> None:
        name = signal.Signals(number).name
        sys.stderr.write(f"stopped by {name} before the run began; start the same command again\n")
        sys.stderr.flush()
        os._exit(STOPPED)  # no clean-up: it may wait for a loader that is being built

    for number in SIGNALS:
        signal.signal(number, end)


class Guard:
    """Notes signals and limits the wait for a batch, while it is entered.

    Args: seconds: longest wait for one batch; after it all stacks are printed and the process ends
        with status STALLED, since a thread that hangs in C cannot be ended otherwise.
    Attributes: signal: name of the first signal that came, or ''.

    The first of SIGTERM, SIGINT and SIGUSR1 is noted; a second SIGINT raises KeyboardInterrupt.
    """

    def __init__(self, seconds: float = 300) -> None:
        self.seconds, self.signal = seconds, ""
        self._deadline, self._end = math.inf, threading.Event()

    def __enter__(self) -> Guard:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        threading.Thread(target=self._watch_clock, name="guard", daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._end.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number).name

    def _watch_clock(self) -> None:
        while not self._end.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() > self._deadline:
                print(
                    f"no batch came for {self.seconds:g} s: the disk, a worker or the loader hangs "
                    f"(stacks below). Mend it and go on with --training.resume=auto, or allow "
                    f"longer waits with --data.timeout",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(STALLED)

    def watch(self, batches: Iterable, stop_at_once: bool = False) -> Iterator:
        """The batches, none waited for longer than `seconds`.

        Raises: Stopped: with stop_at_once, a signal was noted.
        """
        batches = iter(batches)
        while True:
            if stop_at_once and self.signal:
                raise Stopped(self.signal)
            self._deadline = time.monotonic() + self.seconds
            try:
                batch = next(batches, None)
            finally:
                self._deadline = math.inf
            if batch is None:
                return
            yield batch


class Pauses:
    """Called after every step: looks at the losses, saves from time to time, stops on request.

    Args:
        guard: whose signal is obeyed.
        ranks: all of them stop at the same step.
        minutes: between checkpoints inside an epoch; 0 = none.
        save: called with the mean loss of every step since `begin`.
    """

    def __init__(self, guard: Guard, ranks, minutes: float, save) -> None:
        self._guard, self._ranks, self._save = guard, ranks, save
        self._seconds = 60 * minutes or math.inf
        self._due = time.monotonic() + self._seconds

    def __call__(self, step: int, losses: list[torch.Tensor]) -> None:
        """After `step` steps of the run; losses: of this rank, one a step since its last start.

        Raises:
            Stopped: a signal came and the run is saved.
            ValueError: a loss is not finite; nothing is saved.
        """
        if self._ranks.world_size > 1 and step % AGREE_STEPS:
            return
        due = time.monotonic() >= self._due
        wish = self._ranks.most(2 if self._guard.signal else int(due))
        if not wish and step % FINITE_STEPS:
            return
        means = mean_losses(losses, step - len(losses), self._ranks)
        if wish:
            self._save(means)
            self._due = time.monotonic() + self._seconds
        if wish == 2:
            raise Stopped(self._guard.signal or "a signal to another rank")


def mean_losses(losses: list[torch.Tensor], first_step: int, ranks) -> list[float]:
    """Losses of consecutive steps, averaged over the ranks; waits for the device.

    Raises:
        ValueError: one is not finite; names its step.
    """
    import torch  # not above: `stop_at_once` is called before the seconds that this takes

    if not losses:
        return []
    stacked = torch.stack(losses)
    ranks.average({"losses": stacked})
    means = stacked.tolist()
    wild = [step for step, loss in enumerate(means, first_step) if not math.isfinite(loss)]
    if wild:
        raise ValueError(
            f"the loss is not finite from step {wild[0]} on; lower lr.lr or set "
            f"training.clip_grad. last.pt, if any, is from before"
        )
    return means


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
