"""The .beton file: FFCV's own layout, read by stock FFCV, damaged files refused."""

import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data import write_made_up
from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.encode import EncodeSettings, encode_jpeg, hash_fraction, resize_longest
from fast_imagenet.beton.reader import BetonError, BetonFile, sidecar_path
from fast_imagenet.beton.writer import write_beton
from fast_imagenet.sources import open_source
from tests.odd_images import pillow_rgb, scene

ROOT = Path(__file__).resolve().parents[2]
COUNT = 40


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """40 drawn images, about half of them raw."""
    path = tmp_path_factory.mktemp("mixed") / "train.beton"
    write_beton(path, open_source("synthetic", "", "train", size=COUNT), settings("proportion"))
    return path


def settings(mode: str = "jpg", **changes) -> EncodeSettings:
    return EncodeSettings(mode=mode, **{"max_side": 100, "seed": 3, **changes})


def expected_pixels(index: int) -> np.ndarray:
    """Image `index` of the source as it goes into the encoder."""
    return resize_longest(open_source("synthetic", "", "train", size=COUNT).pixels(index), 100)


# ------------------------------------------------------------------------------------------------
# Layout
# ------------------------------------------------------------------------------------------------


def test_layout_is_that_of_ffcv():
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    assert types.CURRENT_VERSION == fmt.FORMAT_VERSION
    assert types.HeaderType == fmt.HEADER
    assert types.FieldDescType == fmt.FIELD
    assert types.ALLOC_TABLE_TYPE == fmt.ALLOCATION
    assert RGBImageField().metadata_type == fmt.IMAGE
    theirs = types.get_metadata_type([RGBImageField(), IntField()])
    assert theirs.itemsize == fmt.SAMPLE.itemsize
    offsets = [[kind.fields[name][1] for name in kind.names] for kind in (theirs, fmt.SAMPLE)]
    assert offsets[0] == offsets[1]
    for kind, number in ((IntField, fmt.INT_FIELD), (RGBImageField, fmt.IMAGE_FIELD)):
        assert types.TYPE_ID_HANDLER[number] is kind


def test_pages_and_padding(mixed):
    file = BetonFile(mixed)
    assert file.page_size == 8 << 20
    assert (file.offsets >= file.page_size).all()
    table = mixed.stat().st_size - COUNT * fmt.ALLOCATION.itemsize
    assert table % file.page_size == 0


def test_small_pages_are_filled_in_order(tmp_path):
    """Raw images of 30 kB in pages of 2 MiB: several pages, nothing across a border."""
    path = tmp_path / "many.beton"
    source = open_source("synthetic", "", "train", size=130)
    write_beton(path, source, settings("raw"), page_size=fmt.MIN_PAGE_SIZE)
    file = BetonFile(path)
    assert (np.diff(file.offsets) > 0).all()
    pages = file.offsets // file.page_size
    assert pages[0] == 1
    assert set(np.diff(pages).tolist()) == {0, 1}


def test_page_grows_for_a_large_image(tmp_path):
    class Large:
        kind, blocks, notes, classes, class_names = "test", None, (), ["a"], None
        labels = np.zeros(6, np.int64)
        makes_pixels = True

        def __len__(self):
            return 6

        def name(self, index):
            return f"image {index}"

        def pixels(self, index):
            sides = (1500, 1300) if index == 3 else (300, 200)
            return np.full((*sides, 3), index, np.uint8)

    path = tmp_path / "large.beton"
    write_beton(path, Large(), settings("raw", max_side=0), page_size=fmt.MIN_PAGE_SIZE)  # 5.85 MB
    file = BetonFile(path)
    assert file.page_size == 8 << 20
    order = [int(file.image(i)[0, 0, 0]) for i in range(6)]
    assert sorted(order) == list(range(6))
    assert _read_by_ffcv(path)["pixels_ok"]


# ------------------------------------------------------------------------------------------------
# Content
# ------------------------------------------------------------------------------------------------


def test_content_and_labels(mixed):
    file = BetonFile(mixed)
    assert len(file) == file.num_samples == COUNT
    assert sorted(file.labels.tolist()) == sorted(np.arange(COUNT) % 10)
    assert file.labels.tolist() != (np.arange(COUNT) % 10).tolist()
    assert 8 < (file.modes == "jpg").sum() < 32
    left = {index: expected_pixels(index) for index in range(COUNT)}
    for position in range(COUNT):
        stored, label = file.read(position), file.labels[position]
        shown = file.image(position)
        assert shown.shape == (file.heights[position], file.widths[position], 3)
        match = next(i for i, rgb in left.items() if rgb.shape == shown.shape and _near(rgb, shown))
        assert label == match % 10
        if file.modes[position] == "raw":
            np.testing.assert_array_equal(stored, left[match])
        else:
            np.testing.assert_array_equal(shown, pillow_rgb(stored))
        del left[match]


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    return np.abs(one.astype(int) - other).mean() < 12


def test_which_are_jpeg_is_a_hash_of_the_index():
    shares = np.array([hash_fraction(3, index) for index in range(4000)])
    assert 0 <= shares.min() < 0.01
    assert 0.99 < shares.max() < 1
    assert abs((shares < 0.25).mean() - 0.25) < 0.03
    assert abs(np.corrcoef(shares[1:], shares[:-1])[0, 1]) < 0.05
    others = np.array([hash_fraction(4, index) for index in range(4000)])
    assert abs(np.corrcoef(shares, others)[0, 1]) < 0.05


def test_modes(tmp_path):
    source = open_source("synthetic", "", "train", size=30)
    counts = {}
    for mode in ("jpg", "raw", "smart"):
        path = tmp_path / f"{mode}.beton"
        counts[mode] = write_beton(path, source, settings(mode, smart_bytes=20_000))["modes"]
        file = BetonFile(path)
        if mode == "smart":
            large = 3 * file.heights * file.widths > 20_000
            assert ((file.modes == "jpg") == large).all()
    assert counts["jpg"] == {"jpg": 30, "raw": 0}
    assert counts["raw"] == {"jpg": 0, "raw": 30}
    assert 0 < counts["smart"]["raw"] < 30


@pytest.mark.parametrize(
    ("height", "width", "side", "expected"),
    [
        (300, 400, 200, (150, 200)),
        (400, 300, 200, (200, 150)),
        (100, 80, 200, (100, 80)),
        (300, 400, 0, (300, 400)),
        (2, 1000, 100, (1, 100)),
        (375, 500, 400, (300, 400)),
    ],
)
def test_resize_longest(height, width, side, expected):
    rgb_hwc = scene(height, width)
    assert resize_longest(rgb_hwc, side).shape == (*expected, 3)


def test_resize_averages_areas():
    rgb_hwc = np.zeros((4, 4, 3), np.uint8)
    rgb_hwc[::2, ::2] = 200
    assert resize_longest(rgb_hwc, 2)[..., 0].tolist() == [[50, 50], [50, 50]]


def test_jpeg_is_baseline_420_and_near():
    rgb_hwc = scene(90, 120)
    data = encode_jpeg(rgb_hwc, 90)
    from PIL import Image, JpegImagePlugin

    with Image.open(__import__("io").BytesIO(data)) as image:
        assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
        assert "progressive" not in image.info
    assert np.abs(pillow_rgb(data).astype(int) - rgb_hwc).mean() < 8
    assert len(encode_jpeg(rgb_hwc, 40)) < len(data)


def test_sidecar_belongs_to_its_file(mixed, tmp_path):
    file = BetonFile(mixed)
    assert file.classes == file.sidecar["classes"]
    assert file.num_classes == 10
    copy = tmp_path / "train.beton"
    copy.write_bytes(mixed.read_bytes())
    assert BetonFile(copy).classes is None
    assert BetonFile(copy).num_classes == 10
    sidecar = tmp_path / "train.beton.json"
    summary = json.loads(Path(f"{mixed}.json").read_text())
    for change in ({"num_samples": 7}, {"labels_crc32": 1}, {"classes": ["a"]}, {"classes": None}):
        sidecar.write_text(json.dumps({**summary, **change}))
        with pytest.raises(BetonError, match=r"train\.beton\.json"):
            BetonFile(copy)
    sidecar.write_text("{")
    with pytest.raises(BetonError, match="cannot be read"):
        BetonFile(copy)


def test_reader_is_picklable(mixed):
    file = pickle.loads(pickle.dumps(BetonFile(mixed)))
    np.testing.assert_array_equal(file.image(5), BetonFile(mixed).image(5))


def test_a_copy_in_another_process_is_small_and_that_of_the_same_file(tmp_path):
    path = tmp_path / "made.beton"
    write_made_up(path, 20_000)
    packed = pickle.dumps(BetonFile(path))
    assert len(packed) < 5_000
    copy, file = pickle.loads(packed), BetonFile(path)
    for name in ("labels", "offsets", "sizes", "heights", "widths", "modes"):
        values = getattr(copy, name)
        assert np.array_equal(values, getattr(file, name))
        assert len(values) == 20_000 and (name == "modes" or values.dtype == np.int64)
    path.unlink()
    write_made_up(path, 30_000)
    with pytest.raises(BetonError, match=r"made.beton has changed since it was opened"):
        pickle.loads(packed)


def test_tables_in_another_order_are_read_alike(mixed, tmp_path):
    """As the workers of stock FFCV leave them; nothing is copied of a table in order."""
    whole, rows = BetonFile(mixed), np.random.default_rng(0)
    data = bytearray(mixed.read_bytes())
    table = np.frombuffer(data, fmt.ALLOCATION, offset=whole.data_end)
    table[:] = table[rows.permutation(len(table))]
    data[fmt.HEADER.itemsize + 17 : fmt.HEADER.itemsize + fmt.FIELD.itemsize] = bytes(1024)
    path = tmp_path / "shuffled.beton"
    path.write_bytes(data)
    file = BetonFile(path)
    assert np.array_equal(file.sizes, whole.sizes) and np.array_equal(file.offsets, whole.offsets)
    assert not np.may_share_memory(file.sizes, file.data)
    assert np.may_share_memory(whole.sizes, whole.data)
    assert np.array_equal(pickle.loads(pickle.dumps(file)).sizes, whole.sizes)


@pytest.mark.parametrize("index", [0, 32_767, 32_768, 69_999])
def test_a_damaged_sample_is_named_wherever_it_is(tmp_path, index):
    path = tmp_path / "made.beton"
    write_made_up(path, 70_000)
    _poke(path, fmt.METADATA_START + fmt.SAMPLE.itemsize * index, np.uint8(9))
    _refused(path, f"sample {index} is neither JPEG nor raw")


def test_reader_needs_neither_ffcv_nor_torch(mixed):
    code = f"""
        import sys
        from fast_imagenet.beton.reader import BetonFile
        BetonFile({str(mixed)!r})
        assert not {{"ffcv", "torch", "cv2", "PIL"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT, timeout=60)


# ------------------------------------------------------------------------------------------------
# Stock FFCV reads the file
# ------------------------------------------------------------------------------------------------


def _read_by_ffcv(path: Path) -> dict:
    """What stock FFCV's Reader sees: every image is found by its pointer, inside one page."""
    from ffcv.reader import Reader

    reader, ours = Reader(str(path)), BetonFile(path)
    data = np.fromfile(path, np.uint8)
    images, labels = (reader.metadata[name] for name in reader.metadata.dtype.names)
    pixels_ok = True
    for row in reader.alloc_table:
        index, start, size = (int(row[name]) for name in ("sample_id", "ptr", "size"))
        stored = data[start : start + size]
        mine = ours.read(index)
        mine = np.frombuffer(mine, np.uint8) if isinstance(mine, bytes) else mine.reshape(-1)
        pixels_ok &= np.array_equal(stored, mine) and int(images["data_ptr"][index]) == start
        pixels_ok &= start // reader.page_size == (start + size - 1) // reader.page_size
    return {"names": reader.field_names, "labels": labels, "pixels_ok": pixels_ok}


def test_stock_reader(mixed):
    seen = _read_by_ffcv(mixed)
    assert seen["names"] == ["image", "label"]
    np.testing.assert_array_equal(seen["labels"], BetonFile(mixed).labels)
    assert seen["pixels_ok"]


STOCK_FFCV = """
    import sys
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    class Images:
        def __len__(self):
            return 12
        def __getitem__(self, i):
            return np.full((20 + i, 30, 3), i, np.uint8), i % 4

    ours, theirs, result = sys.argv[1:]
    fields = {"image": RGBImageField("raw"), "label": IntField()}
    DatasetWriter(theirs, fields, num_workers=2).from_indexed_dataset(Images(), chunksize=3)
    seen = {}
    for os_cache, order in ((True, "SEQUENTIAL"), (False, "QUASI_RANDOM")):
        pipelines = {
            "image": [CenterCropRGBImageDecoder((48, 48), 1.0)],
            "label": [IntDecoder()],
        }
        loader = Loader(ours, batch_size=8, num_workers=1, os_cache=os_cache, seed=1,
                        order=OrderOption[order], pipelines=pipelines)
        batches = [(x.copy(), y.copy()) for x, y in loader]
        seen[order + "_images"] = np.concatenate([x for x, _ in batches])
        seen[order + "_labels"] = np.concatenate([y for _, y in batches]).ravel()
    np.savez(result, **seen)
"""


@pytest.fixture(scope="module")
def stock(mixed, tmp_path_factory) -> Path:
    """Folder with a file that stock FFCV wrote, and what its Loader gave for ours.

    In a process of its own: FFCV changes numba's types for the whole process.
    """
    folder = tmp_path_factory.mktemp("stock")
    paths = [str(mixed), str(folder / "stock.beton"), str(folder / "seen.npz")]
    command = [sys.executable, "-c", textwrap.dedent(STOCK_FFCV), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_stock_loader_sees_our_images(mixed, stock):
    """Decoded by stock FFCV from the page cache: the same images in the same order."""
    file, seen = BetonFile(mixed), np.load(stock / "seen.npz")
    np.testing.assert_array_equal(seen["SEQUENTIAL_labels"], file.labels)
    for i in range(COUNT):
        height, width = file.heights[i], file.widths[i]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square_hwc = file.image(i)[top : top + side, left : left + side]
        away = np.abs(seen["SEQUENTIAL_images"][i].astype(int) - resize_longest(square_hwc, 48))
        assert away.mean() < 2, i


@pytest.mark.slow
def test_stock_loader_reads_our_pages(stock):
    """Quasi-random order reads whole pages instead: each image once, with its own label."""
    seen = np.load(stock / "seen.npz")
    pairs = [
        sorted(zip(seen[f"{order}_labels"], map(bytes, seen[f"{order}_images"]), strict=True))
        for order in ("SEQUENTIAL", "QUASI_RANDOM")
    ]
    assert pairs[0] == pairs[1]
    assert seen["SEQUENTIAL_labels"].tolist() != seen["QUASI_RANDOM_labels"].tolist()


def test_file_of_stock_ffcv_is_read(stock):
    file = BetonFile(stock / "stock.beton")
    assert (file.classes, file.num_classes) == (None, 4)
    for i in range(12):
        np.testing.assert_array_equal(file.image(i), np.full((20 + i, 30, 3), i, np.uint8))
        assert file.labels[i] == i % 4


# ------------------------------------------------------------------------------------------------
# Damaged files
# ------------------------------------------------------------------------------------------------


def _refused(path: Path, words: str) -> None:
    with pytest.raises(BetonError, match=words) as caught:
        BetonFile(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text


@pytest.fixture
def copy(mixed, tmp_path) -> Path:
    path = tmp_path / "copy.beton"
    path.write_bytes(mixed.read_bytes())
    return path


def _poke(path: Path, position: int, value: np.ndarray) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(value.tobytes())


def test_missing_empty_foreign(tmp_path):
    _refused(tmp_path / "none.beton", "does not exist")
    _refused(tmp_path, "is a folder")
    path = tmp_path / "x.beton"
    for content, words in (
        (b"", "is empty"),
        (b"short", "only 5 bytes"),
        (b"PK\x03\x04" * 1000, "not a .beton file of format version 2"),
        (bytes(10_000), "unfinished"),
    ):
        path.write_bytes(content)
        _refused(path, words)


def test_unfinished(copy):
    _poke(copy, fmt.HEADER.fields["alloc_table_ptr"][1], np.uint64(0))
    _refused(copy, "unfinished")


@pytest.mark.parametrize("keep", [1, 23, 24, 500, 2_000, 3_000, 9_000_000])
def test_truncated(copy, keep):
    copy.write_bytes(copy.read_bytes()[:keep])
    _refused(copy, "truncated|not a .beton file|damaged")


@pytest.mark.parametrize("cut", [1, 24, 100, 24 * COUNT])
def test_truncated_by_a_little(copy, cut):
    copy.write_bytes(copy.read_bytes()[:-cut])
    _refused(copy, "truncated")


def test_bytes_after_the_end(copy):
    copy.write_bytes(copy.read_bytes() + bytes(40))
    _refused(copy, "40 bytes follow")


HEADER_FAULTS = {
    "version": (3, "format version 2"),
    "num_fields": (0, "0 fields"),
    "page_size": (3_000_000, "page size"),
    "num_samples": (10**9, "do not fit"),
    "alloc_table_ptr": (2**63, "truncated"),
}


@pytest.mark.parametrize("name", HEADER_FAULTS)
def test_damaged_header(copy, name):
    value, words = HEADER_FAULTS[name]
    dtype, position = fmt.HEADER.fields[name][:2]
    _poke(copy, position, np.array(value, dtype))
    _refused(copy, words)


SAMPLE_FAULTS = {
    "data_ptr": (2**64 - 1, "lies elsewhere"),
    "mode": (7, "neither JPEG nor raw"),
    "width": (0, "no pixels"),
}


@pytest.mark.parametrize("name", SAMPLE_FAULTS)
def test_damaged_sample(copy, name):
    value, words = SAMPLE_FAULTS[name]
    dtype, position = fmt.IMAGE.fields[name][:2]
    place = fmt.METADATA_START + 5 * fmt.SAMPLE.itemsize + position
    _poke(copy, place, np.array(value, dtype))
    _refused(copy, f"sample 5 .*{words}")


def test_damaged_label_and_raw_size(copy):
    file = BetonFile(copy)
    raw = int(np.flatnonzero(file.modes == "raw")[0])
    row = fmt.METADATA_START + raw * fmt.SAMPLE.itemsize
    _poke(copy, row + fmt.SAMPLE.fields["label"][1], np.int64(-3))
    _refused(copy, f"sample {raw} has a negative label")
    _poke(copy, row + fmt.SAMPLE.fields["label"][1], np.int64(1))
    _poke(copy, row + fmt.IMAGE.fields["height"][1], np.uint16(file.heights[raw] + 1))
    _refused(copy, f"sample {raw} is raw and does not have 3 x height x width bytes")


ALLOCATION_FAULTS = [
    ("sample_id", 6, "sample 5 is missing"),
    ("sample_id", 2**63, "sample 5 is missing"),
    ("size", 0, "impossible size"),
    ("size", 2**62, "impossible size"),
    ("ptr", 2**64 - 8, "outside the data pages"),
    ("ptr", 100, "outside the data pages"),
]


@pytest.mark.parametrize(("name", "value", "words"), ALLOCATION_FAULTS)
def test_damaged_allocation(copy, name, value, words):
    table = copy.stat().st_size - COUNT * fmt.ALLOCATION.itemsize
    dtype, position = fmt.ALLOCATION.fields[name][:2]
    place = table + 5 * fmt.ALLOCATION.itemsize + position
    _poke(copy, place, np.array(value, dtype))
    _refused(copy, words)


def test_overlap_and_page_border(copy):
    """Pointer and metadata agree, but the image lies on another one, or across a border."""
    file = BetonFile(copy)
    table = copy.stat().st_size - COUNT * fmt.ALLOCATION.itemsize
    jpgs = np.flatnonzero(file.modes == "jpg")
    first, second = int(jpgs[0]), int(jpgs[1])
    row = fmt.METADATA_START + second * fmt.SAMPLE.itemsize + fmt.IMAGE.fields["data_ptr"][1]
    place = table + second * fmt.ALLOCATION.itemsize + fmt.ALLOCATION.fields["ptr"][1]
    for pointer, words in (
        (int(file.offsets[first]) + 1, "overlaps"),
        (2 * file.page_size - 10, "beyond the data pages"),
    ):
        _poke(copy, row, np.uint64(pointer))
        _poke(copy, place, np.uint64(pointer))
        _refused(copy, words)


def test_any_damage_to_the_tables_is_refused_or_harmless(copy):
    """300 flipped bits in header, metadata and table: one sentence, or a file that adds up."""
    data = copy.read_bytes()
    table = len(data) - COUNT * fmt.ALLOCATION.itemsize
    places = [*range(fmt.HEADER.itemsize), *range(table, len(data))]
    places += range(fmt.METADATA_START, fmt.METADATA_START + COUNT * fmt.SAMPLE.itemsize)
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.choice(places, 300):
        _poke(copy, int(place), np.uint8(data[place] ^ (1 << rng.integers(8))))
        try:
            BetonFile(copy)
        except BetonError:
            refused += 1
        _poke(copy, int(place), np.uint8(data[place]))
    assert refused > 200


def test_wrong_fields(copy):
    _poke(copy, fmt.HEADER.itemsize + 1, np.frombuffer(b"photo", np.uint8))
    _refused(copy, "the checksum of its header and tables is wrong")


def test_damaged_jpeg_is_named(copy):
    file = BetonFile(copy)
    index = int(np.flatnonzero(file.modes == "jpg")[0])
    _poke(copy, int(file.offsets[index]), np.zeros(4, np.uint8))
    with pytest.raises(BetonError, match=f"JPEG of sample {index} cannot be decoded"):
        BetonFile(copy).image(index)


def test_the_summary_given_for_the_file_is_reported(copy):
    sidecar_path(copy).write_text("{}")
    with pytest.raises(BetonError, match=f"is the summary of a data file: name .*{copy.name}$"):
        BetonFile(sidecar_path(copy))
