"""Labels of images that lie in one flat folder, or in one archive: the validation split.

LOC_val_solution.csv               Kaggle: ImageId,PredictionString, whose first word is the wnid
ILSVRC2012_devkit_t12.tar.gz       the official devkit, or its folder unpacked
ILSVRC2012_validation_ground_truth.txt    its labels alone, with meta.mat or wnids in the lines
val/val_annotations.txt            Tiny ImageNet: name, wnid and a box in each line
"""

import csv
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from fast_imagenet.sources.base import LeftOut, SourceError
from fast_imagenet.sources.classes import WNID, unique_dict
from fast_imagenet.sources.listing import visible
from fast_imagenet.sources.matfile import MatError, read_struct_array
from fast_imagenet.sources.tar import UNREADABLE, SmallHeaders

SOLUTION = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
ANNOTATIONS = "val_annotations.txt"
MAX_DEVKIT_BYTES = 64 << 20


class Labels(NamedTuple):
    """Class of every image by its name without suffix, as a file says; names of the classes, where
    it has them."""

    file: Path
    class_of: dict[str, str]
    names: dict[str, str] = {}  # noqa: RUF012  never changed


def near(folder: Path) -> list[Path]:
    """The folder and those above it up to Kaggle's, which lies three above ILSVRC/Data/CLS-LOC."""
    return [folder, *folder.absolute().parents[:3]]


def find_labels(root: Path) -> Labels | None:
    """The labels of a flat `root`/val; None where it has folders of classes, or no labels."""
    val = root / "val"
    folders = [entry.name for entry, is_folder in visible(val, LeftOut()) if is_folder]
    if folders == ["images"] and (val / ANNOTATIONS).is_file():
        return _annotations(val / ANNOTATIONS)
    for folder in near(root) if not folders else ():
        if (file := folder / SOLUTION).is_file():
            return _solution(file)
        if (file := folder / DEVKIT).is_file():
            return read_devkit(file)
        for file in (folder / place / TRUTH for place in ("", "data", f"{DEVKIT[:-7]}/data")):
            if file.is_file():
                meta = file.with_name(META)
                return _truth(file, file.read_bytes(), meta.is_file() and meta.read_bytes())
    return None


def label_images(
    names: Sequence[str], labels: Labels, classes: Sequence[str], where: Path, left_out: LeftOut
) -> np.ndarray:
    """The label of each image (int64 [n]) by its class; a label without an image is left out.

    Raises:
        SourceError: an image has no label, or a class that is not in `classes`, or is there twice.
    """
    unique_dict(((PurePath(name).stem, name) for name in names), str(where))
    label_of = {name: label for label, name in enumerate(classes)}
    found = []
    for name in names:
        known = labels.class_of.get(PurePath(name).stem, "")
        if known not in label_of:
            why = f"the class {known}, which train/ does not have," if known else "no label"
            raise SourceError(
                f"{labels.file} has {why} for {where / name}: both must come from one download;"
                " fetch them again, or remove an image that is not of it"
            )
        found.append(label_of[known])
    absent = sorted(labels.class_of.keys() - {PurePath(name).stem for name in names})
    if absent:
        left_out.add(f"label in {labels.file.name} without an image", absent[0], len(absent))
    return np.array(found, np.int64)


def _annotations(file: Path) -> Labels:
    rows = [line.split() for line in _read_text(file).splitlines() if line.strip()]
    if not rows or min(map(len, rows)) < 2:
        raise SourceError(f"{file} must have lines of 'image class box ...': fetch it again")
    class_of = unique_dict(((PurePath(row[0]).stem, row[1]) for row in rows), str(file))
    return Labels(file, class_of)


def _solution(file: Path) -> Labels:
    try:
        rows = list(csv.reader(io.StringIO(_read_text(file))))
    except csv.Error as error:
        raise SourceError(f"{file} is not a valid CSV file ({error}): fetch it again") from error
    pairs = []
    for number, row in enumerate(rows[1:], start=2):
        words = row[1].split() if len(row) == 2 else []
        if not words or not WNID.fullmatch(words[0]):
            raise SourceError(f"{file}, line {number}: {row} is not 'image,wnid box ...'")
        pairs.append((row[0], words[0]))
    return Labels(file, unique_dict(pairs, str(file)))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text ({error}): fetch it again") from error


def read_devkit(path: Path) -> Labels:
    """Labels of the validation images out of ILSVRC2012_devkit_t12.tar.gz."""
    try:
        with tarfile.open(path, "r:gz", tarinfo=SmallHeaders) as archive:
            members = [info for info in archive if info.isreg() and info.size <= MAX_DEVKIT_BYTES]
            found = {
                wanted: file.read()
                for info in members
                for wanted in (TRUTH, META)
                if info.name.endswith(f"data/{wanted}") and (file := archive.extractfile(info))
            }
    except UNREADABLE as error:
        raise SourceError(f"{path} is not a complete tar.gz ({error}): fetch it again") from error
    if missing := {TRUTH, META} - found.keys():
        what = f"data/{min(missing)} is missing in {path}"
        raise SourceError(f"{what}: it must be the official {DEVKIT}")
    return _truth(path, found[TRUTH], found[META])


def _truth(file: Path, truth: bytes, meta: bytes | bool) -> Labels:
    """Labels from one line per image: a wnid, or the ILSVRC2012_ID of a class in meta.mat.

    Of the ids in meta.mat, those without children are the classes of the challenge.
    """
    words, names = truth.decode("ascii", "replace").split(), {}
    try:
        if not (words and all(map(WNID.fullmatch, words))):
            if not isinstance(meta, bytes):
                what = (
                    f"{file} numbers the classes, and {META} of the devkit, which has their names"
                )
                raise SourceError(f"{what}, is not beside it: put it there, or {DEVKIT}")
            leaves = [
                r for r in read_struct_array(meta, "synsets") if not int(r["num_children"][0])
            ]
            ids = [(int(row["ILSVRC2012_ID"][0]), row["WNID"]) for row in leaves]
            names = unique_dict(((row["WNID"], row["words"]) for row in leaves), str(file))
            unique_dict(((wnid, number) for number, wnid in ids), str(file))
            wnid_of = unique_dict(ids, str(file))
            words = [wnid_of[int(word)] for word in words]
    except (MatError, KeyError, ValueError, TypeError, IndexError) as error:
        raise SourceError(f"{file} cannot be understood ({error}): fetch it again") from error
    class_of = {f"ILSVRC2012_val_{number:08}": wnid for number, wnid in enumerate(words, start=1)}
    return Labels(file, class_of, names)
