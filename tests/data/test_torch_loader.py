"""The torchvision pipeline: the same pixels however it is run, torchvision's results, errors."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2

from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.beton.writer import write_beton
from fast_imagenet.data import samples, torch_loader, workers
from fast_imagenet.data.augmentation import Augment
from fast_imagenet.data.sampler import epoch_order
from fast_imagenet.data.samples import (
    CropBox,
    RandomCrop,
    SampleDataset,
    SampleError,
    center_crop,
    crop_and_resize,
)
from fast_imagenet.data.torch_augmentation import KeyedTransforms
from fast_imagenet.data.torch_loader import TorchEvalLoader, TorchTrainLoader
from fast_imagenet.rng import COPY, index_of
from fast_imagenet.sources import SourceError, open_source
from tests import simulated_streams
from tests.conftest import ROOT
from tests.reference import alternating_flip, crop_resize

CLASSES = ["n00000001", "n00000002", "n00000003"]
TRAIN, VAL = 24, 11


def drawn_image(number: int) -> Image.Image:
    """A smooth image of its own size and colors: resizing differences stay small."""
    rng = np.random.default_rng(number)
    width, height = rng.integers(60, 140, 2)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(5, 20) + y / rng.uniform(5, 20)) for _ in range(3)]
    image = Image.fromarray((127 + 100 * np.stack(waves, -1)).astype(np.uint8))
    ImageDraw.Draw(image).rectangle((10, 10, 30, 25), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


def encoded(number: int) -> bytes:
    """JPEG; of the first ones one is gray, one CMYK, one a PNG, as in ImageNet."""
    image, format_ = drawn_image(number), "JPEG"
    if number in (0, 1):
        image = image.convert(("L", "CMYK")[number])
    if number == 2:
        image, format_ = image.convert("RGBA"), "PNG"
    buffer = io.BytesIO()
    image.save(buffer, format_, **({"quality": 92} if format_ == "JPEG" else {}))
    return buffer.getvalue()


def write_split(folder, numbers):
    for position, number in enumerate(numbers):
        target = folder / CLASSES[position % 3] / f"{number:03}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded(number))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An image folder with train/ and val/, and beside them train.beton and val.beton."""
    root = tmp_path_factory.mktemp("images")
    write_split(root / "train", range(TRAIN))
    write_split(root / "val", range(100, 100 + VAL))
    for split in ("train", "val"):
        write_beton(root / f"{split}.beton", open_source("image_folder", root, split))
    return root


def train_loader(root, name="train", **options):
    return TorchTrainLoader(root / name, **{"global_batch": 8, "seed": 1, **options})


def collect(batches):
    images, labels = list(zip(*batches, strict=True))[:2]
    return torch.cat(images), torch.cat(labels)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------
# What a batch is
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val", "val.beton"])
def test_16_bit_gray_is_scaled(name, tmp_path):
    file = tmp_path / "val/a/x.png"
    file.parent.mkdir(parents=True)
    Image.fromarray(np.full((40, 50), 32_768, np.uint16)).save(file)
    write_beton(tmp_path / "val.beton", open_source("image_folder", tmp_path, "val"))
    images_bhwc, _ = next(TorchEvalLoader(tmp_path / name, batch_size=1).batches(32, 1.0))
    assert (images_bhwc == 128).all()


@pytest.mark.parametrize("name", ["", "train", "train.beton"])
def test_batches_of_an_epoch(root, name):
    loader = train_loader(root, name)
    assert (len(loader), loader.num_samples, loader.num_classes) == (3, TRAIN, 3)
    assert loader.classes == CLASSES
    labels = open_dataset(root, name).labels
    order = epoch_order(TRAIN, seed=1, epoch=4).reshape(3, 8)
    for step, (images_bhwc, labels_b, samples_b) in enumerate(loader.epoch(4, resolution=32)):
        assert images_bhwc.shape == (8, 32, 32, 3)
        assert images_bhwc.is_contiguous()
        assert images_bhwc.dtype == torch.uint8
        assert labels_b.dtype == torch.int64
        assert labels_b.tolist() == labels[order[step]].tolist()
        assert samples_b.dtype == np.int64
        assert samples_b.tolist() == order[step].tolist()
    assert step == 2


def open_dataset(root, name):
    return samples.open_dataset(root / name, "train")


def test_the_incomplete_last_batch_is_dropped(root):
    loader = train_loader(root, global_batch=7)
    assert len(loader) == 3 == len(list(loader.epoch(0, 32)))


@pytest.mark.parametrize("name", ["train", "train.beton"])
def test_pixels_are_torchvisions(root, name):
    """Against torchvision's own transforms on Pillow images, the generator in the same state.

    torchvision resizes tensors within one level of Pillow; one more for rounding twice.
    """
    images_bhwc, _, _ = next(train_loader(root, name).epoch(2, resolution=32))
    source = open_dataset(root, name)
    for image_hwc, index in zip(images_bhwc, epoch_order(TRAIN, 1, 2)[:8].tolist(), strict=True):
        pil = as_pil(source, index)
        key = np.random.SeedSequence([1, 2, index]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(key))
        expected = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip()])(pil)
        difference = np.abs(image_hwc.numpy().astype(int) - np.asarray(expected).astype(int))
        assert difference.max() <= 2
        assert difference.mean() < 0.3


def as_pil(source, index):
    if isinstance(source, BetonFile):
        return Image.fromarray(source.image(index))
    return Image.open(source.name(index)).convert("RGB")


# ------------------------------------------------------------------------------------------------
# The same pixels however it is run
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(root):
    """Epochs 0 and 1 at 32 and 48 px, prepared in this process by one rank."""
    loader = train_loader(root)
    return [collect(loader.epoch(0, 32)), collect(loader.epoch(1, 48))]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_which_outlive_the_epoch(root, expected, workers):
    loader = train_loader(root, num_workers=workers)
    assert equal(collect(loader.epoch(0, 32)), expected[0])
    before = worker_ids(loader)
    assert equal(collect(loader.epoch(1, 48)), expected[1])
    assert worker_ids(loader) == before
    assert len(before) == workers
    loader.close()
    assert not any(alive(pid) for pid in before)


def worker_ids(loader):
    return [worker.pid for worker in loader._loader._loader._iterator._workers]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks(root, expected, world_size):
    ranks = [train_loader(root, rank=r, world_size=world_size) for r in range(world_size)]
    steps = zip(*(loader.epoch(0, 32) for loader in ranks), strict=True)
    assert equal(collect(batch for step in steps for batch in step), expected[0])


@pytest.mark.parametrize("start_step", [1, 2, 3])
def test_from_any_step(root, expected, start_step):
    batches = list(train_loader(root).epoch(0, 32, start_step=start_step))
    assert len(batches) == 3 - start_step
    for (images, labels, samples_b), step in zip(batches, range(start_step, 3), strict=True):
        assert samples_b.tolist() == epoch_order(TRAIN, 1, 0)[step * 8 : step * 8 + 8].tolist()
        assert torch.equal(images, expected[0][0][step * 8 : step * 8 + 8])
        assert torch.equal(labels, expected[0][1][step * 8 : step * 8 + 8])


@pytest.mark.parametrize("workers", [0, 2])
def test_after_an_epoch_that_was_left_early(root, expected, workers):
    loader = train_loader(root, num_workers=workers)
    next(loader.epoch(5, 40))
    assert equal(collect(loader.epoch(1, 48)), expected[1])
    loader.close()
    assert equal(collect(loader.epoch(0, 32)), expected[0])
    loader.close()


def test_copies_of_an_image_differ_on_any_rank_and_after_a_resume(root):
    make = partial(train_loader, root, augment=Augment(repeats=3, brightness=0.9))
    one = make()
    batches, order = list(one.epoch(1, 32)), one.order(1)
    assert len(batches) == TRAIN // 8
    for step, (images_bhwc, labels_b, keys) in enumerate(batches):
        assert sorted(index_of(keys)) == sorted(np.repeat(order, 3)[8 * step : 8 * step + 8])
        assert labels_b.tolist() == one._source.labels[index_of(keys)].tolist()
        assert len({image_hwc.numpy().tobytes() for image_hwc in images_bhwc}) == 8
    assert equal(collect(make(num_workers=2).epoch(1, 32, 1)), collect(batches[1:]))
    ranks = [list(make(rank=rank, world_size=2).epoch(1, 32)) for rank in (0, 1)]
    for whole, *halves in zip(batches, *ranks, strict=True):
        assert torch.equal(whole[0], torch.cat([half[0] for half in halves]))


def test_seed_and_epoch_change_the_pixels(root):
    boxes = [
        RandomCrop(seed, (0.08, 1.0), 0.5)(100, 100, index, epoch)
        for seed, epoch, index in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len(set(boxes)) == 4


def numpy_state():
    return np.random.get_state()[1].copy()  # timm's Mixup draws from this one


def test_the_runs_generators_are_left_alone(root):
    torch.manual_seed(3)
    states = torch.get_rng_state(), numpy_state()
    collect(train_loader(root).epoch(0, 32))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(numpy_state(), states[1])


def test_crops_and_flips_follow_the_settings():
    """Area fractions uniform in the range, aspect ratios within 3/4 .. 4/3, flips as asked."""
    draw = RandomCrop(0, (0.2, 0.6), 0.25)
    boxes = [draw(400, 500, index, epoch=0) for index in range(1500)]
    areas = np.array([box.height * box.width / 200_000 for box in boxes])
    aspects = np.array([box.width / box.height for box in boxes])
    assert areas.min() > 0.195
    assert areas.max() < 0.605
    assert abs(areas.mean() - 0.4) < 4 * 0.4 / np.sqrt(12 * 1500)
    assert aspects.min() > 0.74
    assert aspects.max() < 1.35
    assert abs(np.mean([box.flip for box in boxes]) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 1500)
    assert all(box.top >= 0 and box.top + box.height <= 400 for box in boxes)
    assert all(box.left >= 0 and box.left + box.width <= 500 for box in boxes)
    assert not any(RandomCrop(0, (0.2, 0.6), 0.0)(40, 40, i, 0).flip for i in range(50))
    assert all(RandomCrop(0, (0.2, 0.6), 1.0)(40, 40, i, 0).flip for i in range(50))


def test_alternating_flips_are_those_of_their_definition():
    """On both backends; boxes are as without, and so is the first epoch of FFCV's."""
    from fast_imagenet.ops import CropDecode

    keys = np.concatenate([np.arange(40), np.arange(40) + 2 * COPY, np.arange(40) + 3 * COPY])
    sides, modes = np.full(120, 50), ("random", "alternating")
    plain, ffcv = (CropDecode(32, seed=5, flip_mode=mode) for mode in modes)
    torchs = RandomCrop(5, (0.08, 1.0), 0.5, "alternating")
    for epoch in range(4):
        expected = [alternating_flip(5, epoch, key % COPY, key // COPY) for key in keys.tolist()]
        plain.set_epoch(epoch)
        ffcv.set_epoch(epoch)
        crops, others = (one.draw(keys, sides, sides, (32, 32)) for one in (ffcv, plain))
        assert crops[:, 4].tolist() == expected
        assert np.array_equal(crops[:, :4], others[:, :4])
        assert epoch or np.array_equal(crops[:40], others[:40])
        assert [torchs(50, 50, key, epoch).flip for key in keys.tolist()] == expected
        assert torchs(50, 50, 7, epoch)[:4] == RandomCrop(5, (0.08, 1.0), 0.5)(50, 50, 7, epoch)[:4]
    with pytest.raises(ValueError, match="flip_mode is 'alternating' and flip 0.3"):
        CropDecode(32, flip=0.3, flip_mode="alternating")


# ------------------------------------------------------------------------------------------------
# Augmentation
# ------------------------------------------------------------------------------------------------

COLOR = {"brightness": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2, "blur": 0.2}
STRONG = Augment(crop_area=(0.25, 1.0), flip=0.3, policy="rand_augment_timm", **COLOR)
TENSOR = Augment(crop_area=(0.25, 1.0), flip=0.3, policy="rand_augment_lite", **COLOR)


def cropped_then_changed(root, augment, epoch, resolution, transforms="cpu"):
    """The images of an epoch, the changes made here to what a loader without them gives."""
    plain = Augment(crop_area=augment.crop_area, flip=augment.flip)
    keyed = KeyedTransforms(augment, 1, transforms)
    images = []
    for images_bhwc, _, samples_b in train_loader(root, augment=plain).epoch(epoch, resolution):
        pairs = zip(images_bhwc, samples_b.tolist(), strict=True)
        images += [keyed(image.clone(), epoch, index) for image, index in pairs]
    return torch.stack(images)


def test_images_are_changed_after_crop_and_flip(root):
    """By the same key for any number of workers and ranks, and from any step."""
    wanted = cropped_then_changed(root, STRONG, 1, 40)
    images, _ = collect(train_loader(root, augment=STRONG).epoch(1, 40))
    assert torch.equal(images, wanted)
    assert not torch.equal(images, collect(train_loader(root).epoch(1, 40))[0])
    loader = train_loader(root, augment=STRONG, num_workers=2)
    assert torch.equal(collect(loader.epoch(1, 40))[0], wanted)
    loader.close()
    ranks = [train_loader(root, augment=STRONG, rank=r, world_size=2) for r in range(2)]
    steps = zip(*(loader.epoch(1, 40, start_step=1) for loader in ranks), strict=True)
    assert torch.equal(collect(batch for step in steps for batch in step)[0], wanted[8:])


def test_images_are_changed_on_the_device(root, device_is_cpu):
    images, _ = collect(train_loader(root, augment=TENSOR, transforms="gpu").epoch(1, 40))
    assert torch.equal(images, cropped_then_changed(root, TENSOR, 1, 40, "gpu"))


def test_a_policy_that_needs_pillow_is_refused_on_a_gpu(root, device_is_cpu):
    with pytest.raises(ValueError, match="rand_augment_timm changes Pillow images"):
        train_loader(root, augment=STRONG, transforms="gpu")


# ------------------------------------------------------------------------------------------------
# Validation
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "val", "val.beton"])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 0)])
def test_every_image_is_seen_once_over_all_ranks(root, name, world_size, workers):
    whole = TorchEvalLoader(root / name, batch_size=100)
    assert (whole.num_samples, whole.num_classes, whole.classes) == (VAL, 3, CLASSES)
    images, labels = collect(whole.batches(24, 0.875))
    assert len(images) == VAL
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size, "num_workers": workers}
        loader = TorchEvalLoader(root / name, batch_size=4, **place)
        batches = list(loader.batches(24, 0.875))
        assert equal(collect(batches), (images[rank::world_size], labels[rank::world_size]))
        assert [len(b[1]) for b in batches[:-1]] == [4] * (len(batches) - 1)
        loader.close()


@pytest.mark.parametrize("ratio", [1.0, 0.875, 0.5])
def test_center_crop_is_pillows(root, ratio):
    source = samples.open_dataset(root, "val")
    images, _ = collect(TorchEvalLoader(root, batch_size=4).batches(40, ratio))
    for index in range(VAL):
        pil = as_pil(source, index)
        side = int(ratio * min(pil.size))
        left, top = (pil.width - side) // 2, (pil.height - side) // 2
        square = pil.crop((left, top, left + side, top + side))
        wanted = np.asarray(square.resize((40, 40), Image.Resampling.BILINEAR)).astype(int)
        difference = np.abs(images[index].numpy().astype(int) - wanted)
        assert difference.max() <= 2
        assert difference.mean() < 0.3


def test_center_crop_is_torchvisions_resize_and_crop_up_to_rounding():
    """Same square, so the mean over the image stays: within half a level on a smooth image."""
    for number in range(10):
        pil = drawn_image(number).resize((500, 375))
        usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(pil)
        image_chw = samples.to_chw(np.asarray(pil))
        box = center_crop(375, 500, 0, 0.875)
        ours = crop_and_resize(image_chw, box, 224)
        difference = np.abs(ours.numpy().astype(int) - np.asarray(usual).astype(int))
        assert difference.mean() < 1.0


def test_the_smallest_image_still_gives_a_pixel():
    assert center_crop(1, 1, 0, 0.875) == CropBox(0, 0, 1, 1, False)


def test_labels_follow_the_classes_of_train(tmp_path, root):
    write_split(tmp_path / "train", range(3, 9))
    (tmp_path / "val" / CLASSES[2]).mkdir(parents=True)
    (tmp_path / "val" / CLASSES[2] / "a.JPEG").write_bytes(encoded(5))
    for path in (tmp_path, tmp_path / "val"):
        loader = TorchEvalLoader(path, batch_size=4)
        assert loader.num_classes == 3
        assert collect(loader.batches(24, 1.0))[1].tolist() == [2]


# ------------------------------------------------------------------------------------------------
# Transforms on the device
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def device_is_cpu(monkeypatch):
    """Lets the path for GPUs run on the CPU; all but the decoder's backend is the same code."""
    monkeypatch.setattr(torch_loader, "check_transforms", lambda transforms, device: None)


@pytest.mark.parametrize("name", ["train", "train.beton"])
@pytest.mark.parametrize("workers", [0, 2])
def test_device_transforms_give_the_same_images(root, device_is_cpu, name, workers):
    options = {"num_workers": workers, "transforms": "gpu"}
    images, labels = collect(train_loader(root, name, **options).epoch(0, 32))
    assert images.is_contiguous()
    assert equal((images, labels), collect(train_loader(root, name).epoch(0, 32)))


def test_device_transforms_for_validation(root, device_is_cpu):
    batches = TorchEvalLoader(root, batch_size=4, transforms="gpu").batches(32, 0.9)
    assert equal(collect(batches), collect(TorchEvalLoader(root, batch_size=4).batches(32, 0.9)))


def test_one_image_that_the_device_decoder_refuses(root, device_is_cpu, monkeypatch):
    """nvJPEG knows fewer kinds than libjpeg: the whole batch then goes the slow way, unchanged."""

    def refuse(*_):
        raise RuntimeError("unsupported")

    monkeypatch.setattr(samples, "_decode_jpegs", refuse)
    images, _ = collect(train_loader(root, transforms="gpu").epoch(0, 32))
    assert torch.equal(images, collect(train_loader(root).epoch(0, 32))[0])


def test_only_plain_jpegs_are_left_to_the_device():
    sizes = [drawn_image(number).size[::-1] for number in range(4)]
    found = [samples.plain_jpeg_size(encoded(number)) for number in range(4)]
    assert found == [sizes[0], None, None, sizes[3]]  # gray, CMYK, PNG, color
    assert samples.plain_jpeg_size(np.zeros((4, 4, 3), np.uint8)) is None


def test_the_device_decodes_beside_the_training_step(root, monkeypatch):
    """On a stream of its own, idle before it; the step waits for the batch, and it for the step."""
    own, step, order = simulated_streams.Stream(), simulated_streams.Stream(), []
    slow, batch, labels = threading.Event(), Sent(order, "batch"), Sent(order, "labels")
    own.launch(lambda: order.append("batch before" if slow.wait(0.2) else "batch before, late"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "stream", simulated_streams.current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)

    def decode(*_):
        order.append("decode")
        simulated_streams.launch(lambda: (slow.wait(0.2), order.append("transforms")))
        return batch

    monkeypatch.setattr(workers, "finish_on_device", decode)
    pipeline = workers.PersistentLoader(SimpleNamespace(finish=False), 0, torch.device("cuda"))
    pipeline._loader = [([], labels)]
    assert next(pipeline._deliver([])) == (batch, labels)
    step.launch(lambda: order.append("step"))
    step.synchronize()
    begin = ["batch before, late", "decode", step, step]
    assert order == [*begin, "transforms", "batch", "labels", "step"]


class Sent:
    """A tensor whose copy to the device runs on the current stream."""

    def __init__(self, order, name):
        self.order, self.name, self.record_stream = order, name, order.append

    def to(self, device, non_blocking):
        assert non_blocking
        simulated_streams.launch(lambda: self.order.append(self.name))
        return self


def test_batches_are_copied_beside_the_training_step(monkeypatch):
    """The copy runs while the step before is busy, and the step that uses it waits for it."""
    own, step, order = simulated_streams.Stream(), simulated_streams.Stream(), []
    busy, copied = threading.Event(), threading.Event()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "stream", simulated_streams.current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
    pipeline = workers.PersistentLoader(SimpleNamespace(finish=True), 0, torch.device("cuda"))
    pipeline._loader = [(Sent(order, "images"), Sent(order, "labels"))]
    step.launch(lambda: (busy.wait(simulated_streams.LIMIT), order.append("step before")))
    next(pipeline._deliver([]))
    own.launch(copied.set)
    assert copied.wait(simulated_streams.LIMIT)
    assert set(order) == {step, "images", "labels"}
    step.launch(lambda: order.append("step"))
    busy.set()
    step.synchronize()
    assert order[-2:] == ["step before", "step"]


@pytest.mark.slow
def test_a_worker_whose_server_is_gone_already_ends():
    """In a process of its own, since it asks the system to be killed with its parent."""
    code = """
import os
from fast_imagenet.data import workers
os.getppid = lambda: 1
workers._end_with_parent(0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("transforms", ["cpu", "gpu"])
def test_batches_stay_whole_on_a_busy_gpu(root, transforms):
    """The host is ahead of the GPU by whole steps, whose memory is freed before they have run."""
    loader = train_loader(root, "train.beton", device="cuda", transforms=transforms)
    wanted = collect(loader.epoch(0, 64))[0]
    torch.cuda.synchronize()
    sums = []
    for images, _, _ in loader.epoch(0, 64):
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
        sums.append(images.double().sum((1, 2, 3)))
    assert torch.equal(torch.cat(sums), wanted.double().sum((1, 2, 3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("transforms", ["cpu", "gpu"])
def test_augmentation_on_a_gpu(root, transforms):
    options = {"num_workers": 1, "device": "cuda", "transforms": transforms, "augment": TENSOR}
    loader = train_loader(root, **options)
    images, _ = collect(loader.epoch(1, 40))
    assert images.is_cuda
    assert images.is_contiguous()
    wanted = cropped_then_changed(root, TENSOR, 1, 40, transforms)
    difference = (images.cpu().int() - wanted.int()).abs().float().mean()
    assert difference < 5 if transforms == "gpu" else difference == 0
    loader.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("transforms", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["train", "train.beton"])
def test_on_a_gpu(root, name, transforms):
    options = {"num_workers": 2, "device": "cuda", "transforms": transforms}
    loader = train_loader(root, name, **options)
    images, labels = collect(loader.epoch(0, 32))
    assert images.is_cuda
    assert labels.is_cuda
    assert images.is_contiguous()
    wanted, wanted_labels = collect(train_loader(root, name).epoch(0, 32))
    assert torch.equal(labels.cpu(), wanted_labels)
    # nvJPEG enlarges color differently: single pixels at edges of color may be far off
    difference = (images.cpu().int() - wanted.int()).abs().float().mean()
    assert difference < 2 if transforms == "gpu" else difference == 0
    loader.close()


# ------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transforms": "gpu"}, "data.transforms=gpu needs a GPU"),
        ({"transforms": "tpu"}, "data.transforms=tpu is unknown; use cpu or gpu"),
        ({"global_batch": 9, "world_size": 2}, "multiple of 2"),
        ({"global_batch": 25}, "24 images, fewer than one batch of 25; lower training.batch_size"),
        ({"name": "none.beton"}, "none.beton does not exist"),
        ({"name": "train/n00000001"}, "neither a folder train/ or val/"),
    ],
)
def test_what_cannot_work_is_said_at_once(root, options, words):
    with pytest.raises(ValueError, match=words):
        train_loader(root, **options)


def test_flat_folder(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.JPEG").write_bytes(encoded(5))
    with pytest.raises(SourceError, match="flat"):
        TorchEvalLoader(tmp_path / "val", batch_size=4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("transforms", ["cpu", "gpu"])
def test_a_damaged_image_is_named_in_one_sentence(tmp_path, device_is_cpu, workers, transforms):
    write_split(tmp_path / "train", range(3, 11))
    broken = tmp_path / "train" / CLASSES[1] / "004.JPEG"
    broken.write_bytes(broken.read_bytes()[:700])
    loader = train_loader(tmp_path, num_workers=workers, transforms=transforms)
    with pytest.raises(SampleError) as caught:
        collect(loader.epoch(0, 32))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("sample 3 (")
    assert str(broken) in message
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_pixel_is_noticed_as_its_page_is_first_read(root, tmp_path, workers):
    for suffix in ("", ".json"):
        shutil.copy(f"{root}/train.beton{suffix}", f"{tmp_path}/train.beton{suffix}")
    place = int(BetonFile(tmp_path / "train.beton").offsets[7]) + 300
    with open(tmp_path / "train.beton", "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    loader = train_loader(tmp_path, "train.beton", num_workers=workers)
    with pytest.raises(SampleError, match="the checksum of page 1 .*is wrong; copy it again"):
        collect(loader.epoch(0, 32))
    loader.close()
    unchecked = train_loader(tmp_path, "train.beton", check_pages=False)
    assert len(collect(unchecked.epoch(0, 32))[0]) == TRAIN


def test_a_file_that_is_gone(tmp_path):
    write_split(tmp_path / "train", range(3, 11))
    loader = train_loader(tmp_path, num_workers=1)
    (tmp_path / "train" / CLASSES[0] / "003.JPEG").unlink()
    with pytest.raises(SampleError, match=r"003.JPEG"):
        collect(loader.epoch(0, 32))
    loader.close()


def test_a_killed_worker_is_an_error_not_a_hang(root):
    loader = train_loader(root, global_batch=1, num_workers=2)
    batches = loader.epoch(0, 32)
    next(batches)
    os.kill(worker_ids(loader)[0], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="a data worker .*--training.resume=auto"):
        collect(batches)
    assert time.monotonic() - started < 30
    loader.close()


@pytest.mark.parametrize("place", ["within", "start"])
def test_the_wait_for_a_batch_has_no_limit_of_its_own(root, place):
    """The workers are stopped for longer than torch waits at a time: data.timeout alone decides."""
    loader = train_loader(root, global_batch=1, num_workers=1)
    batches = loader.epoch(0, 32)
    next(batches) if place == "within" else collect(batches)
    (worker,) = worker_ids(loader)
    os.kill(worker, signal.SIGSTOP)
    wake = threading.Timer(8, os.kill, (worker, signal.SIGCONT))
    wake.start()
    wanted = TRAIN - 1 if place == "within" else TRAIN
    assert len(list(batches if place == "within" else loader.epoch(1, 32))) == wanted
    wake.join()
    loader.close()


def test_workers_that_hang_are_ended_within_seconds(root):
    loader = train_loader(root, global_batch=1, num_workers=2)
    next(loader.epoch(0, 32))
    workers = worker_ids(loader)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 9
    assert not any(alive(worker) for worker in workers)


@pytest.mark.slow
def test_the_signals_that_stop_a_run_are_blocked_for_the_server_of_the_workers():
    """In a process of its own, where nothing has started multiprocessing's tracker before."""
    code = """
from multiprocessing import forkserver
from fast_imagenet.data.workers import _start_method
_start_method()
server = forkserver._forkserver._forkserver_pid
lines = open(f"/proc/{server}/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("SigBlk")))
print(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("SigBlk")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    blocked, own = (int(word, 16) for word in done.stdout.split())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        assert blocked >> (number - 1) & 1 and not own >> (number - 1) & 1, number


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_resize_is_that_of_pillow_in_training_and_evaluation(root, resize):
    """On both backends, within two levels; at 72 px FFCV's decoder reads at full size."""
    from fast_imagenet.data.ffcv_loader import EvalLoader

    file = BetonFile(root / "val.beton")
    side = [min(file.heights[i], file.widths[i]) for i in range(2)]
    for make in (TorchEvalLoader, partial(EvalLoader, num_workers=1)):
        path = str(root / "val.beton")
        images_bhwc, _ = next(iter(make(path, batch_size=2, resize=resize).batches(72, 1.0)))
        for index, image_hwc in enumerate(images_bhwc.numpy()):
            top, left = ((n - side[index]) // 2 for n in (file.heights[index], file.widths[index]))
            crop = (top, left, side[index], side[index], False)
            expected = crop_resize(file.image(index), crop, (72, 72), resize)
            assert np.abs(image_hwc.astype(int) - expected).max() <= 2
    box = CropBox(3, 5, 31, 29, False)
    dataset = SampleDataset(file, lambda *_: box, True, resize=resize)
    found = dataset[0, 24, 0][0].numpy().astype(int)
    expected = crop_resize(file.image(0), box, (24, 24), resize)
    assert np.abs(found - expected).max() <= 1
    with pytest.raises(ValueError, match="data.resize=area, but data.backend=torchvision has"):
        TorchEvalLoader(root, batch_size=2, resize="area")
