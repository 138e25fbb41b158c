"""The training data on torchvision v2 and a DataLoader: the control experiment, and the fallback.

Same interface as loader.py and the same order of samples, without FFCV: it reads .beton files and
image folders, runs wherever torch does, and is what the FFCV loader is compared to. Every draw is
keyed by (seed, epoch, sample), so the pixels are the same for any number of workers or ranks, and
after a resume.

    transforms="cpu": workers decode, crop, resize, flip and augment; ready batches go to the device
    transforms="gpu": workers read and draw crops; the device does the rest

Arrays: images_bhwc and rgb_hwc uint8 in 0..255, RGB; image_chw the same as torch sees it;
labels_b int64; samples_b numpy int64, index of each image in the file.
"""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional

from fast_imagenet import processes as fork_server
from fast_imagenet.beton.checksums import class_digest
from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.beton.verify import PageChecks
from fast_imagenet.data.augmentation import CROP_AND_FLIP, Augment
from fast_imagenet.data.sampler import epoch_order, rank_batches
from fast_imagenet.data.torch_augmentation import KeyedTransforms, keyed_generator
from fast_imagenet.processes import SIGNALS, start_resource_tracker
from fast_imagenet.sources import open_source
from fast_imagenet.sources.decode import decode_rgb
from fast_imagenet.terminal import readable

ASPECT_RATIO = (3 / 4, 4 / 3)  # of the random crop, width to height, as in torchvision
PREFETCH = 2  # batches per worker that wait in /dev/shm: 38 MB each at 256 x 224 px
CLOSE_SECONDS = 3  # for workers to end in good order, before they are killed
RESUME = "resume with --training.resume=auto"


class SampleError(ValueError):
    """An image cannot be read or decoded. The message names it in one sentence."""


class WorkerError(RuntimeError):
    """The workers cannot do their work. The message says why and what to change."""


# ------------------------------------------------------------------------------------------------
# Loaders
# ------------------------------------------------------------------------------------------------


class TorchTrainLoader:
    """Randomly changed images; order and draws are set by (seed, epoch, sample) alone.

    Args:
        path: .beton file; or folder train/ of an image folder, or the folder that has train/ in it.
        global_batch: images per optimizer step over all ranks; must divide by `world_size`.
        seed: of order and draws, >= 0.
        rank, world_size: which slice of every global batch this process gets.
        num_workers: processes that prepare batches; 0 = none, this process does it.
        device: where the batches end up.
        augment: crop, flip and what follows them up to the blur; erasing and mixing come after
            normalisation (batch_transforms.py).
        transforms: 'cpu' or 'gpu', where images are decoded, resized and augmented. JPEG decoders
            differ by a few levels between the two, torchvision's augmentations too.
        check_pages: check the checksum of each page of a .beton as a worker first reads it, where
            the file has them: 0.3 ms of processor time a MB, once a worker.

    Attributes:
        num_samples, num_classes: counts.
        classes: class identifiers in the order of the labels; None for a .beton without its JSON.

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
        self._device = torch.device(device)
        check_transforms(transforms, self._device)
        source = open_images(path, "train")
        self.num_samples, self.classes = len(source), source.classes
        self.num_classes, self.class_digest = count_classes(source), digest_classes(source)
        self.note = source.note if isinstance(source, BetonFile) else ""
        self.content = source.content  # of a folder: of its names, labels and file sizes
        self._batch, self._seed = (global_batch, rank, world_size), seed
        if rank_batches(np.arange(self.num_samples), *self._batch).size == 0:
            raise ValueError(
                f"{path} holds {self.num_samples} images, fewer than one batch of {global_batch}; "
                f"lower training.batch_size"
            )
        region = RandomRegion(seed, tuple(augment.crop_area), augment.flip)
        keyed = KeyedTransforms(augment, seed, transforms)
        checks = page_checks(source, check_pages)
        pictures = Pictures(source, region, transforms == "cpu", keyed, checks)
        self._pipeline = _Pipeline(pictures, num_workers, self._device)

    def __len__(self) -> int:
        """Optimizer steps of an epoch; the last, incomplete batch is left out."""
        return self.num_samples // self._batch[0]

    def epoch(self, epoch: int, resolution: int, start_step: int = 0) -> Iterator:
        """Batches of one epoch: (images_bhwc uint8 [b, r, r, 3], labels_b int64 [b], samples_b).

        Args:
            epoch: chooses order and draws together with the seed, >= 0.
            resolution: side r in pixels.
            start_step: steps to leave out at the beginning.

        Workers start as the first batch is asked for. An epoch may be left early; the next one's
        first batch ends it. The wait for a batch has no limit: see watchdog.Watchdog.

        Raises:
            SampleError: an image is damaged.
            WorkerError: a worker died, or /dev/shm is full.
        """
        mine = rank_batches(epoch_order(self.num_samples, self._seed, epoch), *self._batch)
        mine = list(mine[start_step:])
        batches = self._pipeline.run(mine, resolution, epoch)
        return ((*batch, samples_b) for batch, samples_b in zip(batches, mine, strict=True))

    def close(self) -> None:
        """End the workers; a later epoch starts new ones."""
        self._pipeline.close()


class TorchEvalLoader:
    """Centre crops; over all ranks every image comes exactly once.

    Args:
        path: .beton file; or folder val/ of an image folder, or the folder that has val/ in it.
        batch_size: images per batch and rank; the last batch may be smaller.
        rank, world_size, num_workers, device, transforms, check_pages: as TorchTrainLoader.

    Attributes, Raises: as TorchTrainLoader.
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
    ) -> None:
        device = torch.device(device)
        check_transforms(transforms, device)
        source = open_images(path, "val")
        self.num_samples, self.classes = len(source), source.classes
        self.content = source.content
        self.num_classes, self.class_digest = count_classes(source), digest_classes(source)
        self.note = source.note if isinstance(source, BetonFile) else ""
        mine = np.arange(rank, self.num_samples, world_size)
        self._batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        checks = page_checks(source, check_pages)
        pictures = Pictures(source, CentreRegion(), transforms == "cpu", checks=checks)
        self._pipeline = _Pipeline(pictures, num_workers, device)

    def batches(self, resolution: int, crop_ratio: float) -> Iterator:
        """Batches (images_bhwc uint8 [b, r, r, 3], labels_b int64 [b]) in the order of the file.

        Args:
            resolution: side r in pixels.
            crop_ratio: side of the central square as a share of the image's shorter side; 0.875
                is torchvision's Resize(256), CenterCrop(224), up to rounding.
        Raises:
            SampleError, WorkerError: as TorchTrainLoader.epoch.
        """
        return self._pipeline.run(self._batches, resolution, crop_ratio)

    def close(self) -> None:
        """End the workers; a later call of `batches` starts new ones."""
        self._pipeline.close()


def check_transforms(transforms: str, device: torch.device) -> None:
    """Refuse a place for the transforms that is unknown or not there.

    Raises:
        ValueError: the name is none of cpu and gpu, or it is gpu and the device is none.
    """
    if transforms not in ("cpu", "gpu"):
        raise ValueError(f"data.transforms={transforms} is unknown; use cpu or gpu")
    if transforms == "gpu" and device.type == "cpu":
        raise ValueError("data.transforms=gpu needs a GPU, and there is none; use cpu")


def open_images(path: str | Path, split: str):
    """The BetonFile, or the Source of one split of an image folder; both have labels and classes.

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


def page_checks(source, wanted: bool) -> PageChecks | None:
    """What checks the pages of a .beton as they are first read; None where there are no sums."""
    checks = PageChecks(source) if wanted and isinstance(source, BetonFile) else None
    return checks if checks and checks.why_not is None else None


def digest_classes(source) -> str | None:
    """`class_digest` of what `open_images` returns; None where it is unknown."""
    return source.class_digest if isinstance(source, BetonFile) else class_digest(source.classes)


def count_classes(source) -> int:
    """Number of classes of what `open_images` returns."""
    return source.num_classes if isinstance(source, BetonFile) else len(source.classes)


# ------------------------------------------------------------------------------------------------
# What to cut out of an image: draw
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """A part of an image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


@dataclass(frozen=True)
class RandomRegion:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, drawn by key.

    Args:
        seed: of the run.
        crop_area: smallest and largest share of the image.
        flip: probability.
    """

    seed: int
    crop_area: tuple[float, float]
    flip: float

    def __call__(self, height: int, width: int, index: int, epoch: int) -> Region:
        """The region of sample `index` in `epoch`: nothing else changes it."""
        shape = torch.empty((3, height, width), device="meta")
        with keyed_generator([self.seed, epoch, index]):
            crop = RandomResizedCrop.get_params(shape, list(self.crop_area), list(ASPECT_RATIO))
            flip = torch.rand(1).item() < self.flip
        return Region(*crop, flip)


@dataclass(frozen=True)
class CentreRegion:
    """The central square, placed as FFCV's CenterCropRGBImageDecoder does."""

    def __call__(self, height: int, width: int, index: int, crop_ratio: float) -> Region:
        """A square with side crop_ratio * min(height, width), rounded down, 1 px at least."""
        side = max(1, int(crop_ratio * min(height, width)))
        return Region((height - side) // 2, (width - side) // 2, side, side, False)


# ------------------------------------------------------------------------------------------------
# Cut it out: apply
# ------------------------------------------------------------------------------------------------


def crop_and_resize(image_chw: torch.Tensor, region: Region, resolution: int) -> torch.Tensor:
    """The region of an image at another size, antialiased bilinear.

    Args:
        image_chw: uint8 (3, H, W), on any device.
        region: inside the image.
        resolution: side r in pixels.
    Returns:
        uint8 (r, r, 3), contiguous.
    """
    side = [resolution, resolution]
    crop = (region.top, region.left, region.height, region.width)
    out_chw = functional.resized_crop(image_chw, *crop, size=side, antialias=True)
    if region.flip:
        out_chw = functional.horizontal_flip(out_chw)
    return out_chw.permute(1, 2, 0).contiguous()


class Pictures(Dataset):
    """Samples by key (index, resolution, argument of the region).

    Args:
        source: BetonFile or Source.
        region: RandomRegion (argument: epoch) or CentreRegion (argument: crop ratio).
        finish: True: uint8 images (r, r, 3). False: (uint8 JPEG bytes [n] or pixels (H, W, 3),
            region, key).
        change: what happens to an image of the right size, with (epoch, index); None: nothing.
        checks: of the source's pages; None: they are not checked.
    """

    def __init__(
        self,
        source,
        region: RandomRegion | CentreRegion,
        finish: bool,
        change: KeyedTransforms | None = None,
        checks: PageChecks | None = None,
    ) -> None:
        self.source, self.region, self.finish, self.change = source, region, finish, change
        self.checks = checks

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int, int | float]):
        """One sample and its label; whatever goes wrong is reported with the sample's name."""
        index, _, argument = key
        try:
            if self.checks:
                self.checks.check(self.source.offsets[index : index + 1] // self.source.page_size)
            stored, label = read_stored(self.source, index), int(self.source.labels[index])
            if not self.finish:
                return (*self._unfinished(stored, index, argument), key), label
            image_chw = to_chw(stored)
            region = self.region(*image_chw.shape[1:], index, argument)
            return self.finished(image_chw, region, key), label
        except Exception as error:
            raise SampleError(describe(self.source, index, error)) from error

    def finished(self, image_chw: torch.Tensor, region: Region, key: tuple) -> torch.Tensor:
        """A decoded image, on any device, as the network gets it: uint8 (r, r, 3)."""
        index, resolution, argument = key
        image_hwc = crop_and_resize(image_chw, region, resolution)
        return self.change(image_hwc, argument, index) if self.change else image_hwc

    def _unfinished(self, stored: bytes | np.ndarray, index: int, argument: int | float):
        size = plain_jpeg_size(stored)
        if size is None:  # the device decodes JPEG only: the rare rest is decoded here
            rgb_hwc = stored if isinstance(stored, np.ndarray) else decode_rgb(stored)[0]
            region = self.region(*rgb_hwc.shape[:2], index, argument)
            return torch.tensor(rgb_hwc), region
        data = np.frombuffer(stored, np.uint8)
        return torch.tensor(data), self.region(*size, index, argument)


def read_stored(source, index: int) -> bytes | np.ndarray:
    """Encoded bytes of an image, or uint8 (H, W, 3) where the file holds raw pixels."""
    return source.read(index)[0] if isinstance(source, BetonFile) else source.read(index)


def describe(source, index: int, error: Exception) -> str:
    """A sentence that names the sample of an error."""
    where = f"of {source.path}" if isinstance(source, BetonFile) else f"({source.name(index)})"
    reason = " ".join(str(error).split())  # one line
    return readable(f"sample {index} {where} cannot be used: {type(error).__name__}: {reason}")


def to_chw(stored: bytes | np.ndarray) -> torch.Tensor:
    """uint8 (3, H, W), channels last in memory: torch resizes these fastest on a CPU."""
    rgb_hwc = stored if isinstance(stored, np.ndarray) else decode_rgb(stored)[0]
    with warnings.catch_warnings():
        # an image of the decoder may be read-only; it is only read here
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(rgb_hwc).permute(2, 0, 1)


def plain_jpeg_size(stored: bytes | np.ndarray) -> tuple[int, int] | None:
    """(height, width) of a gray or color JPEG from its header; None for everything else."""
    if isinstance(stored, np.ndarray) or stored[:2] != b"\xff\xd8":
        return None
    with Image.open(io.BytesIO(stored), formats=["JPEG"]) as image:
        return (image.height, image.width) if image.mode in ("RGB", "L") else None


def finish_on_device(samples: list[tuple], device: torch.device, pictures) -> torch.Tensor:
    """Decode, cut out, resize and augment a batch where the network is.

    Args:
        samples: (JPEG bytes or pixels, region, key), from Images(finish=False).
        device: GPU, or CPU in tests.
        images: the Images.
    Returns:
        images_bhwc on `device`.
    Raises:
        SampleError: a JPEG is damaged.
    """
    images_chw = _decode_all([sample[0] for sample in samples], device)
    finished = []
    for image_chw, (data, region, key) in zip(images_chw, samples, strict=True):
        if image_chw is None:  # the fast decoder refused the batch: this one may not be to blame
            try:
                image_chw = to_chw(decode_rgb(data.numpy().tobytes())[0]).to(device)
            except Exception as error:
                raise SampleError(describe(pictures.source, key[0], error)) from error
        finished.append(pictures.finished(image_chw, region, key))
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


# ------------------------------------------------------------------------------------------------
# Worker processes
# ------------------------------------------------------------------------------------------------


class _Batches(Sampler):
    """The keys of the coming batches; set before each pass, so that workers outlive an epoch."""

    def __init__(self) -> None:
        self.keys: list[list[tuple]] = []

    def __iter__(self) -> Iterator[list[tuple]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Pipeline:
    """One DataLoader whose workers stay, fed with the keys of one pass after the other."""

    def __init__(self, pictures: Pictures, num_workers: int, device) -> None:
        self._pictures, self._device = pictures, device
        self._finish = pictures.finish
        self._batches = _Batches()
        on_gpu = device.type == "cuda" and not self._finish
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        workers = {}
        if num_workers:
            workers = {
                "multiprocessing_context": _start_method(),
                "persistent_workers": True,  # a new process imports torch: seconds, every epoch
                "prefetch_factor": PREFETCH,
                "worker_init_fn": _end_with_the_run,
            }
        self._loader = DataLoader(
            pictures,
            batch_sampler=self._batches,
            num_workers=num_workers,
            collate_fn=_stack if self._finish else _list,
            pin_memory=device.type == "cuda" and self._finish,
            # of its own: else every pass would take a number from the run's generator
            generator=torch.Generator(),
            **workers,
        )

    def run(self, batches: list[np.ndarray], resolution: int, argument: int | float) -> Iterator:
        """A pass over batches of sample numbers; it begins as its first batch is asked for."""
        keys = [[(int(i), resolution, argument) for i in b] for b in batches]
        try:
            yield from self._deliver(keys)
        except SampleError as error:
            # a worker's error arrives as the text of its traceback, which ends with the sentence
            raise SampleError(str(error).split("SampleError: ")[-1].strip()) from error
        except (RuntimeError, OSError, EOFError) as error:
            # OSError, EOFError: the other end of a pipe is gone
            if said := self._what_failed(error, max(map(len, keys), default=0) * resolution**2 * 3):
                raise WorkerError(said) from error
            raise

    def _deliver(self, keys: list[list[tuple]]) -> Iterator:
        self._batches.keys = keys
        prepared = iter(self._loader)
        for worker in getattr(prepared, "_workers", ()):
            # deaf to SIGTERM on purpose, which torch and multiprocessing send at the end
            worker._popen.terminate = worker._popen.kill
        for images, labels_b in prepared:
            if not self._finish:
                images = self._finish_batch(images)
            yield (
                images.to(self._device, non_blocking=True),
                labels_b.to(self._device, non_blocking=True),
            )

    def _what_failed(self, error: Exception, batch_bytes: int) -> str | None:
        """A sentence on an error of the workers, not of a sample; None: it is another one."""
        workers, gone = self._loader.num_workers, not isinstance(error, RuntimeError)
        if not workers:
            return None
        ends = _abnormal_ends(self._loader._iterator, wait=1 if gone else 0)
        full = gone and getattr(error, "errno", 0) == errno.ENOSPC  # of a lock
        full = full or re.search(r"/torch_.*No space left", str(error))  # of a batch
        if full or -signal.SIGBUS in ends:
            return f"{_full((PREFETCH * workers + 1) * batch_bytes)}; {RESUME}"
        if ends:
            how = signal.Signals(-ends[0]).name if ends[0] < 0 else f"exit status {ends[0]}"
            return (
                f"a data worker ended with {how}: if memory was too small, lower "
                f"data.num_workers; {RESUME}"
            )
        return f"a data worker is gone ({str(error) or 'no answer'}); {RESUME}" if gone else None

    def _finish_batch(self, samples: list[tuple]) -> torch.Tensor:
        """`finish_on_device`, on a GPU on a stream of its own.

        torchvision's decoder waits for no work before it writes into memory that is free as torch
        sees it: freed on the stream of the training step, it may still be read by a step to come.
        """
        if self._stream is None:
            return finish_on_device(samples, self._device, self._pictures)
        with torch.cuda.stream(self._stream):
            self._stream.synchronize()  # the batch before, not the training step
            images = finish_on_device(samples, self._device, self._pictures)
        step = torch.cuda.current_stream(self._device)
        step.wait_stream(self._stream)
        images.record_stream(step)  # not free before the step has used it
        return images

    def close(self) -> None:
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            _end_workers(iterator)


def _full(need: int) -> str:
    from fast_imagenet.beton.disk_space import (  # the workers need no cv2
        SHM,
        free_bytes,
        shm_sentence,
    )

    free = free_bytes(SHM) if SHM.is_dir() else 0
    return f"{shm_sentence(need, free)}, or lower data.num_workers"


def _abnormal_ends(iterator, wait: float) -> list[int]:
    """Exit codes of workers that ended by themselves; negative: the number of a signal.

    Args:
        wait: seconds that the news of an end may take.
    """
    workers = getattr(iterator, "_workers", ())
    connection.wait([worker.sentinel for worker in workers], wait)
    return [worker.exitcode for worker in workers if not worker.is_alive() and worker.exitcode]


def _end_workers(iterator) -> None:
    """End the workers of a DataLoader's iterator within seconds, whatever state they are in.

    In good order where that works. A worker may hang or be stopped, and one that was killed may
    have left a lock taken or half a batch in a pipe, for which torch would wait without a limit.
    """
    for queue in (*iterator._index_queues, iterator._worker_result_queue):
        queue.cancel_join_thread()
    in_order = threading.Thread(target=iterator._shutdown_workers, daemon=True)
    in_order.start()
    in_order.join(CLOSE_SECONDS)
    left = [worker for worker in iterator._workers if worker.is_alive()]
    for worker in left:
        worker.kill()
    for worker in left:
        worker.join(CLOSE_SECONDS)


def _start_method():
    """Workers fork from a server that has imported torch and nothing has run in.

    fork would copy this process with its OpenMP threads (numba's and torch's libgomp abort or hang
    in such a child), its CUDA context and its logging threads; spawn imports torch once a worker.

    The server and all workers inherit a mask of the signals that stop a run: sent to the whole
    process group, they are the training process's to answer, which still needs its workers.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([fork_server.__name__, __name__])
    # started by the server otherwise, and then it takes SIGINT and SIGTERM out of the mask first
    start_resource_tracker()
    fork_server.start_server(SIGNALS)
    return context


def _end_with_the_run(worker: int) -> None:
    """In a worker: let it end with the training process, however that one ends.

    The server ends as soon as nobody holds the other end of its pipe, so this worker must not: then
    that is the training process's end alone. The system kills this worker as the server ends, even
    where it hangs or is stopped.
    """
    fork_server.end_with_parent()
    if os.getppid() == 1:  # the server ended before the system was asked: nobody would end this one
        os._exit(1)
    server = forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None


def _stack(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.utils.data.default_collate(list(images)), _shared(torch.tensor(labels))


def _list(samples: list[tuple[tuple, int]]) -> tuple[list[tuple], torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return [(_shared(data), *rest) for data, *rest in images], _shared(torch.tensor(labels))


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """In a worker, the tensor in /dev/shm already: its queue would drop what does not fit there."""
    return tensor.share_memory_() if torch.utils.data.get_worker_info() else tensor
