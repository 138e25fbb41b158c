"""Normalize and RandomErasing on the CPU: against torch, the device's version, in real Loaders."""

import numba
import numpy as np
import pytest
import torch
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import ToTensor, ToTorchImage, View

from fast_imagenet.data import device_transforms as batch_transforms
from fast_imagenet.ops.crop_decode import CenterCropDecode
from fast_imagenet.ops.normalize import TYPES, Normalize
from fast_imagenet.ops.random_erasing import (
    BFLOAT16,
    FLOAT16,
    RandomErasing,
    apply_erasing,
    half_bits,
)
from tests import ops_data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = ["uint8", *TYPES]

# numba complains when FFCV drops compiled functions; nothing can be done about it here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def one_thread():
    numba.set_num_threads(1)


def made_images(b=6, height=20, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (b, height, width, 3), np.uint8)


def torch_normalize(images_bhwc, dtype="float32"):
    """As torchvision: /255, - mean, / std in float32, then rounded to the type."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((torch.from_numpy(images_bhwc) / 255 - mean) / std).to(getattr(torch, dtype))


def given(kind, images_bhwc):
    """Images as RandomErasing may get them."""
    return (
        images_bhwc.copy() if kind == "uint8" else Normalize(MEAN, STD, kind).transform(images_bhwc)
    )


def tensor(kind, images):
    """A tensor of the numbers that an array stands for."""
    tensor = torch.from_numpy(images)
    return tensor.view(torch.bfloat16) if kind == "bfloat16" else tensor


# ------------------------------------------------------------------------------------------------
# Normalize
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(5, 20, 24), (1, 1, 1), (2, 1, 300), (3, 7, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_normalize_is_torchs_to_the_last_bit(dtype, shape, threads):
    numba.set_num_threads(threads)
    images_bhwc = made_images(*shape)
    before = images_bhwc.copy()
    out = Normalize(MEAN, STD, dtype).transform(images_bhwc)
    assert out.dtype == TYPES[dtype]
    assert torch.equal(tensor(dtype, out), torch_normalize(images_bhwc, dtype))
    assert np.array_equal(images_bhwc, before)


def test_normalize_every_level():
    images_bhwc = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 1, 256, 3)
    out = Normalize(MEAN, STD).transform(images_bhwc)
    assert torch.equal(torch.from_numpy(out), torch_normalize(images_bhwc))
    device = batch_transforms.normalize(torch.from_numpy(images_bhwc), MEAN, STD)
    assert np.abs(out - device.permute(0, 2, 3, 1).numpy()).max() <= 1e-6


@pytest.mark.parametrize("dtype", [np.float16, np.dtype("f2"), torch.float16, "float16"])
def test_names_of_a_type(dtype):
    assert Normalize(MEAN, STD, dtype).dtype == "float16"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((MEAN, STD, "float64"), "dtype is float64; give float32, float16, bfloat16"),
        ((MEAN, STD, torch.uint8), "dtype is torch.uint8"),
        ((MEAN[:2], STD), "three numbers each"),
        ((MEAN, (0.2, 0.0, 0.2)), "std above 0"),
    ],
)
def test_normalize_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        Normalize(*settings)


# ------------------------------------------------------------------------------------------------
# RandomErasing
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "numpys"), [(FLOAT16, True), (BFLOAT16, False)])
def test_half_types_are_rounded_as_torch_rounds(form, numpys):
    values = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    ties = np.float32([0, -0.0, 1, 2.00390625, 2.01171875, 1.00048828125, 1.00146484375, -8.6])
    values = np.concatenate([values, values * np.float32(1e-5), values * np.float32(1e-7), ties])
    values = np.concatenate([values, np.float32([2**-14, 2**-14 - 2**-26, 2**-25, 3 * 2**-25])])
    wanted = torch.from_numpy(values).to(torch.float16 if numpys else torch.bfloat16)
    ours = np.array([half_bits(value, form) for value in values])
    assert np.array_equal(ours, wanted.view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("uint8", "const"), *((kind, mode) for kind in TYPES for mode in ("const", "rand", "pixel"))],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_erasing_is_the_devices(kind, mode, threads):
    """Equal to erasing on the device after normalization; overlapping boxes in some images."""
    numba.set_num_threads(threads)
    samples = np.array([3, 2**40, 8, 1, 0, 77])
    operation = RandomErasing(0.8, mode, 3, seed=5)
    operation.set_epoch(2)
    source = made_images(6, 31, 17)
    images = given(kind, source)
    out = operation.transform(images, samples)
    assert out is images
    boxes = batch_transforms.draw_erasing(5, 2, samples, (31, 17), 0.8, 3)
    if kind == "uint8":
        wanted = source.copy()
        for b, k in np.ndindex(6, 3):
            top, left, h, w = boxes[b, k]
            wanted[b, top : top + h, left : left + w] = (124, 116, 104)
        assert np.array_equal(out, wanted)
        return
    plain = torch_normalize(source)
    wanted = plain.permute(0, 3, 1, 2)
    wanted = batch_transforms.erase(wanted.clone(), boxes, mode, 5, 2, samples)
    wanted = wanted.permute(0, 2, 3, 1)
    assert not torch.equal(wanted, plain)
    if kind == "float32":
        assert (tensor(kind, out) - wanted).abs().max() <= 1e-6
        assert torch.equal(tensor(kind, out) == plain, wanted == plain)  # nothing else changes
    else:  # both round the same float32, but for the last bit of log and cos
        close = (tensor(kind, out).float() - wanted.to(getattr(torch, kind)).float()).abs()
        assert (close > 0).float().mean() < 0.001
        assert close.max() < 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_the_fill_is_the_mean(kind):
    operation = RandomErasing(1.0)
    out = tensor(kind, operation.transform(given(kind, made_images(4, 40, 40)), np.arange(4)))
    for b, ((top, left, h, w),) in enumerate(operation.draw(np.arange(4), (40, 40))[0].tolist()):
        inside = out[b, top : top + h, left : left + w]
        wanted = np.rint(255 * np.array(MEAN)) if kind == "uint8" else np.zeros(3)
        assert (inside.double().numpy() == wanted).all()
        assert h * w > 0.01 * 1600


def test_another_fill():
    images = RandomErasing(1.0, fill=(9, 8, 7)).transform(
        np.zeros((9, 30, 30, 3), np.uint8), np.arange(9)
    )
    assert {tuple(pixel) for pixel in images.reshape(-1, 3).tolist()} == {(0, 0, 0), (9, 8, 7)}


@pytest.mark.parametrize("mode", ["rand", "pixel"])
def test_noise_is_standard_normal(mode):
    """By pixel: every value its own; by box: one number a box and channel."""
    n = 3000 if mode == "rand" else 40
    images = np.full((n, 24, 24, 3), np.nan, np.float32)
    RandomErasing(1.0, mode, seed=1).transform(images, np.arange(n))
    if mode == "rand":
        values = np.concatenate([np.unique(image[~np.isnan(image)]) for image in images])
        assert len(values) == 3 * n
    else:
        values = images[~np.isnan(images)]
        assert len(np.unique(values)) > 0.999 * len(values)
    assert abs(values.mean()) < 4.5 / np.sqrt(len(values))
    assert abs(values.std() - 1) < 4.5 / np.sqrt(2 * len(values))
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 4.5 * np.sqrt(0.2166 / len(values))


@pytest.mark.parametrize("mode", ["const", "pixel"])
def test_a_image_depends_on_its_key_alone(mode):
    """Not on the batch, its order or the number of threads."""
    source, samples = Normalize(MEAN, STD).transform(made_images(9)), np.arange(9) * 5
    operation = RandomErasing(0.7, mode, 2, seed=3)
    whole = operation.transform(source.copy(), samples)
    order = np.array([4, 8, 0, 4])
    numba.set_num_threads(2)
    assert np.array_equal(operation.transform(source[order], samples[order]), whole[order])
    operation.set_epoch(1)
    assert not np.array_equal(operation.transform(source.copy(), samples), whole)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (2, 2), (3, 100)])
def test_tiny_images(size):
    images = Normalize(MEAN, STD).transform(made_images(50, *size))
    before = images.copy()
    RandomErasing(1.0, "pixel", 2).transform(images, np.arange(50))
    assert (images != before).any() == (min(size) > 1)
    assert not np.array_equal(images, before) or min(size) == 1
    assert (images[:, :, -1] == before[:, :, -1]).any()


def test_probability_zero():
    images = made_images()
    assert np.array_equal(RandomErasing(0.0).transform(images.copy(), np.arange(6)), images)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"p": -0.1}, "probability -0.1; give 0 to 1"),
        ({"mode": "blue"}, "mode 'blue'"),
        ({"count": 0}, "count of 0"),
        ({"area": (0.5, 0.2)}, "area is"),
        ({"aspect": (0.0, 1.0)}, "aspect is"),
        ({"fill": (1, 2)}, "fill is"),
        ({"fill": (1, 2, 256)}, "fill is"),
    ],
)
def test_erasing_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        RandomErasing(**settings)


def test_noise_needs_normalized_images():
    with pytest.raises(ValueError, match="put Normalize before"):
        RandomErasing(1.0, "pixel").transform(made_images(), np.arange(6))


# ------------------------------------------------------------------------------------------------
# Inside a real Loader
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    images = [ops_data.image(40 + 3 * i, 50, seed=i) for i in range(11)]
    return ops_data.write_file(tmp_path_factory.mktemp("erasing") / "a.beton", images)


def load(path, *operations, size=(32, 28), num_workers=1):
    loader = Loader(
        path,
        batch_size=4,
        num_workers=num_workers,
        order=OrderOption.SEQUENTIAL,
        os_cache=True,
        drop_last=False,
        pipelines={"image": [CenterCropDecode(size, 1.0), *operations]},
    )
    return torch.cat([batch[0].clone() for batch in loader])


@pytest.mark.parametrize("dtype", TYPES)
def test_in_a_loader(file, dtype):
    """Normalized, erased, as torch wants it; the last batch is not full."""
    erasing = RandomErasing(0.6, "pixel", 2, seed=4)
    erasing.set_epoch(3)
    operations = [Normalize(MEAN, STD, dtype), erasing, ToTensor()]
    operations += [View(torch.bfloat16)] if dtype == "bfloat16" else []
    images = load(file, *operations, ToTorchImage())
    assert images.shape == (11, 3, 32, 28)
    assert images.dtype == getattr(torch, dtype)
    plain = load(file, ToTensor())
    bare = RandomErasing(0.6, "pixel", 2, seed=4)
    bare.set_epoch(3)
    wanted = bare.transform(given(dtype, plain.numpy()), np.arange(11))
    assert torch.equal(images.permute(0, 2, 3, 1), tensor(dtype, wanted))
    assert torch.equal(images, load(file, *operations, ToTorchImage(), num_workers=2))


def test_uint8_in_a_loader(file):
    erasing = RandomErasing(1.0, seed=4)
    erasing.set_epoch(0)
    images = load(file, erasing, ToTensor()).numpy()
    wanted = erasing.transform(load(file, ToTensor()).numpy(), np.arange(11))
    assert np.array_equal(images, wanted)
    signatures = len(apply_erasing.signatures)
    load(file, erasing, ToTensor(), size=(20, 44))
    assert len(apply_erasing.signatures) == signatures  # another size compiles nothing


@pytest.mark.parametrize(
    ("operations", "words"),
    [
        ([RandomErasing(1.0, "rand"), ToTensor()], "put Normalize before"),
        ([ToTensor(), Normalize(MEAN, STD)], "comes after ToTensor"),
        ([Normalize(MEAN, STD), Normalize(MEAN, STD)], "was given float32"),
        ([ToTensor(), RandomErasing(1.0)], "comes after ToTensor"),
    ],
)
def test_a_wrong_place_in_the_pipeline(file, operations, words):
    with pytest.raises(ValueError, match=words):
        load(file, *operations)
