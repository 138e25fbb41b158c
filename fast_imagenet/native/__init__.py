"""The C library of the package: opened once, as compiled for this processor.

setup.py compiles the same sources into one library for each code path: `plain` for any processor,
on x86-64 also `avx2` and `avx512`. The fastest that is built and that this processor supports is
opened, or the one that the environment variable FAST_IMAGENET_NATIVE names.

Raises NativeLibraryError when imported: the library is not built, or was compiled from other
sources; the variable names an unknown path, or one that is not built or not supported; the machine
is big-endian.
"""

import ctypes
import functools
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from .sources import fingerprint, sources

FOLDER = Path(__file__).parent
PATHS = ("plain", "avx2", "avx512")  # from slow to fast: supported_path of library.c counts them
VARIABLE = "FAST_IMAGENET_NATIVE"
_BUILD = "run `make setup`, or `pip install -e .` in the folder of the sources"


class NativeLibraryError(ImportError):
    """No library can be used; the message names what is wrong and the fix."""


def built() -> list[str]:
    """The paths that are built, from slow to fast, this processor aside."""
    return [name for name in PATHS if _file(name).is_file()]


def supported() -> list[str]:
    """The paths that this processor can run, from slow to fast, built or not."""
    return list(PATHS[: _open("plain").supported_path() + 1])


def _file(name: str) -> Path:
    return FOLDER / f"_{name}{EXTENSION_SUFFIXES[0]}"


@functools.cache
def _open(name: str) -> ctypes.CDLL:
    try:
        opened = ctypes.CDLL(str(_file(name)))
    except OSError as error:
        raise NativeLibraryError(f"the native library is not built ({error}): {_BUILD}") from error
    opened.fingerprint.restype = ctypes.c_char_p
    # A wheel has no sources. Beside sources, its structures must be those that Python code fills.
    if sources(FOLDER) and opened.fingerprint() != fingerprint(FOLDER).encode():
        raise NativeLibraryError(
            f"{_file(name)} was compiled from other sources than those beside it: {_BUILD}"
        )
    return opened


def _choose() -> str:
    if sys.byteorder != "little":
        raise NativeLibraryError("this machine is big-endian; the library needs little-endian")
    allowed, there = supported(), built()
    fastest = [name for name in there if name in allowed][-1]
    wanted = os.environ.get(VARIABLE) or fastest
    if wanted in allowed and wanted in there:
        return wanted
    problem = f"it is not built, {_BUILD}"
    if wanted not in PATHS:
        problem = f"give one of {', '.join(PATHS)}"
    elif wanted not in allowed:
        problem = "this processor does not support it"
    raise NativeLibraryError(f"{VARIABLE} is {wanted!r}: {problem}, or unset it to use {fastest}")


IN_USE = _choose()  # the code path
LIBRARY = _open(IN_USE)  # all callers share its functions, and so their argument types
