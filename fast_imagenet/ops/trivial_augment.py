"""TrivialAugmentWide: one operation per image, its magnitude drawn over a wide range.

Source: Mueller and Hutter, "TrivialAugment", 2021 (arXiv:2103.10158); torchvision
transforms/autoaugment.py, equal to it on Pillow images given the same choices.
"""

import functools

import numpy as np

from . import policy
from .operation import KeyedOperation, check_count
from .rand_augment import ANY_BIN, FULL_NAMES, draw_rand_augment


@functools.lru_cache(maxsize=8)
def trivial_augment_space(bins: int) -> policy.Space:
    """torchvision's magnitudes for TrivialAugmentWide; they do not depend on the size."""
    strongest = dict(shear=0.99, right=32.0, down=32.0, degrees=135.0, factor=0.99)
    return policy.augmentation_space(FULL_NAMES, bins, bits=6, **strongest)


class TrivialAugmentWide(KeyedOperation):
    """Change every image by one of torchvision's fourteen operations: nearest, black outside.

    Args: num_magnitude_bins: magnitudes to draw from, at least 2. seed: of the run.
    Shape: uint8 [b, h, w, 3], changed in place.
    Raises: ValueError for fewer than 2 bins.
    """

    apply = staticmethod(policy.apply_policy)

    def __init__(self, *, num_magnitude_bins: int = 31, seed: int = 0) -> None:
        super().__init__(seed)
        self.bins = check_count(num_magnitude_bins, 2, "num_magnitude_bins")

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        tables = trivial_augment_space(self.bins)
        return draw_rand_augment(*self.key(samples), 1, *tables, 0.0, ANY_BIN)
