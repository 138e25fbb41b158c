"""Check the images of a .beton file against its checksums: all at once, or as pages are read.

The structure, and the checksum of header and tables, are checked by `BetonFile` whenever a file is
opened. Here are the data pages.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fast_imagenet.beton.format import REMEDY
from fast_imagenet.beton.reader import BetonError, BetonFile, sidecar_path

MAX_FINDINGS = 20  # sentences for one file; a file on a broken disk may have thousands


class Verdict(NamedTuple):
    """Of a check: reasons to refuse the file, notes on what could not be checked, one sentence each
    with the fix; and what was checked and found good, in words."""

    findings: list[str]
    notes: list[str]
    checked: list[str]


def verify(path: str | Path, full: bool = False) -> Verdict:
    """Check a file; with `full` read every byte of it."""
    try:
        file = BetonFile(path)
        findings = _bad_blocks(file) if full and file.header_json else []
    except BetonError as error:
        return Verdict([str(error)], [], [])
    except OSError as error:
        finding = f"{path} cannot be read ({error.strerror or error}): {REMEDY}"
        return Verdict([finding], [], [])
    notes = [f"{path}: {note}"] if (note := file.fields.note()) else []
    checked = [f"the structure of {len(file):,} samples"]
    if not file.header_json:
        notes.append(
            f"{path} has no checksums (FFCV or an early version wrote it), so only its structure"
            " was checked: write it again with write_dataset.py to have them"
        )
        return Verdict(findings, notes, checked)
    checked.append("the checksum of header and tables")
    if full and not findings:
        checked.append(f"those of all pages, {file.data_end:,} bytes")
    if file.block_checksums is None:
        has = "has no checksums" if file.sidecar else "is missing"
        notes.append(
            f"{sidecar_path(path)} {has}, so a damaged page cannot be named, nor found during"
            " training: copy it from where the file came"
        )
    return Verdict(findings, notes, checked)


def _bad_blocks(file: BetonFile) -> list[str]:
    """A sentence for each block whose checksum is wrong, at most MAX_FINDINGS and one more."""
    found = np.fromiter(_crc_of_blocks(file), np.uint32)
    if zlib.crc32(found.tobytes()) == file.header_json["blocks_crc32"]:
        return []
    if file.block_checksums is None:
        return [f"{file.path} is damaged: the checksum of its images is wrong; {REMEDY}"]
    bad = np.flatnonzero(found != file.block_checksums)
    findings = [_describe(file, int(n) + file.first_block) for n in bad[:MAX_FINDINGS]]
    if len(bad) > MAX_FINDINGS:
        more = f"{len(bad) - MAX_FINDINGS:,} more parts of it have wrong checksums"
        findings.append(f"{file.path} is damaged: {more}; {REMEDY}")
    return findings


def _crc_of_blocks(file: BetonFile) -> Iterator[int]:
    size, first = file.block_bytes, file.first_block
    buffer = bytearray(size)
    with open(file.path, "rb", buffering=0) as stream:
        stream.seek(first * size)
        for _ in range(first, file.data_end // size):
            if stream.readinto(buffer) != size:
                raise BetonError(f"{file.path} has become shorter while it was read: {REMEDY}")
            yield zlib.crc32(buffer)


def _describe(file: BetonFile, block: int) -> str:
    """One sentence for one block whose checksum is wrong."""
    size, start = file.block_bytes, block * file.block_bytes
    hit = np.flatnonzero((file.offsets + file.sizes > start) & (file.offsets < start + size))
    samples = f"samples {hit.min()} to {hit.max()}" if len(hit) else "no samples"
    return (
        f"{file.path} is damaged: the checksum of page {start // file.page_size} ({samples}; bytes"
        f" {start:,} to {start + size - 1:,}) is wrong; {REMEDY}"
    )


class PageChecks:
    """Checks pages of a file as they are first read in training.

    Threads may share one: at worst a page is checked twice.

    Attributes:
        why_not: None, or why nothing can be checked, as one sentence with the fix.

    Raises:
        BetonError: the file is damaged.
    """

    def __init__(self, path: str | Path | BetonFile) -> None:
        self._file = file = path if isinstance(path, BetonFile) else BetonFile(path)
        self._is_checked = np.zeros(file.data_end // file.page_size, bool)
        self.why_not: str | None = None
        if file.block_checksums is None:
            self.why_not = (
                f"the pages of {file.path} are not checked, as its checksums are missing: copy"
                f" {sidecar_path(file.path)}, or write it again with write_dataset.py"
            )

    def check(self, pages: np.ndarray) -> int:
        """Check those of `pages` that have not been checked before.

        About 0.3 ms of processor time per MB, and the reading where the page is not in memory.

        Args:
            pages: page numbers, integers: `offsets // page_size` of the samples to be read.

        Returns the bytes that were read. Raises BetonError where a checksum is wrong.
        """
        if self.why_not:
            return 0
        pages = np.unique(pages)
        pages = pages[~self._is_checked[pages]]
        return sum(self._check_page(int(page)) for page in pages)

    def check_samples(self, samples: np.ndarray) -> None:
        """`check` the pages of samples, by their places in the file."""
        self.check(self._file.offsets[samples] // self._file.page_size)

    def _check_page(self, page: int) -> int:
        file, size, checksums = self._file, self._file.block_bytes, self._file.block_checksums
        ratio = file.page_size // size
        blocks = range(max(page * ratio, file.first_block), (page + 1) * ratio)
        for block in blocks:
            crc = zlib.crc32(file.data[block * size : (block + 1) * size].data)
            if checksums is None or crc != int(checksums[block - file.first_block]):
                raise BetonError(_describe(file, block))
        self._is_checked[page] = True
        return len(blocks) * size
