"""Vector code of the color kernels: Pillow's blend on 16 pixels at a time.

The compiler does not find it in scalar loops over interleaved channels. LLVM translates it for
whatever processor it compiles for. Every float32 operation here is one that Pillow does too (none
is fused or reordered), or has an exact result, so pixels are equal bit for bit.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import BYTE, FLOAT, INT32, constant, load, offset, shuffle, splat, store, vector

PIXELS = 16  # of one block
_BYTES, _INTEGERS, _FLOATS = (vector(kind, PIXELS) for kind in (BYTE, INT32, FLOAT))
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # exact in float32, and so is every sum


def _load_colors(builder, address):
    """Three float vectors, red, green and blue, from 48 interleaved bytes.

    Four pixels stand in each quarter of a vector: no byte has to leave its quarter. The last one is
    read with the four bytes before it, not with those behind, which may not be readable.
    """
    places, begins = (0, 12, 24, 32), (0, 0, 0, 4)
    quarters = [load(builder, offset(builder, address, at), _BYTES) for at in places]
    halves = [shuffle(builder, quarters[k], quarters[k + 1], range(32)) for k in (0, 2)]
    whole = shuffle(builder, halves[0], halves[1], range(64))
    zeros, zero = ir.Constant(whole.type, [0] * 64), 64
    colors = []
    for c in range(3):
        order = []
        for quarter, begin in enumerate(begins):
            for pixel in range(4):
                order += [16 * quarter + begin + 3 * pixel + c, zero, zero, zero]
        channel = builder.bitcast(shuffle(builder, whole, zeros, order), _INTEGERS)
        colors.append(builder.sitofp(channel, _FLOATS))
    return colors


def _store_colors(builder, colors, address):
    """Undo `_load_colors`; the values are whole numbers from 0 to 255."""
    word = None
    for c, color in enumerate(colors):
        channel = builder.fptosi(color, _INTEGERS)
        shifted = builder.shl(channel, constant(_INTEGERS, 8 * c))
        word = shifted if word is None else builder.or_(word, shifted)
    word = builder.bitcast(word, vector(BYTE, 64))
    inside = [4 * pixel + c for pixel in range(4) for c in range(3)]
    order = [16 * quarter + k for quarter in range(4) for k in (*inside, *inside[:4])]
    whole = shuffle(builder, word, word, order)
    # The four bytes behind a quarter are overwritten by the next; behind the last are none.
    for at, begin, end in ((0, 0, 16), (12, 16, 32), (24, 32, 48), (36, 48, 56), (44, 56, 60)):
        part = shuffle(builder, whole, whole, range(begin, end))
        store(builder, part, offset(builder, address, at))


def _call(builder, name, result, value):
    kind = ir.FunctionType(result, [value.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [value])


def _whole(builder, value):
    """Truncated towards zero."""
    return _call(builder, "llvm.trunc.v16f32", _FLOATS, value)


def _gray(builder, colors):
    total = constant(_FLOATS, 0.5)
    for color, weight in zip(colors, _LUMA, strict=True):
        total = builder.fadd(total, builder.fmul(color, constant(_FLOATS, weight)))
    return _whole(builder, total)


def _clip(builder, value):
    # The flags make each one instruction (no value is NaN, the sign of zero does not matter).
    for limit, sign in ((constant(_FLOATS, 0.0), ">"), (constant(_FLOATS, 255.0), "<")):
        inside = builder.fcmp_ordered(sign, value, limit, flags=("nnan", "nsz"))
        value = builder.select(inside, value, limit, flags=("nnan", "nsz"))
    return value


def _run_steps(builder, colors, program, steps):
    """Blend the colors `steps` times, see `blend_block`. Returns the new ones.

    Deep because every `with` is a block of the code that it generates.
    """
    slots = [cgutils.alloca_once_value(builder, color) for color in colors]
    ground = cgutils.alloca_once(builder, _FLOATS)
    zero, one = FLOAT(0.0), FLOAT(1.0)
    with cgutils.for_range(builder, steps) as loop:
        row = builder.add(program, builder.mul(loop.index, loop.index.type(12)))
        use_gray, level, factor = (
            load(builder, offset(builder, row, 4 * k), FLOAT, 4) for k in range(3)
        )
        use_gray = builder.fcmp_ordered("!=", use_gray, zero)
        black = builder.and_(builder.not_(use_gray), builder.fcmp_ordered("==", level, zero))
        factors = splat(builder, factor, PIXELS)
        with builder.if_else(black) as (scale, mix):
            with scale:
                _change(builder, slots, lambda color: builder.fmul(color, factors))
            with mix:
                builder.store(splat(builder, level, PIXELS), ground)
                with builder.if_then(use_gray):
                    builder.store(_gray(builder, [builder.load(slot) for slot in slots]), ground)
                base = builder.load(ground)
                _change(builder, slots, lambda color: _mix(builder, base, color, factors))
        with builder.if_then(builder.fcmp_ordered(">", factor, one)):
            _change(builder, slots, lambda color: _clip(builder, color))
        _change(builder, slots, lambda color: _whole(builder, color))
    return [builder.load(slot) for slot in slots]


def _mix(builder, degenerate, value, factors):
    return builder.fadd(degenerate, builder.fmul(factors, builder.fsub(value, degenerate)))


def _change(builder, slots, function):
    for slot in slots:
        builder.store(function(builder.load(slot)), slot)


def _make_block(store, total):
    @intrinsic
    def block(typing_context, pixels, program, steps):
        def generate(context, builder, signature, arguments):
            pixels, program, steps = arguments
            colors = _load_colors(builder, pixels)
            colors = _run_steps(builder, colors, program, steps)
            if store:
                _store_colors(builder, colors, pixels)
            if not total:
                return INT32(0)
            levels = builder.fptosi(_gray(builder, colors), _INTEGERS)
            return _call(builder, "llvm.vector.reduce.add.v16i32", INT32, levels)

        return types.int32(types.uintp, types.uintp, types.int64), generate

    return block


# (address of 16 pixels, address of the program, steps) -> int32.
# The program is float32 [steps, 3]: whether to blend with the pixel's gray value (not 0) or with
# the constant that follows, and the factor.
blend_block = _make_block(store=True, total=False)
blend_and_sum_block = _make_block(store=True, total=True)  # returns the sum of the new grays
sum_block = _make_block(store=False, total=True)  # returns that sum, changes nothing
