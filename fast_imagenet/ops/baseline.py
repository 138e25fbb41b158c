"""Decode the tiles under a crop of a baseline 4:2:0 JPEG, in the layout that our writer produces.

libturbojpeg leaves its fast Huffman decoder aside as soon as a file has restart markers. This one
is made for such tiles: the bytes of a tile are freed of stuffing while its end is searched, one
table look-up mostly yields a whole coefficient, and only the blocks under the crop are transformed
and colored. Pixels are bit-identical to libjpeg's.

It decodes sound streams only. Whatever is unusual or damaged makes it give up, and libturbojpeg
decides what that is. Bounds: a tile reads at most OVERREAD bytes behind its own before the end is
checked; coefficients and table entries are bounded by their own checks.

Source: ITU-T T.81, annexes C (tables), F.2.2 (decoding); zigzag order from figure A.6.
"""

import numpy as np
from numba import carray

from . import simd
from .jpeg_region import (
    CONTEXT,
    HEIGHT,
    INTERVAL,
    MCU_HEIGHT,
    MCU_WIDTH,
    SCAN_AT,
    WIDTH,
    clean_tile,
    tile_grid,
)
from .kernel import kernel
from .vectors import as_pointer, load_bits, load_byte, load_int32, store_byte, store_int32

ZIGZAG = np.array(
    [
        *(0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5),
        *(12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28),
        *(35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51),
        *(58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63),
        *[64] * 16,  # behind the block: where a damaged one may lead, found out after the write
    ],
    np.uint64,
)
LOOK = 11  # bits looked at together: most codes at quality 90 with their value
# DC times quantiser reaches 1024 + 128 in an image. Far beyond, libjpeg's 16-bit arithmetic
# saturates in ways of its own: such a stream is damaged, and libturbojpeg's to decide about.
LARGEST_LEVEL = 2048
MIN_SIDE = 17  # below, chroma has so few columns that libjpeg repeats it
# One MCU: 6 blocks of 64 coefficients of at most 16 + 15 bits, and one refill.
OVERREAD = 6 * 64 * 4 + 16
PAD = 16  # bytes around a chroma row for the neighbors of its ends


@kernel
def _size_and_steps(symbol, is_dc):
    """Bits of a symbol's value, and how far it lies behind the one before (0: end of block)."""
    if is_dc:
        return symbol, 1
    size, zeros = symbol & 15, symbol >> 4
    return size, zeros + 1 if size > 0 or zeros == 15 else 0


@kernel
def _fill_look_up(table, look, code, length, symbol, is_dc):
    """Entries of all bit patterns that begin with a code.

    An entry: bits used (low 6), bits 8 to 15: steps to the value's position, bits 16 on: the value.
    Bit 7: not that simple. The value's bits follow and bits 16 on hold their number; or no steps:
    the end of the block; or 128 alone: a longer code.
    """
    size, steps = _size_and_steps(symbol, is_dc)
    for rest in range(1 << (LOOK - length)):
        entry = (size << 16) | (steps << 8) | 128 | length
        if length + size <= LOOK and steps > 0:
            value = (rest >> (LOOK - length - size)) & ((1 << size) - 1)
            if size > 0 and value < 1 << (size - 1):
                value += 1 - (1 << size)
            entry = (value << 16) | (steps << 8) | (length + size)
        look[table, (code << (LOOK - length)) + rest] = entry


@kernel
def _read_huffman(address, length, look, slow):
    """The tables of one DHT segment of `length` bytes at `address`. Returns False when unusual.

    Deep because a segment holds tables, a table code lengths, and a length codes.
    """
    at = 0
    while at + 17 <= length:
        kind = np.int64(load_byte(address + np.uintp(at)))
        if kind & 0xEE:
            return False
        table, total, code = 2 * (kind >> 4) + (kind & 1), 0, 0
        for bits in range(1, 17):
            total += np.int64(load_byte(address + np.uintp(at + bits)))
        if total > 256 or at + 17 + total > length:
            return False
        look[table, :] = 128
        first = 0
        for bits in range(1, 17):
            count = np.int64(load_byte(address + np.uintp(at + bits)))
            if code + count > 1 << bits:
                return False
            slow[table, 17 + bits] = first - code
            for k in range(first, first + count):
                symbol = np.int64(load_byte(address + np.uintp(at + 17 + k)))
                if symbol & 15 > 10 + (table < 2) or (table < 2 and symbol > 11):
                    return False  # values that no 8-bit image has
                slow[table, 34 + k] = symbol
                if bits <= LOOK:
                    _fill_look_up(table, look, code, bits, symbol, table < 2)
                code += 1
            first += count
            slow[table, bits] = code << (16 - bits)
            code <<= 1
        at += 17 + total
    return at == length


@kernel
def _read_quantisers(address, length, quantisers):
    """The tables of one DQT segment. Returns False when they have 16 bits or the length is odd."""
    if length % 65:
        return False
    for at in range(0, length, 65):
        table = np.int64(load_byte(address + np.uintp(at)))
        if table > 3:
            return False
        for k in range(64):
            quantisers[table, k] = load_byte(address + np.uintp(at + 1 + k))
    return True


@kernel
def _read_tables(address, header, quantisers, look, slow, choice):
    """All tables before the scan, and which of them the three components use (choice [3, 3]: DC
    table, AC table, quantiser). Returns False when the image is not plain 4:2:0 baseline."""
    at, frame, scan = 2, np.uintp(0), np.uintp(0)
    while at < header[SCAN_AT]:
        here = address + np.uintp(at)
        marker = load_byte(here + np.uintp(1))
        length = 256 * np.int64(load_byte(here + np.uintp(2))) + load_byte(here + np.uintp(3))
        body, good = here + np.uintp(4), True
        if marker == 0xC4:
            good = _read_huffman(body, length - 2, look, slow)
        elif marker == 0xDB:
            good = _read_quantisers(body, length - 2, quantisers)
        elif marker == 0xC0:
            good, frame = frame == np.uintp(0) and length == 17, body
        elif marker == 0xC1:
            good = False
        elif marker == 0xDA:
            good, scan = length == 12, body
        elif marker == 0xEE:
            good = False  # Adobe: may not be YCbCr
        if not good:
            return False
        at += 2 + length
    if frame == np.uintp(0) or scan == np.uintp(0):
        return False
    if not _read_choice(frame, scan, choice):
        return False
    defined = True  # libturbojpeg refuses a file whose table is missing
    for c in range(3):
        defined = defined and quantisers[choice[c, 2], 0] != 0
    return defined


@kernel
def _read_choice(frame, scan, choice):
    """Which tables the components use. Returns False for another sampling or component order."""
    for c in range(3):
        entry = frame + np.uintp(6 + 3 * c)
        selector = scan + np.uintp(1 + 2 * c)
        if load_byte(entry) != c + 1 or load_byte(selector) != c + 1:
            return False
        if load_byte(entry + np.uintp(1)) != (0x22 if c == 0 else 0x11):
            return False
        tables, quantiser = load_byte(selector + np.uintp(1)), load_byte(entry + np.uintp(2))
        if tables & 0xEE or quantiser > 3:
            return False
        choice[c, 0], choice[c, 1], choice[c, 2] = tables >> 4, 2 + (tables & 1), quantiser
    return True


# Below, tables are read by address: arrays in the inner loops would cost a reference count per
# block. `slow` holds, per table, limits [17], offsets [17] and symbols [256], all int32.
SLOW_TABLE = 17 + 17 + 256
# Six blocks of an MCU, int32 [64], with the position of the last coefficient behind each; as far
# apart as to begin on cache lines.
BLOCK, LAST_AT = 320, 4 * 66
# look-up, slow, quantisers, blocks, start on a cache line
TABLE_BYTES = (16 << LOOK) + 16 * SLOW_TABLE + 16 * 80 + 6 * BLOCK + 64


@kernel
def _long_code(bits, table, slow):
    """(length, symbol) of a code longer than LOOK bits at the top of `bits`; length 0: none."""
    base = slow + np.uintp(4 * SLOW_TABLE * table)
    top = np.int64(bits >> np.uint64(48))
    for length in range(LOOK + 1, 17):
        if top < load_int32(base + np.uintp(4 * length)):
            offset = load_int32(base + np.uintp(4 * (17 + length)))
            place = 34 + ((offset + (top >> (16 - length))) & 255)
            return np.int64(length), load_int32(base + np.uintp(4 * place))
    return np.int64(0), np.int64(0)


@kernel
def _long_value(bits, entry, table, slow):
    """(bits used, steps, value) of a symbol that the look-up table does not finish."""
    length, steps, size = entry & 63, (entry >> 8) & 255, entry >> 16
    if length == 0:
        length, symbol = _long_code(bits, table, slow)
        size, steps = _size_and_steps(symbol, table < 2)
    if length == 0 or size == 0:
        return length, steps, np.int64(0)
    value = np.int64((bits << np.uint64(length)) >> np.uint64(64 - size))
    if value >> (size - 1) == 0:
        value += 1 - (1 << size)
    return length + size, steps, value


@kernel
def _next_entry(bits, look):
    """Entry of the next symbol in the look-up table at an address, see `_fill_look_up`."""
    return load_int32(look + np.uintp(4) * np.uintp(bits >> np.uint64(64 - LOOK)))


@kernel
def _refill(at, bits, count):
    """At least 56 bits at hand. Returns (at, bits, count)."""
    bits |= load_bits(at) >> np.uint64(count)
    return at + np.uintp((63 - count) >> 3), bits, count | 56


@kernel
def _read_block(at, bits, count, dc, choice, memory, block):
    """Read one block: its int32 [64] = coefficients * quantisers, of which it must be zero before.

    Args: at, bits, count: next byte (address), bits at hand (from the top) and their number.
        dc: DC value of the block before. choice: (DC table, AC table, quantiser). memory:
        addresses of the look-up tables, the slow tables and the quantisers. block: address.
    Returns: (at, bits, count, dc, last): last = position of the last coefficient read, 0 for DC
        alone, -1 for a damaged block.
    Deep because the state of the bit reader must stay in registers: this is the inner loop.
    """
    look, slow, quantisers = memory
    quantiser = quantisers + np.uintp(320 * choice[2])
    at, bits, count = _refill(at, bits, count)
    codes = look + np.uintp((4 << LOOK) * choice[0])
    entry = _next_entry(bits, codes)
    used, value = entry & 63, entry >> 16
    if entry & 128 != 0:
        used, _, value = _long_value(bits, entry, choice[0], slow)
    bits, count, dc = bits << np.uint64(used), count - used, dc + value
    level = dc * load_int32(quantiser)
    if used == 0 or abs(level) > LARGEST_LEVEL:
        return at, bits, count, dc, np.int64(-1)
    store_int32(block, level)
    codes = look + np.uintp((4 << LOOK) * choice[1])
    k = np.int64(0)
    while True:
        at, bits, count = _refill(at, bits, count)
        for _ in range(2):  # of 26 bits at most
            entry = _next_entry(bits, codes)
            used, steps, value = entry & 63, (entry >> 8) & 255, entry >> 16
            if entry & 128 != 0:
                if steps > 0 or used == 0:
                    used, steps, value = _long_value(bits, entry, choice[1], slow)
                if steps == 0 or used == 0:
                    last = k if used > 0 else np.int64(-1)
                    return at, bits << np.uint64(used), count - used, dc, last
            bits, count, k = bits << np.uint64(used), count - used, k + steps
            place = block + np.uintp(4) * ZIGZAG[np.uint64(k)]
            store_int32(place, value * load_int32(quantiser + np.uintp(4 * k)))
            if k >= 63:
                return at, bits, count, dc, k if k == 63 else np.int64(-1)


@kernel
def _write_blocks(block, other, pixels, other_pixels, pitch):
    """Transform two blocks of a plane to pixels and clear them."""
    if max(load_int32(block + np.uintp(LAST_AT)), load_int32(other + np.uintp(LAST_AT))) == 0:
        _write_level(block, pixels, pitch)
        _write_level(other, other_pixels, pitch)
        return
    if max(simd.sum_sizes(block), simd.sum_sizes(other)) <= simd.SMALL:
        simd.transform_small_blocks(block, other, pixels, other_pixels, pitch)
    else:
        simd.transform_block(block, pixels, pitch)
        simd.transform_block(other, other_pixels, pitch)
    simd.clear_block(block)
    simd.clear_block(other)


@kernel
def _write_level(block, pixels, pitch):
    """`_write_blocks` for one of DC alone."""
    value = min(255, max(0, ((load_int32(block) + 4) >> 3) + 128))
    simd.fill_block(np.uint8(value), pixels, pitch)
    store_int32(block, 0)


@kernel
def _read_component(state, first, count, dc, choice, memory):
    """Read `count` blocks of one component in an MCU, from number `first` on.

    Args: state: (at, bits, count) as `_read_block`.
    Returns: (state, dc, whether all blocks are sound).
    """
    at, bits, left = state
    sound = True
    for b in range(first, first + count):
        block = memory[3] + np.uintp(BLOCK * b)
        at, bits, left, dc, last = _read_block(at, bits, left, dc, choice, memory[:3], block)
        store_int32(block + np.uintp(LAST_AT), last)
        if last < 0:
            sound = False
            break
    return (at, bits, left), dc, sound


@kernel
def _write_mcu(blocks, places, pitches):
    """Transform the blocks of an MCU, which are all read by then: a vector that is loaded right
    behind single stores to it waits for them. places: as `_read_tile`, of this MCU."""
    size, pitch = np.uintp(BLOCK), np.uintp(pitches[0])
    for row in range(2):
        left, pixels = blocks + np.uintp(2 * BLOCK * row), places[0] + np.uintp(8 * row) * pitch
        _write_blocks(left, left + size, pixels, pixels + np.uintp(8), pitch)
    blue = blocks + np.uintp(4 * BLOCK)
    _write_blocks(blue, blue + size, places[1], places[2], np.uintp(pitches[1]))


@kernel
def _read_tile(begin, length, mcus, wanted, places, pitches, choices, memory):
    """Decode one tile of `mcus` MCUs into the planes.

    Args: begin, length: its clean bytes. wanted: (first, end) MCUs to transform. places: address
        of the first MCU's pixels in the three planes. pitches: of luma, of chroma. choices: per
        component as `_read_block`. memory: as `_read_block`, and address of the blocks.
    Returns: whether the tile is sound and ends where its bytes end.
    """
    state = (begin, np.uint64(0), np.int64(0))
    dc_y = dc_b = dc_r = np.int64(0)
    for mcu in range(mcus):
        state, dc_y, good_y = _read_component(state, 0, 4, dc_y, choices[0], memory)
        state, dc_b, good_b = _read_component(state, 4, 1, dc_b, choices[1], memory)
        state, dc_r, good_r = _read_component(state, 5, 1, dc_r, choices[2], memory)
        sound = good_y and good_b and good_r
        if not sound or state[0] > begin + np.uintp(length + 16):
            return False
        if wanted[0] <= mcu < wanted[1]:
            luma, chroma = places[0] + np.uintp(16 * mcu), np.uintp(8 * mcu)
            _write_mcu(memory[3], (luma, places[1] + chroma, places[2] + chroma), pitches)
        else:
            for b in range(6):
                simd.clear_block(memory[3] + np.uintp(BLOCK * b))
    used = 8 * np.int64(state[0] - begin) - state[2]
    return 8 * length - 8 < used <= 8 * length


@kernel
def _decode_tiles(address, size, header, area, clean, tables, planes, pitches):
    """Decode the MCUs of `area` (row_0, row_1, column_0, column_1) into the planes.

    Args: clean: address of room for one tile and OVERREAD. tables: of TABLE_BYTES. planes:
        addresses of luma, blue, red.
    Returns: whether all went well.
    Long because the tiles share the reader's state, which a helper would have to take and return.
    """
    # In the workspace, not in local arrays: those are freed once only their address is in use.
    blocks = (tables + np.uintp(63)) & ~np.uintp(63)
    look_at = blocks + np.uintp(6 * BLOCK)
    slow_at = look_at + np.uintp(16 << LOOK)
    memory = (look_at, slow_at, slow_at + np.uintp(16 * SLOW_TABLE), blocks)
    look = carray(as_pointer(memory[0]), (4, 1 << LOOK), np.int32)
    slow = carray(as_pointer(memory[1]), (4, SLOW_TABLE), np.int32)
    quantisers = carray(as_pointer(memory[2]), (4, 80), np.int32)
    look[:], slow[:], quantisers[:] = 128, 0, 0
    for b in range(6):
        simd.clear_block(blocks + np.uintp(BLOCK * b))
    choice = np.zeros((3, 3), np.int64)
    if not _read_tables(address, header, quantisers, look, slow, choice):
        return False
    choices = (
        (choice[0, 0], choice[0, 1], choice[0, 2]),
        (choice[1, 0], choice[1, 1], choice[1, 2]),
        (choice[2, 0], choice[2, 1], choice[2, 2]),
    )
    mcus, at = header[INTERVAL], header[SCAN_AT]
    _, _, rows, columns = tile_grid(header)
    row_0, row_1, column_0, column_1 = area
    last_column = -(-column_1 // mcus) - 1
    for tile in range((row_1 - 1) * columns + last_column + 1):
        row, column = tile // columns, tile % columns
        use = row >= row_0 and column_0 // mcus <= column <= last_column
        target = clean if use else np.uintp(0)
        is_last = tile == rows * columns - 1
        at, length = clean_tile(address, size, at, tile, is_last, target)
        if at < 0:
            return False
        if use:
            first = column * mcus
            wanted = (column_0 - first, column_1 - first)
            down, right = (row - row_0) * 8, (first - column_0) * 8
            places = (
                planes[0] + np.uintp(2 * down * pitches[0] + 2 * right),
                planes[1] + np.uintp(down * pitches[1] + right),
                planes[2] + np.uintp(down * pitches[1] + right),
            )
            if not _read_tile(clean, length, mcus, wanted, places, pitches, choices, memory):
                return False
    return True


@kernel
def _repeat_ends(plane, pitch, rows, at_left, real_width):
    """Repeat the first and the last real value of every chroma row beside the image."""
    for row in range(rows):
        begin = plane + np.uintp(row * pitch)
        if at_left:
            store_byte(begin - np.uintp(1), load_byte(begin))
        if real_width > 0:
            end = begin + np.uintp(real_width)
            store_byte(end, load_byte(end - np.uintp(1)))


@kernel
def _color_rows(header, crop, area, planes, pitches, pixels):
    """The crop in RGB at `pixels`. Returns (pitch, columns before the crop's first)."""
    top, left, height, width = crop
    chroma_rows = (header[HEIGHT] + 1) // 2
    x = left - 16 * area[2]
    even = x - x % 2
    steps = -(-(x + width - even) // 16)
    for y in range(top, top + height):
        near = y // 2
        far = min(chroma_rows - 1, max(0, near + 1 if y % 2 else near - 1))
        luma = planes[0] + np.uintp((y - 16 * area[0]) * pitches[0] + even)
        near = (near - 8 * area[0]) * pitches[1] + even // 2
        far = (far - 8 * area[0]) * pitches[1] + even // 2
        target = pixels + np.uintp((y - top) * 48 * steps)
        for step in range(steps):
            simd.color_pixels(
                luma + np.uintp(16 * step),
                planes[1] + np.uintp(near + 8 * step),
                planes[1] + np.uintp(far + 8 * step),
                planes[2] + np.uintp(near + 8 * step),
                planes[2] + np.uintp(far + 8 * step),
                target + np.uintp(48 * step),
            )
    return 48 * steps, x - even


def plane_bytes(height, width):
    """Room that `decode_crop` needs at `planes`, for images of this size (arrays broadcast)."""
    tall, wide = (height + 15) // 16 * 16, (width + 15) // 16 * 16
    return tall * wide + tall * (wide // 2 + 2 * PAD) + 4 * PAD


def pixel_bytes(height, width):
    """Room that `decode_crop` needs at `pixels`."""
    return height * 3 * (width + 32)


@kernel
def decode_crop(address, size, header, crop, clean, planes, tables, pixels):
    """Decode a crop to RGB, if the JPEG is one that this decoder knows.

    Args: address, size: the JPEG. header: from `parse_header`, of the image's true size. crop:
        (top, left, height, width) in pixels, inside the image. clean, planes, tables, pixels:
        addresses of room: size + OVERREAD, `plane_bytes`, TABLE_BYTES and `pixel_bytes`.
    Returns: (pitch, columns before the crop's first one in a row of `pixels`); pitch 0: gave up.
    """
    tile_height, _, rows, _ = tile_grid(header)
    plain = header[MCU_HEIGHT] == 16 and header[MCU_WIDTH] == 16 and tile_height == 16
    if not plain or rows == 0 or min(header[HEIGHT], header[WIDTH]) < MIN_SIDE:
        return np.int64(0), np.int64(0)
    top, left, height, width = crop
    area = (
        max(0, top - CONTEXT) // 16,
        -(-min(header[HEIGHT], top + height + CONTEXT) // 16),
        max(0, left - CONTEXT) // 16,
        -(-min(header[WIDTH], left + width + CONTEXT) // 16),
    )
    high, wide = area[1] - area[0], area[3] - area[2]
    pitches = (16 * wide, 8 * wide + 2 * PAD)
    blue = planes + np.uintp(16 * high * pitches[0] + PAD)
    places = (planes, blue, blue + np.uintp(8 * high * pitches[1]))
    if not _decode_tiles(address, size, header, area, clean, tables, places, pitches):
        return np.int64(0), np.int64(0)
    real = (header[WIDTH] + 1) // 2 - 8 * area[2] if 16 * area[3] >= header[WIDTH] else 0
    for plane in (places[1], places[2]):
        _repeat_ends(plane, pitches[1], 8 * high, area[2] == 0, real)
    return _color_rows(header, crop, area, places, pitches, pixels)
