"""Decode only the part of a JPEG that lies under a crop, by cutting at restart markers.

A restart marker resets the decoder, so the bytes between two markers (here: a tile of some MCUs)
decode without anything before them. The cutter copies the header with a new frame size, then the
tiles under the crop with renumbered markers, and libturbojpeg decodes the result as the small,
standard JPEG that it is. Pixels equal those of a full decode exactly.

Nothing read from the file is trusted: every access is bounded by the sample's size, and whatever
is not a one-scan sequential Huffman JPEG with complete, well-numbered markers whose tiles form a
grid is left to a full decode, which reports its own errors.

Source: ITU-T T.81, sections B.2 (markers), A.2 (MCUs), E.1.4 (restart intervals).
"""

import numpy as np

from .kernel import kernel
from .native import memchr, memcpy
from .vectors import load_byte, store_byte

# Chroma at half resolution is interpolated from the neighboring chroma sample: two pixels away.
CONTEXT = 2
# An image of up to 4 columns gets its chroma repeated, not interpolated: never cut one so narrow.
NARROW = 4
END_OF_IMAGE = 0xD9
RESTART = 0xD0

# What `parse_header` finds, as positions in its result.
FRAME_AT, HEIGHT, WIDTH, MCU_HEIGHT, MCU_WIDTH, INTERVAL, SCAN_AT = range(7)
NO_HEADER = (np.int64(0),) * 7


@kernel(inline="always")
def _two_bytes(address):
    return np.int64(load_byte(address)) * 256 + np.int64(load_byte(address + np.uintp(1)))


@kernel
def _parse_frame(at, length):
    """(height, width, MCU height, MCU width, components) of a frame header, zeros if unusual."""
    if length < 11 or load_byte(at + np.uintp(4)) != 8:
        return 0, 0, 0, 0, 0
    height, width = _two_bytes(at + np.uintp(5)), _two_bytes(at + np.uintp(7))
    components = np.int64(load_byte(at + np.uintp(9)))
    if height == 0 or width == 0 or components not in (1, 3) or length != 8 + 3 * components:
        return 0, 0, 0, 0, 0
    tallest = widest = np.int64(1)
    for c in range(components):
        sampling = np.int64(load_byte(at + np.uintp(11 + 3 * c)))
        widest, tallest = max(widest, sampling >> 4), max(tallest, sampling & 15)
    if widest > 4 or tallest > 4:
        return 0, 0, 0, 0, 0
    if components == 1:  # a single component is not interleaved: its MCU is one block
        widest = tallest = np.int64(1)
    return height, width, 8 * tallest, 8 * widest, components


@kernel
def parse_header(address, size):
    """Read a JPEG header up to the first scan.

    Args: address: of the first byte (uintp). size: bytes that may be read.
    Returns: seven int64: position of the frame header, height, width, MCU height, MCU width (in
        pixels), restart interval (in MCUs, 0 for none), position of the compressed data. All zero
        when this is not a JPEG that can be cut.
    """
    frame_at = height = width = mcu_height = mcu_width = interval = components = np.int64(0)
    if size < 4 or _two_bytes(address) != 0xFFD8:
        return NO_HEADER
    at = np.int64(2)
    while at + 4 <= size:
        here = address + np.uintp(at)
        marker, length = np.int64(load_byte(here + np.uintp(1))), _two_bytes(here + np.uintp(2))
        if load_byte(here) != 0xFF or length < 2 or at + 2 + length > size:
            return NO_HEADER
        if marker in (0xC0, 0xC1):
            frame_at = at
            height, width, mcu_height, mcu_width, components = _parse_frame(here, length)
        elif 0xC2 <= marker <= 0xCF and marker != 0xC4:
            return NO_HEADER  # progressive, lossless or arithmetic
        elif marker == 0xDD and length == 4:
            interval = _two_bytes(here + np.uintp(4))
        elif marker == 0xDA:
            scanned = np.int64(load_byte(here + np.uintp(4)))
            if components == 0 or scanned != components or length != 6 + 2 * components:
                return NO_HEADER
            scan_at = at + 2 + length
            return frame_at, height, width, mcu_height, mcu_width, interval, scan_at
        at += 2 + length
    return NO_HEADER


@kernel
def tile_grid(header):
    """Size and number of the independently decodable tiles.

    Returns: (tile height, tile width in pixels, tile rows, tile columns), zeros when the restart
        interval neither divides a row of MCUs nor is a whole number of rows.
    """
    if header[INTERVAL] == 0:
        return np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    per_row = -(-header[WIDTH] // header[MCU_WIDTH])
    rows = -(-header[HEIGHT] // header[MCU_HEIGHT])
    interval = header[INTERVAL]
    if per_row % interval == 0:
        columns = per_row // interval
        return header[MCU_HEIGHT], interval * header[MCU_WIDTH], rows, columns
    if interval % per_row == 0:
        deep = interval // per_row
        height = deep * header[MCU_HEIGHT]
        return height, per_row * header[MCU_WIDTH], -(-rows // deep), np.int64(1)
    return np.int64(0), np.int64(0), np.int64(0), np.int64(0)


@kernel
def clean_tile(address, size, at, number, is_last, target):
    """Copy a tile without its stuffed zeros; target 0 only finds its end.

    Returns: (position behind the tile's marker or -1, bytes written).
    """
    begin = target
    while at < size:
        found = memchr(address + np.uintp(at), np.int32(0xFF), np.uint64(size - at))
        if found == np.uintp(0) or found + np.uintp(1) >= address + np.uintp(size):
            return np.int64(-1), np.int64(0)
        marker = load_byte(found + np.uintp(1))
        end = np.int64(found - address)
        if target:
            length = end - at + (marker == 0)
            memcpy(target, address + np.uintp(at), np.uint64(length))
            target += np.uintp(length)
        at = end + 2
        if marker != 0:
            expected = END_OF_IMAGE if is_last else RESTART + (number & 7)
            return (at if marker == expected else np.int64(-1)), np.int64(target - begin)
    return np.int64(-1), np.int64(0)


@kernel
def _copy_tiles(address, size, at, columns, last_tile, wanted, target):
    """Copy the wanted tiles (row_0, row_1, column_0, column_1) to `target`, markers renumbered.

    Returns: the address behind the last byte written, or 0 when the markers are not as they must.
    """
    row_0, row_1, column_0, column_1 = wanted
    end = (row_1 - 1) * columns + column_1
    copied = np.int64(0)
    for tile in range(end):
        end_at, _ = clean_tile(address, size, at, tile, tile == last_tile, np.uintp(0))
        if end_at < 0:
            return np.uintp(0)
        row, column = tile // columns, tile % columns
        if row >= row_0 and column_0 <= column < column_1:
            length = end_at - at
            memcpy(target, address + np.uintp(at), np.uint64(length))
            target += np.uintp(length)
            store_byte(target - np.uintp(1), np.uint8(RESTART + (copied & 7)))
            copied += 1
        at = end_at
    store_byte(target - np.uintp(1), np.uint8(END_OF_IMAGE))
    return target


@kernel
def cut_region(address, size, header, crop, target):
    """Write a JPEG of the tiles under a crop.

    Args: address, size: the JPEG. header: from `parse_header`. crop: (top, left, height, width)
        in pixels, inside the image. target: where to write, room for `size` bytes.
    Returns: (bytes written, top, left, height, width of the region in pixels); zeros when the
        JPEG cannot be cut.
    """
    nothing = (np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0))
    tile_height, tile_width, rows, columns = tile_grid(header)
    if rows == 0:
        return nothing
    top, left, height, width = crop
    row_0 = max(0, top - CONTEXT) // tile_height
    column_0 = max(0, left - CONTEXT) // tile_width
    row_1 = min(rows, -(-(top + height + CONTEXT) // tile_height))
    column_1 = min(columns, -(-(left + width + CONTEXT) // tile_width))
    if header[WIDTH] - column_0 * tile_width <= NARROW and column_0 > 0:
        column_0 -= 1
    wanted = (row_0, row_1, column_0, column_1)
    body = target + np.uintp(header[SCAN_AT])
    memcpy(target, address, np.uint64(header[SCAN_AT]))
    end = _copy_tiles(address, size, header[SCAN_AT], columns, rows * columns - 1, wanted, body)
    if end == np.uintp(0):
        return nothing
    region_height = min(header[HEIGHT], row_1 * tile_height) - row_0 * tile_height
    region_width = min(header[WIDTH], column_1 * tile_width) - column_0 * tile_width
    frame = target + np.uintp(header[FRAME_AT])
    store_byte(frame + np.uintp(5), np.uint8(region_height >> 8))
    store_byte(frame + np.uintp(6), np.uint8(region_height & 255))
    store_byte(frame + np.uintp(7), np.uint8(region_width >> 8))
    store_byte(frame + np.uintp(8), np.uint8(region_width & 255))
    written = np.int64(end - target)
    return written, row_0 * tile_height, column_0 * tile_width, region_height, region_width
