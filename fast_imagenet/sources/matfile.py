"""The one table that we need out of a MATLAB file: devkit/data/meta.mat of ILSVRC2012.

It maps ILSVRC2012_ID (1 to 1000 for the classes of the challenge) to WNID. Reading it takes scipy,
a large dependency for one table, or these lines.

Source: MathWorks, "MAT-File Format", level 5: an element is a type (uint32), a size in bytes
(uint32) and data padded to 8 bytes; small ones put type and size (uint16 each) and up to 4 bytes of
data into 8 bytes. Element 15 is a zlib stream of one element, element 14 an array.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

_DTYPES = dict(zip((1, 2, 3, 4, 5, 6, 7, 9, 12, 13), "bBhHiIfdqQ", strict=True))
_ENCODINGS = {16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4
_MAX_BYTES = 64 << 20


class MatError(ValueError):
    """The bytes are not a MATLAB file of level 5 with the expected table."""


def read_struct_array(data: bytes, name: str) -> list[dict[str, Any]]:
    """Rows of the struct array `name`: one dictionary per row, of numbers (numpy arrays) and texts.

    Fields that hold anything else are None.

    Raises:
        MatError: the file is damaged or has no such struct array.
    """
    if data[126:128] != b"IM":
        raise MatError("not a MATLAB file of level 5, little-endian")
    try:
        for kind, body in _elements(data[128:]):
            if kind == _COMPRESSED:
                ((kind, body),) = _elements(_inflate(body))
            found, value = _array(body) if kind == _MATRIX else ("", None)
            if found == name and isinstance(value, list):
                return value
    except (ValueError, IndexError, KeyError, zlib.error, UnicodeError) as error:
        raise MatError(f"damaged ({error})") from error
    raise MatError(f"holds no table {name!r}")


def _inflate(body: bytes) -> bytes:
    stream = zlib.decompressobj()
    inflated = stream.decompress(body, _MAX_BYTES)
    if not stream.eof:
        raise MatError(f"incomplete, or more than {_MAX_BYTES:,} bytes")
    return inflated


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and data of the elements, one after the other."""
    position = 0
    while position + 8 <= len(data):
        kind, size = np.frombuffer(data, "<u4", 2, position).tolist()
        start = position + 8
        if kind >> 16:  # small element
            kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
        if start + size > len(data):
            raise MatError("an element reaches beyond the end")
        yield kind, data[start : start + size]
        padded = size if kind == _COMPRESSED else -(-size // 8) * 8
        position = max(start + padded, position + 8) if start == position + 8 else position + 8


def _array(body: bytes) -> tuple[str, Any]:
    """Name and value of one array: numbers, text, a list of rows, or None for other classes."""
    parts = _elements(body)
    flags = np.frombuffer(next(parts, (0, b"\0\0\0\0"))[1], "<u4", 1)[0]
    shape = np.frombuffer(next(parts)[1], "<i4")
    name = next(parts)[1].decode("latin-1")
    kind = int(flags) & 0xFF
    if kind == _STRUCT:
        return name, _rows(parts, int(np.prod(shape)))
    if kind == _CELL:
        return name, None
    part_kind, part = next(parts)
    if kind == _CHAR and part_kind in _ENCODINGS:
        return name, part.decode(_ENCODINGS[part_kind])
    numbers = np.frombuffer(part, f"<{_DTYPES[part_kind]}")
    return name, "".join(map(chr, numbers.tolist())) if kind == _CHAR else numbers


def _rows(parts: Iterator[tuple[int, bytes]], count: int) -> list[dict[str, Any]]:
    length = int(np.frombuffer(next(parts)[1], "<i4")[0])
    packed = next(parts)[1]
    starts = range(0, len(packed), length)
    fields = [packed[i : i + length].split(b"\0")[0].decode("latin-1") for i in starts]
    values = [_array(body)[1] if body else None for _, body in parts]
    width = len(fields)
    if len(values) != count * width:
        raise MatError(f"{len(values)} values for {count} rows of {width} fields")
    rows = (values[row * width : (row + 1) * width] for row in range(count))
    return [dict(zip(fields, row, strict=True)) for row in rows]
