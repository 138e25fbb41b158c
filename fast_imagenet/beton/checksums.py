"""Checksums of a .beton file, and the stamp that holds them in bytes that FFCV never reads.

The stamp lies in the 1,024 bytes that a file's first field has for arguments: JSON, zeros, and in
the last four bytes the crc32 of all bytes outside the data pages (header, stamp, metadata, gap,
allocation table), counted with these four as zeros. The data pages are summed in blocks, the first
of which begins where they begin. The crc32 of every block is in the summary, `<file>.json`, as
eight hexadecimal digits each; the stamp has the crc32 of that table, so that a file without its
summary can still be checked as a whole.

A block is as large as the page size a file begins with: FFCV's pages are one block, or several.
"""

import hashlib
import json
import zlib
from typing import BinaryIO

import numpy as np

from fast_imagenet.beton import format as fmt

STAMP_VERSION = 1
_AREA_START = fmt.HEADER.itemsize + fmt.FIELD.fields["arguments"][1]
_AREA_END = _AREA_START + fmt.FIELD["arguments"].itemsize
_CRC_START = _AREA_END - 4
_NOTE_OF_EARLY_FILES = {"written_by", "num_classes", "classes_sha256"}  # they have no checksums
_NUMBERS = ("num_samples", "num_classes", "block_bytes", "first_block", "blocks_crc32")
_KEYS = {"classes_sha256", "settings", "order_crc32", "shard", *_NUMBERS}
_ZEROS = memoryview(bytes(1 << 20))


class StampError(ValueError):
    """The stamp or a sum is wrong; the message names the fault, without the file."""


def class_digest(classes: list[str]) -> str:
    """Hexadecimal sha256 of a class list, in the order of the labels."""
    return hashlib.sha256("\n".join(classes).encode("utf-8", "surrogatepass")).hexdigest()


# ------------------------------------------------------------------------------------------------
# Blocks
# ------------------------------------------------------------------------------------------------


class BlockSums:
    """The crc32 of every block of a stream of bytes, which comes in pieces of any size.

    Args:
        block_bytes: size of a block.
    """

    def __init__(self, block_bytes: int):
        self.block_bytes = block_bytes
        self._sums = []
        self._crc, self._filled = 0, 0

    def add(self, piece: memoryview) -> None:
        """Append the bytes of `piece`."""
        while len(piece):
            part = piece[: self.block_bytes - self._filled]
            self._crc = zlib.crc32(part, self._crc)
            self._filled += len(part)
            piece = piece[len(part) :]
            if self._filled == self.block_bytes:
                self._sums.append(self._crc)
                self._crc, self._filled = 0, 0

    def add_zeros(self, count: int) -> None:
        """Append `count` zero bytes: a hole in the file."""
        while count > 0:
            part = _ZEROS[:count]
            self.add(part)
            count -= len(part)

    def table(self) -> np.ndarray:
        """Sums of the complete blocks, uint32 [blocks]."""
        return np.array(self._sums, "<u4")


def table_to_text(sums: np.ndarray) -> str:
    """Eight hexadecimal digits a block, one after the other, as the summary holds them."""
    return sums.astype(">u4").tobytes().hex()


def table_from_text(text: str) -> np.ndarray:
    """The inverse of `table_to_text`: uint32 [blocks].

    Raises:
        ValueError: `text` is no such table.
    """
    return np.frombuffer(bytes.fromhex(text), ">u4").astype("<u4")


# ------------------------------------------------------------------------------------------------
# The stamp
# ------------------------------------------------------------------------------------------------


def write_tables(
    file: BinaryIO,
    samples: np.ndarray,
    allocations: np.ndarray,
    pages: tuple[int, int, int],
    sums: BlockSums,
    stamp: dict,
) -> None:
    """Write allocation table, metadata and, last, the stamped header.

    Args:
        file: open for binary writing, data pages written.
        samples: SAMPLE [n].
        allocations: ALLOCATION [n].
        pages: page size, first byte of the data pages, first byte after them.
        sums: of all data pages.
        stamp: what it says besides the counts and sums.

    Raises:
        ValueError: `stamp` is too long.
    """
    page_size, start, end = pages
    file.seek(end)
    file.write(allocations.tobytes())
    header, fields = np.zeros(1, fmt.HEADER), fmt.field_descriptors()
    header[0] = (fmt.FORMAT_VERSION, 2, page_size, len(samples), end)
    numbers = {
        "stamp": STAMP_VERSION,
        "num_samples": len(samples),
        "block_bytes": sums.block_bytes,
        "first_block": start // sums.block_bytes,
        "blocks_crc32": zlib.crc32(sums.table().tobytes()),
    }
    text = json.dumps({**stamp, **numbers}, separators=(",", ":")).encode("ascii")
    if len(text) > _CRC_START - _AREA_START:
        raise ValueError(f"a stamp of {len(text)} bytes does not fit into the header")
    fields[0]["arguments"][: len(text)] = np.frombuffer(text, np.uint8)
    head = bytearray(header.tobytes() + fields.tobytes() + samples.tobytes())
    crc = zlib.crc32(bytes(start - len(head)), zlib.crc32(head))
    crc = zlib.crc32(allocations.tobytes(), crc)
    head[_CRC_START:_AREA_END] = crc.to_bytes(4, "little")
    file.seek(0)
    file.write(head)


def read_class_note(data: np.ndarray) -> dict | None:
    """What an early file of ours, without checksums, says of its classes; None for other files.

    Raises:
        StampError: it is damaged.
    """
    note = _area_content(data)
    if not isinstance(note, dict) or set(note) != _NOTE_OF_EARLY_FILES:
        return None
    if type(note["num_classes"]) is not int or not isinstance(note["classes_sha256"], str):
        raise StampError("the note of its classes in the header is damaged")
    return note


def _area_content(data: np.ndarray):
    """The JSON in the arguments of the first field, an image; None where there is none.

    Raises:
        StampError: there are other bytes.
    """
    first = data[fmt.HEADER.itemsize : fmt.METADATA_START].view(fmt.FIELD)[0]
    if first["type_id"] != fmt.IMAGE_FIELD or not first["arguments"].any():
        return None
    try:
        return json.loads(data[_AREA_START : _AREA_END - 4].tobytes().rstrip(b"\0"))
    except (ValueError, RecursionError) as error:
        raise StampError("the stamp in its header is unreadable") from error


def read_stamp(data: np.ndarray, end: int) -> dict | None:
    """The stamp of a file whose structure is in order, checked against the bytes it covers.

    Args:
        data: the whole file, uint8.
        end: first byte after the data pages.

    Returns:
        None for a file without checksums: FFCV's own, or an early one of ours. Otherwise:
        stamp (version), written_by, num_samples, num_classes, classes_sha256, settings,
        order_crc32, shard ([number, of how many]), block_bytes, first_block, blocks_crc32; of
        newer files names_sha256, the `class_digest` of the readable names.

    Raises:
        StampError: the stamp, header, metadata or allocation table has changed.
    """
    stamp = _area_content(data)
    if stamp is None or (isinstance(stamp, dict) and set(stamp) == _NOTE_OF_EARLY_FILES):
        return None
    complete = isinstance(stamp, dict) and set(stamp) >= _KEYS
    if not complete or not all(type(stamp[key]) is int for key in _NUMBERS):
        raise StampError("the stamp in its header is incomplete")
    start = stamp["first_block"] * stamp["block_bytes"]
    whole_blocks = stamp["block_bytes"] > 0 and (end - start) % stamp["block_bytes"] == 0
    if not fmt.METADATA_START <= start <= end or not whole_blocks:
        raise StampError("the stamp in its header contradicts the pages")
    crc = zlib.crc32(bytes(4), zlib.crc32(data[:_CRC_START]))
    crc = zlib.crc32(data[end:], zlib.crc32(data[_AREA_END:start], crc))
    if crc != int.from_bytes(data[_AREA_END - 4 : _AREA_END].tobytes(), "little"):
        raise StampError("the checksum of its header and tables is wrong")
    if stamp.get("stamp") != STAMP_VERSION:
        raise StampError(f"its stamp has version {stamp.get('stamp')}, not {STAMP_VERSION}")
    return stamp
