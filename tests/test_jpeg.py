"""The JPEG encoder: ordinary files, markers where the region decoder needs them, small enough."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fast_imagenet import jpeg, jpeg_recode
from tests.odd_images import as_jpeg, odd_images


def picture(height, width, seed=0):
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
    header, markers = segments(jpeg.encode_jpeg(picture(height, width), 90))
    interval = int.from_bytes(header[0xDD], "big")
    tiles = -(-height // 16) * (-(-width // 16) // interval)
    assert markers == [i % 8 for i in range(tiles - 1)]


def test_plain_baseline_420():
    header, _ = segments(jpeg.encode_jpeg(picture(40, 60), 90))
    assert 0xC0 in header
    assert 0xC2 not in header
    assert [header[0xC0][7 + 3 * c] for c in range(3)] == [0x22, 0x11, 0x11]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (1, 1), (1, 40), (50, 3)])
def test_decodes_to_the_same_pixels_as_stock(height, width):
    """Markers and Huffman tables are lossless: the pixels equal those of cv2's plain encoding."""
    image = picture(height, width)
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
    header, markers = segments(jpeg.encode_jpeg(picture(40, 60), interval=0))
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


# ------------------------------------------------------------------------------------------------
# Written anew without going to pixels
# ------------------------------------------------------------------------------------------------


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def error(data, image):
    return float(((pixels(data).astype(int) - image) ** 2).mean())


def test_recoding_keeps_every_pixel():
    """Sizes that end inside a block and inside an MCU, every quality, flat pictures and noise."""
    rng = np.random.default_rng(0)
    for number in range(150):
        height, width = rng.integers(1, 70, 2)
        image = picture(height, width, number)
        if number % 5 == 0:
            image = rng.integers(0, 256, image.shape, np.uint8)
        data = as_jpeg(image, quality=int(rng.integers(1, 101)), subsampling=2)
        interval = int(rng.integers(1, 9))
        ours = jpeg_recode.recode(data, interval)
        np.testing.assert_array_equal(pixels(ours), pixels(data))
        header, markers = segments(ours)
        assert int.from_bytes(header[0xDD], "big") == interval
        mcus = -(-height // 16) * -(-width // 16)
        assert markers == [i % 8 for i in range(-(-mcus // interval) - 1)]


def test_recoding_is_as_small_as_optimised_tables():
    image = picture(375, 500)
    data = as_jpeg(image, quality=90, subsampling=2)
    best = jpeg.encode_jpeg(image, 90, interval=4)
    assert abs(len(jpeg_recode.recode(data, 4)) / len(best) - 1) < 0.005


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (97, 1100), (40, 9), (8, 8), (17, 33), (24, 24)]
)
def test_recoding_is_no_worse_than_encoding_again(subsampling, height, width):
    """Measured against the source's pixels; the sides reach every way a picture can end."""
    image = picture(height, width)
    source = as_jpeg(image, quality=96, subsampling=subsampling)
    seen = pixels(source)
    again = jpeg.encode_jpeg(seen, 85)
    ours = jpeg.recode_jpeg(source, width, 85)
    assert pixels(ours).shape == image.shape
    assert error(ours, seen.astype(int)) < 1.05 * error(again, seen.astype(int)) + 0.3
    assert len(ours) < 1.02 * len(again) + 40
    header, _ = segments(ours)
    assert [header[0xC0][7 + 3 * c] for c in range(3)] == [0x22, 0x11, 0x11]
    np.testing.assert_array_equal(
        np.frombuffer(header[0xDB], np.uint8).reshape(2, 65)[:, 1:], jpeg.quantisers(85)
    )


def test_coarse_source_is_not_made_finer():
    source = as_jpeg(picture(90, 120), quality=50, subsampling=2)
    ours = jpeg.recode_jpeg(source, 120, 90)
    np.testing.assert_array_equal(pixels(ours), pixels(source))
    assert len(ours) < 1.02 * len(source)


def test_what_is_not_plain_is_left_to_others():
    image = picture(40, 60)
    others = {name: data for name, (data, _) in odd_images().items()}
    plain = ("plain.JPEG", "full_chroma.JPEG", "odd_sides.JPEG", "really_a_jpeg.png", "no_suffix")
    for name in (*plain, "turned.JPEG", "upside_down.JPEG", "broken_exif.JPEG", "one_pixel.JPEG"):
        assert jpeg.recode_jpeg(others.pop(name), 60, 90), name
    others.pop("big_profile.JPEG")
    for name, data in others.items():
        assert jpeg.recode_jpeg(data, 60, 90) is None, name
    assert jpeg.recode_jpeg(jpeg.encode_jpeg(image), 60, 90) is None  # has markers already
    assert jpeg_recode.recode(as_jpeg(image, subsampling=0), 1) is None  # no steps given
    for subsampling in (0, 2):
        data = as_jpeg(image, subsampling=subsampling)
        longer = data[:-2] + b"\0\0" + data[-2:]
        assert jpeg.recode_jpeg(longer, 60, 90) is None
    assert jpeg.recode_jpeg(as_jpeg(image, keep_rgb=True, subsampling=0), 60, 90) is None


@pytest.mark.parametrize("subsampling", [0, 2])
def test_damaged_files_are_refused_or_readable(subsampling):
    rng = np.random.default_rng(1)
    data = as_jpeg(picture(70, 90), quality=95, subsampling=subsampling)
    refused = 0
    for _ in range(400):
        broken = bytearray(data)
        for place in rng.integers(2, len(data), rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        if rng.random() < 0.3:
            del broken[int(rng.integers(2, len(data))) :]
        try:
            ours = jpeg.recode_jpeg(bytes(broken), 90, 90)
        except ValueError:
            raise AssertionError("a damaged file must give None") from None
        refused += ours is None
        if ours is not None:
            assert pixels(ours).ndim == 3
    assert 100 < refused < 400


@pytest.mark.parametrize(
    ("is_dc", "symbol", "sound"),
    [
        (True, 11, True),
        (True, 12, False),
        (True, 0x1B, False),
        (False, 0xFA, True),
        (False, 11, False),
    ],
)
def test_codes_that_no_8_bit_picture_has_are_not_read(is_dc, symbol, sound):
    code = bytes([1, *[0] * 15, symbol])
    assert (jpeg_recode.reading_table(code, is_dc) is not None) == sound


def test_codes_have_at_most_16_bits():
    counts = np.zeros(256, np.int64)
    counts[:40] = [1, 1, *(round(1.618**k) for k in range(38))]
    order = np.arange(40)
    codes, segment = np.zeros(256, np.uint32), np.zeros(272, np.int32)
    assert jpeg_recode._make_code(counts, order, codes, segment) == 56
    lengths = codes[:40] & 31
    assert lengths.max() == 16
    assert (2.0 ** -lengths.astype(float)).sum() < 1  # room for the code of all ones
    assert (np.diff(lengths.astype(int)) <= 0).all()
    assert (codes[:40] >> 5 < (1 << lengths) - 1).all()
    spread = [format(code >> 5, f"0{code & 31}b") for code in codes[:40].tolist()]
    assert not any(a != b and b.startswith(a) for a in spread for b in spread)


def test_recoded_photographs():
    folder = os.environ.get("FAST_IMAGENET_PHOTOS")
    if not folder:
        pytest.skip("FAST_IMAGENET_PHOTOS does not name a folder of photographs")
    ours = stock = taken = 0
    errors = []
    for path in sorted(Path(folder, "imagenet_samples").glob("*.JPEG"))[::8]:
        source, seen = path.read_bytes(), pixels(path.read_bytes())
        data = jpeg.recode_jpeg(source, seen.shape[1], 90)
        if data is None:
            continue
        bgr = cv2.cvtColor(seen, cv2.COLOR_RGB2BGR)
        again = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        ours, stock, taken = ours + len(data), stock + len(again), taken + 1
        errors.append((error(data, seen.astype(int)), error(again, seen.astype(int))))
    assert taken >= 20
    assert ours <= stock
    assert np.mean([a for a, _ in errors]) <= np.mean([b for _, b in errors])
