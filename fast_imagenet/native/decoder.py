"""Crops of JPEG or raw samples, decoded, resized and mirrored in C: decode.c says how."""

import ctypes
import importlib.util
import weakref
from pathlib import Path

import numpy as np

from . import LIBRARY

# Status of one sample, and the words for it; as in decode.c.
GOOD, WARNED, FAILED, OUTSIDE, WRONG_SIZE, NO_MEMORY, TOO_SHORT = range(7)
REASONS = {
    WARNED: "libturbojpeg repaired a damaged JPEG",
    FAILED: "libturbojpeg could not decode the JPEG",
    OUTSIDE: "its bytes do not lie inside the file",
    WRONG_SIZE: "its size differs from the size the file states for it",
    NO_MEMORY: "there is not enough memory to decode it",
    TOO_SHORT: "its bytes are too few for the size that it states",
}
METHODS = {"bilinear": 0, "bicubic": 1, "area": 2}  # as in resize.h


_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
LIBRARY.new_decoder.argtypes, LIBRARY.new_decoder.restype = [_POINTER], _POINTER
LIBRARY.free_decoder.argtypes = [_POINTER]
LIBRARY.decoder_bytes.argtypes, LIBRARY.decoder_bytes.restype = [_POINTER], _NUMBER
LIBRARY.decode_crops.argtypes = [_POINTER, _NUMBER, _NUMBER, *[_POINTER] * 4]


def _turbojpeg() -> ctypes.Array:
    """Functions that decode.c calls, in its order, of the libturbojpeg that FFCV is linked to.

    Raises: ImportError: one of the two is not there.
    """
    names = ("InitDecompress", "Destroy", "Decompress2", "GetErrorCode", "DecompressHeader3")
    ffcv = importlib.util.find_spec("ffcv")
    files = Path(ffcv.origin or "").parent.glob("_libffcv*.so") if ffcv else ()
    try:
        opened = ctypes.CDLL(str(next(iter(files))))
    except (StopIteration, OSError) as error:
        fix = "install ffcv and libturbojpeg, as `make setup` does"
        raise ImportError(f"FFCV's library is not there or not usable ({error}): {fix}") from error
    found = (ctypes.cast(getattr(opened, f"tj{name}"), ctypes.c_void_p) for name in names)
    return (ctypes.c_void_p * 5)(*(function.value for function in found))


_TURBO = _turbojpeg()


def batch_places(
    samples: np.ndarray,
    crops: np.ndarray,
    images_bhwc: np.ndarray,
    status: np.ndarray,
    *,
    method: str,
    reduced: bool,
    own: bool | str = True,
) -> tuple:
    """A batch as `Decoder.decode` takes it: addresses, found once for all threads and ranges.

    Args:
        samples: int64 [b, 5], columns address, size in bytes, mode (1: raw pixels, else JPEG),
            height, width. Address 0 marks a sample whose bytes lie outside the file.
        crops: int64 [b, 5], columns top, left, height, width, mirrored; inside the images.
        images_bhwc: uint8 [b, h, w, 3], written; black where a sample cannot be decoded.
        status: int64 [b], written: GOOD, or what went wrong.
        method: of METHODS.
        reduced: whether JPEG may be decoded at 1/2, 1/4 or 1/8 of its size.
        own: False: libturbojpeg decodes all; 'only': it decodes nothing, what we do not read has
            FAILED.
    All arrays are C-contiguous, and the caller keeps them alive. Nothing is checked here.
    """
    height, width = images_bhwc.shape[1:3]
    options = (height, width, METHODS[method], reduced, 2 if own == "only" else int(own))
    output = (_NUMBER * 6)(images_bhwc.ctypes.data, *options)
    return samples.ctypes.data, crops.ctypes.data, output, status.ctypes.data


class Decoder:
    """Decoder and buffers of one thread: it grows to what its largest sample needs.

    Raises: MemoryError: none can be made.
    """

    def __init__(self) -> None:
        self._handle = LIBRARY.new_decoder(_TURBO)
        if not self._handle:
            raise MemoryError("there is no memory for a decoder")
        # not at the end of the process: a loader's thread may still be decoding then
        weakref.finalize(self, LIBRARY.free_decoder, self._handle).atexit = False

    @property
    def bytes(self) -> int:
        """What it holds now; the memory of libturbojpeg's handle is not in it."""
        return LIBRARY.decoder_bytes(self._handle)

    def decode(self, first: int, end: int, batch: tuple) -> None:
        """Decode, crop, resize and mirror samples `first` to `end` - 1 of a `batch_places`."""
        LIBRARY.decode_crops(self._handle, first, end, *batch)


def decode_whole(
    data: bytes, size_hw: tuple[int, int], own: bool | str = True
) -> tuple[np.ndarray, int]:
    """Pixels of a JPEG of this size, uint8 RGB [height, width, 3], and its status; own: as above.

    Raises: MemoryError: there is none for a decoder.
    """
    stored, status = np.frombuffer(data, np.uint8), np.zeros(1, np.int64)
    rgb_bhwc = np.empty((1, *size_hw, 3), np.uint8)
    samples = np.array([[stored.ctypes.data, stored.size, 0, *size_hw]], np.int64)
    crops = np.array([[0, 0, *size_hw, 0]], np.int64)
    arrays = samples, crops, rgb_bhwc, status
    Decoder().decode(0, 1, batch_places(*arrays, method="bilinear", reduced=False, own=own))
    return rgb_bhwc[0], int(status[0])
