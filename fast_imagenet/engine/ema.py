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
        floats = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        self._floats = floats
        self._others = [name for name in self._live if name not in set(floats)]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the network by the share 1 - decay, 0 <= decay < 1."""
        average = [self._average[name] for name in self._floats]
        live = [self._live[name] for name in self._floats]
        if decay == 0:
            torch._foreach_copy_(average, live)
        else:
            torch._foreach_lerp_(average, live, 1 - decay)
        if self._others:  # counters such as num_batches_tracked
            others = [
                [source[name] for name in self._others] for source in (self._average, self._live)
            ]
            torch._foreach_copy_(*others)

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
