"""Policies and color changes of the torchvision backend: torchvision's and timm's own results."""

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import InterpolationMode, v2

from fast_imagenet.data import augmentation as augment
from fast_imagenet.data import torch_augmentation as torch_augment
from fast_imagenet.data.augmentation import POLICIES, STAGES, Augment
from fast_imagenet.data.torch_augmentation import (
    KeyedTransforms,
    LiteRandAugment,
    RandAugment,
    TimmRandAugment,
    build_stages,
    keyed_generator,
)
from fast_imagenet.data.torch_loader import TorchTrainLoader
from tests.ops_data import image as make_image

SEED, EPOCH = 3, 2
EVERYTHING = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}
EVERYTHING |= {"grayscale": 0.3, "solarize": 0.3, "blur": 0.3}


def test_every_stage_is_in_everything():
    augment = Augment(**EVERYTHING)
    off = [s.name for s in STAGES if s.name != "policy" and not s.wanted(augment)]
    assert not off, f"switch on in EVERYTHING: {', '.join(off)}"


def made_images(n=12):
    return [torch.from_numpy(make_image(30 + i, 41, seed=i)) for i in range(n)]


def changed(images, transforms="cpu", seed=SEED, epoch=EPOCH, **settings):
    keyed = KeyedTransforms(Augment(**settings), seed, transforms)
    return [keyed(image, epoch, index) for index, image in enumerate(images)]


def wanted(images, transform):
    """The results of one transform on Pillow images, the generator in the keyed states."""
    results = []
    for index, image in enumerate(images):
        with keyed_generator([SEED, EPOCH, index, 1]):
            results.append(torch.from_numpy(np.array(transform(Image.fromarray(image.numpy())))))
    return results


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# ------------------------------------------------------------------------------------------------
# Whose results they are
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "transform"),
    [
        ({"policy": "rand_augment"}, v2.RandAugment()),
        (
            {"policy": "rand_augment", "policy_ops": 4, "policy_magnitude": 17},
            v2.RandAugment(4, 17),
        ),
        ({"policy": "trivial_augment"}, v2.TrivialAugmentWide()),
        (
            {"policy": "trivial_augment_bilinear"},
            v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
        ),
        ({"policy": "auto_augment"}, v2.AutoAugment()),
        ({"brightness": 0.4, "hue": 0.2}, v2.ColorJitter(0.4, 0, 0, 0.2)),
        ({"contrast": 0.4, "saturation": 0.3}, v2.ColorJitter(0, 0.4, 0.3)),
        ({"grayscale": 0.5}, v2.RandomGrayscale(0.5)),
        ({"solarize": 0.5}, v2.RandomSolarize(128, 0.5)),
        ({"blur": 0.5}, v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.5)),
    ],
)
def test_results_are_torchvisions(settings, transform):
    images = made_images()
    ours = changed(images, **settings)
    assert equal(ours, wanted(images, transform))
    assert not equal(ours, images)
    assert all(image.dtype == torch.uint8 and image.is_contiguous() for image in ours)


def test_order_of_the_stages():
    images, jitter = made_images(), v2.ColorJitter(0.4, 0.3, 0.2, 0.1)
    others = [v2.RandomGrayscale(0.3), v2.RandomSolarize(128, 0.3)]
    others += [v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.3)]
    transform = v2.Compose([v2.RandAugment(), jitter, *others])
    assert equal(changed(images, policy="rand_augment", **EVERYTHING), wanted(images, transform))


def test_no_settings_no_stages():
    image = made_images(1)[0]
    assert build_stages(Augment(), "cpu") == []
    assert KeyedTransforms(Augment(), 0, "cpu")(image, 0, 0) is image


def timms(images, name):
    """timm's own RandAugment, its generators seeded from the keyed state of torch's."""
    hparams = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BILINEAR}
    transform = rand_augment_transform(name, hparams)

    def run(image):
        seeds = torch.randint(2**32, (2,)).tolist()
        states = np.random.get_state(), random.getstate()
        np.random.seed(seeds[0])
        random.seed(seeds[1])
        image = transform(image)
        np.random.set_state(states[0])
        random.setstate(states[1])
        return image

    return wanted(images, run)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rand-m9-mstd0.5-inc1", {"policy_mstd": 0.5}),
        ("rand-m7-n3-inc1", {"policy_magnitude": 7, "policy_ops": 3}),
    ],
)
def test_results_are_timms(name, settings):
    images = made_images(40)
    ours = changed(images, policy="rand_augment_timm", **settings)
    assert equal(ours, timms(images, name))
    assert not equal(ours, images)


def test_posterize_to_no_bits_is_black():
    """timm's increasing policy asks for it at magnitude 10, and Pillow 13 refuses."""
    image = Image.fromarray(make_image(9, 8))
    assert not np.asarray(torch_augment.posterize(image, 0)).any()
    for bits in (1, 3, 7, 8):
        assert torch_augment.posterize(image, bits, fillcolor=0) == ImageOps.posterize(image, bits)
    operations = TimmRandAugment(2, 10, 0.0).transform.ops
    assert sum(operation.aug_fn is torch_augment.posterize for operation in operations) == 1


def test_three_augment_does_exactly_one_of_three():
    images, counts = made_images(150), np.zeros(3, int)
    for image, ours in zip(images, changed(images, policy="three_augment"), strict=True):
        pil = Image.fromarray(image.numpy())
        gray = np.repeat(np.asarray(pil.convert("L"))[:, :, None], 3, axis=2)
        solarized = np.asarray(ImageOps.solarize(pil, 128))
        is_gray = np.array_equal(ours.numpy(), gray)
        is_solarized = np.array_equal(ours.numpy(), solarized)
        difference = (ours.int() - image.int()).abs().float()
        is_blurred = not is_gray and not is_solarized and float(difference.mean()) < 8
        assert is_gray + is_solarized + is_blurred == 1
        counts += [is_gray, is_solarized, is_blurred]
    assert (np.abs(counts - 50) < 4.5 * np.sqrt(150 * 2 / 9)).all()


# ------------------------------------------------------------------------------------------------
# RandAugment: which operations, how strong
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def applied(monkeypatch):
    """(name, magnitude) of every operation that a RandAugment applies."""
    calls = []

    def note(self, image, transform_id, magnitude, **options):
        calls.append((transform_id, magnitude))
        return image

    monkeypatch.setattr(v2.RandAugment, "_apply_image_or_video_transform", note)
    return calls


@pytest.mark.parametrize("kind", [RandAugment, LiteRandAugment])
def test_operations_are_drawn_uniformly(applied, kind):
    """Lite: the twelve of the fourteen that are tables of levels or affine."""
    transform, image = kind(2, 9.0, 0.0), Image.new("RGB", (8, 8))
    with keyed_generator([0]):
        for _ in range(1400):
            transform(image)
    names, counts = np.unique([name for name, _ in applied], return_counts=True)
    everything = set(v2.RandAugment._AUGMENTATION_SPACE)
    lite = everything - {"Color", "Sharpness"}
    assert set(names) == (everything if kind is RandAugment else lite)
    assert len(everything) == 14
    assert (np.abs(counts - 2800 / len(names)) < 4.5 * np.sqrt(2800 / len(names))).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("magnitude", "mstd", "mean", "std"),
    [(9, 0, 9, 0), (9.5, 0, 9.5, 0), (9, 0.5, 9, 0.5), (9, 101, 4.5, 9 / 12**0.5)],
)
def test_magnitude_and_its_noise(applied, magnitude, mstd, mean, std):
    """Read off the rotations, 30 degrees at the top, half of them negative."""
    transform, image = RandAugment(3, magnitude, mstd), Image.new("RGB", (8, 8))
    with keyed_generator([1]):
        for _ in range(3000):
            transform(image)
    degrees = np.array([value for name, value in applied if name == "Rotate"])
    bins = np.abs(degrees)  # 1 degree a bin
    assert abs(bins.mean() - mean) < 0.006 + 4.5 * std / np.sqrt(len(bins))
    assert abs(bins.std() - std) < 0.006 + 4.5 * std / np.sqrt(2 * len(bins))
    assert abs((degrees < 0).mean() - 0.5) < 4.5 * 0.5 / np.sqrt(len(bins))


@pytest.mark.parametrize("magnitude", [0, 30])
def test_noise_stays_in_range(applied, magnitude):
    with keyed_generator([2]):
        for _ in range(300):
            RandAugment(2, magnitude, 3.0)(Image.new("RGB", (8, 8)))
    degrees = np.abs([value for name, value in applied if name == "Rotate"])
    assert degrees.max() <= 30
    assert (degrees == magnitude).mean() > 0.3


# ------------------------------------------------------------------------------------------------
# Keys
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_the_key_alone_decides(policy):
    """And not the process's generators, which stay as they are; also in another process."""
    images, settings = made_images(), {"policy": policy, **EVERYTHING}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    ours = changed(images, **settings)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    keyed = pickle.loads(pickle.dumps(KeyedTransforms(Augment(**settings), SEED, "cpu")))
    torch.rand(1), np.random.rand(), random.random()
    again = [keyed(images[index], EPOCH, index) for index in (7, 3)]
    assert equal(again, [ours[7], ours[3]])
    for other in ({"seed": SEED + 1}, {"epoch": EPOCH + 1}):
        assert not equal(changed(images, **other, **settings), ours)
    assert not torch.equal(keyed(images[7], EPOCH, 8), ours[7])


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "rand_augment_timm"])
def test_on_tensors_as_on_a_gpu(policy):
    """The same draws; torchvision's tensor versions differ a little from Pillow's."""
    images, settings = made_images(), {"policy": policy, "brightness": 0.4, "contrast": 0.3}
    ours = changed(images, "gpu", **settings)
    assert all(image.dtype == torch.uint8 and image.is_contiguous() for image in ours)
    assert [image.shape for image in ours] == [image.shape for image in images]
    on_pillow = changed(images, **settings)
    differences = [(a.int() - b.int()).abs() for a, b in zip(ours, on_pillow, strict=True)]
    assert np.mean([float(d.float().mean()) for d in differences]) < 4
    assert np.median([float(d.float().mean()) for d in differences]) < 1


# ------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transforms", "settings", "words"),
    [
        ("gpu", {"policy": "rand_augment_timm"}, "use data.transforms=cpu, or augment.policy="),
        (
            "cpu",
            {"policy": "rand"},
            "augment.policy=rand is unknown; use one of none, rand_augment_lite",
        ),
        ("cpu", {"policy": "rand_augment", "policy_magnitude": 31.0}, "takes 0 to 30"),
        ("cpu", {"policy": "rand_augment_timm", "policy_magnitude": 9.5}, "a whole number"),
        ("cpu", {"policy": "rand_augment_timm", "policy_magnitude": 11.0}, "from 0 to 10"),
        ("cpu", {"hue": 0.7}, "hue"),
    ],
)
def test_settings_that_cannot_be(transforms, settings, words):
    with pytest.raises(ValueError, match=words):
        KeyedTransforms(Augment(**settings), 0, transforms)


def test_a_stage_without_a_torchvision_transform_is_refused_by_name(tiny_beton, monkeypatch):
    """Added for FFCV only, it must not be left out in silence."""
    stage = augment.Stage(
        "sepia", lambda a: True, lambda ops, a, seed: None, None, lambda a: ("", "")
    )
    monkeypatch.setattr(augment, "STAGES", (*augment.STAGES, stage))
    with pytest.raises(ValueError, match="backend=torchvision cannot.*'sepia'.*backend=ffcv"):
        TorchTrainLoader(tiny_beton / "train.beton", global_batch=8, seed=0)


def test_both_backends_take_their_stages_from_one_table(monkeypatch):
    from fast_imagenet.data import ffcv_loader as loader

    operation = SimpleNamespace(apply=loader.draw_random_crops)
    added = augment.Stage(
        "added",
        wanted=lambda a: True,
        operation=lambda *_: operation,
        transform=lambda *_: "transform",
        caption=lambda a: ("Added", ""),
    )
    monkeypatch.setattr(augment, "STAGES", (added,))
    assert loader.image_operations(Augment(), 32, 0)[1:] == [operation]
    assert build_stages(Augment(), "cpu") == ["transform"]


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "none"])
def test_captions_name_the_settings(policy):
    settings = Augment(policy=policy, policy_mstd=0.5, hue=0.1, contrast=0.4, blur=0.25)
    stages = augment.stages_of(settings)
    captions = {stage.name: stage.caption(settings) for stage in stages}
    assert list(captions) == ["policy", "color jitter", "blur"]
    assert captions["color jitter"] == ("Color jitter", "contrast 0.4, hue 0.1")
    assert captions["blur"] == ("Blur", "25% of images, radius 0.1 to 2 px")
    detail = "2 operations, magnitude 9±0.5" if "rand" in policy else ""
    assert captions["policy"] == (POLICIES[policy].title, detail)
    lighter = stages[0].lighter(settings)
    assert (lighter is None) == (policy in ("rand_augment_lite", "three_augment"))
