"""Whether the disk and /dev/shm have room for a conversion: checked before the first byte.

The size of a file is estimated from its first images, which are a random sample, as the order is
shuffled. They are encoded anyway, so the estimate costs nothing.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.encode import Chunk

SHM = Path("/dev/shm")
LOCK_BYTES = 64 << 10  # a dozen semaphores of one page each; multiprocessing makes fewer
SURE = 3  # the size may be this many standard errors below the estimate and still be refused
SMALLER = (
    "choose another --write.folder, or make the file smaller with --write.max_side,"
    " --write.quality or --write.limit"
)
IGNORE = "or ignore the estimate with --write.check_space=false"


def estimate_file(chunks: Sequence[Chunk], count: int) -> tuple[float, float]:
    """Bytes that a file of `count` images will probably take, and a safe lower bound.

    Args:
        chunks: its first images, encoded; the fraction that was skipped is extrapolated.
        count: number of images, skipped ones included.
    """
    images = [image for chunk in chunks for image in chunk.images]
    sizes = np.array([len(image.stored) for image in images], np.float64)
    seen = len(sizes) + sum(len(chunk.skipped) for chunk in chunks)
    if not len(sizes):
        return 0.0, 0.0
    expected = count * len(sizes) / seen
    unsure = 0 if seen >= count else SURE * sizes.std() / math.sqrt(len(sizes))
    mean = sizes.mean()
    return expected * (fmt.ROW_BYTES + mean), expected * (fmt.ROW_BYTES + max(0, mean - unsure))


def check_disk(path: Path, estimate: float, least: float, more: float = 0) -> str:
    """Refuse a file that its disk cannot hold.

    Args:
        path: its final name; the folder exists.
        estimate, least: bytes, from `estimate_file`.
        more: bytes of further files that will be written to the folder.

    Returns:
        A sentence with needed and free bytes.

    Raises:
        OSError: `least` and `more` are more than is free.
    """
    free = free_bytes(path.parent)
    after = f" and {_size(more)} for the files after it" if more else ""
    sentence = f"{path} needs about {_size(estimate)}{after}; {_size(free)} are free on its disk"
    if not estimate or least * (1 + more / estimate) <= free:
        return sentence
    raise OSError(f"{sentence}: free some, {SMALLER}, {IGNORE}")


def check_exact(path: Path, size: int) -> None:
    """Refuse a file of `size` bytes that its disk cannot hold: an OSError."""
    free = free_bytes(path.parent)
    if free < size:
        what = f"{path} needs {_size(size)} and {_size(free)} are free on its disk"
        raise OSError(f"{what}: free some, or choose another folder")


def check_shm(job_bytes: int) -> None:
    """Refuse to start workers where /dev/shm is too small for their locks: an OSError.

    A job that does not fit there goes to the folder of temporary files, as multiprocessing does it.
    """
    if not SHM.is_dir():
        return
    free = free_bytes(SHM)
    if free < LOCK_BYTES:
        raise OSError(f"{shm_sentence(LOCK_BYTES, free)}, {IGNORE}")
    spare = Path(tempfile.gettempdir())
    if max(free - LOCK_BYTES, free_bytes(spare)) < job_bytes:
        raise OSError(f"{shm_sentence(LOCK_BYTES + job_bytes, free)}, or free some in {spare}")


def shm_sentence(needed: int, free: int) -> str:
    """What is wrong with /dev/shm and how to fix it."""
    return (
        f"the workers need {_size(needed)} in /dev/shm and {_size(free)} are free: remove what"
        " ended programs have left there, enlarge it (docker run --shm-size=1g; Kubernetes: an"
        " emptyDir with medium Memory)"
    )


def fill_holes(file: BinaryIO) -> None:
    """Take memory for all of a file, where its disk is memory.

    A .beton begins with a hole. On a tmpfs, reading a hole through a map takes memory too, and
    where none is left the reader is ended by SIGBUS, without a message. On a full disk: an OSError.
    """
    file.flush()
    stat = os.fstat(file.fileno())
    if _is_tmpfs(stat.st_dev):
        os.posix_fallocate(file.fileno(), 0, stat.st_size)


def _is_tmpfs(device: int) -> bool:
    place = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    kinds = [line.rpartition(" - ")[2].split()[0] for line in mounts if line.split()[2] == place]
    return "tmpfs" in kinds


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user can still write below `folder`; quotas are not known here."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def _size(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1e3:,.1f} kB"
