"""The writer's C library: the bytes of the Python way, pixels of an area mean, no crash ever."""

import io
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fast_imagenet import jpeg, jpeg_native, jpeg_recode
from fast_imagenet.beton.encode import EncodeSettings, convert_stored, fitting_size

ROOT = Path(__file__).resolve().parents[1]
needs_library = pytest.mark.skipif(
    not jpeg_native.is_there(), reason="not built: python -m fast_imagenet.jpeg_native"
)


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.add(smooth, rng.integers(0, 12, smooth.shape, np.uint8))


def as_jpeg(image, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **options)
    return file.getvalue()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


# ------------------------------------------------------------------------------------------------
# Recoding
# ------------------------------------------------------------------------------------------------


@needs_library
def test_recoding_gives_the_bytes_of_the_python_way():
    """All ways a picture can end, every quality, noise, and widths beyond one group of lanes."""
    rng = np.random.default_rng(0)
    for number in range(240):
        height, width = rng.integers(1, 90, 2)
        width = width + 1000 * (number % 20 == 0)
        image = picture(height, width, number)
        if number % 5 == 0:
            image = rng.integers(0, 256, image.shape, np.uint8)
        quality, subsampling = int(rng.integers(1, 101)), 2 * (number % 2)
        data = as_jpeg(image, quality=quality, subsampling=subsampling)
        given = data, int(rng.integers(1, 9)), jpeg.quantisers(int(rng.integers(1, 101)))
        assert jpeg_native.recode(*given) == jpeg_recode.recode(*given) is not None


@needs_library
def test_recoding_makes_room_for_a_file_that_grows():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    data = as_jpeg(noise, quality=100, subsampling=0)
    given = data, 1, np.ones((2, 64), np.uint16)
    jpeg_native._ROOM.arrays.pop("out", None)
    job_room, seen = jpeg_native._run_recode, []

    def small(job, room):
        seen.append(room)
        return job_room(job, 100)

    jpeg_native._run_recode = small
    try:
        assert jpeg_native.recode(*given) == jpeg_recode.recode(*given)
    finally:
        jpeg_native._run_recode = job_room
    assert seen


@needs_library
def test_recoded_photographs_are_the_same():
    folder = os.environ.get("FAST_IMAGENET_PHOTOS")
    if not folder:
        pytest.skip("FAST_IMAGENET_PHOTOS does not name a folder of photographs")
    taken = 0
    for path in sorted(Path(folder, "imagenet_samples").glob("*.JPEG"))[::7]:
        given = path.read_bytes(), 4, jpeg.quantisers(90)
        ours = jpeg_native.recode(*given)
        assert ours == jpeg_recode.recode(*given)
        taken += ours is not None
    assert taken >= 20


# ------------------------------------------------------------------------------------------------
# Shrinking
# ------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(
    ("size_wh", "longest"),
    [((300, 200), 160), ((211, 333), 97), ((129, 17), 128), ((700, 90), 64), ((2, 900), 100)],
)
def test_shrinking_is_an_area_mean(size_wh, longest, subsampling):
    """As near to the exact mean as decoding, INTER_AREA and encoding again."""
    data = as_jpeg(picture(size_wh[1], size_wh[0]), quality=95, subsampling=subsampling)
    new_wh = fitting_size(size_wh, longest)
    mean = cv2.resize(pixels(data).astype(np.uint8), new_wh, interpolation=cv2.INTER_AREA)
    again, ours = jpeg.encode_jpeg(mean, 95), jpeg.shrink_jpeg(data, new_wh, 95)
    assert pixels(ours).shape == mean.shape
    wrong = ((pixels(ours) - mean) ** 2).mean()
    assert wrong < 1.3 * ((pixels(again) - mean) ** 2).mean() + 3
    assert abs((pixels(ours) - mean).mean()) < 1


@needs_library
def test_shrinking_writes_markers_and_quantisers_as_the_encoder_does():
    data = as_jpeg(picture(300, 400), quality=95)
    ours = jpeg.shrink_jpeg(data, (200, 150), 85)
    header = jpeg_native.read_header(ours.replace(b"\xff\xdd\0\4\0\1", b"\xff\xdd\0\4\0\0"))
    assert header.halved
    np.testing.assert_array_equal(header.steps[:2], jpeg.quantisers(85))
    assert jpeg.restart_interval(200) == 1
    assert b"\xff\xdd\0\4\0\1" in ours
    assert b"\xff\xd0" in ours


@needs_library
def test_only_plain_files_are_shrunk():
    image = picture(80, 120)
    for data in (
        as_jpeg(image, progressive=True),
        as_jpeg(image[..., 0]),
        as_jpeg(image, keep_rgb=True, subsampling=0),
        as_jpeg(image)[:-40],
        b"",
    ):
        assert jpeg.shrink_jpeg(data, (60, 40), 90) is None
    settings = EncodeSettings(max_side=60)
    broken = as_jpeg(image)
    broken = broken[:-300] + b"\xff\xc0" + broken[-298:]
    assert convert_stored((120, 80), broken, 0, settings) is None
    stored, size_wh = convert_stored((120, 80), as_jpeg(image), 0, settings)
    assert size_wh == (60, 40)
    assert pixels(stored).shape == (40, 60, 3)


# ------------------------------------------------------------------------------------------------
# Damage, and no library
# ------------------------------------------------------------------------------------------------

FUZZ = """
import sys
import numpy as np
sys.path.insert(0, "tests")
from test_jpeg_native import as_jpeg, picture
from fast_imagenet import jpeg_native as native, jpeg
rng, counts = np.random.default_rng(2), [0, 0]
steps = jpeg.quantisers(90)
for subsampling in (0, 2):
    data = as_jpeg(picture(70, 90), quality=95, subsampling=subsampling)
    for _ in range(1500):
        broken = bytearray(data)
        for place in rng.integers(2, len(data), rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        if rng.random() < 0.3:
            del broken[int(rng.integers(2, len(data))):]
        broken[-2:] = b"\\xff\\xd9"
        broken = bytes(broken)
        header = native.read_header(broken)
        if header is None or header.width * header.height > 1 << 20:
            continue
        counts[0] += native.recode(broken, 4, steps) is None
        counts[1] += native.shrink(broken, (45, 35), 1, steps) is None
print(*counts)
"""


@needs_library
def test_damaged_files_never_crash_the_process():
    done = subprocess.run([sys.executable, "-c", FUZZ], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(100 < int(count) < 3000 for count in done.stdout.split())


@needs_library
def test_damage_is_judged_as_the_python_way_does():
    rng = np.random.default_rng(3)
    data = as_jpeg(picture(50, 70), quality=95, subsampling=0)
    for _ in range(200):
        broken = bytearray(data)
        broken[int(rng.integers(len(data) // 3, len(data) - 2))] = rng.integers(0, 256)
        given = bytes(broken), 4, jpeg.quantisers(90)
        assert jpeg_native.recode(*given) == jpeg_recode.recode(*given)


def test_without_the_library_the_python_way_is_taken(monkeypatch):
    data = as_jpeg(picture(60, 80), quality=95)
    usual = jpeg.recode_jpeg(data, 80, 90)
    monkeypatch.setattr(jpeg_native, "is_there", lambda: False)
    assert jpeg.recode_jpeg(data, 80, 90) == usual
    assert jpeg.shrink_jpeg(data, (40, 30), 90) is None


def test_a_build_that_fails_says_why(monkeypatch):
    monkeypatch.setenv("CC", "no_such_compiler")
    with pytest.raises(RuntimeError, match="no_such_compiler does not run"):
        jpeg_native.build()
    monkeypatch.setenv("CC", "false")
    with pytest.raises(RuntimeError, match="false -O3"):
        jpeg_native.build()
