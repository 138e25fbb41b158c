"""The decoder in C and hostile bytes: it reads what libturbojpeg reads, or leaves it alone."""

import ctypes
import io
import mmap
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fast_imagenet.native import FOLDER, decoder
from tests import fuzz
from tests.conftest import ROOT
from tests.damaged_images import black, damaged_images, hostile_images, segment, sound_images
from tests.odd_images import as_jpeg, scene


def decode(data, size, *, own, crop=None, out=None, by=None):
    """(pixels, status) of a JPEG, or of a crop of it; `out`: to another size; `by`: a Decoder."""
    copy = np.frombuffer(data, np.uint8).copy()
    samples = np.array([[copy.ctypes.data, copy.size, 0, *size]], np.int64)
    crops = np.array([[*(crop or (0, 0, *size)), 0]], np.int64)
    pixels, status = np.zeros((1, *(out or crops[0, 2:4]), 3), np.uint8), np.zeros(1, np.int64)
    options = {"method": "bilinear", "reduced": False, "own": own}
    (by or decoder.Decoder()).decode(
        0, 1, decoder.batch_places(samples, crops, pixels, status, **options)
    )
    return pixels[0], status[0]


@pytest.mark.parametrize("name", hostile_images())
def test_hostile_headers_are_read_as_libturbojpeg_reads_them(name):
    data = hostile_images()[name]
    size = (17, int(name.split()[0])) if name.endswith("columns") else (40, 50)
    pixels, status = decode(data, size, own=False)
    for own in (True, "only"):
        ours, found = decode(data, size, own=own)
        assert found in (status, decoder.FAILED) if own == "only" else found == status
        if found == decoder.GOOD:
            np.testing.assert_array_equal(ours, pixels)


def test_some_hostile_headers_are_read_and_most_are_not():
    """The test above would hold for a decoder that reads nothing."""
    assert decode(black(40, 50), (40, 50), own="only")[1] == decoder.GOOD
    read = {
        name
        for name, data in hostile_images().items()
        if decode(data, (40, 50), own="only")[1] == decoder.GOOD
    }
    assert {"gray, factors 22", "JFIF 1", "Adobe 1", "two images", "DRI of 2 bytes"} <= read
    assert not read & {"gray, factors 0", "codes of ones", "JFIF 2", "luma 11", "two frames"}


def test_a_file_of_another_size_is_refused():
    """Also one that libturbojpeg alone reads, of which it would make the size that is asked for."""
    for frame in (0xC0, 0xC2, 0xC9):
        data = black(40, 50, frame=frame)
        for size in ((80, 100), (20, 25), (40, 51), (41, 50)):
            for own in (True, False, "only"):
                pixels, status = decode(data, size, own=own)
                refused = {decoder.WRONG_SIZE} | ({decoder.FAILED} if own == "only" else set())
                assert status in refused and not pixels.any()


def test_an_error_in_a_header_does_not_reach_the_next_file():
    """libturbojpeg's handle remembers where it has stopped."""
    good, by = as_jpeg(scene(40, 50), progressive=True), decoder.Decoder()
    bad = good.replace(b"\xff\xdb\0\x43\0", b"\xff\xdb\0\x43\xff", 1)  # the number of a table
    for data, status in ((good, decoder.GOOD), (bad, decoder.FAILED), (good, decoder.GOOD)):
        assert decode(data, (40, 50), own=True, by=by)[1] == status


def test_a_file_of_too_many_scans_is_refused():
    """Each costs a pass over the image, and ten bytes."""
    scans = segment(0xDA, b"\1\1\0\0\0\1") + bytes(6)
    for count, status in ((1, decoder.GOOD), (600, decoder.FAILED)):
        data = black(40, 50, frame=0xC2)
        begin = data.index(b"\xff\xda")
        data = data[:begin] + scans * count + data[-2:]
        assert decode(data, (40, 50), own=True)[1] == status


LITTLE_MEMORY = """
import resource
from tests.damaged_images import black
from tests.native.test_decoder import decode

sound, size = black(40, 50), {size}
data = black(*size, frame={frame})
decode(sound, (40, 50), own=True)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + ({mib} << 20),) * 2)
for crop in ((0, 0, 30, 30), (0, 0, *size)):
    print(*(decode(data, size, own=own, crop=crop, out=(9, 9))[1] for own in (True, False, "only")))
assert decode(sound, (40, 50), own=True)[1] == 0
"""


def in_little_memory(size, frame, mib):
    """Statuses in a process that may take so much: of a small crop and the whole, own and not."""
    code = LITTLE_MEMORY.format(size=size, frame=frame, mib=mib)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(status) for status in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("frame", [0xC0, 0xC2, 0xC9], ids=["baseline", "progressive", "arithmetic"])
def test_a_small_file_of_a_huge_image_takes_no_memory(frame):
    """65500 x 65500 pixels are 17 GB; the process may take 100 MiB."""
    assert len(black(65500, 65500)) < 160
    found = in_little_memory((65500, 65500), frame, 100)
    assert found == [decoder.TOO_SHORT, decoder.TOO_SHORT, decoder.FAILED] * 2


@pytest.mark.slow
def test_an_image_that_memory_does_not_suffice_for_is_reported():
    """A sound one: its planes take 20 MB, its pixels from libturbojpeg 80 MB."""
    found = in_little_memory((4000, 4000), 0xC0, 12)
    short = decoder.NO_MEMORY
    assert found == [decoder.GOOD, short, decoder.GOOD, short, short, short]


def test_bytes_are_those_of_the_largest_image():
    one = decoder.Decoder()
    new = one.bytes
    decode(black(80, 96), (80, 96), own=False, by=one)  # libturbojpeg writes 4 bytes per pixel
    held = one.bytes
    assert new + 4 * 80 * 96 < held < new + 30 * 80 * 96
    decode(black(40, 48), (40, 48), own=False, by=one)
    assert one.bytes == held
    decode(black(80, 96), (80, 96), own=True, by=one)
    assert one.bytes > held


@pytest.fixture
def sanitizers(tmp_path):
    if not fuzz.has_sanitizers(tmp_path):
        pytest.skip("no compiler with sanitizers")


def extreme_images():
    """The longest codes, and sides of one block."""
    for height, width in ((1, 9000), (9000, 1), (3, 4001), (700, 700), (1, 1), (17, 9000)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        yield from (as_jpeg(image, quality=100, subsampling=mode) for mode in (0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("path", fuzz.paths())
def test_damaged_files_under_the_sanitizers(tmp_path, sanitizers, path):
    """Every read and write checked, and what is decoded compared with libturbojpeg."""
    program = fuzz.compile_fuzzer(tmp_path, fuzz.paths()[path])
    files = [*damaged_images(1500, 1), *extreme_images()]
    found = fuzz.fuzz(program, files, tmp_path)
    assert not any(found[promise] for promise in fuzz.PROMISES), found
    assert found["files"] == len(files) > 1500
    assert found["sound"] > 300 and found["ours"] > 100 and found["kept"] > 20


def changed_sources(folder, **changes):
    """A copy of the C sources with one line changed in each of some files."""
    copy = shutil.copytree(FOLDER, folder / "changed", ignore=shutil.ignore_patterns("*.so"))
    for name, (old, new) in changes.items():
        file = copy / name.replace("_", ".")
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))
    return copy


@pytest.mark.slow
def test_broken_promises_are_counted(tmp_path, sanitizers):
    """Four faults, of which every promise but `refused` takes notice, and files are kept."""
    sources = changed_sources(
        tmp_path,
        header_h=("return body[5] == 1;", "return 1;"),
        color_h=("by_green = pairs(-22554,", "by_green = pairs(-22654,"),
        decode_c=("sample->height ? GOOD : WRONG_SIZE", "sample->height ? GOOD : GOOD"),
        streams_h=("sizeof(int16_t) * BLOCK * across", "across"),
    )
    program = fuzz.compile_fuzzer(tmp_path, ["-DPORTABLE"], sources)
    found = fuzz.fuzz(program, damaged_images(200, 1), tmp_path)
    for promise in set(fuzz.PROMISES) - {"refused"}:
        kept = list(tmp_path.glob(f"{promise}-*.jpg"))
        assert found[promise] >= len(kept) > 0, promise


@pytest.mark.slow
def test_a_read_behind_the_file_ends_the_fuzzer(tmp_path, sanitizers):
    old = "length == 4 + 2 * header->parts && here[4] == header->parts"
    new = "here[4] == header->parts && length == 4 + 2 * header->parts"
    program = fuzz.compile_fuzzer(tmp_path, [], changed_sources(tmp_path, header_h=(old, new)))
    with pytest.raises(RuntimeError, match="heap-buffer-overflow"):
        fuzz.fuzz(program, damaged_images(0, 1), tmp_path)


# ------------------------------------------------------------------------------------------------
# Misuse, and memory that ends
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded():
    """A function: so many bytes, the last of which ends a page; the next page is out of reach."""
    libc, page, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def take(size, data=None):
        pages = -(-size // page) * page
        memory = np.frombuffer(mmap.mmap(-1, pages + page), np.uint8)
        kept.append(memory)
        assert libc.mprotect(memory.ctypes.data + pages, page, 0) == 0
        part = memory[pages - size : pages]
        if data is not None:
            part[:] = np.frombuffer(data, np.uint8)
            assert libc.mprotect(memory.ctypes.data, pages, mmap.PROT_READ) == 0
        return part

    return take


def test_nothing_is_read_behind_the_file_or_written_behind_the_batch(guarded):
    """In pages of which the next is not mapped: a stray access ends the process."""
    rng, by = np.random.default_rng(3), decoder.Decoder()
    for number, data in enumerate([*sound_images(150, 3), *damaged_images(150, 4)]):
        try:
            width, height = Image.open(io.BytesIO(data)).size
        except (OSError, SyntaxError, ValueError):
            width, height = 40, 30
        stored = guarded(len(data), data)
        samples = np.array([[stored.ctypes.data, stored.size, 0, height, width]], np.int64)
        h, w = (int(rng.integers(1, side + 1)) for side in (height, width))
        crops = np.array([[rng.integers(height - h + 1), rng.integers(width - w + 1), h, w, 1]])
        out = tuple(int(side) for side in rng.integers(1, 40, 2))
        pixels = guarded(3 * out[0] * out[1]).reshape(1, *out, 3)
        for method in decoder.METHODS:
            batch = decoder.batch_places(
                *(samples, crops, pixels, np.zeros(1, np.int64)),
                method=method,
                reduced=number % 2 == 0,
            )
            by.decode(0, 1, batch)


@pytest.mark.parametrize(
    "crop",
    [
        *((-1, 0, 5, 5), (0, -1, 5, 5), (36, 0, 5, 5), (0, 46, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0)),
        *((0, 0, -1, 5), (1 << 62, 0, 5, 5), (0, 0, 1 << 62, 5), (-(1 << 62), 0, 1 << 62, 5)),
        (40, 50, 1, 1),
    ],
)
def test_a_box_beside_the_image_is_refused(crop):
    stored = np.frombuffer(black(40, 50), np.uint8).copy()
    raw = np.zeros(3 * 40 * 50, np.uint8)
    rows = [[stored.ctypes.data, stored.size, 0, 40, 50], [raw.ctypes.data, raw.size, 1, 40, 50]]
    pixels, status = np.full((2, 4, 4, 3), 9, np.uint8), np.zeros(2, np.int64)
    batch = decoder.batch_places(
        *(np.array(rows, np.int64), np.array([[*crop, 0]] * 2, np.int64), pixels, status),
        method="area",
        reduced=False,
    )
    decoder.Decoder().decode(0, 2, batch)
    assert (status == decoder.WRONG_SIZE).all()
    assert not pixels.any()
