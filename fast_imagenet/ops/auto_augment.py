"""AutoAugment with the policy learned on ImageNet: two operations per image, from 25 pairs.

Source: Cubuk, Zoph, Mane, Vasudevan and Le, "AutoAugment", 2019 (arXiv:1805.09501); torchvision
transforms/autoaugment.py, equal to it on Pillow images given the same choices.
"""

import functools

import numpy as np

from .. import rng
from . import policy
from .kernel import kernel
from .operation import KeyedOperation

BINS = 10
# 25 pairs of (operation, probability, bin of its magnitude or None).
IMAGENET_POLICIES = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.8, None), ("Equalize", 0.6, None)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, None), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, None), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, None)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, None)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, None), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, None)),
    (("Equalize", 0.0, None), ("Equalize", 0.8, None)),
    (("Invert", 0.6, None), ("Equalize", 1.0, None)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, None)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, None)),
    (("Color", 0.4, 0), ("Equalize", 0.6, None)),
    (("Equalize", 0.4, None), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, None)),
    (("Invert", 0.6, None), ("Equalize", 1.0, None)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, None), ("Equalize", 0.6, None)),
)


@functools.lru_cache(maxsize=64)
def auto_augment_tables(height: int, width: int) -> tuple[np.ndarray, ...]:
    """The pairs as arrays, for images of one size: codes int64 [25, 2], probabilities float64
    [25, 2], magnitudes float64 [25, 2], signed int64 [25, 2]."""
    names = tuple(name for name in policy.NAMES if name not in ("Identity", "SolarizeAdd"))
    space = policy.rand_augment_space(names, BINS, height, width)
    codes, values = np.empty((25, 2), np.int64), np.empty((25, 2))
    chances, signed = np.empty((25, 2)), np.empty((25, 2), np.int64)
    for i, pair in enumerate(IMAGENET_POLICIES):
        for k, (name, chance, bin_) in enumerate(pair):
            row = names.index(name)
            codes[i, k], chances[i, k], signed[i, k] = space.codes[row], chance, space.signed[row]
            values[i, k] = space.values[row, bin_ or 0]
    return codes, chances, values, signed


@kernel
def draw_auto_augment(seed, epoch, samples, codes, chances, values, signed):
    """Two operations and their arguments for every sample; those left out become IDENTITY.

    Args: samples: int64 [b]. The others: see `auto_augment_tables`.
    Returns: operations int64 [b, 2], arguments float64 [b, 2].
    """
    operations = np.empty((len(samples), 2), np.int64)
    arguments = np.empty((len(samples), 2), np.float64)
    for b in range(len(samples)):
        key = (seed, epoch, samples[b])
        row = rng.integer(0, len(codes), *key, rng.STREAM_POLICY, 0)
        for k in range(2):
            code, value = codes[row, k], values[row, k]
            if signed[row, k] and rng.integer(0, 2, *key, rng.STREAM_SIGN, k):
                value = -value
            arguments[b, k] = policy.resolve_argument(code, value)
            if rng.uniform(*key, rng.STREAM_POLICY, 1 + k) >= chances[row, k]:
                code = policy.IDENTITY
            operations[b, k] = code
    return operations, arguments


class AutoAugment(KeyedOperation):
    """Change every image by one of the 25 pairs of AutoAugment's ImageNet policy.

    Nearest, black outside the source, as torchvision by default.

    Args: seed: of the run.
    Shape: uint8 [b, h, w, 3], changed in place.
    """

    apply = staticmethod(policy.apply_policy)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        return draw_auto_augment(*self.key(samples), *auto_augment_tables(*size))
