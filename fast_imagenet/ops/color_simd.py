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


def _gather(builder, parts, orders):
    """16 bytes picked from three vectors: order[i] is a lane of that part, or -1 for none."""
    zeros, result = ir.Constant(_BYTES, [0] * PIXELS), None
    for part, order in zip(parts, orders, strict=True):
        lanes = [PIXELS if lane < 0 else lane for lane in order]
        mask = ir.Constant(_INTEGERS, lanes)
        picked = builder.shuffle_vector(part, zeros, mask)
        result = picked if result is None else builder.or_(result, picked)
    return result


def _load_colors(builder, address):
    """Three float vectors, red, green and blue, from 48 interleaved bytes."""
    parts = [builder.load(_place(builder, address, 16 * k, _BYTES), align=1) for k in range(3)]
    colors = []
    for c in range(3):
        places = [3 * i + c for i in range(PIXELS)]
        orders = [[p - 16 * k if p // 16 == k else -1 for p in places] for k in range(3)]
        channel = builder.zext(_gather(builder, parts, orders), _INTEGERS)
        colors.append(builder.sitofp(channel, _FLOATS))
    return colors


def _store_colors(builder, colors, address):
    """Undo `_load_colors`; the values are whole numbers from 0 to 255."""
    channels = [builder.trunc(builder.fptosi(color, _INTEGERS), _BYTES) for color in colors]
    for k in range(3):
        places = range(16 * k, 16 * k + 16)
        orders = [[p // 3 if p % 3 == c else -1 for p in places] for c in range(3)]
        word = _gather(builder, channels, orders)
        builder.store(word, _place(builder, address, 16 * k, _BYTES), align=1)


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
