"""C functions that kernels call: of libturbojpeg, and two of libc.

Kernels name C functions through `numba.types.ExternalFunction`, so that they can be cached on disk
(a kernel that holds a ctypes pointer never is). The addresses behind the names are registered when
this file is imported; the names carry a prefix, so that a second libturbojpeg in the process (FFCV
links one, conda brings one) cannot be taken by mistake.
"""

import ctypes

import llvmlite.binding as llvm
from numba import types

from fast_imagenet.native.turbojpeg import load_turbojpeg

PIXELS_RGB = 0  # TJPF_RGB
ACCURATE_DCT = 4096  # TJFLAG_ACCURATEDCT: the transform every other decoder uses by default

_turbojpeg = load_turbojpeg()
_turbojpeg.tjInitDecompress.restype = ctypes.c_void_p
_turbojpeg.tjDestroy.argtypes = [ctypes.c_void_p]
_libc = ctypes.CDLL(None)


def _function(
    library: ctypes.CDLL, name: str, result: types.Type, *arguments: types.Type
) -> types.ExternalFunction:
    symbol = f"fast_imagenet_{name}"
    llvm.add_symbol(symbol, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return types.ExternalFunction(symbol, result(*arguments))


# int tjDecompress2(handle, jpeg, size, pixels, width, pitch, height, pixelFormat, flags)
_INT, _SIZE, _ADDRESS = types.int32, types.uint64, types.uintp
tj_decompress = _function(
    *(_turbojpeg, "tjDecompress2", _INT, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS),
    *(_INT, _INT, _INT, _INT, _INT),
)
tj_error_code = _function(_turbojpeg, "tjGetErrorCode", _INT, _ADDRESS)
memchr = _function(_libc, "memchr", _ADDRESS, _ADDRESS, _INT, _SIZE)
memcpy = _function(_libc, "memcpy", _ADDRESS, _ADDRESS, _ADDRESS, _SIZE)


def new_decoder() -> int:
    """A TurboJPEG decompressor handle. One per thread: it is not safe to share."""
    handle = _turbojpeg.tjInitDecompress()
    if not handle:
        raise MemoryError("libturbojpeg could not allocate a decompressor")
    return handle


def free_decoder(handle: int) -> None:
    """Give back a handle from `new_decoder`."""
    _turbojpeg.tjDestroy(handle)
