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

import numpy as np

from . import LIBRARY

_POINTER, _NUMBER, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
LIBRARY.read_plain_header.argtypes = [_POINTER, _NUMBER, _POINTER]
LIBRARY.room_bytes.argtypes = [_POINTER, _NUMBER, _NUMBER, _NUMBER]
LIBRARY.write_anew.argtypes = [_POINTER, _POINTER, _NUMBER, _INT, _INT, _INT, _POINTER, _POINTER]
LIBRARY.room_bytes.restype = LIBRARY.write_anew.restype = _NUMBER


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


def read_header(data: bytes) -> Header | None:
    """The header of a plain JPEG, None for any other or a damaged one."""
    header = Header()
    return header if LIBRARY.read_plain_header(data, len(data), ctypes.byref(header)) else None


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
    Raises: ValueError: a size, the interval or `steps` is out of range.
    """
    width, height = size_wh
    if not (0 < width <= header.width and 0 < height <= header.height and 0 < interval < 65536):
        raise ValueError(f"{width} x {height}, interval {interval}: give 1 to the source's sides")
    if len(steps) != 128 or not all(steps):
        raise ValueError(f"{len(steps)} quantisers; give 2 x 64, from 1 to 255")
    place = ctypes.byref(header)
    room = np.empty(LIBRARY.room_bytes(place, *size_wh, len(data)), np.uint8)
    size = LIBRARY.write_anew(place, data, len(data), *size_wh, interval, steps, room.ctypes.data)
    return room[:size].tobytes() if size else None
