"""An exponential moving average of a network's weights and batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, for every floating-point entry.

    All other entries are the network's own, and so is everything where no average is asked for.

    One fused call a step for the whole network. Evaluating the average copies it *into* the
    network's own tensors and back afterwards: a compiled network reads those tensors, whereas a
    second network would have to be compiled again and could be left behind unnoticed.

    Args:
        model: the raw network (not its compiled or distributed wrapper). Memory: one more copy of
            the weights.
        enabled: False: the average is the raw weights, for a run without one; it costs nothing.
    """

    def __init__(self, model: nn.Module, enabled: bool = True) -> None:
        self._live = dict(model.state_dict())  # references: they follow every optimizer step
        own = [k for k, tensor in self._live.items() if enabled and tensor.is_floating_point()]
        self._own = {name: self._live[name].detach().clone() for name in own}
        self._pairs = list(self._own.values()), [self._live[name] for name in own]
        #: of batch norm's statistics; of parameters all ranks have the same
        self.statistics = [self._own[name] for name, _ in model.named_buffers() if name in own]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the network by the fraction 1 - decay, 0 <= decay <= 1."""
        if self._own and decay < 1:
            torch._foreach_lerp_(*self._pairs, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the network holds the average; the raw weights return afterwards."""
        averages, live = self._pairs
        raw = [tensor.detach().clone() for tensor in live]
        self._overwrite(averages)
        try:
            yield
        finally:
            self._overwrite(raw)

    @torch.no_grad()
    def _overwrite(self, values: list[torch.Tensor]) -> None:
        for tensor, value in zip(self._pairs[1], values, strict=True):
            tensor.copy_(value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average under the network's own names: loadable into the network."""
        return self._live | self._own

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from a saved average; its names and shapes must be the network's."""
        for name, tensor in self._own.items():
            tensor.copy_(state[name])
