"""The writer's C library: the right coefficients, ordinary files, no crash ever."""

import ctypes
import io
import os
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fast_imagenet.beton import jpeg
from fast_imagenet.beton.encode import fitting_size
from fast_imagenet.native import FOLDER, recode
from tests import jpeg_reference
from tests.beton.test_jpeg import made_image
from tests.odd_images import as_jpeg, odd_images


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def error(data, image):
    return float(((pixels(data).astype(int) - image) ** 2).mean())


def rewrite(data, quality=90, size_wh=None):
    header = recode.read_header(data)
    if header is None:
        return None
    size_wh = size_wh or (header.width, header.height)
    layout = jpeg.restart_interval(size_wh[0]), jpeg.quantisers(quality)
    return recode.write_anew(header, data, size_wh, *layout)


def photographs(step):
    folder = os.environ.get("FAST_IMAGENET_PHOTOS")
    if not folder:
        pytest.skip("FAST_IMAGENET_PHOTOS does not name a folder of photographs")
    return sorted(Path(folder, "imagenet_samples").glob("*.JPEG"))[::step]


# ------------------------------------------------------------------------------------------------
# An image that fits
# ------------------------------------------------------------------------------------------------


def check_coefficients(data, quality, interval):
    """Luma, and chroma that has half its size already, exactly; the rest up to an unsure half."""
    wanted = np.frombuffer(jpeg.quantisers(quality), np.uint8).reshape(2, 64)
    header = recode.read_header(data)
    ours = recode.write_anew(
        header, data, (header.width, header.height), interval, wanted.tobytes()
    )
    old, new = jpeg_reference.read(data), jpeg_reference.read(ours)
    assert (new.width, new.height, new.interval) == (old.width, old.height, interval)
    assert new.halved
    np.testing.assert_array_equal(new.steps[0], np.maximum(old.steps[0], wanted[0]))
    rows, columns, _ = old.blocks[0].shape
    expected = jpeg_reference.rounded(old.blocks[0], old.steps[0], new.steps[0])
    np.testing.assert_array_equal(new.blocks[0][:rows, :columns], expected)
    for c in (1, 2):
        if old.halved:
            expected = jpeg_reference.rounded(old.blocks[c], old.steps[c], new.steps[c])
            np.testing.assert_array_equal(new.blocks[c], expected)
            continue
        np.testing.assert_array_equal(new.steps[c], wanted[1])
        exact = jpeg_reference.halved(old.blocks[c], old.steps[c], rows, columns) / wanted[1]
        exact = np.clip(exact, -1023, 1023)
        assert np.abs(new.blocks[c] - exact).max() < 0.501


@pytest.mark.parametrize("subsampling", [0, 2])
def test_coefficients_are_kept_rounded_or_halved(subsampling):
    """Sizes that end inside a block and inside an MCU, every quality, flat images and noise."""
    rng = np.random.default_rng(subsampling)
    for number in range(60):
        height, width = rng.integers(1, 70, 2)
        image = made_image(height, width, number)
        if number % 5 == 0:
            image = rng.integers(0, 256, image.shape, np.uint8)
        if number % 7 == 0:
            image[:] = 200
        data = as_jpeg(image, quality=int(rng.integers(1, 101)), subsampling=subsampling)
        check_coefficients(data, int(rng.integers(1, 101)), int(rng.integers(1, 9)))


def test_coefficients_of_photographs():
    taken = 0
    for path in photographs(60):
        data = path.read_bytes()
        if recode.read_header(data):
            check_coefficients(data, 90, 4)
            taken += 1
    assert taken


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (97, 1100), (40, 9), (8, 8), (17, 33), (24, 24)]
)
def test_it_is_no_worse_than_encoding_again(subsampling, height, width):
    """Measured against the source's pixels; the sides reach every way an image can end."""
    image = made_image(height, width)
    source = as_jpeg(image, quality=96, subsampling=subsampling)
    seen = pixels(source)
    again = jpeg.encode_jpeg(seen, 85, optimize=False)
    ours = rewrite(source, 85)
    assert pixels(ours).shape == image.shape
    assert error(ours, seen.astype(int)) < 1.05 * error(again, seen.astype(int)) + 0.3
    assert len(ours) < 1.02 * len(again) + 40
    assert b"\xff\xdd\0\4" + jpeg.restart_interval(width).to_bytes(2, "big") in ours


def test_coarse_source_is_not_made_finer():
    source = as_jpeg(made_image(90, 120), quality=50, subsampling=2)
    ours = rewrite(source)
    np.testing.assert_array_equal(pixels(ours), pixels(source))
    assert len(ours) < 1.1 * len(source)


def test_a_file_may_become_larger():
    """Noise rewritten at quality 100 is larger than its source; tables of before do no harm."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    data = as_jpeg(noise, quality=30, subsampling=0)
    for quality in (100, 30, 100):
        ours = rewrite(as_jpeg(noise, quality=100, subsampling=0), quality)
        assert pixels(ours).shape == noise.shape
        assert pixels(rewrite(data, quality)).shape == noise.shape


def test_photographs_are_nearer_and_smaller_than_encoded_again():
    ours = stock = taken = 0
    errors = []
    for path in photographs(8):
        source, seen = path.read_bytes(), pixels(path.read_bytes())
        data = rewrite(source)
        if data is None:
            continue
        bgr = cv2.cvtColor(seen, cv2.COLOR_RGB2BGR)
        again = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        ours, stock, taken = ours + len(data), stock + len(again), taken + 1
        errors.append((error(data, seen.astype(int)), error(again, seen.astype(int))))
    assert taken >= 20
    assert ours <= stock
    assert np.mean([a for a, _ in errors]) <= np.mean([b for _, b in errors])


# ------------------------------------------------------------------------------------------------
# An image that must shrink
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(
    ("size_wh", "longest"),
    [((300, 200), 160), ((211, 333), 97), ((129, 17), 128), ((700, 90), 64), ((2, 900), 100)],
)
def test_shrinking_is_an_area_mean(size_wh, longest, subsampling):
    """As near to the exact mean as decoding, INTER_AREA and encoding again."""
    data = as_jpeg(made_image(size_wh[1], size_wh[0]), quality=95, subsampling=subsampling)
    new_wh = fitting_size(size_wh, longest)
    mean = cv2.resize(pixels(data), new_wh, interpolation=cv2.INTER_AREA).astype(int)
    again, ours = jpeg.encode_jpeg(mean.astype(np.uint8), 95), rewrite(data, 95, new_wh)
    assert pixels(ours).shape == mean.shape
    assert error(ours, mean) < 1.3 * error(again, mean) + 3
    assert abs((pixels(ours) - mean).mean()) < 1


def test_shrunk_photographs_are_as_near_as_the_long_way():
    errors = []
    for path in photographs(10):
        data, seen = path.read_bytes(), pixels(path.read_bytes())
        new_wh = fitting_size(seen.shape[1::-1], 300)
        ours = rewrite(data, 90, new_wh)
        if ours is None:
            continue
        mean = cv2.resize(seen, new_wh, interpolation=cv2.INTER_AREA)
        again = jpeg.encode_jpeg(mean, 90)
        errors.append((error(ours, mean.astype(int)), error(again, mean.astype(int))))
    ours, again = np.mean(errors, 0)
    assert ours < 1.05 * again


def test_shrinking_writes_markers_and_quantisers_as_the_encoder_does():
    ours = rewrite(as_jpeg(made_image(300, 400), quality=95), 85, (200, 150))
    stored = jpeg_reference.read(ours)
    assert (stored.width, stored.height, stored.halved, stored.interval) == (200, 150, True, 1)
    assert stored.steps[:2].tobytes() == jpeg.quantisers(85)


# ------------------------------------------------------------------------------------------------
# What is not plain, and damage
# ------------------------------------------------------------------------------------------------


def test_what_is_not_plain_is_left_to_others():
    others = {name: data for name, (data, _) in odd_images().items()}
    plain = ("plain.JPEG", "full_chroma.JPEG", "odd_sides.JPEG", "really_a_jpeg.png", "no_suffix")
    for name in (*plain, "turned.JPEG", "upside_down.JPEG", "broken_exif.JPEG", "one_pixel.JPEG"):
        assert rewrite(others.pop(name)), name
    assert rewrite(others.pop("big_profile.JPEG"))
    for name, data in others.items():
        assert recode.read_header(data) is None, name
    image = made_image(40, 60)
    assert recode.read_header(jpeg.encode_jpeg(image)) is None  # has markers already
    assert recode.read_header(as_jpeg(image, keep_rgb=True, subsampling=0)) is None
    for subsampling in (0, 2):
        data = as_jpeg(image, subsampling=subsampling)
        assert rewrite(data[:-2] + b"\0\0" + data[-2:]) is None
        assert rewrite(data[:-40] + data[-2:]) is None


@pytest.mark.parametrize(
    ("place", "symbol", "sound"),
    [(0, 11, True), (0, 12, False), (0, 0x1B, False), (1, 0xFA, True), (1, 11, False)],
)
def test_codes_that_no_8_bit_image_has_are_not_read(place, symbol, sound):
    """The last code of the first or second table, which the scan does not use, for another."""
    data = as_jpeg(np.full((8, 8, 3), 128, np.uint8), subsampling=0)
    header = recode.read_header(data)
    counts = header.codes[place]
    used = sum(counts[:16])
    counts[16 + used - 1] = symbol
    ours = recode.write_anew(header, data, (8, 8), 1, jpeg.quantisers(90))
    assert (ours is not None) == sound


def damaged(count, subsampling, seed=1):
    """Plain JPEGs with a few bytes changed, often cut, with a good end."""
    rng = np.random.default_rng(seed)
    data = as_jpeg(made_image(70, 90), quality=95, subsampling=subsampling)
    for _ in range(count):
        broken = bytearray(data)
        for place in rng.integers(2, len(data), rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        if rng.random() < 0.3:
            del broken[int(rng.integers(2, len(data))) :]
        broken[-2:] = b"\xff\xd9"
        yield bytes(broken)


@pytest.mark.parametrize("size_wh", [None, (45, 35)])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_damaged_files_are_refused_or_readable(subsampling, size_wh):
    refused = 0
    for broken in damaged(400, subsampling):
        header = recode.read_header(broken)
        fits = header and min(header.width // 45, header.height // 35) >= 1
        ours = rewrite(broken, 90, size_wh if fits else None)
        refused += ours is None
        if ours is not None:
            assert pixels(ours).ndim == 3
    assert 100 < refused < 400


@pytest.mark.parametrize(
    ("size_wh", "interval", "steps"),
    [
        *(((0, 70), 1, b"\2" * 128), ((90, 71), 1, b"\2" * 128), ((91, 70), 1, b"\2" * 128)),
        *(((90, 70), 0, b"\2" * 128), ((90, 70), 65536, b"\2" * 128), ((90, 70), -1, b"\2" * 128)),
        *(((90, 70), 1, b"\2" * 127), ((90, 70), 1, b"\2" * 127 + b"\0")),
    ],
)
def test_wrong_arguments_are_refused(size_wh, interval, steps):
    """Each would divide by zero, or write beside the memory."""
    data = as_jpeg(made_image(70, 90))
    header = recode.read_header(data)
    with pytest.raises(ValueError, match="give"):
        recode.write_anew(header, data, size_wh, interval, steps)


def test_the_header_of_another_file_is_refused():
    data = as_jpeg(made_image(70, 90))
    header = recode.read_header(data)
    for other in (b"", data[:20], data[: header.scan], data[: header.scan + 1]):
        assert recode.write_anew(header, other, (90, 70), 1, b"\2" * 128) is None


# ------------------------------------------------------------------------------------------------
# The library itself
# ------------------------------------------------------------------------------------------------


def test_the_structure_is_the_one_of_the_c_code(tmp_path):
    program = tmp_path / "size"
    text = '#include <stdio.h>\n#include "huffman.h"\n#include "header.h"\n'
    text += 'int main(void) { printf("%zu", sizeof(Header)); }'
    source = tmp_path / "size.c"
    source.write_text(text)
    subprocess.run(["cc", "-I", str(FOLDER), "-o", program, source], check=True)
    size = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert int(size) == ctypes.sizeof(recode.Header)
