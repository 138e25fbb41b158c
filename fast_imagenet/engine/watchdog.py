"""A limit on the wait for a batch: a loader that hangs must not hold a machine for ever."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any

from fast_imagenet.engine.signals import SignalWatch
from fast_imagenet.program import STALLED

if TYPE_CHECKING:  # signals are answered before the seconds that importing torch takes
    from fast_imagenet.engine.distributed import Consensus
    from fast_imagenet.engine.train_state import EvalBatches


class Watchdog:
    """Limits the wait for a batch, while it is entered.

    Args:
        seconds: longest wait for one batch; after it all stacks are printed and the process ends
            with status STALLED, since a thread that hangs in C cannot be ended otherwise. Time in
            which the process is stopped or the machine asleep does not count.
        signals: of a run that can be resumed.
        on_stall: called before the process ends so, to remove what must not stay.
    """

    def __init__(
        self,
        seconds: float = 300,
        signals: SignalWatch | None = None,
        on_stall: Callable[[], object] | None = None,
    ) -> None:
        self.seconds, self._signals, self._on_stall = seconds, signals, on_stall
        self._wait, self._waits = 0, count(1)  # number of the wait under way; 0: none is
        self._end = threading.Event()
        self.waited = 0.0  # seconds of all waits so far

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch_clock, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()

    def watch(
        self, batches: Iterable[Any], consensus: Consensus | None = None, common: int = 0
    ) -> Iterator[Any]:
        """The batches, none waited for longer than `seconds`.

        Args:
            consensus: with it, all ranks stop at the same batch after a signal to one of them.
            common: batches that every rank has, before which they may ask each other.

        Raises: Stopped: a signal came.
        """
        iterator = iter(batches)
        for number in count():
            if consensus and number < common:
                self._stop_together(consensus)
            self._wait, begin = next(self._waits), time.perf_counter()
            try:
                batch = next(iterator, None)
            finally:
                self._wait = 0
            if batch is None:
                return
            self.waited += time.perf_counter() - begin
            yield batch

    def watched(
        self, batches: EvalBatches, consensus: Consensus | None = None, common: int = 0
    ) -> EvalBatches:
        """The passes of an evaluation, each as `watch`."""
        return lambda *view: self.watch(batches(*view), consensus, common)

    def _stop_together(self, consensus: Consensus) -> None:
        signals = self._signals or SignalWatch()
        if consensus.ask(int(bool(signals.received))):
            raise signals.stopped()

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
        again = "resume with --training.resume=auto" if self._signals else "start the command again"
        print(
            f"no batch came for {self.seconds:g} s: the disk, a worker or the loader hangs "
            f"(stacks below). Fix it and {again}, or allow longer waits with --data.timeout",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        if self._on_stall:
            with suppress(OSError):
                self._on_stall()
        os._exit(STALLED)
