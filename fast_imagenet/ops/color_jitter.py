"""ColorJitter: brightness, contrast, saturation and hue by random factors, in random order."""

import itertools

import numpy as np

from .. import rng
from .color import adjust_hue, blend_pixels, blend_with_mean, mean_after, set_step
from .kernel import kernel
from .operation import KeyedOperation

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ABSENT = -1
MOST = 1000  # largest factor; any above 255 gives the same few colours
ORDERS = np.array(list(itertools.permutations(range(4))), np.int64)


def draw_jitter(seed, epoch, samples, ranges, p):
    """Order and factors of every image.

    Args: samples: int64 [b]. ranges: four of (low, high) or None, in the order brightness,
        contrast, saturation, hue. p: probability that an image is changed at all.
    Returns: order int64 [b, 4], what to do first, second, ... (ABSENT: nothing); factors float64
        [b, 4], by operation.
    """
    samples = np.asarray(samples, np.int64)
    enabled = np.array([limits is not None for limits in ranges])
    low, high = np.array([limits or (0, 0) for limits in ranges], np.float64).T
    key = (seed, epoch, samples[:, None])
    factors = low + (high - low) * rng.uniform_array(*key, rng.STREAM_JITTER, np.arange(4))
    applied = rng.uniform_array(*key, rng.STREAM_JITTER, 4) < p
    order = ORDERS[rng.integer_array(0, 24, seed, epoch, samples, rng.STREAM_JITTER_ORDER)]
    return np.where(applied & enabled[order], order, ABSENT), factors


@kernel
def jitter_image(image, order, factors, program):
    """Change one image. Arguments: one row of `draw_jitter`; program: float32 [4, 3], scratch.

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
            if steps > 1 or (steps == 1 and program[0, 0] != 0):
                mean, steps = blend_with_mean(image, program, steps), 0
            else:
                mean = mean_after(image, program, steps)
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
def apply_jitter(first, step, images_bhwc, order, factors):
    """Change images first, first + step, ... of a batch. Choices: of `draw_jitter`."""
    program = np.empty((4, 3), np.float32)
    for b in range(first, len(images_bhwc), step):
        jitter_image(images_bhwc[b], order[b], factors[b], program)


Strength = float | tuple[float, float]  # as in torchvision: around the identity, or the range


def _limits(name, value, center, low, high):
    """(low, high) of a factor, or None where it cannot change anything."""
    if np.ndim(value) == 0:
        if not 0 <= value <= high:
            raise ValueError(f"{name} is {value}; give a number from 0 to {high}, or (low, high)")
        limits = (max(low, center - value), center + value)
    else:
        limits = tuple(float(limit) for limit in value)
        if len(limits) != 2 or not low <= limits[0] <= limits[1] <= high:
            raise ValueError(f"{name} is {value}; give {low} <= low <= high <= {high}")
    return None if limits == (center, center) else limits


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
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; give a probability, 0 to 1")
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        self.ranges = [_limits(name, x, 1, 0, MOST) for name, x in strengths.items()]
        self.ranges.append(_limits("hue", hue, 0, -0.5, 0.5))
        self.p = float(p)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        return draw_jitter(self.seed, self._epoch, samples, self.ranges, self.p)

    apply = staticmethod(apply_jitter)
