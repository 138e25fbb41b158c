"""An exponential moving average of a network's weights and batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, for every floating-point entry.

    One fused call a step for the whole network. Evaluating the average copies it *into* the
    network's own tensors and back afterwards: a compiled network reads those tensors, whereas a
    second network would have to be compiled again and could be left behind unnoticed.

    Args:
        model: the raw network (not its compiled or distributed wrapper). Memory: one more copy of
            the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = dict(model.state_dict())  # references: they follow every optimizer step
        self._average = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        pairs = [(tensor, self._live[name]) for name, tensor in self._average.items()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]  # of batch norms
        self._floats = [average for average, _ in floats], [live for _, live in floats]
        self._counters = [average for average, _ in counters], [live for _, live in counters]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the network by the fraction 1 - decay, 0 <= decay <= 1."""
        if decay == 1:
            return
        if decay == 0:
            torch._foreach_copy_(*self._floats)
        else:
            torch._foreach_lerp_(*self._floats, 1 - decay)
        if self._counters[0]:
            torch._foreach_copy_(*self._counters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the network holds the average; the raw weights return afterwards."""
        raw = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._overwrite(self._average)
        try:
            yield
        finally:
            self._overwrite(raw)

    @torch.no_grad()
    def _overwrite(self, values: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._live.items():
            tensor.copy_(values[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average under the network's own names: loadable into the network."""
        return self._average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from a saved average; its names and shapes must be the network's."""
        for name, tensor in self._average.items():
            tensor.copy_(state[name])
