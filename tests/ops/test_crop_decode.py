"""CropDecode and CenterCropDecode: against Pillow, in real Loaders, on damaged data."""

import io
import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numba
import numpy as np
import pytest
from ffcv.fields.decoders import CenterCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from ffcv.transforms import ToTensor
from PIL import Image

from fast_imagenet import rng
from fast_imagenet.beton import jpeg
from fast_imagenet.native import decoder
from fast_imagenet.ops import (
    CenterCropDecode,
    CropDecode,
    DecodeError,
    RandomSolarize,
    enable_precompiled,
    geometry,
    policy,
)
from fast_imagenet.ops import crop_decode as module
from fast_imagenet.ops import kernel as kernel_module
from fast_imagenet.ops.kernel import source_stamp
from tests import ops_data, reference

SAMPLINGS = {
    "420": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "422": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "440": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "411": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
    "444": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
}


# numba complains when FFCV drops compiled functions; nothing can be done about it here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def one_thread():
    numba.set_num_threads(1)


def encode(image, interval, sampling="420", quality=90, progressive=False):
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling]]
    options += [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    bgr = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, options)[1].tobytes()


def decode(data, shape, crop, size=None, mode=0, **settings):
    """Run the kernel on one sample: (pixels uint8 [h, w, 3], status)."""
    operation = CropDecode(1, reduced_decode=False)
    vars(operation).update(settings)
    data = np.frombuffer(bytes(data), np.uint8).copy()  # its own block: a stray read would show
    samples = np.array([[data.ctypes.data, data.size, mode, *shape[:2]]], np.int64)
    images = np.full((1, *(size or crop[2:4]), 3), 99, np.uint8)
    status = operation.apply(samples, np.array([[*crop, *([0] * (5 - len(crop)))]]), images)
    return images[0], int(status[0])


def random_crop(generator, height, width):
    h, w = int(generator.integers(1, height + 1)), int(generator.integers(1, width + 1))
    top, left = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
    return int(top), int(left), h, w


# ---- the region decoder --------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["own", "libturbojpeg"])
def test_fuzz_random_crops_equal_the_full_decode(own):
    """Any size, sampling and interval, also those whose tiles form no grid: pixels are equal."""
    generator = np.random.default_rng(5)
    cut = 0
    for _ in range(100):
        height, width = (int(n) for n in generator.integers(1, 150, 2))
        image = ops_data.image(height, width, int(generator.integers(1000)))
        if generator.random() < 0.1:
            image = image[..., 0]
        interval = int(generator.choice([0, 1, 2, 3, 4, 5, 7, jpeg.restart_interval(width), 40]))
        sampling = str(generator.choice(list(SAMPLINGS)))
        data = encode(image, interval, sampling, int(generator.integers(30, 100)))
        full = reference.decode_jpeg(data)
        for _ in range(25):
            top, left, h, w = crop = random_crop(generator, height, width)
            pixels, status = decode(data, (height, width), crop, _own_decoder=own)
            assert status == decoder.GOOD
            np.testing.assert_array_equal(pixels, full[top : top + h, left : left + w])
        cut += interval > 0 and _is_cut(data, shape=(height, width))
    assert cut > 20  # the fuzz has met what it is about


def markers_of(data):
    """Places of the restart markers and of the end of the image."""
    scan = data.index(b"\xff\xda") + 14
    return [
        at for at in range(scan, len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD9
    ]


def without_tiles(data, kept):
    """The file with zeros in all tiles but those of the numbers kept."""
    data, ends = bytearray(data), markers_of(data)
    for tile, (begin, end) in enumerate(itertools.pairwise([data.index(b"\xff\xda") + 12, *ends])):
        begin += 2
        if tile not in kept:
            data[begin:end] = bytes(end - begin)
    return bytes(data)


def _is_cut(data, crop=(0, 0, 1, 1), shape=(64, 64)):
    """Whether libturbojpeg is given a part of the file: it does not see that another is damaged."""
    whole = (0, 0, *shape)
    damaged = without_tiles(data, range(len(markers_of(data)) - 1))
    if decode(damaged, shape, whole, _own_decoder=False)[1] == decoder.GOOD:
        return False  # nothing to damage
    return decode(damaged, shape, crop, _own_decoder=False)[1] == decoder.GOOD


@pytest.mark.parametrize("own", [False, True, "only"])
def test_only_the_tiles_under_the_crop_are_read(own):
    """A silent fall-back to the full decode would be slow."""
    data = jpeg.encode_jpeg(ops_data.image(375, 500))
    under = [8 * row + column for row in range(6, 11) for column in (3, 4)]
    damaged = without_tiles(data, under)
    pixels, status = decode(damaged, (375, 500), (100, 200, 60, 60), _own_decoder=own)
    assert status == decoder.GOOD
    np.testing.assert_array_equal(pixels, reference.decode_jpeg(data)[100:160, 200:260])
    assert decode(damaged, (375, 500), (94, 200, 60, 60), _own_decoder=own)[1] == decoder.GOOD + (
        {"only": decoder.FAILED}.get(own, decoder.WARNED)
    )


@pytest.mark.parametrize(("progressive", "interval"), [(True, 0), (False, 0), (False, 5)])
def test_what_cannot_be_cut_is_decoded_in_full(progressive, interval):
    data = encode(ops_data.image(60, 100), interval, progressive=progressive)
    assert not _is_cut(data, shape=(60, 100))
    pixels, status = decode(data, (60, 100), (5, 6, 40, 50))
    assert status == decoder.GOOD
    np.testing.assert_array_equal(pixels, reference.decode_jpeg(data)[5:45, 6:56])


@pytest.mark.parametrize("width", [33, 34, 35, 36, 37])
def test_the_last_columns_of_a_narrow_tile_are_interpolated(width):
    """Chroma of an image of 4 columns is repeated: such a tile must not be cut out alone."""
    data = encode(ops_data.image(64, width), 1)
    full = reference.decode_jpeg(data)
    for left, own in itertools.product(range(32, width), (True, False)):
        crop = (20, left, 30, width - left)
        pixels, _ = decode(data, (64, width), crop, _own_decoder=own)
        np.testing.assert_array_equal(pixels, full[20:50, left:])


def test_misnumbered_or_missing_markers_are_not_trusted():
    """Counting tiles would go wrong, so libturbojpeg decodes the whole file."""
    image = ops_data.image(64, 64)
    good = bytes(encode(image, 2))
    third = [at for at in range(len(good)) if good[at] == 0xFF and 0xD0 <= good[at + 1] <= 0xD7][2]
    wrong = good[: third + 1] + b"\xd5" + good[third + 2 :]
    missing = good[:third] + good[third + 2 :]
    behind = (48, 48, 16, 16)
    first = (0, 0, 10, 20)
    assert _is_cut(good, first)
    for damaged in (wrong, missing, good[:-2], good.replace(b"\xff\xd9", b"\xff\xd0")):
        for crop in (first, behind):
            for own in (True, False):
                assert decode(damaged, (64, 64), crop, _own_decoder=own)[1] == decoder.WARNED


def test_intervals_of_whole_rows_are_cut():
    data = encode(ops_data.image(100, 64), 8)  # two rows of four MCUs
    assert _is_cut(data, shape=(100, 64))


@pytest.mark.parametrize("keep", ["exif", "comment"])
def test_other_segments_do_not_matter(keep):
    buffer = io.BytesIO()
    image = Image.fromarray(ops_data.image(70, 90))
    extra = {"exif": {"exif": b"Exif\0\0" + bytes(3000)}, "comment": {"comment": b"x" * 500}}[keep]
    image.save(buffer, "JPEG", quality=90, restart_marker_blocks=1, **extra)
    assert _is_cut(buffer.getvalue(), shape=(70, 90))
    pixels, _ = decode(buffer.getvalue(), (70, 90), (10, 20, 30, 40))
    full = reference.decode_jpeg(buffer.getvalue())
    np.testing.assert_array_equal(pixels, full[10:40, 20:60])


def test_damaged_streams_never_crash_and_stay_in_their_image():
    """Thousands of damages; the process lives and what could not be decoded is black."""
    generator = np.random.default_rng(6)
    seen = set()
    for _ in range(12):
        height, width = (int(n) for n in generator.integers(17, 120, 2))
        good = encode(ops_data.image(height, width), jpeg.restart_interval(width))
        for _ in range(250):
            data = _damage(good, generator)
            crop = random_crop(generator, height, width)
            own = bool(generator.integers(2))
            pixels, status = decode(data, (height, width), crop, (9, 11), _own_decoder=own)
            seen.add(status)
            if status > decoder.WARNED:
                assert not pixels.any()
    assert {decoder.GOOD, decoder.WARNED, decoder.FAILED} <= seen


def _damage(data, generator):
    data = bytearray(data)
    kind = generator.integers(4)
    at = int(generator.integers(len(data)))
    if kind == 0:
        return data[:at] or b"\xff"
    if kind == 1:
        return data[:at] + data[at + int(generator.integers(1, 40)) :] or b"\xff"
    if kind == 2:
        data[at:at] = generator.bytes(int(generator.integers(1, 20)))
        return data
    for _ in range(int(generator.integers(1, 6))):
        data[int(generator.integers(len(data)))] = int(generator.choice([0, 1, 0xD3, 0xFF]))
    return data


def is_ours(data, crop, shape=None):
    """Whether our own decoder reads it, so that libturbojpeg has nothing to do."""
    shape = shape or Image.open(io.BytesIO(bytes(data))).size[::-1]
    return decode(data, shape, crop, _own_decoder="only")[1] == decoder.GOOD


def test_our_own_decoder_reads_baseline_files():
    """A silent fall-back to libturbojpeg would be slow and would hide a broken decoder."""
    for height, width in ((17, 17), (375, 500), (64, 333), (100, 31)):
        data = jpeg.encode_jpeg(ops_data.image(height, width))
        assert is_ours(data, (0, 0, height, width))
        assert is_ours(data, (height - 1, width - 1, 1, 1))
        assert is_ours(data, (0, 0, 1, 1))
    image = ops_data.image(64, 64)
    assert is_ours(jpeg.encode_jpeg(image, optimize=False), (0, 0, 64, 64))
    for interval in (0, 1, 3, 8):
        for sampling in SAMPLINGS:
            assert is_ours(encode(image, interval, sampling), (0, 0, 64, 64))
        assert is_ours(encode(image[..., 0], interval), (0, 0, 64, 64))
    assert not is_ours(encode(image, 0, progressive=True), (0, 0, 64, 64))
    assert not is_ours(encode(image[:16], 0), (0, 0, 16, 64))


@pytest.mark.parametrize("quality", [1, 10, 50, 90, 100])
def test_our_own_decoder_at_every_quality(quality):
    """Noise at quality 100 has the longest codes, quality 1 the largest quantisers."""
    noise = np.random.default_rng(quality).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for image in (noise, ops_data.image(50, 70), noise // 255 * 255):
        for optimize in (True, False):
            data = jpeg.encode_jpeg(image, quality, interval=1, optimize=optimize)
            assert is_ours(data, (0, 0, 50, 70))
            pixels, _ = decode(data, (50, 70), (0, 0, 50, 70))
            np.testing.assert_array_equal(pixels, reference.decode_jpeg(data))


@pytest.mark.parametrize("interval", [0, 2])
def test_our_own_decoder_and_damage(interval):
    """Some flipped bits, tables included: it gives up, or finds what libturbojpeg finds."""
    generator = np.random.default_rng(8)
    good = encode(ops_data.image(64, 64), interval)
    gave_up, whole = 0, (0, 0, 64, 64)
    for _ in range(600):
        data = bytearray(good)
        for _ in range(int(generator.integers(1, 3))):
            data[int(generator.integers(2, len(data)))] ^= 1 << int(generator.integers(8))
        if not is_ours(data, whole, (64, 64)):
            gave_up += 1
            continue
        ours, theirs = (decode(data, (64, 64), whole, _own_decoder=own) for own in (True, False))
        assert theirs[1] == decoder.GOOD
        np.testing.assert_array_equal(ours[0], theirs[0])
    assert 60 < gave_up < 600


def test_header_that_contradicts_the_file_is_an_error():
    data = jpeg.encode_jpeg(ops_data.image(40, 60))
    assert decode(data, (60, 40), (0, 0, 40, 40))[1] == decoder.WRONG_SIZE
    assert decode(bytes(40 * 60 * 3 - 1), (40, 60), (0, 0, 4, 4), mode=1)[1] == decoder.WRONG_SIZE


# ---- crop, resize, reduced decode ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "area"])
@pytest.mark.parametrize("flip", [0, 1])
def test_crop_and_resize_equal_the_reference(method, flip):
    generator = np.random.default_rng(7)
    image = ops_data.image(200, 260)
    data = jpeg.encode_jpeg(image)
    full = reference.decode_jpeg(data)
    for _ in range(30):
        crop = (*random_crop(generator, 200, 260), flip)
        size = tuple(int(n) for n in generator.integers(1, 120, 2))
        expected = reference.crop_resize(full, crop, size, method)
        for kind, payload in ((0, data), (1, full.tobytes())):
            pixels, _ = decode(payload, (200, 260), crop, size, kind, method=method)
            assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("crop", "out", "is_reduced"),
    [
        ((320, 320), (160, 160), True),
        ((319, 400), (160, 160), False),
        ((400, 400), (60, 60), True),
        ((63, 63), (10, 10), False),
        ((100, 100), (224, 224), False),
    ],
)
def test_what_is_decoded_reduced(crop, out, is_reduced):
    """Half the size, or less, where that still holds the output; not a small crop."""
    data = encode(ops_data.image(400, 400), 0)
    exact, reduced = (
        decode(data, (400, 400), (0, 0, *crop), out, reduced_decode=wanted)[0]
        for wanted in (False, True)
    )
    assert (exact != reduced).any() == is_reduced


@pytest.mark.parametrize(("size", "own"), [(150, False), (70, True), (30, True)])
def test_reduced_decode_is_close_to_exact(size, own):
    """1/2, 1/4 and 1/8: the transform's own reduction is a box filter, so close and not equal."""
    image = ops_data.image(400, 500, 3)
    data = jpeg.encode_jpeg(image)
    for crop in ((0, 0, 400, 500), (31, 77, 333, 402)):
        exact = decode(data, image.shape, crop, (size, size))[0].astype(int)
        settings = {"reduced_decode": True, "_own_decoder": own}
        reduced = decode(data, image.shape, crop, (size, size), **settings)[0].astype(int)
        difference = np.abs(exact - reduced)
        assert 0 < difference.mean() < 2
        assert difference.max() < 24
        shifted = np.abs(exact[:, 1:] - reduced[:, :-1]).mean()
        assert difference.mean() < shifted / 2  # no displacement


def test_output_that_shrinks_by_less_than_two_is_exact():
    data = jpeg.encode_jpeg(ops_data.image(200, 200))
    both = [
        decode(data, (200, 200), (0, 0, 200, 200), (101, 101), reduced_decode=r)[0] for r in (0, 1)
    ]
    np.testing.assert_array_equal(*both)


# ---- draws ---------------------------------------------------------------------------------------


def draws(n, height=375, width=500, seed=1, epoch=2, **options):
    operation = CropDecode(160, seed=seed, **options)
    operation.set_epoch(epoch)
    sides = np.full(n, height), np.full(n, width)
    return operation.draw(np.arange(n), *sides, (160, 160))


@pytest.mark.parametrize(("height", "width"), [(375, 500), (1, 1), (1, 1000), (1000, 1), (17, 60)])
def test_boxes_equal_the_slow_version(height, width):
    crops = draws(200, height, width)
    for sample in range(200):
        expected = reference.random_resized_crop(
            1, 2, sample, height, width, (0.08, 1), (0.75, 4 / 3)
        )
        assert tuple(crops[sample, :4]) == expected


def test_boxes_lie_inside_and_follow_the_distribution():
    crops = draws(40_000)
    top, left, height, width, flip = crops.T
    assert (top >= 0).all()
    assert (top + height <= 375).all()
    assert (left >= 0).all()
    assert (left + width <= 500).all()
    torchvision = pytest.importorskip("torchvision.transforms").RandomResizedCrop.get_params
    image = Image.new("RGB", (500, 375))
    theirs = np.array([torchvision(image, (0.08, 1), (0.75, 4 / 3)) for _ in range(8000)])
    ours = crops[:, :4]
    error = theirs.std(0) / np.sqrt(8000) * np.sqrt(1.2)
    assert (np.abs(theirs.mean(0) - ours.mean(0)) < 5 * error).all()
    np.testing.assert_allclose(theirs.std(0), ours.std(0), rtol=0.05)
    assert abs(flip.mean() - 0.5) < 0.0125


def test_draws_depend_on_seed_epoch_and_sample_only():
    base = draws(500)
    np.testing.assert_array_equal(base, draws(500))
    np.testing.assert_array_equal(base[100:], draws(500)[100:])
    for other in (draws(500, seed=3), draws(500, epoch=3)):
        assert (other[:, :4] != base[:, :4]).any(1).mean() > 0.95
        correlation = np.corrcoef(base[:, 2] * base[:, 3], other[:, 2] * other[:, 3])[0, 1]
        assert abs(correlation) < 0.2
    neighbors = np.corrcoef(base[1:, 1], base[:-1, 1])[0, 1]
    assert abs(neighbors) < 0.2


def test_flip_probability_and_its_independence_of_the_box():
    assert not draws(1000, flip=0.0)[:, 4].any()
    assert draws(1000, flip=1.0)[:, 4].all()
    crops = draws(20_000)
    flipped, plain = crops[crops[:, 4] == 1, 1], crops[crops[:, 4] == 0, 1]
    assert abs(flipped.mean() - plain.mean()) < 5 * crops[:, 1].std() / np.sqrt(5000)


def test_streams_are_distinct():
    streams = [value for name, value in vars(rng).items() if name.startswith("STREAM_")]
    assert len(streams) == len(set(streams)) > 10


@pytest.mark.parametrize(
    ("height", "width", "ratio"), [(375, 500, 0.875), (500, 333, 0.9), (1, 1, 0.5)]
)
def test_center_box_equals_ffcv(height, width, ratio):
    from ffcv.fields.rgb_image import get_center_crop

    top, left, h, w, flip = module.center_crops([height], [width], (224, 224), ratio)[0]
    i, j, side, _ = get_center_crop(height, width, None, ratio)
    assert flip == 0
    assert (h, w) == (max(1, side), max(1, side))
    assert min(height, width) == 1 or (top, left) == (i, j)


def test_center_box_has_the_shape_of_the_output():
    top, left, h, w, _ = module.center_crops([300], [400], (100, 200), 1.0)[0]
    assert (top, left, h, w) == (50, 0, 200, 400)


# ---- inside a real Loader ------------------------------------------------------------------------

SIDES = [(60, 80), (100, 75), (1, 1), (33, 200), (200, 31), (96, 96), (128, 64), (20, 20)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same 24 images as JPEG with markers, as stock FFCV writes them, raw, and mixed."""
    folder = tmp_path_factory.mktemp("ops")
    images = [ops_data.image(*SIDES[i % len(SIDES)], seed=i) for i in range(24)]
    kinds = {
        "ours": {},
        "stock": {"markers": False},
        "raw": {"mode": "raw"},
        "mixed": {"mode": "smart", "smart_threshold": 15_000},
    }
    paths = {
        kind: ops_data.write_file(folder / f"{kind}.beton", images, **options)
        for kind, options in kinds.items()
    }
    return images, paths


def load(path, operation, batch_size=7, num_workers=1, **options):
    """All images and labels of one epoch."""
    options = {"order": OrderOption.SEQUENTIAL, "os_cache": True, **options}
    loader = Loader(
        path,
        batch_size=batch_size,
        num_workers=num_workers,
        pipelines={"image": [operation, ToTensor()]},
        drop_last=False,
        **options,
    )
    batches = [(images.numpy().copy(), labels.numpy().copy()) for images, labels in loader]
    images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    return images, labels[:, 0]


def test_loader_equals_pillow(files):
    _, paths = files
    operation = CenterCropDecode((48, 40), 0.9, reduced_decode=False)
    images, labels = load(paths["ours"], operation)
    assert images.shape == (24, 48, 40, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.arange(24))
    for index in range(24):
        height, width = SIDES[index % len(SIDES)]
        full = reference.decode_jpeg(jpeg.encode_jpeg(files[0][index]))
        crop = module.center_crops([height], [width], (48, 40), 0.9)[0]
        expected = reference.crop_resize(full, crop, (48, 40))
        assert np.abs(images[index].astype(int) - expected).max() <= 1


def test_stock_files_ours_and_raw_give_the_same_crops(files):
    images, paths = files
    results = {}
    for kind, path in paths.items():
        operation = CropDecode(32, seed=4, reduced_decode=False)
        operation.set_epoch(0)
        results[kind] = load(path, operation)[0].astype(int)
    np.testing.assert_array_equal(results["ours"], results["stock"])
    small = np.array([np.prod(image.shape) <= 15_000 for image in images])
    assert 0 < small.sum() < 24
    np.testing.assert_array_equal(results["mixed"][small], results["raw"][small])
    np.testing.assert_array_equal(results["mixed"][~small], results["ours"][~small])


def test_stock_ffcv_reads_our_files(files):
    _, paths = files
    both = [
        load(paths[kind], CenterCropRGBImageDecoder((32, 32), 1.0))[0] for kind in ("ours", "stock")
    ]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("os_cache", [True, False])
@pytest.mark.parametrize(("workers", "batch_size"), [(2, 7), (1, 24), (2, 1), (2, 5)])
def test_same_images_for_any_workers_batches_and_cache(files, workers, batch_size, os_cache):
    if workers > numba.config.NUMBA_NUM_THREADS:
        pytest.skip(f"needs {workers} cores")
    _, paths = files
    results = []
    for options in ({}, {"num_workers": workers, "batch_size": batch_size, "os_cache": os_cache}):
        operation = CropDecode(40, seed=4)
        operation.set_epoch(3)
        results.append(load(paths["mixed"], operation, **options)[0])
    np.testing.assert_array_equal(*results)


def test_order_and_subsets_do_not_change_a_sample(files):
    _, paths = files
    expected = _epoch(paths["ours"], 5)[0]
    for options in ({"order": OrderOption.RANDOM, "seed": 3}, {"indices": [20, 3, 11]}):
        images, labels = _epoch(paths["ours"], 5, **options)
        np.testing.assert_array_equal(images, expected[labels])


def _epoch(path, epoch, **options):
    operation = CropDecode(24, seed=8)
    operation.set_epoch(epoch)
    return load(path, operation, **options)


def test_epochs_differ_and_repeat(files):
    _, paths = files
    first, second, again = (_epoch(paths["ours"], epoch)[0] for epoch in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert (first != second).any(axis=(1, 2, 3)).sum() >= 20


def test_epochs_differ_without_set_epoch(files):
    """Someone who only puts the operation into a pipeline must not see one crop for ever."""
    _, paths = files
    operation = CropDecode(24, seed=8)
    pipelines = {"image": [operation, ToTensor()]}
    loader = Loader(
        paths["ours"], batch_size=24, num_workers=1, pipelines=pipelines, drop_last=False
    )
    epochs = [next(iter(loader))[0].numpy().copy() for _ in range(3)]
    assert all((a != b).any() for a, b in ((epochs[0], epochs[1]), (epochs[1], epochs[2])))


def test_resolution_changes_between_epochs_without_compiling(files):
    _, paths = files
    operation = CropDecode(24, seed=8)
    pipelines = {"image": [operation, ToTensor()]}
    loader = Loader(paths["mixed"], batch_size=24, num_workers=1, pipelines=pipelines)
    operation.output_size = 24
    assert next(iter(loader))[0].shape == (24, 24, 24, 3)
    assert len(module.draw_random_crops.signatures) == 1
    operation.output_size = (40, 16)
    assert next(iter(loader))[0].shape == (24, 40, 16, 3)
    assert len(module.draw_random_crops.signatures) == 1


def test_training_and_validation_loaders_run_side_by_side(files):
    """Two loaders share the thread pool; neither waits for the other, images stay the same."""
    _, paths = files
    workers = min(2, numba.config.NUMBA_NUM_THREADS)
    operations = CropDecode(24, seed=8), CenterCropDecode(24, 0.9)
    operations[0].set_epoch(0)
    alone = [load(paths["mixed"], operation, batch_size=5) for operation in operations]
    loaders = [
        Loader(
            paths["mixed"],
            batch_size=5,
            num_workers=workers,
            os_cache=True,
            pipelines={"image": [operation, ToTensor()]},
            drop_last=False,
        )
        for operation in operations
    ]
    together = [[], []]
    for batches in zip(*loaders, strict=True):
        for kind, (images, _) in enumerate(batches):
            together[kind].append(images.numpy().copy())
    for kind in range(2):
        np.testing.assert_array_equal(np.concatenate(together[kind]), alone[kind][0])


@pytest.mark.slow
def test_second_process_compiles_nothing():
    """All kernels come from the cache on disk, with FFCV in the process and without."""
    code = (
        "import numpy as np, ffcv\n"
        "from fast_imagenet.ops import crop_decode as m\n"
        "o = m.CropDecode(8)\n"
        "pixels = np.zeros((30, 40, 3), np.uint8)\n"
        "samples = np.array([[pixels.ctypes.data, pixels.size, 1, 30, 40]], np.int64)\n"
        "crops = o.draw(np.arange(1), samples[:, 3], samples[:, 4], (8, 8))\n"
        "o.apply(samples, crops, np.empty((1, 8, 8, 3), np.uint8))\n"
        "stats = m.draw_random_crops.stats\n"
        "print(sum(stats.cache_misses.values()), sum(stats.cache_hits.values()))\n"
    )
    draws(1)
    decode(bytes(30 * 40 * 3), (30, 40), (0, 0, 8, 8), mode=1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "1"], done.stdout + done.stderr


def test_cached_kernels_are_stamped_with_every_file_they_are_made_of():
    """Otherwise an edited geometry.py would keep running from policy.py's cached kernels."""
    stamp = source_stamp(Path(policy.__file__))
    names = {name for name, *_ in stamp}
    assert {f"ops/{name}.py" for name in ("policy", "geometry", "color", "vectors")} <= names
    assert policy.apply_policy._cache._cache_file._source_stamp == stamp
    assert geometry.resample_nearest._cache._cache_file._source_stamp != stamp


def test_a_stamp_follows_imports_and_changes_with_any_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_module, "_PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    (tmp_path / "rng.py").write_text("import math")
    (tmp_path / "ops/inner.py").write_text("from .. import rng")
    (tmp_path / "ops/other.py").write_text("")
    top = tmp_path / "ops/top.py"
    top.write_text("import numpy\nfrom .inner import x, y")
    before = source_stamp.__wrapped__(top)
    assert [name for name, *_ in before] == ["ops/inner.py", "ops/top.py", "rng.py"]
    (tmp_path / "ops/other.py").write_text("changed")
    assert source_stamp.__wrapped__(top) == before
    (tmp_path / "rng.py").write_text("import math, random")
    assert source_stamp.__wrapped__(top) != before


# ---- errors --------------------------------------------------------------------------------------


def run_on_damaged(path, operation):
    """One batch of the file, through the operation's own stage function."""
    loader = Loader(
        path, batch_size=24, num_workers=1, pipelines={"image": [operation, ToTensor()]}
    )
    reader = loader.reader
    memory = np.memmap(path, "uint8", mode="r")
    state = (memory, loader.memory_manager.ptrs, loader.memory_manager.sizes)
    images = np.empty((24, 16, 16, 3), np.uint8)
    stage = operation.generate_code()
    return stage(np.arange(24), images, reader.metadata["f0"], state)


@pytest.fixture
def damaged(files, tmp_path):
    """Our file with a broken start of scan data in sample 11 and a broken first byte in 5."""
    _, paths = files
    data = bytearray(Path(paths["ours"]).read_bytes())
    places = Reader(paths["ours"]).metadata["f0"]["data_ptr"]
    data[places[5]] = 0
    data[places[11] + 200 : places[11] + 900] = bytes(700)
    path = tmp_path / "damaged.beton"
    path.write_bytes(data)
    return str(path)


def test_decode_error_names_file_sample_and_reason(damaged):
    operation = CropDecode(16)
    with pytest.raises(DecodeError, match=r"damaged\.beton: sample 5: .*could not decode.*2 such"):
        run_on_damaged(damaged, operation)
    assert operation.error_count == 2
    assert [index for index, _ in operation.errors] == [5, 11]


def test_counted_errors_give_black_images(damaged, files):
    operation = CropDecode(16, on_error="count", seed=1)
    images = run_on_damaged(damaged, operation)
    good = run_on_damaged(files[1]["ours"], CropDecode(16, seed=1))
    assert operation.error_count == 2
    assert not images[5].any()
    others = np.delete(np.arange(24), [5, 11])
    np.testing.assert_array_equal(images[others], good[others])


def test_errors_are_the_same_with_operations_in_one_visit(damaged):
    """Black images go through the operations, too."""
    with pytest.raises(DecodeError, match=r"damaged\.beton: sample 5: .*could not decode.*2 such"):
        run_on_damaged(damaged, CropDecode(16, then=[RandomSolarize(0, 1.0)]))
    decoder, seen = CropDecode(16, on_error="count", then=[RandomSolarize(0, 1.0)]), []
    decoder.before_batch = seen.append
    images = run_on_damaged(damaged, decoder)
    plain = run_on_damaged(damaged, CropDecode(16, on_error="count"))
    assert decoder.error_count == 2 and (images[5] == 255).all()
    whole = np.delete(np.arange(24), 11)  # what is left of 11 is not the same twice
    np.testing.assert_array_equal(images[whole], 255 - plain[whole])
    np.testing.assert_array_equal(seen, [np.arange(24)])


def test_samples_outside_the_file_are_reported(files):
    """A truncated file: the sample's bytes are gone, nothing is read beyond the end."""
    operation = CropDecode(16, on_error="count")
    memory = np.zeros(1000, np.uint8)
    table = np.zeros(3, [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
    table["mode"], table["width"], table["height"] = 1, 10, 10
    table["data_ptr"] = [0, 900, 2**63]
    pointers = np.array([0, 900], np.uint64)
    state = (memory, pointers, np.array([300, 300], np.uint64))
    stage = operation.generate_code()
    stage(np.arange(3), np.empty((3, 16, 16, 3), np.uint8), table, state)
    assert operation.errors == [
        (1, decoder.REASONS[decoder.OUTSIDE]),
        (2, decoder.REASONS[decoder.OUTSIDE]),
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"output_size": 0}, "output_size"),
        ({"output_size": (1, 2, 3)}, "output_size"),
        ({"scale": (0, 1)}, "scale"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.2)}, "scale"),
        ({"ratio": (2, 1)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"method": "nearest"}, "nearest"),
        ({"on_error": "ignore"}, "ignore"),
    ],
)
def test_wrong_settings_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        CropDecode(**{"output_size": 8, **arguments})


def test_center_ratio_is_checked():
    with pytest.raises(ValueError, match="ratio"):
        CenterCropDecode(8, 1.5)


def test_operations_can_be_pickled_after_use():
    operation = CropDecode(8, seed=3, then=[RandomSolarize(seed=4)])
    pixels = np.zeros((30, 40, 3), np.uint8)
    samples = np.array([[pixels.ctypes.data, pixels.size, 1, 30, 40]], np.int64)
    operation.apply(samples, np.array([[0, 0, 30, 40, 0]]), np.empty((1, 8, 8, 3), np.uint8))
    copy = pickle.loads(pickle.dumps(operation))
    assert copy.seed == 3 and copy.then[0].seed == 4
    assert copy.output_size == (8, 8)
    assert not copy._decoders


def test_patch_is_applied_once_and_leaves_other_code_alone():
    from ffcv.pipeline.compiler import Compiler

    enable_precompiled()
    before = Compiler.compile
    enable_precompiled()
    assert Compiler.compile is before

    def plain(x):
        return x + 1

    assert hasattr(Compiler.compile(plain), "py_func")
    plain.precompiled = True
    assert Compiler.compile(plain) is plain
