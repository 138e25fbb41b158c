"""The writer's C library: built on this machine, loaded with ctypes, never required.

    python -m fast_imagenet.jpeg_native      builds it; `make setup` does so

`recode` gives the bytes of `jpeg_recode.recode` in two thirds of the time and without numba;
`shrink` decodes, shrinks and encodes in one call. Where there is no compiler, no jpeglib.h or the
library was built for another processor, `is_there` is False and the writer takes the ways in
Python.
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

import numpy as np

from fast_imagenet.jpeg_header import ZIGZAG, M, file_head, new_steps, read_header

SOURCES = tuple(Path(__file__).parent / "beton" / name for name in ("recode.c", "shrink.c"))
# No multiply-add in one: jpeg_recode.py's numbers, on every processor.
FLAGS = "-O3 -march=native -ffp-contract=off -fno-math-errno -fno-trapping-math -shared -fPIC"
BLOCK_TOKENS = 64
LANES, PLANES = 32, 11  # as in recode.c
END_OF_PICTURE = b"\xff\xd9"


# ------------------------------------------------------------------------------------------------
# Build and load
# ------------------------------------------------------------------------------------------------


def _processor() -> str:
    """What the compiled code depends on: a shared folder may be seen by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return " ".join([platform.machine(), platform.system(), *features])


def library_path() -> Path:
    """Where the library of these sources for this processor is, or would be."""
    parts = [source.read_bytes() for source in SOURCES if source.exists()]
    key = hashlib.sha256(b"\0".join([*parts, FLAGS.encode(), _processor().encode()]))
    return Path(sys.prefix, "lib", "fast_imagenet", f"jpeg-{key.hexdigest()[:16]}.so")


def build() -> Path:
    """Compile the library. Returns its path.

    Raises: RuntimeError: no compiler, no jpeglib.h, or a compiler that does not know the flags.
    """
    path = library_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, "jpeg.so")
        prefix = [f"-I{sys.prefix}/include", f"-L{sys.prefix}/lib"]  # conda's place
        command = [os.environ.get("CC", "cc"), *FLAGS.split(), *prefix, "-o", str(made)]
        command += [*map(str, SOURCES), "-ljpeg", "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"{command[0]} does not run ({error}): install a compiler") from None
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr.strip()}")
        made.replace(path)  # whole or not at all: other processes may be loading it
    return path


@functools.cache
def _library() -> ctypes.CDLL | None:
    if sys.byteorder != "little" or os.environ.get("FAST_IMAGENET_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(library_path()))
    except OSError:
        return None
    library.recode_scan.restype = library.shrink_jpeg.restype = ctypes.c_int64
    return library


def is_there() -> bool:
    """Whether the library can be used; FAST_IMAGENET_NATIVE=0 in the environment turns it off."""
    return _library() is not None


# ------------------------------------------------------------------------------------------------
# Use
# ------------------------------------------------------------------------------------------------


def _fields(kind, names: str) -> list[tuple]:
    return [(name, kind) for name in names.split()]


class _RecodeJob(ctypes.Structure):
    """`Job` of recode.c."""

    _fields_ = (
        _fields(ctypes.c_int64, "width height halved interval size room")
        + _fields(ctypes.c_void_p, "scan codes scales steps shrink zigzag firsts spans tokens")
        + _fields(ctypes.c_void_p, "space clean out segments segment_sizes")
        + _fields(ctypes.c_int32 * 1024, "hits")
    )


class _ShrinkJob(ctypes.Structure):
    """`Job` of shrink.c."""

    _fields_ = _fields(ctypes.c_int64, "width height interval size room") + _fields(
        ctypes.c_void_p, "data steps zigzag out"
    )


class _Room(threading.local):
    """Arrays of one thread for the largest picture so far: fresh memory would cost page faults."""

    def __init__(self):
        self.arrays = {}

    def take(self, name: str, size: int, kind) -> np.ndarray:
        array = self.arrays.get(name)
        if array is None or len(array) < size:
            array = self.arrays[name] = np.empty(size, kind)
        return array


_ROOM = _Room()


def recode(data: bytes, interval: int, steps: np.ndarray) -> bytes | None:
    """As `jpeg_recode.recode`, with the same bytes; steps must be given."""
    header = read_header(data)
    if header is None or not data.endswith(END_OF_PICTURE):
        return None
    old, wanted = header.steps.astype(np.float32), new_steps(header, steps)
    if old.min() < 1 or (header.halved and (old[1] != old[2]).any()):
        return None
    scales = old / wanted[[0, 1, 1]]
    if not header.halved:
        scales[1:] = 1 / wanted[1]
    stored = np.frombuffer(data, np.uint8)
    codes = np.frombuffer(b"".join(code.ljust(272, b"\0") for code in header.codes), np.uint8)
    segments, sizes = np.zeros((4, 272), np.uint8), np.zeros(4, np.int32)
    job = _RecodeJob(header.width, header.height, header.halved, interval)
    job.size = len(data) - header.scan - len(END_OF_PICTURE)
    job.scan = stored.ctypes.data + header.scan
    given = dict(codes=codes, scales=scales, steps=old, shrink=M, zigzag=ZIGZAG)
    given |= dict(segments=segments, segment_sizes=sizes, **_work_arrays(header, job.size))
    for name, array in given.items():
        setattr(job, name, array.ctypes.data)
    size, out = _run_recode(job, 2 * len(data) + (1 << 16))
    if size < 0:
        return None
    names = enumerate((0x00, 0x10, 0x01, 0x11))
    parts = [bytes([name]) + segments[i, : sizes[i]].tobytes() for i, name in names]
    return file_head(header, wanted, interval, parts) + out[:size].tobytes()


def _work_arrays(header, size: int) -> dict[str, np.ndarray]:
    rows, columns = -(-header.height // 16), -(-header.width // 16)
    blocks = 6 * rows * columns
    space = _ROOM.take("space", -(-columns // LANES) * PLANES * 64 * LANES, np.float32)
    space[:] = 0
    return {
        "firsts": _ROOM.take("firsts", blocks, np.int32),
        "spans": _ROOM.take("spans", 2 * blocks, np.int32),
        "tokens": _ROOM.take("tokens", blocks * BLOCK_TOKENS + 1, np.uint32),
        "clean": _ROOM.take("clean", size + 4096 + 64, np.uint8),
        "space": space,
    }


def _run_recode(job: _RecodeJob, room: int) -> tuple[int, np.ndarray]:
    """Bytes written and where to; below 0: damaged."""
    while True:
        out = _ROOM.take("out", room, np.uint8)
        job.out, job.room = out.ctypes.data, len(out)
        size = _library().recode_scan(ctypes.byref(job))
        if size >= -1:
            return size, out
        room = -size
        ctypes.memset(job.hits, 0, ctypes.sizeof(job.hits))
        _ROOM.arrays["space"][:] = 0


def shrink(data: bytes, size_wh: tuple[int, int], interval: int, steps: np.ndarray) -> bytes | None:
    """A plain JPEG smaller: each pixel is the mean of the area that it covers.

    Args:
        data: the file. size_wh: of the new picture, pixels, no side larger than the source's.
        interval: MCUs between restart markers. steps: quantisers, uint16 [2, 64], file order.
    Returns: a 4:2:0 JPEG, or None where the source is not plain or is damaged.
    """
    if read_header(data) is None:
        return None
    steps = np.ascontiguousarray(steps, np.uint16)
    out = _ROOM.take("out", 4 * (size_wh[0] + 16) * (size_wh[1] + 16) + (1 << 16), np.uint8)
    stored = np.frombuffer(data, np.uint8)
    job = _ShrinkJob(*size_wh, interval, len(data), len(out))
    job.data, job.steps, job.out = (array.ctypes.data for array in (stored, steps, out))
    job.zigzag = ZIGZAG.ctypes.data
    size = _library().shrink_jpeg(ctypes.byref(job))
    return None if size < 0 else out[:size].tobytes()


if __name__ == "__main__":
    try:
        build()
    except RuntimeError as error:
        sys.exit(f"the writer's C library was not built, the slower way is taken: {error}")
