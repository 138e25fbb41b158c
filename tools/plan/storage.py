"""The data on this machine: how fast the disk gives it, how much of it is in memory.

Sizes are bytes, rates bytes per second.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.beton.verify import PageChecks
from tools.plan.forecast import Storage

REGION = 64 << 20  # bytes of the file that the disk is timed on
BLOCK = 8 << 20  # bytes of a large read: a page of the file
IMAGES = 256  # single reads
LIMIT = 5.0  # seconds for each of the two
ABSENT = 0.1  # largest fraction in the page cache of what counts as read from the disk
TIMED_PAGES = 8


def measure_storage(cfg: SimpleNamespace, workers: int) -> Storage:
    """The training data of a run; `room` is not known yet (0). workers: threads that read images.

    Raises:
        ValueError: a data file is damaged.
    """
    train, val = _open(cfg, "train"), _open(cfg, "val")
    ours = cfg.data.backend == "ffcv"
    resident, rates, check = None, (None, None, False), 0.0
    if isinstance(train, BetonFile):
        resident = fraction_resident(train.path)
        rates = reading_rates(train.path, train.offsets, train.sizes, workers)
        check = _page_check_seconds(train) if ours and cfg.data.check_pages else 0.0
    random_order, sizes = cfg.data.in_memory or not ours, (_size(train), _size(val))
    return Storage(*sizes, 0, resident, *rates, random_order, check > 0, check)


def _open(cfg: SimpleNamespace, split: str):
    """A BetonFile, or the images of the torchvision backend."""
    path = getattr(cfg.data, f"{split}_dataset")
    if cfg.data.backend == "ffcv":
        return BetonFile(path)
    from fast_imagenet.data.samples import open_dataset

    return open_dataset(path, split)


def _size(source) -> int:
    """Of a BetonFile, or of a folder's images by a sample of them."""
    if isinstance(source, BetonFile):
        return source.path.stat().st_size
    sample = np.linspace(0, len(source) - 1, min(len(source), 200)).astype(int)
    return int(np.mean([len(source.read(int(i))) for i in sample]) * len(source))


def _page_check_seconds(file: BetonFile) -> float:
    """Seconds of checking all pages once; 0 where the file has no checksums."""
    checks, pages = PageChecks(file), np.unique(file.offsets // file.page_size)
    if checks.why_not:
        return 0.0
    some = pages[:: math.ceil(len(pages) / TIMED_PAGES)]
    PageChecks(file).check(some)  # brings them into memory
    begin = time.perf_counter()
    checks.check(some)
    return (time.perf_counter() - begin) * len(pages) / len(some)


def own_memory() -> int:
    """Bytes of this process that are not pages of a file."""
    status = Path("/proc/self/status").read_text(errors="replace")
    return 1024 * sum(int(kb) for kb in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.M))


def fraction_resident(path: str | Path, start: int = 0, size: int | None = None) -> float | None:
    """Fraction of a file's pages in the page cache; None where the kernel does not report it.

    Args:
        path: the file, not empty.
        start: first byte, a multiple of the page size; size: bytes, None = to the end.
    """
    # to others than the owner Linux reports that all of it is there (since 5.2)
    if not os.access(path, os.W_OK):
        return None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - start if size is None else size
        mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, offset=start)
    view = np.frombuffer(mapped, np.uint8)
    flags = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    place, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size)
    failed = ctypes.CDLL(None).mincore(place, length, ctypes.c_void_p(flags.ctypes.data))
    del view
    mapped.close()
    return None if failed else float((flags & 1).mean())


def reading_rates(
    path: str | Path, offsets: np.ndarray, sizes: np.ndarray, workers: int
) -> tuple[float | None, float | None, bool]:
    """Rates of large reads and of single images, and whether they came from the disk.

    The kernel is asked to forget two regions in the middle of the file: one for large reads, one
    for images, which is read ahead again afterwards. Pages that another process has mapped stay;
    then the rates are the page cache's, and the last value is False.

    Args:
        offsets, sizes: int64 [n], where the file's images lie, bytes.
        workers: threads that read images.
    """
    size = os.stat(path).st_size
    half = size // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    low, high = max(0, half - REGION), min(size, half + REGION)
    inside = np.flatnonzero((offsets >= low) & (offsets + sizes <= half))
    if high - half < mmap.PAGESIZE or not len(inside):
        return None, None, False
    chosen = np.random.default_rng(0).choice(inside, min(IMAGES, len(inside)), replace=False)
    images = [(int(offsets[i]), int(sizes[i])) for i in chosen]
    blocks = [(at, min(BLOCK, high - at)) for at in range(half, high, BLOCK)]
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(max(1, workers)) as pool:
        handle = file.fileno()
        # whole regions: of the large pages of a modern page cache no part can be dropped
        os.posix_fadvise(handle, low, high - low, os.POSIX_FADV_DONTNEED)
        left = fraction_resident(path, low, high - low)
        large = _rate(handle, blocks, map)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        single = _rate(handle, images, pool.map)
        os.posix_fadvise(handle, low, high - low, os.POSIX_FADV_WILLNEED)
    return large, single, left is not None and left < ABSENT


def _rate(handle: int, ranges: list[tuple[int, int]], run: Callable[..., Iterable[int]]) -> float:
    """Bytes per second of reading them, or those that LIMIT allows."""
    begin = time.perf_counter()

    def read(one: tuple[int, int]) -> int:
        in_time = time.perf_counter() - begin < LIMIT
        return len(os.pread(handle, one[1], one[0])) if in_time else 0

    return sum(run(read, ranges)) / (time.perf_counter() - begin)
