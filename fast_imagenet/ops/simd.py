"""Vector kernels of the JPEG decoder, written as LLVM vectors: inverse transform and color.

The compiler does not find these in scalar loops. Nothing here is tied to one processor: LLVM
translates the vectors for whatever it compiles for. Results are bit-identical to libjpeg's accurate
integer transform (jidctint), its "fancy" chroma interpolation and its color conversion.

Source: libjpeg-turbo, jidctint.c, jdsample.c (h2v2_fancy_upsample), jdcolor.c; the transform is
Loeffler, Ligtenberg and Moschytz, ICASSP 1989.
"""

import functools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import BYTE, INT32, INT64, constant, load, offset, procedure, shuffle, store, vector


class Lanes:
    """A vector value with arithmetic, so that a kernel reads like its formula. int32 or int16."""

    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    def _binary(self, instruction, other):
        if not isinstance(other, Lanes):
            other = Lanes(self.builder, constant(self.value.type, other))
        return Lanes(self.builder, getattr(self.builder, instruction)(self.value, other.value))

    __add__ = functools.partialmethod(_binary, "add")
    __sub__ = functools.partialmethod(_binary, "sub")
    __mul__ = functools.partialmethod(_binary, "mul")
    __lshift__ = functools.partialmethod(_binary, "shl")
    __rshift__ = functools.partialmethod(_binary, "ashr")

    def widen(self):
        """int16 lanes as int32."""
        wide = vector(INT32, self.value.type.count)
        return Lanes(self.builder, self.builder.sext(self.value, wide))

    def narrow(self):
        """The low halves of int32 lanes, sign-extended: then a product is one instruction."""
        return (self << 16) >> 16

    def high_product(self, factor):
        """(int16 lanes * factor) >> 16, as int16 lanes: one instruction on most processors."""
        product = (self.widen() * factor) >> 16
        return Lanes(self.builder, self.builder.trunc(product.value, self.value.type))

    def shuffle(self, other, order):
        """Lanes of self and other, numbered one after the other, in the order given."""
        return Lanes(self.builder, shuffle(self.builder, self.value, other.value, order))

    def cast(self, bits, count):
        """The same memory as `count` lanes of `bits` bits."""
        kind = vector(ir.IntType(bits), count)
        return Lanes(self.builder, self.builder.bitcast(self.value, kind))

    def low(self, other, order):
        """Lanes of half the width: low halves of those of self and other, in the order given."""
        bits, count = self.value.type.element.width // 2, 2 * self.value.type.count
        first, second = self.cast(bits, count), other.cast(bits, count)
        return first.shuffle(second, [2 * lane for lane in order])

    def to_bytes(self):
        """Clipped to 0..255, as uint8 lanes."""
        narrow = vector(BYTE, self.value.type.count)
        return Lanes(self.builder, self.builder.trunc(self.clip().value, narrow))

    def clip(self):
        """Clipped to 0..255."""
        value, builder = self.value, self.builder
        for limit, sign in ((0, "<"), (255, ">")):
            bound = constant(value.type, limit)
            value = builder.select(builder.icmp_signed(sign, value, bound), bound, value)
        return Lanes(builder, value)


class Twins:
    """Two `Lanes` that go through a formula side by side."""

    def __init__(self, *both):
        self.both = both

    def _each(self, name, *others):
        results = []
        for k, lanes in enumerate(self.both):
            own = [other.both[k] if isinstance(other, Twins) else other for other in others]
            results.append(getattr(lanes, name)(*own))
        return Twins(*results)

    __add__ = functools.partialmethod(_each, "__add__")
    __sub__ = functools.partialmethod(_each, "__sub__")
    __mul__ = functools.partialmethod(_each, "__mul__")
    __lshift__ = functools.partialmethod(_each, "__lshift__")
    __rshift__ = functools.partialmethod(_each, "__rshift__")

    def __getattr__(self, name):
        return functools.partial(self._each, name)


def load_lanes(builder, address, count, bits, lane_bits=32):
    """`count` unsigned integers of `bits` bits (32: signed) at any address, as wider lanes."""
    value = load(builder, address, vector(ir.IntType(bits), count), bits // 8)
    if bits < lane_bits:
        value = builder.zext(value, vector(ir.IntType(lane_bits), count))
    return Lanes(builder, value)


def store_lanes(lanes, address):
    """Write the lanes to any address."""
    store(lanes.builder, lanes.value, address)


# ==== Inverse transform ===========================================================================


def _transform(x, shift, level=0, small=False):
    """One dimension of the inverse transform of eight vectors; `level` added, rounded and shifted.

    Args: small: whether any sum of four of the values fits 16 bits.
    """

    def product(lanes, factor):
        return (lanes.narrow() if small else lanes) * factor

    half = (level << shift) + (1 << (shift - 1))
    z = product(x[2] + x[6], 4433)
    even = [((x[0] + x[4]) << 13) + half, ((x[0] - x[4]) << 13) + half]
    even += [z - product(x[6], 15137), z + product(x[2], 6270)]
    outer = [even[0] + even[3], even[1] + even[2], even[1] - even[2], even[0] - even[3]]
    z1, z2 = product(x[7] + x[1], -7373), product(x[5] + x[3], -20995)
    z3, z4 = x[7] + x[3], x[5] + x[1]
    z5 = product(z3 + z4, 9633)
    z3, z4 = product(z3, -16069) + z5, product(z4, -3196) + z5
    odd = [
        product(x[1], 12299) + z1 + z4,
        product(x[3], 25172) + z2 + z3,
        product(x[5], 16819) + z2 + z4,
        product(x[7], 2446) + z1 + z3,
    ]
    low = [(a + b) >> shift for a, b in zip(outer, odd, strict=True)]
    high = [(a - b) >> shift for a, b in zip(outer, odd, strict=True)]
    return low + high[::-1]


def _transpose(rows):
    """Eight vectors of eight lanes, rows to columns."""
    pairs = []
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        pairs.append(a.shuffle(b, (0, 8, 1, 9, 4, 12, 5, 13)))
        pairs.append(a.shuffle(b, (2, 10, 3, 11, 6, 14, 7, 15)))
    fours = []
    for k in (0, 1, 4, 5):
        fours.append(pairs[k].shuffle(pairs[k + 2], (0, 1, 8, 9, 4, 5, 12, 13)))
        fours.append(pairs[k].shuffle(pairs[k + 2], (2, 3, 10, 11, 6, 7, 14, 15)))
    low = [fours[k].shuffle(fours[k + 4], (0, 1, 2, 3, 8, 9, 10, 11)) for k in range(4)]
    high = [fours[k].shuffle(fours[k + 4], (4, 5, 6, 7, 12, 13, 14, 15)) for k in range(4)]
    return low + high


@intrinsic
def transform_block(typing_context, block, pixels, pitch):
    """Inverse transform of one 8 x 8 block.

    Args: block: address of int32 [64], coefficients times quantisers, row by row. pixels: address
        of the first of eight rows of eight uint8, `pitch` bytes apart.
    """

    def generate(builder, arguments):
        block, pixels, pitch = arguments
        rows = [load_lanes(builder, offset(builder, block, 32 * k), 8, 32) for k in range(8)]
        columns = _transpose(_transform(rows, 11))
        for row in _transpose(_transform(columns, 18, 128)):
            store_lanes(row.to_bytes(), pixels)
            pixels = builder.add(pixels, pitch)

    return procedure(generate, *[types.uintp] * 3)


# The lanes of two vectors in the order in which x86 packs them: quarters in turn.
_IN_TURN = (0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15)


def _twos(values):
    return list(zip(values[::2], values[1::2], strict=True))


def _transpose_small(rows):
    """Eight vectors of eight lanes that fit 16 bits, rows to columns."""
    # columns 01, 23 of two rows, then 45, 67 of both; two columns are one lane
    packed = [a.narrow().low(b.narrow(), _IN_TURN).cast(32, 8) for a, b in _twos(rows)]
    orders = ((0, 2, 8, 10, 4, 6, 12, 14), (1, 3, 9, 11, 5, 7, 13, 15))
    fours = [[a.shuffle(b, order) for a, b in _twos(packed)] for order in orders]
    columns = []
    for order in ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)):
        for a, b in fours:
            both = a.shuffle(b, order)
            columns += [both.narrow(), both >> 16]
    return columns


def _columns_to_bytes(columns):
    """Eight columns of eight int32 lanes that fit 16 bits, clipped to 0..255, as rows of uint8."""
    twos = [a.low(b, _IN_TURN).clip() for a, b in _twos(columns)]
    order = [16 * c + 8 * half + k for half in range(2) for c in range(2) for k in range(8)]
    fours = [a.low(b, order) for a, b in _twos(twos)]
    # of four columns: rows 0 to 3 of one after the other, then rows 4 to 7
    turn = [16 * half + 4 * c + row for half in range(2) for row in range(4) for c in range(4)]
    left, right = (four.shuffle(four, turn).cast(32, 8) for four in fours)
    return [left.shuffle(right, (row, 8 + row)) for row in range(8)]


@intrinsic
def sum_sizes(typing_context, block):
    """Sum of the absolute values of an int32 [64] at an address, as int32."""

    def generate(context, builder, signature, arguments):
        total = None
        for k in range(8):
            row = load_lanes(builder, offset(builder, arguments[0], 32 * k), 8, 32)
            sign = row >> 31
            size = Lanes(builder, builder.xor(row.value, sign.value)) - sign
            total = size if total is None else total + size
        kind = ir.FunctionType(INT32, [total.value.type])
        add = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.add.v8i32")
        return builder.call(add, [total.value])

    return types.int32(types.uintp), generate


# Up to this sum, 1.4 times it and times the 4 between the dimensions fits 16 bits: no sum of
# coefficients, nor of values between the dimensions, is larger.
SMALL = 5800


@intrinsic
def transform_small_blocks(typing_context, block, other, pixels, other_pixels, pitch):
    """As `transform_block`, two blocks of coefficients with `sum_sizes` of at most SMALL.

    Products of 16 bits are half of the work on many processors, and two blocks side by side do not
    wait for their own results.
    """

    def generate(builder, arguments):
        block, other, pixels, other_pixels, pitch = arguments
        rows = []
        for k in range(8):
            places = (offset(builder, address, 32 * k) for address in (block, other))
            rows.append(Twins(*(load_lanes(builder, place, 8, 32) for place in places)))
        columns = _transpose_small(_transform(rows, 11, small=True))
        for row in _columns_to_bytes(_transform(columns, 18, 128, small=True)):
            for lanes, place in zip(row.both, (pixels, other_pixels), strict=True):
                store_lanes(lanes, place)
            pixels, other_pixels = builder.add(pixels, pitch), builder.add(other_pixels, pitch)

    return procedure(generate, *[types.uintp] * 5)


@intrinsic
def fill_block(typing_context, value, pixels, pitch):
    """Set one 8 x 8 block to a uint8 value. Arguments as `transform_block`."""

    def generate(builder, arguments):
        value, pixels, pitch = arguments
        word = builder.mul(builder.zext(value, INT64), INT64(0x0101010101010101))
        for _ in range(8):
            store(builder, word, pixels)
            pixels = builder.add(pixels, pitch)

    return procedure(generate, types.uint8, types.uintp, types.uintp)


@intrinsic
def clear_block(typing_context, block):
    """Set int32 [64] at an address to zero."""

    def generate(builder, arguments):
        store(builder, constant(vector(INT32, 64), 0), arguments[0], 4)

    return procedure(generate, types.uintp)


# ==== Color ======================================================================================


def _interpolate(builder, near, far):
    """16 chroma values (int16, -128..127) from 8 at half resolution: weights 3/4 and 1/4."""
    sums = [
        load_lanes(builder, offset(builder, near, k), 8, 8, 16) * 3
        + load_lanes(builder, offset(builder, far, k), 8, 8, 16)
        for k in (-1, 0, 1)
    ]
    even = (sums[1] * 3 + sums[0] + 8) >> 4
    odd = (sums[1] * 3 + sums[2] + 7) >> 4
    order = [lane for k in range(8) for lane in (k, 8 + k)]
    return even.shuffle(odd, order) - 128


def _store_pixels(red, green, blue, pixels):
    """Write 16 pixels, and four bytes behind them, from int16 lanes of 0 to 255."""
    pair, builder, parts = red + (green << 8), red.builder, []
    inside = [4 * pixel + c for pixel in range(4) for c in range(3)]
    order = [16 * half + k for half in range(2) for k in (*inside, *inside[:4])]
    for part in range(2):  # pixels 0 to 3 and 8 to 11, then the others: no byte leaves its half
        turn = [4 * part + 8 * half + k for half in range(2) for k in range(4)]
        four = pair.shuffle(blue, [lane for k in turn for lane in (k, 16 + k)]).cast(8, 32)
        halves = four.shuffle(four, order)
        parts.append([halves.shuffle(halves, range(16 * k, 16 * k + 16)) for k in range(2)])
    for k in range(4):
        store_lanes(parts[k % 2][k // 2], offset(builder, pixels, 12 * k))


@intrinsic
def color_pixels(typing_context, y, blue, blue_far, red, red_far, pixels):
    """16 RGB pixels from luma and chroma at half resolution.

    Args: y: address of 16 luma values, the first of an even column. blue, red: address of the
        chroma value of that column in the chroma row that covers it; blue_far, red_far: the same
        column in the next nearest chroma row. One value before and eight after must be readable.
        pixels: address of 48 bytes, and four more that are overwritten.
    """

    def generate(builder, arguments):
        y, blue, blue_far, red, red_far, pixels = arguments
        luma = load_lanes(builder, y, 16, 8, 16)
        cb, cr = _interpolate(builder, blue, blue_far), _interpolate(builder, red, red_far)
        # 1.402 = 91881 / 65536, whole part aside to fit 16 bits, rounded by the last bit's half
        r = (luma + cr + (((cr + cr).high_product(26345) + 1) >> 1)).clip()
        b = (luma + cb + cb + (((cb + cb).high_product(-14942) + 1) >> 1)).clip()
        green = (cb.widen() * -22554 + cr.widen() * 18734 + 32768) >> 16
        green = Lanes(builder, builder.trunc(green.value, cr.value.type))
        g = (luma - cr + green).clip()
        _store_pixels(r, g, b, pixels)

    return procedure(generate, *[types.uintp] * 6)
