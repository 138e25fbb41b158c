"""Memory by address and LLVM vectors: what the kernels use that numba does not offer itself.

Reads and writes go through plain addresses and check nothing: a kernel that uses them checks its
own bounds. They are needed besides speed: FFCV marks numba's one-dimensional uint8 array type
read-only for the whole process as soon as a Loader exists.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BYTE, INT32, INT64, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


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


def procedure(generate: Callable[[Any, Sequence[Any]], None], *arguments: types.Type) -> tuple:
    """What an intrinsic without a result returns: its signature and its code generator."""

    def run(context, builder, signature, values):
        generate(builder, values)
        return context.get_dummy_value()

    return types.void(*arguments), run


# ==== Memory ======================================================================================


def _reader(result: types.Type, bits: int, align: int, convert: Callable | None = None) -> Any:
    """An intrinsic (address, uintp) -> the number of `bits` bits there."""

    @intrinsic
    def read(typing_context, address):
        def generate(context, builder, signature, arguments):
            value = load(builder, arguments[0], ir.IntType(bits), align)
            return convert(builder, value) if convert else value

        return result(types.uintp), generate

    return read


def _writer(given: types.Type, bits: int, align: int) -> Any:
    """An intrinsic (address, uintp; value) that writes the low `bits` bits of the value."""

    @intrinsic
    def write(typing_context, address, value):
        def generate(builder, arguments):
            value = arguments[1]
            narrow = value if value.type.width == bits else builder.trunc(value, ir.IntType(bits))
            store(builder, narrow, arguments[0], align)

        return procedure(generate, types.uintp, given)

    return write


load_byte, store_byte = _reader(types.uint8, 8, 1), _writer(types.uint8, 8, 1)
# One RGB pixel, and a byte of the next.
load_pixel, store_pixel = _reader(types.uint32, 32, 1), _writer(types.uint32, 32, 1)
load_int32 = _reader(types.int64, 32, 4, lambda builder, value: builder.sext(value, INT64))
store_int32 = _writer(types.int64, 32, 4)
# Eight bytes, the first one highest.
load_bits = _reader(types.uint64, 64, 1, lambda builder, value: builder.bswap(value))


@intrinsic
def as_pointer(typing_context, address):
    """An address (uintp) as a void pointer, for `numba.carray`."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uintp), generate


# ==== Weighted sums of pixels =====================================================================

_LANES = vector(FLOAT, 8)  # R, G, B and one unused, of each of two rows


def _product(builder, rows, weights, step):
    """Neighbor `step` (an integer value) of both rows times its weight."""
    pixels = [builder.add(row, builder.mul(step, step.type(12))) for row in rows]
    quartets = [load(builder, pixel, vector(FLOAT, 4), 4) for pixel in pixels]
    weight = load(builder, builder.add(weights, builder.mul(step, step.type(4))), FLOAT, 4)
    colors = shuffle(builder, quartets[0], quartets[1], range(8))
    return builder.fmul(colors, splat(builder, weight, 8), flags=("contract",))


def _unrolled_sum(builder, rows, weights, taps):
    """The sum over a fixed number of taps, in two chains that do not wait for each other."""
    totals = []
    for k in range(taps):
        product = _product(builder, rows, weights, weights.type(k))
        if k < 2:
            totals.append(product)
        else:
            totals[k % 2] = builder.fadd(totals[k % 2], product, flags=("contract",))
    return builder.fadd(*totals)


def _weighted_sum(builder, rows, weights, pairs):
    """A loop over pairs of taps with two vectors of sums."""
    totals = [cgutils.alloca_once_value(builder, constant(_LANES, 0.0)) for _ in range(2)]
    with cgutils.for_range(builder, pairs) as loop:
        for k, total in enumerate(totals):
            step = builder.add(builder.mul(loop.index, loop.index.type(2)), loop.index.type(k))
            product = _product(builder, rows, weights, step)
            new = builder.fadd(builder.load(total), product, flags=("contract",))
            builder.store(new, total)
    return builder.fadd(*[builder.load(total) for total in totals])


def _to_bytes(builder, sums):
    """Round to nearest, clip to 0..255, narrow to uint8 (floor(x + 0.5), x >= -0.5 after clip)."""
    integers = vector(INT32, 8)
    whole = builder.fptosi(builder.fadd(sums, constant(_LANES, 0.5)), integers)
    for limit, sign in ((constant(integers, 0), "<"), (constant(integers, 255), ">")):
        whole = builder.select(builder.icmp_signed(sign, whole, limit), limit, whole)
    return builder.trunc(whole, vector(BYTE, 8))


def _weigher(taps: int) -> Any:
    """An intrinsic that weighs a fixed number of taps (0: any even number), unrolled."""

    @intrinsic
    def weigh_pixels(typing_context, row, other_row, weights, pairs, pixel, other_pixel):
        """Write an RGB pixel of two rows: the weighted sum of 2 * `pairs` neighbors in its row.

        Args: row, other_row: addresses of the first neighbors, three float32 each, readable four
            bytes beyond the last. weights: address of 2 * `pairs` float32, for both rows. pixel,
            other_pixel: addresses of the results, three uint8, rounded to nearest and clipped; a
            fourth byte behind them is overwritten.
        Source of the shape: the four-lane inner loop of SIMD image resizers, here for two rows at a
            time; written as LLVM vectors, because the compiler does not find it in scalar code.
        """

        def generate(builder, arguments):
            rows, (weights, pairs), pixels = arguments[:2], arguments[2:4], arguments[4:]
            if taps:
                sums = _unrolled_sum(builder, rows, weights, taps)
            else:
                sums = _weighted_sum(builder, rows, weights, pairs)
            levels = _to_bytes(builder, sums)
            for k, pixel in enumerate(pixels):
                store(builder, shuffle(builder, levels, levels, range(4 * k, 4 * k + 4)), pixel)

        return procedure(generate, *[types.uintp] * 3, types.int64, types.uintp, types.uintp)

    return weigh_pixels


weigh_2, weigh_4, weigh_6, weigh_any = _weigher(2), _weigher(4), _weigher(6), _weigher(0)
