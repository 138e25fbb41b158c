"""The resize kernel against Pillow and OpenCV, and its properties."""

import numpy as np
import pytest

from fast_imagenet.native.decoder import METHODS, Decoder, batch_places
from tests import reference


def resize(image_hwc, box, size, *, flip=False, method="bilinear"):
    """A box (top, left, height, width) of uint8 [h, w, 3] resized as the decoder does it."""
    pixels = np.ascontiguousarray(image_hwc)
    samples = np.array([[pixels.ctypes.data, pixels.size, 1, *pixels.shape[:2]]], np.int64)
    crops, status = np.array([[*box, flip]], np.int64), np.zeros(1, np.int64)
    result = np.empty((1, *size, 3), np.uint8)
    batch = batch_places(samples, crops, result, status, method=method, reduced=False)
    Decoder().decode(0, 1, batch)
    return result[0]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


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
    ],
)
def test_whole_image_equals_the_reference(method, side, size):
    image = noise(*side)
    expected = reference.crop_resize(image, (0, 0, *side, 0), size, method)
    result = resize(image, (0, 0, *side), size, method=method)
    assert np.abs(result.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_random_boxes_equal_the_reference(method):
    rng = np.random.default_rng(1)
    image = noise(120, 160)
    different = 0
    for _ in range(150):
        height, width = rng.integers(1, 121), rng.integers(1, 161)
        top, left = rng.integers(0, 121 - height), rng.integers(0, 161 - width)
        size = tuple(int(n) for n in rng.integers(1, 200, 2))
        flip = bool(rng.integers(2))
        crop = (top, left, height, width)
        expected = reference.crop_resize(image, (*crop, flip), size, method)
        result = resize(image, crop, size, flip=flip, method=method)
        difference = np.abs(result.astype(int) - expected)
        assert difference.max() <= 1, (crop, size)
        different += (difference > 0).mean()
    assert different / 150 < 0.2  # most pixels are equal, not merely close


@pytest.mark.parametrize("side", [(375, 500), (120, 90), (64, 65)])
def test_area_equals_opencv(side):
    """What FFCV's decoders resize with."""
    cv2 = pytest.importorskip("cv2")
    image = noise(*side)
    for size in ((60, 31), (64, 64), (1, 7), (32, 45)):
        expected = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        result = resize(image, (0, 0, *side), size, method="area")
        assert np.abs(result.astype(int) - expected).max() <= 1, size


@pytest.mark.parametrize("method", METHODS)
def test_flip_is_a_mirror_and_twice_is_nothing(method):
    image = noise(50, 40)
    plain = resize(image, (3, 4, 30, 31), (24, 33), method=method)
    flipped = resize(image, (3, 4, 30, 31), (24, 33), flip=True, method=method)
    np.testing.assert_array_equal(flipped, plain[:, ::-1])
    assert (flipped != plain).any()


@pytest.mark.parametrize("method", METHODS)
def test_same_size_changes_nothing(method):
    image = noise(45, 67)
    np.testing.assert_array_equal(
        resize(image, (5, 6, 30, 41), (30, 41), method=method), image[5:35, 6:47]
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [0, 1, 127, 255])
def test_constant_stays_constant(method, level):
    image = np.full((61, 47, 3), level, np.uint8)
    for size in ((13, 200), (61, 11), (1, 1)):
        assert (resize(image, (0, 0, 61, 47), size, method=method) == level).all()


@pytest.mark.parametrize("method", METHODS)
def test_never_reads_beside_the_box(method):
    """Whatever surrounds the box, the result is the same."""
    image, other = noise(60, 60), noise(60, 60, seed=9)
    other[20:45, 10:50] = image[20:45, 10:50]
    for size in ((11, 13), (90, 80)):
        both = [resize(i, (20, 10, 25, 40), size, method=method) for i in (image, other)]
        np.testing.assert_array_equal(*both)


def test_writes_only_its_own_bytes():
    """The last pixel of an image must not spill: three channels are written as four bytes."""
    image = noise(20, 30)
    sample = np.array([[image.ctypes.data, image.size, 1, 20, 30]], np.int64)
    for method in METHODS:
        out, status = np.full(7 * 9 * 3 + 80, 77, np.uint8), np.zeros(1, np.int64)
        target = out[: 7 * 9 * 3].reshape(1, 7, 9, 3)
        box = np.array([[0, 0, 20, 30, 0]], np.int64)
        places = batch_places(sample, box, target, status, method=method, reduced=False)
        Decoder().decode(0, 1, places)
        assert (out[-80:] == 77).all()
