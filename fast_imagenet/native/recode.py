"""A plain JPEG written anew without the detour over RGB pixels, in C.

An image that fits keeps its coefficients, rounded to the steps of the requested quality where its
own are finer. Chroma stored at full size becomes half size (4:2:0), by the mean of 2 x 2 pixels. A
larger image is decoded, shrunk by the mean over areas and encoded on the planes Y, Cb, Cr. All get
restart markers and one Huffman code fitted to photographs, so that an image is one pass.

Only plain files are taken: baseline, YCbCr, 4:4:4 or 4:2:0, one scan, no restart markers, nothing
unexpected. For any other the answer is None, and the caller decodes and encodes pixels.

Source: ITU-T T.81 (the format; annex K for quality 50).
"""

import ctypes
import threading
from typing import Any

import numpy as np

from . import library

NO_ROOM = -2  # as in recode.c


def _functions() -> Any:
    found: Any = library()
    for function in (found.memory_bytes, found.write_anew):
        function.restype = ctypes.c_int64
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.read_plain_header.argtypes = [pointer, number, pointer]
    found.memory_bytes.argtypes = [pointer, number, number, number]
    small = [ctypes.c_int] * 3
    found.write_anew.argtypes = [*(pointer, pointer, number), *small, *[pointer] * 3, number]
    return found


_LIBRARY = _functions()


class Header(ctypes.Structure):
    """What stands before the scan of a plain JPEG.

    Attributes: width, height: pixels. halved: whether chroma has half the size in both directions.
        has_exif: whether there is an APP1 segment. scan: where the scan's bytes begin.
        steps: quantisers of the three components in file order.
    """

    _fields_ = (
        *[(name, ctypes.c_int32) for name in ("width", "height", "halved", "has_exif", "scan")],
        ("steps", ctypes.c_uint8 * 64 * 3),
        ("codes", ctypes.c_uint8 * 272 * 6),
        ("others", ctypes.c_int32 * 11),  # as in header.h
    )


class _Room(threading.local):
    """Memory of one thread for the largest image so far: fresh memory would cost page faults."""

    def __init__(self) -> None:
        self.memory = self.out = np.zeros(0, np.uint8)


_ROOM = _Room()


def read_header(data: bytes) -> Header | None:
    """The header of a plain JPEG, None for any other or a damaged one."""
    header = Header()
    return header if _LIBRARY.read_plain_header(data, len(data), ctypes.byref(header)) else None


def write_anew(
    header: Header, data: bytes, size_wh: tuple[int, int], interval: int, steps: bytes
) -> bytes | None:
    """A plain JPEG in 4:2:0 with restart markers.

    Args:
        header: of `data`, from `read_header`.
        data: the file.
        size_wh: of the new image, pixels; no side longer than the source's.
        interval: MCUs (16 x 16 px) between restart markers, 1 to 65535.
        steps: quantisers for luma and chroma in file order, 2 x 64 bytes, 1 to 255: where the
            source's are finer, its coefficients are rounded to these.
    Returns: the new file, or None where the source is damaged.
    """
    need = _LIBRARY.memory_bytes(ctypes.byref(header), *size_wh, len(data))
    if len(_ROOM.memory) < need:
        _ROOM.memory = np.zeros(need + need // 4, np.uint8)
    if len(_ROOM.out) < 2 * len(data) + (1 << 16):
        _ROOM.out = np.empty(4 * len(data) + (1 << 16), np.uint8)
    while True:
        memory, out = _ROOM.memory, _ROOM.out
        size = _LIBRARY.write_anew(
            *(ctypes.byref(header), data, len(data), *size_wh, interval, steps),
            *(memory.ctypes.data, out.ctypes.data, len(out)),
        )
        if size != NO_ROOM:
            return out[:size].tobytes() if size > 0 else None
        _ROOM.out = np.empty(2 * len(out), np.uint8)
