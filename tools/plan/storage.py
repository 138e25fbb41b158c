"""The data on this machine: how fast the disk gives it, how much is in memory, how much may be.

Sizes are bytes, rates bytes a second.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fast_imagenet.machine import available_memory  # noqa: F401  also asked for here

REGION = 64 << 20  # bytes of the file that the disk is timed on
BLOCK = 8 << 20  # bytes a large read: a page of the file
IMAGES = 256  # single reads
LIMIT = 5.0  # seconds for each of the two
ABSENT = 0.1  # largest share in the page cache of what counts as read from the disk


def own_memory() -> int:
    """Bytes of this process that are not pages of a file."""
    status = Path("/proc/self/status").read_text(errors="replace")
    return 1024 * sum(int(kb) for kb in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.M))


def resident(path: str | Path, start: int = 0, size: int | None = None) -> float | None:
    """Share of a file's pages that is in the page cache; None where the kernel does not tell.

    Args:
        path: the file, not empty.
        start: first byte, a multiple of the page size.
        size: bytes; None = to the end.
    """
    # to others than the owner Linux says that all of it is there (since 5.2)
    if not os.access(path, os.W_OK):
        return None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - start if size is None else size
        mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, offset=start)
    view = np.frombuffer(mapped, np.uint8)
    flags = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    place, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size)
    failed = libc.mincore(place, length, ctypes.c_void_p(flags.ctypes.data))
    del view
    mapped.close()
    return None if failed else float((flags & 1).mean())


def reading_rates(
    path: str | Path, offsets: np.ndarray, sizes: np.ndarray, workers: int
) -> tuple[float | None, float | None, bool]:
    """Rates of large reads and of single images, and whether they came from the disk.

    The kernel is asked to forget two regions in the middle of the file: one for large reads, one
    for images, which is asked for again afterwards. Pages that another process has mapped stay;
    then the rates are the page cache's, and the last value is False.

    Args:
        path: the file.
        offsets, sizes: int64 [n], where its images lie, bytes.
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
    with open(path, "rb", buffering=0) as file:
        handle = file.fileno()
        # whole regions: of the large pages of a modern page cache no part can be dropped
        cold = _forget(path, handle, low, high)
        large = _rate(handle, blocks, map)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            single = _rate(handle, images, pool.map)
        os.posix_fadvise(handle, low, high - low, os.POSIX_FADV_WILLNEED)
    return large, single, cold


def _forget(path: str | Path, handle: int, start: int, end: int) -> bool:
    """Ask the kernel to drop these bytes; whether it did."""
    os.posix_fadvise(handle, start, end - start, os.POSIX_FADV_DONTNEED)
    left = resident(path, start, end - start)
    return left is not None and left < ABSENT


def _rate(handle: int, ranges: list[tuple[int, int]], run: Callable) -> float:
    """Bytes a second of reading them, or those that LIMIT allows."""
    begin = time.perf_counter()

    def read(one: tuple[int, int]) -> int:
        in_time = time.perf_counter() - begin < LIMIT
        return len(os.pread(handle, one[1], one[0])) if in_time else 0

    total = sum(run(read, ranges))
    return total / (time.perf_counter() - begin)
