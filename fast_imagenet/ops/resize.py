"""Antialiased resize of a box of an RGB image, with the flip for free.

Semantics are those of Pillow's resize (triangle filter for bilinear, a = -0.5 for bicubic, widened
when shrinking), applied to the cropped box: the filter never reads beside it, as when torchvision
crops first and resizes after. Bilinear weighs rows first, one output row at a time, in float32 with
a single rounding at the end: within 1 level of Pillow, which rounds between its two passes. Bicubic
follows Pillow's order (columns first, rounded and clipped between), because its negative weights
overshoot and the clip between the passes shows. Area is the mean over the source area under each
output pixel, as OpenCV's INTER_AREA that FFCV resizes with, sharper than the filters; a box that is
enlarged is interpolated linearly.

Source: Pillow, src/libImaging/Resample.c (precompute_coeffs); OpenCV, resize.cpp
(computeResizeAreaTab).
"""

import math

import numpy as np
from numba import carray

from .kernel import kernel
from .vectors import as_pointer, store_byte, weigh_2, weigh_4, weigh_6, weigh_any

BILINEAR = 0
BICUBIC = 1
AREA = 2
METHODS = {"bilinear": BILINEAR, "bicubic": BICUBIC, "area": AREA}


@kernel(inline="always")
def _filter(x, method):
    x = abs(x)
    if method != BICUBIC:
        return max(0.0, 1.0 - x)
    if x < 1.0:
        return ((1.5 * x) - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@kernel
def filter_taps(start, length, out, low, high, method):
    """Where each output position reads, and with which weights.

    Args: start, length: the box along one axis in source pixels (float64). out: output positions.
        low, high: source pixels that may be read, [low, high). method: BILINEAR, BICUBIC or AREA.
    Returns: first (int64 [out], in [low, high)), counts (int64 [out], >= 1), weights (float32
        [out, most taps, made even], each row sums to 1 and is zero beyond its count).
    """
    scale = length / out
    stretch = max(scale, 1.0)
    is_area = method == AREA and scale > 1.0
    support = stretch * (2.0 if method == BICUBIC else 1.0)
    most = 2 * math.ceil(support) + 2
    first, counts = np.empty(out, np.int64), np.empty(out, np.int64)
    weights = np.zeros((out, most), np.float32)
    exact = np.empty(most)
    for x in range(out):
        center = start + (x + 0.5) * scale
        left, right = center - support, center + support
        if is_area:  # the pixels that it touches; beyond 1e-3 of one, as OpenCV
            left, right = start + x * scale, start + (x + 1) * scale
            begin = max(low, min(high - 1, math.floor(left + 1e-3)))
            end = min(high, max(begin + 1, math.ceil(right - 1e-3)))
        else:
            begin = max(low, min(high - 1, math.floor(left + 0.5)))
            end = min(high, max(begin + 1, math.floor(right + 0.5)))
        total = 0.0
        for k in range(end - begin):
            pixel = begin + k
            if is_area:
                exact[k] = max(0.0, min(right, pixel + 1.0) - max(left, float(pixel)))
            else:
                exact[k] = _filter((pixel - center + 0.5) / stretch, method)
            total += exact[k]
        first[x], counts[x] = begin, end - begin
        for k in range(end - begin):
            # A box narrower than a pixel may leave no weight at all: read the nearest pixel.
            weights[x, k] = exact[k] / total if total != 0.0 else 1.0 / (end - begin)
    used = counts.max()
    return first, counts, np.ascontiguousarray(weights[:, : used + used % 2])


@kernel(fastmath={"contract"})
def _weigh_rows(source, pitch, first, count, weights, row):
    """row[:] = sum over k of weights[k] * source row (first + k); four rows at a time."""
    n = row.shape[0]
    for k in range(0, count, 4):
        w0 = weights[k]
        w1 = weights[k + 1] if k + 1 < count else np.float32(0)
        w2 = weights[k + 2] if k + 2 < count else np.float32(0)
        w3 = weights[k + 3] if k + 3 < count else np.float32(0)
        last = count - 1
        at = source + np.uintp((first + k) * pitch)
        a = carray(as_pointer(at), n, np.uint8)
        b = carray(as_pointer(at + np.uintp((min(k + 1, last) - k) * pitch)), n, np.uint8)
        c = carray(as_pointer(at + np.uintp((min(k + 2, last) - k) * pitch)), n, np.uint8)
        d = carray(as_pointer(at + np.uintp((min(k + 3, last) - k) * pitch)), n, np.uint8)
        if k == 0 and count <= 2:
            for i in range(n):
                row[i] = w0 * np.float32(a[i]) + w1 * np.float32(b[i])
        elif k == 0 and count == 3:
            for i in range(n):
                row[i] = w0 * np.float32(a[i]) + w1 * np.float32(b[i]) + w2 * np.float32(c[i])
        elif k == 0:
            for i in range(n):
                row[i] = (w0 * np.float32(a[i]) + w1 * np.float32(b[i])) + (
                    w2 * np.float32(c[i]) + w3 * np.float32(d[i])
                )
        else:
            for i in range(n):
                row[i] += (w0 * np.float32(a[i]) + w1 * np.float32(b[i])) + (
                    w2 * np.float32(c[i]) + w3 * np.float32(d[i])
                )


@kernel
def _weigh_columns(row, other_row, origin, first, weights, flip, out, other_out):
    """Two output rows (uint8 RGB at addresses `out`) from float32 rows that begin at `origin`."""
    width, taps = weights.shape
    spare = np.empty(2, np.uint32)  # the last pixels must not write a fourth byte behind the row
    spare_0 = np.uintp(spare.ctypes.data)
    last = width - 1
    step = np.uintp(4 * taps)
    base = np.uintp(weights.ctypes.data)
    row -= np.uintp(12 * origin)
    other_row -= np.uintp(12 * origin)
    for x in range(width):
        tap = last - x if flip else x
        pixel, other_pixel = out + np.uintp(3 * x), other_out + np.uintp(3 * x)
        if x == last:
            pixel, other_pixel = spare_0, spare_0 + np.uintp(4)
        offset = np.uintp(12 * first[tap])
        begin, other = row + offset, other_row + offset
        weight = base + step * np.uintp(tap)
        if taps == 2:
            weigh_2(begin, other, weight, 1, pixel, other_pixel)
        elif taps == 4:
            weigh_4(begin, other, weight, 2, pixel, other_pixel)
        elif taps == 6:
            weigh_6(begin, other, weight, 3, pixel, other_pixel)
        else:
            weigh_any(begin, other, weight, taps // 2, pixel, other_pixel)
    for channel in range(3):
        end, shift = np.uintp(3 * last + channel), np.uint32(8 * channel)
        store_byte(out + end, np.uint8((spare[0] >> shift) & np.uint32(255)))
        store_byte(other_out + end, np.uint8((spare[1] >> shift) & np.uint32(255)))


@kernel
def _rows_then_columns(source, pitch, columns, vertical, horizontal, flip, out):
    low, high = columns
    first, weights = horizontal[0], horizontal[2]
    pair = np.zeros((2, 3 * (high - low + weights.shape[1]) + 4), np.float32)
    source += np.uintp(3 * low)
    row, height = 3 * len(first), len(vertical[0])
    for y in range(0, height, 2):
        end = min(y + 2, height)
        for k in range(y, end):
            used = pair[k - y, : 3 * (high - low)]
            _weigh_rows(source, pitch, vertical[0][k], vertical[1][k], vertical[2][k], used)
        _weigh_columns(
            *(np.uintp(pair.ctypes.data), np.uintp(pair[end - 1 - y].ctypes.data), low),
            *(first, weights, flip, out + np.uintp(row * y), out + np.uintp(row * (end - 1))),
        )


@kernel
def _columns_then_rows(source, pitch, rows, columns, vertical, horizontal, flip, out):
    width, height = len(horizontal[0]), rows[1] - rows[0]
    narrow = np.empty((height, 3 * width), np.uint8)
    places, counts = np.arange(rows[0], rows[1]), np.ones(height, np.int64)
    each = (places, counts, np.ones((height, 1), np.float32))
    place = np.uintp(narrow.ctypes.data)
    _rows_then_columns(source, pitch, columns, each, horizontal, flip, place)
    unit = np.zeros((width, 2), np.float32)
    unit[:, 0] = 1.0
    whole = (np.arange(width), np.ones(width, np.int64), unit)
    below = (vertical[0] - rows[0], vertical[1], vertical[2])
    _rows_then_columns(place, 3 * width, (0, width), below, whole, False, out)
    narrow[0, 0] = 0  # a local array is freed once only its address is in use


@kernel
def resize_box(source, pitch, rows, columns, box, out, out_height, out_width, flip, method):
    """Resize a box of an image in memory.

    Args: source: address of uint8 RGB rows, `pitch` bytes apart. rows, columns: (low, high) source
        pixels that may be read. box: (top, left, height, width) float64, within them. out: address
        of out_height * out_width * 3 contiguous bytes. flip: mirror left-right. method: BILINEAR,
        BICUBIC or AREA. Nothing is checked here.
    """
    top, left, height, width = box
    vertical = filter_taps(top, height, out_height, rows[0], rows[1], method)
    horizontal = filter_taps(left, width, out_width, columns[0], columns[1], method)
    if method != BICUBIC:
        _rows_then_columns(source, pitch, columns, vertical, horizontal, flip, out)
    else:
        _columns_then_rows(source, pitch, rows, columns, vertical, horizontal, flip, out)
