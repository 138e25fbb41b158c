"""Checksums of a .beton file, and the JSON in its header that holds them, which FFCV never reads.

It lies in the 1,024 bytes that a file's first field has for arguments: JSON, zeros, and in the last
four bytes the crc32 of all bytes outside the data pages (header, metadata, gap, allocation table),
computed with these four as zeros. The data pages are divided into blocks, the first of which begins
where they begin. The crc32 of every block is in the summary, `<file>.json`, as eight hexadecimal
digits each; the header has the crc32 of that table, so that a file without its summary can still be
checked as a whole.

A block is as large as the page size that a file begins with: a page is one block, or several.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np

from fast_imagenet.beton import format as fmt

VERSION = 1
_AREA_END = fmt.HEADER.itemsize + fmt.FIELD.itemsize
_AREA_START = _AREA_END - fmt.ARGUMENT_BYTES
_CRC_START = _AREA_END - 4
_KEYS_OF_EARLY_FILES = {"written_by", "num_classes", "classes_sha256"}  # they have no checksums
_NUMBERS = ("num_samples", "num_classes", "block_bytes", "first_block", "blocks_crc32")
_KEYS = {"classes_sha256", "settings", "order_crc32", "shard", *_NUMBERS}
_ZEROS = memoryview(bytes(1 << 20))


def class_digest(classes: list[str]) -> str:
    """Hexadecimal sha256 of a class list, in the order of the labels."""
    return hashlib.sha256("\n".join(classes).encode("utf-8", "surrogatepass")).hexdigest()


class BlockChecksums:
    """The crc32 of every block of a stream of bytes, which comes in pieces of any size.

    Args:
        block_bytes: size of a block.
    """

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._complete: list[int] = []
        self._crc, self._filled = 0, 0

    def add(self, piece: bytes | memoryview) -> None:
        """Append the bytes of `piece`."""
        rest = memoryview(piece)
        while len(rest):
            part = rest[: self.block_bytes - self._filled]
            self._crc = zlib.crc32(part, self._crc)
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == self.block_bytes:
                self._complete.append(self._crc)
                self._crc, self._filled = 0, 0

    def add_zeros(self, count: int) -> None:
        """Append `count` zero bytes: a hole in the file."""
        for start in range(0, count, len(_ZEROS)):
            self.add(_ZEROS[: count - start])

    def table(self) -> np.ndarray:
        """Checksums of the complete blocks, uint32 [blocks]."""
        return np.array(self._complete, "<u4")


def table_to_text(table: np.ndarray) -> str:
    """Eight hexadecimal digits per block, one after the other, as the summary holds them."""
    return table.astype(">u4").tobytes().hex()


def table_from_text(text: str) -> np.ndarray:
    """The inverse of `table_to_text`: uint32 [blocks]; ValueError or TypeError for other text."""
    return np.frombuffer(bytes.fromhex(text), ">u4").astype("<u4")


def write_tables(
    file: BinaryIO,
    samples: np.ndarray,
    allocations: Iterable[np.ndarray],
    pages: tuple[int, int, int],
    checksums: BlockChecksums,
    about: dict[str, Any],
) -> None:
    """Write allocation table, metadata and, last, the header with its checksums.

    Args:
        file: open for binary writing, data pages written.
        samples: SAMPLE [n].
        allocations: ALLOCATION, n rows in any number of parts.
        pages: page size, first byte of the data pages, first byte after them.
        checksums: of all data pages.
        about: what the header holds besides the counts and checksums: see `read_header_json`.

    Raises:
        ValueError: `about` is too long.
    """
    page_size, start, end = pages
    header, fields = np.zeros(1, fmt.HEADER), fmt.field_descriptors()
    header[0] = (fmt.FORMAT_VERSION, 2, page_size, len(samples), end)
    numbers = {
        "stamp": VERSION,
        "num_samples": len(samples),
        "block_bytes": checksums.block_bytes,
        "first_block": start // checksums.block_bytes,
        "blocks_crc32": zlib.crc32(checksums.table().tobytes()),
    }
    text = json.dumps({**about, **numbers}, separators=(",", ":")).encode("ascii")
    if len(text) > _CRC_START - _AREA_START:
        raise ValueError(f"{len(text)} bytes of settings and checksums do not fit into the header")
    fields[0]["arguments"][: len(text)] = np.frombuffer(text, np.uint8)
    head, rows = bytearray(header.tobytes() + fields.tobytes()), samples.view(np.uint8).data
    crc = zlib.crc32(rows, zlib.crc32(head))
    crc = zlib.crc32(bytes(start - len(head) - len(rows)), crc)
    file.seek(end)
    for part in allocations:
        file.write(part.view(np.uint8).data)
        crc = zlib.crc32(part.view(np.uint8).data, crc)
    file.seek(len(head))
    file.write(rows)
    head[_CRC_START:_AREA_END] = crc.to_bytes(4, "little")
    file.seek(0)
    file.write(head)


def read_header_json(data: np.ndarray, end: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checksums of a file whose structure is in order, compared with the bytes they cover.

    Args:
        data: the whole file, uint8.
        end: first byte after the data pages.

    Returns:
        What the header holds, {} for a file without checksums (FFCV's own, or an early one of
        ours): stamp (version), written_by, num_samples, num_classes, classes_sha256, settings,
        order_crc32, shard ([number, of how many]), block_bytes, first_block, blocks_crc32; in newer
        files names_sha256, the `class_digest` of the readable names. And what it says of the
        classes, also in an early file (num_classes, classes_sha256); {} when nothing.

    Raises:
        FormatError: header, metadata or allocation table have changed.
    """
    about = _header_json(data)
    if about is None:
        return {}, {}
    if isinstance(about, dict) and set(about) == _KEYS_OF_EARLY_FILES:
        if type(about["num_classes"]) is int and isinstance(about["classes_sha256"], str):
            return {}, about
        raise fmt.damaged("the classes in its header are unreadable")
    complete = isinstance(about, dict) and set(about) >= _KEYS
    if not complete or not all(type(about[key]) is int for key in _NUMBERS):
        raise fmt.damaged("the checksums in its header are incomplete")
    start = about["first_block"] * about["block_bytes"]
    whole_blocks = about["block_bytes"] > 0 and (end - start) % about["block_bytes"] == 0
    if not fmt.METADATA_START <= start <= end or not whole_blocks:
        raise fmt.damaged("the checksums in its header contradict the pages")
    crc = zlib.crc32(bytes(4), zlib.crc32(data[:_CRC_START].data))
    crc = zlib.crc32(data[end:].data, zlib.crc32(data[_AREA_END:start].data, crc))
    if crc != int.from_bytes(data[_CRC_START:_AREA_END].tobytes(), "little"):
        raise fmt.damaged("the checksum of its header and tables is wrong")
    if about.get("stamp") != VERSION:
        raise fmt.damaged(f"its checksums are of version {about.get('stamp')}, not {VERSION}")
    return about, about


def _header_json(data: np.ndarray) -> Any:
    """The JSON in the arguments of the first field, an image; None where there is none."""
    first = data[fmt.HEADER.itemsize : fmt.METADATA_START].view(fmt.FIELD)[0]
    if first["type_id"] != fmt.IMAGE_FIELD or not first["arguments"].any():
        return None
    try:
        return json.loads(data[_AREA_START:_CRC_START].tobytes().rstrip(b"\0"))
    except (ValueError, RecursionError) as error:
        raise fmt.damaged("the checksums in its header are unreadable") from error
