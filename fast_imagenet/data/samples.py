"""Samples for the torchvision backend: read, decode, crop, resize and augment one image.

`SampleDataset` does it in a worker or in the training process; `finish_on_device` does the part
after reading for a whole batch on the GPU.

Arrays: rgb_hwc and image_hwc uint8 in 0..255, RGB; image_chw the same as torch sees it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional

from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.data.torch_augmentation import KeyedTransforms, keyed_generator
from fast_imagenet.rng import alternating_flips, index_of
from fast_imagenet.sources import Source, open_source
from fast_imagenet.sources.decode import decode_rgb
from fast_imagenet.terminal import readable

ASPECT_RATIO = (3 / 4, 4 / 3)  # of the random crop, width to height, as in torchvision
INTERPOLATION = {"auto": InterpolationMode.BILINEAR, "bilinear": InterpolationMode.BILINEAR}
INTERPOLATION["bicubic"] = InterpolationMode.BICUBIC
Key = tuple[int, int, int | float]  # of a sample: its key (rng.py), resolution, epoch or crop ratio


class SampleError(ValueError):
    """An image cannot be read or decoded. The message names it in one sentence."""


def open_dataset(path: str | Path, split: str) -> BetonFile | Source:
    """A .beton file, or one split of an image folder; both have labels and classes.

    Raises:
        BetonError, SourceError: nothing usable is there.
        ValueError: a folder of another split.
    """
    path = Path(path)
    if not path.is_dir():
        return BetonFile(path)
    if (path / split).is_dir():
        return open_source("image_folder", path, split)
    if path.name not in ("train", "val"):
        raise ValueError(
            f"{path} is neither a folder train/ or val/ of class folders nor one that has {split}/ "
            f"in it; name one of these, or a .beton file"
        )
    # labels come from the class folders of train/, so that both splits number the classes alike
    return open_source("image_folder", path.parent, path.name)


# ==== What to cut out of an image: draw ===========================================================


class CropBox(NamedTuple):
    """A part of an image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, drawn by key.

    Args:
        seed: of the run.
        crop_area: smallest and largest fraction of the image.
        flip: probability.
        flip_mode: 'random' or 'alternating', see rng.py.
    """

    seed: int
    crop_area: tuple[float, float]
    flip: float
    flip_mode: str = "random"

    def __call__(self, height: int, width: int, key: int, epoch: int | float) -> CropBox:
        """The box of a sample, by its key, in `epoch`: nothing else changes it."""
        shape = torch.empty((3, height, width), device="meta")
        with keyed_generator([self.seed, int(epoch), key]):
            box = RandomResizedCrop.get_params(shape, list(self.crop_area), list(ASPECT_RATIO))
            flip = torch.rand(1).item() < self.flip
        if self.flip_mode == "alternating":
            flip = bool(alternating_flips(self.seed, int(epoch), np.array([key]))[0])
        top, left, box_height, box_width = box
        return CropBox(top, left, box_height, box_width, flip)


def center_crop(height: int, width: int, index: int, crop_ratio: int | float) -> CropBox:
    """The central square, side crop_ratio * min(height, width), rounded down, 1 px at least.

    Placed as FFCV's CenterCropRGBImageDecoder does.
    """
    side = max(1, int(crop_ratio * min(height, width)))
    return CropBox((height - side) // 2, (width - side) // 2, side, side, False)


# ==== Cut it out: apply ===========================================================================


def crop_and_resize(
    image_chw: torch.Tensor, box: CropBox, resolution: int, resize: str = "auto"
) -> torch.Tensor:
    """A part of uint8 image_chw, on any device, antialiased: uint8 (r, r, 3)."""
    size, kind = [resolution, resolution], INTERPOLATION[resize]
    out_chw = functional.resized_crop(image_chw, *box[:4], size, kind, antialias=True)
    if box.flip:
        out_chw = functional.horizontal_flip(out_chw)
    return out_chw.permute(1, 2, 0).contiguous()


class SampleDataset(Dataset):
    """Samples by (key of their draws, resolution, argument of the crop).

    Args:
        source: of encoded images or pixels.
        crop: a RandomCrop (argument: epoch) or center_crop (argument: crop ratio).
        finish: True: uint8 images (r, r, 3). False: (uint8 JPEG bytes [n] or pixels (H, W, 3),
            box, key), for `finish_on_device`.
        augment: what happens to an image of the right size, with (epoch, index); None: nothing.
        check_pages: called with the index of a sample before it is read; None: nothing is checked.
        resize: one of RESIZES in augmentation.py but area.
    Raises:
        ValueError: torchvision does not have the resize.
    """

    def __init__(
        self,
        source: BetonFile | Source,
        crop: Callable[[int, int, int, int | float], CropBox],
        finish: bool,
        augment: KeyedTransforms | None = None,
        check_pages: Callable[[np.ndarray], None] | None = None,
        resize: str = "auto",
    ) -> None:
        if resize not in INTERPOLATION:
            raise ValueError(
                f"data.resize={resize}, but data.backend=torchvision has {', '.join(INTERPOLATION)}"
            )
        self.resize = resize
        self.source, self.crop, self.finish, self.augment = source, crop, finish, augment
        self.check_pages = check_pages

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor | tuple, int]:
        """One sample and its label; whatever goes wrong is reported with the sample's name."""
        index, argument = index_of(key[0]), key[2]
        try:
            if self.check_pages:
                self.check_pages(np.array([index]))
            stored, label = self.source.read(index), int(self.source.labels[index])
            if not self.finish:
                return (*self._unfinished(stored, key[0], argument), key), label
            image_chw = to_chw(stored)
            box = self.crop(image_chw.shape[1], image_chw.shape[2], key[0], argument)
            return self.finished(image_chw, box, key), label
        except Exception as error:
            raise SampleError(describe(self.source, index, error)) from error

    def finished(self, image_chw: torch.Tensor, box: CropBox, key: Key) -> torch.Tensor:
        """A decoded image, on any device, as the network gets it: uint8 (r, r, 3)."""
        drawn_by, resolution, argument = key
        image_hwc = crop_and_resize(image_chw, box, resolution, self.resize)
        return self.augment(image_hwc, int(argument), drawn_by) if self.augment else image_hwc

    def _unfinished(
        self, stored: bytes | np.ndarray, key: int, argument: int | float
    ) -> tuple[torch.Tensor, CropBox]:
        size = plain_jpeg_size(stored)
        if size is None:  # the device decodes JPEG only: the rare rest is decoded here
            rgb_hwc = to_hwc(stored)
            height, width = rgb_hwc.shape[:2]
            return torch.tensor(rgb_hwc), self.crop(height, width, key, argument)
        data = torch.tensor(np.frombuffer(stored, np.uint8))
        return data, self.crop(size[0], size[1], key, argument)


def describe(source: BetonFile | Source, index: int, error: Exception) -> str:
    """A sentence that names the sample of an error."""
    where = f"of {source.path}" if isinstance(source, BetonFile) else f"({source.name(index)})"
    reason = " ".join(str(error).split())  # one line
    return readable(f"sample {index} {where} cannot be used: {type(error).__name__}: {reason}")


def to_hwc(stored: bytes | np.ndarray) -> np.ndarray:
    """The pixels, uint8 (H, W, 3)."""
    return stored if isinstance(stored, np.ndarray) else decode_rgb(stored)[0]


def to_chw(stored: bytes | np.ndarray) -> torch.Tensor:
    """The pixels, uint8 (3, H, W), channels last in memory, which torch resizes fastest."""
    with warnings.catch_warnings():
        # an image of the decoder may be read-only; it is only read here
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(to_hwc(stored)).permute(2, 0, 1)


def plain_jpeg_size(stored: bytes | np.ndarray) -> tuple[int, int] | None:
    """(height, width) of a gray or color JPEG from its header; None for everything else."""
    if isinstance(stored, np.ndarray) or stored[:2] != b"\xff\xd8":
        return None
    with Image.open(io.BytesIO(stored), formats=["JPEG"]) as image:
        return (image.height, image.width) if image.mode in ("RGB", "L") else None


def finish_on_device(
    samples: list[tuple], device: torch.device, dataset: SampleDataset
) -> torch.Tensor:
    """Decode, cut out, resize and augment a batch where the network is.

    Args:
        samples: (JPEG bytes or pixels, box, key), from `dataset`.
        device: GPU, or CPU in tests.
        dataset: a SampleDataset with finish=False.
    Returns:
        images_bhwc on `device`.
    Raises:
        SampleError: a JPEG is damaged.
    """
    images_chw = _decode_all([sample[0] for sample in samples], device)
    finished = []
    for image_chw, (data, box, key) in zip(images_chw, samples, strict=True):
        if image_chw is None:  # the fast decoder refused the batch: this one may not be to blame
            try:
                image_chw = to_chw(data.numpy().tobytes()).to(device)
            except Exception as error:
                raise SampleError(describe(dataset.source, index_of(key[0]), error)) from error
        finished.append(dataset.finished(image_chw, box, key))
    return torch.stack(finished)


def _decode_all(data: list[torch.Tensor], device: torch.device) -> list[torch.Tensor | None]:
    """uint8 (3, H, W) on the device for each; None for JPEGs when the decoder refused them."""
    images = [None if d.ndim == 1 else d.to(device).permute(2, 0, 1) for d in data]
    jpegs = [i for i, image in enumerate(images) if image is None]
    try:
        decoded = _decode_jpegs([data[i] for i in jpegs], device) if jpegs else []
    except RuntimeError:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # it may still write into memory that is free now
        return images
    for i, image in zip(jpegs, decoded, strict=True):
        images[i] = image
    return images


def _decode_jpegs(jpegs: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """One call for a batch: nvJPEG decodes its images in parallel."""
    # imported here: torchvision 0.29 announces that a later version will have no decoders, and the
    # CPU path shall not end with them
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)
        return decode_jpeg(jpegs, ImageReadMode.RGB, device)
