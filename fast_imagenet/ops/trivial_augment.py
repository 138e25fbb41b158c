"""TrivialAugmentWide: one operation an image, its magnitude drawn over a wide range.

Source: Mueller and Hutter, "TrivialAugment", 2021 (arXiv:2103.10158); torchvision
transforms/autoaugment.py, equal to it on Pillow images given the same choices.
"""

import functools

import numpy as np

from .. import rng
from . import policy
from .kernel import kernel
from .operation import KeyedOperation
from .policy import apply_policy
from .rand_augment import FULL_NAMES


@functools.lru_cache(maxsize=8)
def trivial_augment_space(bins: int) -> policy.Space:
    """torchvision's magnitudes for TrivialAugmentWide; they do not depend on the size."""
    return policy.augmentation_space(
        FULL_NAMES, bins, shear=0.99, right=32.0, down=32.0, degrees=135.0, factor=0.99, bits=6
    )


@kernel
def draw_trivial_augment(seed, epoch, samples, codes, values, signed):
    """One operation and its argument for every sample.

    Args: samples: int64 [b]. codes, values, signed: a `policy.Space`.
    Returns: operations int64 [b, 1], arguments float64 [b, 1].
    """
    operations = np.empty((len(samples), 1), np.int64)
    arguments = np.empty((len(samples), 1), np.float64)
    for b in range(len(samples)):
        key = (seed, epoch, samples[b])
        row = rng.integer(0, len(codes), *key, rng.STREAM_POLICY, 0)
        value = values[row, rng.integer(0, values.shape[1], *key, rng.STREAM_MAGNITUDE, 0)]
        if signed[row] and rng.integer(0, 2, *key, rng.STREAM_SIGN, 0):
            value = -value
        operations[b, 0] = codes[row]
        arguments[b, 0] = policy.resolve_argument(codes[row], value)
    return operations, arguments


apply_trivial_augment = apply_policy


class TrivialAugmentWide(KeyedOperation):
    """Change every image by one of torchvision's fourteen operations: nearest, black outside.

    Args: num_magnitude_bins: magnitudes to draw from, at least 2. seed: of the run.
    Shape: uint8 [b, h, w, 3], changed in place.
    Raises: ValueError for fewer than 2 bins.
    """

    apply = staticmethod(apply_trivial_augment)

    def __init__(self, *, num_magnitude_bins=31, seed=0):
        super().__init__(seed)
        if not 2 <= num_magnitude_bins <= 1000 or num_magnitude_bins != int(num_magnitude_bins):
            raise ValueError(
                f"num_magnitude_bins is {num_magnitude_bins}; give a whole number of at least 2"
            )
        self.bins = int(num_magnitude_bins)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        space = trivial_augment_space(self.bins)
        samples = np.ascontiguousarray(samples, np.int64)
        tables = (space.codes, space.values, space.signed)
        return draw_trivial_augment(self.seed, self._epoch, samples, *tables)
