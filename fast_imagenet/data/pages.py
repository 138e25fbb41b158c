"""What a loader reads of a .beton file: its mapping, and pages read ahead where memory is short.

In place of FFCV's memory managers, which build a Python set for every page and sample. Nothing here
grows with the number of samples. Both modes decode from the file's read-only mapping, so that ranks
and loaders share its pages in the page cache. A file larger than memory is read ahead into that
cache, page by page as the batches ask for them, by threads that report what a mapping turns into
the signal SIGBUS: an error of the disk, or a file that has become shorter. `madvise` reads ahead
without a report, and at most what the device's read-ahead allows.

FFCV's schedule_epoch, state and start_batch keep their names.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, cast

import numpy as np

from fast_imagenet.beton.format import REMEDY
from fast_imagenet.beton.reader import BetonError, BetonFile
from fast_imagenet.rng import index_of

READERS = 12  # threads: FFCV's number
AHEAD = 16  # batches: the first of a window ask for nearly all of its pages, see sampler.py
PIECE = 1 << 20  # bytes read at a time, into a buffer that nobody looks at
LEFT_AFTER = 64  # batches that have not asked for a page, before it is no longer held


class WholeFile:
    """All pages of a file, read as they are used.

    Attributes:
        state: what operations get as FFCV's storage_state: the file's bytes, None in place of a
            table of pointers, and the size of each sample's image by its index, int64.
    """

    def __init__(self, file: BetonFile) -> None:
        self._file = file
        self.state = (file.data, None, file.sizes)

    def schedule_epoch(self, batches: Sequence[np.ndarray]) -> Any:
        """A context for an epoch of these batches of samples, entered before the first."""
        return self

    def start_batch(self, number: int) -> None:
        """Make ready what batch `number` needs; numbers come in order."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class PagesAhead(WholeFile):
    """The same for files larger than memory: the pages of the next batches are read ahead."""

    def schedule_epoch(self, batches: Sequence[np.ndarray]) -> Any:
        return _ReadAhead(self._file, batches)


class _ReadAhead(WholeFile):
    """One epoch: which pages have been asked for, and the threads that read them.

    Raises:
        BetonError: the file is shorter than it was, or cannot be read.
    """

    def __init__(self, file: BetonFile, batches: Sequence[np.ndarray]) -> None:
        super().__init__(file)
        self._batches = batches
        self._last = np.full(-(-file.data_end // file.page_size), -1)  # batch that used each page
        self._reads: deque[list[Future]] = deque()  # of the batches from the current one on
        self._asked = 0
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="pages")
        self._stream: BinaryIO | None = None

    def __enter__(self) -> None:
        try:
            self._stream = open(self._file.path, "rb", buffering=0)
        except OSError as error:
            raise self._unreadable(error) from error

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)  # a dead file server holds them
        if self._stream:
            self._stream.close()

    def start_batch(self, number: int) -> None:
        while self._asked < min(number + AHEAD + 1, len(self._batches)):
            samples = index_of(self._batches[self._asked])
            pages = np.unique(self._file.offsets[samples] // self._file.page_size)
            new = pages[self._last[pages] < 0]
            self._last[pages] = self._asked
            self._reads.append([self._pool.submit(self._read, int(page)) for page in new])
            self._asked += 1
        for read in self._reads.popleft():
            read.result()
        if number % LEFT_AFTER == 0:
            self._leave(np.flatnonzero((self._last >= 0) & (self._last < number - LEFT_AFTER)))

    def _read(self, page: int) -> None:
        """Bring a page into the page cache."""
        size, buffer = self._file.page_size, memoryview(bytearray(PIECE))
        place, end = page * size, min((page + 1) * size, len(self._file.data))
        while place < end and self._stream:
            try:
                count = os.preadv(self._stream.fileno(), [buffer[: end - place]], place)
            except OSError as error:
                raise self._unreadable(error) from error
            if count == 0:
                raise BetonError(f"{self._file.path} has become shorter while in use: {REMEDY}")
            place += count

    def _leave(self, pages: np.ndarray) -> None:
        """Give pages back to the page cache, which may then drop them first."""
        size, mapping = self._file.page_size, cast(mmap.mmap, self._file.data.base)
        for page in pages.tolist():
            mapping.madvise(mmap.MADV_DONTNEED, page * size, size)
        self._last[pages] = -1

    def _unreadable(self, error: OSError) -> BetonError:
        what = error.strerror or error
        return BetonError(f"{self._file.path} cannot be read ({what}): {REMEDY}")
