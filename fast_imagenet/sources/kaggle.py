"""Kaggle's "ImageNet Object Localization Challenge": train/ by wnid, a flat val/ with a CSV.

ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG
ILSVRC/Data/CLS-LOC/val/*.JPEG
LOC_val_solution.csv            ImageId,PredictionString: the first word is the wnid
LOC_synset_mapping.txt          wnid and name of every class
"""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from fast_imagenet.sources import image_folder
from fast_imagenet.sources.base import LeftOut, SourceError
from fast_imagenet.sources.classes import WNID, unique_dict
from fast_imagenet.sources.image_folder import FileSource
from fast_imagenet.sources.listing import keep_images, no_val_advice, visible

KAGGLE_DATA = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"
SYNSETS = "LOC_synset_mapping.txt"


def open_kaggle(path: Path, split: str, **_: Any) -> FileSource:
    """One split of Kaggle's layout; `path` is the folder that holds ILSVRC/.

    Raises:
        SourceError: a folder or the CSV is missing, or they do not fit together.
    """
    folder = path / KAGGLE_DATA / split
    if not folder.is_dir():
        raise SourceError(
            f"{path} holds no {KAGGLE_DATA / split}: --source.path must hold ILSVRC/ as Kaggle"
            " packs it, and train/ and val/ without it are --source.kind=image_folder"
            f"{no_val_advice(split)}"
        )
    left_out = LeftOut()
    if split == "train":
        classes = image_folder.class_folders(folder, left_out)
        names, labels = image_folder.list_files(folder, classes, classes, left_out)
    else:
        classes = _classes(path)
        names, labels = _labeled_val(path, folder, classes, left_out)
    source = FileSource(
        "kaggle", folder, names, labels, classes, image_folder.synset_names(path, classes)
    )
    source.notes = left_out.notes()
    return source


def _classes(path: Path) -> list[str]:
    """Sorted wnids from train/, without it from the mapping file, else from the CSV."""
    train = path / KAGGLE_DATA / "train"
    if train.is_dir():
        return image_folder.class_folders(train, LeftOut())
    if (path / SYNSETS).is_file():
        lines = _read_text(path / SYNSETS).splitlines()
        return sorted({line.split()[0] for line in lines if line.strip()})
    return sorted(set(_read_solution(path / SOLUTION).values()))


def _labeled_val(
    path: Path, folder: Path, classes: list[str], left_out: LeftOut
) -> tuple[list[str], np.ndarray]:
    """Names of the val images, sorted, and their labels (int64 [n]) from the CSV."""
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    names = keep_images(folder, _flat_files(folder, left_out), left_out)
    if not names:
        raise SourceError(f"{folder} is empty: unpack the val images there")
    unique_dict(((Path(name).stem, name) for name in names), str(folder))
    solution = _read_solution(path / SOLUTION)
    labels = []
    for name in names:
        wnid = solution.get(Path(name).stem, "")
        if wnid not in label_of:
            why = f"the class {wnid}, which train/ does not have," if wnid else "no line"
            raise SourceError(
                f"{path / SOLUTION} has {why} for {folder / name}: both must come from one"
                " download; fetch them again, or remove an image that is not Kaggle's"
            )
        labels.append(label_of[wnid])
    absent = sorted(solution.keys() - {Path(name).stem for name in names})
    if absent:
        left_out.add(f"in {SOLUTION}, but without an image", absent[0], len(absent))
    return names, np.array(labels, np.int64)


def _flat_files(folder: Path, left_out: LeftOut) -> list[str]:
    names = []
    for entry, is_folder in visible(folder, left_out):
        if is_folder:
            raise SourceError(
                f"{folder} has the folder {entry.name!r}, and Kaggle's is flat: read folders of"
                f" classes with --source.kind=image_folder --source.path={folder.parent}"
            )
        names.append(entry.name)
    return names


def _read_solution(path: Path) -> dict[str, str]:
    """Wnid of every val image (by name without suffix) from LOC_val_solution.csv."""
    if not path.is_file():
        raise SourceError(
            f"{path} is missing, which holds the labels of the val images: download it from Kaggle"
            " (ImageNet Object Localization Challenge)"
        )
    try:
        rows = list(csv.reader(io.StringIO(_read_text(path))))
    except csv.Error as error:
        raise SourceError(f"{path} is not a valid CSV file ({error}): fetch it again") from error
    pairs = []
    for number, row in enumerate(rows[1:], start=2):
        words = row[1].split() if len(row) == 2 else []
        if not words or not WNID.fullmatch(words[0]):
            raise SourceError(f"{path}, line {number}: {row} is not 'image,wnid box ...'")
        pairs.append((row[0], words[0]))
    return unique_dict(pairs, str(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text ({error}): fetch it again") from error
