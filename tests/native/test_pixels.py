"""Transform, color and resize of the native decoder against slow references, on every code path."""

import ctypes
import itertools
import runpy
import subprocess

import cv2
import numpy as np
import pytest

from fast_imagenet import native
from tests import reference
from tests.conftest import ROOT
from tests.fuzz import SANITIZERS, has_sanitizers

SETUP = runpy.run_path(str(ROOT / "setup.py"))
METHODS = {"bilinear": 0, "bicubic": 1, "area": 2}
PATHS = ("portable", *native.PATHS[1:])


def compile_path(path, target, *more):
    flags = ["-DPORTABLE"] if path == "portable" else SETUP["VECTORS"][path]
    source = ROOT / "tests/native/pixels.c"
    command = ["cc", *SETUP["FLAGS"], "-Wall", "-Wextra", "-Wno-unused-function", "-Werror"]
    command += [*flags, *more, "-I", str(native.FOLDER), "-o", str(target), str(source)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The sources as every path that this processor has compiles them: {path: library}."""
    folder, found = tmp_path_factory.mktemp("pixels"), {}
    for path in PATHS:
        if path != "portable" and path not in native.supported():
            continue
        done = compile_path(path, folder / f"{path}.so", "-shared", "-fPIC")
        assert done.returncode == 0, done.stderr
        found[path] = ctypes.CDLL(str(folder / f"{path}.so"))
    return found


@pytest.fixture(params=PATHS)
def library(request, libraries):
    if request.param not in libraries:
        pytest.skip(f"this processor has no {request.param}")
    return libraries[request.param]


def at(array, offset=0):
    return ctypes.c_void_p(array.ctypes.data + offset)


def long(number):
    return ctypes.c_int64(number)


def test_every_path_has_its_own_width(libraries):
    widths = {"portable": 1, "avx2": 2, "avx512": 2}
    assert {path: library.quarters() for path, library in libraries.items()} == {
        path: widths[path] for path in libraries
    }


# ------------------------------------------------------------------------------------------------
# Inverse transform
# ------------------------------------------------------------------------------------------------


def as_int16(values):
    return ((values + 32768) & 0xFFFF) - 32768


def one_dimension(x, shift):
    """jidctint's, sums of 16 bits wrapping: int [n, 8, ...] -> the same."""
    x = list(x.swapaxes(0, 1))
    z1 = (x[2] + x[6]) * 4433
    even = [as_int16(x[0] + x[4]) << 13, as_int16(x[0] - x[4]) << 13]
    even += [z1 - x[6] * 15137, z1 + x[2] * 6270]
    outer = [even[0] + even[3], even[1] + even[2], even[1] - even[2], even[0] - even[3]]
    z3, z4 = as_int16(x[7] + x[3]), as_int16(x[5] + x[1])
    z5 = (z3 + z4) * 9633
    z1, z2, z3, z4 = (x[7] + x[1]) * -7373, (x[5] + x[3]) * -20995, z5 - z3 * 16069, z5 - z4 * 3196
    odd = [x[1] * 12299 + z1 + z4, x[3] * 25172 + z2 + z3]
    odd += [x[5] * 16819 + z2 + z4, x[7] * 2446 + z1 + z3]
    sums = [outer[k] + odd[k] for k in range(4)] + [outer[k] - odd[k] for k in (3, 2, 1, 0)]
    whole = np.stack(sums, 1) + (1 << (shift - 1))
    whole = ((whole + 2**31) & 0xFFFFFFFF) - 2**31
    return np.clip(whole >> shift, -32768, 32767)


def transformed(blocks, steps):
    """int [n, 8, 8] -> uint8 [n, 8, 8]."""
    columns = one_dimension(as_int16(blocks.astype(np.int64) * steps), 11)
    rows = one_dimension(columns.swapaxes(1, 2), 18).swapaxes(1, 2)
    return (np.clip(rows, -128, 127) + 128).astype(np.uint8)


def aligned(values):
    """The int16 values at an address divisible by 64."""
    memory = np.zeros(2 * values.size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    result = memory[begin : begin + 2 * values.size].view(np.int16).reshape(values.shape)
    result[:] = values
    return result


def transform(library, blocks, steps):
    n = len(blocks)
    blocks, steps, pixels = aligned(blocks), aligned(steps), np.zeros((8, n, 8), np.uint8)
    beyond = library.transform(at(blocks), at(steps), at(pixels), long(n))
    return pixels.swapaxes(0, 1), bool(beyond)


@pytest.mark.parametrize("largest", [2, 40, 300, 2047, 32767])
def test_transform_equals_the_integer_model(library, largest):
    rng = np.random.default_rng(largest)
    for step in (2, 20, 256):
        for n in (1, 3, 13):
            blocks = rng.integers(-largest - 1, largest + 1, (n, 8, 8))
            blocks *= rng.random(blocks.shape) < rng.choice([0.05, 0.3, 1])
            steps = rng.integers(1, step, (8, 8))
            pixels, beyond = transform(library, blocks, steps)
            np.testing.assert_array_equal(pixels, transformed(blocks, steps))
            first = as_int16(blocks * steps)[:, 0]
            assert beyond == bool(((first > 8191) | (first < -8192)).any())


def test_transform_of_extremes_wraps_and_saturates_as_libjpeg(library):
    rng = np.random.default_rng(0)
    for _ in range(50):
        blocks = rng.choice([-32768, -32767, -1, 0, 1, 32767], (5, 8, 8))
        steps = rng.choice([1, 2, 255], (8, 8))
        pixels, _ = transform(library, blocks, steps)
        np.testing.assert_array_equal(pixels, transformed(blocks, steps))


# ------------------------------------------------------------------------------------------------
# Color
# ------------------------------------------------------------------------------------------------


def as_rgb(y, cb, cr):
    """libjpeg's tables of 16 binary places."""
    y, cb, cr = y.astype(int), cb.astype(int) - 128, cr.astype(int) - 128
    red, blue = (91881 * cr + 32768) >> 16, (116130 * cb + 32768) >> 16
    green = (-22554 * cb - 46802 * cr + 32768) >> 16
    return np.clip(np.stack([y + red, y + green, y + blue], -1), 0, 255)


def color(library, kind, y, chroma, lower=0):
    """One row. chroma: 4 arrays whose second value is that of the first column."""
    n, whole = len(y), -(-len(y) // 64) * 64
    y, out = np.resize(y, whole), np.full((whole, 4), 9, np.uint8)
    padded = [np.concatenate([row, np.full(64, 200, np.uint8)]) for row in chroma]
    rows = (ctypes.c_void_p * 4)(*(row.ctypes.data + 1 for row in padded))
    library.color(kind, at(y), rows, lower, at(out), long(n))
    return out[:n, :3]


def test_color_of_all_chroma(library):
    cb, cr = (a.astype(np.uint8).ravel() for a in np.meshgrid(range(256), range(256)))
    shifted = [np.concatenate([a[:1], a]) for a in (cb, cb, cr, cr)]
    for level in (0, 1, 90, 128, 255):
        y = np.full(65536, level, np.uint8)
        np.testing.assert_array_equal(color(library, 11, y, shifted), as_rgb(y, cb, cr))


def upsampled(kind, near, far, lower, n):
    """One chroma row at full width, as jdsample.c; near and far begin a column before the first."""
    near, far = near.astype(int), far.astype(int)
    here = np.arange(1, 2 + n // (kind // 10))
    if kind in (11, 41):
        full = np.repeat(near[here], kind // 10)
    elif kind == 12:
        full = (3 * near[here] + far[here] + (2 if lower else 1)) >> 2
    else:
        sums, even, odd, bits = near, 1, 2, 2
        if kind == 22:
            sums, even, odd, bits = 3 * near + far, 8, 7, 4
        pairs = (3 * sums[here] + sums[here - 1] + even, 3 * sums[here] + sums[here + 1] + odd)
        full = np.stack(pairs, 1).ravel() >> bits
    return full[:n]


@pytest.mark.parametrize("kind", [11, 12, 21, 22, 41])
def test_color_of_interpolated_chroma(library, kind):
    rng = np.random.default_rng(kind)
    for n, lower in itertools.product((1, 2, 17, 64, 129, 500, 2100), (0, 1)):
        y = rng.integers(0, 256, n, dtype=np.uint8)
        chroma = rng.integers(0, 256, (4, n + 3), dtype=np.uint8)
        full = [upsampled(kind, *pair, lower, n) for pair in (chroma[:2], chroma[2:])]
        np.testing.assert_array_equal(color(library, kind, y, chroma, lower), as_rgb(y, *full))


def test_gray(library):
    y = np.arange(200, dtype=np.uint8)
    chroma = np.zeros((4, 203), np.uint8)
    np.testing.assert_array_equal(color(library, 0, y, chroma), np.repeat(y[:, None], 3, 1))


# ------------------------------------------------------------------------------------------------
# Resize
# ------------------------------------------------------------------------------------------------


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resize(library, image, box, size, *, flip=False, method="bilinear"):
    """A box (top, left, height, width)."""
    numbers = [image.shape[1], *size, flip, METHODS[method]]
    numbers, box = np.array(numbers, np.int64), np.array(box, np.float64)
    image = np.ascontiguousarray(image)
    result = np.full(3 * size[0] * size[1] + 64, 77, np.uint8)
    assert library.resize_box(at(image), at(numbers), at(box), at(result)) == 0
    assert (result[-64:] == 77).all()  # another thread's image
    return result[:-64].reshape(*size, 3)


def difference(a, b):
    return np.abs(a.astype(int) - b)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("side", "size"),
    [
        ((1, 1), (1, 1)),
        ((1, 1000), (224, 224)),
        ((1000, 1), (7, 3)),
        ((2, 3), (160, 160)),
        ((37, 53), (37, 53)),
        ((375, 500), (160, 160)),
        ((375, 500), (1, 1)),
        ((97, 131), (50, 200)),
        ((64, 64), (31, 65)),
        ((5000, 3), (2, 2)),
        ((3, 5000), (2, 2)),
        ((2, 2), (3, 16384)),
        ((2, 2), (16384, 3)),
    ],
)
def test_whole_image_equals_the_reference(library, method, side, size):
    image = noise(*side)
    expected = reference.crop_resize(image, (0, 0, *side, 0), size, method)
    wrong = difference(resize(library, image, (0, 0, *side), size, method=method), expected)
    assert wrong.max() <= 1 + (method == "bicubic")  # two halves between its passes may both differ
    assert (wrong > 1).mean() < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_random_boxes_equal_the_reference(library, method):
    rng = np.random.default_rng(1)
    image, different = noise(120, 160), 0
    for k in range(200):
        height, width = rng.integers(1, 71, 2) if k % 2 else rng.integers(1, (121, 161))
        top, left = rng.integers(0, 121 - height), rng.integers(0, 161 - width)
        size = tuple(int(n) for n in rng.integers(1, 200, 2))
        flip = bool(rng.integers(2))
        crop = (top, left, height, width)
        expected = reference.crop_resize(image, (*crop, flip), size, method)
        wrong = difference(resize(library, image, crop, size, flip=flip, method=method), expected)
        assert wrong.max() <= 1 + (method == "bicubic"), (crop, size)
        assert (wrong > 1).mean() < 1e-3
        different += (wrong > 0).mean() / 200
    # Pillow rounds bilinear between its passes too
    assert different < (0.2 if method == "bilinear" else 0.001)


@pytest.mark.parametrize("side", [(375, 500), (120, 90), (64, 65)])
def test_area_equals_opencv(library, side):
    """What FFCV's decoders resize with."""
    image = noise(*side)
    for size in ((60, 31), (64, 64), (1, 7), (32, 45)):
        expected = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        result = resize(library, image, (0, 0, *side), size, method="area")
        assert difference(result, expected).max() <= 1, size


def exact_weights(start, length, out, low, high, is_mean):
    """[out, high - low] in double, for boxes between pixels too."""
    scale, pixels = length / out, np.arange(low, high)
    weights = np.zeros((out, high - low))
    for x in range(out):
        left, right = start + x * scale, start + (x + 1) * scale
        if is_mean and scale > 1:
            touched = (pixels >= np.floor(left + 1e-3)) & (pixels < np.ceil(right - 1e-3))
            weights[x] = np.minimum(right, pixels + 1) - np.maximum(left, pixels)
            weights[x] *= touched
        else:
            weights[x] = 1 - np.abs(pixels + 0.5 - (left + right) / 2) / max(scale, 1)
        weights[x] = np.maximum(weights[x], 0)
        if not weights[x].any():
            weights[x, np.clip(round((left + right) / 2 - 0.5), low, high - 1) - low] = 1
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("method", ["bilinear", "area"])
def test_boxes_between_pixels_equal_the_exact_mean(library, method):
    rng = np.random.default_rng(3)
    image, wrong, values = noise(90, 110), 0, 0
    for _ in range(200):
        low_y, low_x = (int(v) for v in rng.integers(0, (80, 100)))
        top, left = low_y + rng.random() * 0.9, low_x + rng.random() * 0.9
        box = (top, left, (90 - top) * rng.random() + 1e-3, (110 - left) * rng.random() + 1e-3)
        ends = ((low_y, min(90, int(np.ceil(top + box[2])))),)
        ends += ((low_x, min(110, int(np.ceil(left + box[3])))),)
        size = tuple(int(n) for n in rng.integers(1, 60, 2))
        sides = zip(box[:2], box[2:], size, ends, strict=True)
        rows, columns = (exact_weights(*side[:3], *side[3], method == "area") for side in sides)
        inside = image[slice(*ends[0]), slice(*ends[1])].astype(float)
        exact = np.floor(np.einsum("yh,xw,hwc->yxc", rows, columns, inside, optimize=True) + 0.5)
        apart = difference(resize(library, image, box, size, method=method), exact)
        assert apart.max() <= 1
        wrong, values = wrong + (apart > 0).sum(), values + apart.size
    assert wrong / values < 5e-4  # float32 beside a half


def bicubic_weights(length, out):
    """Pillow's, [out, length], in double."""
    scale = length / out
    x = np.abs((np.arange(length) - (np.arange(out)[:, None] + 0.5) * scale + 0.5) / max(scale, 1))
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def test_bicubic_is_as_near_to_exact_sums_as_float32_allows(library):
    """Exact halves between the passes, many in a ramp, are rounded up, whatever the last bits."""
    rng, wrong, values = np.random.default_rng(5), 0, 0
    for _ in range(100):
        height, width, *size = (int(n) for n in rng.integers(1, 71, 4))
        size, steps = (2 * size[0], 2 * size[1]), rng.integers(1, 4, 3)
        ramp = np.indices((height, width, 3)).transpose(1, 2, 3, 0) @ (*steps[:2], 40)
        image = (ramp % 256).astype(np.uint8)
        narrow = np.einsum("xw,hwc->hxc", bicubic_weights(width, size[1]), image)
        narrow = np.clip(np.floor(narrow + 0.5 + 1e-9), 0, 255)
        exact = np.einsum("yh,hxc->yxc", bicubic_weights(height, size[0]), narrow)
        exact = np.clip(np.floor(exact + 0.5 + 1e-9), 0, 255)
        apart = difference(
            resize(library, image, (0, 0, height, width), size, method="bicubic"), exact
        )
        assert apart.max() <= 2
        wrong, values = wrong + (apart > 0).sum(), values + apart.size
    assert wrong / values < 2e-5


@pytest.mark.parametrize("axis", [0, 1])
def test_area_leaves_out_a_thousandth_of_a_pixel(library, axis):
    """As OpenCV: the mean of 10 and 11 is rounded up, and down with a trace of a 0 beside them."""
    for part, expected in ((1 / 2048, 11), (1 / 512, 10)):
        for levels, start in (([0, 10, 11], 1 - part), ([10, 11, 0], 0.0)):
            line = np.repeat(np.array(levels, np.uint8)[:, None, None], 3, 2).swapaxes(0, axis)
            box = (start, 0.0, 2 + part, 1.0) if axis == 0 else (0.0, start, 1.0, 2 + part)
            result = resize(library, line, box, (1, 1), method="area")
            assert (result == expected).all(), (part, levels)


@pytest.mark.parametrize("method", METHODS)
def test_paths_agree(libraries, method):
    """AVX2 and AVX-512 to the bit; portable C rounds products before it adds them."""
    rng = np.random.default_rng(4)
    different, values = 0, 0
    for k in range(100):
        height, width = (int(n) for n in rng.integers(1, 200 if k % 4 == 0 else 71, 2))
        image, size = noise(height, width, k), tuple(int(n) for n in rng.integers(1, 90, 2))
        task = (image, (0, 0, height, width), size)
        results = {
            path: resize(library, *task, flip=bool(k % 2), method=method)
            for path, library in libraries.items()
        }
        portable = results.pop("portable")
        for result in results.values():
            np.testing.assert_array_equal(result, results["avx2"])
            apart = difference(result, portable)
            assert apart.max() <= 1
            different, values = different + (apart > 0).sum(), values + apart.size
    assert different <= 5e-4 * values


@pytest.mark.parametrize("method", METHODS)
def test_properties(library, method):
    """A flip is a mirror; the same size and a constant change nothing; nothing beside is read."""
    image, other = noise(60, 60), noise(60, 60, seed=9)
    box = (20, 10, 25, 40)
    other[20:45, 10:50] = image[20:45, 10:50]
    for size in ((24, 33), (90, 80), (1, 5)):
        plain = resize(library, image, box, size, method=method)
        flipped = resize(library, image, box, size, flip=True, method=method)
        np.testing.assert_array_equal(flipped, plain[:, ::-1])
        np.testing.assert_array_equal(resize(library, other, box, size, method=method), plain)
        for level in (0, 1, 127, 255):
            same = np.full((60, 60, 3), level, np.uint8)
            assert (resize(library, same, box, size, method=method) == level).all()
    result = resize(library, image, box, box[2:], method=method)
    np.testing.assert_array_equal(result, image[20:45, 10:50])


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_random_work_under_the_sanitizers(tmp_path, path):
    if path != "portable" and path not in native.supported():
        pytest.skip(f"this processor has no {path}")
    if not has_sanitizers(tmp_path):
        pytest.skip("no compiler with sanitizers")
    made = compile_path(path, tmp_path / "all", "-O1", *SANITIZERS, "-DSANITIZED")
    assert made.returncode == 0, made.stderr
    done = subprocess.run([tmp_path / "all"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
