"""Normalizing, erasing and mixing on the device: against torch, timm and slow references."""

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing as TimmErasing

from fast_imagenet import rng
from fast_imagenet.data.augmentation import Augment
from fast_imagenet.data.device_transforms import (
    BatchTransforms,
    draw_erasing,
    draw_mix,
    erase,
    mix,
    mix_keys,
    mix_targets,
    neighbors,
    normal_noise,
    normalize,
    normalize_and_mix,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 7
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


def made_images(b=6, height=20, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (b, height, width, 3), dtype=torch.uint8, generator=generator)


def labels(b=6):
    return torch.arange(b) * 5 % CLASSES


def slow_normalize(images_bhwc):
    """float64 [b, 3, h, w], contiguous: timm's operations write through views of it."""
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    return ((images_bhwc.double() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def close(ours, wanted):
    return torch.allclose(ours.double().cpu(), wanted.double(), rtol=1e-6, atol=1e-6)


def batch_transforms(dtype=torch.float32, seed=3, **settings):
    return BatchTransforms(Augment(**settings), MEAN, STD, CLASSES, 0.1, seed, dtype)


# ------------------------------------------------------------------------------------------------
# Normalize
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 20, 24), (1, 1, 1), (2, 1, 33), (3, 7, 1)])
def test_normalize(device, shape):
    images_bhwc = made_images(*shape).to(device)
    before = images_bhwc.clone()
    images_bchw = normalize(images_bhwc, MEAN, STD)
    assert images_bchw.shape == (shape[0], 3, *shape[1:])
    assert images_bchw.dtype == torch.float32
    assert images_bchw.permute(0, 2, 3, 1).is_contiguous()
    assert close(images_bchw, slow_normalize(before.cpu()))
    assert torch.equal(images_bhwc, before)


def test_normalize_every_level_and_other_types():
    images_bhwc = torch.arange(256, dtype=torch.uint8)[None, None, :, None].expand(1, 1, 256, 3)
    assert close(normalize(images_bhwc, MEAN, STD), slow_normalize(images_bhwc))
    half = normalize(images_bhwc, MEAN, STD, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.double(), slow_normalize(images_bhwc), rtol=2**-8, atol=1e-6)


def test_normalize_takes_strided_images():
    images_bhwc = made_images(4, 16, 12).permute(0, 2, 1, 3)[:, ::2]
    assert close(normalize(images_bhwc, MEAN, STD), slow_normalize(images_bhwc))


# ------------------------------------------------------------------------------------------------
# Erasing: the boxes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(160, 160), (31, 97), (7, 5), (1, 1), (1, 40), (2, 2)])
@pytest.mark.parametrize("count", [1, 3])
def test_boxes_lie_inside(size, count):
    boxes = draw_erasing(0, 1, np.arange(500), size, 1.0, count)
    assert boxes.shape == (500, count, 4)
    assert boxes.dtype == np.int64
    top, left, height, width = np.moveaxis(boxes, 2, 0)
    assert (boxes >= 0).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()
    there = height > 0
    assert (boxes[~there] == 0).all()
    assert (height < size[0]).all()
    assert (width < size[1]).all()
    assert there.any() == (min(size) > 1)
    if there.any():  # every side is reached
        assert (top[there] == 0).any() and (left[there] == 0).any()
        assert (top + height == size[0]).any() and (left + width == size[1]).any()


def timm_boxes(images, size, **settings):
    """Boxes int64 [images, 4] of timm's erasing; rows of zeros where it erased nothing."""
    operation = TimmErasing(device="cpu", mode="const", **settings)
    boxes = np.zeros((images, 4), np.int64)
    for row in boxes:
        erased = operation(torch.ones(3, *size))[0] == 0
        y, x = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
        if len(y):
            row[:] = y[0], x[0], y[-1] - y[0] + 1, x[-1] - x[0] + 1
    return boxes


def test_boxes_are_distributed_as_timms():
    """Probability, area, shape and place: means and second moments within 4.5 deviations."""
    import random

    size, n = (120, 80), 6000
    random.seed(5)
    ours = draw_erasing(1, 2, np.arange(n), size, 0.7)[:, 0].astype(float)
    theirs = timm_boxes(n, size, probability=0.7).astype(float)

    def features(boxes):
        there = boxes[:, 2] > 0
        top, left, h, w = boxes[there].T
        columns = [h * w, np.log(h / w), h, w, top / (size[0] - h), left / (size[1] - w)]
        return there, np.stack(columns + [c**2 for c in columns])

    (there, a), (timms_there, b) = features(ours), features(theirs)
    assert abs(there.mean() - timms_there.mean()) < 4.5 * np.sqrt(2 * 0.7 * 0.3 / n)
    error = np.sqrt(a.var(1) / a.shape[1] + b.var(1) / b.shape[1])
    assert (np.abs(a.mean(1) - b.mean(1)) < 4.5 * error).all()


def test_number_of_boxes_and_probability():
    boxes = draw_erasing(4, 0, np.arange(6000), (160, 160), 0.25, 3)
    numbers = (boxes[:, :, 2] > 0).sum(1)
    assert abs((numbers > 0).mean() - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / 6000)
    fractions = np.bincount(numbers, minlength=4)[1:] / (numbers > 0).sum()
    assert np.abs(fractions - 1 / 3).max() < 4.5 * np.sqrt(2 / 9 / 1500)
    area = (boxes[:, :, 2] * boxes[:, :, 3]).sum(1) / 160**2  # of all boxes together
    assert area.max() < 1 / 3 + 0.01
    assert not draw_erasing(4, 0, np.arange(500), (160, 160), 0.0).any()
    assert (draw_erasing(4, 0, np.arange(500), (160, 160), 1.0)[:, 0, 2] > 0).all()


def test_boxes_follow_the_sample_alone():
    whole = draw_erasing(1, 2, np.arange(100), (50, 60), 0.5, 2)
    some = np.array([70, 3, 99, 3])
    assert np.array_equal(draw_erasing(1, 2, some, (50, 60), 0.5, 2), whole[some])
    for other in [(2, 2), (1, 3)]:
        assert not np.array_equal(draw_erasing(*other, np.arange(100), (50, 60), 0.5, 2), whole)


# ------------------------------------------------------------------------------------------------
# Erasing: the pixels
# ------------------------------------------------------------------------------------------------


def test_noise_is_the_hosts(device):
    prefix = rng.prefix_array(1, 2, np.arange(50), rng.STREAM_ERASING_NOISE)
    counter = np.arange(300)
    ours = normal_noise(
        torch.from_numpy(prefix.view(np.int64)).to(device)[:, None],
        torch.from_numpy(counter).to(device),
    )
    key = (1, 2, np.arange(50)[:, None], rng.STREAM_ERASING_NOISE)
    assert np.abs(ours.cpu().numpy() - rng.normal_array(*key, counter)).max() < 1e-12
    assert float(rng.normal(1, 2, 7, rng.STREAM_ERASING_NOISE, 9)) == pytest.approx(
        float(ours[7, 9]), abs=1e-12
    )
    assert abs(float(ours.mean())) < 4.5 / np.sqrt(15_000)
    assert abs(float(ours.std()) - 1) < 4.5 / np.sqrt(2 * 15_000)


def slow_erase(images_bchw, boxes, mode, seed, epoch, samples):
    out, width = images_bchw.clone(), images_bchw.shape[3]
    for b, sample in enumerate(samples.tolist()):
        for k, (top, left, h, w) in enumerate(boxes[b].tolist()):
            for y, x, c in np.ndindex(h, w, 3):
                row, column = top + y, left + x
                counter = 3 * k + c if mode == "rand" else 3 * (row * width + column) + c
                z = rng.normal(seed, epoch, sample, rng.STREAM_ERASING_NOISE, counter)
                out[b, c, row, column] = 0.0 if mode == "const" else z
    return out


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("count", [1, 3])
def test_erase(device, mode, count):
    """Against a loop over pixels; the boxes of a count of 3 overlap in some images."""
    images_bchw = normalize(made_images(8, 21, 17), MEAN, STD)
    samples = np.array([5, 900, 2, 2**40, 4, 77, 6, 1])
    boxes = draw_erasing(3, 1, samples, (21, 17), 0.8, count)
    if count == 3:
        boxes[0] = [[2, 2, 9, 9], [4, 4, 9, 9], [3, 3, 4, 4]]
    wanted = slow_erase(images_bchw, boxes, mode, 3, 1, samples)
    given = images_bchw.clone().to(device)
    ours = erase(given, boxes, mode, 3, 1, samples)
    assert ours.data_ptr() == given.data_ptr()
    assert close(ours, wanted)
    assert not torch.equal(wanted, images_bchw)


def test_nothing_to_erase():
    images_bchw = normalize(made_images(), MEAN, STD)
    boxes = np.zeros((6, 1, 4), np.int64)
    assert torch.equal(erase(images_bchw.clone(), boxes, "pixel", 0, 0, np.arange(6)), images_bchw)


# ------------------------------------------------------------------------------------------------
# Mixup and CutMix
# ------------------------------------------------------------------------------------------------


def timm_mix(images_bchw, labels_b, seed, step, mixup, cutmix):
    """timm's result, its global generator seeded with the key.

    timm mixes with the reverse of a batch: neighbors are put where they are each other's reverse.
    """
    state, places = np.random.get_state(), np.arange(len(labels_b))
    order = np.concatenate([places[::2], places[1::2][::-1]])
    np.random.seed(np.random.SeedSequence([seed, step]).generate_state(4))
    try:
        options = {"label_smoothing": 0.1, "num_classes": CLASSES}
        operation = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, **options)
        mixed = operation(images_bchw[order], labels_b[order])
        return [part[np.argsort(order)] for part in mixed]
    finally:
        np.random.set_state(state)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_the_batch_is_timms(device, mixup, cutmix):
    transforms = batch_transforms(mixup=mixup, cutmix=cutmix)
    images_bhwc, labels_b, kinds = made_images(), labels(), set()
    for step in range(24):
        drawn = draw_mix(3, step, (20, 24), mixup, cutmix)
        kinds.add(drawn.box is not None)
        wanted, wanted_targets = timm_mix(
            slow_normalize(images_bhwc), labels_b, 3, step, mixup, cutmix
        )
        ours, targets = transforms(images_bhwc.to(device), labels_b.to(device), None, 9, step)
        assert close(ours, wanted)
        assert close(targets, wanted_targets)
        assert targets.dtype == torch.float32
    assert kinds == {False, True} if mixup and cutmix else len(kinds) == 1


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0)])
def test_erased_images_are_mixed(device, mixup, cutmix):
    """Erasing comes before mixing, as in timm's loader."""
    transforms = batch_transforms(mixup=mixup, cutmix=cutmix, erasing=0.6, erasing_mode="pixel")
    images_bhwc, labels_b, samples = made_images(), labels(), np.arange(6) * 11
    boxes = draw_erasing(3, 2, samples, (20, 24), 0.6)
    erased = slow_erase(slow_normalize(images_bhwc), boxes, "pixel", 3, 2, samples)
    wanted, _ = timm_mix(erased, labels_b, 3, 8, mixup, cutmix)
    ours, _ = transforms(images_bhwc.to(device), labels_b.to(device), samples, 2, 8)
    assert close(ours, wanted)


@pytest.mark.parametrize("b", [1, 5])
def test_odd_batches(b):
    """The last image meets itself: it and its label stay; the others are mixed."""
    images_bhwc, labels_b = made_images(b), labels(b)
    partner = [1, 0, 3, 2, 4][-b:] if b > 1 else [0]
    for step in range(12):
        ours, targets = batch_transforms(mixup=0.8, cutmix=1.0)(
            images_bhwc, labels_b, None, 0, step
        )
        plain = slow_normalize(images_bhwc)
        lam, box = draw_mix(3, step, (20, 24), 0.8, 1.0)
        wanted = plain * lam + plain[partner] * (1 - lam)
        if box is not None:
            wanted = plain.clone()
            rows, columns = slice(*box[:2]), slice(*box[2:])
            wanted[:, :, rows, columns] = plain[partner][:, :, rows, columns]
        assert close(ours, wanted)
        assert close(ours[-1], plain[-1])
        assert float(targets[-1].max()) == pytest.approx(0.9 + 0.1 / CLASSES)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_batch_cut_into_ranks_is_the_whole_batch(device, ranks):
    """Bit for bit what the network sees, and the targets, with everything on."""
    images, labels_b, samples = made_images(16).to(device), labels(16).to(device), np.arange(16) * 7
    transforms = batch_transforms(mixup=0.8, cutmix=1.0, erasing=0.6, erasing_mode="pixel")
    for step in range(8):
        whole = transforms(images, labels_b, samples, 2, step)
        each = 16 // ranks
        cut = [slice(start, start + each) for start in range(0, 16, each)]
        parts = [transforms(images[c], labels_b[c], samples[c], 2, step) for c in cut]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])


def test_smoothed_targets_give_torchs_smoothed_loss():
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))
    mixing = draw_mix(0, 0, (8, 8), 0.2, 0.0)
    targets = mix_targets(labels(), mixing, CLASSES, 0.1)
    assert torch.allclose(targets.sum(1), torch.ones(6))
    loss, entropy = 0, torch.nn.functional.cross_entropy
    for fraction, truth in [(mixing.lam, labels()), (1 - mixing.lam, neighbors(labels()))]:
        loss += fraction * entropy(logits, truth, label_smoothing=0.1)
    assert float(entropy(logits, targets)) == pytest.approx(float(loss), abs=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_follow_the_beta_distribution(alpha):
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)); CutMix takes half of the steps."""
    n = 2000
    lams = np.array([draw_mix(1, step, (32, 32), alpha, 0.0).lam for step in range(n)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lams.mean() - 0.5) < 4.5 * np.sqrt(variance / n)
    assert abs(lams.var() - variance) < 4.5 * 0.25 * np.sqrt(1 / n)
    cuts = np.mean([draw_mix(1, step, (32, 32), 0.5, alpha).box is not None for step in range(n)])
    assert abs(cuts - 0.5) < 4.5 * np.sqrt(0.25 / n)


@pytest.mark.parametrize("size", [(160, 160), (33, 7), (1, 1), (1, 50)])
def test_cut_boxes_lie_inside_and_set_the_share(size):
    for step in range(300):
        lam, (top, bottom, left, right) = draw_mix(0, step, size, 0.0, 1.0)
        assert 0 <= top <= bottom <= size[0]
        assert 0 <= left <= right <= size[1]
        assert lam == pytest.approx(1 - (bottom - top) * (right - left) / (size[0] * size[1]))


# ------------------------------------------------------------------------------------------------
# The whole step
# ------------------------------------------------------------------------------------------------

STRONG = {"erasing": 0.5, "erasing_mode": "pixel", "erasing_count": 2, "mixup": 0.2, "cutmix": 1.0}


def test_without_settings_only_normalized(device):
    images_bhwc, labels_b = made_images().to(device), labels().to(device)
    ours, targets = batch_transforms()(images_bhwc, labels_b, None, 0, 0)
    assert targets is labels_b
    assert close(ours, slow_normalize(images_bhwc.cpu()))


@pytest.mark.parametrize("settings", [{}, {"mixup": 0.2}, {"cutmix": 1.0}, STRONG])
def test_the_key_alone_decides(device, settings):
    """The same again for the same key; the input and every global generator left alone."""
    images_bhwc, labels_b, samples = made_images(), labels(), np.arange(6)
    before, states = images_bhwc.clone(), (torch.get_rng_state(), np.random.get_state()[1].copy())
    on_device = images_bhwc.to(device), labels_b.to(device)
    one = batch_transforms(**settings)(*on_device, samples, 4, 100)
    again = batch_transforms(**settings)(*on_device, samples, 4, 100)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert torch.equal(images_bhwc, before)
    assert torch.equal(on_device[0].cpu(), before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    if settings:
        other = batch_transforms(seed=4, **settings)(*on_device, samples, 4, 100)
        assert not torch.equal(one[0], other[0])
        assert not torch.equal(one[0], batch_transforms(**settings)(*on_device, samples, 4, 101)[0])


def test_epoch_and_sample_decide_the_boxes():
    transforms = batch_transforms(erasing=1.0)
    images_bhwc, labels_b = made_images(), labels()
    samples = np.array([4, 9, 1, 30, 2, 8])
    images, targets = transforms(images_bhwc, labels_b, samples, 4, 0)
    assert targets is labels_b
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    shuffled, _ = transforms(images_bhwc[order], labels_b[order], samples[order], 4, 77)
    assert torch.equal(shuffled, images[order])
    assert not torch.equal(transforms(images_bhwc, labels_b, samples, 5, 0)[0], images)


def test_output_type():
    wanted, _ = batch_transforms(**STRONG)(made_images(), labels(), np.arange(6), 0, 0)
    ours, targets = batch_transforms(torch.float16, **STRONG)(
        made_images(), labels(), np.arange(6), 0, 0
    )
    assert torch.equal(ours, wanted.half())
    assert targets.dtype == torch.float32


def test_no_value_is_read_back_from_the_device():
    """Tensors on 'meta' have no values: whatever asks for one raises, as a GPU would wait."""
    images_bhwc, labels_b = made_images().to("meta"), labels().to("meta")
    for step in range(6):
        for mode in ("const", "rand", "pixel"):
            transforms = batch_transforms(**{**STRONG, "erasing_mode": mode})
            images, targets = transforms(images_bhwc, labels_b, np.arange(6), 0, step)
            assert images.shape == (6, 3, 20, 24)
            assert targets.shape == (6, CLASSES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_waits_for_the_gpu():
    transforms = batch_transforms(**STRONG)
    images_bhwc, labels_b = made_images().cuda(), labels().cuda()
    transforms(images_bhwc, labels_b, np.arange(6), 0, 0)  # constants are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(6):
            transforms(images_bhwc, labels_b, np.arange(6), 0, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_torch_compile_takes_the_operations():
    """The whole of each as one graph; values as without."""
    images_bhwc, labels_b = made_images(), labels()
    normalize(images_bhwc, MEAN, STD)
    normalize(images_bhwc, np.float32(MEAN), np.float32(STD))  # no other caller is in the way
    for step, alphas in [(0, (0.2, 0.0)), (0, (0.0, 1.0))]:
        mixing = draw_mix(3, step, (20, 24), *alphas)

        def work(images_bhwc, labels_b, mixing=mixing):
            return (
                normalize_and_mix(images_bhwc, MEAN, STD, mixing),
                mix(normalize(images_bhwc, MEAN, STD), mixing),
                mix_targets(labels_b, mixing, CLASSES, 0.1),
            )

        compiled = torch.compile(work, backend="aot_eager", fullgraph=True, dynamic=False)
        for ours, wanted in zip(
            compiled(images_bhwc, labels_b), work(images_bhwc, labels_b), strict=True
        ):
            assert close(ours, wanted)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"erasing": 1.5}, "random erasing has probability 1.5; give 0 to 1"),
        ({"erasing": 0.5, "erasing_mode": "blue"}, "mode 'blue'; use const, rand, pixel"),
        ({"erasing_count": 0}, "a count of 0; give 1 to 1000 boxes"),
        ({"mixup": -1.0}, "mixup is -1.0"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        batch_transforms(**settings)


def test_erasing_needs_the_samples():
    with pytest.raises(ValueError, match="needs samples_b"):
        batch_transforms(erasing=0.1)(made_images(), labels(), None, 0, 0)


def test_boxes_of_mixing_differ_from_timms_as_documented():
    """timm's `rand_bbox` on the same draws: equal for even sides, a pixel less for odd ones."""
    size, lams = 64, []
    for step in range(8000):
        ours = draw_mix(0, step, (size, size), 0.0, 1.0)
        generator = np.random.RandomState(np.random.SeedSequence([0, step]).generate_state(4))
        generator.rand()
        side = int(size * np.sqrt(1 - generator.beta(1.0, 1.0)))
        y, x = generator.randint(0, size), generator.randint(0, size)
        low, high = (np.clip([y + s, x + s], 0, size) for s in (-(side // 2), side // 2))
        top, bottom, left, right = ours.box
        assert (top, left) == tuple(low)
        odd = np.array([side % 2, side % 2])
        assert (bottom, right) == tuple(np.minimum(high + odd, size))
        lams.append((ours.lam, 1 - np.prod(high - low) / size**2))
    means = [f"{mean:.3f}" for mean in np.mean(lams, 0)]
    assert f"the mean lam is {means[0]}, timm's {means[1]}" in draw_mix.__doc__


def test_mixing_by_forward_pass_is_that_of_any_number_of_ranks():
    one = mix_keys("pass", 0, 1)
    whole = [one(step, part, 8) for step in range(3) for part in range(8)]
    ranks = [mix_keys("pass", rank, 4) for rank in range(4)]
    assert whole == [rank(s, part, 2) for s in range(3) for rank in ranks for part in (0, 1)]
    assert len(set(whole)) == 24
    assert {mix_keys("step", rank, 4)(5, part, 2) for rank in range(4) for part in (0, 1)} == {5}
