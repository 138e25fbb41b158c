"""JPEGs of every kind a dataset may hold, and what damage and hostile writers make of them."""

import io
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image

from fast_imagenet.beton import jpeg
from tests.odd_images import scene

SAMPLINGS = [
    getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}")
    for name in ("411", "420", "422", "440", "444")
]
HARD = (0, 1, 2, 3, 4, 5, 0x10, 0x11, 0x12, 0x21, 0x22, 0x41, 0x44, 0x7F, 0x80, 0xFE, 0xFF)
CODES = [*range(0xC0, 0xD0), *range(0xD0, 0xE0), 0, 1, 2, 0xE0, 0xEE, 0xF0, 0xFE, 0xFF]  # markers
DHT, SOS, DQT, RST, EOI = 0xC4, 0xDA, 0xDB, 0xD0, 0xD9


def sound_images(count: int, seed: int) -> list[bytes]:
    """`count` sound JPEGs: sizes 1 to 300 (most small), quality 1 to 100, gray and every sampling,
    restart intervals, standard and optimized codes, some progressive or CMYK, some of our writer.

    The first is baseline and has no restart markers.
    """
    draw = np.random.default_rng(seed)
    return [_sound_image(draw, is_first=number == 0) for number in range(count)]


def _sound_image(draw: np.random.Generator, *, is_first: bool) -> bytes:
    most = 300 if draw.random() < 0.05 else 70
    height, width = (int(n) for n in draw.integers(17 if is_first else 1, most + 1, 2))
    kind, quality = int(draw.integers(12)), int(draw.integers(1, 101))
    image = scene(height, width, int(draw.integers(1000)))
    if draw.random() < 0.2:
        image = draw.integers(0, 256, image.shape, np.uint8)
    if draw.random() < 0.1:
        image[:] = image[0, 0]
    if is_first:
        return cv2.imencode(".jpg", image)[1].tobytes()
    if kind < 3:
        return jpeg.encode_jpeg(image, quality, optimize=bool(kind))
    if kind == 3:
        file = io.BytesIO()
        mode = "CMYK" if draw.random() < 0.3 else "RGB"
        options = {"quality": quality, "optimize": bool(draw.integers(2))}
        options |= {"keep_rgb": mode == "RGB" and draw.random() < 0.5}
        Image.fromarray(image).convert(mode).save(file, "JPEG", **options)
        return file.getvalue()
    interval = int(draw.choice([0, 0, 0, 1, 2, 3, 5, -(-width // 16), -(-width // 8), 200]))
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    options += [cv2.IMWRITE_JPEG_OPTIMIZE, int(draw.integers(2))]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, int(draw.choice(SAMPLINGS))]
    options += [cv2.IMWRITE_JPEG_PROGRESSIVE, int(kind == 4)]
    return cv2.imencode(".jpg", image[..., 0] if kind == 5 else image, options)[1].tobytes()


# ------------------------------------------------------------------------------------------------
# Hostile headers
# ------------------------------------------------------------------------------------------------


def segment(marker: int, body: bytes) -> bytes:
    """A marker with its body."""
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def black(
    height: int, width: int, *, factors: int = 0x11, codes: int = 1, frame: int = 0xC0
) -> bytes:
    """A gray JPEG of zeros (gray 128), two bits a block, as short as can be.

    Args: height, width: pixels, as the frame states them. factors: sampling. codes: of one bit,
            1, or 2: then one is of ones alone, which is not allowed. frame: the frame's marker.
    """
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    bits = 2 * -(-height // 8) * -(-width // 8) if height * width < 1 << 25 else 8
    first = bytes([0, codes, *[0] * 15, *range(codes)])
    return b"".join(
        (
            *(b"\xff\xd8", segment(DQT, b"\0" + b"\1" * 64)),
            segment(frame, b"\x08" + size + bytes([1, 1, factors, 0])),
            *(segment(DHT, first), segment(DHT, b"\x10\1" + bytes(16))),
            *(segment(SOS, b"\1\1\0\0\x3f\0"), bytes(bits // 8)),
            bytes([0xFF >> bits % 8]) if bits % 8 else b"",
            b"\xff\xd9",
        )
    )


def hostile_images() -> dict[str, bytes]:
    """What is being tried -> file: headers that a decoder may read in another way than libjpeg."""
    options = [cv2.IMWRITE_JPEG_RST_INTERVAL, 1]
    plain, tiles = (
        cv2.imencode(".jpg", scene(40, 50), more)[1].tobytes() for more in ([], options)
    )
    gray = black(40, 50)
    (_, _, first), *_, (_, scan, body) = segments(plain)
    frame = next(begin for marker, begin, _ in segments(plain) if marker == 0xC0)

    def put(*parts: bytes) -> bytes:
        return plain[:first] + b"".join(parts) + plain[first:]

    made = {
        f"gray, factors {n:x}": black(40, 50, factors=n) for n in (0, 1, 0x10, 0x22, 0x44, 0x51)
    }
    made |= {f"luma {n:x}": _with(plain, frame + 11, n) for n in (0, 0x11, 0x12, 0x24, 0x42, 0x55)}
    made |= {f"Cb {n:x}": _with(plain, frame + 14, n) for n in (0, 0x12, 0x22, 0x31, 0x81)}
    made |= {f"id {n}": _with(plain, frame + 10, n) for n in (0, 2, 82)}
    made |= {f"JFIF {n}": _with(plain, 11, n) for n in (0, 1, 2, 255)}
    made |= {f"Adobe {n}": put(segment(0xEE, b"Adobe" + bytes(6) + bytes([n]))) for n in (0, 1, 2)}
    made |= {f"DRI of {n} bytes": put(segment(0xDD, bytes(n))) for n in (0, 1, 2, 3)}
    made |= {f"a scan's byte {n}": _with(plain, body - n, 1) for n in (1, 2, 3)}
    made |= {f"marker {n:x}": put(bytes([0xFF, n])) for n in (1, 0xD0, 0xD8, 0xD9, 0xFF)}
    made |= {
        f"segment {n:x}": put(segment(n, b"\0\x10")) for n in (2, 0xC8, 0xCC, 0xDC, 0xDE, 0xF0)
    }
    made |= {f"{n} columns": black(17, n) for n in (65500, 65501, 65535)}
    return made | {
        "codes of ones": black(40, 50, codes=2),
        "no height, DNL": black(0, 50)[:-2] + segment(0xDC, b"\0\x28") + b"\xff\xd9",
        "no width": black(40, 0),
        "12 bits": gray.replace(b"\x08\0\x28", b"\x0c\0\x28"),
        "quantisers of 16 bits": gray.replace(b"\0\x43\0", b"\0\x83\x10" + bytes([0, 1] * 32)),
        "a quantiser of 0": gray.replace(b"\1\1\1", b"\1\0\1", 1),
        "scan's segment of 2 bytes, at the end": plain[:scan] + b"\xff\xda\0\2",
        "scan's segment cut off": plain[: scan + 4],
        "two frames": put(plain[frame : frame + 19]),
        "two scans": plain[:-2] + plain[scan:],
        "two images": plain + plain,
        "bytes behind the last tile": plain[:-2] + b"\0\0" + plain[-2:],
        "a marker behind the last tile": tiles[:-2] + b"\xff\xd7" + tiles[-2:],
        "end behind the first tile": tiles.replace(b"\xff\xd0", b"\xff\xd9"),
        "FF twice before a marker": tiles.replace(b"\xff\xd1", b"\xff\xff\xd1"),
        "no end": plain[:-2],
        "all of it missing": b"\xff\xd8",
    }


def _with(data: bytes, at: int, byte: int) -> bytes:
    return data[:at] + bytes([byte]) + data[at + 1 :]


# ------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------


def segments(data: bytes | bytearray) -> list[tuple[int, int, int]]:
    """(marker, begin, end) of the header's segments to the scan's, as far as they can be read."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at + 1], at, min(end, len(data))))
        if data[at + 1] == SOS or end > len(data):
            break
        at = end
    return found


def _place(data: bytearray, draw: np.random.Generator) -> int:
    """Anywhere, every second time in the header."""
    found = segments(data)
    most = found[-1][2] if found and draw.integers(2) else len(data)
    return int(draw.integers(most)) if most else 0


def _segment(data: bytearray, draw: np.random.Generator) -> tuple[int, int, int]:
    found = segments(data)
    return found[int(draw.integers(len(found)))] if found else (0, 0, len(data))


def flip_bits(data: bytearray, draw: np.random.Generator) -> None:
    for _ in range(int(draw.integers(1, 4))):
        data[_place(data, draw)] ^= 1 << int(draw.integers(8))


def set_bytes(data: bytearray, draw: np.random.Generator) -> None:
    for _ in range(int(draw.integers(1, 4))):
        data[_place(data, draw)] = int(draw.choice(HARD)) if draw.integers(2) else draw.bytes(1)[0]


def set_run(data: bytearray, draw: np.random.Generator) -> None:
    at, size = _place(data, draw), int(draw.integers(1, 17))
    run = draw.bytes(size) if draw.integers(2) else bytes([int(draw.choice([0, 0xFF]))]) * size
    data[at : at + size] = run


def cut(data: bytearray, draw: np.random.Generator) -> None:
    """The end, or a part of the middle; every second time with a good end."""
    at = _place(data, draw)
    del data[at : len(data) if draw.integers(2) else at + int(draw.integers(1, 40))]
    if draw.integers(2):
        data += b"\xff\xd9"


def insert(data: bytearray, draw: np.random.Generator) -> None:
    at = _place(data, draw)
    data[at:at] = draw.bytes(int(draw.integers(1, 9)))


def append(data: bytearray, draw: np.random.Generator) -> None:
    data += draw.bytes(int(draw.integers(1, 40))) if draw.integers(2) else data[: len(data) // 2]


def change_table(data: bytearray, draw: np.random.Generator) -> None:
    """A byte of a segment's head or body: sizes, sampling, numbers of tables, steps, codes."""
    _, begin, end = _segment(data, draw)
    if end - begin < 3:
        return
    near = min(end, begin + 24) if draw.integers(2) else end
    at = int(draw.integers(begin + 2, near))
    by = int(draw.integers(-2, 3))
    data[at] = int(draw.choice(HARD)) if draw.integers(2) else (data[at] + by) & 255


def change_codes(data: bytearray, draw: np.random.Generator) -> None:
    """Codes of one length become codes of another: overfull tables, codes of ones alone."""
    tables = [found for found in segments(data) if found[0] == DHT and found[2] - found[1] > 21]
    if not tables:
        return
    begin = tables[int(draw.integers(len(tables)))][1] + 5
    for _ in range(int(draw.integers(1, 4))):
        one, other = (begin + int(n) for n in draw.integers(0, 16, 2))
        if data[one]:
            data[one], data[other] = data[one] - 1, (data[other] + 1) & 255


def change_steps(data: bytearray, draw: np.random.Generator) -> None:
    """Quantisers as no encoder writes them, with which sums wrap."""
    tables = [found for found in segments(data) if found[0] == DQT and found[2] - found[1] >= 69]
    if tables:
        begin = tables[int(draw.integers(len(tables)))][1] + 5
        low = int(draw.choice([1, 100, 250]))
        steps = draw.integers(low, 256, 64, np.uint8)
        count = int(draw.choice([1, 8, 64]))
        data[begin : begin + count] = steps[:count].tobytes()


def move_segment(data: bytearray, draw: np.random.Generator) -> None:
    """Left out, twice, or at another place."""
    _, begin, end = _segment(data, draw)
    body = data[begin:end]
    if draw.integers(3):
        del data[begin:end]
    if draw.integers(3):
        at = _segment(data, draw)[1]
        data[at:at] = body


def add_segment(data: bytearray, draw: np.random.Generator) -> None:
    """Adobe's or JFIF's, complete or not, a restart interval, DNL, another codec's."""
    interval, at = int(draw.integers(5)), _segment(data, draw)[1]
    bodies = [(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([int(n)])) for n in (0, 1, 2)]
    bodies += [(0xE0, b"JFIF\0" + bytes([int(n), 2, 0, 0, 1, 0, 1, 0, 0])) for n in (0, 1, 2)]
    bodies += [(0xDD, bytes([0, interval])), (0xDD, bytes([0, 0, interval])), (0xDC, b"\0\x20")]
    bodies += [(0xE1, b"Exif\0\0"), (0xFE, b"comment"), (0xCC, b"\0\x10"), (0xE2, b"ICC_PROFILE")]
    marker, body = bodies[int(draw.integers(len(bodies)))]
    if not draw.integers(4):
        body = body[: int(draw.integers(len(body) + 1))] + draw.bytes(int(draw.integers(3)))
    data[at:at] = segment(marker, body)


def add_marker(data: bytearray, draw: np.random.Generator) -> None:
    at = _place(data, draw)
    data[at : at + int(draw.integers(3))] = bytes([0xFF, int(draw.choice(CODES))])


def fill_before_marker(data: bytearray, draw: np.random.Generator) -> None:
    """FF before a marker, which T.81 allows, or another byte, or one byte less."""
    places = [at for at in range(2, len(data) - 1) if data[at] == 0xFF and data[at + 1]]
    if not places:
        return
    at = places[int(draw.integers(len(places)))]
    if not draw.integers(4):
        del data[at - 1]
    else:
        data[at:at] = b"\xff" if draw.integers(2) else draw.bytes(1)


def change_restarts(data: bytearray, draw: np.random.Generator) -> None:
    """Another number, a tile twice, one left out."""
    places = [
        at for at in range(2, len(data) - 1) if data[at] == 0xFF and RST <= data[at + 1] < RST + 8
    ]
    if len(places) < 2:
        return
    number = int(draw.integers(len(places) - 1))
    begin, end = places[number], places[number + 1]
    kind = int(draw.integers(3))
    if kind == 0:
        data[begin + 1] = RST + int(draw.integers(8))
    elif kind == 1:
        data[begin:begin] = data[begin:end]
    else:
        del data[begin:end]


def state_size(data: bytearray, draw: np.random.Generator) -> None:
    """Another height and width in the frame."""
    for marker, begin, end in segments(data):
        if 0xC0 <= marker <= 0xC2 and end - begin > 9:
            for at in (begin + 5, begin + 7):
                old = int.from_bytes(data[at : at + 2], "big")
                new = int(draw.choice([old, old, old + draw.integers(-9, 10), draw.integers(400)]))
                data[at : at + 2] = (new % 65536).to_bytes(2, "big")


DAMAGES = (
    *(flip_bits, set_bytes, set_run, cut, insert, append, change_table, change_table, change_codes),
    change_steps,
    *(move_segment, add_segment, add_marker, fill_before_marker, change_restarts, state_size),
)


def damaged_images(count: int, seed: int) -> Iterator[bytes]:
    """A sound JPEG without restart markers, the hostile ones, then `count` more.

    Of these one in 32 is sound; the others are damaged one to three times, some have the scan of
    another file.
    """
    sound, draw = sound_images(max(20, min(400, count // 10)), seed), np.random.default_rng(seed)
    yield from (sound[0], *hostile_images().values())
    for number in range(count):
        data = bytearray(sound[int(draw.integers(len(sound)))])
        if number % 32 == 0:
            yield bytes(data)
            continue
        if draw.random() < 0.02:
            other = sound[int(draw.integers(len(sound)))]
            data[segments(data)[-1][2] :] = other[segments(other)[-1][2] :]
        for _ in range(int(draw.choice([1, 1, 1, 2, 3]))):
            if data:
                DAMAGES[int(draw.integers(len(DAMAGES)))](data, draw)
        yield bytes(data) or b"\xff"
