"""The same small data set in every layout in which people keep ImageNet."""

import io
import json
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.odd_images import as_jpeg, odd_images, scene

WNIDS = ["n01440764", "n02102040", "n03888257"]
NAMES = ["tench, Tinca tinca", "English springer", "parachute"]


def samples(split: str) -> list[tuple[str, str, bytes]]:
    """(wnid, file name, bytes) of every image, sorted as a folder listing: odd ones in train."""
    if split == "train":
        files = [data for data, _ in odd_images().values()]
        rows = [(WNIDS[i % 3], f"{WNIDS[i % 3]}_{i}.JPEG", data) for i, data in enumerate(files)]
    else:
        files = [as_jpeg(scene(40 + 3 * i, 70 - 4 * i, seed=i)) for i in range(7)]
        turns = [2, 0, 1, 1, 0, 2, 0]
        rows = [
            (WNIDS[turn], f"ILSVRC2012_val_{i + 1:08d}.JPEG", data)
            for i, (turn, data) in enumerate(zip(turns, files, strict=True))
        ]
    return sorted(rows)


def by_wnid(split: str) -> list[tuple[str, bytes]]:
    """What a source must hold: sorted pairs of wnid and bytes."""
    return sorted((wnid, data) for wnid, _, data in samples(split))


def make_image_folder(root: Path) -> None:
    """train/<wnid>/ and val/<wnid>/, with hidden files that must not be read."""
    for split in ("train", "val"):
        for wnid, name, data in samples(split):
            folder = root / split / wnid
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        (root / split / ".DS_Store").write_bytes(b"hidden")
        (root / split / WNIDS[0] / ".hidden.JPEG").write_bytes(b"hidden")


def make_tiny(root: Path) -> None:
    """Tiny ImageNet: images/ in every folder of a class, and val/images with a table."""
    lines = []
    for split in ("train", "val"):
        for wnid, name, data in samples(split):
            folder = root / split / ("" if split == "val" else wnid) / "images"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
            lines += [f"{name}\t{wnid}\t0\t32\t44\t62\n"] * (split == "val")
    for wnid in WNIDS:
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("x 0 0 9 9\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    names = [f"{wnid}\t{name}\n" for wnid, name in zip(WNIDS, NAMES, strict=True)]
    (root / "words.txt").write_text("".join(names))


LABELS = ("csv", "devkit", "folder", "wnids")


def make_flat(root: Path, labels: str) -> None:
    """Extracted train/ by class, flat val/, and the labels of val/ in one of LABELS."""
    make_kaggle(root)
    for split in ("train", "val"):
        (root / KAGGLE / split).rename(root / split)
    shutil.rmtree(root / "ILSVRC")
    if labels == "csv":
        return
    (root / "LOC_val_solution.csv").unlink()
    (root / "LOC_synset_mapping.txt").unlink()
    truth = "ILSVRC2012_validation_ground_truth.txt"
    if labels == "wnids":
        rows = sorted(samples("val"), key=lambda row: row[1])
        (root / truth).write_text("".join(f"{wnid}\n" for wnid, _, _ in rows))
        return
    devkit = "ILSVRC2012_devkit_t12.tar.gz"
    make_ilsvrc_tar(root / "tars")
    (root / "tars" / devkit).rename(root / devkit)
    shutil.rmtree(root / "tars")
    if labels == "folder":
        with tarfile.open(root / devkit) as archive:
            archive.extractall(root, filter="data")
        (root / devkit).unlink()


KAGGLE = "ILSVRC/Data/CLS-LOC"


def make_kaggle(root: Path) -> None:
    """ILSVRC/Data/CLS-LOC with a flat val, its CSV and the list of synsets."""
    data_folder = root / KAGGLE
    lines = ["ImageId,PredictionString"]
    for split in ("train", "val"):
        for wnid, name, data in samples(split):
            folder = data_folder / split / (wnid if split == "train" else "")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
            if split == "val":
                lines.append(f"{Path(name).stem},{wnid} 3 4 50 60 {wnid} 1 2 3 4 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    synsets = [f"{wnid} {name}" for wnid, name in zip(WNIDS, NAMES, strict=True)]
    (root / "LOC_synset_mapping.txt").write_text("\n".join(synsets) + "\n")


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    """An uncompressed tar of these files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def make_ilsvrc_tar(root: Path) -> None:
    """The three official archives; ids run against the order of wnids, as in the real devkit."""
    root.mkdir(parents=True, exist_ok=True)
    inner = []
    for wnid in reversed(WNIDS):
        members = [(name, data) for own, name, data in samples("train") if own == wnid]
        inner.append((f"{wnid}.tar", tar_bytes(members)))
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    val = sorted(samples("val"), key=lambda row: row[1])
    files = [(name, data) for _, name, data in val]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(files))
    ids = {wnid: len(WNIDS) - i for i, wnid in enumerate(WNIDS)}
    truth = "".join(f"{ids[wnid]}\n" for wnid, _, _ in val)
    rows = [(ids[wnid], wnid, name, 0) for wnid, name in zip(WNIDS, NAMES, strict=True)]
    rows.append((4, "n00001740", "entity", 2))
    devkit = [
        ("ILSVRC2012_devkit_t12/readme.txt", b"hello"),
        ("ILSVRC2012_devkit_t12/data/meta.mat", meta_mat(rows)),
        ("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
    ]
    path = root / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in devkit:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def make_parquet(root: Path, group_rows: int = 4) -> None:
    """Hugging Face's layout: shuffled rows, small row groups, class names in the metadata."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    features = {"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}}
    for split, word, files in (("train", "train", 2), ("val", "validation", 1)):
        rows = samples(split)
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
        for number in range(files):
            part = rows[number::files]
            names = [f"{Path(name).stem}_{wnid}.JPEG" for wnid, name, _ in part]
            images = [
                {"bytes": data, "path": name}
                for name, (_, _, data) in zip(names, part, strict=True)
            ]
            labels = [WNIDS.index(wnid) for wnid, _, _ in part]
            image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            table = pa.table({"image": pa.array(images, image_type), "label": pa.array(labels)})
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
            path = root / "data" / f"{word}-{number:05d}-of-{files:05d}.parquet"
            pq.write_table(table, path, row_group_size=group_rows)


def write_parquet(
    path: Path, labels: list[int], names: list[str] | None = None, paths: list | None = None, **more
) -> None:
    """A parquet file of small images, one per label, with these class names in its metadata."""
    images = {"bytes": pa.array([b"%d" % label for label in labels], pa.binary())}
    if paths is not None:
        images["path"] = paths if isinstance(paths, pa.Array) else pa.array(paths, pa.string())
    table = pa.table(
        {"image": pa.StructArray.from_arrays(list(images.values()), list(images)), "label": labels}
    )
    if names is not None:
        features = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **more)


def write_shard(path: Path, names: list[str], start: int = 0) -> None:
    """A shard of these files: .cls files count the labels from `start`, others hold their name."""
    members, label = [], start
    for name in names:
        is_label = name.endswith(".cls")
        members.append((name, b"%d" % label if is_label else name.encode()))
        label += is_label
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))


def make_webdataset(root: Path) -> None:
    """Shards of jpg, cls and json files, and one file that belongs to no sample."""
    root.mkdir(parents=True, exist_ok=True)
    for split, word, shards in (("train", "train", 2), ("val", "validation", 1)):
        rows = samples(split)
        for number in range(shards):
            members = [("README", b"shards of a test")]
            for wnid, name, data in rows[number::shards]:
                key = Path(name).stem
                about = json.dumps({"class_name": wnid, "filename": name}).encode()
                label = str(WNIDS.index(wnid)).encode()
                members += [(f"{key}.jpg", data), (f"{key}.cls", label), (f"{key}.json", about)]
            (root / f"imagenet1k-{word}-{number:04d}.tar").write_bytes(tar_bytes(members))


# ------------------------------------------------------------------------------------------------
# A MATLAB file, as the devkit has it
# ------------------------------------------------------------------------------------------------


def meta_mat(rows: list[tuple[int, str, str, int]], compress: bool = True) -> bytes:
    """A MATLAB file of level 5 with the table synsets: id, wnid, words, number of children."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "num_children"]
    body = _part(6, struct.pack("<II", 2, 0)) + _part(5, struct.pack("<ii", len(rows), 1))
    body += _part(1, b"synsets") + _part(5, struct.pack("<i", 32))
    body += _part(1, b"".join(name.encode().ljust(32, b"\0") for name in fields))
    for number, wnid, words, children in rows:
        body += _number(number) + _text(wnid) + _text(words) + _number(children)
    array = _part(14, body)
    if compress:
        packed = zlib.compress(array)
        array = struct.pack("<II", 15, len(packed)) + packed
    head = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    return head + array


def _part(kind: int, data: bytes) -> bytes:
    if 0 < len(data) <= 4:
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def _number(value: int) -> bytes:
    """A 1 x 1 array of doubles that MATLAB stores in the smallest type that holds it."""
    body = _part(6, struct.pack("<II", 6, 0)) + _part(5, struct.pack("<ii", 1, 1)) + _part(1, b"")
    return _part(14, body + _part(4, struct.pack("<H", value)))


def _text(value: str) -> bytes:
    body = _part(6, struct.pack("<II", 4, 0)) + _part(5, struct.pack("<ii", 1, len(value)))
    return _part(14, body + _part(1, b"") + _part(4, value.encode("utf-16-le")))


MAKERS = {
    "image_folder": make_image_folder,
    "ilsvrc_tar": make_ilsvrc_tar,
    "kaggle": make_kaggle,
    "parquet": make_parquet,
    "webdataset": make_webdataset,
}
