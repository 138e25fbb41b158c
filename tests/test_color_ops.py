"""Colour operations against Pillow and torchvision, exactly; and the statistics of their draws."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional

from fast_imagenet.ops import color

SIDES = [(1, 1), (1, 1000), (1000, 1), (2, 3), (3, 3), (5, 17), (97, 131)]
FACTORS = [0.0, 1e-3, 0.3, 0.6, 0.999, 1.0, 1.0001, 1.4, 1.9, 25.0]


def noise(height, width, seed=0):
    """Values with many at the ends of the range, and some grey pixels."""
    rng = np.random.default_rng(seed)
    image = np.clip(rng.normal(128, 90, (height, width, 3)), 0, 255).astype(np.uint8)
    grey = rng.random((height, width)) < 0.1
    image[grey] = image[grey][:, :1]
    return image


def all_colors(step=5):
    """Every combination of channel values in steps, as one picture."""
    levels = np.unique(np.r_[np.arange(0, 256, step), 1, 2, 127, 128, 254, 255]).astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)


def changed(function, image, *arguments):
    copy = np.ascontiguousarray(image, np.uint8).copy()
    function(copy, *arguments)
    return copy


def through_lut(image, *steps):
    """The picture after a chain of (maker, arguments...) composed into one table."""
    lut = np.empty((3, 256), np.int32)
    color.identity_lut(lut)
    for maker, *arguments in steps:
        maker(lut, *arguments)
    return changed(color.apply_lut, image, lut)


def equal(result, expected):
    np.testing.assert_array_equal(result, np.asarray(expected))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("factor", FACTORS)
def test_enhancers_equal_pillow(side, factor):
    image = noise(*side)
    pil, factor = Image.fromarray(image), np.float32(factor)
    mean = color.grey_mean(image)
    kernels = {
        ImageEnhance.Brightness: through_lut(image, (color.brightness_lut, factor)),
        ImageEnhance.Contrast: through_lut(image, (color.contrast_lut, mean, factor)),
        ImageEnhance.Color: changed(color.adjust_saturation, image, factor),
        ImageEnhance.Sharpness: changed(color.adjust_sharpness, image, factor),
    }
    for enhancer, result in kernels.items():
        equal(result, enhancer(pil).enhance(float(factor)))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shift", [-0.5, -0.25, -0.01, 0.0, 0.1, 0.33, 0.5])
def test_hue_equals_torchvision(side, shift):
    image = noise(*side)
    expected = functional.adjust_hue(Image.fromarray(image), shift)
    equal(changed(color.adjust_hue, image, shift), expected)


def test_hue_of_every_color_equals_torchvision():
    image = all_colors()
    for shift in (0.0, -0.31):
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
    equal(through_lut(image, (color.invert_lut,)), ImageOps.invert(pil))
    equal(through_lut(image), image)
    for threshold in (0, 26, 128, 178.5, 255, 256):
        result = through_lut(image, (color.solarize_lut, threshold))
        equal(result, ImageOps.solarize(pil, threshold))
    for bits in range(1, 9):
        equal(through_lut(image, (color.posterize_lut, bits)), ImageOps.posterize(pil, bits))
    assert not through_lut(image, (color.posterize_lut, 0)).any()
