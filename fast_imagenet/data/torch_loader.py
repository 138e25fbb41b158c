"""The training data on torchvision v2 and a DataLoader: the control experiment, and the fallback.

Same interface as ffcv_loader.py and the same order of samples, without FFCV: it reads .beton files
and image folders, runs wherever torch does, and is what the FFCV loader is compared to. Every draw
is keyed by (seed, epoch, sample), so the pixels are the same for any number of workers or ranks,
and after a resume.

    transforms="cpu": workers decode, crop, resize, flip and augment; ready batches go to the device
    transforms="gpu": workers read and draw crops; the device does the rest

What happens to one sample is samples.py, to the workers workers.py.

Arrays: images_bhwc uint8 in 0..255, RGB; labels_b int64; samples_b numpy int64, the keys of the
samples (rng.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fast_imagenet.data.augmentation import CROP_AND_FLIP, Augment
from fast_imagenet.data.base import BaseTrainLoader, DatasetLoader, page_checks
from fast_imagenet.data.samples import RandomCrop, SampleDataset, center_crop, open_dataset
from fast_imagenet.data.torch_augmentation import KeyedTransforms
from fast_imagenet.data.workers import PersistentLoader


class TorchTrainLoader(BaseTrainLoader):
    """Randomly changed images; order and draws are set by (seed, epoch, sample) alone.

    Args:
        path: .beton file; or folder train/ of an image folder, or the folder that has train/ in it.
        global_batch, seed, rank, world_size: as BaseTrainLoader.
        num_workers: processes that prepare batches; 0 = none, this process does it.
        device: where the batches end up.
        augment: crop, flip and what follows them up to the blur; erasing and mixing come after
            normalization (device_transforms.py).
        transforms: 'cpu' or 'gpu', where images are decoded, resized and augmented. JPEG decoders
            differ by a few levels between the two, torchvision's augmentations too.
        check_pages: check the checksum of each page of a .beton as a worker first reads it, where
            the file has them: 0.3 ms of processor time per MB, once per worker.

    Raises:
        BetonError, SourceError: the data is missing or damaged.
        ValueError: fewer images than one batch, a batch that does not divide, 'gpu' without one or
            with a policy that cannot run there, a setting of `augment` out of range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        augment: Augment = CROP_AND_FLIP,
        transforms: str = "cpu",
        check_pages: bool = True,
    ) -> None:
        device = torch.device(device)
        check_transforms(transforms, device)
        source = open_dataset(path, "train")
        super().__init__(source, path, global_batch, seed, rank, world_size, augment.repeats)
        dataset = SampleDataset(
            source,
            RandomCrop(seed, augment.crop_area, augment.flip, augment.flip_mode),
            finish=transforms == "cpu",
            augment=KeyedTransforms(augment, seed, transforms),
            check_pages=page_checks(source, check_pages),
            resize=augment.resize,
        )
        self._loader = PersistentLoader(dataset, num_workers, device)

    def epoch(self, epoch: int, resolution: int, start_step: int = 0) -> Iterator:
        """Workers start as the first batch is asked for. An epoch may be left early; the next one's
        first batch ends it. The wait for a batch has no limit: engine/watchdog.py has one.

        Raises:
            SampleError: an image is damaged.
            WorkerError: a worker died, or /dev/shm is full.
        """
        mine = list(self.step_samples(epoch, start_step))
        batches = self._loader.run(mine, resolution, epoch)
        return ((*batch, samples_b) for batch, samples_b in zip(batches, mine, strict=True))

    def close(self) -> None:
        self._loader.close()


class TorchEvalLoader(DatasetLoader):
    """Center crops; over all ranks every image comes exactly once.

    Args:
        path: .beton file; or folder val/ of an image folder, or the folder that has val/ in it.
        batch_size: images per batch and rank; the last batch may be smaller.
        rank, world_size, num_workers, device, transforms, check_pages: as TorchTrainLoader.
        resize: as SampleDataset.

    Raises: as TorchTrainLoader.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        transforms: str = "cpu",
        check_pages: bool = True,
        resize: str = "auto",
    ) -> None:
        device = torch.device(device)
        check_transforms(transforms, device)
        source = open_dataset(path, "val")
        super().__init__(source)
        mine = np.arange(rank, self.num_samples, world_size)
        self._batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        options: dict = dict(check_pages=page_checks(source, check_pages), resize=resize)
        dataset = SampleDataset(source, center_crop, transforms == "cpu", **options)
        self._loader = PersistentLoader(dataset, num_workers, device)

    def batches(self, resolution: int, crop_ratio: float) -> Iterator:
        """Batches (images_bhwc uint8 [b, r, r, 3], labels_b int64 [b]) in the order of the file.

        Args:
            resolution: side r in pixels.
            crop_ratio: side of the central square as a fraction of the image's shorter side; 0.875
                is torchvision's Resize(256), CenterCrop(224), up to rounding.
        Raises:
            SampleError, WorkerError: as TorchTrainLoader.epoch.
        """
        return self._loader.run(self._batches, resolution, crop_ratio)

    def close(self) -> None:
        self._loader.close()


def check_transforms(transforms: str, device: torch.device) -> None:
    """Refuse a place for the transforms that is unknown or not there.

    Raises:
        ValueError: the name is neither cpu nor gpu, or it is gpu and the device is not one.
    """
    if transforms not in ("cpu", "gpu"):
        raise ValueError(f"data.transforms={transforms} is unknown; use cpu or gpu")
    if transforms == "gpu" and device.type == "cpu":
        raise ValueError("data.transforms=gpu needs a GPU, and there is none; use cpu")


TrainLoader, EvalLoader = TorchTrainLoader, TorchEvalLoader  # under ffcv_loader's names
