"""A slow reader of a plain JPEG's coefficients, and what the C library must make of them."""

from dataclasses import dataclass

import numpy as np

ZIGZAG = sorted(
    ((row, column) for row in range(8) for column in range(8)),
    key=lambda cell: (sum(cell), cell[0] if sum(cell) % 2 else cell[1]),
)
PLACES = np.array([8 * row + column for row, column in ZIGZAG])
WAVES = np.cos(np.arange(8)[:, None] * (2 * np.arange(8) + 1) * np.pi / 16) / 2
WAVES[0] /= np.sqrt(2)


@dataclass
class Stored:
    """A JPEG's numbers: blocks of each component int [rows, columns, 64] in file order, steps."""

    width: int
    height: int
    halved: bool
    interval: int
    steps: np.ndarray
    blocks: list[np.ndarray]


def read(data: bytes) -> Stored:
    """The coefficients of a baseline YCbCr JPEG, 4:4:4 or 4:2:0."""
    at, steps, codes, interval = 2, {}, {}, 0
    while True:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body, at = data[at + 4 : at + 2 + length], at + 2 + length
        if marker == 0xDB:
            for start in range(0, len(body), 65):
                steps[body[start]] = np.frombuffer(body, np.uint8, 64, start + 1)
        elif marker == 0xC4:
            while body:
                count = sum(body[1:17])
                codes[body[0]], body = _code(body[1:17], body[17:]), body[17 + count :]
        elif marker == 0xC0:
            frame = body
        elif marker == 0xDD:
            interval = int.from_bytes(body, "big")
        elif marker == 0xDA:
            break
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    side = frame[7] >> 4
    tables = [(codes[body[2 + 2 * c] >> 4], codes[16 + (body[2 + 2 * c] & 15)]) for c in range(3)]
    grid = -(-height // (8 * side)), -(-width // (8 * side))
    blocks = _read_scan(data[at:-2], tables, grid, side, interval)
    found = np.array([steps[frame[8 + 3 * c]] for c in range(3)])
    return Stored(width, height, side == 2, interval, found, blocks)


def _code(counts: bytes, symbols: bytes) -> dict:
    code, place, found = 0, 0, {}
    for length, count in enumerate(counts, 1):
        for _ in range(count):
            found[length, code] = symbols[place]
            code, place = code + 1, place + 1
        code <<= 1
    return found


def _read_scan(scan: bytes, tables, grid, side: int, interval: int) -> list[np.ndarray]:
    sides = (side, 1, 1)
    blocks = [np.zeros((grid[0] * s, grid[1] * s, 64), int) for s in sides]
    parts = _parts(scan) if interval else [scan]
    for mcu in range(grid[0] * grid[1]):
        if mcu == 0 or (interval and mcu % interval == 0):
            part = parts[mcu // interval if interval else 0].replace(b"\xff\0", b"\xff")
            bits, at = "".join(f"{byte:08b}" for byte in part), 0
            before = [0, 0, 0]
        y, x = divmod(mcu, grid[1])
        for c, s in enumerate(sides):
            for i in range(s * s):
                block = blocks[c][y * s + i // s, x * s + i % s]
                at = _read_block(bits, at, tables[c], block)
                block[0] += before[c]
                before[c] = block[0]
    return blocks


def _parts(scan: bytes) -> list[bytes]:
    """The scan between its restart markers, which must be in order."""
    parts, begin = [], 0
    for at in range(len(scan) - 1):
        if scan[at] == 0xFF and 0xD0 <= scan[at + 1] <= 0xD7:
            assert scan[at + 1] & 7 == len(parts) % 8
            parts.append(scan[begin:at])
            begin = at + 2
    return [*parts, scan[begin:]]


def _read_block(bits: str, at: int, tables, block: np.ndarray) -> int:
    k = 0
    while k < 64:
        length = 1
        while (length, int(bits[at : at + length], 2)) not in tables[k > 0]:
            length += 1
        symbol = tables[k > 0][length, int(bits[at : at + length], 2)]
        at, size = at + length, symbol & 15
        if k and symbol == 0:
            return at
        k += symbol >> 4 if k else 0
        if size:
            value = int(bits[at : at + size], 2)
            block[k] = value if bits[at] == "1" else value - (1 << size) + 1
        at, k = at + size, k + 1
    return at


def rounded(values: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Levels of steps `new` for coefficients of steps `old`; a bare half goes down."""
    scale = old.astype(np.float32) / new.astype(np.float32)
    size = (np.abs(values).astype(np.float32) * scale + np.float32(0.4999)).astype(int)
    return np.sign(values) * np.minimum(size, 1023)


def halved(blocks: np.ndarray, steps: np.ndarray, tall: int, wide: int) -> np.ndarray:
    """Coefficients of 4:4:4 chroma -> of the means of 2 x 2 pixels, float [tall / 2, wide / 2, 64].

    The image is continued by its mirror image where it has an odd number of blocks.
    """
    waves = np.zeros((tall, wide, 64))
    waves[..., PLACES] = blocks * steps.astype(float)
    samples = np.einsum("vy,abvu,ux->aybx", WAVES, waves.reshape(tall, wide, 8, 8), WAVES)
    samples = samples.reshape(8 * tall, 8 * wide)
    samples = np.pad(samples, ((0, tall % 2 * 8), (0, wide % 2 * 8)), "symmetric")
    means = samples.reshape(len(samples) // 2, 2, -1, 2).mean((1, 3))
    means = means.reshape(len(means) // 8, 8, -1, 8)
    new = np.einsum("vy,aybx,ux->abvu", WAVES, means, WAVES)
    return new.reshape(*new.shape[:2], 64)[..., PLACES]
