"""The peers' pipelines as their users write them: encoded image in, uint8 pixels out.

`plain`: random resized crop and flip. `strong`: also RandAugment (2 operations, magnitude 9),
ColorJitter 0.4/0.4/0.4 and RandomErasing 0.25. What differs from ours is listed in README.md.
"""

import io
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_train
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

BATCH_SIZE = 64
Clock = Callable[[], float]
Transform = Callable[[bytes], torch.Tensor]


def missing_packages() -> dict[str, str]:
    """Peer -> 'not installed', for those that are missing here."""
    packages = {
        "albumentations": ["albumentations"],
        "dali": ["nvidia", "nvidia.dali", "nvidia.nvimgcodec"],  # a parent first: else it raises
    }
    missing = [peer for peer, modules in packages.items() if not all(map(find_spec, modules))]
    return dict.fromkeys(missing, "not installed")


# ==== One image ===================================================================================


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def torchvision(size: int, strong: bool) -> Transform:
    """torchvision's v2 transforms on PIL images; the last two stages on the uint8 tensor."""
    color = [v2.RandAugment(2, 9), v2.ColorJitter(0.4, 0.4, 0.4)] if strong else []
    erase = [v2.RandomErasing(0.25)] if strong else []
    crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    return v2.Compose([decode, *crop, *color, v2.PILToTensor(), *erase])


def timm(size: int, strong: bool) -> Transform:
    """timm's training transform, the part that its users run on the CPU: erasing comes later."""
    transform = transforms_imagenet_train(
        size,
        use_prefetcher=True,
        interpolation="bilinear",
        color_jitter=0.4 if strong else None,
        force_color_jitter=strong,
        auto_augment="rand-m9" if strong else None,
        re_prob=0.25 if strong else 0.0,
    )
    return v2.Compose([decode, transform, np.asarray, torch.from_numpy])


class Albumentations:
    """albumentations on arrays that OpenCV decodes. It has no RandAugment: two operations are drawn
    from those of RandAugment that it has, at the strength that magnitude 9 means."""

    def __init__(self, size: int, strong: bool) -> None:
        import albumentations as A

        stages = [A.RandomResizedCrop((size, size)), A.HorizontalFlip(p=0.5)]
        if strong:
            ops = [
                A.NoOp(p=1),
                *(A.Affine(shear={axis: (-5, 5)}, scale=1, p=1) for axis in "xy"),
                *(A.Affine(translate_percent={axis: (-0.13, 0.13)}, p=1) for axis in "xy"),
                A.Rotate((-9, 9), p=1),
                A.RandomBrightnessContrast(0.27, 0, p=1),
                A.RandomBrightnessContrast(0, 0.27, p=1),
                A.Posterize(7, p=1),
                A.Solarize((0.7, 0.7), p=1),
                A.AutoContrast(p=1),
                A.Equalize(p=1),
            ]
            jitter = A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (0, 0), p=1)
            erase = A.Erasing(scale=(0.02, 0.33), ratio=(0.3, 3.3), p=0.25)
            stages += [A.SomeOf(ops, 2, replace=True, p=1), jitter, erase]
        self.transform = A.Compose(stages)

    def __call__(self, data: bytes) -> torch.Tensor:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return torch.from_numpy(self.transform(image=image)["image"])


TRANSFORMS = {"torchvision": torchvision, "timm": timm, "albumentations": Albumentations}


# ==== An epoch ====================================================================================


class Samples(Dataset):
    """`count` transformed images from a list of encoded ones, again and again."""

    def __init__(self, files: list[bytes], transform: Transform, count: int) -> None:
        self.files, self.transform, self.count = files, transform, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.files[index % len(self.files)])


def epoch(samples: Samples, cores: int, clock: Clock) -> Callable[[], float]:
    """A function that loads all samples in batches and returns the rate.

    One core: in this process. More: a DataLoader with as many workers, which live on from epoch to
    epoch, so that their start is not timed.
    """
    # numba's OpenMP threads do not survive a fork
    workers = dict(persistent_workers=True, multiprocessing_context="spawn", num_workers=cores)
    batches = DataLoader(samples, BATCH_SIZE, **workers if cores > 1 else {})

    def run() -> float:
        begin, seen = clock(), 0
        for images in batches:
            seen += len(images)
        return seen / (clock() - begin)

    return run


# ==== DALI ========================================================================================


def dali_epoch(
    files: list[bytes], size: int, strong: bool, cores: int, count: int, clock: Clock
) -> Callable[[], float]:
    """DALI's CPU operators with `cores` threads: decodes only rows and columns of the crop."""
    from nvidia.dali import fn, pipeline_def, types

    encoded = [np.frombuffer(data, np.uint8) for data in files]

    @pipeline_def(enable_conditionals=True)
    def define() -> Any:
        data = fn.external_source(
            lambda sample: encoded[sample.idx_in_epoch % len(encoded)], batch=False
        )
        images = fn.decoders.image_random_crop(data, random_area=[0.08, 1.0], device="cpu")
        flip = fn.random.coin_flip(dtype=types.BOOL)
        images = fn.resize(images, size=[size, size], antialias=True)
        images = fn.flip(images, horizontal=fn.cast(flip, dtype=types.INT32))
        return _dali_strong(images, size) if strong else images

    # a pipeline that works ahead would do so while the others are timed
    at_once = dict(exec_async=False, exec_pipelined=False, prefetch_queue_depth=1)
    pipe = define(batch_size=BATCH_SIZE, num_threads=cores, device_id=None, seed=1, **at_once)
    pipe.build()
    batches = -(-count // BATCH_SIZE)

    def run() -> float:
        begin = clock()
        for _ in range(batches):
            pipe.run()
        return batches * BATCH_SIZE / (clock() - begin)

    return run


def _dali_strong(images: Any, size: int) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali.auto_aug import rand_augment

    images = rand_augment.rand_augment(images, n=2, m=9, shape=[size, size], fill_value=0)
    kinds = ("brightness", "contrast", "saturation")
    images = fn.color_twist(images, **{kind: fn.random.uniform(range=[0.6, 1.4]) for kind in kinds})
    area = fn.random.uniform(range=[0.02, 0.33])
    aspect = fn.random.uniform(range=[0.55, 1.8])
    shape = fn.stack((area**0.5) * aspect, (area**0.5) / aspect)
    anchor = fn.random.uniform(range=[0.0, 1.0], shape=[2]) * (1.0 - shape)
    if fn.random.coin_flip(probability=0.25, dtype=types.BOOL):
        images = fn.erase(images, anchor=anchor, shape=shape, normalized=True, fill_value=0)
    return images
