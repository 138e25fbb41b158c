"""What happens to one image on its way into the file: read, decode, resize, JPEG or raw.

These functions run in the writer's worker processes, one chunk of neighboring output positions at a
time.
"""

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import ImageFile

from fast_imagenet.beton.format import MAX_SIDE, MODE_JPG, MODE_RAW
from fast_imagenet.beton.jpeg import encode_jpeg, quantisers, restart_interval
from fast_imagenet.native import recode
from fast_imagenet.sources.base import MAX_IMAGE_BYTES, ImageError, Source, SourceError
from fast_imagenet.sources.decode import decode_opened, kinds_of_name, open_image

Stored = tuple[bytes, int, tuple[int, int]]  # bytes, mode, (width, height)


class ConversionError(RuntimeError):
    """An image that cannot be converted; the message begins with its path."""


@dataclass(frozen=True)
class EncodeSettings:
    """How images are stored.

    Attributes:
        mode: 'jpg', 'raw', 'proportion' or 'smart'.
        jpeg_share: fraction of JPEGs under 'proportion', 0 to 1.
        smart_bytes: under 'smart', images of at most this many bytes of pixels are raw and larger
            ones JPEG.
        quality: JPEG quality, 1 to 100.
        max_side: longest allowed side in pixels; 0 = as they are.
        seed: key of the hash that selects the JPEGs under 'proportion'.
        skip_bad: leave out images that cannot be decoded instead of stopping.
    """

    mode: str = "jpg"
    jpeg_share: float = 0.5
    smart_bytes: int = 196_608
    quality: int = 90
    max_side: int = 400
    seed: int = 0
    skip_bad: bool = False


class EncodedImage(NamedTuple):
    """An image as it is stored: its bytes, MODE_JPG or MODE_RAW, size in pixels, label."""

    stored: bytes
    mode: int
    width: int
    height: int
    label: int


@dataclass
class Chunk:
    """Encoded images of neighboring output positions.

    Attributes:
        images: in the order of the positions.
        source_bytes: bytes read from the source.
        unusual: (kind, name) of everything unusual that was found.
        skipped: (name, reason) of images left out.
    """

    images: list[EncodedImage] = field(default_factory=list)
    source_bytes: int = 0
    unusual: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def resize_longest(rgb_hwc: np.ndarray, max_side: int) -> np.ndarray:
    """Shrink (area average) so that the longer side is `max_side` pixels; 0 = leave as it is."""
    height, width = rgb_hwc.shape[:2]
    size_wh = fitting_size((width, height), max_side)
    if size_wh == (width, height):
        return rgb_hwc
    return cv2.resize(rgb_hwc, size_wh, interpolation=cv2.INTER_AREA)


def fitting_size(size_wh: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Width and height with the longer side at most `max_side` pixels; 0 = as they are."""
    if max_side <= 0 or max(size_wh) <= max_side:
        return size_wh
    scale = max_side / max(size_wh)
    return max(1, round(size_wh[0] * scale)), max(1, round(size_wh[1] * scale))


def hash_fraction(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on (seed, index) only; uniform over indices (splitmix64)."""
    from fast_imagenet import rng  # imports numba, for half a second

    word = (seed * 0xD1342543DE82EF95 + (index + 1) * rng.GAMMA_INT64) & (1 << 64) - 1
    return int(rng.mix(np.array([word], np.uint64))[0] >> np.uint64(11)) / (1 << 53)


def _is_jpeg(settings: EncodeSettings, index: int, pixel_bytes: int) -> bool:
    if settings.mode == "proportion":
        return hash_fraction(settings.seed, index) < settings.jpeg_share
    if settings.mode == "smart":
        return pixel_bytes > settings.smart_bytes
    return settings.mode == "jpg"


def _read_bytes(source: Source, index: int) -> bytes:
    try:
        data = source.read(index)
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror or error})") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(f"{len(data):,} bytes, more than the allowed {MAX_IMAGE_BYTES:,}")
    return data


def _rewrite(
    header: recode.Header, data: bytes, index: int, settings: EncodeSettings
) -> Stored | None:
    size_wh = fitting_size((header.width, header.height), settings.max_side)
    if max(size_wh) > MAX_SIDE or not _is_jpeg(settings, index, 3 * size_wh[0] * size_wh[1]):
        return None
    layout = restart_interval(size_wh[0]), quantisers(settings.quality)
    stored = recode.write_anew(header, data, size_wh, *layout)
    return None if stored is None else (stored, MODE_JPG, size_wh)


def _encode_pixels(rgb_hwc: np.ndarray, index: int, settings: EncodeSettings) -> Stored:
    rgb_hwc = resize_longest(rgb_hwc, settings.max_side)
    height, width = rgb_hwc.shape[:2]
    if max(height, width) > MAX_SIDE:
        size = f"{width} x {height} pixels"
        raise ImageError(f"{size}: a side may have {MAX_SIDE} at most, set --write.max_side")
    if not _is_jpeg(settings, index, rgb_hwc.nbytes):
        return rgb_hwc.tobytes(), MODE_RAW, (width, height)
    try:
        return encode_jpeg(rgb_hwc, settings.quality), MODE_JPG, (width, height)
    except ValueError as error:
        raise ImageError(f"cannot be encoded ({error})") from error


def _add_image(chunk: Chunk, source: Source, index: int, settings: EncodeSettings) -> None:
    """Encode image `index` and append it to `chunk`, or raise an ImageError."""
    kinds: tuple[str, ...] = ()
    if source.makes_pixels:
        rgb_hwc = source.pixels(index)
        source_bytes = rgb_hwc.nbytes
        made = _encode_pixels(rgb_hwc, index, settings)
    else:
        data = _read_bytes(source, index)
        source_bytes = len(data)
        made, kinds = _encode_file(data, source.name(index), index, settings)
    stored, mode, (width, height) = made
    label = int(source.labels[index])
    chunk.images.append(EncodedImage(stored, mode, width, height, label))
    chunk.source_bytes += source_bytes
    chunk.unusual += [(kind, source.name(index)) for kind in kinds]


def _encode_file(
    data: bytes, name: str, index: int, settings: EncodeSettings
) -> tuple[Stored, tuple[str, ...]]:
    """Encode the file of an image; also what is unusual about it, see `decode_rgb`.

    A plain JPEG is rewritten, not decoded and encoded: nearer to the source, smaller, faster.
    """
    header = recode.read_header(data)
    made = _rewrite(header, data, index, settings) if header else None
    if header and made and not header.has_exif:
        return made, kinds_of_name(name, "JPEG")  # nothing else can be unusual
    image, kinds = open_image(data, name)
    if made:
        return made, kinds
    rgb_hwc, more = decode_opened(image, data)
    return _encode_pixels(rgb_hwc, index, settings), kinds + more


def encode_chunk(
    source: Source, indices: np.ndarray, settings: EncodeSettings, note: Callable[[int], None]
) -> Chunk:
    """Encode images `indices` of `source`, in this order.

    `note` is called with each index before the image is read, so that a death can be traced.

    Raises:
        ConversionError: an image failed and `settings.skip_bad` is off; names its path.
    """
    chunk = Chunk()
    for index in indices.tolist():
        note(index)
        try:
            _add_image(chunk, source, index, settings)
        except ImageError as error:
            if not settings.skip_bad:
                raise ConversionError(
                    f"{source.name(index)}: {error}; repair or remove it, or leave damaged images"
                    " out with --source.on_error=skip"
                ) from error
            chunk.skipped.append((source.name(index), str(error)))
        except SourceError as error:
            raise ConversionError(str(error)) from error
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise ConversionError(f"{source.name(index)}: {what}") from error
    return chunk


_WORKER: dict[str, Any] = {}


def start_worker(job: Any, slots: Any, parent: int) -> None:
    """Set up a worker process, which ends when the writer, process `parent`, is gone.

    Args:
        job: shared bytes: the pickled pair of Source and EncodeSettings.
        slots: shared int64 array: slots[0] counts the workers; slots[k] is where worker k is.
    """
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach the writer, which stops the workers
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(1)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    threading.Thread(target=_follow_parent, args=(parent,), daemon=True).start()
    with slots.get_lock():
        slots[0] += 1
        place = slots[0]
    source, settings = pickle.loads(memoryview(job))
    _WORKER.update(source=source, settings=settings, slots=slots, place=place)


def work(indices: np.ndarray) -> Chunk:
    """Encode a chunk in a worker process that `start_worker` has set up."""

    def note(index: int) -> None:
        _WORKER["slots"][_WORKER["place"]] = index

    return encode_chunk(_WORKER["source"], indices, _WORKER["settings"], note)


def _follow_parent(parent: int) -> None:
    """End this process soon after the writer is killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
