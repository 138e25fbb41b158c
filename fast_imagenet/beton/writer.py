"""Write FFCV's file format: many processes encode, one writes, and the final name only ever holds a
complete file.

The samples are appended in order by one process, so that the bytes of the file do not depend on the
number of workers. The file grows under `<name>.partial-<pid>`, is checked, synced and then gets its
name (see output_lock.py); whatever goes wrong, the partial file is removed.

Stock FFCV's writer waits for ever when a worker raises or dies, and leaves a file that looks
complete; this one stops with the path of the image.
"""

import errno
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fast_imagenet import native as recode
from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.checksums import BlockSums, class_digest, table_to_text, write_tables
from fast_imagenet.beton.disk_space import SMALLER, check_disk, estimate_file, fill_holes
from fast_imagenet.beton.encode import Chunk, ConversionError, EncodeSettings
from fast_imagenet.beton.output_lock import check_held, claim, publish
from fast_imagenet.beton.pool import encoded
from fast_imagenet.beton.reader import BetonError, BetonFile, sidecar_path
from fast_imagenet.sources.base import Source, choose, shuffle
from fast_imagenet.sources.decode import CLIPPED
from fast_imagenet.terminal import readable

__all__ = ["ConversionError", "EncodeSettings", "write_beton"]

PAGE_SIZE = 8 << 20  # FFCV's default; it grows when an image is larger
PROBE = 4  # chunks encoded before the first byte is written, to estimate the size of the file
MAX_LISTED = 100  # names listed in the summary for each kind of odd file
SIDECAR_VERSION = 1


def write_beton(
    path: str | Path,
    source: Source,
    settings: EncodeSettings | None = None,
    *,
    limit: int = 0,
    workers: int = 0,
    overwrite: bool = False,
    page_size: int = PAGE_SIZE,
    progress: Callable[[int, int], None] | None = None,
    shard: tuple[int, int] = (0, 1),
    check_space: bool = True,
    later: int = 0,
    tell: Callable[[str], None] | None = None,
) -> dict:
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
        progress: called after every chunk with the numbers of new samples and of new bytes.
        shard: (number from 0, of how many): write only this part of the order; see merge.py.
        check_space: refuse when the disk or /dev/shm are clearly too small, before writing.
        later: images that will be written to the same folder after this file.
        tell: called with a sentence about needed and free bytes.

    Returns:
        The summary: see `summarise`.

    Raises:
        ConversionError: an image failed (the message begins with its path), or none is left.
        FileExistsError: `path` exists and `overwrite` is off, even if it has only appeared
            meanwhile; or another process is writing it.
        OSError: the disk refuses, because it is full or, by the estimate, will be.
    """
    path, settings, started = Path(path), settings or EncodeSettings(), time.perf_counter()
    missing = recode.ensure()
    path.parent.mkdir(parents=True, exist_ok=True)
    with claim(path, overwrite) as removed, partial_file(path, SMALLER) as partial:
        order = _order(source, settings, limit)
        indices, stamp = shard_of(order, *shard), _describe(source, settings, order, shard)
        with closing(encoded(source, indices, settings, workers, check_space)) as chunks:
            first = list(islice(chunks, PROBE))
            if check_space:
                _check_disk(path, first, len(indices), later, tell)
            everything = chain(first, chunks)
            totals = _write_pages(partial, everything, len(indices), stamp, page_size, progress)
        seconds = time.perf_counter() - started
        summary = summarise(BetonFile(partial), source, settings, totals, seconds)
        summary["file"] = readable(path.name)
        if shard[1] == 1:
            summary["notes"] += _all_skipped(source, indices, summary["counts"])
        if missing:
            summary["notes"].append(f"without the C library, images took longer: {missing}")
        if removed:
            names = ", ".join(readable(file.name) for file in removed)
            summary["notes"].append(f"removed what a killed conversion had left: {names}")
        write_summary(sidecar_path(partial), summary)
        check_held(path)
        publish(partial, path, overwrite)
    return summary


def _check_disk(path: Path, first: list[Chunk], count: int, later: int, tell) -> None:
    need, least = estimate_file(first, count)
    sentence = check_disk(path, need, least, need / count * later if later else 0)
    if tell:
        tell(sentence)


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
    if not file.stamp or any(file.stamp.get(key) != value for key, value in expected.items()):
        raise FileExistsError(
            f"{path} was written from other data or with other settings: remove it, choose another"
            " --write.folder, or allow --write.overwrite=true"
        )
    return bool(file.sidecar)


def _order(source: Source, settings: EncodeSettings, limit: int) -> np.ndarray:
    chosen = choose(source.labels, limit, settings.seed)
    return shuffle(chosen, source.blocks, settings.seed)


def shard_of(order: np.ndarray, number: int, count: int) -> np.ndarray:
    """Part `number` of `count`: consecutive, so that the parts in turn are the whole order."""
    return order[len(order) * number // count : len(order) * (number + 1) // count]


@contextmanager
def partial_file(path: Path, fix: str) -> Iterator[Path]:
    """Name of the growing file; it and its summary are gone at the end, whatever happens.

    Args:
        path: the final name.
        fix: what to do about a full disk, besides freeing some space.

    Raises:
        OSError: a full disk, as one sentence that says how far the file had come.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        # blocks, not the length: the file begins with a hole
        written = partial.stat().st_blocks * 512 if partial.exists() else 0
        raise OSError(
            f"{path}: {error.strerror} after {written / 1e6:,.1f} MB (the unfinished file was"
            f" removed): free some space, {fix}"
        ) from error
    finally:
        for leftover in (partial, sidecar_path(partial)):
            leftover.unlink(missing_ok=True)


def _write_pages(
    partial: Path,
    chunks: Iterator[Chunk],
    capacity: int,
    stamp: dict,
    page_size: int,
    progress: Callable[[int, int], None] | None,
) -> "Totals":
    """Write the whole file under its partial name; returns what the chunks reported."""
    totals = Totals()
    with open(partial, "wb", buffering=1 << 20) as file:
        pages = PageFile(file, capacity, page_size)
        for chunk in chunks:
            pages.append(chunk)
            totals.add(chunk)
            if progress:
                progress(len(chunk.sizes) + len(chunk.skipped), sum(chunk.sizes))
        totals.blocks = pages.finish(stamp)
        fill_holes(file)
    return totals


# ------------------------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------------------------


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

    def __init__(self, file: BinaryIO, capacity: int, page_size: int):
        self._file = file
        self._samples = np.zeros(capacity, fmt.SAMPLE)
        self._allocations = np.zeros(capacity, fmt.ALLOCATION)
        self._page_size = page_size
        self._count = 0
        self._start = fmt.align_up(fmt.METADATA_START + self._samples.nbytes, page_size)
        self._position = self._start
        self._sums = BlockSums(page_size)
        file.seek(self._position)

    def append(self, chunk: Chunk) -> None:
        """Add the images of `chunk`.

        Raises:
            ConversionError: an image larger than the largest page that FFCV knows (2 GiB).
        """
        for stored, size, mode, height, width, label in zip(
            *(chunk.payload, chunk.sizes, chunk.modes, chunk.heights, chunk.widths, chunk.labels),
            strict=True,
        ):
            pointer = self._place(size)
            self._file.write(stored)
            self._sums.add(stored)
            self._samples[self._count] = ((mode, width, height, pointer), label)
            self._allocations[self._count] = (self._count, pointer, size)
            self._count += 1

    def _place(self, size: int) -> int:
        """Where the next `size` bytes go: here if they fit into the page, else in the next one."""
        while size > self._page_size:
            self._page_size *= 2
        if self._page_size > fmt.MAX_PAGE_SIZE:
            raise ConversionError(
                f"an image takes {size:,} bytes, more than FFCV's largest page:"
                " set --write.max_side"
            )
        pointer = self._position
        if pointer % self._page_size + size > self._page_size:
            pointer = fmt.align_up(pointer, self._page_size)
            self._file.seek(pointer)  # leaves a hole of zeros
            self._sums.add_zeros(pointer - self._position)
        self._position = pointer + size
        return pointer

    def finish(self, stamp: dict) -> np.ndarray:
        """Write allocation table, metadata and, last, the header; then sync to the disk.

        Args:
            stamp: for the header, besides counts and sums.

        Returns:
            The crc32 of every block of the data pages, uint32 [blocks].

        Raises:
            ConversionError: there are no samples.
        """
        count = self._count
        if not count:
            raise ConversionError(
                "no image is left to write: every one was skipped, or there were none"
            )
        end = fmt.align_up(self._position, self._page_size)
        self._sums.add_zeros(end - self._position)
        pages = self._page_size, self._start, end
        write_tables(
            self._file, self._samples[:count], self._allocations[:count], pages, self._sums, stamp
        )
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._sums.table()


def _describe(
    source: Source, settings: EncodeSettings, order: np.ndarray, shard: tuple[int, int]
) -> dict:
    """What a stamp says of a conversion: equal for all parts of one, but for `shard`."""
    return {
        "written_by": "fast-imagenet",
        "num_classes": len(source.classes),
        "classes_sha256": class_digest(source.classes),
        "names_sha256": class_digest(source.class_names or []),
        "settings": asdict(settings),
        "order_crc32": zlib.crc32(source.labels[order].tobytes(), zlib.crc32(order.tobytes())),
        "shard": list(shard),
    }


def write_summary(path: Path, summary: dict) -> None:
    """Write `summary` as JSON and sync it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------
# The summary
# ------------------------------------------------------------------------------------------------


class Totals:
    """What the chunks report besides samples: bytes read, odd files by kind, skipped files."""

    def __init__(self):
        self.source_bytes = 0
        self.odd_counts = Counter()
        self.odd_names = {}
        self.skipped = []
        self.blocks = np.zeros(0, np.uint32)  # the crc32 of every block, at the end

    def add(self, chunk: Chunk) -> None:
        """Add one chunk; of each kind of odd file only the first MAX_LISTED names are kept."""
        self.source_bytes += chunk.source_bytes
        self.skipped += [(readable(name), readable(reason)) for name, reason in chunk.skipped]
        for kind, name in chunk.odd:
            self.odd_counts[kind] += 1
            names = self.odd_names.setdefault(kind, [])
            if len(names) < MAX_LISTED:
                names.append(readable(name))


def _all_skipped(source: Source, indices: np.ndarray, counts: list[int]) -> list[str]:
    """A warning for the notes when every image of a class was left out."""
    wanted = np.bincount(source.labels[indices], minlength=len(counts))
    gone = [source.classes[label] for label in np.flatnonzero((wanted > 0) & (np.equal(counts, 0)))]
    if not gone:
        return []
    listed = ", ".join(gone[:5]) + (", ..." if len(gone) > 5 else "")
    return [f"warning: {len(gone)} classes have no image left, all were skipped: {listed}"]


CLIPPED_NOTE = "warning: 16-bit gray images became white wherever a value was above 255"


def _clipped(totals: Totals) -> list[str]:
    """A warning for the notes about images that Pillow's conversion leaves almost nothing of."""
    if not totals.odd_counts[CLIPPED]:
        return []
    count, first = totals.odd_counts[CLIPPED], totals.odd_names[CLIPPED][0]
    advice = "scale them to 8 bits first, value / 257"
    return [f"{CLIPPED_NOTE}, as with torchvision: {count:,}, the first is {first}; {advice}"]


def summarise(
    file: BetonFile, source: Source, settings: EncodeSettings, totals: Totals, seconds: float
) -> dict:
    """The summary of a written file, as it lies in the sidecar.

    Returns:
        sidecar_version, file (its name), format; num_samples, num_classes, classes, class_names
        (list or None), counts (samples per class, in the order of classes); source ({kind,
        read_bytes}); settings (EncodeSettings as a dictionary); file_bytes, image_bytes, page_size;
        modes ({'jpg': n, 'raw': n}); max_height, max_width (pixels); odd ({kind: {count, files}});
        skipped (list of {file, reason}); labels_crc32; blocks_crc32 (see checksums.py); seconds,
        images_per_second.
    """
    return {
        "sidecar_version": SIDECAR_VERSION,
        "file": file.path.name,
        "format": f"FFCV {fmt.FORMAT_VERSION}",
        "num_samples": file.num_samples,
        "num_classes": len(source.classes),
        "classes": source.classes,
        "class_names": source.class_names,
        "counts": np.bincount(file.labels, minlength=len(source.classes)).tolist(),
        "source": {"kind": source.kind, "read_bytes": totals.source_bytes},
        "settings": asdict(settings),
        "file_bytes": file.path.stat().st_size,
        "image_bytes": int(file.sizes.sum()),
        "page_size": file.page_size,
        "modes": {mode: int((file.modes == mode).sum()) for mode in fmt.MODE_NAMES},
        "max_height": int(file.heights.max()),
        "max_width": int(file.widths.max()),
        "odd": {
            kind: {"count": count, "files": totals.odd_names[kind]}
            for kind, count in sorted(totals.odd_counts.items())
        },
        "notes": [*source.notes, *_clipped(totals)],
        "skipped": [{"file": name, "reason": reason} for name, reason in totals.skipped],
        "labels_crc32": zlib.crc32(file.labels.tobytes()),
        "blocks_crc32": table_to_text(totals.blocks),
        "seconds": round(seconds, 3),
        "images_per_second": round(file.num_samples / max(seconds, 1e-9), 1),
    }
