"""Write FFCV's file format: many processes encode, one writes, and only a complete file is kept.

The samples are appended in order by one process, so that the bytes of the file do not depend on the
number of workers. The file grows under `<name>.partial-<pid>`, is checked, synced and then gets its
name (see output_lock.py); whatever goes wrong, the partial file is removed.

Stock FFCV's writer waits for ever when a worker raises or dies, and leaves a file that looks
complete; this one stops with the path of the image.
"""

import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.checksums import BlockChecksums, class_digest, write_tables
from fast_imagenet.beton.disk_space import SMALLER, check_disk, estimate_file, fill_holes
from fast_imagenet.beton.encode import Chunk, ConversionError, EncodeSettings
from fast_imagenet.beton.output_lock import output_file
from fast_imagenet.beton.pool import encoded
from fast_imagenet.beton.reader import BetonError, BetonFile, sidecar_path
from fast_imagenet.beton.summary import Totals, all_skipped, summarize, write_summary
from fast_imagenet.sources.base import Source, choose, shuffle
from fast_imagenet.terminal import readable

__all__ = ["ConversionError", "EncodeSettings", "write_beton"]

PAGE_SIZE = 8 << 20  # FFCV's default; it grows when an image is larger
TABLE_PART = 1 << 16  # rows of the allocation table made at a time
PROBE = 4  # chunks encoded before the first byte is written, to estimate the size of the file
Report = Callable[[str], None]
Progress = Callable[[int, int], None]  # new samples, and bytes of images written so far


def write_beton(
    path: str | Path,
    source: Source,
    settings: EncodeSettings | None = None,
    *,
    limit: int = 0,
    workers: int = 0,
    overwrite: bool = False,
    page_size: int = PAGE_SIZE,
    progress: Progress | None = None,
    shard: tuple[int, int] = (0, 1),
    check_space: bool = True,
    later: int = 0,
    report: Report | None = None,
) -> dict[str, Any]:
    """Write `source` to `path` in an order drawn from `settings.seed`; summary in `<path>.json`.

    Equal source, settings and limit give equal bytes, whatever `workers` is.

    Args:
        path: final name of the file; its folder is made when missing.
        source: the images.
        settings: how images are stored; None = the defaults of EncodeSettings.
        limit: largest number of samples, drawn evenly over the classes; 0 = all.
        workers: processes that decode and encode; 0 = do it in this process.
        overwrite: replace an existing file, which stays in place until the new one is complete.
        page_size: bytes, a power of two from 2 MiB up; doubled until the largest image fits.
        progress: called after every chunk.
        shard: (number from 0, of how many): write only this part of the order; see merge.py.
        check_space: refuse when the disk or /dev/shm are clearly too small, before writing.
        later: images that will be written to the same folder after this file.
        report: called with a sentence about needed and free bytes.

    Returns:
        The summary: see `summarize`.

    Raises:
        ConversionError: an image failed (the message begins with its path), or none is left.
        FileExistsError: `path` exists and `overwrite` is off, even if it has only appeared
            meanwhile; or another process is writing it.
        OSError: the disk refuses, because it is full or, by the estimate, will be.
    """
    path, settings, started = Path(path), settings or EncodeSettings(), time.perf_counter()
    with output_file(path, overwrite, SMALLER) as (partial, removed):
        order = _order(source, settings, limit)
        indices = order[shard_slice(len(order), *shard)]
        about = _describe(source, settings, order, shard)
        with closing(encoded(source, indices, settings, workers, check_space)) as chunks:
            space = path, len(indices), later, report
            checked = _check_space(chunks, *space) if check_space else chunks
            totals = _write_pages(partial, checked, len(indices), about, page_size, progress)
        seconds = time.perf_counter() - started
        summary = summarize(BetonFile(partial), source, settings, totals, seconds)
        summary["file"] = readable(path.name)
        if shard[1] == 1:
            summary["notes"] += all_skipped(source, indices, summary["counts"])
        if removed:
            names = ", ".join(readable(file.name) for file in removed)
            summary["notes"].append(f"removed what a killed conversion had left: {names}")
        write_summary(sidecar_path(partial), summary)
    return summary


def is_written(
    path: Path, source: Source, settings: EncodeSettings, limit: int, shard: tuple[int, int]
) -> bool:
    """Whether `path` already is the file that write_beton would make, complete with its summary.

    Raises:
        FileExistsError: it is another file, or a damaged one.
    """
    if not os.path.lexists(path):
        return False
    expected = _describe(source, settings, _order(source, settings, limit), shard)
    try:
        file = BetonFile(path)
    except BetonError as error:
        raise FileExistsError(f"{error}, after removing it") from error
    if any(file.header_json.get(key) != value for key, value in expected.items()):
        raise FileExistsError(
            f"{path} was written from other data or with other settings: remove it, choose another"
            " --write.folder, or allow --write.overwrite=true"
        )
    return bool(file.sidecar)


def _order(source: Source, settings: EncodeSettings, limit: int) -> np.ndarray:
    chosen = choose(source.labels, limit, settings.seed)
    return shuffle(chosen, source.blocks, settings.seed)


def shard_slice(length: int, number: int, count: int) -> slice:
    """Part `number` of `count`: consecutive, so that the parts in turn are the whole order."""
    return slice(length * number // count, length * (number + 1) // count)


def _describe(
    source: Source, settings: EncodeSettings, order: np.ndarray, shard: tuple[int, int]
) -> dict[str, Any]:
    """What the header says of a conversion: equal for all parts of one, but for `shard`."""
    return {
        "written_by": "fast-imagenet",
        "num_classes": len(source.classes),
        "classes_sha256": class_digest(source.classes),
        "names_sha256": class_digest(source.class_names or []),
        "settings": asdict(settings),
        "order_crc32": zlib.crc32(source.labels[order].data, zlib.crc32(order.data)),
        "shard": list(shard),
    }


def _check_space(
    chunks: Iterator[Chunk], path: Path, count: int, later: int, report: Report | None
) -> Iterator[Chunk]:
    """The chunks, unless the first of them show that the disk is too small: an OSError.

    Args:
        count, later: images of this file, and of those after it.
    """
    first = list(islice(chunks, PROBE))
    estimate, least = estimate_file(first, count)
    sentence = check_disk(path, estimate, least, later and estimate / count * later)
    if report:
        report(sentence)
    return chain(first, chunks)


def _write_pages(
    partial: Path,
    chunks: Iterator[Chunk],
    capacity: int,
    about: dict[str, Any],
    page_size: int,
    progress: Progress | None,
) -> Totals:
    """Write the whole file under its partial name; returns what the chunks reported."""
    totals, written = Totals(), 0
    with open(partial, "wb", buffering=1 << 20) as file:
        pages = PageFile(file, capacity, page_size)
        for chunk in chunks:
            written += pages.append(chunk)
            totals.add(chunk)
            if progress:
                progress(len(chunk.images) + len(chunk.skipped), written)
        totals.blocks = pages.finish(about)
        fill_holes(file)
    return totals


class PageFile:
    """Appends samples to an open file in FFCV's page layout.

    A layout in pages of some size is also one in pages of twice that size, because an image inside
    one small page lies inside one large page. So the page size is settled last, and no limit on the
    size of an image is needed.

    Args:
        file: open for binary writing, at its start.
        capacity: largest number of samples that will come; decides where data begins.
        page_size: bytes, to begin with.
    """

    def __init__(self, file: BinaryIO, capacity: int, page_size: int) -> None:
        self._file = file
        self._samples = np.zeros(capacity, fmt.SAMPLE)
        self._sizes = np.zeros(capacity, np.uint32)  # a page has at most 2 GiB
        self._page_size = page_size
        self._count = 0
        self._start = fmt.align_up(fmt.METADATA_START + self._samples.nbytes, page_size)
        self._position = self._start
        self._checksums = BlockChecksums(page_size)
        file.seek(self._position)

    def append(self, chunk: Chunk) -> int:
        """Add the images of `chunk`; returns their bytes."""
        total = 0
        for stored, mode, width, height, label in chunk.images:
            start = self._place(len(stored))
            self._file.write(stored)
            self._checksums.add(stored)
            self._samples[self._count] = ((mode, width, height, start), label)
            self._sizes[self._count] = len(stored)
            self._count += 1
            total += len(stored)
        return total

    def _place(self, size: int) -> int:
        """Where the next `size` bytes go: here if they fit into the page, else in the next one."""
        while size > self._page_size:
            self._page_size *= 2
        if self._page_size > fmt.MAX_PAGE_SIZE:
            what = f"an image takes {size:,} bytes, more than FFCV's largest page"
            raise ConversionError(f"{what}: set --write.max_side")
        start = self._position
        if start % self._page_size + size > self._page_size:
            start = fmt.align_up(start, self._page_size)
            self._file.seek(start)  # leaves a hole of zeros
            self._checksums.add_zeros(start - self._position)
        self._position = start + size
        return start

    def finish(self, about: dict[str, Any]) -> np.ndarray:
        """Write the tables and, last, the header with `about`; then sync to the disk.

        Returns the crc32 of every block of the data pages, uint32 [blocks]. Without samples: a
        ConversionError.
        """
        count = self._count
        if not count:
            raise ConversionError("no image is left to write: all were skipped, or there were none")
        end = fmt.align_up(self._position, self._page_size)
        self._checksums.add_zeros(end - self._position)
        pages = self._page_size, self._start, end
        rows = self._allocations()
        write_tables(self._file, self._samples[:count], rows, pages, self._checksums, about)
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._checksums.table()

    def _allocations(self) -> Iterator[np.ndarray]:
        """The allocation table in parts, ALLOCATION: the whole would take 24 bytes per sample."""
        for start in range(0, self._count, TABLE_PART):
            part = slice(start, min(start + TABLE_PART, self._count))
            rows = np.empty(part.stop - start, fmt.ALLOCATION)
            rows["sample_id"] = np.arange(start, part.stop)
            rows["ptr"], rows["size"] = self._samples["image"]["data_ptr"][part], self._sizes[part]
            yield rows
