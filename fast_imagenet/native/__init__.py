"""The writer's C library: a plain JPEG written anew without the detour over RGB pixels.

    python -m fast_imagenet.native      builds it; `make setup` does so

An image that fits keeps its coefficients, rounded to the steps of the requested quality where its
own are finer. Chroma stored at full size becomes half size (4:2:0), by the mean of 2 x 2 pixels. A
larger image is decoded, shrunk by the mean over areas and encoded on the planes Y, Cb, Cr. All get
restart markers and one Huffman code fitted to photographs, so that an image is one pass.

Only plain files are taken: baseline, YCbCr, 4:4:4 or 4:2:0, one scan, no restart markers, nothing
unexpected. For any other, or where the library is not built, the answer is None, and the caller
decodes and encodes pixels.

Source: ITU-T T.81 (the format; annex K for quality 50).
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h")]))
# No multiply-add in one: the same numbers on every processor.
FLAGS = "-O3 -march=native -ffp-contract=off -fno-math-errno -fno-trapping-math -shared -fPIC"
NO_ROOM = -2  # as in recode.c


# ==== Build and load ==============================================================================


def _processor() -> str:
    """What the compiled code depends on: a shared folder may be seen by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return " ".join([platform.machine(), platform.system(), *features])


def built_file() -> Path:
    """Where the library of these sources for this processor is, or would be."""
    parts = [source.read_bytes() for source in SOURCES]
    key = hashlib.sha256(b"\0".join([*parts, FLAGS.encode(), _processor().encode()]))
    return Path(sys.prefix, "lib", "fast_imagenet", f"recode-{key.hexdigest()[:16]}.so")


def build() -> Path:
    """Compile the library. Returns its path.

    Raises: RuntimeError: no compiler, or one that does not know the flags; a folder that cannot be
        written.
    """
    path = built_file()
    compiler = os.environ.get("CC", "cc")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            command = [compiler, *FLAGS.split(), "-o", str(made), str(FOLDER / "recode.c")]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr.strip()}")
            made.replace(path)  # whole or not at all: other processes may be loading it
    except OSError as error:
        raise RuntimeError(f"{compiler} for {path}: {error}") from error
    return path


@functools.cache
def _library() -> ctypes.CDLL | None:
    if sys.byteorder != "little":
        return None
    try:
        library = ctypes.CDLL(str(built_file()))
    except OSError:
        return None
    for function in (library.memory_bytes, library.write_anew):
        function.restype = ctypes.c_int64
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.read_header.argtypes = [pointer, number, pointer]
    library.memory_bytes.argtypes = [pointer, number, number, number]
    small = [ctypes.c_int] * 3
    library.write_anew.argtypes = [*(pointer, pointer, number), *small, *[pointer] * 3, number]
    return library


def ensure() -> str:
    """Build the library where it is missing. Returns why that failed, or nothing."""
    if _library() is None:
        _library.cache_clear()
        try:
            build()
        except RuntimeError as error:
            return str(error)
    return ""


# ==== Use =========================================================================================


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
    )


class _Room(threading.local):
    """Memory of one thread for the largest image so far: fresh memory would cost page faults."""

    def __init__(self) -> None:
        self.memory = self.out = np.zeros(0, np.uint8)


_ROOM = _Room()


def read_header(data: bytes) -> Header | None:
    """The header of a plain JPEG, None for any other or a damaged one, or without the library."""
    library, header = _library(), Header()
    if library is None or not library.read_header(data, len(data), ctypes.byref(header)):
        return None
    return header


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
    library: Any = _library()
    need = library.memory_bytes(ctypes.byref(header), *size_wh, len(data))
    if len(_ROOM.memory) < need:
        _ROOM.memory = np.zeros(need + need // 4, np.uint8)
    if len(_ROOM.out) < 2 * len(data) + (1 << 16):
        _ROOM.out = np.empty(4 * len(data) + (1 << 16), np.uint8)
    while True:
        memory, out = _ROOM.memory, _ROOM.out
        size = library.write_anew(
            *(ctypes.byref(header), data, len(data), *size_wh, interval, steps),
            *(memory.ctypes.data, out.ctypes.data, len(out)),
        )
        if size != NO_ROOM:
            return out[:size].tobytes() if size > 0 else None
        _ROOM.out = np.empty(2 * len(out), np.uint8)
