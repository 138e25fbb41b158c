"""The data on this machine: how fast the disk gives it, how much of it is in memory.

Sizes are bytes, rates bytes per second.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.beton.verify import PageChecks
from fast_imagenet.data.samples import open_dataset
from tools.plan.forecast import Storage

REGION = 64 << 20  # bytes of the file that the disk is timed on
BLOCK = 8 << 20  # bytes of a large read: a page of the file
IMAGES = 256  # single reads
LIMIT = 5.0  # seconds for each of the two


def measure_storage(cfg: SimpleNamespace, workers: int) -> Storage:
    """The training data of a run; `room` is not known yet (0). workers: threads that read images.

    Raises:
        ValueError: a data file is damaged.
    """
    train, val = (open_dataset(getattr(cfg.data, f"{s}_dataset"), s) for s in ("train", "val"))
    ours = cfg.data.backend == "ffcv"
    resident, rates, checked = None, (None, None), False
    if isinstance(train, BetonFile):
        resident = fraction_resident(train.path)
        rates = reading_rates(train.path, train.offsets, train.sizes, workers)
        checked = ours and cfg.data.check_pages and not PageChecks(train).why_not
    random_order, sizes = cfg.data.in_memory or not ours, (_size(train), _size(val))
    return Storage(*sizes, 0, resident, *rates, random_order, checked)


def _size(source) -> int:
    """Of a BetonFile, or of a folder's images by a sample of them."""
    if isinstance(source, BetonFile):
        return source.path.stat().st_size
    sample = np.linspace(0, len(source) - 1, min(len(source), 200)).astype(int)
    return int(np.mean([len(source.read(int(i))) for i in sample]) * len(source))


def fraction_resident(path: str | Path) -> float | None:
    """Fraction of a file's pages in the page cache; None where the kernel does not report it."""
    # to others than the owner Linux reports that all of it is there (since 5.2)
    if not os.access(path, os.W_OK):
        return None
    pages = np.memmap(path, np.uint8, "r")
    flags = np.zeros(-(-pages.size // mmap.PAGESIZE), np.uint8)
    place, length = ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(pages.size)
    failed = ctypes.CDLL(None).mincore(place, length, ctypes.c_void_p(flags.ctypes.data))
    return None if failed else float((flags & 1).mean())


def reading_rates(
    path: str | Path, offsets: np.ndarray, sizes: np.ndarray, workers: int
) -> tuple[float | None, float | None]:
    """Rates of large reads and of single images from the disk, past the page cache.

    Args:
        offsets, sizes: int64 [n], where the file's images lie, bytes.
        workers: threads that read images.

    Returns:
        (None, None) where the file is too small, or its file system is always cached.
    """
    size = os.stat(path).st_size // mmap.PAGESIZE * mmap.PAGESIZE
    half = size // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    blocks = [(at, min(BLOCK, size - at)) for at in range(half, min(size, half + REGION), BLOCK)]
    inside = np.flatnonzero(offsets + sizes <= half)
    if not blocks or not len(inside):
        return None, None
    chosen = np.random.default_rng(0).choice(inside, min(IMAGES, len(inside)), replace=False)
    starts = offsets[chosen] // mmap.PAGESIZE * mmap.PAGESIZE  # whole pages can be read so
    lengths = -(-(offsets[chosen] + sizes[chosen] - starts) // mmap.PAGESIZE) * mmap.PAGESIZE
    images = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with open(handle, "rb", buffering=0), ThreadPoolExecutor(max(1, workers)) as pool:
            return _rate(handle, blocks, map), _rate(handle, images, pool.map)
    except OSError:
        return None, None


def _rate(handle: int, ranges: list[tuple[int, int]], run: Callable[..., Iterable[int]]) -> float:
    """Bytes per second of reading them, or those that LIMIT allows."""
    begin = time.perf_counter()

    def read(one: tuple[int, int]) -> int:
        in_time = time.perf_counter() - begin < LIMIT
        # memory that begins with a page, as O_DIRECT needs
        return os.preadv(handle, [mmap.mmap(-1, one[1])], one[0]) if in_time else 0

    return sum(run(read, ranges)) / (time.perf_counter() - begin)
