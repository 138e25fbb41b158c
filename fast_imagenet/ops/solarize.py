"""RandomSolarize: some images have their bright values inverted."""

import numpy as np

from .. import rng
from .color import solarize
from .kernel import kernel
from .operation import KeyedOperation, check_probability

NEVER = 256.0  # a threshold above every value


@kernel
def apply_solarize(first, end, images_bhwc, thresholds):
    """Change images first to end - 1 of a batch. thresholds: float64 [b], or NEVER."""
    for b in range(first, end):
        if thresholds[b] < NEVER:
            solarize(images_bhwc[b], thresholds[b])


class RandomSolarize(KeyedOperation):
    """Invert the values at or above a threshold, with probability p.

    Args:
        threshold: 0 (all values) to 256 (none), not necessarily whole.
        p: probability.
        seed: of this run; with the epoch and the sample index it decides every draw.
    Shape: uint8 [b, height, width, 3], RGB, in place.
    Raises: ValueError for settings out of range.
    Source: Pillow's ImageOps.solarize; torchvision RandomSolarize.
    """

    apply = staticmethod(apply_solarize)

    def __init__(self, threshold: float = 128, p: float = 0.5, *, seed: int = 0) -> None:
        super().__init__(seed)
        if not 0 <= threshold <= 256:
            raise ValueError(f"threshold is {threshold}; give a value from 0 to 256")
        self.threshold, self.p = float(threshold), check_probability(p)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        chosen = rng.uniform_array(*self.key(samples), rng.STREAM_SOLARIZE) < self.p
        return (np.where(chosen, self.threshold, NEVER),)
