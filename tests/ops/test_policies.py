"""RandAugment, TrivialAugmentWide, AutoAugment: equal to torchvision and timm on Pillow."""

import math
from functools import partial

import numba
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from timm.data import auto_augment as timm_augment
from torchvision.transforms import InterpolationMode, autoaugment

from fast_imagenet.ops import auto_augment, geometry, histogram, policy, rand_augment
from fast_imagenet.ops.auto_augment import AutoAugment
from fast_imagenet.ops.rand_augment import (
    FULL_NAMES,
    LITE_NAMES,
    TIMM_NAMES,
    RandAugment,
    TrivialAugmentWide,
    trivial_augment_space,
)
from tests import ops_data

SIZES = [(64, 64), (97, 131), (1, 1), (1, 1000), (37, 2)]
ENHANCERS = ("Brightness", "Color", "Contrast", "Sharpness")
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
MANY = np.arange(40_000)
OPERATIONS = [
    *(RandAugment(mode=mode, mstd=0.5, seed=3) for mode in ("lite", "full", "timm")),
    TrivialAugmentWide(seed=3),
    AutoAugment(seed=3),
]
IDS = ["lite", "full", "timm", "trivial", "auto"]

# numba complains when FFCV drops compiled functions; nothing can be done about it here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def one_thread():
    numba.set_num_threads(1)


def made_images(height, width):
    """A smooth one, noise, four levels only, one level only, a dark one. uint8 [5, h, w, 3]."""
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    smooth = ops_data.image(height, width, seed=height + width)
    return np.stack([smooth, noise, noise // 64 * 60 + 40, noise * 0 + 77, smooth // 3 + 20])


def run(apply, images, operations, arguments, *more):
    """Apply a kernel to copies; operations and arguments: one row an image, or one for all."""
    images = np.ascontiguousarray(images).copy()
    shape = (len(images), np.shape(operations)[-1])
    # Copies: numba would compile once more for a read-only array.
    codes = np.array(np.broadcast_to(operations, shape), np.int64, order="C")
    values = np.array(np.broadcast_to(arguments, shape), np.float64, order="C")
    apply(0, len(images), images, codes, values, *more)
    return images


def torchvision_operation(image, name, argument, interpolation=InterpolationMode.NEAREST):
    """One operation by torchvision on a Pillow image; `argument` as policy.py states it."""
    if name in ENHANCERS:
        return getattr(ImageEnhance, name)(image).enhance(argument)
    return autoaugment._apply_op(image, name, argument, interpolation, None)


def in_order(image_hwc, operations, arguments, change=torchvision_operation):
    image = Image.fromarray(image_hwc)
    for code, argument in zip(operations, arguments, strict=True):
        image = change(image, policy.NAMES[code], float(argument))
    return np.asarray(image)


# ==== Tables ======================================================================================


def assert_space_equals(space, expected):
    """Our table against torchvision's, entry by entry, in its order.

    To one unit in the last place of float32: torch's linspace differs by that between processors
    (its AVX2 code multiplies in another order than its plain code, which ours equals).
    """
    assert [policy.NAMES[code] for code in space.codes] == list(expected)
    for row, (values, signed) in enumerate(expected.values()):
        assert space.signed[row] == signed
        values = np.broadcast_to(values.numpy().astype(np.float64), space.values[row].shape)
        np.testing.assert_allclose(space.values[row], values, rtol=2**-22, atol=0)


@pytest.mark.parametrize("bins", [2, 9, 10, 31, 64])
@pytest.mark.parametrize("size", [(160, 160), (97, 131), (1, 1000), (224, 192)])
def test_magnitudes_equal_torchvision(bins, size):
    ours = policy.rand_augment_space(FULL_NAMES, bins, *size)
    assert_space_equals(ours, autoaugment.RandAugment()._augmentation_space(bins, size))
    expected = autoaugment.TrivialAugmentWide()._augmentation_space(bins)
    assert_space_equals(trivial_augment_space(bins), expected)


def test_auto_augment_table_equals_torchvision():
    reference = autoaugment.AutoAugment()
    assert list(auto_augment.IMAGENET_POLICIES) == reference.policies
    space = reference._augmentation_space(10, (97, 131))
    codes, chances, values, signed = auto_augment.auto_augment_tables(97, 131)
    for i, pair in enumerate(reference.policies):
        for k, (name, chance, bin_) in enumerate(pair):
            magnitudes, is_signed = space[name]
            assert policy.NAMES[codes[i, k]] == name
            assert (chances[i, k], signed[i, k]) == (chance, is_signed)
            expected = 0 if bin_ is None else float(magnitudes[bin_])
            assert values[i, k] == pytest.approx(expected, rel=2**-22, abs=0)


def test_names_are_those_of_the_originals():
    assert set(FULL_NAMES) - set(LITE_NAMES) == {"Color", "Sharpness"}
    plain = [name.removesuffix("Increasing").removesuffix("Rel") for name in timm_names()]
    assert plain == list(TIMM_NAMES)


def timm_names():
    return timm_augment._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_timm_arguments_equal_timm(sign, monkeypatch):
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: sign * value)
    levels = [0.0, 10.0, 9.0, 2.5, *np.random.default_rng(0).uniform(0, 10, 200)]
    for name, full_name in zip(TIMM_NAMES, timm_names(), strict=True):
        level_to_argument = timm_augment.LEVEL_TO_ARG[full_name]
        if level_to_argument is None:
            continue
        for level in levels:
            (expected,) = level_to_argument(level, {})
            if name.startswith("Translate"):
                expected *= -(131 if name.endswith("X") else 97)
            code = policy.NAMES.index(name)
            assert rand_augment.timm_argument(code, level, sign, 97, 131) == expected, name


# ==== Maps and histograms alone ===================================================================


def resampled(image_hwc, inverse, fill=(0, 0, 0), bilinear=False):
    source = np.zeros(image_hwc.size + geometry.SLACK, np.uint8)
    source[: image_hwc.size] = image_hwc.ravel()
    result = np.full_like(image_hwc, 99)
    resample = geometry.resample_bilinear if bilinear else geometry.resample_nearest
    resample(np.uintp(source.ctypes.data), tuple(map(float, inverse)), fill, result)
    return result


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (50, 51)])
def test_rotation_equals_pillow(size, bilinear):
    method = Image.BILINEAR if bilinear else Image.NEAREST
    special = [0, 90, 180, 270, -90, 360, 45, -45, 30, 60, 135, 720.5]
    image = made_images(*size)[1]
    for angle in [*special, *np.random.default_rng(0).uniform(-400, 400, 20)]:
        inverse = geometry.rotation_map(float(angle), *size)
        expected = Image.fromarray(image).rotate(angle, method, fillcolor=(124, 116, 104))
        result = resampled(image, inverse, (124, 116, 104), bilinear)
        np.testing.assert_array_equal(result, expected, err_msg=f"{angle} degrees")


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_any_affine_map_equals_pillow(size, bilinear):
    method = Image.BILINEAR if bilinear else Image.NEAREST
    generator = np.random.default_rng(0)
    image = made_images(*size)[1]
    for _ in range(40):
        inverse = np.array([1, 0, 0, 0, 1, 0]) + generator.normal(0, 0.5, 6) * [1, 1, 40, 1, 1, 40]
        expected = Image.fromarray(image).transform(
            size[::-1], Image.AFFINE, tuple(inverse), method
        )
        np.testing.assert_array_equal(resampled(image, inverse, bilinear=bilinear), expected)


def test_cosines_are_rounded_like_python():
    for angle in [*range(0, 361, 15), *np.random.default_rng(0).uniform(0, 360, 2000)]:
        radians = -math.radians(angle % 360.0)
        cosine, sine = geometry.rotation_map(float(angle), 4, 4)[:2]
        assert (cosine, sine) == (round(math.cos(radians), 15), round(math.sin(radians), 15))


@pytest.mark.parametrize("size", SIZES)
def test_histogram_and_range(size):
    counts, low, high = np.empty((3, 256), np.int32), np.empty(3, np.int32), np.empty(3, np.int32)
    for image in made_images(*size):
        histogram.count_levels(image, counts)
        histogram.level_range(image, low, high)
        np.testing.assert_array_equal(counts.ravel(), Image.fromarray(image).histogram())
        np.testing.assert_array_equal(low, image.min((0, 1)))
        np.testing.assert_array_equal(high, image.max((0, 1)))


# ==== Every operation =============================================================================


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FULL_NAMES)
def test_each_operation_equals_torchvision(name, size):
    """At every bin of RandAugment and TrivialAugmentWide, with both signs, on every image."""
    apply_op = autoaugment._apply_op
    images, code = made_images(*size), policy.NAMES.index(name)
    for space in (
        policy.rand_augment_space(FULL_NAMES, 31, *size),
        trivial_augment_space(31),
    ):
        row = FULL_NAMES.index(name)
        values = sorted(set(space.values[row]) | set(-space.values[row] * space.signed[row]))
        for count, value in enumerate(values):
            chosen = images if size != (97, 131) else images[count % 5 : count % 5 + 1]
            result = run(policy.apply_policy, chosen, [code], policy.resolve_argument(code, value))
            for image, changed in zip(chosen, result, strict=True):
                expected = apply_op(
                    Image.fromarray(image), name, value, InterpolationMode.NEAREST, None
                )
                np.testing.assert_array_equal(changed, expected, err_msg=f"{name} {value}")


@pytest.mark.parametrize("pair", range(25))
def test_each_pair_of_auto_augment_equals_torchvision(pair):
    codes, _, values, signed = auto_augment.auto_augment_tables(64, 64)
    images = made_images(64, 64)
    for sign in (1, -1):
        arguments = [
            policy.resolve_argument(code, sign * value if is_signed else value)
            for code, value, is_signed in zip(codes[pair], values[pair], signed[pair], strict=True)
        ]
        result = run(policy.apply_policy, images, codes[pair], arguments)
        for image, changed in zip(images, result, strict=True):
            np.testing.assert_array_equal(changed, in_order(image, codes[pair], arguments))


@pytest.mark.parametrize("operation", OPERATIONS[1::2], ids=IDS[1::2])
def test_drawn_choices_in_a_row_equal_torchvision(operation):
    check_drawn(operation, policy.apply_policy, (97, 131), in_order)


def test_bilinear_trivial_augment_equals_torchvision():
    change = partial(torchvision_operation, interpolation=InterpolationMode.BILINEAR)
    bilinear = TrivialAugmentWide(bilinear=True, seed=3)
    check_drawn(bilinear, bilinear.apply, (97, 131), partial(in_order, change=change))


def test_many_operations_in_a_row_equal_torchvision():
    for size in [(64, 64), (1, 1000)]:
        operation = RandAugment(num_ops=5, magnitude=13.7, mode="full", mstd=4, seed=5)
        check_drawn(operation, policy.apply_policy, size, in_order)


def check_drawn(operation, apply, size, expected):
    images = np.concatenate([made_images(*size)] * 30)
    operations, arguments, *more = operation.draw(np.arange(len(images)), size)
    result = run(apply, images, operations, arguments, *more)
    for b, image in enumerate(images):
        wanted = expected(image, operations[b], arguments[b])
        np.testing.assert_array_equal(result[b], wanted, err_msg=f"{operations[b]} {arguments[b]}")


# ==== timm ========================================================================================


def timm_operation(image, name, argument):
    keywords = dict(fillcolor=(124, 116, 104), resample=Image.BILINEAR)
    if name == "Identity":
        return image
    if name == "Posterize" and argument == 0:  # Pillow 13 refuses; before, it gave black
        return ImageEnhance.Brightness(image).enhance(0)
    if name.startswith("Translate"):
        argument /= -image.size[name.endswith("Y")]
        name += "Rel"
    arguments = () if name in ("AutoContrast", "Equalize", "Invert") else (argument,)
    if name in ("Posterize", "Solarize", "SolarizeAdd"):
        arguments = (int(argument),)
    return timm_augment.NAME_TO_OP[name](image, *arguments, **keywords)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TIMM_NAMES)
def test_each_operation_equals_timm(name, size):
    images, code = made_images(*size), policy.NAMES.index(name)
    fills = np.tile(np.array([124, 116, 104]), (len(images), 1))
    for level in (0.0, 3.3, 9.0, 10.0):
        for sign in (1.0, -1.0):
            argument = rand_augment.timm_argument(code, level, sign, *size)
            result = run(policy.apply_policy_bilinear, images, [code], [argument], fills)
            for image, changed in zip(images, result, strict=True):
                if name.startswith("Translate"):  # not through the argument: it would round twice
                    fraction = sign * (level / 10) * 0.45
                    change = timm_augment.NAME_TO_OP[f"{name}Rel"]
                    expected = change(
                        Image.fromarray(image),
                        fraction,
                        **dict(fillcolor=(124, 116, 104), resample=Image.BILINEAR),
                    )
                else:
                    expected = timm_operation(Image.fromarray(image), name, argument)
                np.testing.assert_array_equal(changed, expected, err_msg=f"{level} {sign}")


def test_drawn_choices_equal_timm():
    def expected(image, operations, arguments):
        return in_order(image, operations, arguments, timm_operation)

    operation = RandAugment(num_ops=3, mode="timm", mstd=0.5, seed=1)
    check_drawn(operation, policy.apply_policy_bilinear, (64, 64), expected)


# ==== lite ========================================================================================


def lite_reference(image_hwc, operations, arguments):
    """Pillow's point operations in order, then one Pillow transform with the product of maps."""
    names = [policy.NAMES[code] for code in operations]
    image, inverse = Image.fromarray(image_hwc), np.eye(3)
    for name, argument in zip(names, arguments, strict=True):
        if name not in GEOMETRIC:
            image = torchvision_operation(image, name, float(argument))
        else:
            inverse = inverse @ pillow_map(name, argument, image.height, image.width)
    if not np.array_equal(inverse, np.eye(3)):
        image = image.transform(image.size, Image.AFFINE, tuple(inverse[:2].ravel()), Image.NEAREST)
    return np.asarray(image)


def pillow_map(name, argument, height, width):
    if name == "Rotate":
        turn = -math.radians(argument % 360)
        cosine, sine = round(math.cos(turn), 15), round(math.sin(turn), 15)
        x, y = width / 2, height / 2
        right, down = cosine * -x + sine * -y + x, -sine * -x + cosine * -y + y
        return np.array([[cosine, sine, right], [-sine, cosine, down], [0, 0, 1]])
    place = {"ShearX": (0, 1), "ShearY": (1, 0), "TranslateX": (0, 2), "TranslateY": (1, 2)}[name]
    inverse = np.eye(3)
    inverse[place] = -argument if name.startswith("T") else argument
    return inverse


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_ops", [1, 2, 6])
def test_lite_equals_its_definition(num_ops, size):
    operation = RandAugment(num_ops, 11.5, mstd=6, seed=num_ops)
    check_drawn(operation, policy.apply_policy_lite, size, lite_reference)


def test_lite_with_one_operation_equals_full():
    operations, arguments = RandAugment(1, seed=4).draw(np.arange(100), (64, 64))
    images = np.concatenate([made_images(64, 64)] * 20)
    lite = run(policy.apply_policy_lite, images, operations, arguments)
    np.testing.assert_array_equal(lite, run(policy.apply_policy, images, operations, arguments))


# ==== Properties ==================================================================================


@pytest.mark.parametrize("mode", ["lite", "full", "timm"])
def test_magnitude_0_changes_nothing(mode):
    """But Solarize at bin 0 inverts pure white, as in torchvision; timm keeps 4 bits there."""
    always = {"AutoContrast", "Equalize", "Invert", "Posterize"}
    names = {"timm": set(TIMM_NAMES) - always, "lite": set(LITE_NAMES), "full": set(FULL_NAMES)}
    operation = RandAugment(2, 0.0, mode=mode, seed=1)
    operations, arguments, *more = operation.draw(np.arange(600), (64, 64))
    still = names[mode] - {"AutoContrast", "Equalize"}
    rows = np.isin(operations, [0, *map(policy.NAMES.index, still)]).all(1)
    assert rows.sum() > 200
    images = np.minimum(np.repeat(made_images(64, 64)[:1], rows.sum(), 0), 254)
    more = [extra[rows] for extra in more]
    result = run(operation.apply, images, operations[rows], arguments[rows], *more)
    np.testing.assert_array_equal(result, images)


@pytest.mark.parametrize("operation", OPERATIONS, ids=IDS)
def test_a_image_depends_on_its_key_alone(operation):
    images = np.concatenate([made_images(33, 47)] * 4)
    samples = np.arange(len(images)) * 7
    whole = operation.transform(images.copy(), samples)
    alone = [operation.transform(images[b : b + 1].copy(), samples[b : b + 1]) for b in range(20)]
    np.testing.assert_array_equal(whole, np.concatenate(alone))
    numba.set_num_threads(2)
    backwards = operation.transform(images[::-1].copy(), samples[::-1])
    np.testing.assert_array_equal(whole, backwards[::-1])
    assert (whole != images).any()


@pytest.mark.parametrize("operation", OPERATIONS, ids=IDS)
def test_only_its_own_images_are_written(operation):
    images = np.concatenate([made_images(9, 5)] * 20)
    changed = images.copy()
    choices = operation.draw(np.arange(100), (9, 5))
    operation.apply(30, 60, changed, *choices)
    others = np.delete(np.arange(100), slice(30, 60))
    np.testing.assert_array_equal(changed[others], images[others])
    for first, end in ((0, 30), (60, 100)):
        operation.apply(first, end, changed, *choices)
    np.testing.assert_array_equal(changed, operation.transform(images, np.arange(100)))


def test_nothing_is_compiled_again_for_another_size():
    for operation in OPERATIONS:
        for size in [(32, 32), (1, 1), (40, 20)]:
            operation.transform(made_images(*size), np.arange(5))
        assert len(operation.apply.signatures) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(mode="half"), "mode is 'half'; give one of lite, full, timm"),
        (dict(num_ops=0), "num_ops is 0"),
        (dict(num_ops=1.5), "num_ops is 1.5"),
        (dict(magnitude=31), "magnitude is 31; in mode 'lite' give 0 to 30"),
        (dict(magnitude=-1), "magnitude is -1"),
        (dict(magnitude=float("nan")), "magnitude is nan"),
        (dict(magnitude=10.5, mode="timm"), "magnitude is 10.5; in mode 'timm' give 0 to 10"),
        (dict(mstd=-0.5), "mstd is -0.5"),
        (dict(mstd=float("nan")), "mstd is nan"),
        (dict(num_magnitude_bins=1), "num_magnitude_bins is 1"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        RandAugment(**settings)


def test_wrong_bins_of_trivial_augment_are_named():
    with pytest.raises(ValueError, match="num_magnitude_bins is 1"):
        TrivialAugmentWide(num_magnitude_bins=1)


# ==== Statistics of the draws =====================================================================

# Standard normal: exceeded once in a million on either side by a fair draw.
LIMIT = 5.0


def assert_fractions(counts, fractions):
    """Counts agree with the expected fractions, each to LIMIT standard deviations."""
    counts, fractions, total = np.asarray(counts), np.asarray(fractions, float), np.sum(counts)
    spread = np.sqrt(total * fractions * (1 - fractions)) + 1e-9
    assert (np.abs(counts - total * fractions) <= LIMIT * spread).all(), (counts, total * fractions)


def positions(operation, names):
    """Index of each drawn operation in `names`: int64 [b, n], and the arguments."""
    operations, arguments = operation.draw(MANY, (160, 160))[:2]
    order = np.full(len(policy.NAMES), -1)
    order[[policy.NAMES.index(name) for name in names]] = np.arange(len(names))
    return order[operations], arguments


@pytest.mark.parametrize(("mode", "names"), [("lite", LITE_NAMES), ("full", FULL_NAMES)])
def test_operations_are_equally_likely_and_independent(mode, names):
    k = len(names)
    rows, _ = positions(RandAugment(2, mode=mode, seed=8), names)
    assert rows.min() == 0
    even, pairs = [1 / k] * k, [1 / k**2] * k**2
    assert_fractions(np.bincount(rows[:, 0], minlength=k), even)
    assert_fractions(np.bincount(rows[:, 1], minlength=k), even)
    assert_fractions(np.bincount(k * rows[:, 0] + rows[:, 1], minlength=k * k), pairs)
    assert_fractions(np.bincount(k * rows[1:, 0] + rows[:-1, 0], minlength=k * k), pairs)
    other = RandAugment(2, mode=mode, seed=8)
    other.set_epoch(1)
    later, _ = positions(other, names)
    assert_fractions(np.bincount(k * rows[:, 0] + later[:, 0], minlength=k * k), pairs)


def test_timm_applies_half_of_fifteen():
    rows, _ = positions(RandAugment(2, mode="timm", seed=8), ("Identity", *TIMM_NAMES))
    fractions = [0.5, *[1 / 30] * 15]
    assert_fractions(np.bincount(rows[:, 0], minlength=16), fractions)
    pairs = np.outer(fractions, fractions).ravel()
    assert_fractions(np.bincount(16 * rows[:, 0] + rows[:, 1], minlength=256), pairs)


@pytest.mark.parametrize("operation", OPERATIONS[:4], ids=IDS[:4])
def test_signs_are_fair_and_independent(operation):
    operations, arguments = operation.draw(MANY, (160, 160))[:2]
    for code in map(policy.NAMES.index, ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")):
        signs = np.sign(arguments[(operations == code) & (arguments != 0)])
        assert_fractions([(signs > 0).sum(), (signs < 0).sum()], [0.5, 0.5])
        together = signs[1:] * signs[:-1]
        assert_fractions([(together > 0).sum(), (together < 0).sum()], [0.5, 0.5])
    if operations.shape[1] == 2:
        both = (operations >= policy.SHEAR_X) & (operations <= policy.ROTATE)
        signs = np.sign(arguments[both.all(1)]).prod(1)
        assert_fractions([(signs > 0).sum(), (signs < 0).sum()], [0.5, 0.5])


@pytest.mark.parametrize(("mode", "scale"), [("lite", 0.01), ("timm", 0.03)])
def test_magnitudes_scatter_by_mstd(mode, scale):
    operation = RandAugment(2, 6, mode=mode, mstd=0.5, seed=2)
    operations, arguments = operation.draw(MANY, (160, 160))[:2]
    shear = np.abs(arguments[operations == policy.SHEAR_X]) / scale
    assert abs(shear.mean() - 6) < LIMIT * 0.5 / math.sqrt(len(shear))
    assert abs(shear.std() - 0.5) < LIMIT * 0.5 / math.sqrt(2 * len(shear))
    both = (operations == policy.SHEAR_X).all(1)  # one image's two magnitudes are two draws
    first, second = np.abs(arguments[both]).T
    assert abs(np.corrcoef(first, second)[0, 1]) < LIMIT / math.sqrt(both.sum())


def test_magnitudes_stay_in_range_and_may_be_uniform():
    operations, arguments = RandAugment(1, 9, mode="timm", mstd=5.0).draw(MANY, (160, 160))[:2]
    shear = np.abs(arguments[operations == policy.SHEAR_X])
    assert shear.max() == 0.3 and shear.min() == 0
    operations, arguments = RandAugment(1, 9, mode="timm", mstd=101).draw(MANY, (160, 160))[:2]
    shear = np.abs(arguments[operations == policy.SHEAR_X]) / 0.27
    assert_fractions(np.histogram(shear, 8, (0, 1))[0], [1 / 8] * 8)
    operations, arguments = RandAugment(1, 29, mstd=3.0).draw(MANY, (160, 160))
    shear = np.abs(arguments[operations == policy.SHEAR_X])
    assert shear.max() == np.float32(0.3)


def test_without_noise_the_magnitude_is_the_bin():
    operations, arguments = RandAugment(2, 9).draw(MANY, (160, 160))
    space = autoaugment.RandAugment()._augmentation_space(31, (160, 160))
    for name in GEOMETRIC:
        expected = float(space[name][0][9])
        drawn = np.unique(np.abs(arguments[operations == policy.NAMES.index(name)]))
        assert drawn == [int(expected) if name.startswith("T") else expected]


def test_trivial_augment_draws_evenly():
    rows, arguments = positions(TrivialAugmentWide(seed=1), FULL_NAMES)
    assert_fractions(np.bincount(rows[:, 0], minlength=14), [1 / 14] * 14)
    angles = np.abs(arguments[rows == FULL_NAMES.index("Rotate")])
    assert_fractions(np.unique(angles, return_counts=True)[1], [1 / 31] * 31)


def test_auto_augment_draws_every_pair_as_often_as_torchvision():
    operations, _ = AutoAugment(seed=1).draw(MANY, (160, 160))
    fractions = np.zeros((16, 16))
    for (first, p, _), (second, q, _) in autoaugment.AutoAugment().policies:
        i, j = policy.NAMES.index(first), policy.NAMES.index(second)
        for code, fraction in ((i, p), (0, 1 - p)):
            fractions[code, j] += fraction * q / 25
            fractions[code, 0] += fraction * (1 - q) / 25
    counts = np.bincount(16 * operations[:, 0] + operations[:, 1], minlength=256)
    assert_fractions(counts, fractions.ravel())


def test_pillow_is_called_as_the_reference_expects():
    """Guards the tests themselves: torchvision's solarize threshold may be fractional."""
    image = Image.fromarray(np.array([[[178, 179, 0]]], np.uint8))
    assert list(np.asarray(ImageOps.solarize(image, 178.5))[0, 0]) == [178, 76, 0]
