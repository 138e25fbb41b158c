"""Operations called as they must not be: a sentence, and never a read or write beside the data."""

import threading

import numba
import numpy as np
import pytest

from fast_imagenet import ops
from fast_imagenet.beton import jpeg
from tests import ops_data

CHANGES = [
    ops.AutoAugment, ops.ColorJitter, ops.GaussianBlur, ops.RandAugment, ops.RandomErasing,
    ops.RandomGrayscale, ops.RandomSolarize, ops.ThreeAugment, ops.TrivialAugmentWide,
]  # fmt: skip
GOOD = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize(
    ("images", "count", "message"),
    [
        (GOOD, 2, "4 images and 2 indices"),
        (GOOD[..., :1], 4, r"shape \(4, 8, 8, 1\); give \[b, h, w, 3\]"),
        (GOOD[0], 8, r"shape \(8, 8, 3\)"),
        (GOOD[:, :0], 4, r"shape \(4, 0, 8, 3\)"),
        (GOOD[:, ::2], 4, "a view; give np.ascontiguousarray"),
        (GOOD.astype(np.float64), 4, "float64 images; it takes"),
        ([1, 2], 2, "shape None"),
    ],
)
def test_a_wrong_batch_is_refused(kind, images, count, message):
    with pytest.raises(ValueError, match=f"{kind.__name__} was given.*{message}"):
        kind().transform(images, np.arange(count))


@pytest.mark.parametrize("kind", [*CHANGES, ops.CropDecode])
def test_any_whole_seed_works_and_counts_modulo_two_to_the_64(kind):
    size = [8] if kind is ops.CropDecode else []
    assert kind(*size, seed=2**64 + 5).seed == kind(*size, seed=5).seed == 5
    assert kind(*size, seed=-1).seed == kind(*size, seed=2**64 - 1).seed == -1
    assert kind(*size, seed=np.int64(3)).seed == 3
    with pytest.raises(ValueError, match="seed is 2.5; give a whole number"):
        kind(*size, seed=2.5)
    if not size:
        kind(seed=2**70 - 3).transform(GOOD.copy(), np.arange(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ops.CropDecode("64"), "output_size is '64'"),
        (lambda: ops.CropDecode(224.5), "output_size is 224.5"),
        (lambda: ops.CropDecode(2**70), "output_size is 1180591620717411303424"),
        (lambda: ops.CropDecode((8, 8, 3)), "output_size is"),
        (lambda: ops.CropDecode(8, (0.1, 0.5, 1)), "scale is"),
        (lambda: ops.CropDecode(8, ratio=(0.5, np.inf)), "ratio is"),
        (lambda: ops.CropDecode(8, ratio=(0.5, 1, 2)), "ratio is"),
        (lambda: ops.RandAugment(1e300), "num_ops is"),
        (lambda: ops.RandAugment(num_magnitude_bins=2**70), "num_magnitude_bins is"),
        (lambda: ops.TrivialAugmentWide(num_magnitude_bins=2**70), "num_magnitude_bins is"),
        (lambda: ops.GaussianBlur(1e300), "sigma is"),
        (lambda: ops.RandomErasing(count=2**70), "count of"),
        (lambda: ops.RandomErasing(count=2.5), "count of 2.5"),
        (lambda: ops.RandomErasing(aspect=(0.5, np.inf)), "aspect is"),
        (lambda: ops.RandomErasing(area=(0.1, 0.2, 0.3)), "area is"),
        (lambda: ops.Normalize((np.nan,) * 3, (1, 1, 1)), "mean is"),
        (lambda: ops.Normalize((0, 0, 0), (1, np.nan, 1)), "mean is"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_decoder_serves_two_threads_at_once():
    """Two loaders, or an epoch left early and the next: each call has its own buffers."""
    images = [ops_data.image(60 + 20 * k, 90 + 30 * k, k) for k in range(8)]
    data = [np.frombuffer(jpeg.encode_jpeg(image), np.uint8) for image in images]
    rows = [(d.ctypes.data, d.size, 0, *p.shape[:2]) for d, p in zip(data, images, strict=True)]
    samples, decoder = np.array(rows, np.int64), ops.CropDecode(32, seed=1)

    def decode(part):
        images = np.empty((len(part), 32, 32, 3), np.uint8)
        crops = decoder.draw(part, samples[part, 3], samples[part, 4], (32, 32))
        assert not decoder.apply(samples[part], crops, images).any()
        return images

    parts = [np.arange(8), np.arange(4), np.arange(7, -1, -1)]
    alone, wrong = [decode(part) for part in parts], []

    def work(part, expected):
        wrong.append(not all(np.array_equal(decode(part), expected) for _ in range(100)))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(parts, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 3
    assert 1 <= len(decoder._decoders) <= 3 * numba.config.NUMBA_NUM_THREADS


def test_a_table_that_is_missing_is_no_sound_file():
    data = bytearray(jpeg.encode_jpeg(ops_data.image(64, 96)))
    place = data.index(b"\xff\xdb") + 1
    data[place] = 0x9B  # no longer a table of quantisers
    stored = np.frombuffer(bytes(data), np.uint8)
    samples = np.array([[stored.ctypes.data, stored.size, 0, 64, 96]], np.int64)
    decoder, images = ops.CropDecode(16), np.empty((1, 16, 16, 3), np.uint8)
    crops = decoder.draw(np.arange(1), samples[:, 3], samples[:, 4], (16, 16))
    assert decoder.apply(samples, crops, images)[0] != 0


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 16, 16, 3)),
        np.zeros((1, 16, 32, 3), np.uint8)[:, :, ::2],
        np.zeros((1, 16, 16, 4), np.uint8),
        np.zeros((2, 16, 16, 3), np.uint8),
        np.zeros((16, 16, 3), np.uint8),
        np.broadcast_to(np.uint8(0), (1, 16, 16, 3)),
    ],
)
def test_a_decoder_writes_into_fitting_memory_only(images):
    stored = np.frombuffer(jpeg.encode_jpeg(ops_data.image(64, 96)), np.uint8)
    samples = np.array([[stored.ctypes.data, stored.size, 0, 64, 96]], np.int64)
    crops = np.array([[0, 0, 64, 96, 0]], np.int64)
    with pytest.raises(ValueError, match="give .* uint8"):
        ops.CropDecode(16).apply(samples, crops, images)
    with pytest.raises(ValueError, match="give .* uint8"):
        ops.CropDecode(16).apply(samples, crops[:, :4], np.zeros((1, 16, 16, 3), np.uint8))
