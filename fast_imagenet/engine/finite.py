"""A run whose loss or weights are not finite ends before it is saved."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fast_imagenet.engine.distributed import Distributed

ADVICE = "lower lr.lr or set training.clip_grad"


class NotFinite(ValueError):  # noqa: N818  as Stopped
    """A loss or a weight is not finite. The message names the step and what to change."""


def mean_losses(
    losses: Sequence[torch.Tensor], first_step: int, distributed: Distributed
) -> list[float]:
    """Losses of consecutive steps, averaged over the ranks; waits for the device.

    Raises:
        NotFinite: one is not finite; names its step.
    """
    if not losses:
        return []
    stacked = torch.stack(list(losses))
    distributed.all_reduce_mean([stacked])
    means = stacked.tolist()
    wrong = [step for step, loss in enumerate(means, first_step) if not math.isfinite(loss)]
    if wrong:
        raise NotFinite(f"the loss is not finite from step {wrong[0]} on; {ADVICE}")
    return means


@torch.no_grad()
def refuse_not_finite(tensors: dict[str, torch.Tensor], place: str) -> None:
    """A step of finite loss can still leave weights that are not: such a run is never saved.

    Args:
        tensors: weights, statistics and their EMA, by name.
        place: where the run is, in words.

    Raises:
        NotFinite: names the first such tensor and the place.
    """
    finite = {k: v.isfinite().all() for k, v in tensors.items() if v.is_floating_point()}
    flags = torch.stack(list(finite.values())).tolist()  # one wait for the device
    wrong = [name for name, good in zip(finite, flags, strict=True) if not good]
    if wrong:
        raise NotFinite(f"{wrong[0]} is not finite in {place}; {ADVICE}")
