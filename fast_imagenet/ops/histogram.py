"""AutoContrast and Equalize as tables of levels, equal to Pillow.

Both read an image's histogram and become a table of 256 levels per channel. `levels` int32 [3, 256]
is the table so far (what earlier operations do to a level): the histogram that counts is the one
of the image as that table makes it, and the new table is composed onto it.

Source: Pillow, ImageOps.autocontrast (no cutoff) and ImageOps.equalize.
"""

import numpy as np

from .kernel import kernel

_BLOCK = 96  # values at a time: a multiple of three channels and of every vector length


@kernel
def count_levels(image_hwc, counts):
    """Histogram of an image.

    Args: image_hwc: uint8 [h, w, 3]. counts: int32 [3, 256], overwritten: pixels of each level.
    """
    # Two in turn: neighboring pixels are often equal, and one count would wait for the other.
    odd = np.zeros((3, 256), np.int32)
    counts[:] = 0
    height, width = image_hwc.shape[:2]
    for y in range(height):
        for x in range(0, width - 1, 2):
            counts[0, image_hwc[y, x, 0]] += 1
            counts[1, image_hwc[y, x, 1]] += 1
            counts[2, image_hwc[y, x, 2]] += 1
            odd[0, image_hwc[y, x + 1, 0]] += 1
            odd[1, image_hwc[y, x + 1, 1]] += 1
            odd[2, image_hwc[y, x + 1, 2]] += 1
        if width % 2:
            for channel in range(3):
                odd[channel, image_hwc[y, width - 1, channel]] += 1
    for channel in range(3):
        for level in range(256):
            counts[channel, level] += odd[channel, level]


@kernel
def level_range(image_hwc, low, high):
    """Darkest and brightest level of each channel, into low and high (int32 [3]).

    A sixth of the time of a histogram: the inner loop becomes vectors (only with whole blocks of a
    fixed length, and with int16 rather than uint8 bounds).
    """
    bounds = np.empty((2, _BLOCK), np.int16)
    bounds[0, :], bounds[1, :] = 255, 0
    values = image_hwc.reshape(image_hwc.size)
    whole = values.size // _BLOCK
    for block in range(whole):
        part = values[block * _BLOCK : (block + 1) * _BLOCK]
        for k in range(_BLOCK):
            value = np.int16(part[k])
            bounds[0, k] = min(bounds[0, k], value)
            bounds[1, k] = max(bounds[1, k], value)
    part = values[whole * _BLOCK :]
    for k in range(part.size):
        value = np.int16(part[k])
        bounds[0, k] = min(bounds[0, k], value)
        bounds[1, k] = max(bounds[1, k], value)
    low[:], high[:] = 255, 0
    for k in range(_BLOCK):
        low[k % 3] = min(low[k % 3], bounds[0, k])
        high[k % 3] = max(high[k % 3], bounds[1, k])


@kernel
def stretch_lut(levels, low, high):
    """Compose onto `levels` the stretch of low[c]..high[c] (levels after the table) to 0..255."""
    for channel in range(3):
        span = high[channel] - low[channel]
        if span <= 0:
            continue
        scale = 255.0 / span
        offset = -low[channel] * scale
        for level in range(256):
            stretched = int(levels[channel, level] * scale + offset)
            levels[channel, level] = min(max(stretched, 0), 255)


@kernel
def autocontrast_lut(levels, counts):
    """Compose Pillow's autocontrast onto `levels`.

    Args: levels: int32 [3, 256], changed. counts: int32 [3, 256], of the image before `levels`.
    """
    low, high = np.full(3, 255, np.int32), np.zeros(3, np.int32)
    for channel in range(3):
        for level in range(256):
            if counts[channel, level] > 0:
                low[channel] = min(low[channel], levels[channel, level])
                high[channel] = max(high[channel], levels[channel, level])
    stretch_lut(levels, low, high)


@kernel
def equalize_lut(levels, counts):
    """Compose Pillow's equalize onto `levels`. Arguments as `autocontrast_lut`."""
    now, table = np.empty(256, np.int64), np.empty(256, np.int64)
    for channel in range(3):
        now[:] = 0
        total = 0
        for level in range(256):
            now[levels[channel, level]] += counts[channel, level]
            total += counts[channel, level]
        last = 255
        while last > 0 and now[last] == 0:
            last -= 1
        step = (total - now[last]) // 255
        if step == 0:  # one level only, or too few pixels: Pillow leaves the channel as it is
            continue
        below = step // 2
        for level in range(256):
            table[level] = min(255, below // step)
            below += now[level]
        for level in range(256):
            levels[channel, level] = table[levels[channel, level]]
