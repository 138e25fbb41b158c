"""The JPEG encoder: ordinary files, markers where the region decoder needs them, small enough."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fast_imagenet.beton import jpeg


def made_image(height, width, seed=0):
    """Smooth colour with some noise: compresses like a photograph."""
    rng = np.random.default_rng(seed)
    small = rng.uniform(0, 255, (height // 24 + 2, width // 24 + 2, 3)).astype(np.float32)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def segments(data):
    """Marker -> payload of the header, the restart markers in order, and where the scan starts."""
    at, header = 2, {}
    while True:
        assert data[at] == 0xFF
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        header[marker] = data[at + 4 : at + 2 + length]
        at += 2 + length
        if marker == 0xDA:
            break
    scan = np.frombuffer(data, np.uint8)[at:]
    follows = scan[1:][scan[:-1] == 0xFF]
    return header, [int(m) - 0xD0 for m in follows if 0xD0 <= m <= 0xD7]


@pytest.mark.parametrize(
    ("width", "expected"),
    [(500, 4), (375, 4), (333, 3), (1, 1), (16, 1), (17, 2), (496, 1), (400, 1)],
)
def test_interval_divides_the_row(width, expected):
    assert jpeg.restart_interval(width) == expected


def test_interval_divides_for_every_width():
    for width in range(1, 1200):
        mcus = -(-width // 16)
        assert mcus % jpeg.restart_interval(width) == 0
        assert mcus % jpeg.restart_interval(width, 6) == 0


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 333), (1, 1), (7, 1000), (33, 496)]
)
def test_markers_are_complete_and_in_order(height, width):
    header, markers = segments(jpeg.encode_jpeg(made_image(height, width), 90))
    interval = int.from_bytes(header[0xDD], "big")
    tiles = -(-height // 16) * (-(-width // 16) // interval)
    assert markers == [i % 8 for i in range(tiles - 1)]


def test_plain_baseline_420():
    header, _ = segments(jpeg.encode_jpeg(made_image(40, 60), 90))
    assert 0xC0 in header
    assert 0xC2 not in header
    assert [header[0xC0][7 + 3 * c] for c in range(3)] == [0x22, 0x11, 0x11]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (1, 1), (1, 40), (50, 3)])
def test_decodes_to_the_same_pixels_as_stock(height, width):
    """Markers and Huffman tables are lossless: the pixels equal those of cv2's plain encoding."""
    image = made_image(height, width)
    options = [cv2.IMWRITE_JPEG_QUALITY, 90]
    stock = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()
    ours = jpeg.encode_jpeg(image, 90)
    decoded = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (stock, ours)]
    np.testing.assert_array_equal(*decoded)
    if min(height, width) > 100:  # on a few pixels halved chroma leaves nothing to compare
        assert np.abs(decoded[1].astype(int) - image).mean() < 8


def test_rgb_order_and_strides():
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    decoded = np.asarray(Image.open(io.BytesIO(jpeg.encode_jpeg(red[::-1, ::-1], 95))))
    assert np.abs(decoded[16, 16].astype(int) - [200, 0, 0]).max() <= 3


def test_no_markers_on_request():
    header, markers = segments(jpeg.encode_jpeg(made_image(40, 60), interval=0))
    assert not markers
    assert 0xDD not in header


@pytest.mark.parametrize(
    ("image", "quality", "text"),
    [
        (np.zeros((4, 4), np.uint8), 90, r"\(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), 90, r"\(4, 4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), 90, "float32"),
        (np.zeros((0, 4, 3), np.uint8), 90, "sides"),
        (np.zeros((4, 4, 3), np.uint8), 0, "quality is 0"),
        (np.zeros((4, 4, 3), np.uint8), 101, "quality is 101"),
    ],
)
def test_wrong_input_is_refused(image, quality, text):
    with pytest.raises(ValueError, match=text):
        jpeg.encode_jpeg(image, quality)


def test_photographs_are_no_larger_than_stock():
    folder = os.environ.get("FAST_IMAGENET_PHOTOS")
    if not folder:
        pytest.skip("FAST_IMAGENET_PHOTOS does not name a folder of photographs")
    ours = stock = 0
    for path in sorted(Path(folder, "imagenet_samples").glob("*.JPEG"))[::10]:
        image = np.asarray(Image.open(path).convert("RGB").resize((500, 375)))
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        stock += len(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1])
        ours += len(jpeg.encode_jpeg(image, 90))
    assert 0 < ours <= stock
