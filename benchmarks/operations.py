"""The operations of op_kernels.py: name -> who -> maker of a function that runs one batch.

A maker gets images_bhwc, uint8 [b, h, w, 3]. To be imported when the process is pinned to its core.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import ffcv.transforms as ffcv_ops
import numpy as np
import torch
from ffcv.libffcv import resize_crop
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2

from fast_imagenet import ops
from fast_imagenet.data.device_transforms import Mixing, normalize_and_mix
from fast_imagenet.native.decoder import resize
from fast_imagenet.ops.geometry import SLACK, resample_nearest, shift_map

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Run = Callable[[np.ndarray], Any]
Maker = Callable[[np.ndarray], Run]
Makers = dict[str, Maker]


def operations_at(size: int) -> dict[str, Makers]:
    """All of them; size: of the images in pixels."""
    return color_operations() | policy_operations() | batch_operations(size)


# ==== Makers ======================================================================================


def ours(operation: Operation) -> Maker:
    """An operation of this package: changes the batch in place, or fills its own."""

    def make(images_bhwc: np.ndarray) -> Run:
        samples = np.arange(len(images_bhwc))
        return lambda batch: operation.transform(batch, samples)

    return make


def stock(*operations: Operation) -> Maker:
    """FFCV operations one after the other, compiled as its loader compiles them."""

    def make(images_bhwc: np.ndarray) -> Run:
        place = dict(jit_mode=True, device=torch.device("cpu"), dtype=np.dtype("u1"))
        state, stages = State(**place, shape=images_bhwc.shape[1:]), []
        indices = np.arange(len(images_bhwc))
        for operation in operations:
            state, query = operation.declare_state_and_memory(state)
            memory = query and np.empty((len(images_bhwc), *query.shape), query.dtype)
            source = operation.generate_code()
            more = (memory, indices) if getattr(source, "with_indices", False) else (memory,)
            stages.append((Compiler.compile(source), more))

        def run(batch: np.ndarray) -> np.ndarray:
            for code, more in stages:
                batch = code(batch, *more)
            return batch

        return run

    return make


def each(function: Callable[[Any], Any], convert: Callable[[np.ndarray], Any]) -> Maker:
    """A function of one image, which is converted beforehand."""

    def make(images_bhwc: np.ndarray) -> Run:
        images = [convert(image) for image in images_bhwc]
        return lambda batch: [function(image) for image in images]

    return make


def pillow(function: Callable[[Image.Image], Any]) -> Maker:
    """A function of one PIL image."""
    return each(function, Image.fromarray)


def tensor(transform: Callable[[torch.Tensor], Any]) -> Maker:
    """A torchvision transform of one uint8 tensor [3, h, w] at a time."""
    return each(transform, lambda image: torch.from_numpy(image).permute(2, 0, 1).contiguous())


def whole_batch(function: Callable[[torch.Tensor], Any]) -> Maker:
    """A function of the uint8 batch as a tensor [b, h, w, 3]."""
    return lambda images_bhwc: lambda batch: function(torch.from_numpy(batch))


def row(
    ours: Maker,
    ffcv: Maker | None = None,
    pillow: Maker | None = None,
    torchvision: Maker | None = None,
) -> Makers:
    """Who -> maker, for those that have the operation."""
    makers = {"ours": ours, "ffcv": ffcv, "pillow": pillow, "torchvision": torchvision}
    return {who: make for who, make in makers.items() if make}


# ==== Operations ==================================================================================


def color_operations() -> dict[str, Makers]:
    """What changes one image's colors."""

    def enhance(enhancer: Callable[[Image.Image], Any]) -> Maker:
        return pillow(lambda image: enhancer(image).enhance(random.uniform(0.6, 1.4)))

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))

    def jitter(peers: list[Operation], by_pillow: Maker | None = None, **strength: float) -> Makers:
        peer = v2.ColorJitter(**strength)
        mine, stocks = ours(ops.ColorJitter(**strength)), stock(*peers) if peers else None
        return row(mine, stocks, by_pillow or pillow(peer), tensor(peer))

    kinds = (ffcv_ops.RandomBrightness, ffcv_ops.RandomContrast, ffcv_ops.RandomSaturation)
    three = [kind(0.4, 1) for kind in kinds]
    gray = pillow(lambda image: Image.merge("RGB", [image.convert("L")] * 3))
    solarize = pillow(partial(ImageOps.solarize, threshold=128))
    wide = tensor(v2.GaussianBlur(23, (0.1, 2.0)))
    return {
        "brightness": jitter(three[:1], enhance(ImageEnhance.Brightness), brightness=0.4),
        "contrast": jitter(three[1:2], enhance(ImageEnhance.Contrast), contrast=0.4),
        "saturation": jitter(three[2:], enhance(ImageEnhance.Color), saturation=0.4),
        "hue": jitter([], hue=0.1),
        "ColorJitter 0.4/0.4/0.4": jitter(three, brightness=0.4, contrast=0.4, saturation=0.4),
        "grayscale": row(ours(ops.RandomGrayscale(1.0)), None, gray, tensor(v2.Grayscale(3))),
        "solarize": row(
            ours(ops.RandomSolarize(128, 1.0)), None, solarize, tensor(v2.RandomSolarize(128, 1.0))
        ),
        "Gaussian blur": row(ours(ops.GaussianBlur((0.1, 2.0), 1.0)), None, pillow(blur), wide),
    }


def policy_operations() -> dict[str, Makers]:
    """The automatic policies; torchvision's on PIL images too."""

    def policy(operation: Operation, peer: Callable[[Any], Any]) -> Makers:
        return row(ours(operation), None, pillow(peer), tensor(peer))

    timm = rand_augment_transform("rand-m9-inc1", {"translate_const": 100})
    three = v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(128, 1.0), v2.GaussianBlur(23)])
    return {
        "RandAugment lite": policy(ops.RandAugment(2, 9, mode="lite"), v2.RandAugment(2, 9)),
        "RandAugment full": policy(ops.RandAugment(2, 9, mode="full"), v2.RandAugment(2, 9)),
        "RandAugment timm": row(ours(ops.RandAugment(2, 9, mode="timm")), None, pillow(timm)),
        "TrivialAugmentWide": policy(ops.TrivialAugmentWide(), v2.TrivialAugmentWide()),
        "AutoAugment": policy(ops.AutoAugment(), v2.AutoAugment()),
        "ThreeAugment": row(ours(ops.ThreeAugment()), None, pillow(three)),
    }


def batch_operations(size: int) -> dict[str, Makers]:
    """Erasing, moving, flipping, normalizing and mixing."""

    def normalize(dtype: str) -> tuple[Operation, Operation]:
        table = np.array(MEAN) * 255, np.array(STD) * 255
        return ops.Normalize(MEAN, STD, dtype), ffcv_ops.NormalizeImage(*table, np.dtype(dtype))

    def mixup(images_bhwc: torch.Tensor) -> Any:
        return normalize_and_mix(images_bhwc, MEAN, STD, Mixing(lam=0.7, box=None))

    to_float = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    shift, move = size // 8, v2.RandomAffine(0, (0.125, 0.125))
    cutout, erase = stock(ffcv_ops.Cutout(size // 3)), tensor(v2.RandomErasing(1.0))
    mixup_ffcv = stock(ffcv_ops.ImageMixup(0.2, True), normalize("float32")[1])
    # ours is compiled into FFCV's pipeline
    float32, float16 = map(stock, normalize("float32")), map(stock, normalize("float16"))
    return {
        "erasing": row(ours(ops.RandomErasing(1.0, "const")), cutout, None, erase),
        "translate": row(
            *(ours_translate(shift), stock(ffcv_ops.RandomTranslate(shift))),
            *(pillow(move), tensor(move)),
        ),
        "crop, resize and flip": resize_and_flip(size),
        "normalize to float32": row(*float32, None, tensor(to_float)),
        "normalize to float16": row(*float16),
        "mixup and normalize to float32": row(
            whole_batch(mixup), mixup_ffcv, None, whole_batch(mixup_torchvision)
        ),
    }


def ours_translate(shift: int) -> Maker:
    """The nearest-neighbor map of the policies, as a move of whole pixels."""

    def make(images_bhwc: np.ndarray) -> Run:
        source = np.empty(images_bhwc[0].nbytes + SLACK, np.uint8)

        def run(batch: np.ndarray) -> None:
            for image_hwc in batch:
                source[: image_hwc.nbytes] = image_hwc.reshape(-1)
                move = (random.randint(-shift, shift), random.randint(-shift, shift))
                inverse = shift_map(*map(float, move))
                resample_nearest(np.uintp(source.ctypes.data), inverse, (0, 0, 0), image_hwc)

        return run

    return make


def mixup_torchvision(images_bhwc: torch.Tensor) -> Any:
    images_bchw = images_bhwc.permute(0, 3, 1, 2)
    images_bchw = v2.functional.to_dtype(images_bchw, torch.float32, scale=True)
    images_bchw = v2.functional.normalize(images_bchw, list(MEAN), list(STD))
    labels = torch.zeros(len(images_bchw), dtype=torch.int64)
    return v2.MixUp(alpha=0.2, num_classes=10)(images_bchw, labels)


def resize_and_flip(size: int) -> Makers:
    """The part of the decoders behind the decoding: a crop, 1.3 times the size, mirrored by half.

    The image is enlarged beforehand; only shrinking and mirroring are timed.
    """
    tall, wide = int(1.3 * size), int(1.4 * size)

    def enlarge(image_hwc: np.ndarray) -> np.ndarray:
        return cv2.resize(image_hwc, (wide, tall))

    def by_ours(image: np.ndarray) -> np.ndarray:
        return resize(image, (0, 0, tall, wide), (size, size), flip=random.random() < 0.5)

    def by_pillow(image: Image.Image) -> Image.Image:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image

    def by_ffcv(images_bhwc: np.ndarray) -> Run:
        """FFCV's INTER_AREA resize into the batch, then RandomHorizontalFlip."""
        large = [enlarge(image) for image in images_bhwc]
        flip = stock(ffcv_ops.RandomHorizontalFlip())(images_bhwc)

        def run(batch: np.ndarray) -> np.ndarray:
            for image, target in zip(large, batch, strict=True):
                resize_crop(image, 0, image.shape[0], 0, image.shape[1], target)
            return flip(batch)

        return run

    def by_torchvision(image: torch.Tensor) -> torch.Tensor:
        return flip(shrink(image))

    flip, shrink = v2.RandomHorizontalFlip(), v2.Resize((size, size))
    return row(
        each(by_ours, enlarge),
        by_ffcv,
        each(by_pillow, lambda image: Image.fromarray(enlarge(image))),
        each(by_torchvision, lambda image: v2.functional.to_image(enlarge(image))),
    )
