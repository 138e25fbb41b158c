"""Write a JPEG anew without going through pixels: restart markers, fewer bytes, another quality.

A JPEG stores whole numbers, the coefficients of 8 x 8 blocks, in a Huffman code. Here the code is
read, the coefficients are kept or rounded to coarser steps, and written in a code made for this
picture, with a restart marker every few MCUs (jpeg.py says what for). Three uses:

    recode(data)                 the same pixels, fewer bytes, markers
    recode(data, quality=90)     no finer than quality 90: what decoding and encoding again would
                                 give, without the detour over 8-bit pixels; a source that is
                                 coarser already keeps its steps, and so its pixels
    both                         chroma stored at full size becomes half size (4:2:0), by the mean
                                 of 2 x 2 pixels, as an encoder does it

Only plain files are read: baseline, YCbCr, 4:4:4 or 4:2:0, one scan, no restart markers, nothing
unexpected anywhere. For any other `recode` returns None, and the caller takes the long way.

Source: ITU-T T.81 (the format; annex K for tables and quality 50).
"""

import functools
import threading
from dataclasses import dataclass

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

MAX_BLOCKS = 1 << 19  # luma blocks of the largest picture taken: 33 megapixels, 140 MB of tokens
LOOK = 11  # bits looked up at once: two tables of 8 kB stay in the first cache
BLOCK_TOKENS = 64
WORD_SLACK = 256  # words: damaged blocks are read at most 165 words beyond the end

# Entries of a look-up table: bits 0-6 bits used, 7 not all (a slow read), 8-15 zeros before the
# value, 16 and up the value, or for a slow read its size in bits.
SLOW = 128
END_OF_BLOCK = 128  # as a number of zeros: beyond the last coefficient

_U32 = np.uint32
_OPTIONS = dict(cache=True, nogil=True, error_model="numpy")
_kernel, _inlined = njit(**_OPTIONS), njit(**_OPTIONS, forceinline=True)


def _pointer_to(kind):
    @intrinsic
    def pointer(typing_context, address):
        """An address (uintp) as a C pointer, indexed like an array and never checked.

        With arrays numba counted references in the inner loops, which took half of the time,
        and wrapped negative places, which kept them from becoming vectors.
        """

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.uintp), generate

    return pointer


_bytes_at, _int32_at, _int64_at = map(_pointer_to, (types.uint8, types.int32, types.int64))
_uint32_at, _uint64_at = map(_pointer_to, (types.uint32, types.uint64))
_float32_at = _pointer_to(types.float32)


def _zigzag() -> np.ndarray:
    """Place (row-major) of each coefficient in the order of the file: int32 [64]."""
    cells = [(row, column) for row in range(8) for column in range(8)]

    def turn(cell):
        diagonal = cell[0] + cell[1]
        return diagonal, cell[0] if diagonal % 2 else cell[1]

    return np.array([8 * row + column for row, column in sorted(cells, key=turn)], np.int32)


ZIGZAG = _zigzag()


def _shrink_matrix() -> np.ndarray:
    """Coefficients of 8 samples -> their share in the 8 of the halved row they begin: [8, 8].

    For the row that they end: the same with the sign changed where output + input is odd.
    """
    wave = np.arange(8)[:, None] * (2 * np.arange(8) + 1) * np.pi / 16
    transform = np.cos(wave) / 2
    transform[0] /= np.sqrt(2)
    pairs = np.kron(np.eye(4), [0.5, 0.5])
    return (transform[:, :4] @ pairs @ transform.T).astype(np.float32)


SHRINK = _shrink_matrix()
# Its entries that are not zero: even rows, then odd ones without column 4.
M = np.concatenate(
    [
        SHRINK[[0, 2, 2, 4, 4, 6, 6], [0, 1, 7, 2, 6, 3, 5]],
        SHRINK[1::2, [0, 1, 2, 3, 5, 6, 7]].ravel(),
    ]
)
# Bits of a value's absolute, as the format counts them.
SIZES = np.array([value.bit_length() for value in range(2048)], np.int32)


# ------------------------------------------------------------------------------------------------
# Header
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What stands before the scan.

    Attributes:
        width, height: pixels.
        halved: whether chroma has half the size in both directions (4:2:0), else full (4:4:4).
        steps: quantisers of the three components in file order, uint16 [3, 64].
        codes: (counts, symbols) of the Huffman tables: DC, AC of each component, 6 in all.
        scan: where the scan's bytes begin.
    """

    width: int
    height: int
    halved: bool
    steps: np.ndarray
    codes: tuple[bytes, ...]
    scan: int


def read_header(data: bytes) -> Header | None:
    """The header of a plain JPEG, None for any other or a damaged one."""
    try:
        return _read_header(data)
    except (IndexError, KeyError, ValueError):
        return None


def _read_header(data: bytes) -> Header | None:
    at, steps, codes, frame = 2, {}, {}, b""
    if data[:2] != b"\xff\xd8":
        return None
    while True:
        if data[at] != 0xFF:
            return None
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body, at = data[at + 4 : at + 2 + length], at + 2 + length
        if marker == 0xDB:
            _read_steps(body, steps)
        elif marker == 0xC4:
            _read_codes(body, codes)
        elif marker == 0xC0 and not frame:
            frame = body
        elif marker == 0xDA:
            return _plain_header(frame, body, steps, codes, at)
        elif not _is_harmless(marker, body):
            return None


def _is_harmless(marker: int, body: bytes) -> bool:
    """Whether a segment says nothing about the pixels: APPn and comments, no interval, no RGB."""
    if marker == 0xEE and body[:5] == b"Adobe":
        return len(body) >= 12 and body[11] == 1
    no_interval = marker == 0xDD and body == b"\0\0"
    return no_interval or 0xE0 <= marker <= 0xEF or marker == 0xFE


def _read_steps(body: bytes, steps: dict) -> None:
    while body:
        if body[0] > 3 or len(body) < 65:  # 16-bit steps are left to others
            raise ValueError
        steps[body[0]], body = np.frombuffer(body, np.uint8, 64, 1).astype(np.uint16), body[65:]


def _read_codes(body: bytes, codes: dict) -> None:
    while body:
        counts = body[1:17]
        total = sum(counts)
        if len(counts) < 16 or total > 256 or len(body) < 17 + total:
            raise ValueError
        codes[body[0]], body = body[1 : 17 + total], body[17 + total :]


def _plain_header(frame: bytes, scan: bytes, steps: dict, codes: dict, at: int) -> Header | None:
    if len(frame) != 15 or frame[0] != 8 or frame[5] != 3 or len(scan) != 10:
        return None
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    sampling = frame[7], frame[10], frame[13]
    ids = frame[6], frame[9], frame[12]
    ordered = ids == (1, 2, 3) == (scan[1], scan[3], scan[5])
    if not ordered or scan[0] != 3 or scan[7:] != b"\0\x3f\0" or not height * width:
        return None
    if sampling not in ((0x22, 0x11, 0x11), (0x11, 0x11, 0x11)):
        return None
    if -(-width // 16) * -(-height // 16) * 4 > MAX_BLOCKS:
        return None
    tables = np.stack([steps[frame[place]] for place in (8, 11, 14)])
    chosen = [scan[place] for place in (2, 4, 6)]
    parts = [codes[key] for pair in chosen for key in (pair >> 4, 16 + (pair & 15))]
    return Header(width, height, sampling[0] == 0x22, tables, tuple(parts), at)


# ------------------------------------------------------------------------------------------------
# Huffman codes
# ------------------------------------------------------------------------------------------------

SLOW_TABLE = 17 + 17 + 256  # first code beyond each length, offset into the symbols, the symbols


@functools.lru_cache(256)  # nearly every photograph has the tables of the standard's annex
def reading_table(code: bytes, is_dc: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Look-up table int32 [2 ** LOOK] and slow table int32 [SLOW_TABLE]; None for no such code."""
    look, slow = np.zeros(1 << LOOK, np.int32), np.zeros(SLOW_TABLE, np.int32)
    counts = np.frombuffer(code, np.uint8, 16).astype(np.int32)
    symbols = np.frombuffer(code, np.uint8, -1, 16).astype(np.int32)
    return (look, slow) if _fill_reading_table(counts, symbols, is_dc, look, slow) else None


@_kernel
def _fill_reading_table(counts, symbols, is_dc, look, slow):
    look[:] = SLOW
    code, place = 0, 0
    for length in range(1, 17):
        if code + counts[length - 1] > 1 << length:
            return False
        slow[17 + length] = place - code
        for _ in range(counts[length - 1]):
            symbol = symbols[place]
            if symbol & 15 > 10 + is_dc or (is_dc and symbol > 11):
                return False  # values that no 8-bit picture has; Pillow refuses such a file
            slow[34 + place] = symbol
            if length <= LOOK:
                _fill_entries(look, code << (LOOK - length), length, symbol, is_dc)
            code, place = code + 1, place + 1
        slow[length] = code << (16 - length)
        code <<= 1
    return True


@_kernel
def _fill_entries(look, first, length, symbol, is_dc):
    """All entries that begin with one code."""
    size, zeros = symbol & 15, symbol >> 4
    if is_dc:
        zeros = 0
    elif size == 0 and zeros != 15:
        zeros = END_OF_BLOCK
    left = LOOK - length
    for rest in range(1 << left):
        if size > left:
            look[first + rest] = size << 16 | zeros << 8 | SLOW | length
            continue
        value = rest >> (left - size)
        if size and value >> (size - 1) == 0:
            value += 1 - (1 << size)
        look[first + rest] = value << 16 | zeros << 8 | (length + size)


@_kernel
def _code_lengths(weights, order, parents, depths):
    """Depths in a Huffman tree of leaves given in rising weight. Returns the largest.

    Args: weights: int64 [2n], the first n filled. order: n. parents, depths: int64 [2n], written.
    """
    n, leaf, inner = order, 0, order
    for node in range(n, 2 * n - 1):
        total = 0
        for _ in range(2):
            if leaf < n and (inner == node or weights[leaf] <= weights[inner]):
                total, parents[leaf], leaf = total + weights[leaf], node, leaf + 1
            else:
                total, parents[inner], inner = total + weights[inner], node, inner + 1
        weights[node] = total
    depths[2 * n - 2] = 0
    for node in range(2 * n - 3, -1, -1):
        depths[node] = depths[parents[node]] + 1
    return depths[0]


@_kernel
def _make_code(counts, order, code, segment):
    """The best code of at most 16 bits for these counts.

    Args: counts: int64 [256]. order: int64, symbols that occur, the rarest first. code: uint32
        [256], written: code << 5 | length. segment: int32 [272], written: how many codes of each
        length, and the symbols, as a DHT segment has them.
    Returns: entries of `segment` used.
    """
    n = len(order) + 1  # the first leaf stands for the code of all ones, which the format forbids
    weights, parents = np.zeros(2 * n, np.int64), np.zeros(2 * n, np.int64)
    depths, scale, deepest = np.zeros(2 * n, np.int64), 0, 17
    while deepest > 16:
        for i in range(1, n):
            weights[i] = max(1, counts[order[i - 1]] >> scale)
        deepest = _code_lengths(weights, n, parents, depths)
        scale += 1
    lengths = np.zeros(256, np.int64)
    for i in range(1, n):
        lengths[order[i - 1]] = depths[i]
    segment[:16] = 0
    place, next_code = 0, 0
    for length in range(1, 17):
        next_code <<= 1
        for symbol in range(256):
            if lengths[symbol] == length:
                code[symbol] = next_code << 5 | length
                segment[length - 1] += 1
                segment[16 + place] = symbol
                next_code, place = next_code + 1, place + 1
    return 16 + place


# ------------------------------------------------------------------------------------------------
# Reading. A token is a symbol of the new code (8 bits) and above it the value's own bits.
# ------------------------------------------------------------------------------------------------


@_kernel
def _slow_value(bits, entry, table, slow):
    """(bits used, zeros before, value) where the look-up table does not say; used 0: no such code.

    Args: table: number of the table; the even ones are of first levels.
    """
    length, zeros, size = entry & 127, (entry >> 8) & 255, entry >> 16
    if length == 0:
        base = table * SLOW_TABLE
        top = np.int64(bits >> np.uint64(48))
        length = LOOK + 1
        while length < 17 and top >= slow[base + length]:
            length += 1
        if length == 17:
            return 0, 0, 0
        place = (slow[base + 17 + length] + (top >> (16 - length))) & 255
        symbol = np.int64(slow[base + 34 + place])
        size, zeros = symbol & 15, symbol >> 4
        if table & 1 == 0:
            zeros = 0
        elif size == 0 and zeros != 15:
            zeros = END_OF_BLOCK
    if size == 0:
        return length, zeros, 0
    value = np.int64((bits << np.uint64(length)) >> np.uint64(64 - size))
    if value >> (size - 1) == 0:
        value += 1 - (1 << size)
    return length + size, zeros, value


@_inlined
def _next_value(at, words, table, look, slow):
    """(at, bits used, zeros before, value) of the next symbol; used 0: damaged.

    Args: at: place in bits. words: see `_scan_words`.
    """
    bits = words[at >> 5] << np.uint64(at & 31)
    entry = np.int64(look[np.uint64(table << LOOK) + (bits >> np.uint64(64 - LOOK))])
    used, zeros, value = entry & 127, (entry >> 8) & 255, entry >> 16
    if entry & SLOW:
        used, zeros, value = _slow_value(bits, entry, table, slow)
    return at + used, used, zeros, value


@_inlined
def _put(tokens, count, hits, base, run, level, sign):
    """Append the token of a level behind `run` zeros, or nothing where it is 0.

    Without a branch on the level: whether it is zero, or its sign, cannot be foreseen.
    Args: base: where in `hits` the symbols of this kind are counted. level: 0 and up. sign: 0
        or -1.
    Returns: (number of tokens, 1 or 0: whether there is one).
    """
    keep = np.int64(level != 0)
    while run > 15 and keep:
        tokens[count] = 0xF0
        hits[base + 0xF0] += 1
        count, run = count + 1, run - 16
    size = np.int64(SIZES[min(level, 1023)])
    symbol = (run & 15) << 4 | size
    tokens[count] = ((level ^ sign) & ((1 << size) - 1)) << 8 | symbol
    hits[base + symbol] += keep
    return count + keep, keep


@_inlined
def _end_block(tokens, count, hits, base, last):
    """Append the end of a block whose last level stands at `last`. Returns number of tokens."""
    if last < 63:
        tokens[count] = 0
        hits[base] += 1
        count += 1
    return count


@_inlined
def _read_block(at, words, c, look, slow, scales, tokens, count, hits):
    """Turn one block's levels behind the first into tokens, rounded to the new steps.

    Args: c: component. scales: old step / new step [3 * 64].
    Returns: (at, number of tokens; -1: damaged).
    """
    k, last, base = 1, 0, 768 if c else 256
    while k < 64:
        at, used, zeros, value = _next_value(at, words, 2 * c + 1, look, slow)
        k += zeros
        if k > 63 or used == 0:
            if used == 0 or k < END_OF_BLOCK:
                return at, -1
            break
        # Just below one half: a tie goes to the smaller level, equally near and cheaper.
        sign = value >> 63
        level = np.int64(
            np.float32((value ^ sign) - sign) * scales[64 * c + k] + np.float32(0.4999)
        )
        count, kept = _put(tokens, count, hits, base, k - last - 1, level, sign)
        last += kept * (k - last)
        k += 1
    return at, _end_block(tokens, count, hits, base, last)


@_inlined
def _read_whole(at, words, c, look, slow, steps, space, place):
    """Read one block's coefficients behind the first, in pixels' units, into `space`.

    Args: place: where its coefficient 0 goes; the others follow at multiples of LANES.
    Returns: (at, whether it is sound).
    """
    k = 1
    while k < 64:
        at, used, zeros, value = _next_value(at, words, 2 * c + 1, look, slow)
        k += zeros
        if k > 63 or used == 0:
            return at, used != 0 and k >= END_OF_BLOCK
        space[place + LANES * ZIGZAG[k]] = np.float32(value) * steps[64 * c + k]
        k += 1
    return at, True


@_inlined
def _round_level(value, scale):
    """value * scale to the nearest whole number that a file can hold as first level."""
    level = min(1023, np.int64(np.float32(abs(value)) * scale + np.float32(0.4999)))
    return level if value > 0 else -level


@_inlined
def _ends_here(at, size):
    """Whether what was read ends where `size` bytes end."""
    return 8 * size - 8 < at <= 8 * size


@_inlined
def _places_to_read(words, look, slow, scales):
    """The arrays' addresses: numba counts no references to these."""
    return (
        _uint64_at(words),
        _int32_at(look),
        _int32_at(slow),
        _float32_at(scales),
    )


@_inlined
def _places_to_fill(firsts, spans, tokens, hits):
    return _int32_at(firsts), _int32_at(spans), _uint32_at(tokens), _int64_at(hits)


@_kernel
def _read_halved(words, size, look, slow, scales, rows, columns, firsts, spans, tokens, hits):
    """Read a 4:2:0 scan into tokens.

    Args: words, size: from `_scan_words`.
        look, slow: tables of the three components, first levels and others in turn. scales: old
        step / new step. rows, columns: of MCUs. The rest is written, see `_Room`.
    Returns: number of tokens; -1: damaged.
    """
    words, look, slow, scales = _places_to_read(words, look, slow, scales)
    firsts, spans, tokens, hits = _places_to_fill(firsts, spans, tokens, hits)
    at = count = 0
    previous = np.zeros(3, np.int64)
    for mcu in range(rows * columns):
        y, x = mcu // columns, mcu % columns
        for b in range(6):
            c = max(0, b - 3)
            block = (3 + c) * rows * columns + mcu
            if c == 0:
                block = (2 * y + (b >> 1)) * 2 * columns + 2 * x + (b & 1)
            at, used, _, value = _next_value(at, words, 2 * c, look, slow)
            value += previous[c]
            previous[c], firsts[block] = value, _round_level(value, scales[64 * c])
            spans[2 * block] = count
            at, count = _read_block(at, words, c, look, slow, scales, tokens, count, hits)
            spans[2 * block + 1] = count
            if used == 0 or abs(value) > 2047 or count < 0 or at > 8 * size:
                return -1
    return count if _ends_here(at, size) else -1


# Chroma at full size, one row of new blocks at a time. `space` holds, for every LANES new blocks,
# PLANES planes of [64, LANES]: blue then red, each [2 rows, 2 sides], and three for work. One
# array with fixed distances: otherwise the compiler cannot know that nothing overlaps.
LANES = 32
PLANE = 64 * LANES
PLANES = 11


@_inlined
def _shrink_pairs(space, one, two, out, along, across):
    """Halve in one direction: coefficients `along` of planes `one`, `two` become those of `out`."""
    for other in range(8):
        a, b = one + other * across, two + other * across
        o = out + other * across
        for g in range(LANES):
            p0, q0 = space[a + g], space[b + g]
            p1, q1 = space[a + along + g], space[b + along + g]
            p2, q2 = space[a + 2 * along + g], space[b + 2 * along + g]
            p3, q3 = space[a + 3 * along + g], space[b + 3 * along + g]
            p5, q5 = space[a + 5 * along + g], space[b + 5 * along + g]
            p6, q6 = space[a + 6 * along + g], space[b + 6 * along + g]
            p7, q7 = space[a + 7 * along + g], space[b + 7 * along + g]
            space[o + g] = M[0] * (p0 + q0)
            space[o + 2 * along + g] = M[1] * (p1 - q1) + M[2] * (p7 - q7)
            space[o + 4 * along + g] = M[3] * (p2 + q2) + M[4] * (p6 + q6)
            space[o + 6 * along + g] = M[5] * (p3 - q3) + M[6] * (p5 - q5)
            d0, d1, d2, d3 = p0 - q0, p1 + q1, p2 - q2, p3 + q3
            d5, d6, d7 = p5 + q5, p6 - q6, p7 + q7
            r = M[7] * d0 + M[8] * d1 + M[9] * d2 + M[10] * d3
            space[o + along + g] = r + (M[11] * d5 + M[12] * d6 + M[13] * d7)
            r = M[14] * d0 + M[15] * d1 + M[16] * d2 + M[17] * d3
            space[o + 3 * along + g] = r + (M[18] * d5 + M[19] * d6 + M[20] * d7)
            r = M[21] * d0 + M[22] * d1 + M[23] * d2 + M[24] * d3
            space[o + 5 * along + g] = r + (M[25] * d5 + M[26] * d6 + M[27] * d7)
            r = M[28] * d0 + M[29] * d1 + M[30] * d2 + M[31] * d3
            space[o + 7 * along + g] = r + (M[32] * d5 + M[33] * d6 + M[34] * d7)


@_kernel
def _shrink(space, begin, scales, offset, levels, last):
    """Shrink the planes [2, 2] at `begin` into levels rounded to the new steps.

    Args: scales: 1 / new step, from `offset`. levels: int32 [64 * LANES], written. last: int32
        [LANES], written: place in file order of the last level that is not zero.
    """
    work = begin - begin % (PLANES * PLANE) + 8 * PLANE
    for side in range(2):
        left = begin + side * PLANE
        _shrink_pairs(space, left, left + 2 * PLANE, work + side * PLANE, 8 * LANES, LANES)
    done = work + 2 * PLANE
    _shrink_pairs(space, work, work + PLANE, done, LANES, 8 * LANES)
    for g in range(LANES):
        last[g] = 0
    for k in range(64):
        scale, source = scales[offset + k], done + LANES * ZIGZAG[k]
        for g in range(LANES):
            value = space[source + g]
            size = np.int32(abs(value) * scale + np.float32(0.4999))
            levels[LANES * k + g] = size if value > 0 else -size
            last[g] = np.int32(k) if size != 0 else last[g]


@_kernel
def _mirror(space, source, target, first, end, both):
    """Continue the picture beyond its edge: lanes of a plane reflected left-right (0) or
    top-bottom (1)."""
    for place in range(64):
        odd = (place >> 3 if both else place) & 1
        for g in range(place * LANES + first, place * LANES + end):
            space[target + g] = -space[source + g] if odd else space[source + g]


@_kernel
def _finish_row(space, tall, wide, c, scales, row, firsts, spans, tokens, count, hits):
    """One component of one row of new blocks: complete it at the edges, shrink, make tokens.

    Args: tall: whether both rows of old blocks are there. wide: old blocks in a row. c: 1 or 2.
        row: number of the row's first block.
    Returns: number of tokens.
    """
    scratch = np.empty(65 * LANES, np.int32)
    levels, columns = _int32_at(scratch.ctypes.data), (wide + 1) // 2
    last = _int32_at(scratch.ctypes.data + np.uintp(256 * LANES))
    for first in range(0, columns, LANES):
        lanes = min(LANES, columns - first)
        begin = (first // LANES * PLANES + 4 * (c - 1)) * PLANE
        if wide & 1 and first + LANES >= columns:
            for half in (begin, begin + 2 * PLANE):
                _mirror(space, half, half + PLANE, lanes - 1, lanes, False)
        if not tall:
            for half in (begin, begin + PLANE):
                _mirror(space, half, half + 2 * PLANE, 0, lanes, True)
        _shrink(space, begin, scales, 64 * c, levels, last)
        for g in range(lanes):
            block = row + first + g
            firsts[block] = min(1023, max(-1023, levels[g]))
            spans[2 * block] = count
            before = 0
            for k in range(1, last[g] + 1):
                level = np.int64(levels[LANES * k + g])
                sign = level >> 63
                level = (level ^ sign) - sign
                count, kept = _put(tokens, count, hits, 768, k - before - 1, level, sign)
                before += kept * (k - before)
            count = _end_block(tokens, count, hits, 768, before)
            spans[2 * block + 1] = count
    scratch[0] = 0  # keeps the array alive to here: its address alone does not
    return count


@_inlined
def _place_of(y, x, c):
    """Where in `space` coefficient 0 of an old block of component c goes."""
    plane = 4 * (c - 1) + 2 * (y & 1) + (x & 1)
    return ((x >> 1) // LANES * PLANES + plane) * PLANE + (x >> 1) % LANES


@_inlined
def _clear(space, size):
    for i in range(size):
        space[i] = 0


@_inlined
def _read_mcu(
    at,
    y,
    x,
    wide,
    words,
    look,
    slow,
    scales,
    steps,
    previous,
    space,
    firsts,
    spans,
    tokens,
    count,
    hits,
):
    """Read one MCU of `_read_full`. Returns: (at, number of tokens, whether it is sound)."""
    good = True
    for c in range(3):
        at, used, _, value = _next_value(at, words, 2 * c, look, slow)
        value += previous[c]
        previous[c] = value
        good = good and used != 0 and abs(value) <= 2047
        if c == 0:
            block = 2 * y * ((wide + 1) // 2) + x
            firsts[block], spans[2 * block] = _round_level(value, scales[0]), count
            at, count = _read_block(at, words, c, look, slow, scales, tokens, count, hits)
            spans[2 * block + 1], good = count, good and count >= 0
        else:
            place = _place_of(y, x, c)
            space[place] = np.float32(value) * steps[64 * c]
            at, sound = _read_whole(at, words, c, look, slow, steps, space, place)
            good = good and sound
    return at, count, good


@_kernel
def _read_full(
    words, size, look, slow, scales, steps, tall, wide, space, firsts, spans, tokens, hits
):
    """Read a 4:4:4 scan into tokens of a 4:2:0 picture.

    Args: as `_read_halved`; scales: of blue and red 1 / new step. steps: old. tall, wide: blocks
        of 8 x 8 in the source. space: float32, zeros.
    Returns: number of tokens; -1: damaged.
    """
    words, look, slow, scales = _places_to_read(words, look, slow, scales)
    firsts, spans, tokens, hits = _places_to_fill(firsts, spans, tokens, hits)
    steps, space = _float32_at(steps), _float32_at(space)
    rows, columns = (tall + 1) // 2, (wide + 1) // 2
    at = count = 0
    previous = np.zeros(3, np.int64)
    for y in range(tall):
        for x in range(wide):
            at, count, good = _read_mcu(
                *(at, y, x, wide, words, look, slow, scales, steps, previous, space),
                *(firsts, spans, tokens, count, hits),
            )
            if not good or at > 8 * size:
                return -1
        if y & 1 or y == tall - 1:
            row = 4 * rows * columns + (y >> 1) * columns
            for c in range(1, 3):
                count = _finish_row(
                    space, y & 1, wide, c, scales, row, firsts, spans, tokens, count, hits
                )
                row += rows * columns
            _clear(space, -(-columns // LANES) * PLANES * PLANE)
    if not _ends_here(at, size):
        return -1
    return _fill_margin(firsts, spans, tokens, hits, tall, wide, count)


@_kernel
def _fill_margin(firsts, spans, tokens, hits, tall, wide, count):
    """Luma blocks beyond the picture: flat, as the one read before. Returns number of tokens."""
    rows, columns = 2 * ((tall + 1) // 2), 2 * ((wide + 1) // 2)
    tokens[count] = 0
    for y in range(rows):
        for x in range(columns):
            if y < tall and x < wide:
                continue
            block = y * columns + x
            before = block - 1 if y < tall else block - columns + 1 - (x & 1)
            firsts[block] = firsts[before]
            spans[2 * block], spans[2 * block + 1] = count, count + 1
            hits[256] += 1
    return count + 1


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------


@_kernel
def _count_firsts(firsts, rows, columns, interval, hits):
    """Replace the first levels by their tokens: differences to the block before of their kind.

    Args: hits: int64 [4 * 256]; tables 0 and 2 (luma, chroma) are added to.
    """
    firsts, hits = _int32_at(firsts), _int64_at(hits)
    before = np.zeros(3, np.int64)
    for mcu in range(rows * columns):
        if mcu % interval == 0:
            before[:] = 0
        y, x = mcu // columns, mcu % columns
        for b in range(6):
            c = max(0, b - 3)
            block = (3 + c) * rows * columns + mcu
            if c == 0:
                block = (2 * y + (b >> 1)) * 2 * columns + 2 * x + (b & 1)
            level = np.int64(firsts[block])
            step, before[c] = level - before[c], level
            size = SIZES[abs(step)]
            firsts[block] = ((step + (step >> 63)) & ((1 << size) - 1)) << 8 | size
            hits[512 * min(c, 1) + size] += 1


@_kernel
def _flush(bits, count, out, at):
    """Write whole bytes, each FF followed by a zero. Returns (bits left, place)."""
    while count >= 8:
        count -= 8
        byte = np.uint8(bits >> np.uint64(count))
        out[at] = byte
        at += 1
        if byte == 255:
            out[at] = 0
            at += 1
    return count, at


@_inlined
def _write_token(token, table, codes, bits, count, out, at):
    """Append a token's code and bits. Returns (bits, their number, place)."""
    entry = np.uint64(codes[table + (token & _U32(255))])
    size = np.uint64(token & _U32(15))
    bits = bits << (entry & np.uint64(31)) | entry >> np.uint64(5)
    bits = bits << size | np.uint64(token >> _U32(8))
    count += np.int64((entry & np.uint64(31)) + size)
    if count < 32:
        return bits, count, at
    word = _U32(bits >> np.uint64(count - 32))
    if word & _U32(0x80808080) & ~(word + _U32(0x01010101)):  # a byte may be FF
        count, at = _flush(bits, count, out, at)
        return bits, count, at
    out[at] = np.uint8(word >> _U32(24))
    out[at + 1] = np.uint8(word >> _U32(16))
    out[at + 2] = np.uint8(word >> _U32(8))
    out[at + 3] = np.uint8(word)
    return bits, count - 32, at + 4


@_kernel
def _write_scan(firsts, spans, tokens, codes, rows, columns, interval, out):
    """Write the scan with a restart marker every `interval` MCUs. Returns its bytes.

    Args: firsts: uint32 tokens. codes: uint32 [4 * 256]. out: uint8, large enough.
    """
    firsts, tokens, codes = _uint32_at(firsts), _uint32_at(tokens), _uint32_at(codes)
    spans, out = _int32_at(spans), _bytes_at(out)
    bits, count, at = np.uint64(0), 0, 0
    for mcu in range(rows * columns):
        y, x = mcu // columns, mcu % columns
        for b in range(6):
            c, table = max(0, b - 3), _U32(0 if b < 4 else 512)
            block = (3 + c) * rows * columns + mcu
            if c == 0:
                block = (2 * y + (b >> 1)) * 2 * columns + 2 * x + (b & 1)
            bits, count, at = _write_token(firsts[block], table, codes, bits, count, out, at)
            for t in range(spans[2 * block], spans[2 * block + 1]):
                bits, count, at = _write_token(
                    tokens[t], table + _U32(256), codes, bits, count, out, at
                )
        is_last = mcu + 1 == rows * columns
        if is_last or (mcu + 1) % interval == 0:
            fill = -count & 7
            bits = bits << np.uint64(fill) | np.uint64((1 << fill) - 1)
            count, at = _flush(bits, count + fill, out, at)
            out[at] = 0xFF
            out[at + 1] = 0xD9 if is_last else 0xD0 + (mcu // interval & 7)
            at += 2
    return at


# ------------------------------------------------------------------------------------------------
# The whole file
# ------------------------------------------------------------------------------------------------


class _Room(threading.local):
    """Arrays of one thread for the largest picture so far: fresh memory would cost page faults.

    Attributes: firsts: uint32, first level of each block (luma by rows of the picture, blue, red).
        spans: int32 [2 * blocks], begin and end of its tokens. tokens: uint32. out: uint8.
    """

    def __init__(self):
        self.firsts, self.spans = np.empty(0, np.int32), np.empty(0, np.int32)
        self.tokens, self.out = np.empty(0, np.uint32), np.empty(0, np.uint8)

    def for_blocks(self, blocks: int):
        if len(self.firsts) < blocks:
            self.firsts, self.spans = np.empty(blocks, np.int32), np.empty(2 * blocks, np.int32)
            self.tokens = np.empty(blocks * BLOCK_TOKENS + 1, np.uint32)
        return self.firsts, self.spans, self.tokens

    def for_bytes(self, size: int) -> np.ndarray:
        if len(self.out) < size:
            self.out = np.empty(size, np.uint8)
        return self.out


_ROOM = _Room()


def compile_kernels() -> None:
    """Compile everything, or load it from numba's cache: before processes do so all at once."""
    flat = b"\xff\xdb\0\x84\0" + bytes([1] * 64) + b"\1" + bytes([1] * 64)
    code = bytes([1, *[0] * 15, 0])
    codes = b"".join(bytes([name]) + code for name in (0x00, 0x10))
    for sampling, blocks in ((b"\x22", 6), (b"\x11", 3)):
        frame = b"\xff\xc0\0\x11\x08\0\x08\0\x08\3\1" + sampling + b"\0\2\x11\1\3\x11\1"
        scan = b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0" + bytes(-(-2 * blocks // 8))
        tables = b"\xff\xc4" + (len(codes) + 2).to_bytes(2, "big") + codes
        tiny = b"\xff\xd8" + flat + frame + tables + scan + b"\xff\xd9"
        if recode(tiny, 1, np.ones((2, 64), np.uint16)) is None:
            raise RuntimeError("the JPEG kernels refuse a sound file")


def recode(data: bytes, interval: int, steps: np.ndarray | None = None) -> bytes | None:
    """A plain JPEG in 4:2:0 with restart markers and the shortest Huffman codes.

    Args:
        data: a JPEG file.
        interval: MCUs (16 x 16 px) between restart markers, 1 to 65535.
        steps: quantisers for luma and chroma in file order, uint16 [2, 64], 1 to 255: where the
            source's are finer, its coefficients are rounded to these. None keeps the source's.
    Returns: the new file, or None where the source is not plain (or damaged), or its chroma is at
        full size and no steps are given.
    """
    header = read_header(data)
    if header is None or (steps is None and not header.halved):
        return None
    words, size = _scan_words(data, header.scan)
    parts = [reading_table(code, number % 2 == 0) for number, code in enumerate(header.codes)]
    if words is None or None in parts:
        return None
    look, slow = (np.concatenate(tables) for tables in zip(*parts, strict=True))
    old, new_steps = header.steps.astype(np.float32), _new_steps(header, steps)
    if old.min() < 1 or (header.halved and (old[1] != old[2]).any()):
        return None
    scales = old / new_steps[[0, 1, 1]]
    grid = -(-header.height // 16), -(-header.width // 16)
    hits = np.zeros(4 * 256, np.int64)
    new = (*_ROOM.for_blocks(6 * grid[0] * grid[1]), hits)
    sources = _addresses(words, look, slow, scales)
    if header.halved:
        count = _read_halved(sources[0], size, *sources[1:], *grid, *_addresses(*new))
    else:
        scales[1:] = 1 / new_steps[1]
        space = np.zeros(-(-grid[1] // LANES) * PLANES * PLANE, np.float32)
        blocks = -(-header.height // 8), -(-header.width // 8)
        sources += _addresses(old)
        count = _read_full(
            sources[0], size, *sources[1:], *blocks, space.ctypes.data, *_addresses(*new)
        )
    return None if count < 0 else _assemble(header, new_steps, grid, interval, new)


def _addresses(*arrays: np.ndarray) -> list[int]:
    return [array.ctypes.data for array in arrays]


def _new_steps(header: Header, steps: np.ndarray | None) -> np.ndarray:
    """The new file's steps, float32 [2, 64]: no finer than `steps`, nor than the source's."""
    old = header.steps[:2].astype(np.float32)
    if steps is None:
        return old
    new = np.maximum(old, steps.astype(np.float32))
    if not header.halved:  # the mean of four blocks lies on no grid
        new[1] = steps[1]
    return new


def _scan_words(data: bytes, scan: int) -> tuple[np.ndarray | None, int]:
    """The scan without stuffed zeros: uint64, 64 bits from every 32nd on; and its bytes.

    None where anything but stuffed zeros follows an FF, or no end of picture.
    """
    body = np.frombuffer(data, np.uint8, -1, scan)
    marks = np.flatnonzero(body[:-2] == 0xFF)
    if data[-2:] != b"\xff\xd9" or body[marks + 1].any():
        return None, 0
    clean = np.delete(body[:-2], marks + 1)
    count = len(clean) // 4 + WORD_SLACK
    padded = np.zeros(4 * count + 8, np.uint8)
    padded[: len(clean)] = clean
    return np.ndarray(count, ">u8", padded, strides=(4,)).astype(np.uint64), len(clean)


def _assemble(header: Header, steps, grid, interval: int, new) -> bytes:
    firsts, spans, tokens, hits = new
    _count_firsts(firsts.ctypes.data, *grid, interval, hits.ctypes.data)
    codes, segment = np.zeros(4 * 256, np.uint32), np.zeros(272, np.int32)
    parts = []
    for table, name in enumerate((0x00, 0x10, 0x01, 0x11)):
        part = slice(256 * table, 256 * table + 256)
        symbols = np.flatnonzero(hits[part])
        order = symbols[np.argsort(hits[part][symbols], kind="stable")]
        used = _make_code(hits[part], order, codes[part], segment)
        parts.append(bytes([name]) + segment[:used].astype(np.uint8).tobytes())
    bits = int((hits * ((codes & 31) + np.tile(np.arange(256) & 15, 4))).sum())
    room = bits // 4 + 4 * grid[0] * grid[1] + 64  # every byte may be FF
    out = _ROOM.for_bytes(room)
    size = _write_scan(*_addresses(firsts, spans, tokens, codes), *grid, interval, out.ctypes.data)
    return _head(header, steps, interval, parts) + out[:size].tobytes()


def _head(header: Header, steps, interval: int, codes: list[bytes]) -> bytes:
    """Everything before the scan."""

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body

    sides = header.height.to_bytes(2, "big") + header.width.to_bytes(2, "big")
    tables = steps.astype(np.uint8)
    return b"".join(
        (
            b"\xff\xd8",
            segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"),
            segment(0xDB, b"\0" + tables[0].tobytes() + b"\1" + tables[1].tobytes()),
            segment(0xC0, b"\x08" + sides + b"\3\1\x22\0\2\x11\1\3\x11\1"),
            segment(0xC4, b"".join(codes)),
            segment(0xDD, interval.to_bytes(2, "big")),
            segment(0xDA, b"\3\1\0\2\x11\3\x11\0\x3f\0"),
        )
    )
