"""The peers' pipelines as their users write them: encoded image in, uint8 pixels out.

`plain`: random resized crop and flip. `strong`: also RandAugment (2 operations, magnitude 9),
ColorJitter 0.4/0.4/0.4 and RandomErasing 0.25. What differs from ours is listed in README.md.
"""

import contextlib
import importlib.util
import io

import numpy as np
import torch
from PIL import Image

BATCH_SIZE = 64
PACKAGES = {
    "albumentations": ["albumentations"],
    "dali": ["nvidia.dali", "nvidia.nvimgcodec"],
}


def missing_packages() -> dict:
    """Peer -> 'not installed', for those that this environment lacks."""

    def installed(module):
        with contextlib.suppress(ModuleNotFoundError):  # of the parent
            return importlib.util.find_spec(module) is not None
        return False

    return {
        peer: "not installed"
        for peer, modules in PACKAGES.items()
        if not all(map(installed, modules))
    }


# ==== One image =================================================================================


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


class TorchVision:
    """torchvision's v2 transforms on PIL images; the last two stages on the uint8 tensor."""

    def __init__(self, size: int, strong: bool):
        from torchvision.transforms import v2

        color = [v2.RandAugment(2, 9), v2.ColorJitter(0.4, 0.4, 0.4)] if strong else []
        erase = [v2.RandomErasing(0.25)] if strong else []
        crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose([*crop, *color, v2.PILToTensor(), *erase])

    def __call__(self, data: bytes) -> torch.Tensor:
        return self.transform(decode(data))


class Timm:
    """timm's training transform, the part that its users run on the CPU: erasing comes later."""

    def __init__(self, size: int, strong: bool):
        from timm.data.transforms_factory import transforms_imagenet_train

        self.transform = transforms_imagenet_train(
            size,
            use_prefetcher=True,
            interpolation="bilinear",
            color_jitter=0.4 if strong else None,
            force_color_jitter=strong,
            auto_augment="rand-m9" if strong else None,
            re_prob=0.25 if strong else 0.0,
        )

    def __call__(self, data: bytes) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.transform(decode(data))))


class Albumentations:
    """albumentations on arrays that OpenCV decodes. It has no RandAugment: two operations are drawn
    from those of RandAugment that it has, at the strength that magnitude 9 means."""

    def __init__(self, size: int, strong: bool):
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
        import cv2

        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        return torch.from_numpy(self.transform(image=picture)["image"])


TRANSFORMS = {"torchvision": TorchVision, "timm": Timm, "albumentations": Albumentations}


# ==== An epoch ====================================================================================


class Samples:
    """`count` transformed images from a list of encoded ones, again and again."""

    def __init__(self, files: list[bytes], transform, count: int):
        self.files, self.transform, self.count = files, transform, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.transform(self.files[index % len(self.files)])


def epoch(samples: Samples, cores: int, clock):
    """A function that loads all samples in batches and returns the rate.

    One core: in this process. More: a DataLoader with as many workers, which live on from epoch to
    epoch, so that their start is not timed.
    """
    if cores > 1:
        batches = torch.utils.data.DataLoader(
            samples,
            BATCH_SIZE,
            num_workers=cores,
            persistent_workers=True,
            multiprocessing_context="spawn",  # numba's OpenMP threads do not survive a fork
        )
    else:
        batches = _Batches(samples)

    def run() -> float:
        begin, pictures = clock(), 0
        for images in batches:
            pictures += len(images)
        return pictures / (clock() - begin)

    return run


class _Batches:
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        for first in range(0, len(self.samples), BATCH_SIZE):
            batch = range(first, min(len(self.samples), first + BATCH_SIZE))
            yield torch.stack([self.samples[index] for index in batch])


# ==== DALI ========================================================================================


def dali_epoch(files: list[bytes], size: int, strong: bool, cores: int, count: int, clock):
    """DALI's CPU operators with `cores` threads: decodes only rows and columns of the crop."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment

    encoded = [np.frombuffer(data, np.uint8) for data in files]

    @pipeline_def(enable_conditionals=True)
    def define():
        data = fn.external_source(
            lambda sample: encoded[sample.idx_in_epoch % len(encoded)], batch=False
        )
        images = fn.decoders.image_random_crop(data, random_area=[0.08, 1.0], device="cpu")
        flip = fn.random.coin_flip(dtype=types.BOOL)
        images = fn.resize(images, size=[size, size], antialias=True)
        images = fn.flip(images, horizontal=fn.cast(flip, dtype=types.INT32))
        return _dali_strong(images, size, fn, types, rand_augment) if strong else images

    # a pipeline that works ahead would do so while the others are timed
    at_once = dict(exec_async=False, exec_pipelined=False, prefetch_queue_depth=1)
    pipe = define(batch_size=BATCH_SIZE, num_threads=cores, device_id=None, seed=1, **at_once)
    pipe.build()

    def run() -> float:
        begin = clock()
        for _ in range(-(-count // BATCH_SIZE)):
            pipe.run()
        return -(-count // BATCH_SIZE) * BATCH_SIZE / (clock() - begin)

    return run


def _dali_strong(images, size, fn, types, rand_augment):
    images = rand_augment.rand_augment(images, n=2, m=9, shape=[size, size], fill_value=0)
    factors = {
        name: fn.random.uniform(range=[0.6, 1.4])
        for name in ("brightness", "contrast", "saturation")
    }
    images = fn.color_twist(images, **factors)
    area = fn.random.uniform(range=[0.02, 0.33])
    aspect = fn.random.uniform(range=[0.55, 1.8])
    shape = fn.stack((area**0.5) * aspect, (area**0.5) / aspect)
    anchor = fn.random.uniform(range=[0.0, 1.0], shape=[2]) * (1.0 - shape)
    if fn.random.coin_flip(probability=0.25, dtype=types.BOOL):
        images = fn.erase(images, anchor=anchor, shape=shape, normalized=True, fill_value=0)
    return images
