"""Vector code of the colour kernels: Pillow's blend on 16 pixels at a time.

The compiler does not find it in scalar loops over interleaved channels. LLVM translates it for
whatever processor it compiles for. Every float32 operation here is one that Pillow does too (none
is fused or reordered), or has an exact result, so pixels are equal bit for bit.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

PIXELS = 16  # of one block
_BYTES = ir.VectorType(ir.IntType(8), PIXELS)
_INTEGERS = ir.VectorType(ir.IntType(32), PIXELS)
_FLOATS = ir.VectorType(ir.FloatType(), PIXELS)
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # exact in float32, and so is every sum


def _constant(value):
    return ir.Constant(_FLOATS, [value] * PIXELS)


def _place(builder, address, offset, kind):
    return builder.inttoptr(builder.add(address, address.type(offset)), kind.as_pointer())


def _shuffle(builder, first, second, order):
    kind = ir.VectorType(ir.IntType(32), len(order))
    return builder.shuffle_vector(first, second, ir.Constant(kind, list(order)))


def _load_colors(builder, address):
    """Three float vectors, red, green and blue, from 48 interleaved bytes.

    Four pixels stand in each quarter of a vector: no byte has to leave its quarter. The last one is
    read with the four bytes before it, not with those behind, which may not be readable.
    """
    places, begins = (0, 12, 24, 32), (0, 0, 0, 4)
    quarters = [builder.load(_place(builder, address, at, _BYTES), align=1) for at in places]
    halves = [_shuffle(builder, *quarters[k : k + 2], range(32)) for k in (0, 2)]
    whole = _shuffle(builder, *halves, range(64))
    zeros, zero = ir.Constant(whole.type, [0] * 64), 64
    colors = []
    for c in range(3):
        order = []
        for quarter, begin in enumerate(begins):
            for pixel in range(4):
                order += [16 * quarter + begin + 3 * pixel + c, zero, zero, zero]
        channel = builder.bitcast(_shuffle(builder, whole, zeros, order), _INTEGERS)
        colors.append(builder.sitofp(channel, _FLOATS))
    return colors


def _store_colors(builder, colors, address):
    """Undo `_load_colors`; the values are whole numbers from 0 to 255."""
    word = None
    for c, color in enumerate(colors):
        channel = builder.fptosi(color, _INTEGERS)
        shifted = builder.shl(channel, ir.Constant(_INTEGERS, [8 * c] * PIXELS))
        word = shifted if word is None else builder.or_(word, shifted)
    word = builder.bitcast(word, ir.VectorType(ir.IntType(8), 64))
    inside = [4 * pixel + c for pixel in range(4) for c in range(3)]
    order = [16 * quarter + k for quarter in range(4) for k in (*inside, *inside[:4])]
    whole = _shuffle(builder, word, word, order)
    # The four bytes behind a quarter are overwritten by the next; behind the last are none.
    for at, begin, end in ((0, 0, 16), (12, 16, 32), (24, 32, 48), (36, 48, 56), (44, 56, 60)):
        part = _shuffle(builder, whole, whole, range(begin, end))
        builder.store(part, _place(builder, address, at, part.type), align=1)


def _call(builder, name, result, value):
    kind = ir.FunctionType(result, [value.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [value])


def _whole(builder, value):
    """Truncated towards zero."""
    return _call(builder, "llvm.trunc.v16f32", _FLOATS, value)


def _grey(builder, colors):
    total = _constant(0.5)
    for color, weight in zip(colors, _LUMA, strict=True):
        total = builder.fadd(total, builder.fmul(color, _constant(weight)))
    return _whole(builder, total)


def _clip(builder, value):
    # The flags make each one instruction (no value is NaN, the sign of zero does not matter).
    for limit, sign in ((_constant(0.0), ">"), (_constant(255.0), "<")):
        inside = builder.fcmp_ordered(sign, value, limit, flags=("nnan", "nsz"))
        value = builder.select(inside, value, limit, flags=("nnan", "nsz"))
    return value


def _splat(builder, scalar):
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.IntType(32)(0))
    zeros = ir.Constant(_INTEGERS, [0] * PIXELS)
    return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), zeros)


def _run_steps(builder, colors, program, steps):
    """Blend the colours `steps` times, see `blend_block`. Returns the new ones."""
    slots = [cgutils.alloca_once_value(builder, color) for color in colors]
    ground = cgutils.alloca_once(builder, _FLOATS)
    zero, one = ir.FloatType()(0.0), ir.FloatType()(1.0)
    with cgutils.for_range(builder, steps) as loop:
        row = builder.add(program, builder.mul(loop.index, loop.index.type(12)))
        use_grey, constant, factor = [
            builder.load(_place(builder, row, 4 * k, ir.FloatType())) for k in range(3)
        ]
        use_grey = builder.fcmp_ordered("!=", use_grey, zero)
        black = builder.and_(builder.not_(use_grey), builder.fcmp_ordered("==", constant, zero))
        factors = _splat(builder, factor)
        with builder.if_else(black) as (scale, mix):
            with scale:
                _change(builder, slots, lambda color: builder.fmul(color, factors))
            with mix:
                builder.store(_splat(builder, constant), ground)
                with builder.if_then(use_grey):
                    builder.store(_grey(builder, [builder.load(slot) for slot in slots]), ground)
                level = builder.load(ground)
                _change(builder, slots, lambda color: _mix(builder, level, color, factors))
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
                return ir.IntType(32)(0)
            levels = builder.fptosi(_grey(builder, colors), _INTEGERS)
            return _call(builder, "llvm.vector.reduce.add.v16i32", ir.IntType(32), levels)

        return types.int32(types.uintp, types.uintp, types.int64), generate

    return block


# (address of 16 pixels, address of the program, steps) -> int32.
# The program is float32 [steps, 3]: whether to blend with the pixel's grey value (not 0) or with
# the constant that follows, and the factor.
blend_block = _make_block(store=True, total=False)
blend_and_sum_block = _make_block(store=True, total=True)  # returns the sum of the new greys
sum_block = _make_block(store=False, total=True)  # returns that sum, changes nothing
