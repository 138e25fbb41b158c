"""ColorJitter: brightness, contrast, saturation and hue by random factors, in random order."""

import itertools
from typing import Any

import numpy as np

from .. import rng
from .color import adjust_hue, blend_pixels, mean_after, set_step
from .kernel import kernel
from .operation import KeyedOperation, check_probability

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ABSENT = -1
Strength = float | tuple[float, float]  # of a factor: its range around 1, or (low, high)
MOST = 1000  # largest factor; any above 255 gives the same few colors
ORDERS = np.array(list(itertools.permutations(range(4))), np.int64)


@kernel
def jitter_image(image, order, factors, program):
    """Change one image.

    Args: order: int64 [4], what to do first, second, ... (ABSENT: nothing). factors: float64 [4],
        by operation. program: float32 [4, 3], scratch.

    Blends gather in `program` until something needs their result: a hue shift needs the pixels,
    contrast their mean. A single brightness is cheaper done twice than written in between.
    """
    steps = 0
    for k in range(4):
        action = order[k]
        if action == BRIGHTNESS:
            set_step(program, steps, 0, 0, factors[BRIGHTNESS])
            steps += 1
        elif action == SATURATION:
            set_step(program, steps, 1, 0, factors[SATURATION])
            steps += 1
        elif action == CONTRAST:
            store = steps > 1 or (steps == 1 and program[0, 0] != 0)
            mean = mean_after(image, program, steps, store)
            steps = 0 if store else steps
            set_step(program, steps, 0, mean, factors[CONTRAST])
            steps += 1
        elif action == HUE:
            if steps > 0:
                blend_pixels(image, program, steps)
            steps = 0
            adjust_hue(image, factors[HUE])
    if steps > 0:
        blend_pixels(image, program, steps)


@kernel
def apply_jitter(first, end, images_bhwc, order, factors):
    """Change images first to end - 1 of a batch. order, factors: [b, 4], one per image."""
    program = np.empty((4, 3), np.float32)
    for b in range(first, end):
        jitter_image(images_bhwc[b], order[b], factors[b], program)


def _limits(
    name: str, value: Any, center: float, low: float, high: float
) -> tuple[float, float] | None:
    """(low, high) of a factor, or None where it cannot change anything."""
    if np.ndim(value) == 0:
        if not 0 <= value <= high:
            raise ValueError(f"{name} is {value}; give a number from 0 to {high}, or (low, high)")
        least, most = max(low, center - value), center + value
    else:
        if len(value) != 2 or not low <= value[0] <= value[1] <= high:
            raise ValueError(f"{name} is {value}; give {low} <= low <= high <= {high}")
        least, most = map(float, value)
    return None if least == most == center else (least, most)


class ColorJitter(KeyedOperation):
    """Brightness, contrast, saturation and hue by random factors, in a random order per image.

    Args:
        brightness, contrast, saturation: a factor is drawn uniformly from [max(0, 1 - x), 1 + x],
            or from (low, high) where two numbers are given; 0 leaves the operation out.
        hue: shift drawn uniformly from [-x, x] of a full circle, x up to 0.5, or from (low, high).
        p: probability that an image is changed at all.
        seed: of this run; with the epoch and the sample index it decides every draw.
    Shape: uint8 [b, height, width, 3], RGB, in place.
    Raises: ValueError for settings out of range.
    Source: torchvision ColorJitter on PIL images; equal to it for equal order and factors.
    """

    apply = staticmethod(apply_jitter)

    def __init__(
        self,
        brightness: Strength = 0,
        contrast: Strength = 0,
        saturation: Strength = 0,
        hue: Strength = 0,
        *,
        p: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        self.ranges = [_limits(name, x, 1, 0, MOST) for name, x in strengths.items()]
        self.ranges.append(_limits("hue", hue, 0, -0.5, 0.5))
        self.p = check_probability(p)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        enabled = np.array([limits is not None for limits in self.ranges])
        low, high = np.array([limits or (0, 0) for limits in self.ranges], np.float64).T
        key = self.key(samples[:, None])
        factors = low + (high - low) * rng.uniform_array(*key, rng.STREAM_JITTER, np.arange(4))
        applied = rng.uniform_array(*key, rng.STREAM_JITTER, 4) < self.p
        order = ORDERS[rng.integer_array(0, 24, *self.key(samples), rng.STREAM_JITTER_ORDER)]
        return np.where(applied & enabled[order], order, ABSENT), factors
