"""Color operations against Pillow and torchvision, exactly; and the statistics of their draws."""

import numpy as np
import pytest
from numba.core.errors import TypingError
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from fast_imagenet.ops import color, policy
from fast_imagenet.ops.color_jitter import ColorJitter
from fast_imagenet.ops.effects import (
    BLUR,
    GRAYSCALE,
    SOLARIZE,
    GaussianBlur,
    RandomGrayscale,
    RandomSolarize,
    ThreeAugment,
)

SIDES = [(1, 1), (1, 1000), (1000, 1), (2, 3), (3, 3), (5, 17), (97, 131)]
FACTORS = [0.0, 1e-3, 0.3, 0.6, 0.999, 1.0, 1.0001, 1.4, 1.9, 25.0]


def noise(height, width, seed=0):
    """Values with many at the ends of the range, and some gray pixels."""
    rng = np.random.default_rng(seed)
    image = np.clip(rng.normal(128, 90, (height, width, 3)), 0, 255).astype(np.uint8)
    gray = rng.random((height, width)) < 0.1
    image[gray] = image[gray][:, :1]
    return image


def all_colors(step=5):
    """Every combination of channel values in steps, as one image."""
    levels = np.unique(np.r_[np.arange(0, 256, step), 1, 2, 127, 128, 254, 255]).astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)


def changed(function, image, *arguments):
    copy = np.ascontiguousarray(image, np.uint8).copy()
    function(copy, *arguments)
    return copy


def through_lut(image, *steps):
    """The image after a chain of (maker, arguments...) composed into one table."""
    lut = np.empty((3, 256), np.int32)
    color.identity_lut(lut)
    for maker, *arguments in steps:
        maker(lut, *arguments)
    return looked_up(image, lut)


def looked_up(image, lut):
    """The image through a table, as the policies apply it."""
    height, width, _ = image.shape
    return changed(policy.change_levels, image, lut, np.empty((height + 2, width, 3), np.uint8))


def equal(result, expected):
    np.testing.assert_array_equal(result, np.asarray(expected))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("factor", FACTORS)
def test_enhancers_equal_pillow(side, factor):
    image = noise(*side)
    pil, factor = Image.fromarray(image), np.float32(factor)
    mean = color.gray_mean(image)
    kernels = {
        ImageEnhance.Brightness: through_lut(image, (color.blend_lut, 0, factor)),
        ImageEnhance.Contrast: through_lut(image, (color.blend_lut, mean, factor)),
        ImageEnhance.Color: changed(color.adjust_saturation, image, factor),
        ImageEnhance.Sharpness: changed(color.adjust_sharpness, image, factor),
    }
    for enhancer, result in kernels.items():
        equal(result, enhancer(pil).enhance(float(factor)))


def test_a_image_that_is_not_contiguous_is_refused():
    with pytest.raises(TypingError, match="contiguous"):
        color.adjust_saturation(noise(8, 9)[:, ::2], np.float32(0.5))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shift", [-0.5, -0.25, -0.01, 0.0, 0.1, 0.33, 0.5])
def test_hue_equals_torchvision(side, shift):
    image = noise(*side)
    expected = functional.adjust_hue(Image.fromarray(image), shift)
    equal(changed(color.adjust_hue, image, shift), expected)


def test_hue_of_every_hue_and_many_colors_equals_torchvision():
    levels = np.arange(256, dtype=np.uint8)
    pairs = np.stack(np.meshgrid(levels, levels, 0), -1).astype(np.uint8)[:, :, 0]
    hues = [np.roll(pairs, c, -1) for c in range(3)]  # one channel 0: every hue there is
    for image, shift in [(all_colors(), 0.0), (all_colors(), -0.31), (np.concatenate(hues), 0.2)]:
        expected = functional.adjust_hue(Image.fromarray(image), shift)
        equal(changed(color.adjust_hue, image, shift), expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("radius", [0.0, 0.1, 0.5, 1.0, 1.37, 2.0, 3.3, 11.0])
def test_blur_equals_pillow(side, radius):
    image = noise(*side)
    expected = Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))
    equal(changed(color.gaussian_blur, image, radius), expected)


@pytest.mark.parametrize("side", SIDES)
def test_grayscale_and_point_operations_equal_pillow(side):
    image = noise(*side)
    pil = Image.fromarray(image)
    equal(changed(color.to_grayscale, image), pil.convert("L").convert("RGB"))
    equal(through_lut(image, (color.solarize_lut, 0)), ImageOps.invert(pil))
    equal(through_lut(image), image)
    for threshold in (0, 26, 128, 178.5, 255, 256):
        result = through_lut(image, (color.solarize_lut, threshold))
        equal(result, ImageOps.solarize(pil, threshold))
        equal(changed(color.solarize, image, threshold), result)
    for bits in range(1, 9):
        equal(through_lut(image, (color.posterize_lut, bits)), ImageOps.posterize(pil, bits))
    assert not through_lut(image, (color.posterize_lut, 0)).any()


@pytest.mark.parametrize("bits_and_add", [(0, 128), (99, 128), (128, 128), (255, 256)])
def test_solarize_add_is_its_formula(bits_and_add):
    add, threshold = bits_and_add
    image = noise(31, 33)
    expected = np.where(image < threshold, np.minimum(255, image.astype(int) + add), image)
    equal(through_lut(image, (color.solarize_add_lut, add, threshold)), expected)


def test_point_operations_compose_in_the_order_given():
    image = noise(41, 29)
    pil, lut = Image.fromarray(image), np.empty((3, 256), np.int32)
    color.identity_lut(lut)
    color.posterize_lut(lut, 5)
    color.blend_lut(lut, 0, np.float32(1.3))
    mean = color.gray_mean_through(image, lut)
    color.blend_lut(lut, mean, np.float32(0.6))
    color.solarize_lut(lut, 100)
    pil = ImageEnhance.Brightness(ImageOps.posterize(pil, 5)).enhance(1.3)
    pil = ImageOps.solarize(ImageEnhance.Contrast(pil).enhance(0.6), 100)
    equal(looked_up(image, lut), pil)


def test_each_channel_has_its_own_table():
    lut = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.int32)
    image = noise(37, 41)
    expected = np.stack([lut[c][image[..., c]] for c in range(3)], -1)
    equal(looked_up(image, lut), expected)
    level = np.asarray(Image.fromarray(expected.astype(np.uint8)).convert("L"))
    assert color.gray_mean_through(image, lut) == int(level.mean() + 0.5)


# ==== Operations ==================================================================================


def pillow_jitter(image, order, factors):
    """What torchvision's ColorJitter does to a PIL image with this order and these factors."""
    steps = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    ]
    pil = Image.fromarray(image)
    for action in order:
        if action >= 0:
            pil = steps[action](pil, factors[action])
    return np.asarray(pil)


def draws(operation, count=20000, epoch=None):
    if epoch is not None:
        operation.set_epoch(epoch)
    return operation.draw(np.arange(count), (8, 8))


@pytest.mark.parametrize("side", [(1, 1), (1, 1000), (1000, 1), (2, 3), (37, 53)])
@pytest.mark.parametrize("settings", [(0.4, 0.4, 0.4, 0), (0.9, 0.8, 3.0, 0.3), (0, 0.5, 0.5, 0.1)])
def test_jitter_equals_torchvision(side, settings):
    count = 60
    images = np.stack([noise(*side, seed) for seed in range(count)])
    operation = ColorJitter(*settings, seed=4)
    samples = np.arange(count) * 7
    orders, factors = operation.draw(samples, side)
    result = operation.transform(images.copy(), samples)
    for image, order, factor, changed_image in zip(images, orders, factors, result, strict=True):
        equal(changed_image, pillow_jitter(image, order, factor))


def test_jitter_draws_have_torchvisions_statistics():
    orders, factors = draws(ColorJitter(0.4, (0.5, 2.0), 1.5, 0.25, seed=1), 24000)
    ranges = [(0.6, 1.4), (0.5, 2.0), (0.0, 2.5), (-0.25, 0.25)]
    for values, (low, high) in zip(factors.T, ranges, strict=True):
        assert low <= values.min() and values.max() < high
        fraction = np.histogram(values, 10, (low, high))[0] / 2400
        assert np.abs(fraction - 1).max() < 0.1  # five standard deviations
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and np.abs(counts - 1000).max() < 5 * 1000**0.5
    correlations = np.corrcoef(np.c_[factors, orders[:, 0]].T) - np.eye(5)
    assert np.abs(correlations).max() < 0.04


def test_jitter_leaves_out_what_is_off_and_respects_p():
    orders, _ = draws(ColorJitter(0.4, 0, 0.4))
    assert set(np.unique(orders)) == {-1, 0, 2}
    orders, _ = draws(ColorJitter(0.4, 0.4, 0.4, p=0.3))
    touched = (orders >= 0).any(1)
    assert abs(touched.mean() - 0.3) < 0.02
    assert set((orders >= 0).sum(1)) == {0, 3}
    images = np.stack([noise(9, 7)] * 3)
    equal(ColorJitter().transform(images.copy(), np.arange(3)), images)


def test_grayscale_takes_its_share():
    chosen = draws(RandomGrayscale(0.2))[0] == GRAYSCALE
    assert abs(chosen.mean() - 0.2) < 0.015
    images = np.stack([noise(19, 23, seed) for seed in range(40)])
    operation = RandomGrayscale(0.5)
    chosen = operation.draw(np.arange(40), (19, 23))[0] == GRAYSCALE
    assert 0 < chosen.sum() < 40
    for image, result, gray in zip(
        images, operation.transform(images.copy(), np.arange(40)), chosen, strict=True
    ):
        equal(result, v2.functional.rgb_to_grayscale(Image.fromarray(image), 3) if gray else image)


def test_solarize_takes_its_share():
    kinds, thresholds = draws(RandomSolarize(100, 0.3))
    assert abs((kinds == SOLARIZE).mean() - 0.3) < 0.02 and set(thresholds) == {100}
    images = np.stack([noise(19, 23)] * 2)
    result = RandomSolarize(100, 1.0).transform(images.copy(), np.arange(2))
    equal(result[1], ImageOps.solarize(Image.fromarray(images[1]), 100))
    equal(RandomSolarize(100, 0.0).transform(images.copy(), np.arange(2)), images)


def test_blur_draws_a_uniform_radius():
    kinds, radii = draws(GaussianBlur((0.5, 1.5), 0.6))
    blurred = radii[kinds == BLUR]
    assert abs(len(blurred) / 20000 - 0.6) < 0.02
    assert blurred.min() >= 0.5 and blurred.max() < 1.5
    assert np.abs(np.histogram(blurred, 10, (0.5, 1.5))[0] / len(blurred) * 10 - 1).max() < 0.16
    images = np.stack([noise(19, 23)] * 3)
    result = GaussianBlur(1.2, 1.0).transform(images.copy(), np.arange(3))
    equal(result[2], Image.fromarray(images[2]).filter(ImageFilter.GaussianBlur(1.2)))


def test_three_augment_does_exactly_one():
    kinds, amounts = draws(ThreeAugment(seed=3), 30000)
    assert np.abs(np.bincount(kinds) - 10000).max() < 500
    assert set(amounts[kinds == SOLARIZE]) == {128}
    radii = amounts[kinds == BLUR]
    assert radii.min() >= 0.1 and radii.max() < 2.0 and abs(radii.mean() - 1.05) < 0.03
    images = np.stack([noise(19, 23, seed) for seed in range(12)])
    operation = ThreeAugment(seed=3)
    kinds, radii = operation.draw(np.arange(12), (19, 23))
    assert set(kinds) == {GRAYSCALE, SOLARIZE, BLUR}
    result = operation.transform(images.copy(), np.arange(12))
    for b, image in enumerate(map(Image.fromarray, images)):
        expected = [
            image.convert("L").convert("RGB"),
            ImageOps.solarize(image, 128),
            image.filter(ImageFilter.GaussianBlur(radii[b])),
        ]
        equal(result[b], expected[kinds[b]])


OPERATIONS = [
    lambda seed: ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8, seed=seed),
    lambda seed: RandomGrayscale(0.5, seed=seed),
    lambda seed: RandomSolarize(90, seed=seed),
    lambda seed: GaussianBlur(seed=seed),
    lambda seed: ThreeAugment(seed=seed),
]


@pytest.mark.parametrize("make", OPERATIONS)
def test_result_depends_on_seed_epoch_and_sample_alone(make):
    images = np.stack([noise(21, 17, seed) for seed in range(30)])
    samples = np.arange(30) + 1000
    operation = make(5)
    operation.set_epoch(2)
    whole = operation.transform(images.copy(), samples)
    apart = make(5)
    apart.set_epoch(2)
    for part in (slice(20, 30), slice(3, 4)):  # other batches, other order
        equal(apart.transform(images[part].copy(), samples[part]), whole[part])
    choices = operation.draw(samples, (21, 17))
    three = images.copy()
    for first in (20, 0, 10):
        operation.apply(first, first + 10, three, *choices)
    equal(three, whole)
    for seed, epoch in ((6, 2), (5, 3)):
        other = make(seed)
        other.set_epoch(epoch)
        assert (other.transform(images.copy(), samples) != whole).any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ColorJitter(-0.1), "brightness is -0.1"),
        (lambda: ColorJitter(contrast=(1.0, 0.5)), "contrast is"),
        (lambda: ColorJitter(saturation=float("nan")), "saturation is nan"),
        (lambda: ColorJitter(hue=0.6), "hue is 0.6; give a number from 0 to 0.5"),
        (lambda: ColorJitter(hue=(-0.6, 0)), "hue is"),
        (lambda: ColorJitter(0.4, p=1.5), "p is 1.5"),
        (lambda: RandomGrayscale(-1), "p is -1"),
        (lambda: RandomSolarize(257), "threshold is 257"),
        (lambda: RandomSolarize(p=2), "p is 2"),
        (lambda: GaussianBlur((0, 2)), "sigma is"),
        (lambda: GaussianBlur((2, 1)), "sigma is"),
        (lambda: GaussianBlur(p=-0.5), "p is -0.5"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
