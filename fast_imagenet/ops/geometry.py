"""Affine maps of an image, equal to Pillow: nearest in 16.16 fixed point, bilinear in float64.

A map is given as Pillow gives it, by its inverse (a, b, c, d, e, f): the output pixel with center
(x + 0.5, y + 0.5) reads the source at (a x + b y + c, d x + e y + f). Where that lies outside the
source the output takes the fill color. Pillow's special cases (plain copies for 0, 90, 180 and
270 degrees, another path for shifts) need no code here: the general formula gives the same pixels.
Only for a map that scales without turning may a pixel differ (Pillow adds up its positions in
floating point there); no operation here makes one.

Source: Pillow, src/libImaging/Geometry.c (affine_fixed, bilinear_filter32RGB) and Image.rotate.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .kernel import kernel
from .vectors import (
    BYTE,
    INT32,
    load,
    load_byte,
    load_pixel,
    memcpy,
    splat,
    store_byte,
    store_pixel,
    vector,
)

SLACK = 4  # bytes that must be readable behind a source: pixels are read four bytes at a time
_ONE = 1 << 16
_SPLITTER = 2.0**27 + 1.0


# ==== Maps ========================================================================================


@kernel
def shear_map(along_x, along_y):
    """Shear about the top left corner: the source lies at (x + along_x y, y + along_y x)."""
    return (1.0, along_x, 0.0, along_y, 1.0, 0.0)


@kernel
def shift_map(right, down):
    """Move the content by (right, down) pixels."""
    return (1.0, 0.0, -right, 0.0, 1.0, -down)


@kernel(inline="always")
def _split(value):
    """A float64 as the sum of two of 26 bits, whose products are exact (Veltkamp)."""
    high = value * _SPLITTER
    high = high - (high - value)
    return high, value - high


@kernel
def _round_15(value):
    """Python's round(value, 15) for |value| <= 1: Pillow makes the multiples of 90 degrees exact
    with it. The plain product is too coarse: at 45 degrees it falls on a half."""
    scaled = value * 1e15
    high, low = _split(value)
    big, small = _split(1e15)
    lost = ((high * big - scaled) + high * small + low * big) + low * small
    whole = np.rint(scaled)
    rest = (scaled - whole) + lost
    if rest > 0.5:
        whole += 1.0
    elif rest < -0.5:
        whole -= 1.0
    return whole / 1e15


@kernel
def rotation_map(degrees, height, width):
    """Turn the content counter-clockwise about the center, as Pillow's Image.rotate."""
    angle = -math.radians(degrees % 360.0)
    cosine, sine = _round_15(math.cos(angle)), _round_15(math.sin(angle))
    x, y = width / 2.0, height / 2.0
    return (
        *(cosine, sine, cosine * -x + sine * -y + x),
        *(-sine, cosine, -sine * -x + cosine * -y + y),
    )


@kernel
def compose_maps(first, second):
    """The map that does `first`, then `second` on its result."""
    a, b, c, d, e, f = first
    k, l, m, n, o, p = second  # noqa: E741
    return (
        *(a * k + b * n, a * l + b * o, a * m + b * p + c),
        *(d * k + e * n, d * l + e * o, d * m + e * p + f),
    )


@kernel
def is_identity(inverse):
    """Whether a map leaves every pixel where it is."""
    return inverse == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


# ==== Nearest =====================================================================================


@kernel
def _fixed(value):
    return np.int64(math.floor(value * 65536.0 + 0.5))


@kernel
def _steps_inside(start, slope, limit, count):
    """The range of x in [0, count) with 0 <= start + slope * x < limit, as (first, end)."""
    if slope == 0:
        return (0, count) if 0 <= start < limit else (0, 0)
    if slope > 0:
        first, end = -(start // slope), (limit - 1 - start) // slope + 1
    else:
        first, end = -((limit - 1 - start) // -slope), start // -slope + 1
    first = min(max(first, 0), count)
    return first, max(first, min(end, count))


@kernel
def _fill_pixels(row, first, end, fill):
    for x in range(first, end):
        for channel in range(3):
            store_byte(row + np.uintp(3 * x + channel), np.uint8(fill[channel]))


@kernel
def _copy_line(source, pitch, x0, y0, slope_x, slope_y, row, first, end):
    """Pixels first to end of one output row; 16.16 source positions from (x0, y0)."""
    if first >= end:
        return
    if slope_y == 0 and slope_x == _ONE:
        at = (y0 >> 16) * pitch + 3 * ((x0 >> 16) + first)
        memcpy(row + np.uintp(3 * first), source + np.uintp(at), np.uint64(3 * (end - first)))
        return
    last = end - 1
    for x in range(first, last):
        at = ((y0 + slope_y * x) >> 16) * pitch + 3 * ((x0 + slope_x * x) >> 16)
        store_pixel(row + np.uintp(3 * x), load_pixel(source + np.uintp(at)))
    # Alone: a fourth byte behind it may belong to the next image, which another thread writes.
    at = ((y0 + slope_y * last) >> 16) * pitch + 3 * ((x0 + slope_x * last) >> 16)
    for channel in range(3):
        value = load_byte(source + np.uintp(at + channel))
        store_byte(row + np.uintp(3 * last + channel), value)


@kernel
def resample_nearest(source, inverse, fill, image_hwc):
    """Write the image at `source` through a map: Pillow's transform with NEAREST, bit for bit.

    Args: source: address of uint8 [h, w, 3], contiguous, SLACK bytes more readable; not the memory
        of image_hwc. inverse: (a, b, c, d, e, f) float64. fill: (r, g, b), 0 to 255. image_hwc:
        uint8 [h, w, 3], contiguous, written. Exact for positions within +-32767 pixels.
    """
    height, width = image_hwc.shape[:2]
    a, b, c, d, e, f = inverse
    left, top = _fixed(c + a * 0.5 + b * 0.5), _fixed(f + d * 0.5 + e * 0.5)
    across_x, across_y, down_x, down_y = _fixed(a), _fixed(d), _fixed(b), _fixed(e)
    target = np.uintp(image_hwc.ctypes.data)
    for y in range(height):
        x0, y0 = left + down_x * y, top + down_y * y
        first, end = _steps_inside(x0, across_x, width << 16, width)
        begin, stop = _steps_inside(y0, across_y, height << 16, width)
        first = max(first, begin)
        end = max(first, min(end, stop))
        row = target + np.uintp(3 * width * y)
        _fill_pixels(row, 0, first, fill)
        _copy_line(source, 3 * width, x0, y0, across_x, across_y, row, first, end)
        _fill_pixels(row, end, width, fill)


# ==== Bilinear ====================================================================================


_DOUBLES = vector(ir.DoubleType(), 4)


def _load_doubles(builder, address):
    """One pixel, and a byte of the next, as four float64."""
    levels = load(builder, address, vector(BYTE, 4))
    return builder.sitofp(builder.zext(levels, vector(INT32, 4)), _DOUBLES)


@intrinsic
def blend_pixels(typing_context, left, right, lower_left, lower_right, part_x, part_y):
    """Bilinear mean of four pixels: uint32 as `load_pixel` gives it, truncated, not rounded.

    Args: addresses of the pixels, four bytes readable at each. part_x, part_y: float64 in [0, 1),
        weight of the right and of the lower ones. No product is fused with a sum: Pillow's are not.
    """

    def generate(context, builder, signature, arguments):
        corners = [_load_doubles(builder, address) for address in arguments[:4]]
        parts = [splat(builder, part, 4) for part in arguments[4:]]

        def blend(a, b, part):
            return builder.fadd(a, builder.fmul(builder.fsub(b, a), part))

        upper, lower = (blend(corners[k], corners[k + 1], parts[0]) for k in (0, 2))
        mean = builder.fptosi(blend(upper, lower, parts[1]), vector(INT32, 4))
        return builder.bitcast(builder.trunc(mean, vector(BYTE, 4)), INT32)

    return types.uint32(*[types.uintp] * 4, types.float64, types.float64), generate


@kernel(inline="always")
def _bilinear_pixel(source, at_x, at_y, height, width):
    """The pixel at a position inside the source; neighbors outside repeat the edge."""
    at_x -= 0.5
    at_y -= 0.5
    left, top = np.int64(math.floor(at_x)), np.int64(math.floor(at_y))
    upper, lower = 3 * width * max(top, 0), 3 * width * min(top + 1, height - 1)
    near, far = 3 * max(left, 0), 3 * min(left + 1, width - 1)
    return blend_pixels(
        *(source + np.uintp(upper + near), source + np.uintp(upper + far)),
        *(source + np.uintp(lower + near), source + np.uintp(lower + far)),
        *(at_x - left, at_y - top),
    )


@kernel
def resample_bilinear(source, inverse, fill, image_hwc):
    """As `resample_nearest`, with BILINEAR in float64."""
    height, width = image_hwc.shape[:2]
    a, b, c, d, e, f = inverse
    outside = np.uint32(fill[0] | fill[1] << 8 | fill[2] << 16)
    target = np.uintp(image_hwc.ctypes.data)
    for y in range(height):
        row, pixel = target + np.uintp(3 * width * y), outside
        for x in range(width):
            at_x = a * (x + 0.5) + b * (y + 0.5) + c
            at_y = d * (x + 0.5) + e * (y + 0.5) + f
            if at_x < 0.0 or at_x >= width or at_y < 0.0 or at_y >= height:
                pixel = outside
            else:
                pixel = _bilinear_pixel(source, at_x, at_y, height, width)
            if x < width - 1:
                store_pixel(row + np.uintp(3 * x), pixel)
        for channel in range(3):  # alone, as in `_copy_line`
            value = np.uint8((pixel >> np.uint32(8 * channel)) & np.uint32(255))
            store_byte(row + np.uintp(3 * (width - 1) + channel), value)
