"""The only file that runs FFCV's loader: seeded order, ranks, resolutions, errors surfaced.

Images are read and changed by the operations of fast_imagenet.ops alone: what a training image
becomes is a function of (seed, epoch, its index in the file).

What FFCV 1.0.2 does otherwise, and what is done about it here:

- an exception in its loader thread blocks the training loop for ever: `_Epoch` hands it over;
- leaving an epoch early leaks its thread: `_Epoch.close` ends and joins it;
- it decodes into host memory whose copy to the GPU may still be waiting, several steps later, and
  copies into device memory that an earlier step may still read: `_Epoch` waits for both;
- its distributed order repeats samples and depends on the number of ranks: sampler.py decides;
- importing it leaves torch one thread, and every Loader sets torch's threads for the whole process:
  torch's number is put back, and `_set_numba_threads` leaves it alone;
- its Loader takes 3 us and 550 bytes of memory for every sample: `Loader` and pages.py take none;
- numba's `workqueue` threads abort when two loaders run side by side: the layer is set to OpenMP.

Arrays: images_bhwc uint8 in 0..255, RGB; labels_b int64; samples_b int64 numpy, the keys of the
samples (rng.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from queue import Empty, Full
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import torch

if "NUMBA_THREADING_LAYER" not in os.environ:
    numba.config.THREADING_LAYER = "omp"
_TORCH_THREADS = torch.get_num_threads()

from ffcv.fields.basics import IntDecoder, IntField  # noqa: E402  (numba's threads are chosen first)
from ffcv.fields.rgb_image import RGBImageField  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline import Compiler, PipelineSpec  # noqa: E402
from ffcv.pipeline.graph import Graph  # noqa: E402
from ffcv.transforms import ToDevice, ToTensor  # noqa: E402

from fast_imagenet import ops  # noqa: E402
from fast_imagenet.beton.reader import BetonError, BetonFile  # noqa: E402
from fast_imagenet.data.augmentation import CROP_AND_FLIP, Augment, stages_of  # noqa: E402
from fast_imagenet.data.base import BaseTrainLoader, DatasetLoader, page_checks  # noqa: E402
from fast_imagenet.data.pages import PagesAhead, WholeFile  # noqa: E402
from fast_imagenet.data.sampler import paged_epoch_order  # noqa: E402
from fast_imagenet.machine import worker_count  # noqa: E402
from fast_imagenet.ops.crop_decode import draw_random_crops  # noqa: E402
from fast_imagenet.ops.kernel import is_compiled  # noqa: E402
from fast_imagenet.rng import index_of  # noqa: E402
from fast_imagenet.terminal import announce  # noqa: E402

CLOSE_SECONDS = 60  # for a batch under way to end; a thread that hangs is left behind
OWN_RESIZE = "area"  # FFCV's, which its recipe's numbers were reached with
PAGES_IN_MEMORY = 128  # with 8 MiB pages: 1 GiB of the file is shuffled at a time


def thread_count(asked: int) -> int:
    """Loader threads: `asked`, or with 0 all usable cores (machine.py); numba refuses more.

    Raises:
        ValueError: `asked` is more than the usable cores.
    """
    usable = min(worker_count(0), numba.config.NUMBA_NUM_THREADS)
    if asked > usable:
        raise ValueError(
            f"data.num_workers={asked} but this process may use {usable} cores; "
            f"lower it, or use 0 for an equal part of them"
        )
    return asked or usable


def resize_method(resize: str) -> str:
    """One of RESIZES as the decoders take it."""
    return OWN_RESIZE if resize == "auto" else resize


def image_operations(augment: Augment, resolution: int, seed: int) -> list:
    """What happens to a training image between the file and its uint8 batch, in this order.

    The list itself is STAGES in data/augmentation.py; erasing and mixing come after normalization,
    on the device: data/device_transforms.py.
    """
    method = resize_method(augment.resize)
    flip: dict[str, Any] = dict(flip=augment.flip, flip_mode=augment.flip_mode)
    crop = ops.CropDecode(resolution, augment.crop_area, **flip, seed=seed, method=method)
    changes = [stage.operation(ops, augment, seed) for stage in stages_of(augment)]
    if not all(map(is_compiled, [draw_random_crops, *(one.apply for one in changes)])):
        announce("compiling the operations, once on this machine: up to a minute")
    return [crop, *changes]


class TrainLoader(BaseTrainLoader):
    """Augmented batches of a .beton file; order and draws are set by (seed, epoch, sample) alone.

    Args:
        path: .beton file; beton/fields.py says which of its fields are read.
        global_batch, seed, rank, world_size: as BaseTrainLoader.
        num_workers: FFCV threads, 0 = the usable cores.
        device: where the batches end up.
        in_memory: True: uniformly random order, the file stays in the page cache. False: random
            within windows of PAGES_IN_MEMORY pages, for files larger than memory.
        check_pages: check the checksum of each page of the file as it is first read, where the file
            has them: 0.3 ms of processor time per MB, once.
        augment: the random changes; those of the batch (erasing, mixup, cutmix) are not done here.

    Raises:
        BetonError: the file is missing, damaged or unfinished.
        ValueError: fewer images than one batch, the batch does not divide, a setting of `augment`
            out of range.
    """

    def __init__(
        self,
        path: str,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        in_memory: bool = True,
        check_pages: bool = True,
        augment: Augment = CROP_AND_FLIP,
    ) -> None:
        file = BetonFile(path)
        super().__init__(file, path, global_batch, seed, rank, world_size, augment.repeats)
        self._pages = None
        if not in_memory:
            self._pages = (file.offsets // file.page_size).astype(np.int32)
        self._operations = image_operations(augment, 224, seed)
        decoder = self._operations[0]
        decoder.then = self._operations[1:]  # so that threads wait for each other once a batch
        decoder.before_batch = page_checks(file, check_pages)
        self._loader = Loader(
            file,
            decoder,
            batch_size=global_batch // world_size,
            num_workers=num_workers,
            device=device,
            in_memory=in_memory,
        )

    def order(self, epoch: int) -> np.ndarray:
        if self._pages is None:
            return super().order(epoch)
        return paged_epoch_order(self._pages, PAGES_IN_MEMORY, self._seed, epoch)

    def epoch(self, epoch: int, resolution: int, start_step: int = 0) -> Iterator:
        """A batch is valid until the next one is asked for: its memory is used again."""
        mine = self.step_samples(epoch, start_step)
        self._operations[0].output_size = resolution
        self._operations[0].set_epoch(epoch)
        return _train_batches(self._loader, mine)


class EvalLoader(DatasetLoader):
    """Center crops of a .beton file; over all ranks every image comes exactly once.

    Args:
        path: .beton file; beton/fields.py says which of its fields are read.
        batch_size: images per batch and rank; the last batch may be smaller.
        resize: one of RESIZES in augmentation.py.
        rank, world_size, num_workers, device, in_memory, check_pages: as TrainLoader.
    """

    def __init__(
        self,
        path: str,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        in_memory: bool = True,
        check_pages: bool = True,
        resize: str = "auto",
    ) -> None:
        file = BetonFile(path)
        super().__init__(file)
        self._decoder = ops.CenterCropDecode(224, 1.0, method=resize_method(resize))
        self._decoder.before_batch = page_checks(file, check_pages)
        self._mine = np.arange(rank, self.num_samples, world_size)
        self._loader = Loader(
            file,
            self._decoder,
            batch_size=min(batch_size, max(1, len(self._mine))),  # memory is taken for all of it
            num_workers=num_workers,
            device=device,
            in_memory=in_memory,
        )

    def batches(self, resolution: int, crop_ratio: float) -> Iterator:
        """Batches (images_bhwc uint8, labels_b int64) in file order.

        Args:
            resolution: side in pixels.
            crop_ratio: side of the central square as a fraction of the image's shorter side;
                0.875 is torchvision's Resize(256), CenterCrop(224).
        """
        self._decoder.ratio, self._decoder.output_size = crop_ratio, resolution
        return _batches(self._loader, self._mine)


class _LabelDecoder(IntDecoder):
    """FFCV's, without the second that compiling it takes at every start."""

    def generate_code(self) -> Callable:
        def decode(samples: np.ndarray, labels_b1: np.ndarray, labels: np.ndarray, _: Any) -> Any:
            labels_b1 = labels_b1[: len(samples)]
            labels_b1[:, 0] = labels[index_of(samples)]
            return labels_b1

        decode.precompiled = True  # type: ignore[attr-defined]
        return decode


class Loader:
    """What FFCV's EpochIterator asks of an ffcv.Loader: batches are (images_bhwc, labels_b1)."""

    batches_ahead = 3  # decoded while a batch is in use: FFCV's number

    def __init__(
        self,
        file: BetonFile,
        decoder: ops.CropDecode | ops.CenterCropDecode,
        *,
        batch_size: int,
        num_workers: int,
        device: torch.device | str,
        in_memory: bool,
    ) -> None:
        self.batch_size, self.num_workers = batch_size, thread_count(num_workers)
        Compiler.set_num_threads(self.num_workers)
        self.memory_manager = WholeFile(file) if in_memory else PagesAhead(file)
        metadata = {"f0": file.images, "f1": file.labels}  # FFCV's names of the fields
        self.reader = SimpleNamespace(metadata=metadata)
        place = torch.device(device)

        def to_device() -> list:  # an FFCV operation belongs to one pipeline: each gets its own
            return [ToTensor(), *[ToDevice(place, non_blocking=True)] * (place.type != "cpu")]

        pipelines = {
            "image": PipelineSpec("image", transforms=[decoder, *to_device()]),
            "label": PipelineSpec("label", transforms=[_LabelDecoder(), *to_device()]),
        }
        handlers = {"image": RGBImageField(), "label": IntField()}
        self.graph = Graph(pipelines, handlers, {"image": 0, "label": 1}, metadata, None)
        self.code = self.graph.codegen_all(self.graph.collect_requirements()[1])


def _batches(loader: Loader, order: np.ndarray) -> Generator:
    epoch = _Epoch(loader, order)
    try:
        for images_bhwc, labels_b1 in epoch:
            yield images_bhwc, labels_b1.reshape(-1)
    finally:
        epoch.close()


def _train_batches(loader: Loader, samples_nb: np.ndarray) -> Iterator:
    with closing(_batches(loader, samples_nb.reshape(-1))) as batches:
        for samples_b, (images_bhwc, labels_b) in zip(samples_nb, batches, strict=True):
            yield images_bhwc, labels_b, samples_b


class _ClosedError(Exception):
    """Ends the loader thread of an epoch that nobody wants any more."""


class _Epoch(EpochIterator):
    """FFCV's loader thread, whose error reaches the caller and which ends when it is closed."""

    # class attributes: the thread starts inside __init__, which may fail before it has made streams
    error: BaseException | None = None
    cuda_streams: Sequence[Any] = ()
    closed: bool

    def run(self) -> None:
        try:
            super().run()
        except _ClosedError:
            return
        except BaseException as error:  # whatever it is, the caller must not wait for ever
            self.error = error
            self._offer_end()

    def run_pipeline(self, number: int, samples: np.ndarray, slot: int, event: Any) -> Any:
        # FFCV looks only while the queue is full: it would decode the rest of the epoch
        if self.terminate_event.is_set():
            raise _ClosedError
        if (stream := self.cuda_streams[slot]) is not None:
            stream.synchronize()  # the copy of what the slot's host memory held before
            if event is None:  # first use: a step of before may still read the device memory
                stream.wait_stream(self.current_stream)
        return super().run_pipeline(number, samples, slot, event)

    def _offer_end(self) -> None:
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(None, timeout=0.5)
                return
            except Full:  # the caller has not fetched a batch yet
                continue

    def __next__(self) -> tuple:
        try:
            return super().__next__()
        except StopIteration:
            if isinstance(self.error, BetonError):
                raise self.error from None
            if isinstance(self.error, ops.DecodeError):  # a sentence, not a defect of the program
                raise BetonError(str(self.error)) from self.error
            if self.error is not None:
                raise RuntimeError(f"the data loader failed: {self.error}") from self.error
            raise

    def close(self) -> None:
        """End the thread and free its buffers, wherever the epoch stands."""
        if self.closed:
            return
        self.terminate_event.set()
        limit = time.monotonic() + CLOSE_SECONDS
        while self.is_alive() and time.monotonic() < limit:
            with suppress(Empty):  # it may wait for a place in the queue
                self.output_queue.get(timeout=0.1)
            self.join(timeout=0.1)
        for stream in filter(None, self.cuda_streams):
            stream.synchronize()  # copies under way still read and write the buffers
        super().close()  # gives up the file's memory: not before the thread has left it
        self.closed = True
        self.memory_allocations = None


def _set_numba_threads(cls: Any, count: int) -> None:
    cls.num_threads = count
    numba.set_num_threads(count)


Compiler.set_num_threads = classmethod(_set_numba_threads)
torch.set_num_threads(_TORCH_THREADS)
