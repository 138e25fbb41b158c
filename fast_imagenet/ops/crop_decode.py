"""CropDecode and CenterCropDecode: read, crop, flip and resize images in one pass.

First operations for the pipeline of an FFCV RGBImageField, in place of
RandomResizedCropRGBImageDecoder + RandomHorizontalFlip and CenterCropRGBImageDecoder. They read
any RGBImageField file: JPEG with restart markers (only the tiles under the crop are decoded), JPEG
without (down to the crop's last row), raw pixels. Crop and flip are a function of (seed, epoch,
sample index).

    loader = Loader(..., pipelines={'image': [CropDecode((160, 160), seed=1), ToTensor(), ...]})

Axes: b batch, h height, w width, c channel (RGB). Memory: one or two decoded crops per thread,
where stock FFCV keeps an image per sample of every batch under way.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.state import State

from .. import rng
from ..native.decoder import METHODS, REASONS, Decoder, batch_places
from .kernel import kernel
from .operation import EpochCounter, KeyedOperation, check_probability, whole_seed
from .precompiled import enable_precompiled, run_threads, thread_count

Size = int | tuple[int, int]  # (height, width), or one number for both
CROP_TRIES = 10
MAX_OUTPUT = 16_384  # pixels a side: an image of 0.8 GB


class DecodeError(RuntimeError):
    """A sample of the data file cannot be decoded. The message names file, sample and reason."""


@kernel
def draw_random_crop(seed, epoch, sample, height, width, scale, ratio):
    """One box of torchvision's RandomResizedCrop, from keyed numbers.

    Args: scale: (low, high) fraction of the area. ratio: (low, high) width / height, drawn
        uniformly in its logarithm. Integers and floats; sides >= 1.
    Returns: (top, left, height, width), int64, inside the image.
    Source: torchvision RandomResizedCrop.get_params (10 tries, then the largest central box).
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for trial in range(CROP_TRIES):
        u0 = rng.uniform(seed, epoch, sample, rng.STREAM_CROP, 4 * trial)
        u1 = rng.uniform(seed, epoch, sample, rng.STREAM_CROP, 4 * trial + 1)
        area = height * width * (scale[0] + u0 * (scale[1] - scale[0]))
        aspect = math.exp(log_low + u1 * (log_high - log_low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            key = (seed, epoch, sample, rng.STREAM_CROP)
            top = rng.integer(0, height - h + 1, *key, 4 * trial + 2)
            left = rng.integer(0, width - w + 1, *key, 4 * trial + 3)
            return top, left, h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


@kernel
def draw_random_crops(seed, epoch, samples, heights, widths, scale, ratio, flip):
    """Box and flip of every sample: int64 [b, 5], columns top, left, height, width, flipped.

    Args: samples, heights, widths: int64 [b]. flip: probability of a mirror image, 0 to 1.
    """
    crops = np.empty((len(samples), 5), np.int64)
    for b in range(len(samples)):
        top, left, height, width = draw_random_crop(
            seed, epoch, samples[b], heights[b], widths[b], scale, ratio
        )
        crops[b, 0], crops[b, 1], crops[b, 2], crops[b, 3] = top, left, height, width
        crops[b, 4] = rng.uniform(seed, epoch, samples[b], rng.STREAM_FLIP, 0) < flip
    return crops


def center_crops(
    heights: np.ndarray, widths: np.ndarray, size: tuple[int, int], ratio: float
) -> np.ndarray:
    """The central box of every sample: int64 [b, 5] as `draw_random_crops`, never flipped.

    The box has the shape of `size` (height, width) and `ratio` times the largest possible sides,
    rounded down: FFCV's CenterCropRGBImageDecoder where the output is square.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    limit = np.minimum(heights * size[1], widths * size[0])
    h = np.maximum(1, (ratio * (limit / size[1])).astype(np.int64))
    w = np.maximum(1, (ratio * (limit / size[0])).astype(np.int64))
    top, left = (heights - h) // 2, (widths - w) // 2
    return np.stack([top, left, h, w, np.zeros_like(h)], axis=1)


def locate_samples(
    batch_indices: np.ndarray, metadata: np.ndarray, storage_state: tuple
) -> np.ndarray:
    """Where the samples of a batch lie in memory: int64 [b, 5] as `Decoder.decode` takes them.

    Args: batch_indices: int [b]. metadata: FFCV's table of an RGBImageField. storage_state: of
        either FFCV memory manager, (memory, pointers, sizes[, page_to_slot]); with None for
        pointers, sizes are by sample.
    """
    memory, pointers, sizes = storage_state[:3]
    table = metadata[batch_indices]
    offset = table["data_ptr"]
    if pointers is None:
        size = sizes[batch_indices].astype(np.uint64)
    else:
        entry = np.minimum(np.searchsorted(pointers, offset), len(pointers) - 1)
        size = np.where(pointers[entry] == offset, sizes[entry], 0)
    if len(storage_state) == 3:
        place, limit = offset, np.uint64(memory.size)
    else:
        page_size = np.uint64(memory.shape[1])
        page, place = offset // page_size, offset % page_size
        slot = storage_state[3][np.minimum(page, np.uint64(len(storage_state[3]) - 1))]
        limit = page_size
    inside = (size > 0) & (place <= limit) & (size <= limit - np.minimum(place, limit))
    if len(storage_state) == 4:
        place = place + slot.astype(np.uint64) * page_size
    address = np.where(inside, np.uint64(memory.ctypes.data) + place, np.uint64(0))
    columns = [address, size, table["mode"], table["height"], table["width"]]
    return np.stack([column.astype(np.int64) for column in columns], axis=1)


class _CropOperation(EpochCounter, SimpleRGBImageDecoder):
    """What the two decoders share: buffers, threads, errors. Subclasses draw the boxes.

    The base class is what FFCV takes for a decoder at the head of an image pipeline; nothing else
    of it is used.
    """

    def __init__(
        self,
        output_size: Size,
        method: str,
        reduced_decode: bool,
        on_error: str,
        then: Sequence[KeyedOperation],
    ) -> None:
        super().__init__()
        enable_precompiled()
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; give one of {', '.join(METHODS)}")
        if on_error not in ("raise", "count"):
            raise ValueError(f"on_error is {on_error!r}; give 'raise' or 'count'")
        self.output_size = output_size
        self._lock = threading.Lock()
        self.method, self.reduced_decode, self.on_error = method, reduced_decode, on_error
        self._own_decoder = True  # tests compare the two
        self.then = list(then)
        # called with the indices of a batch before it is read
        self.before_batch: Callable[[np.ndarray], Any] | None = None
        self.error_count = 0
        self.errors: list[tuple[int, str]] = []
        self._decoders: list[Decoder] = []

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the images; a new value holds from the next epoch on."""
        return self._output_size

    @output_size.setter
    def output_size(self, size: Size) -> None:
        sides = (size, size) if isinstance(size, int | np.integer) else size
        whole = isinstance(sides, tuple | list) and all(
            isinstance(side, int | np.integer) and 1 <= side <= MAX_OUTPUT for side in sides
        )
        if not whole or len(sides) != 2:
            raise ValueError(
                f"output_size is {size!r}; give a height and a width, whole numbers from 1 to "
                f"{MAX_OUTPUT}, or one for both"
            )
        self._output_size = (int(sides[0]), int(sides[1]))

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for operation in self.then:
            operation.set_epoch(epoch)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        self.count_epoch()
        shape, pixel_type = (*self.output_size, 3), np.dtype("<u1")
        state = dataclasses.replace(previous_state, jit_mode=True, shape=shape, dtype=pixel_type)
        for operation in self.then:
            if not isinstance(operation, KeyedOperation):
                name = type(operation).__name__
                raise ValueError(f"then takes KeyedOperations; put {name} behind the decoder")
            operation.declare_state_and_memory(state)
        return state, AllocationQuery(shape, pixel_type)

    def generate_code(self) -> Callable:
        def decode(batch_indices, images_bhwc, metadata, storage_state):
            keys = np.asarray(batch_indices, np.int64)
            indices = rng.index_of(keys)
            if self.before_batch is not None:
                self.before_batch(indices)
            samples = locate_samples(indices, metadata, storage_state)
            images_bhwc = images_bhwc[: len(keys)]
            crops = self.draw(keys, samples[:, 3], samples[:, 4], images_bhwc.shape[1:3])
            changes = [operation.prepare(images_bhwc, keys) for operation in self.then]
            status = self.apply(samples, crops, images_bhwc, changes)
            if status.any():
                self._report(indices, status, storage_state[0])
            return images_bhwc

        decode.precompiled = True  # type: ignore[attr-defined]
        return decode

    def draw(
        self, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: tuple[int, int]
    ) -> np.ndarray:
        """The boxes of a batch, int64 [b, 5]: top, left, height, width, flipped."""
        raise NotImplementedError

    def apply(
        self,
        samples: np.ndarray,
        crops: np.ndarray,
        images_bhwc: np.ndarray,
        changes: Sequence[Callable[[int, int], None]] = (),
    ) -> np.ndarray:
        """Fill uint8 images_bhwc [b, h, w, 3] (contiguous). Returns int64 [b], one status each.

        changes: functions of (first, end), called in this order for images just decoded.
        """
        if (
            images_bhwc.dtype != np.uint8
            or images_bhwc.ndim != 4
            or images_bhwc.shape[::3] != (len(samples), 3)
            or not (images_bhwc.flags.c_contiguous and images_bhwc.flags.writeable)
            or not np.shape(samples) == np.shape(crops) == (len(samples), 5)
        ):
            shapes = (*map(np.shape, (samples, crops)), images_bhwc.shape, images_bhwc.dtype)
            raise ValueError(
                f"given {shapes}; give [b, 5], [b, 5], uint8 [b, h, w, 3] in one piece"
            )
        samples, crops = (np.ascontiguousarray(rows, np.int64) for rows in (samples, crops))
        status = np.zeros(len(samples), np.int64)
        batch = batch_places(
            *(samples, crops, images_bhwc, status),
            method=self.method,
            reduced=self.reduced_decode,
            own=self._own_decoder,
        )

        def work(thread, first, end):
            decoders[thread].decode(first, end, batch)
            for change in changes:
                change(first, end)

        with self._borrowed(thread_count(len(samples))) as decoders:
            run_threads(work, len(samples))
        return status

    @contextmanager
    def _borrowed(self, threads: int) -> Iterator[list[Decoder]]:
        """`threads` decoders for one call.

        Nobody else uses them meanwhile: two loaders, or an epoch that was left early and the next,
        may call one operation at the same time.
        """
        with self._lock:
            idle = [self._decoders.pop() for _ in range(min(threads, len(self._decoders)))]
        borrowed = [*idle, *(Decoder() for _ in range(threads - len(idle)))]
        try:
            yield borrowed
        finally:
            with self._lock:
                self._decoders.extend(borrowed)

    def _report(self, indices: np.ndarray, status: np.ndarray, memory: Any) -> None:
        file = getattr(memory, "filename", None) or "the data file"
        bad = np.flatnonzero(status)
        self.error_count += len(bad)
        found = [(int(indices[b]), REASONS[int(status[b])]) for b in bad]
        self.errors.extend(found[: max(0, 100 - len(self.errors))])
        if self.on_error == "raise":
            index, reason = found[0]
            more = f" ({len(found)} such samples in this batch)" if len(found) > 1 else ""
            raise DecodeError(
                f"{file}: sample {index}: {reason}{more}; write the file again from its source"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_decoders": [], "before_batch": None}
        del state["_lock"]
        return state  # handles and locks belong to one process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


class CropDecode(_CropOperation):
    """Random resized crop and flip of encoded or raw images.

    Args:
        output_size: (height, width) in pixels, or one integer for both.
        scale: (low, high) fraction of the image's area, 0 < low <= high <= 1.
        ratio: (low, high) width / height of the box.
        flip: probability of a mirror image.
        flip_mode: 'random', or 'alternating': half of the images in the first epoch, the others in
            the second, and so on; flip is 0.5 then.
        seed: of this run; with the epoch and the sample index it decides every draw.
        method: 'bilinear' (antialiased, Pillow's within 1 level), 'bicubic' or 'area' (FFCV's).
        reduced_decode: decode at 1/4 or 1/8 (files without markers: at 1/2 too) where the crop is
            at least that many times the output; off, pixels come from an exact decode always.
        on_error: 'raise' a DecodeError naming file and sample, or 'count' in `error_count` and
            `errors` and give a black image.
        then: operations for uint8 images, which a thread puts every image through before it decodes
            the next: the result is as behind the decoder in the pipeline, the threads wait for
            each other once a batch. `set_epoch` reaches them too.
    Shape: uint8 [b, height, width, 3], RGB.
    Raises: ValueError for settings out of range; DecodeError while loading.
    Source: Szegedy et al., arXiv 1409.4842 (the crop); torchvision RandomResizedCrop (semantics).
    """

    def __init__(
        self,
        output_size: Size,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (0.75, 4 / 3),
        *,
        flip: float = 0.5,
        flip_mode: str = "random",
        seed: int = 0,
        method: str = "bilinear",
        reduced_decode: bool = True,
        on_error: str = "raise",
        then: Sequence[KeyedOperation] = (),
    ) -> None:
        super().__init__(output_size, method, reduced_decode, on_error, then)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {scale}; give 0 < low <= high <= 1")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] < math.inf:
            raise ValueError(f"ratio is {ratio}; give 0 < low <= high")
        self.scale, self.ratio = tuple(map(float, scale)), tuple(map(float, ratio))
        self.flip, self.seed = check_probability(flip, "flip"), whole_seed(seed)
        self.flip_mode = flip_mode
        if flip_mode != "random" and (flip_mode, flip) != ("alternating", 0.5):
            what = f"flip_mode is {flip_mode!r} and flip {flip}"
            raise ValueError(f"{what}; give 'random', or 'alternating' with 0.5")

    def draw(
        self, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: tuple[int, int]
    ) -> np.ndarray:
        key = (np.int64(self.seed), np.int64(self._epoch))
        crops = draw_random_crops(
            *(*key, indices, np.ascontiguousarray(heights), np.ascontiguousarray(widths)),
            *(self.scale, self.ratio, self.flip),
        )
        if self.flip_mode == "alternating":
            crops[:, 4] = rng.alternating_flips(self.seed, self._epoch, indices)
        return crops


class CenterCropDecode(_CropOperation):
    """Central crop, resized: for evaluation.

    Args:
        output_size: (height, width) in pixels, or one integer for both.
        ratio: side of the box as a fraction of the largest box that fits, 0 < ratio <= 1 (224 / 256
            for the usual protocol).
        method, reduced_decode, on_error, then: as `CropDecode`.
    Shape: uint8 [b, height, width, 3], RGB.
    Raises: ValueError for settings out of range; DecodeError while loading.
    Source: FFCV CenterCropRGBImageDecoder (box); Pillow (resize).
    """

    def __init__(
        self,
        output_size: Size,
        ratio: float,
        *,
        method: str = "bilinear",
        reduced_decode: bool = True,
        on_error: str = "raise",
        then: Sequence[KeyedOperation] = (),
    ) -> None:
        super().__init__(output_size, method, reduced_decode, on_error, then)
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio is {ratio}; give a fraction, 0 < ratio <= 1")
        self.ratio = float(ratio)

    def draw(
        self, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: tuple[int, int]
    ) -> np.ndarray:
        return center_crops(heights, widths, size, self.ratio)
