"""What jpeg_recode.py and jpeg_native.py share: the header of a plain JPEG, and constants.

Source: ITU-T T.81 (the format).
"""

from dataclasses import dataclass

import numpy as np

MAX_BLOCKS = 1 << 19  # luma blocks of the largest picture taken: 33 megapixels, 140 MB of tokens


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


def new_steps(header: Header, steps: np.ndarray | None) -> np.ndarray:
    """The new file's steps, float32 [2, 64]: no finer than `steps`, nor than the source's."""
    old = header.steps[:2].astype(np.float32)
    if steps is None:
        return old
    new = np.maximum(old, steps.astype(np.float32))
    if not header.halved:  # the mean of four blocks lies on no grid
        new[1] = steps[1]
    return new


def file_head(header: Header, steps, interval: int, codes: list[bytes]) -> bytes:
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
