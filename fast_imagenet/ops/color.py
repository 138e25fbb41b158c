"""Color kernels on one image, in place and equal to Pillow bit for bit.

Two kinds. `adjust_...`, `to_grayscale` and `gaussian_blur` change an image. `..._lut` change a
table lut[3, 256] (int32): each acts on what the table already gives, so point operations compose,
and applying it then costs one pass however many there were.

An image is uint8 [h, w, 3], RGB, contiguous, h and w at least 1. A factor is a float32 of 0 or
more: 0 gives the degenerate image, 1 the original, more than 1 exaggerates.

Source: Pillow's Blend.c, Convert.c, Filter.c, BoxBlur.c, ImageEnhance.py, ImageOps.py; the hue
shift is torchvision's on PIL images.
"""

import math

import numpy as np

from .color_simd import PIXELS, blend_and_sum_block, blend_block, sum_block
from .kernel import kernel

SIXTH = 1.0 / 6.0  # Pillow divides; over all 2**24 colors the products lead to the same bytes
ZERO, TOP = np.float32(0.0), np.float32(255.0)


@kernel(inline="always")
def gray(red, green, blue):
    """Pillow's luma of one pixel: int, 0 to 255."""
    return (19595 * np.int32(red) + 38470 * np.int32(green) + 7471 * np.int32(blue) + 32768) >> 16


@kernel(inline="always")
def blend(degenerate, value, factor):
    """Pillow's blend of two bytes: float32 arithmetic, clipped, truncated. Returns int32."""
    # Without the outer int32 the difference is 64 bits wide, which has no vector conversion.
    distance = np.float32(np.int32(np.int32(value) - np.int32(degenerate)))
    mixed = np.float32(np.int32(degenerate)) + np.float32(factor) * distance
    return np.int32(min(max(mixed, ZERO), TOP))


# ==== Chains of blends ============================================================================
#
# Brightness, contrast, saturation and gray are one thing: a blend with a constant or with the
# pixel's own gray value. A program, float32 [steps, 3], lists them: a row is (whether to use the
# gray value, else the constant, factor). A chain of them costs one pass over the image.


@kernel
def set_step(program, step, use_gray, constant, factor):
    """Write one row of a program."""
    program[step, 0], program[step, 1] = np.float32(use_gray), np.float32(constant)
    program[step, 2] = np.float32(factor)


@kernel
def _blend_tail(image, program, steps, store):
    """What is left of the image after whole blocks. Returns the sum of the new gray values."""
    width, pixels, total = image.shape[1], image.shape[0] * image.shape[1], 0
    for pixel in range(pixels - pixels % PIXELS, pixels):
        y, x = pixel // width, pixel % width
        red, green = np.int32(image[y, x, 0]), np.int32(image[y, x, 1])
        blue = np.int32(image[y, x, 2])
        for step in range(steps):
            ground = gray(red, green, blue) if program[step, 0] else np.int32(program[step, 1])
            factor = program[step, 2]
            red, green = blend(ground, red, factor), blend(ground, green, factor)
            blue = blend(ground, blue, factor)
        if store:
            image[y, x, 0], image[y, x, 1] = np.uint8(red), np.uint8(green)
            image[y, x, 2] = np.uint8(blue)
        total += gray(red, green, blue)
    return total


@kernel(inline="always")
def _addresses(image, program):
    # reshape: an image that is not contiguous does not compile, instead of being misread.
    return np.uintp(image.reshape(image.size).ctypes.data), np.uintp(program.ctypes.data)


@kernel
def blend_pixels(image, program, steps):
    """Apply the first `steps` rows of a program to every pixel."""
    start, chain = _addresses(image, program)
    for block in range(image.shape[0] * image.shape[1] // PIXELS):
        blend_block(start + np.uintp(3 * PIXELS * block), chain, steps)
    _blend_tail(image, program, steps, True)


@kernel
def mean_after(image, program, steps, store):
    """The `gray_mean` that `blend_pixels` leads to; without `store` the image stays as it is."""
    start, chain = _addresses(image, program)
    total, pixels = 0, image.shape[0] * image.shape[1]
    for block in range(pixels // PIXELS):
        place = start + np.uintp(3 * PIXELS * block)
        if store:
            total += blend_and_sum_block(place, chain, steps)
        else:
            total += sum_block(place, chain, steps)
    total += _blend_tail(image, program, steps, store)
    return np.int64(total / pixels + 0.5)


@kernel
def gray_mean(image):
    """The constant that Contrast blends with: the mean gray value, rounded. Returns int64."""
    return mean_after(image, np.empty((1, 3), np.float32), 0, False)


@kernel
def adjust_saturation(image, factor):
    """ImageEnhance.Color: blend every pixel with its gray value."""
    program = np.empty((1, 3), np.float32)
    set_step(program, 0, 1, 0, factor)
    blend_pixels(image, program, 1)


@kernel
def to_grayscale(image):
    """convert('L') and back: all three channels become the gray value."""
    adjust_saturation(image, np.float32(0.0))


# ==== Look-up tables ==============================================================================


@kernel
def gray_mean_through(image, lut):
    """`gray_mean` of the image as the table would make it."""
    height, width, _ = image.shape
    total = 0
    for y in range(height):
        for x in range(width):
            red, green = lut[0, image[y, x, 0]], lut[1, image[y, x, 1]]
            total += gray(red, green, lut[2, image[y, x, 2]])
    return np.int64(total / (height * width) + 0.5)


@kernel
def identity_lut(lut):
    """Start a table: every value stands for itself."""
    for c in range(3):
        for i in range(256):
            lut[c, i] = i


@kernel
def blend_lut(lut, level, factor):
    """ImageEnhance.Brightness with level 0; Contrast with the mean, see `gray_mean_through`."""
    for c in range(3):
        for i in range(256):
            lut[c, i] = blend(level, lut[c, i], factor)


@kernel
def solarize_lut(lut, threshold):
    """ImageOps.solarize: values from the threshold on are inverted; with 0 ImageOps.invert."""
    for c in range(3):
        for i in range(256):
            value = lut[c, i]
            lut[c, i] = value if value < threshold else 255 - value


@kernel
def solarize_add_lut(lut, add, threshold):
    """timm's SolarizeAdd: values below the threshold grow by `add`, up to 255."""
    for c in range(3):
        for i in range(256):
            value = lut[c, i]
            lut[c, i] = min(255, value + add) if value < threshold else value


@kernel
def posterize_lut(lut, bits):
    """ImageOps.posterize: keep the highest `bits` bits, 0 to 8; 0 is black."""
    mask = 256 - (1 << (8 - bits))
    for c in range(3):
        for i in range(256):
            lut[c, i] &= mask


@kernel
def solarize(image, threshold):
    """ImageOps.solarize without a table: values at or above the threshold are inverted."""
    height, width, _ = image.shape
    flat = image.reshape(height, width * 3)
    limit = np.int32(math.ceil(threshold))
    for y in range(height):
        for x in range(width * 3):
            value = flat[y, x]
            flat[y, x] = ~value if np.int32(value) >= limit else value


# ==== Hue, sharpness ==============================================================================


@kernel(inline="always")
def _hue(red, green, blue, top, spread):
    """H of Pillow's HSV, int32, 0 to 255; its mixture of C's float and double is kept."""
    distance = max(np.float32(spread), np.float32(1.0))  # gray pixels: any hue will do
    from_red = np.float32(np.int32(top - red)) / distance
    from_green = np.float32(np.int32(top - green)) / distance
    from_blue = np.float32(np.int32(top - blue)) / distance
    third = np.float32(4.0 + np.float64(from_green) - np.float64(from_red))
    second = np.float32(2.0 + np.float64(from_red) - np.float64(from_blue))
    hue = from_blue - from_green if red == top else (second if green == top else third)
    turn = np.float64(hue) * SIXTH + 1.0
    return np.int32(np.float64(np.float32(turn - (1.0 if turn >= 1.0 else 0.0))) * 255.0)


@kernel
def _turn_row(red, green, blue, shift):
    """Add `shift` to the hue of a row. int32 [width] each. No branches: it runs on vectors."""
    for x in range(len(red)):
        r, g, b = red[x], green[x], blue[x]
        top, low = max(r, g, b), min(r, g, b)
        spread = np.int32(top - low)
        share = np.float32(spread) / max(np.float32(top), np.float32(1.0))
        saturation = np.int32(np.float64(share) * 255.0)
        hue = np.int32(np.int32(_hue(r, g, b, top, spread) + shift) & np.int32(255))
        # From here on HSV to RGB.
        turn = np.float64(hue) * (6.0 / 255.0)
        sector = np.int32(turn)
        part = np.float64(np.float32(turn - np.float64(sector)))
        amount = np.float64(np.float32(np.float64(saturation) * (1.0 / 255.0)))
        value = np.float64(top)
        p = np.int32(value * (1.0 - amount) + 0.5)
        q = np.int32(value * (1.0 - amount * part) + 0.5)
        t = np.int32(value * (1.0 - amount * (1.0 - part)) + 0.5)
        s = sector if sector < 6 else np.int32(0)
        red[x] = top if s == 0 or s == 5 else (q if s == 1 else (t if s == 4 else p))
        green[x] = top if s == 1 or s == 2 else (t if s == 0 else (q if s == 3 else p))
        blue[x] = top if s == 3 or s == 4 else (t if s == 2 else (q if s == 5 else p))


@kernel
def adjust_hue(image, factor):
    """Turn the hue by `factor` of a full circle, -0.5 to 0.5 (float64), through Pillow's HSV.

    Not an identity at 0: HSV holds eight bits a channel, and the way there and back loses some.
    """
    height, width, _ = image.shape
    shift = np.int32(np.int64(factor * 255) & 255)
    rows = np.empty((3, width), np.int32)
    red, green, blue = rows[0], rows[1], rows[2]
    for y in range(height):
        for x in range(width):
            red[x], green[x], blue[x] = image[y, x, 0], image[y, x, 1], image[y, x, 2]
        _turn_row(red, green, blue, shift)
        for x in range(width):
            image[y, x, 0], image[y, x, 1] = np.uint8(red[x]), np.uint8(green[x])
            image[y, x, 2] = np.uint8(blue[x])


@kernel
def _sharpen_row(above, here, below, column, factor):
    """Sharpen one row; the result takes the place of `above`. int32 [3 * width] each."""
    for i in range(len(column)):
        column[i] = np.int32(above[i] + here[i] + below[i])
    # Views: an index that may be negative would keep the compiler from using vectors.
    middle, right, center, result = column[3:], column[6:], here[3:], above[3:]
    for i in range(len(column) - 6):
        total = np.int32(column[i] + middle[i] + right[i] + 4 * center[i])
        smooth = np.int32((2 * total + 13) * 20165) >> np.int32(19)  # (2 * total + 13) // 26
        result[i] = blend(smooth, center[i], factor)


@kernel
def adjust_sharpness(image, factor):
    """ImageEnhance.Sharpness: blend with a 3 x 3 smoothing; the outermost pixels stay."""
    height, width, _ = image.shape
    if height < 3 or width < 3:
        return
    length, factor = 3 * width, np.float32(factor)
    pixels, rows = image.reshape(height, length), np.empty((4, length), np.int32)
    above, here, below, column = rows[0], rows[1], rows[2], rows[3]
    for i in range(length):
        here[i], below[i] = pixels[0, i], pixels[1, i]
    for y in range(1, height - 1):
        above, here, below = here, below, above
        row = pixels[y + 1]
        for i in range(length):
            below[i] = row[i]
        _sharpen_row(above, here, below, column, factor)
        for i in range(3, length - 3):
            pixels[y, i] = np.uint8(above[i])


# ==== Blur ========================================================================================


@kernel
def box_radius(radius):
    """Radius of the box that, three times over, stands for a Gaussian. float32, C's arithmetic."""
    variance = np.float32(np.float32(np.float32(radius) * np.float32(radius)) / np.float32(3))
    length = np.float32(math.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = np.float32(math.floor((np.float64(length) - 1.0) / 2.0))
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    part = (two * whole + one) * (whole * (whole + one) - three * variance)
    part = part / (six * (variance - (whole + one) * (whole + one)))
    return whole + part


@kernel(inline="always")
def _weigh(total, ends, weight, edge_weight):
    """Weighted sum of a box and its two ends, rounded. uint32 throughout: nothing overflows."""
    inner, outer = np.uint32(weight * total), np.uint32(edge_weight * ends)
    return np.uint32(np.uint32(inner + outer) + np.uint32(1 << 23)) >> np.uint32(24)


@kernel
def _sum_row(line, total, reach):
    """total[i]: what a box of `reach` around the value holds. line: padded, see `_box_rows`."""
    middle = line[3 * (reach + 1) :]
    for i in range(len(total)):
        total[i] = middle[i]
    for k in range(1, reach + 1):
        left, right = line[3 * (reach + 1 - k) :], line[3 * (reach + 1 + k) :]
        for i in range(len(total)):
            total[i] += np.uint32(left[i] + right[i])


@kernel
def _box_rows(source, target, reach, weight, edge_weight):
    """Three box passes along every row. source, target: uint8 [height, 3 * width]."""
    height, length = source.shape
    pad = 3 * (reach + 1)
    line, total = np.empty(length + 2 * pad, np.uint32), np.empty(length, np.uint32)
    middle, right = line[pad:], line[2 * pad :]  # views: an index that may be < 0 costs the vectors
    for y in range(height):
        row = source[y]
        for i in range(length):
            middle[i] = row[i]
        for _ in range(3):
            for i in range(pad):
                line[i] = middle[i % 3]
                middle[length + i] = middle[length - 3 + i % 3]
            _sum_row(line, total, reach)
            for i in range(length):
                total[i] = _weigh(total[i], np.uint32(line[i] + right[i]), weight, edge_weight)
            for i in range(length):
                middle[i] = total[i]
        for i in range(length):
            target[y, i] = np.uint8(total[i])


@kernel
def _box_columns(source, target, reach, weight, edge_weight):
    """One box pass along every column, all columns at once. Arguments as `_box_rows`."""
    height, length = source.shape
    total = np.zeros(length, np.uint32)
    for k in range(-reach, reach + 1):
        row = source[min(max(k, 0), height - 1)]
        for i in range(length):
            total[i] += np.uint32(row[i])
    for y in range(height):
        above, leaving = source[max(y - reach - 1, 0)], source[max(y - reach, 0)]
        below = source[min(y + reach + 1, height - 1)]
        for i in range(length):
            entering = np.uint32(below[i])
            ends = np.uint32(np.uint32(above[i]) + entering)
            target[y, i] = np.uint8(_weigh(total[i], ends, weight, edge_weight))
            total[i] = np.uint32(np.uint32(total[i] + entering) - np.uint32(leaving[i]))


@kernel
def gaussian_blur(image, radius):
    """ImageFilter.GaussianBlur: three box passes along x, then three along y.

    Args: radius: in pixels (Pillow's word; roughly the standard deviation), 0 or more.
    """
    if radius <= 0:
        return
    height, width, _ = image.shape
    box = box_radius(radius)
    reach = np.int64(box)
    weight = np.int64(np.float32(1 << 24) / (box * np.float32(2) + np.float32(1)))
    edge_weight = ((1 << 24) - (2 * reach + 1) * weight) // 2
    weights = np.uint32(weight), np.uint32(edge_weight)
    pixels = image.reshape(height, 3 * width)
    other = np.empty((height, 3 * width), np.uint8)
    _box_rows(pixels, other, reach, *weights)
    _box_columns(other, pixels, reach, *weights)
    _box_columns(pixels, other, reach, *weights)
    _box_columns(other, pixels, reach, *weights)
