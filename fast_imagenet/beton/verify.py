"""Check the images of a .beton file against its checksums: all at once, or as pages are read.

The structure, and the checksum of header and tables, are checked by `BetonFile` whenever a file is
opened. Here are the data pages.
"""

import zlib
from pathlib import Path

import numpy as np

from fast_imagenet.beton.reader import REMEDY, BetonError, BetonFile, sidecar_path

MAX_FINDINGS = 20  # sentences for one file; a file on a broken disk may have thousands


def verify(path: str | Path, full: bool = False) -> tuple[list[str], list[str]]:
    """Check a file.

    Args:
        path: the file.
        full: read every byte of it, too.

    Returns:
        Findings, each a reason to refuse the file, and notes on what could not be checked: one
        sentence each, with the remedy.
    """
    try:
        file = BetonFile(path)
        findings = _bad_blocks(file) if full and file.stamp else []
    except BetonError as error:
        return [str(error)], []
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror or error}): {REMEDY}"], []
    notes = [f"{path}: {note}"] if (note := file.fields.note()) else []
    if file.stamp is None:
        notes.append(
            f"{path} has no checksums (FFCV or an early version wrote it), so only its structure"
            " was checked: write it again with write_dataset.py to have them"
        )
    elif file.block_sums is None:
        notes.append(
            f"{sidecar_path(path)} is missing or early, so a damaged page cannot be named, nor"
            " found during training: copy it from where the file came"
        )
    return findings, notes


def _bad_blocks(file: BetonFile) -> list[str]:
    size, first = file.stamp["block_bytes"], file.stamp["first_block"]
    found = np.fromiter(_sums_of(file, first, file.data_end // size, size), np.uint32)
    if zlib.crc32(found.tobytes()) == file.stamp["blocks_crc32"]:
        return []
    if file.block_sums is None:
        return [f"{file.path} is damaged: the checksum of its images is wrong; {REMEDY}"]
    bad = np.flatnonzero(found != file.block_sums)
    findings = [_describe(file, int(block + first)) for block in bad[:MAX_FINDINGS]]
    if len(bad) > MAX_FINDINGS:
        more = f"{len(bad) - MAX_FINDINGS:,} more parts of it have wrong checksums"
        findings.append(f"{file.path} is damaged: {more}; {REMEDY}")
    return findings


def _sums_of(file: BetonFile, first: int, end: int, size: int):
    """The crc32 of blocks `first` to `end` - 1, read one after the other."""
    buffer = bytearray(size)
    with open(file.path, "rb", buffering=0) as stream:
        stream.seek(first * size)
        for _ in range(first, end):
            if stream.readinto(buffer) != size:
                raise BetonError(f"{file.path} has become shorter while it was read: {REMEDY}")
            yield zlib.crc32(buffer)


def _describe(file: BetonFile, block: int) -> str:
    """One sentence for one block whose sum is wrong."""
    size = file.stamp["block_bytes"]
    start, page = block * size, block * size // file.page_size
    last = file.offsets + file.sizes > start
    hit = np.flatnonzero(last & (file.offsets < start + size))
    samples = f"samples {hit.min()} to {hit.max()}" if len(hit) else "no samples"
    return (
        f"{file.path} is damaged: the checksum of page {page} ({samples}; bytes {start:,} to"
        f" {start + size - 1:,}) is wrong; {REMEDY}"
    )


class PageChecks:
    """Checks pages of a file as they are first read in training.

    Threads may share one: at worst a page is checked twice.

    Attributes:
        why_not: None, or why nothing can be checked, as one sentence with the remedy.

    Args:
        path: the file, or the BetonFile.

    Raises:
        BetonError: the file is damaged.
    """

    def __init__(self, path: str | Path | BetonFile):
        self._file = path if isinstance(path, BetonFile) else BetonFile(path)
        file = self._file
        self._is_checked = np.zeros(file.data_end // file.page_size, bool)
        self.why_not = None
        if file.block_sums is None:
            self.why_not = (
                f"the pages of {file.path} are not checked, as its checksums are missing: copy"
                f" {sidecar_path(file.path)}, or write it again with write_dataset.py"
            )

    def check(self, pages: np.ndarray) -> int:
        """Check those of `pages` that have not been checked before.

        About 0.3 ms of processor time a MB, and the reading where the page is not in memory.

        Args:
            pages: page numbers, integers: `offsets // page_size` of the samples to be read.

        Returns:
            Bytes that were read for it.

        Raises:
            BetonError: a sum is wrong; names the file, the page and the remedy.
        """
        if self.why_not:
            return 0
        pages = np.unique(pages)
        pages = pages[~self._is_checked[pages]]
        return sum(self._check_page(int(page)) for page in pages)

    def _check_page(self, page: int) -> int:
        file = self._file
        size, first = file.stamp["block_bytes"], file.stamp["first_block"]
        ratio = file.page_size // size
        blocks = range(max(page * ratio, first), (page + 1) * ratio)
        for block in blocks:
            stored = file.raw_bytes(block * size, size)
            if zlib.crc32(stored) != int(file.block_sums[block - first]):
                raise BetonError(_describe(file, block))
        self._is_checked[page] = True
        return len(blocks) * size
