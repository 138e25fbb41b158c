"""Memory by address and LLVM vectors: what the kernels use that numba does not offer itself.

Reads and writes go through plain addresses and check nothing: a kernel that uses them checks its
own bounds. They are needed besides speed: FFCV marks numba's one-dimensional uint8 array type
read-only for the whole process as soon as a Loader exists.
"""

import ctypes
from collections.abc import Iterable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

BYTE, INT32, FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()


# ==== Building blocks of intrinsics ===============================================================


def vector(kind: ir.Type, count: int) -> ir.VectorType:
    """`count` lanes of one type."""
    return ir.VectorType(kind, count)


def offset(builder: Any, address: Any, amount: int) -> Any:
    """An address some bytes further."""
    return builder.add(address, address.type(amount))


def load(builder: Any, address: Any, kind: ir.Type, align: int = 1) -> Any:
    """A value of `kind` at an address."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def store(builder: Any, value: Any, address: Any, align: int = 1) -> None:
    """Write a value to an address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def splat(builder: Any, scalar: Any, count: int) -> Any:
    """A vector of equal lanes."""
    nothing = ir.Constant(vector(scalar.type, count), ir.Undefined)
    one = builder.insert_element(nothing, scalar, INT32(0))
    return shuffle(builder, one, nothing, [0] * count)


def constant(kind: ir.VectorType, value: float) -> Any:
    """A vector of equal numbers."""
    return ir.Constant(kind, [value] * kind.count)


def shuffle(builder: Any, first: Any, second: Any, order: Iterable[int]) -> Any:
    """Lanes of first and second, numbered one after the other, in the order given."""
    lanes = list(order)
    return builder.shuffle_vector(first, second, ir.Constant(vector(INT32, len(lanes)), lanes))


# ==== Memory ======================================================================================


def _reader(result: types.Type, bits: int) -> Any:
    """An intrinsic (address, uintp) -> the number of `bits` bits there."""

    @intrinsic
    def read(typing_context, address):
        def generate(context, builder, signature, arguments):
            return load(builder, arguments[0], ir.IntType(bits))

        return result(types.uintp), generate

    return read


def _writer(given: types.Type) -> Any:
    """An intrinsic (address, uintp; value) that writes the value."""

    @intrinsic
    def write(typing_context, address, value):
        def generate(context, builder, signature, arguments):
            store(builder, arguments[1], arguments[0])
            return context.get_dummy_value()

        return types.void(types.uintp, given), generate

    return write


load_byte, store_byte = _reader(types.uint8, 8), _writer(types.uint8)
# One RGB pixel, and a byte of the next.
load_pixel, store_pixel = _reader(types.uint32, 32), _writer(types.uint32)
# A name, not a ctypes pointer: a kernel that holds one is never cached on disk.
llvm.add_symbol(
    "fast_imagenet_memcpy", ctypes.cast(ctypes.CDLL(None).memcpy, ctypes.c_void_p).value
)
# (target, source, bytes) -> target
memcpy = types.ExternalFunction(
    "fast_imagenet_memcpy", types.uintp(types.uintp, types.uintp, types.uint64)
)
