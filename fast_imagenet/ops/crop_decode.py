"""CropDecode and CenterCropDecode: read, crop, flip and resize images in one pass.

First operations for the pipeline of an FFCV RGBImageField, in place of
RandomResizedCropRGBImageDecoder + RandomHorizontalFlip and CenterCropRGBImageDecoder. They read
any RGBImageField file: JPEG with restart markers (only the tiles under the crop are decoded), JPEG
without (full decode), raw pixels. Crop and flip are a function of (seed, epoch, sample index).

    loader = Loader(..., pipelines={'image': [CropDecode((160, 160), seed=1), ToTensor(), ...]})

Axes: b batch, h height, w width, c channel (RGB). Memory: one decoded image per thread, where
stock FFCV keeps one per sample of every batch under way.
"""

import dataclasses
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.state import State

from .. import rng
from . import native
from .baseline import OVERREAD, TABLE_BYTES, decode_crop, pixel_bytes, plane_bytes
from .jpeg_region import HEIGHT, WIDTH, cut_region, parse_header
from .kernel import kernel
from .operation import EpochCounter, KeyedOperation, check_probability, whole_seed
from .precompiled import enable_precompiled, run_threads, thread_count
from .resize import METHODS, resize_box
from .vectors import store_byte

Size = int | tuple[int, int]  # (height, width), or one number for both
RAW_MODE = 1  # FFCV's number for a sample stored as pixels; 0 is JPEG
CROP_TRIES = 10
MAX_OUTPUT = 16_384  # pixels a side: an image of 0.8 GB
# Status of one sample, and the words for it.
GOOD, WARNED, FAILED, OUTSIDE, WRONG_SIZE = range(5)
REASONS = {
    WARNED: "libturbojpeg repaired a damaged JPEG",
    FAILED: "libturbojpeg could not decode the JPEG",
    OUTSIDE: "its bytes do not lie inside the file",
    WRONG_SIZE: "its size differs from the size the file states for it",
}
# Our own decoder has no reduced transform; at 1/2 it is faster without than libturbojpeg with one.
OWN_REDUCES = 4
# Space behind the last pixel: the resize reads up to 4 bytes beyond, the cutter nothing.
SLACK = 64


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


@kernel
def decode_denominator(crop_height, crop_width, out_height, out_width):
    """1, 2, 4 or 8: the strongest reduction that leaves the crop no smaller than the output.

    The transform does 1/2, 1/4 and 1/8 in fewer steps; any other fraction is slower than none.
    """
    denominator = 1
    while (
        denominator < 8
        and crop_height >= 2 * denominator * out_height
        and crop_width >= 2 * denominator * out_width
        and min(crop_height, crop_width) >= 64  # below, libturbojpeg's rounding is ambiguous
    ):
        denominator *= 2
    return denominator


@kernel
def _decode(handle, address, size, pixels, height, width):
    """Decode to `pixels` at height x width (full or reduced). Returns a status."""
    result = native.tj_decompress(
        *(handle, address, np.uint64(size), pixels, np.int32(width), np.int32(3 * width)),
        *(np.int32(height), np.int32(native.PIXELS_RGB), np.int32(native.ACCURATE_DCT)),
    )
    if result == 0:
        return GOOD
    return WARNED if native.tj_error_code(handle) == 0 else FAILED


@kernel
def apply_crop_jpeg(address, size, height, width, crop, out, out_size, options, workspace):
    """Decode and resize one JPEG. Arguments as `apply_crops`. Returns a status."""
    handle, bytes_at, pixels_at = workspace[0], workspace[1], workspace[2]
    box = (crop[0], crop[1], crop[2], crop[3])
    header = parse_header(address, size)
    reduce = decode_denominator(crop[2], crop[3], *out_size) if options[1] else 1
    region = (np.int64(0), np.int64(0), np.int64(0), height, width)
    if header[HEIGHT] == height and header[WIDTH] == width:
        if options[2] and reduce < OWN_REDUCES:
            pitch, left = decode_crop(
                address, size, header, box, bytes_at, workspace[3], workspace[4], pixels_at
            )
            if pitch > 0:
                resize_box(
                    *(pixels_at, pitch, (0, crop[2]), (left, left + crop[3])),
                    *((0.0, float(left), float(crop[2]), float(crop[3])), out),
                    *(out_size[0], out_size[1], crop[4] != 0, options[0]),
                )
                return GOOD
        cut = cut_region(address, size, header, box, bytes_at)
        if cut[0] > 0:
            address, size, region = bytes_at, cut[0], cut
    elif header[HEIGHT] > 0:
        return WRONG_SIZE
    rows, columns = -(-region[3] // reduce), -(-region[4] // reduce)
    status = _decode(handle, address, size, pixels_at, rows, columns)
    if status == FAILED:
        return status
    top, left = (crop[0] - region[1]) / reduce, (crop[1] - region[2]) / reduce
    tall, wide = crop[2] / reduce, crop[3] / reduce
    resize_box(
        *(pixels_at, 3 * columns),
        (math.floor(top), min(rows, math.ceil(top + tall))),
        (math.floor(left), min(columns, math.ceil(left + wide))),
        *((top, left, tall, wide), out, out_size[0], out_size[1], crop[4] != 0, options[0]),
    )
    return status


@kernel
def apply_crops(first, end, samples, crops, out, out_size, options, workspace, status):
    """Decode, crop, flip and resize samples first to end - 1 of a batch.

    Args:
        samples: int64 [b, 5], columns address, size in bytes, mode (RAW_MODE or JPEG), height,
            width. Address 0 marks a sample whose bytes lie outside the file.
        crops: int64 [b, 5] from a draw, boxes inside the images.
        out: address of the batch, uint8 [b, h, w, 3] contiguous. out_size: (h, w).
        options: (method, whether JPEG may be decoded at 1/2, 1/4, 1/8, whether our own decoder
            goes first).
        workspace: uint64 [5] of this thread: decoder handle, addresses of buffers for the largest
            sample's bytes, for RGB pixels, planes and tables, see `_Workspace`.
        status: int64 [b], written: GOOD or what went wrong; failed samples become black.
    """
    for b in range(first, end):
        address, size = np.uintp(samples[b, 0]), samples[b, 1]
        mode, height, width = samples[b, 2], samples[b, 3], samples[b, 4]
        crop = crops[b]
        target = out + np.uintp(b * out_size[0] * out_size[1] * 3)
        if address == np.uintp(0):
            status[b] = OUTSIDE
        elif mode != RAW_MODE:
            status[b] = apply_crop_jpeg(
                address, size, height, width, crop, target, out_size, options, workspace
            )
        elif size != height * width * 3:
            status[b] = WRONG_SIZE
        else:
            status[b] = GOOD
            box = (float(crop[0]), float(crop[1]), float(crop[2]), float(crop[3]))
            resize_box(
                *(address, 3 * width, (crop[0], crop[0] + crop[2]), (crop[1], crop[1] + crop[3])),
                *(box, target, out_size[0], out_size[1], crop[4] != 0, options[0]),
            )
        if status[b] > WARNED:
            for k in range(out_size[0] * out_size[1] * 3):
                store_byte(target + np.uintp(k), np.uint8(0))


@dataclasses.dataclass
class _Workspace:
    """Decoder and buffers of one thread."""

    sizes: tuple[int, ...]  # bytes of the largest JPEG, of its pixels, of its planes

    def __post_init__(self) -> None:
        room = (OVERREAD + SLACK, SLACK, SLACK)
        sizes = [size + more for size, more in zip(self.sizes, room, strict=True)]
        sizes.append(TABLE_BYTES)
        self.buffers = [np.empty(size, np.uint8) for size in sizes]
        handle = native.new_decoder()
        # not at the end of the process: a loader's thread may still be decoding then
        weakref.finalize(self, native.free_decoder, handle).atexit = False
        places = [handle, *(buffer.ctypes.data for buffer in self.buffers)]
        self.addresses = np.array(places, np.uint64)


def locate_samples(
    batch_indices: np.ndarray, metadata: np.ndarray, storage_state: tuple
) -> np.ndarray:
    """Where the samples of a batch lie in memory: int64 [b, 5] as `apply_crops` takes them.

    Args: batch_indices: int [b]. metadata: FFCV's table of an RGBImageField. storage_state: of
        either FFCV memory manager, (memory, pointers, sizes[, page_to_slot]).
    """
    memory, pointers, sizes = storage_state[:3]
    table = metadata[batch_indices]
    offset = table["data_ptr"]
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
        self._workspaces: list[_Workspace] = []

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
            if self.before_batch is not None:
                self.before_batch(batch_indices)
            samples = locate_samples(batch_indices, metadata, storage_state)
            images_bhwc = images_bhwc[: len(batch_indices)]
            indices = np.asarray(batch_indices, np.int64)
            crops = self.draw(indices, samples[:, 3], samples[:, 4], images_bhwc.shape[1:3])
            changes = [operation.prepare(images_bhwc, indices) for operation in self.then]
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
        status = np.zeros(len(samples), np.int64)
        options = (METHODS[self.method], bool(self.reduced_decode), bool(self._own_decoder))
        out, size = np.uintp(images_bhwc.ctypes.data), images_bhwc.shape[1:3]

        def work(thread, first, end):
            workspace = workspaces[thread].addresses
            apply_crops(first, end, samples, crops, out, size, options, workspace, status)
            for change in changes:
                change(first, end)

        with self._borrowed(thread_count(len(samples)), samples) as workspaces:
            run_threads(work, len(samples))
        return status

    @contextmanager
    def _borrowed(self, threads: int, samples: np.ndarray) -> Iterator[list[_Workspace]]:
        """`threads` workspaces for one call, each large enough for the largest of its samples.

        Nobody else uses them meanwhile: two loaders, or an epoch that was left early and the next,
        may call one operation at the same time.
        """
        jpegs = samples[samples[:, 2] != RAW_MODE]
        needs = (
            jpegs[:, 1],
            pixel_bytes(jpegs[:, 3], jpegs[:, 4]),
            plane_bytes(jpegs[:, 3], jpegs[:, 4]),
        )
        sizes = tuple(int(need.max(initial=0)) for need in needs)
        with self._lock:
            idle = [self._workspaces.pop() for _ in range(min(threads, len(self._workspaces)))]
        for old in idle:
            sizes = tuple(max(pair) for pair in zip(old.sizes, sizes, strict=True))
        borrowed = [old if old.sizes == sizes else _Workspace(sizes) for old in idle]
        borrowed += [_Workspace(sizes) for _ in range(threads - len(idle))]
        try:
            yield borrowed
        finally:
            with self._lock:
                self._workspaces.extend(borrowed)

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
        state = {**self.__dict__, "_workspaces": [], "before_batch": None}
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

    def draw(
        self, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: tuple[int, int]
    ) -> np.ndarray:
        key = (np.int64(self.seed), np.int64(self._epoch))
        return draw_random_crops(
            *(*key, indices, np.ascontiguousarray(heights), np.ascontiguousarray(widths)),
            *(self.scale, self.ratio, self.flip),
        )


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
