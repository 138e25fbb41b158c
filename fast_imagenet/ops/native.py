"""A function of libc that kernels call.

Kernels name C functions through `numba.types.ExternalFunction`, so that they can be cached on disk
(a kernel that holds a ctypes pointer never is). The address behind the name is registered when
this file is imported.
"""

import ctypes

import llvmlite.binding as llvm
from numba import types

_NAME = "fast_imagenet_memcpy"
llvm.add_symbol(_NAME, ctypes.cast(ctypes.CDLL(None).memcpy, ctypes.c_void_p).value)
# (target, source, bytes) -> target
memcpy = types.ExternalFunction(_NAME, types.uintp(types.uintp, types.uintp, types.uint64))
