"""Kaggle's "ImageNet Object Localization Challenge": train/ by wnid, a flat val/ with a CSV.

ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG
ILSVRC/Data/CLS-LOC/val/*.JPEG
LOC_val_solution.csv            ImageId,PredictionString: the first word is the wnid
LOC_synset_mapping.txt          wnid and name of every class
"""

import csv
import io
from pathlib import Path

import numpy as np

from fast_imagenet.sources.base import WNID, SourceError
from fast_imagenet.sources.image_folder import (
    FileSource,
    class_folders,
    list_files,
    synset_names,
)

DATA = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"
SYNSETS = "LOC_synset_mapping.txt"


def open_kaggle(path: Path, split: str, **_) -> FileSource:
    """One split of Kaggle's layout; `path` is the folder that holds ILSVRC/.

    Raises:
        SourceError: a folder or the CSV is missing, or they do not fit together.
    """
    folder = path / DATA / split
    if not folder.is_dir():
        raise SourceError(f"{path} holds no {DATA / split}: --source.path must hold ILSVRC/")
    classes = _classes(path)
    if split == "train":
        present = class_folders(folder)
        names, labels, notes = list_files(folder, present, present)
        source = FileSource("kaggle", folder, names, labels, present, synset_names(path, present))
        source.notes = notes
        return source
    names, labels = _labelled_val(path, folder, classes)
    return FileSource("kaggle", folder, names, labels, classes, synset_names(path, classes))


def _classes(path: Path) -> list[str]:
    """Sorted wnids from train/, without it from the mapping file, else from the CSV."""
    train = path / DATA / "train"
    if train.is_dir():
        return class_folders(train)
    if (path / SYNSETS).is_file():
        lines = _read_text(path / SYNSETS).splitlines()
        return sorted(line.split()[0] for line in lines if line.strip())
    return sorted(set(read_solution(path / SOLUTION).values()))


def _labelled_val(path: Path, folder: Path, classes: list[str]) -> tuple[list[str], np.ndarray]:
    solution = read_solution(path / SOLUTION)
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if not names:
        raise SourceError(f"{folder} is empty: unpack the val pictures there")
    labels = []
    for name in names:
        wnid = solution.get(Path(name).stem)
        if wnid not in label_of:
            why = "a class that train/ lacks" if wnid else "no line"
            raise SourceError(
                f"{path / SOLUTION} has {why} for {folder / name}: both must come from one download"
            )
        labels.append(label_of[wnid])
    return names, np.array(labels, np.int64)


def read_solution(path: Path) -> dict[str, str]:
    """Wnid of every val picture (by name without suffix) from LOC_val_solution.csv.

    Raises:
        SourceError: the file is missing, no UTF-8, or a line is not 'name,wnid ...'.
    """
    if not path.is_file():
        raise SourceError(f"{path} is missing: it holds the labels of the val pictures")
    try:
        rows = list(csv.reader(io.StringIO(_read_text(path))))
    except csv.Error as error:
        raise SourceError(f"{path} is no CSV file ({error}): fetch it again") from error
    solution = {}
    for number, row in enumerate(rows[1:], start=2):
        words = row[1].split() if len(row) == 2 else []
        if not words or not WNID.fullmatch(words[0]):
            raise SourceError(f"{path}, line {number}: {row} is not 'picture,wnid box ...'")
        solution[row[0]] = words[0]
    return solution


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is no UTF-8 text ({error}): fetch it again") from error
