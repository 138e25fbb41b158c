"""Every source kind holds the same images; odd files decode as in Pillow; wrong layouts."""

import hashlib
import importlib.util
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from fast_imagenet.sources import (
    KINDS,
    Source,
    SourceError,
    ilsvrc_tar,
    official,
    open_source,
    tar,
    use_classes,
)
from fast_imagenet.sources import decode as decode_module
from fast_imagenet.sources.base import MAX_IMAGE_BYTES, ImageError, PackedNames, choose, shuffle
from fast_imagenet.sources.decode import decode_rgb
from fast_imagenet.sources.matfile import MatError, read_struct_array
from fast_imagenet.sources.official import Official
from fast_imagenet.sources.recognize import candidates, recognize
from fast_imagenet.sources.synthetic import CLASSES, SIDES, draw_image
from fast_imagenet.terminal import readable
from tests import make_sources as make
from tests.make_sources import MAKERS
from tests.odd_images import as_jpeg, broken_images, odd_images, pillow_rgb, png_16bit, saved, scene

# ------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", odd_images())
def test_odd_images_decode_as_in_pillow(name):
    data, kinds = odd_images()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about broken EXIF
        expected = pillow_rgb(data)
    rgb_hwc, found = decode_rgb(data, name)
    assert rgb_hwc.dtype == np.uint8
    np.testing.assert_array_equal(rgb_hwc, expected)
    assert set(found) == kinds


@pytest.mark.parametrize("name", broken_images())
def test_broken_images_are_refused(name):
    data, words = broken_images()[name]
    with pytest.raises(ImageError, match=words):
        decode_rgb(data, name)


def test_deep_gray_is_scaled():
    """Pillow 12 cuts 16-bit gray off at 255: almost all of it would be white."""
    deep_hw = np.array([[0, 128, 129, 255, 256, 32_768, 65_406, 65_407, 65_535]], np.uint16)
    rgb_hwc, kinds = decode_rgb(png_16bit(deep_hw))
    assert rgb_hwc[0, :, 1].tolist() == [0, 0, 1, 1, 1, 128, 254, 255, 255]
    assert (rgb_hwc == rgb_hwc[..., :1]).all() and {"16bit", "16bit_scaled"} <= set(kinds)


def test_damage_that_libjpeg_repairs_is_named():
    """Also where our decoder has nothing to say, and nothing is said of sound files."""
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
        sound = as_jpeg(scene(), **options)
        assert decode_rgb(sound)[1] == ()
        for data in (sound[:-90] + sound[-2:], sound[:-2] + b"\x55" * 9 + sound[-2:]):
            rgb_hwc, kinds = decode_rgb(data)
            assert kinds == ("repaired",)
            np.testing.assert_array_equal(rgb_hwc, pillow_rgb(data))


def test_without_ffcv_images_are_decoded_but_not_checked(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "fast_imagenet.native.decoder", raising=False)
    decode_module._native.cache_clear()
    monkeypatch.setattr(decode_module, "_native", decode_module._native.__wrapped__)
    rgb_hwc, kinds = decode_rgb(as_jpeg(scene()))
    assert kinds == ("unchecked",)
    np.testing.assert_array_equal(rgb_hwc, pillow_rgb(as_jpeg(scene())))


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "PCX", "SGI"])
def test_kinds_of_images_that_are_not_listed_are_refused(kind):
    assert kind not in decode_module.FORMATS
    with pytest.raises(ImageError, match="not an image of a known kind"):
        decode_rgb(saved(Image.fromarray(scene()), kind))


def test_size_is_checked_before_pixels(monkeypatch):
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(ImageError, match="80 x 60 pixels"):
        decode_rgb(as_jpeg(scene()))


def test_damaged_jpegs_are_treated_as_pillow_does():
    """300 files with flipped bytes: refused if Pillow refuses, otherwise the same pixels."""
    rng = np.random.default_rng(0)
    originals = [as_jpeg(scene()), as_jpeg(scene(), progressive=True), as_jpeg(scene(90, 70, 2))]
    refused = 0
    for turn in range(300):
        data = bytearray(originals[turn % 3])
        for position in rng.integers(0, len(data), 2):
            data[position] = rng.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = _pillow_or_none(bytes(data))
        if expected is None:
            refused += 1
            with pytest.raises(ImageError):
                decode_rgb(bytes(data))
        else:
            np.testing.assert_array_equal(decode_rgb(bytes(data))[0], expected)
    assert 10 < refused < 200


def _pillow_or_none(data: bytes) -> np.ndarray | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pillow_rgb(data)
    except Exception:
        return None


def test_real_photographs_decode_as_in_pillow(photos):
    files = sorted((photos / "imagenet_samples").iterdir())
    assert len(files) == 200
    for file in files[::4]:
        data = file.read_bytes()
        np.testing.assert_array_equal(decode_rgb(data)[0], pillow_rgb(data), err_msg=file.name)


# ------------------------------------------------------------------------------------------------
# Source kinds
# ------------------------------------------------------------------------------------------------


def test_every_kind_is_tested():
    assert set(KINDS) == set(MAKERS) | {"imagenette", "synthetic"}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", MAKERS)
def test_kind_gives_the_images_in_wnid_order(kind, split, tmp_path):
    MAKERS[kind](tmp_path)
    source = pickle.loads(pickle.dumps(open_source(kind, tmp_path, split)))
    assert source.classes == make.WNIDS
    assert source.labels.dtype == np.int64
    held = [(source.classes[label], source.read(i)) for i, label in enumerate(source.labels)]
    assert sorted(held) == make.by_wnid(split)
    assert len({source.name(i) for i in range(len(source))}) == len(source)
    assert source.kind == kind


@pytest.mark.parametrize("kind", ["ilsvrc_tar", "kaggle", "parquet"])
def test_readable_class_names(kind, tmp_path):
    MAKERS[kind](tmp_path)
    assert open_source(kind, tmp_path, "val").class_names == make.NAMES


def test_sources_survive_pickling_after_use(tmp_path):
    """A worker gets a copy: open files and loaded row groups must not travel with it."""
    for kind in ("ilsvrc_tar", "parquet", "webdataset"):
        MAKERS[kind](tmp_path / kind)
        source = open_source(kind, tmp_path / kind, "val")
        first = source.read(0)
        assert pickle.loads(pickle.dumps(source)).read(0) == first


def test_nothing_is_extracted(tmp_path):
    make.make_ilsvrc_tar(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    source = open_source("ilsvrc_tar", tmp_path, "train")
    source.read(len(source) - 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_val_labels_follow_train_when_classes_are_missing(tmp_path):
    make.make_image_folder(tmp_path)
    for file in (tmp_path / "val" / make.WNIDS[0]).iterdir():
        file.unlink()
    (tmp_path / "val" / make.WNIDS[0]).rmdir()
    source = open_source("image_folder", tmp_path, "val")
    assert source.classes == make.WNIDS
    assert set(source.labels.tolist()) == {1, 2}


def test_use_classes_renumbers_and_refuses(tmp_path):
    make.make_parquet(tmp_path)
    source = open_source("parquet", tmp_path, "val")
    wnids = [source.classes[label] for label in source.labels]
    wider = Source([], ["n00000001", *make.WNIDS])
    use_classes(source, wider)
    assert [wider.classes[label] for label in source.labels] == wnids
    with pytest.raises(SourceError, match="n02102040"):
        use_classes(source, Source([], ["n00000001", make.WNIDS[0], make.WNIDS[2]]))


def test_use_classes_matches_names(tmp_path):
    """Too few images to learn every wnid: the split is known by class names only."""
    wnids = ["n00000007", "n00000009"]
    source, train = Source([1, 1], ["cat", "dog"]), Source([0, 1], wnids, ["cat", "dog"])
    use_classes(source, train)
    assert (source.labels.tolist(), source.classes) == ([1, 1], wnids)


def test_labels_without_wnids_keep_their_numbers(tmp_path):
    members = []
    for i, label in enumerate([2, 0, 1, 2]):
        members += [(f"{i:03d}.png", b"image %d" % i), (f"{i:03d}.cls", b"%d" % label)]
    (tmp_path / "train-0.tar").write_bytes(make.tar_bytes(members))
    source = open_source("webdataset", tmp_path, "train")
    assert source.classes == ["0", "1", "2"]
    assert source.labels.tolist() == [2, 0, 1, 2]
    (tmp_path / "classes.txt").write_text("zebra\nant\nmole\n")
    source = open_source("webdataset", tmp_path, "train")
    assert (source.classes, source.notes) == (["zebra", "ant", "mole"], ())
    (tmp_path / "wnids.txt").write_text("n3\nn2\nn2\n")
    with pytest.raises(SourceError, match="2 of them different"):
        open_source("webdataset", tmp_path, "train", classes=tmp_path / "wnids.txt")


def test_class_file_of_unsorted_wnids_is_sorted(tmp_path):
    members = []
    for i, label in enumerate([0, 1]):
        members += [(f"{i}.jpg", b"x"), (f"{i}.cls", b"%d" % label)]
    (tmp_path / "train-0.tar").write_bytes(make.tar_bytes(members))
    (tmp_path / "classes.txt").write_text("n00000009\nn00000002\n")
    source = open_source("webdataset", tmp_path, "train")
    assert source.classes == ["n00000002", "n00000009"]
    assert source.labels.tolist() == [1, 0]


def test_parquet_of_sorted_rows_is_noted(tmp_path):
    make.make_parquet(tmp_path / "mixed", group_rows=8)
    assert open_source("parquet", tmp_path / "mixed", "train").notes == ()
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = np.repeat(np.arange(10), 20)
    image_type = pa.struct([("bytes", pa.binary())])
    images = pa.array([{"bytes": b"x"}] * 200, image_type)
    table = pa.table({"image": images, "label": labels})
    (tmp_path / "sorted").mkdir()
    pq.write_table(table, tmp_path / "sorted/train-0.parquet", row_group_size=20)
    (note,) = open_source("parquet", tmp_path / "sorted", "train").notes
    assert "1.0 classes on average" in note


# ------------------------------------------------------------------------------------------------
# Which layout it is
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_every_layout_is_recognized(kind, tmp_path):
    MAKERS[kind](tmp_path / "a")
    found, why = recognize(tmp_path / "a")
    assert found == kind and (tmp_path / "a" / why).exists()
    assert sorted(candidates(tmp_path / "a")) == [kind]


@pytest.mark.parametrize("place", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggle_is_recognized_from_any_of_its_folders(place, tmp_path):
    make.make_kaggle(tmp_path)
    kind, _ = recognize(tmp_path / place)
    assert _holds(open_source(kind, tmp_path / place, "val"))


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("place", ["data/{}/0.{}", "{}/0.{}", "a/b/{}-0.{}"])
def test_files_of_a_split_are_recognized_in_folders(kind, place, tmp_path):
    suffix = {"parquet": "parquet", "webdataset": "tar"}[kind]
    for split in ("train", "val"):
        _write_any(tmp_path / place.format(split, suffix), 0)
    assert recognize(tmp_path)[0] == kind


def test_layouts_that_are_image_folders(tmp_path):
    make.make_tiny(tmp_path / "tiny")
    for labels in make.LABELS:
        make.make_flat(tmp_path / labels, labels)
    for folder in tmp_path.iterdir():
        assert recognize(folder) == ("image_folder", "train/")


def test_two_layouts_are_a_question(tmp_path):
    make.make_image_folder(tmp_path)
    make.make_ilsvrc_tar(tmp_path)
    with pytest.raises(SourceError) as caught:
        recognize(tmp_path)
    for words in ("2 ways", "--source.kind=image_folder (train/)", "--source.kind=ilsvrc_tar"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), ["it holds nothing", "parquet: *.parquet", "kaggle: ILSVRC/Data/CLS-LOC/"]),
        (("imagenette2-160.tgz",), ["is an archive of Imagenette", "imagenette_size=160px"]),
        (("tiny-imagenet-200.zip", "x"), ["it holds tiny-imagenet-200.zip, x:", "unpack it first"]),
        (("set/train/a/1.jpg",), ["set does, give it as --source.path"]),
        (("Train/a/1.jpg",), ["it has 'Train', rename that to 'train'"]),
        (("train/n01440764.tar",), ["unpack train/n01440764.tar"]),
        (("cat/1.jpg", "dog/1.jpg"), ["holds cat/, dog/:", "--source.holdout"]),
    ],
)
def test_what_is_no_layout_is_named(files, words, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError) as caught:
        recognize(tmp_path)
    for word in (str(tmp_path), *words):
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------------------
# Wrong layouts, one sentence each
# ------------------------------------------------------------------------------------------------


def _refused(kind, path, split, *words):
    with pytest.raises(SourceError) as caught:
        open_source(kind, path, split)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_flat_val_is_explained(tmp_path):
    make.make_kaggle(tmp_path / "download")
    (tmp_path / "download/ILSVRC/Data/CLS-LOC").rename(tmp_path / "flat")
    _refused(
        "image_folder", tmp_path / "flat", "val", "flat: 7 files", "LOC_val_solution", "devkit"
    )


def test_a_class_whose_disk_is_not_mounted_is_not_left_out(tmp_path):
    make.make_image_folder(folder := tmp_path / "images")
    (folder / "train/n00").symlink_to("/not/mounted/n00")
    with pytest.raises(SourceError, match=r"n00 is a link to /not/mounted/n00, which is not there"):
        open_source("image_folder", folder, "train")


def test_folders_in_folders_without_end(tmp_path):
    make.make_image_folder(folder := tmp_path / "images")
    count = len(open_source("image_folder", folder, "train"))
    image = min((folder / "train").glob("*/*"))
    deep = f"{image.parent}/deep" + "/d" * 1200  # more than Python's own functions can descend
    subprocess.run(["mkdir", "-p", deep], check=True)
    shutil.copy(image, f"{deep}/x.jpg")
    try:
        assert len(open_source("image_folder", folder, "train")) == count + 1
    finally:  # pytest's own removal descends by calling itself
        subprocess.run(["rm", "-rf", image.parent / "deep"], check=True)


def test_unknown_val_class_is_refused(tmp_path):
    make.make_image_folder(tmp_path)
    (tmp_path / "val/n99999999").mkdir()
    _refused("image_folder", tmp_path, "val", "1 class that train/ does not have", "n99999999")


def test_empty_class_folder_is_refused(tmp_path):
    make.make_image_folder(tmp_path)
    (tmp_path / "train/n99999999").mkdir()
    _refused("image_folder", tmp_path, "train", "n99999999", "no images")


def test_missing_folder_suggests_the_right_kind(tmp_path):
    make.make_kaggle(tmp_path / "kaggle")
    make.make_ilsvrc_tar(tmp_path / "tars")
    _refused("parquet", tmp_path / "kaggle", "train", "holds 0 *.parquet files")
    _refused("image_folder", tmp_path / "tars", "train", "--source.kind=ilsvrc_tar")
    _refused("image_folder", tmp_path / "none", "train", "with train/ and val/")
    make.make_image_folder(tmp_path / "nested/images")
    _refused("image_folder", tmp_path / "nested", "train", f"{tmp_path}/nested/images does")
    for kind in ("parquet", "webdataset"):
        _refused(kind, tmp_path / "nested/images", "train", "--source.kind=image_folder")
    (tmp_path / "tars/train").mkdir()
    (tmp_path / "tars" / ilsvrc_tar.TRAIN_TAR).unlink()
    _refused("ilsvrc_tar", tmp_path / "tars", "train", "holds no ILSVRC2012_img_train.tar")


def test_ilsvrc_tar_missing_or_truncated(tmp_path):
    make.make_ilsvrc_tar(tmp_path)
    train = tmp_path / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) * 2 // 3])
    _refused("ilsvrc_tar", tmp_path, "train", "truncated")
    train.unlink()
    _refused("ilsvrc_tar", tmp_path, "train", "holds no ILSVRC2012_img_train.tar")
    devkit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.write_bytes(devkit.read_bytes()[:200])
    _refused("ilsvrc_tar", tmp_path, "val", "tar.gz")


@pytest.mark.parametrize("name", ["../../etc/passwd", "n01440764_1.exe", "/abs/n01440764_1.JPEG"])
def test_ilsvrc_tar_with_foreign_members_is_refused(name, tmp_path):
    inner = make.tar_bytes([(name, b"x")])
    outer = make.tar_bytes([("n01440764.tar", inner)])
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(outer)
    _refused("ilsvrc_tar", tmp_path, "train", repr(name), "not in the official archive")


def write_member(path, kind, size):
    """A tar of one member of this type that claims `size` bytes."""
    info = tarfile.TarInfo("1.jpg")
    info.type, info.size, info.linkname = kind, size, "/etc/passwd"
    path.write_bytes(info.tobuf() + bytes(10_240))


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"S"])
def test_links_devices_and_sparse_files_in_tars_are_refused(kind, tmp_path):
    write_member(tmp_path / "train-0.tar", kind, 0)
    _refused("webdataset", tmp_path, "train", "link, device or sparse")


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"X"])
def test_extra_headers_of_tars_are_not_read_whatever_their_size(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_HEADER_BYTES", 4000)
    read = []
    monkeypatch.setattr(tarfile.TarInfo, "_proc_member", lambda *_: read.append(1))
    write_member(tmp_path / "train-0.tar", kind, 5000)
    _refused("webdataset", tmp_path, "train", "an extra header of 5,000 bytes")
    assert not read


def test_large_members_of_tars_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_IMAGE_BYTES", 500)
    members = [("1.jpg", b"x" * 501), ("1.cls", b"0")]
    (tmp_path / "train-0.tar").write_bytes(make.tar_bytes(members))
    _refused("webdataset", tmp_path, "train", "'1.jpg' of 501 bytes", "500 at most")


# ------------------------------------------------------------------------------------------------
# The official archives
# ------------------------------------------------------------------------------------------------


def official_of(path, size=True):
    """What official.py would know, if the archive at `path` were the official one."""
    data = path.read_bytes()
    return Official(hashlib.md5(data).hexdigest(), len(data) if size else None)


def test_official_archives_are_compared_and_reported(tmp_path, monkeypatch):
    make.make_ilsvrc_tar(tmp_path)
    names = list(official.OFFICIAL)
    assert names == [ilsvrc_tar.TRAIN_TAR, ilsvrc_tar.VAL_TAR, ilsvrc_tar.DEVKIT]
    train, val, devkit = names

    def notes(split, md5="devkit"):
        return list(open_source("ilsvrc_tar", tmp_path, split, md5=md5).notes)

    size = (tmp_path / train).stat().st_size
    reported = (
        f"{train} has {size:,} bytes, the official archive 147,897,477,120: it is another one"
    )
    assert notes("train") == [reported]
    assert "fa75699e90414af021442c21a62c3abf: it is another one, or damaged" in notes("val")[1]
    assert notes("val", "none")[1].startswith(f"{devkit} was accepted, its md5 was not compared")
    with pytest.raises(SourceError, match=f"{val} has .* bytes.*--source.md5=devkit"):
        notes("val", "all")
    known = {name: official_of(tmp_path / name, name != devkit) for name in names}
    monkeypatch.setattr(official, "OFFICIAL", known)
    assert "has the official size; its md5 was not compared" in notes("train")[0]
    is_official = "{} is the official archive, md5 {}"
    expected = [is_official.format(name, known[name].md5) for name in (val, devkit)]
    assert notes("val")[1] == expected[1] and "md5" in notes("val")[0]
    assert notes("val", "all") == expected
    data = bytearray((tmp_path / val).read_bytes())
    data[700] ^= 1
    (tmp_path / val).write_bytes(data)
    with pytest.raises(SourceError, match=f"{val} has the md5 .*, the official archive "):
        notes("val", "all")


def test_webdataset_faults(tmp_path):
    whole = make.tar_bytes(
        [("1.jpg", b"x" * 600), ("1.cls", b"0"), ("2.jpg", b"y"), ("2.cls", b"1")]
    )
    shard = tmp_path / "train-0.tar"
    shard.write_bytes(whole[: 512 + 1024 + 1024])
    _refused("webdataset", tmp_path, "train", "no end mark")
    shard.write_bytes(whole[:700])
    _refused("webdataset", tmp_path, "train", "truncated")
    shard.write_bytes(b"\x1f\x8b" + bytes(600))
    _refused("webdataset", tmp_path, "train", "uncompressed tar")
    shard.write_bytes(make.tar_bytes([("1.jpg", b"x")]))
    _refused("webdataset", tmp_path, "train", "no label for the sample '1'")
    shard.write_bytes(make.tar_bytes([("1.jpg", b"x"), ("1.png", b"x"), ("1.cls", b"0")]))
    _refused("webdataset", tmp_path, "train", "2 images for the sample '1'")
    shard.rename(tmp_path / "shard-0.tar")
    _refused("webdataset", tmp_path, "train", "none of them named after the split")


def test_kaggle_faults(tmp_path):
    make.make_kaggle(tmp_path)
    solution = tmp_path / "LOC_val_solution.csv"
    lines = solution.read_text().splitlines()
    solution.write_text("\n".join(lines[:-1]))
    _refused("kaggle", tmp_path, "val", "no label for", "ILSVRC2012_val_")
    solution.write_text("\n".join([*lines[:-1], "ILSVRC2012_val_00000007,tench 1 2 3 4"]))
    _refused("kaggle", tmp_path, "val", "line 8")
    solution.unlink()
    _refused("kaggle", tmp_path, "val", "labels of val/ are read from LOC_val_solution.csv")


def test_parquet_faults(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "train-0.parquet"
    pq.write_table(pa.table({"photo": [b"x"], "label": [0]}), path)
    _refused("parquet", tmp_path, "train", "columns photo, label")
    make.make_parquet(tmp_path)
    path.write_bytes((tmp_path / "data/train-00000-of-00002.parquet").read_bytes()[:-50])
    _refused("parquet", tmp_path, "train", "not a complete parquet file")


def test_imagenette_offline_is_one_sentence(tmp_path, monkeypatch):
    """No network: torchvision's download fails with URLError."""
    import urllib.error
    import urllib.request

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    _refused("imagenette", tmp_path, "train", "cannot be downloaded", "image_folder")


def test_another_archive_of_imagenette_is_named(tmp_path):
    (tmp_path / "imagenette2-160.tgz").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"160.tgz has the md5 9dd4e461268c8034f5c8564e155c67a6,"):
        open_source("imagenette", tmp_path, "val", download="160px")


def test_imagenette_that_is_there_is_not_downloaded(tmp_path):
    make.make_image_folder(tmp_path / "imagenette2-160")
    source = open_source("imagenette", tmp_path, "val", download="160px")
    assert (source.kind, len(source)) == ("imagenette", 7)


@pytest.mark.parametrize("compress", [True, False])
def test_matlab_table(compress):
    rows = [(1, "n01440764", "tench", 0), (300, "n02102040", "Löwe", 3)]
    table = read_struct_array(make.meta_mat(rows, compress), "synsets")
    assert [int(row["ILSVRC2012_ID"][0]) for row in table] == [1, 300]
    assert [row["WNID"] for row in table] == ["n01440764", "n02102040"]
    assert table[1]["words"] == "Löwe"


def test_matlab_file_cut_anywhere_is_refused():
    data = make.meta_mat([(1, "n01440764", "tench", 0)])
    for length in range(0, len(data), 7):
        with pytest.raises(MatError):
            read_struct_array(data[:length], "synsets")


# ------------------------------------------------------------------------------------------------
# Synthetic images, order, limits
# ------------------------------------------------------------------------------------------------


def test_synthetic_images_depend_on_the_key_only():
    source = open_source("synthetic", "", "train", seed=5, size=40)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(source.pixels(13), again.pixels(13))
    np.testing.assert_array_equal(source.pixels(13), draw_image(3, (5, 0, 13)))
    others = [open_source("synthetic", "", "val", seed=5), open_source("synthetic", "", "train")]
    for other in others:
        assert not np.array_equal(other.pixels(13), source.pixels(13))


def test_synthetic_images_vary_in_size_and_are_balanced():
    source = open_source("synthetic", "", "val")
    assert len(source) == 1000
    assert len(open_source("synthetic", "", "train")) == 4000
    assert source.classes == CLASSES == sorted(CLASSES)
    assert np.bincount(source.labels).tolist() == [100] * 10
    shapes = np.array([source.pixels(i).shape for i in range(60)])
    assert shapes[:, :2].min() >= SIDES[0]
    assert shapes[:, :2].max() <= SIDES[1]
    ratios = shapes[:, 0] / shapes[:, 1]
    assert ratios.min() < 0.75
    assert ratios.max() > 1.3


def test_color_and_brightness_do_not_reveal_the_class():
    """Nearest class mean of the average color, on held-out images: chance is 10 %."""
    source = open_source("synthetic", "", "train", size=600)
    means = np.array([source.pixels(i).mean((0, 1)) for i in range(600)])
    train, test = slice(0, 400), slice(400, 600)
    centers = np.array([means[train][source.labels[train] == k].mean(0) for k in range(10)])
    distances = ((means[test, None] - centers) ** 2).sum(-1)
    accuracy = (distances.argmin(1) == source.labels[test]).mean()
    assert accuracy < 0.2


def test_choose_is_even_over_classes():
    labels = np.repeat([0, 1, 2], [100, 3, 50])
    chosen = choose(labels, 30, seed=1)
    assert np.bincount(labels[chosen]).tolist() in ([14, 3, 13], [13, 3, 14])
    assert (np.diff(chosen) > 0).all()
    assert choose(labels, 0, 1).tolist() == list(range(153))
    assert choose(labels, 999, 1).tolist() == list(range(153))
    assert choose(labels, 30, seed=2).tolist() != chosen.tolist()
    assert len(choose(np.arange(1000), 7, 0)) == 7


def test_shuffle_keeps_blocks_together():
    blocks = np.repeat(np.arange(20), 5)
    order = shuffle(np.arange(100), blocks, seed=3)
    assert sorted(order.tolist()) == list(range(100))
    runs = blocks[order].reshape(20, 5)
    assert (runs == runs[:, :1]).all()
    assert runs[:, 0].tolist() != list(range(20))
    free = shuffle(np.arange(100), None, seed=3)
    assert sorted(free.tolist()) == list(range(100))
    assert not (blocks[free].reshape(20, 5) == blocks[free].reshape(20, 5)[:, :1]).all()


def test_packed_names():
    names = ["", "a", "träin/é.JPEG", "odd\udcff.JPEG"]
    packed = pickle.loads(pickle.dumps(PackedNames(names)))
    assert [packed[i] for i in range(4)] == names


def test_truncated_file_loading_is_off():
    from PIL import ImageFile

    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert Image.MAX_IMAGE_PIXELS


# ------------------------------------------------------------------------------------------------
# Files that are no images, names that are no UTF-8
# ------------------------------------------------------------------------------------------------


def test_readable_names():
    expected = {"träin/é": "träin/é", "z\udcff.JPEG": "z\\xff.JPEG", "a\ud800": "a\\ud800"}
    for name, escaped in expected.items():
        assert readable(name) == escaped


def test_irregular_and_large_files_are_not_opened(tmp_path, monkeypatch):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)  # the path of a socket may have 108 bytes at most
    os.mkfifo("a_pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind("b_socket")
    (folder / "c_device").symlink_to("/dev/zero")
    with open(folder / "e_sparse", "wb") as file:
        file.truncate(60_000_000_000)
    with open(folder / "f_large", "wb") as file:
        file.truncate(MAX_IMAGE_BYTES)
    source = open_source("image_folder", tmp_path, "val")
    with monkeypatch.context() as guarded:
        guarded.setattr("builtins.open", lambda *_: pytest.fail("it was opened"))
        for index in range(3):
            with pytest.raises(ImageError, match="it is not a regular file"):
                source.read(index)
        with pytest.raises(ImageError, match="60,000,000,000 bytes, more than the allowed"):
            source.read(3)
    assert len(source.read(4)) == MAX_IMAGE_BYTES
    server.close()


def test_kaggle_text_that_is_no_utf8(tmp_path):
    make.make_kaggle(tmp_path)
    solution = tmp_path / "LOC_val_solution.csv"
    solution.write_bytes(solution.read_bytes() + b"z\xff,n01440764 1 2 3 4\n")
    with pytest.raises(SourceError, match=r"LOC_val_solution\.csv is not UTF-8 text"):
        open_source("kaggle", tmp_path, "val")


@pytest.mark.parametrize(("kind", "suffix"), [("webdataset", "tar"), ("parquet", "parquet")])
def test_folder_named_like_an_archive(kind, suffix, tmp_path):
    MAKERS[kind](tmp_path)
    (tmp_path / f"train-9.{suffix}").mkdir()
    with pytest.raises(SourceError, match=rf"train-9\.{suffix} is a folder, but named"):
        open_source(kind, tmp_path, "train")


@pytest.mark.parametrize(
    "files, words",
    [
        ([("1.cls", b"1000000000000")], ["the label 1000000000000", "1,000,000 classes"]),
        ([("1.cls", str(2**70).encode())], ["no label for the sample '1'"]),
        ([("1.json", b'{"label": Infinity}')], ["no label for the sample '1'"]),
        ([("1.json", b'{"label": 1.7}')], ["no label for the sample '1'"]),
        ([("1.json", b'{"label": true}')], ["no label for the sample '1'"]),
        ([("1.json", b"[" * 100_000)], ["no label for the sample '1'"]),
        ([("1.cls", b"0"), ("1.jpg", b"2"), ("1.cls", b"1")], ["sample '1' twice"]),
    ],
)
def test_labels_that_are_none_are_refused(files, words, tmp_path):
    shard = make.tar_bytes([("1.jpg", b"1"), *files])
    (tmp_path / "train-0.tar").write_bytes(shard)
    _refused("webdataset", tmp_path, "train", *words)


@pytest.mark.parametrize(
    "header",
    [{"GNU.sparse.map": "a,b"}, {"GNU.sparse.size": "x"}, {"GNU.sparse.major": "1"}],
)
def test_extra_headers_that_are_no_numbers_are_refused(header, tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("1.jpg")
        info.size, info.pax_headers = 600, header | {"GNU.sparse.minor": "0"}
        archive.addfile(info, io.BytesIO(b"\xff" * 600))
    _refused("webdataset", tmp_path, "train", "not a complete, uncompressed tar", "fetch it again")


# ------------------------------------------------------------------------------------------------
# Which files belong to which split
# ------------------------------------------------------------------------------------------------


def _write_any(path, label):
    """A shard or a parquet file, by its suffix, of one sample."""
    if path.suffix == ".tar":
        make.write_shard(path, ["a.jpg", "a.cls"], label)
    else:
        make.write_parquet(path, [label])


@pytest.mark.parametrize(("kind", "suffix"), [("webdataset", "tar"), ("parquet", "parquet")])
@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("imagenet_train_val/train-0", "imagenet_train_val/val-0"),
        ("train-val/a/train/0", "train-val/a/validation/0"),
        ("val/train_0", "train/val_0"),
        ("valid/of_training/0", "train/0_VALID"),
    ],
)
def test_the_nearest_name_decides_on_the_split(kind, suffix, train, val, tmp_path):
    for label, name in enumerate((train, val)):
        _write_any(tmp_path / f"{name}.{suffix}", label)
    for split, label in (("train", 0), ("val", 1)):
        assert open_source(kind, tmp_path, split).labels.tolist() == [label]


@pytest.mark.parametrize(("kind", "suffix"), [("webdataset", "tar"), ("parquet", "parquet")])
@pytest.mark.parametrize("name", ["train_val-0", "train/x.val.train-1", "train-validation/0"])
def test_a_name_of_two_splits_is_refused(kind, suffix, name, tmp_path):
    _write_any(tmp_path / f"{name}.{suffix}", 0)
    _refused(kind, tmp_path, "train", name, "may belong to train or val", "rename it")
    _refused(kind, tmp_path, "val", name, "may belong to train or val", "rename it")


@pytest.mark.parametrize(("kind", "suffix"), [("webdataset", "tar"), ("parquet", "parquet")])
def test_files_of_no_split_are_counted_and_linked_folders_read(kind, suffix, tmp_path):
    names = ("data/train-0", "data/shard-1", "data/shard-2", "data/._train-0", "data/test-0")
    for name in names:
        _write_any(tmp_path / "here" / f"{name}.{suffix}", 0)
    _write_any(tmp_path / "elsewhere" / f"train-1.{suffix}", 1)
    (tmp_path / "here/more").symlink_to(tmp_path / "elsewhere")
    source = open_source(kind, tmp_path / "here", "train")
    assert source.labels.tolist() == [0, 1]
    assert any(f"named after no split): 2, the first is {tmp_path}" in x for x in source.notes)
    assert any("(hidden): 1" in note for note in source.notes)


@pytest.mark.parametrize(("kind", "suffix"), [("webdataset", "tar"), ("parquet", "parquet")])
def test_one_file_in_two_splits_is_refused_and_twice_in_one_read_once(kind, suffix, tmp_path):
    _write_any(tmp_path / f"train-0.{suffix}", 0)
    (tmp_path / f"train-1.{suffix}").symlink_to(f"train-0.{suffix}")
    source = open_source(kind, tmp_path, "train")
    assert len(source) == 1
    assert any("reached a second time, through a link): 1" in note for note in source.notes)
    (tmp_path / f"val-0.{suffix}").symlink_to(f"train-0.{suffix}")
    _refused(kind, tmp_path, "train", "are one file, in two splits")
    _refused(kind, tmp_path, "val", "are one file, in two splits")


def test_a_val_folder_that_is_train_is_refused(tmp_path):
    make.make_image_folder(tmp_path)
    (tmp_path / "val").rename(tmp_path / "old")
    (tmp_path / "val").symlink_to("train")
    for split in ("train", "val"):
        _refused("image_folder", tmp_path, split, "are one folder")


def test_a_val_class_that_is_one_of_train_is_refused(tmp_path):
    make.make_image_folder(tmp_path)
    first = tmp_path / "val" / make.WNIDS[0]
    first.rename(tmp_path / "old")
    first.symlink_to(tmp_path / "train" / first.name)
    for split in ("train", "val"):
        _refused("image_folder", tmp_path, split, f"val/{first.name} are one folder: each split")


@pytest.mark.parametrize(("kind", "suffix"), [("webdataset", "tar"), ("parquet", "parquet")])
def test_files_of_another_ending_are_counted(kind, suffix, tmp_path):
    _write_any(tmp_path / f"train-0.{suffix}", 0)
    (tmp_path / f"train-0.{suffix}").rename(tmp_path / f"train-0.{suffix.upper()}")
    (tmp_path / f"train-1.{suffix}.gz").write_bytes(b"compressed")
    source = open_source(kind, tmp_path, "train")
    assert len(source) == 1
    assert f"left out (not named *.{suffix}): 1" in "".join(source.notes)


# ------------------------------------------------------------------------------------------------
# Keys of WebDataset
# ------------------------------------------------------------------------------------------------


def _shard(tmp_path, *names):
    make.write_shard(tmp_path / "train-0.tar", list(names))
    return open_source("webdataset", tmp_path, "train")


def test_a_key_ends_at_the_first_dot(tmp_path):
    """x.v2.jpg and x.v2.cls are a sample x: none of them vanishes."""
    source = _shard(tmp_path, "a.jpg", "a.cls", "d.1/b.v2.jpg", "d.1/b.v2.cls", "c.V2.PNG", "c.cls")
    assert [source.read(i) for i in range(3)] == [b"a.jpg", b"d.1/b.v2.jpg", b"c.V2.PNG"]
    assert source.labels.tolist() == [0, 1, 2] and source.notes == ()


def test_two_images_of_one_key_are_refused(tmp_path):
    for names in (["x.1.jpg", "x.1.cls", "x.2.jpg", "x.2.cls"], ["x.jpg", "x.cls", "x.v2.jpg"]):
        names = [*names, "x.v2.cls"] if "x.v2.jpg" in names else names
        make.write_shard(tmp_path / "train-0.tar", names)
        words = (names[0], "2 images for the sample 'x'", "the first dot", "rename")
        _refused("webdataset", tmp_path, "train", *words)


def test_what_belongs_to_no_sample_is_counted_and_named(tmp_path):
    mask = ["a.jpg", "a.cls", "a.seg.png", "a.txt"]
    source = _shard(
        tmp_path, "README", *mask, "b.cls", "c.txt", "__meta__.json", "._a.jpg", "LICENSE"
    )
    notes = "\n".join(source.notes)
    assert len(source) == 1 and source.read(0) == b"a.jpg"
    for words in (
        f"(file of no sample): 2, the first is {tmp_path}/train-0.tar/README",
        "(sample without an image): 3, the first is",
        "(further image of a sample): 1, the first is",
        "(hidden): 1, the first is",
    ):
        assert words in notes


@pytest.mark.parametrize("label", ["4", '"4"', "4.0"])
def test_two_labels_of_one_sample_are_refused(tmp_path, label):
    about = b'{"label": %s}' % label.encode()
    shard = make.tar_bytes([("1.jpg", b"1"), ("1.cls", b"3"), ("1.json", about)])
    (tmp_path / "train-0.tar").write_bytes(shard)
    _refused("webdataset", tmp_path, "train", "two labels for the sample '1'", "3", "4")


def test_a_copy_of_a_shard_is_a_warning(tmp_path):
    make.write_shard(tmp_path / "train-0.tar", ["a.jpg", "a.cls", "b.jpg", "b.cls"])
    make.write_shard(tmp_path / "train-1.tar", ["c.jpg", "c.cls"], start=2)
    assert not open_source("webdataset", tmp_path, "train").notes
    shutil.copy(tmp_path / "train-0.tar", tmp_path / "train-0 (1).tar")
    (note,) = open_source("webdataset", tmp_path, "train").notes
    assert "train-0.tar has the names, sizes and labels of" in note and "count twice" in note


# ------------------------------------------------------------------------------------------------
# Class names of parquet files, and names that map twice
# ------------------------------------------------------------------------------------------------

CATS = ["cat", "dog", "eel"]


def _classes_of(source):
    return [source.classes[label] for label in source.labels]


def test_every_parquet_split_is_read_by_its_own_class_names(tmp_path):
    make.write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], CATS)
    make.write_parquet(tmp_path / "train-1.parquet", [2, 0, 1], CATS)
    make.write_parquet(tmp_path / "val-0.parquet", [0, 2], ["dog", "eel", "cat"])
    train, val = (open_source("parquet", tmp_path, split) for split in ("train", "val"))
    assert _classes_of(train) == [*CATS, "eel", "cat", "dog"]
    use_classes(val, train)
    assert _classes_of(val) == ["dog", "cat"] and val.classes == train.classes


OTHER = [["cat", "dog", "fox"], ["eel", "cat", "dog"], ["cat", "dog"], None]


@pytest.mark.parametrize("second", OTHER)
def test_parquet_files_of_other_class_names_are_refused(second, tmp_path):
    make.write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], CATS)
    make.write_parquet(tmp_path / "train-1.parquet", [0, 1], second)
    _refused("parquet", tmp_path, "train", "train-1.parquet has", "class names", "train-0.parquet")


def test_a_class_file_speaks_for_parquet_files_without_names(tmp_path):
    make.write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], CATS)
    make.write_parquet(tmp_path / "train-1.parquet", [2, 0])
    (tmp_path / "classes.txt").write_text("cat\ndog\neel\n")
    options = {"classes": tmp_path / "classes.txt"}
    source = open_source("parquet", tmp_path, "train", **options)
    assert _classes_of(source) == [*CATS, "eel", "cat"]
    (tmp_path / "classes.txt").write_text("dog\ncat\neel\n")
    with pytest.raises(SourceError, match="in another order"):
        open_source("parquet", tmp_path, "train", **options)


@pytest.mark.parametrize("named", ["train", "val"])
def test_numbers_of_one_split_are_no_names_of_the_other(named, tmp_path):
    """Names may be numbers, sorted as text."""
    for split in ("train", "val"):
        names = ["0", "10", "2"] if split == named else None
        make.write_parquet(tmp_path / f"{split}-0.parquet", [0, 2], names)
    train, val = (open_source("parquet", tmp_path, split) for split in ("train", "val"))
    with pytest.raises(SourceError, match=rf"and {named} has names: give .* --source.classes"):
        use_classes(val, train)


def test_a_class_name_for_two_labels_is_refused(tmp_path):
    make.write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], ["cat", "crane", "crane"])
    _refused("parquet", tmp_path, "train", "'crane' to two classes", "--source.classes")


def test_val_that_knows_its_wnids_fits_train_that_does_not(tmp_path):
    make.write_parquet(tmp_path / "train-0.parquet", [0, 1], ["cat", "dog"])
    paths = ["n00000009_1.jpg", "n00000007_1.jpg"]
    make.write_parquet(tmp_path / "val-0.parquet", [0, 1], ["dog", "cat"], paths)
    train, val = (open_source("parquet", tmp_path, split) for split in ("train", "val"))
    use_classes(val, train)
    assert _classes_of(val) == ["dog", "cat"]
    with pytest.raises(SourceError, match="two classes that are one class of train"):
        use_classes(Source([0, 1], ["cat", "n00000007"], ["x", "cat"]), train)


def test_lists_that_contradict_are_refused():
    wnids = ["n00000007", "n00000009"]
    train, val = Source([0, 1], wnids, ["cat", "dog"]), Source([0, 1], wnids, ["dog", "cat"])
    with pytest.raises(SourceError, match=r"is the class n0000000\d in train and n0000000\d"):
        use_classes(val, train)
    use_classes(Source([0, 1], wnids, ["crane", "crane"]), Source([0, 1], wnids, ["crane"] * 2))


def test_a_date_is_no_wnid(tmp_path):
    """It has voted for classes, which put the labels of val into the order of dates."""
    dates = ["scan20240103-1.jpg", "n20240102-2.jpg", "scan_n20240101.jpg"]
    make.write_parquet(tmp_path / "val-0.parquet", [0, 1, 2], CATS, dates)
    source = open_source("parquet", tmp_path, "val")
    assert source.classes == CATS and source.labels.tolist() == [0, 1, 2]


def test_wnids_that_disagree_with_labels_are_reported(tmp_path):
    paths = ["n01440764_1.jpg", "n02102040_1.jpg", "n02102040_2.jpg"]
    make.write_parquet(tmp_path / "train-0.parquet", [0, 1, 0], ["a", "b"], paths)
    source = open_source("parquet", tmp_path, "train")
    assert source.classes == ["a", "b"]
    (note,) = source.notes
    assert "label 0 is n01440764 and, in 'n02102040_2.jpg', n02102040" in note


def test_two_lines_for_one_image_of_kaggle_are_refused(tmp_path):
    make.make_kaggle(tmp_path)
    solution = tmp_path / "LOC_val_solution.csv"
    text = solution.read_text()
    solution.write_text(text + text.splitlines()[1] + "\n")
    expected = open_source("kaggle", tmp_path, "val").labels  # the same once more is no matter
    assert len(expected) == 7
    solution.write_text(text + f"ILSVRC2012_val_00000001,{make.WNIDS[0]} 1 2 3 4\n")
    _refused("kaggle", tmp_path, "val", "two entries for 'ILSVRC2012_val_00000001'")


def test_an_official_image_that_is_there_twice_is_refused(tmp_path):
    make.make_ilsvrc_tar(tmp_path)
    name = "ILSVRC2012_val_00000001.JPEG"
    shard = make.tar_bytes([(name, b"1"), (f"val/{name}", b"2")])
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(shard)
    _refused("ilsvrc_tar", tmp_path, "val", name, "twice")
    shard = make.tar_bytes([(name, b"1")])
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(shard)
    notes = open_source("ilsvrc_tar", tmp_path, "val").notes
    assert any(
        "t12.tar.gz without an image): 6, the first is ILSVRC2012_val_00000002" in x for x in notes
    )


# ------------------------------------------------------------------------------------------------
# Parquet in bounded memory
# ------------------------------------------------------------------------------------------------


def test_image_paths_that_are_no_utf8(tmp_path):
    import pyarrow as pa

    stored = pa.array([b"n01440764_\xff.jpg", b"\xfe_n02102040.jpg", None], pa.binary())
    paths = pa.StringArray.from_buffers(3, *stored.buffers()[1:], stored.buffers()[0])
    make.write_parquet(tmp_path / "train-0.parquet", [1, 0, 0], None, paths)
    source = open_source("parquet", tmp_path, "train")
    assert _classes_of(source) == ["n01440764", "n02102040", "n02102040"]


def test_damaged_parquet_files_are_one_sentence(tmp_path):
    """Also a name of a column that is no UTF-8, and statistics that would end the process."""
    path = tmp_path / "train-0.parquet"
    names = [f"n{i + 1440764:08}_1.jpg" for i in range(20)]
    make.write_parquet(path, list(range(20)), CATS, names, row_group_size=7)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"label", b"labe\xff"))
    _refused("parquet", tmp_path, "train", "not a complete parquet file")
    rng, outcomes = np.random.default_rng(0), set()
    for _ in range(300):
        data = bytearray(whole)
        for position in rng.integers(len(data) // 2, len(data), 3):
            data[position] = rng.integers(256)
        path.write_bytes(data)
        try:
            source = open_source("parquet", tmp_path, "train")
            outcomes |= {len(source.read(i)) > 0 for i in range(len(source))}
        except (SourceError, OSError) as error:
            outcomes.add(type(error))
    assert SourceError in outcomes


def test_large_row_groups_are_read_in_pieces(tmp_path, monkeypatch):
    from fast_imagenet.sources import parquet

    labels = np.random.default_rng(0).permutation(500).tolist()
    make.write_parquet(tmp_path / "train-0.parquet", labels, row_group_size=300)
    for name, size in (("PIECE_BYTES", 300), ("KEPT_BYTES", 100), ("BATCH_BYTES", 3000)):
        monkeypatch.setattr(parquet, name, size)
    source = open_source("parquet", tmp_path, "train")
    assert len(np.unique(source.blocks)) > 5
    for index in np.random.default_rng(1).permutation(500)[:200]:
        assert source.read(index) == b"%d" % labels[index]
        assert sum(map(len, source._loaded[1].values())) < 110
    assert len({source.name(index) for index in range(500)}) == 500


@pytest.mark.slow
def test_a_small_parquet_file_of_gigabytes_needs_little_memory(tmp_path):
    """24 images of 20 MB, all alike, are some kB of file, and were 0.8 GB of memory."""
    code = f"""
import resource
import pyarrow as pa, pyarrow.parquet as pq
from pathlib import Path
from fast_imagenet.sources import open_source
image = bytes(20_000_000)
path = "x" * 10_000_000
one = pa.StructArray.from_arrays([pa.array([image]), pa.array([path])], ["bytes", "path"])
table = pa.table({{"image": pa.chunked_array([one] * 24), "label": list(range(24))}})
file = Path({str(tmp_path)!r}) / "train-0.parquet"
with pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
    writer.write_table(table, row_group_size=24)
assert file.stat().st_size < 500_000
del table, one, image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_source("parquet", file.parent, "train")
for index in (20, 0, 23):
    assert len(source.read(index)) == 20_000_000
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after - before < 400_000  # kB


# ------------------------------------------------------------------------------------------------
# Linked folders
# ------------------------------------------------------------------------------------------------


def _linked(tmp_path):
    make.make_image_folder(tmp_path / "images")
    (tmp_path / "more").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "more" / name).write_bytes(as_jpeg(scene()))
    return tmp_path / "images/train" / make.WNIDS[0]


def test_linked_folders_are_followed_as_torchvision_does(tmp_path):
    from torchvision.datasets import ImageFolder

    folder = _linked(tmp_path)
    (folder / "more").symlink_to(tmp_path / "more")
    (folder / "sub/deep").mkdir(parents=True)
    (folder / "sub/deep/more.d").symlink_to("../../../../../more")
    (tmp_path / "images/train/linked").symlink_to(tmp_path / "more")
    source = open_source("image_folder", tmp_path / "images", "train")
    expected = ImageFolder(str(tmp_path / "images/train"), is_valid_file=lambda _: True)
    held = sorted((source.name(i), label) for i, label in enumerate(source.labels.tolist()))
    visible = [pair for pair in expected.samples if "/." not in pair[0]]
    assert len(held) == len(visible) - 2  # the same two files of one class by another link
    assert set(held) < set(visible)
    assert any("reached a second time, through a link): 1" in note for note in source.notes)


@pytest.mark.parametrize("target", [".", "..", "../..", "sub"])
def test_links_that_form_a_cycle_are_refused(target, tmp_path):
    folder = _linked(tmp_path)
    (folder / "sub").mkdir()
    (folder / "sub/again").symlink_to((folder / target).resolve())
    _refused("image_folder", tmp_path / "images", "train", "sub/again is a link to", "remove")


def test_a_link_to_itself_is_refused(tmp_path):
    folder = _linked(tmp_path)
    (folder / "self").symlink_to("self")
    _refused("image_folder", tmp_path / "images", "train", "self is a link that leads to itself")


def test_one_folder_as_two_classes_is_refused(tmp_path):
    folder = _linked(tmp_path)
    (folder.parent / "other").symlink_to(folder.name)
    _refused("image_folder", tmp_path / "images", "train", "are one folder", "other")


# ------------------------------------------------------------------------------------------------
# What is left out of folders, and what a refusal advises
# ------------------------------------------------------------------------------------------------


def test_all_that_is_left_out_of_folders_is_counted(tmp_path):
    make.make_image_folder(tmp_path)
    train = tmp_path / "train"
    for name in (f"{make.WNIDS[1]}/@eaDir", "__MACOSX", "lost+found", ".ipynb_checkpoints"):
        (train / name / "deep").mkdir(parents=True)
        (train / name / "deep/x.jpg").write_bytes(b"thumbnail")
    (train / "stray.JPEG").write_bytes(b"stray")
    (train / make.WNIDS[2] / "z\udcff.txt").write_bytes(b"no UTF-8")
    source = open_source("image_folder", tmp_path, "train")
    assert len(source) == 27 and source.classes == make.WNIDS
    notes = "\n".join(source.notes)
    for words in (
        f"(hidden): 3, the first is {train}/.DS_Store",
        f"(thumbnail folder of a NAS): 1, the first is {train}/{make.WNIDS[1]}/@eaDir",
        f"(beside the class folders): 1, the first is {train}/stray.JPEG",
        "(file attributes of macOS): 1",
        rf"(not named like an image): 1, the first is {train}/{make.WNIDS[2]}/z\xff.txt",
        "(folder of the file system): 1",
    ):
        assert words in notes


def test_numbers_sorted_as_text_are_noted(tmp_path):
    for name in range(12):
        (tmp_path / "train" / str(name)).mkdir(parents=True)
        (tmp_path / "train" / str(name) / "x.jpg").write_bytes(b"x")
    (note,) = open_source("image_folder", tmp_path, "train").notes
    assert "'10' has the label 2" in note and "--source.class_order=numeric" in note
    source = open_source("image_folder", tmp_path, "train", class_order="numeric")
    assert source.classes == [str(number) for number in range(12)] and source.notes == ()
    assert [source.classes[i] for i in source.labels] == [
        source.name(i).split("/")[-2] for i in range(12)
    ]
    shutil.move(tmp_path / "train/10", tmp_path / "train/9a")
    assert open_source("image_folder", tmp_path, "train").notes == ()
    with pytest.raises(SourceError, match="sorts numbers, and the class '9a' is not one"):
        open_source("image_folder", tmp_path, "train", class_order="numeric")


@pytest.mark.parametrize(
    ("kind", "option"),
    [("image_folder", {"classes": "a.txt"}), ("parquet", {"class_order": "numeric"})],
)
def test_an_option_of_another_kind_is_refused(kind, option, tmp_path):
    MAKERS[kind](tmp_path)
    ((name, value),) = option.items()
    with pytest.raises(SourceError, match=f"--source.{name}={value} is for .*: leave it out"):
        open_source(kind, tmp_path, "train", **option)


def _holds(source, split="val"):
    held = [(source.classes[label], source.read(i)) for i, label in enumerate(source.labels)]
    return sorted(held) == make.by_wnid(split)


@pytest.mark.parametrize("labels", make.LABELS)
@pytest.mark.parametrize("kind", ["image_folder", "kaggle"])
def test_a_flat_val_is_read_with_labels_from_anywhere(kind, labels, tmp_path):
    make.make_flat(tmp_path / "a b", labels)
    val = open_source(kind, tmp_path / "a b", "val")
    assert _holds(val) and _holds(open_source(kind, tmp_path / "a b", "train"), "train")
    assert val.class_names == (make.NAMES if labels == "csv" else None)
    assert any(f"a b/val are those of {tmp_path}/a b" in note for note in val.notes)
    shutil.rmtree(tmp_path / "a b/train")
    assert _holds(open_source(kind, tmp_path / "a b", "val"))


def test_numbers_of_the_devkit_without_their_names_are_refused(tmp_path):
    make.make_flat(tmp_path, "folder")
    (tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat").unlink()
    _refused("image_folder", tmp_path, "val", "numbers the classes", "meta.mat", "is not beside it")


def test_tiny_imagenet_is_read_as_it_is(tmp_path):
    make.make_tiny(tmp_path)
    source = open_source("image_folder", tmp_path, "val")
    assert _holds(source) and source.class_names == make.NAMES
    train = open_source("image_folder", tmp_path, "train")
    assert _holds(train, "train") and "n01440764_boxes.txt" in "".join(train.notes)
    (tmp_path / "val/val_annotations.txt").write_text("val_0.JPEG\n")
    _refused("image_folder", tmp_path, "val", "val_annotations.txt must have lines of")


def test_other_names_of_folders_are_named(tmp_path):
    make.make_image_folder(tmp_path)
    (tmp_path / "val").rename(tmp_path / "Validation")
    _refused("image_folder", tmp_path, "val", "it has 'Validation', rename that to 'val'")
    (tmp_path / "val").symlink_to("Validation")
    assert _holds(open_source("image_folder", tmp_path, "val"))


def test_two_files_of_one_kaggle_image_are_refused(tmp_path):
    make.make_kaggle(tmp_path)
    name = "ILSVRC2012_val_00000001"
    image = tmp_path / "ILSVRC/Data/CLS-LOC/val" / f"{name}.JPEG"
    shutil.copy(image, image.with_suffix(".png"))
    _refused("kaggle", tmp_path, "val", f"val has two entries for '{name}', '{name}.JPEG' and")


def test_kaggle_with_files_of_windows_or_sorted_into_classes(tmp_path):
    make.make_kaggle(tmp_path)
    val = tmp_path / "ILSVRC/Data/CLS-LOC/val"
    (val / "Thumbs.db").write_bytes(b"thumbs")
    (val / "ILSVRC2012_val_00000003.JPEG").rename(tmp_path / "elsewhere")
    source = open_source("kaggle", tmp_path, "val")
    assert len(source) == 6
    _, first, second = source.notes
    assert "(not named like an image): 1" in first and "Thumbs.db" in first
    assert "without an image): 1, the first is ILSVRC2012_val_00000003" in second
    (tmp_path / "elsewhere").rename(val / "ILSVRC2012_val_00000003.JPEG")
    for wnid, name, _ in make.samples("val"):
        (val / wnid).mkdir(exist_ok=True)
        (val / name).rename(val / wnid / name)
    assert _holds(open_source("kaggle", tmp_path, "val"))


@pytest.mark.parametrize("place", ["ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggle_is_read_from_any_of_its_folders(place, tmp_path, monkeypatch):
    make.make_kaggle(tmp_path)
    monkeypatch.chdir(tmp_path / place)
    for path in (tmp_path / place, "."):
        source = open_source("kaggle", path, "val")
        assert _holds(source) and source.class_names == make.NAMES
        assert _holds(open_source("kaggle", path, "train"), "train")


def test_classes_that_look_alike_are_told_apart(tmp_path):
    make.make_image_folder(tmp_path)
    (tmp_path / "train/caf\u00e9").mkdir()
    (tmp_path / "val/cafe\u0301").mkdir()
    _refused("image_folder", tmp_path, "val", r"'cafe\u0301'")


@pytest.mark.parametrize("kind", ["image_folder", "kaggle", "parquet", "webdataset"])
def test_a_missing_val_names_the_holdout(kind, tmp_path):
    MAKERS[kind](tmp_path)
    for file in sorted(tmp_path.rglob("*val*"), reverse=True):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    _refused(kind, tmp_path, "val", "--source.holdout=0.02")
