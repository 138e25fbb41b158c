"""RandAugment: a few operations per image, drawn uniformly, all of the same magnitude.

And TrivialAugmentWide: one, its magnitude drawn over a wide range.

RandAugment has three modes. 'lite', the default, is made to be cheap: torchvision's operations that
fold into one table of levels and one affine map. 'full' is torchvision's RandAugment, 'timm' is
timm's rand-m{magnitude}-mstd{mstd}-inc1; both equal the original on Pillow images pixel for pixel,
given the same choices.

Source: Cubuk, Zoph, Shlens and Le, "RandAugment", 2020 (arXiv:1909.13719); torchvision
transforms/autoaugment.py; timm data/auto_augment.py.
"""

import functools
import math

import numpy as np

from .. import rng
from . import policy
from .kernel import kernel
from .operation import KeyedOperation, check_count
from .policy import apply_policy, apply_policy_bilinear, apply_policy_lite

FULL_NAMES = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
LITE_NAMES = tuple(name for name in FULL_NAMES if name not in ("Color", "Sharpness"))
TIMM_NAMES = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness"),
    *("ShearX", "ShearY", "TranslateX", "TranslateY"),
)
MODES = ("lite", "full", "timm")
TIMM_TOP = 10.0  # timm's strongest magnitude
TIMM_FRACTION = 0.5  # of the drawn operations that timm applies
TIMM_FILL = (124, 116, 104)  # mean color of ImageNet
ANY_BIN = -1.0  # in place of a standard deviation: every bin is equally likely


@kernel
def draw_rand_augment(seed, epoch, samples, num_ops, codes, values, signed, magnitude, mstd):
    """Operations and arguments of every sample, for 'lite' and 'full'.

    Args: samples: int64 [b]. num_ops: n. codes, values, signed: a `policy.Space`. magnitude: bin,
        need not be whole. mstd: its standard deviation in bins, each operation drawn anew; or
        ANY_BIN.
    Returns: operations int64 [b, n], arguments float64 [b, n].
    """
    operations = np.empty((len(samples), num_ops), np.int64)
    arguments = np.empty((len(samples), num_ops), np.float64)
    top = values.shape[1] - 1.0
    for b in range(len(samples)):
        for k in range(num_ops):
            key = (seed, epoch, samples[b])
            row = rng.integer(0, len(codes), *key, rng.STREAM_POLICY, k)
            if mstd == ANY_BIN:
                strength = float(rng.integer(0, values.shape[1], *key, rng.STREAM_MAGNITUDE, k))
            else:
                strength = policy.draw_magnitude(*key, k, magnitude, mstd, top)
            value = policy.magnitude_between(values[row], strength)
            if signed[row] and rng.integer(0, 2, *key, rng.STREAM_SIGN, k):
                value = -value
            operations[b, k] = codes[row]
            arguments[b, k] = policy.resolve_argument(codes[row], value)
    return operations, arguments


@kernel
def timm_argument(code, level, sign, height, width):
    """Argument of one of timm's 'increasing' operations.

    Args: level: 0 to 10. sign: 1.0 or -1.0. height, width: of the image.
    """
    part = level / TIMM_TOP
    if code == policy.ROTATE:
        return sign * (part * 30.0)
    if code == policy.SHEAR_X or code == policy.SHEAR_Y:
        return sign * (part * 0.3)
    if code == policy.TRANSLATE_X:  # timm states where the source lies, not where content goes
        return -(sign * (part * 0.45) * width)
    if code == policy.TRANSLATE_Y:
        return -(sign * (part * 0.45) * height)
    if code == policy.POSTERIZE:
        return 4.0 - int(part * 4.0)
    if code == policy.SOLARIZE:
        return 256.0 - min(256, int(part * 256.0))
    if code == policy.SOLARIZE_ADD:
        return float(min(128, int(part * 110.0)))
    return max(0.1, 1.0 + sign * (part * 0.9))


@kernel
def draw_rand_augment_timm(seed, epoch, samples, num_ops, codes, magnitude, mstd, height, width):
    """As `draw_rand_augment` for timm's operations; half of those drawn become IDENTITY."""
    operations = np.empty((len(samples), num_ops), np.int64)
    arguments = np.empty((len(samples), num_ops), np.float64)
    for b in range(len(samples)):
        for k in range(num_ops):
            key = (seed, epoch, samples[b])
            code = codes[rng.integer(0, len(codes), *key, rng.STREAM_POLICY, 2 * k)]
            level = policy.draw_magnitude(*key, k, magnitude, mstd, TIMM_TOP)
            sign = 1.0 - 2.0 * rng.integer(0, 2, *key, rng.STREAM_SIGN, k)
            arguments[b, k] = timm_argument(code, level, sign, height, width)
            if rng.uniform(*key, rng.STREAM_POLICY, 2 * k + 1) >= TIMM_FRACTION:
                code = policy.IDENTITY
            operations[b, k] = code
    return operations, arguments


class RandAugment(KeyedOperation):
    """Change every image by `num_ops` operations drawn with replacement.

    Args:
        num_ops: operations per image, at least 1.
        magnitude: strength of all of them: a bin, 0 to num_magnitude_bins - 1, or 0 to 10 in mode
            'timm'. It need not be whole: between two bins the value is interpolated.
        mode: 'lite': the twelve of torchvision's fourteen operations without Color and Sharpness.
            An image's point operations act first, in the order drawn (AutoContrast, Equalize and
            Contrast read the image as those before left it), then all its geometric ones as one
            affine map with one nearest resample, black outside the source.
            'full': torchvision's fourteen, in the order drawn, nearest, black.
            'timm': fifteen operations, each applied with probability 0.5, bilinear (timm draws
            bilinear or bicubic by default; here it is always bilinear), outside (124, 116, 104).
        mstd: standard deviation of the magnitude, drawn for each operation, clipped to its range;
            above 100, as in timm, the magnitude is uniform from 0 to `magnitude` instead.
        num_magnitude_bins: at least 2; not used by 'timm'.
        seed: of the run; with epoch and sample index it decides every draw.

    Shape: uint8 [b, h, w, 3], changed in place.
    Raises: ValueError for a setting outside its range.
    Source: torchvision RandAugment; timm rand_augment_transform.
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: float = 9.0,
        *,
        mode: str = "lite",
        mstd: float = 0.0,
        num_magnitude_bins: int = 31,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; give one of {', '.join(MODES)}")
        self.num_ops = check_count(num_ops, 1, "num_ops")
        self.bins = check_count(num_magnitude_bins, 2, "num_magnitude_bins")
        top = TIMM_TOP if mode == "timm" else self.bins - 1
        if not 0 <= magnitude <= top:
            raise ValueError(f"magnitude is {magnitude}; in mode {mode!r} give 0 to {top:g}")
        if math.isnan(mstd) or mstd < 0:
            raise ValueError(f"mstd is {mstd}; give 0 (no noise) or more")
        self.magnitude, self.mode, self.mstd = float(magnitude), mode, float(mstd)
        kernels = {"lite": apply_policy_lite, "full": apply_policy, "timm": apply_policy_bilinear}
        self.apply = kernels[mode]

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        key, strength = (*self.key(samples), self.num_ops), (self.magnitude, self.mstd)
        if self.mode == "timm":
            codes = np.array([policy.NAMES.index(name) for name in TIMM_NAMES], np.int64)
            choices = draw_rand_augment_timm(*key, codes, *strength, *size)
            return *choices, np.tile(np.array(TIMM_FILL, np.int64), (len(samples), 1))
        names = LITE_NAMES if self.mode == "lite" else FULL_NAMES
        tables = policy.rand_augment_space(names, self.bins, *size)
        return draw_rand_augment(*key, *tables, *strength)


@functools.lru_cache(maxsize=8)
def trivial_augment_space(bins: int) -> policy.Space:
    """torchvision's magnitudes for TrivialAugmentWide; they do not depend on the size."""
    strongest = dict(shear=0.99, right=32.0, down=32.0, degrees=135.0, factor=0.99)
    return policy.augmentation_space(FULL_NAMES, bins, bits=6, **strongest)


class TrivialAugmentWide(KeyedOperation):
    """Change every image by one of torchvision's fourteen operations, black outside.

    Args: bilinear: as torchvision's references/classification resample; else nearest, its default.
        num_magnitude_bins: magnitudes to draw from, at least 2. seed: of the run.
    Shape: uint8 [b, h, w, 3], changed in place.
    Raises: ValueError for fewer than 2 bins.
    Source: Mueller and Hutter, "TrivialAugment", 2021 (arXiv:2103.10158); torchvision, equal
        to it on Pillow images given the same choices.
    """

    def __init__(
        self, *, bilinear: bool = False, num_magnitude_bins: int = 31, seed: int = 0
    ) -> None:
        super().__init__(seed)
        self.bilinear, self.apply = bilinear, apply_policy_bilinear if bilinear else apply_policy
        self.bins = check_count(num_magnitude_bins, 2, "num_magnitude_bins")

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        tables = trivial_augment_space(self.bins)
        choices = draw_rand_augment(*self.key(samples), 1, *tables, 0.0, ANY_BIN)
        return (*choices, np.zeros((len(samples), 3), np.int64)) if self.bilinear else choices
