"""What the automatic policies share: their sixteen operations, magnitudes, and how to apply them.

A choice is an operation (one of the numbers below) with its argument, in the operation's own unit:

    SHEAR_X, SHEAR_Y            slope: the source lies `argument` pixels further per row or column
    TRANSLATE_X, TRANSLATE_Y    pixels by which the content moves right or down
    ROTATE                      degrees counter-clockwise
    BRIGHTNESS, COLOR, CONTRAST, SHARPNESS    factor; 1 changes nothing
    POSTERIZE                   bits that are kept, 0 to 8
    SOLARIZE                    threshold: levels from there on are inverted
    SOLARIZE_ADD                added to levels below 128
    IDENTITY, AUTO_CONTRAST, EQUALIZE, INVERT    not used

Operations on single levels ("point") are not applied one by one: they are composed into one table
of levels, and so cost one pass together, or none where a resample follows and copies through it.

Axes: b batch, h height, w width, c channel (RGB), n operations of one image.
Source: torchvision, transforms/autoaugment.py, on Pillow images.
"""

import functools
from typing import NamedTuple

import numpy as np

from .. import rng
from . import color, geometry
from .histogram import autocontrast_lut, count_levels, equalize_lut, level_range, stretch_lut
from .kernel import kernel
from .vectors import load_pixel, memcpy, store_pixel

NAMES = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Color", "Sharpness"),
    *("Brightness", "Contrast", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert"),
    "SolarizeAdd",
)
IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE = range(6)
COLOR, SHARPNESS = 6, 7
BRIGHTNESS, CONTRAST, POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE, INVERT = range(8, 15)
SOLARIZE_ADD = 15

BLACK = (0, 0, 0)
# timm's word for a magnitude that is uniform from 0 instead of normal.
UNIFORM_MSTD = 100.0


# ==== Magnitudes ==================================================================================


class Space(NamedTuple):
    """The operations a policy draws from, and the magnitude of each at every bin.

    codes: int64 [k]. values: float64 [k, bins], magnitudes as torchvision writes them: those of the
    enhancers are added to 1. signed: int64 [k], 1 where half of the draws are negated.
    """

    codes: np.ndarray
    values: np.ndarray
    signed: np.ndarray


def _ramp(end: float, bins: int) -> np.ndarray:
    """torch.linspace(0, end, bins) in float32, as float64: what torch gives without vector code.

    With it, torch's last digit depends on the processor; these values do not.
    """
    step = np.float32(end) / np.float32(bins - 1)
    index = np.arange(bins, dtype=np.float32)
    low, high = step * index, np.float32(end) - step * (np.float32(bins - 1) - index)
    return np.where(index < bins // 2, low, high).astype(np.float64)


def augmentation_space(
    names: tuple[str, ...],
    bins: int,
    *,
    shear: float,
    right: float,
    down: float,
    degrees: float,
    factor: float,
    bits: int,
) -> Space:
    """Magnitudes from nothing (bin 0) to the strongest (bin `bins - 1`).

    Args: names: of the operations, from NAMES. bins: at least 2. shear: slope; right, down: pixels;
        degrees; factor: distance from 1; bits: dropped by Posterize: each at the strongest.
    """
    # For Solarize torch counts down from 255 to 0: the same steps from the other end.
    drop = np.rint(np.arange(bins, dtype=np.float32) / np.float32((bins - 1) / bits))
    enhance = (_ramp(factor, bins), True)
    table = {
        "ShearX": (_ramp(shear, bins), True),
        "ShearY": (_ramp(shear, bins), True),
        "TranslateX": (_ramp(right, bins), True),
        "TranslateY": (_ramp(down, bins), True),
        "Rotate": (_ramp(degrees, bins), True),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), enhance),
        "Posterize": (8.0 - drop, False),
        "Solarize": (_ramp(255.0, bins)[::-1], False),
    }
    rows = [table.get(name, (np.zeros(bins), False)) for name in names]
    return Space(
        codes=np.array([NAMES.index(name) for name in names], np.int64),
        values=np.ascontiguousarray([values for values, _ in rows], np.float64),
        signed=np.array([signed for _, signed in rows], np.int64),
    )


@functools.lru_cache(maxsize=64)
def rand_augment_space(names: tuple[str, ...], bins: int, height: int, width: int) -> Space:
    """The magnitudes of torchvision's RandAugment and AutoAugment for images of one size."""
    reach = 150.0 / 331.0
    size = dict(right=reach * width, down=reach * height)
    return augmentation_space(names, bins, shear=0.3, degrees=30.0, factor=0.9, bits=4, **size)


@kernel
def resolve_argument(code, magnitude):
    """torchvision's signed magnitude in the unit of the operation, see the head of this file."""
    if BRIGHTNESS <= code <= CONTRAST or COLOR <= code <= SHARPNESS:
        return 1.0 + magnitude
    if code in (TRANSLATE_X, TRANSLATE_Y):
        return np.trunc(magnitude)
    if code == POSTERIZE:
        return np.rint(magnitude)
    return magnitude


@kernel
def draw_magnitude(seed, epoch, sample, counter, magnitude, mstd, top):
    """N(magnitude, mstd) clipped to [0, top]; uniform in [0, magnitude] where mstd > 100."""
    if mstd > UNIFORM_MSTD:
        return magnitude * rng.uniform(seed, epoch, sample, rng.STREAM_MAGNITUDE, counter)
    if mstd > 0.0:
        magnitude += mstd * rng.normal(seed, epoch, sample, rng.STREAM_MAGNITUDE, counter)
    return min(max(magnitude, 0.0), top)


@kernel
def magnitude_between(values, bin_):
    """Value at a bin that need not be whole: linear between its neighbors. values: [bins]."""
    low = int(bin_)
    if low == bin_:
        return values[low]
    return values[low] + (bin_ - low) * (values[low + 1] - values[low])


# ==== One operation ===============================================================================


@kernel
def operation_map(code, argument, height, width):
    """The affine map of a geometric operation, see geometry.py."""
    if code == SHEAR_X:
        return geometry.shear_map(argument, 0.0)
    if code == SHEAR_Y:
        return geometry.shear_map(0.0, argument)
    if code == TRANSLATE_X:
        return geometry.shift_map(argument, 0.0)
    if code == TRANSLATE_Y:
        return geometry.shift_map(0.0, argument)
    return geometry.rotation_map(argument, height, width)


@kernel
def _histogram_lut(code, image_hwc, plain, levels, counts):
    if code == EQUALIZE:
        count_levels(image_hwc, counts)
        equalize_lut(levels, counts)
    elif plain:
        low, high = np.empty(3, np.int32), np.empty(3, np.int32)
        level_range(image_hwc, low, high)
        stretch_lut(levels, low, high)
    else:
        count_levels(image_hwc, counts)
        autocontrast_lut(levels, counts)


@kernel
def point_operation(code, argument, image_hwc, plain, levels, counts):
    """Compose one point operation onto a table.

    Args: image_hwc: the image before the table, for its statistics. plain: whether the table is
        still to be started, as the identity. levels: int32 [3, 256], changed. counts: int32
        [3, 256], overwritten.
    Returns: whether the table is still the identity.
    """
    if plain:
        color.identity_lut(levels)
    if code == BRIGHTNESS and argument != 1.0:
        color.blend_lut(levels, 0, np.float32(argument))
    elif code == CONTRAST and argument != 1.0:
        mean = color.gray_mean(image_hwc) if plain else color.gray_mean_through(image_hwc, levels)
        color.blend_lut(levels, mean, np.float32(argument))
    elif code == POSTERIZE and argument < 8.0:
        color.posterize_lut(levels, np.int64(argument))
    elif code == SOLARIZE and argument < 256.0:
        color.solarize_lut(levels, argument)
    elif code == SOLARIZE_ADD and argument > 0.0:
        color.solarize_add_lut(levels, np.int64(argument), 128.0)
    elif code == INVERT:
        color.solarize_lut(levels, 0.0)
    elif code in (AUTO_CONTRAST, EQUALIZE):
        _histogram_lut(code, image_hwc, plain, levels, counts)
    else:
        return plain
    return False


@kernel
def copy_through(image_hwc, levels, scratch):
    """Copy an image through a table. scratch: uint8 [more than h, w, 3]."""
    table = np.empty((3, 256), np.uint32)
    for level in range(256):
        table[0, level] = levels[0, level]
        table[1, level] = levels[1, level] << 8
        table[2, level] = levels[2, level] << 16
    pixels = image_hwc.shape[0] * image_hwc.shape[1]
    source, target = np.uintp(image_hwc.ctypes.data), np.uintp(scratch.ctypes.data)
    byte = np.uint32(255)
    for k in range(pixels - 1):
        pixel = load_pixel(source + np.uintp(3 * k))
        red, green = pixel & byte, (pixel >> np.uint32(8)) & byte
        blue = (pixel >> np.uint32(16)) & byte
        store_pixel(target + np.uintp(3 * k), table[0, red] | table[1, green] | table[2, blue])
    y, x = image_hwc.shape[0] - 1, image_hwc.shape[1] - 1  # alone: no byte behind it may be read
    for channel in range(3):
        scratch[y, x, channel] = levels[channel, image_hwc[y, x, channel]]


@kernel
def change_levels(image_hwc, levels, scratch):
    """Change an image through a table: by way of a copy, in four-byte loads and stores."""
    copy_through(image_hwc, levels, scratch)
    size = np.uint64(image_hwc.size)
    memcpy(np.uintp(image_hwc.ctypes.data), np.uintp(scratch.ctypes.data), size)


@kernel
def resample(image_hwc, inverse, fill, bilinear, plain, levels, scratch):
    """Replace an image by itself through a table (not where `plain`), then through a map."""
    if plain:
        size = np.uint64(image_hwc.size)
        memcpy(np.uintp(scratch.ctypes.data), np.uintp(image_hwc.ctypes.data), size)
    else:
        copy_through(image_hwc, levels, scratch)
    if bilinear:
        geometry.resample_bilinear(np.uintp(scratch.ctypes.data), inverse, fill, image_hwc)
    else:
        geometry.resample_nearest(np.uintp(scratch.ctypes.data), inverse, fill, image_hwc)


# ==== One image, one batch ======================================================================


@kernel
def _workspace(images_bhwc):
    """Table, histogram and copy of one image, for one thread."""
    _, height, width, _ = images_bhwc.shape
    # One row more than an image: resampling reads a byte behind the last pixel.
    scratch = np.empty((height + 2, width, 3), np.uint8)
    return np.empty((3, 256), np.int32), np.empty((3, 256), np.int32), scratch


@kernel
def _change_in_order(image_hwc, operations, arguments, fill, bilinear, workspace):
    levels, counts, scratch = workspace
    height, width, _ = image_hwc.shape
    plain = True
    for k in range(len(operations)):
        code, argument = operations[k], arguments[k]
        if code >= BRIGHTNESS:
            plain = point_operation(code, argument, image_hwc, plain, levels, counts)
        elif code >= COLOR and argument != 1.0:
            if not plain:
                change_levels(image_hwc, levels, scratch)
                plain = True
            if code == COLOR:
                color.adjust_saturation(image_hwc, np.float32(argument))
            else:
                color.adjust_sharpness(image_hwc, np.float32(argument))
        elif SHEAR_X <= code <= ROTATE:
            inverse = operation_map(code, argument, height, width)
            if not geometry.is_identity(inverse):
                resample(image_hwc, inverse, fill, bilinear, plain, levels, scratch)
                plain = True
    if not plain:
        change_levels(image_hwc, levels, scratch)


@kernel
def apply_policy(first, end, images_bhwc, operations, arguments):
    """Apply each image's operations one after the other: nearest, black outside the source.

    Args: first, end: images first to end - 1 are changed. images_bhwc: uint8 [b, h, w, 3],
        contiguous. operations: int64 [b, n]. arguments: float64 [b, n].
    """
    workspace = _workspace(images_bhwc)
    for b in range(first, end):
        image_hwc = images_bhwc[b]
        _change_in_order(image_hwc, operations[b], arguments[b], BLACK, False, workspace)


@kernel
def apply_policy_bilinear(first, end, images_bhwc, operations, arguments, fills):
    """As `apply_policy` with bilinear resampling; fills: int64 [b, 3], the color outside."""
    workspace = _workspace(images_bhwc)
    for b in range(first, end):
        fill = (fills[b, 0], fills[b, 1], fills[b, 2])
        _change_in_order(images_bhwc[b], operations[b], arguments[b], fill, True, workspace)


@kernel
def apply_policy_lite(first, end, images_bhwc, operations, arguments):
    """Apply each image's point operations, then its geometric ones as one nearest resample.

    Arguments as `apply_policy`; COLOR and SHARPNESS are passed over.
    """
    workspace = _workspace(images_bhwc)
    levels, counts, scratch = workspace
    _, height, width, _ = images_bhwc.shape
    for b in range(first, end):
        image_hwc = images_bhwc[b]
        plain, inverse = True, geometry.shift_map(0.0, 0.0)
        for k in range(operations.shape[1]):
            code, argument = operations[b, k], arguments[b, k]
            if code >= BRIGHTNESS:
                plain = point_operation(code, argument, image_hwc, plain, levels, counts)
            elif SHEAR_X <= code <= ROTATE:
                inverse = geometry.compose_maps(
                    inverse, operation_map(code, argument, height, width)
                )
        if not geometry.is_identity(inverse):
            resample(image_hwc, inverse, BLACK, False, plain, levels, scratch)
        elif not plain:
            change_levels(image_hwc, levels, scratch)
