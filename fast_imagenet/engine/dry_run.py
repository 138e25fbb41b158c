"""What a dry run tries beyond the checks of every start: a batch of each file, and the memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fast_imagenet.engine.progress import peak_memory_gb
from fast_imagenet.engine.train_state import Batch, TrainState
from fast_imagenet.machine import available_memory, memory_taken
from fast_imagenet.models.factory import blank_step
from fast_imagenet.models.networks import is_compiled
from fast_imagenet.program import LOWER_MEMORY

PROBED = 4  # images of a step on a CPU, where memory that is too small ends a process unheard
ForwardBackward = Callable[[TrainState, Batch, int], torch.Tensor]


def memory_per_image(
    state: TrainState, resolution: int, images: int, forward_backward: ForwardBackward
) -> float:
    """Bytes that an image of a forward pass takes on a CPU; 0 = not known.

    Args:
        resolution: in pixels.
        images: of the step that is taken, the first of this process.
        forward_backward: of a step, with its number.
    """
    whole, state.micro_batch = state.micro_batch, images
    # of the first step: later ones take the same memory again
    taken = memory_taken(partial(blank_step, state, resolution, forward_backward))
    state.micro_batch = whole
    return max(0, taken - _weights(state)) / images


def try_memory(
    state: TrainState, resolution: int, forward_backward: ForwardBackward, ranks: int = 1
) -> str:
    """What the largest step takes of the memory, in words; the state is of no use afterwards.

    A GPU takes the step, and so does a compiled network. On a CPU it is predicted from a small one.

    Args:
        resolution, forward_backward: as memory_per_image.
        ranks: on this node.
    Raises:
        ValueError: it does not fit a CPU's memory. A GPU has an error of its own.
    """
    images, device = state.micro_batch, next(state.model.parameters()).device
    room = available_memory() / ranks
    if device.type == "cuda" or is_compiled(state.train_model):
        blank_step(state, resolution, forward_backward)
        state.optimizer.step()  # has its moments only then
        needed = 1e9 * peak_memory_gb(device)
        if device.type == "cuda":
            room = torch.cuda.get_device_properties(device).total_memory
    else:
        few = min(PROBED, images)
        needed = images * memory_per_image(state, resolution, few, forward_backward)
        needed += 2 * _weights(state)  # gradients and moments
    text = f"{images} images of {resolution} px at a time take about {needed / 1e9:.1f} GB"
    text += f" of {room / 1e9:.1f} GB"
    if needed > room:
        raise ValueError(f"memory: {text}; {LOWER_MEMORY}")
    return text


def _weights(state: TrainState) -> int:
    return sum(4 * weight.numel() for weight in state.model.parameters())
