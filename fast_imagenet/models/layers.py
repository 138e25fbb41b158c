"""Layers of a network exchanged for others, in place; the network inside its wrappers."""

from collections.abc import Callable
from typing import Any

from torch import nn


def replace_layers(
    model: nn.Module, wanted: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]
) -> int:
    """Put make(layer) in the place of every wanted layer; the inside of one is not searched.

    Args:
        model: a network before compilation and before it is wrapped for several ranks.
        wanted: whether a layer is to be replaced.
        make: the new one from the old, with its parameters.

    Returns:
        How many layers were replaced.
    """
    count = 0
    for name, child in list(model.named_children()):
        if wanted(child):
            setattr(model, name, make(child))
            count += 1
        else:
            count += replace_layers(child, wanted, make)
    return count


def plain_model(model: nn.Module) -> nn.Module:
    """The network inside torch.compile and DistributedDataParallel wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
