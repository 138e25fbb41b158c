"""What surrounds a training loop, so that the loop itself need not know of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from fast_imagenet.engine.distributed import Consensus, Distributed
from fast_imagenet.engine.finite import mean_losses
from fast_imagenet.engine.signals import SignalWatch

FINITE_STEPS = 50  # reading the losses waits for the device


class StepMonitor:
    """Called after every step: checks the losses, saves from time to time, stops on request.

    Args:
        signals: whose signal is obeyed.
        distributed: all ranks stop at the same step.
        minutes: between checkpoints inside an epoch; 0 = none.
        save: called with the mean loss of every step since the start of this process's epoch.
    """

    def __init__(
        self,
        signals: SignalWatch,
        distributed: Distributed,
        minutes: float,
        save: Callable[[list[float]], None],
    ) -> None:
        self._signals, self._distributed, self._save = signals, distributed, save
        self._consensus = Consensus(distributed)
        self._seconds = 60 * minutes or math.inf
        self._due = time.monotonic() + self._seconds

    def __call__(self, step: int, losses: list[torch.Tensor]) -> None:
        """After `step` steps of the run; losses: of this rank, one a step since its last start.

        Raises:
            Stopped: a signal came and the run is saved.
            NotFinite: a loss is not finite; nothing is saved.
        """
        due = time.monotonic() >= self._due
        request = self._consensus.ask(2 if self._signals.received else int(due))
        if not request and step % FINITE_STEPS:
            return
        means = mean_losses(losses, step - len(losses), self._distributed)
        if request:
            self._save(means)
            self._due = time.monotonic() + self._seconds
        if request == 2:
            raise self._signals.stopped()
