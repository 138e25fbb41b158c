"""A folder per split, in it a folder per class: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG."""

import os
import stat
from pathlib import Path

import numpy as np

from fast_imagenet.sources.base import (
    MAX_IMAGE_BYTES,
    ImageError,
    PackedNames,
    Source,
    SourceError,
    read_synset_names,
)

_OTHER_KINDS = {
    "kaggle": "ILSVRC/Data/CLS-LOC",
    "ilsvrc_tar": "ILSVRC2012_*.tar",
    "parquet": "**/*.parquet",
    "webdataset": "*.tar",
}
# A file with another ending is left out and told; one of these may hold any known kind of picture.
PICTURE_ENDINGS = {
    *("", ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".tif", ".tiff", ".webp", ".avif", ".heic", ".jp2", ".svg"),
}
_SYNSET_FILES = ("LOC_synset_mapping.txt", "synset_words.txt")


class FileSource(Source):
    """Pictures that are files below one folder.

    Args:
        kind: name of the source kind.
        root: folder that the names are relative to.
        names: file names, in the order of `labels`.
        labels: int64 [n].
        classes: class identifiers in the order of the labels.
        class_names: readable names, or None.
    """

    def __init__(self, kind, root, names, labels, classes, class_names=None):
        super().__init__(labels, classes, class_names)
        self.kind = kind
        self.root = str(root)
        self._names = PackedNames(names)

    def name(self, index: int) -> str:
        return f"{self.root}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        path = self.name(index)
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # opening a pipe waits for ever, a device may not end
            raise ImageError("it is not a regular file")
        if info.st_size > MAX_IMAGE_BYTES:
            raise ImageError(f"{info.st_size:,} bytes, more than the allowed {MAX_IMAGE_BYTES:,}")
        with open(path, "rb") as file:
            return file.read(info.st_size)


def open_image_folder(path: Path, split: str, **_) -> FileSource:
    """One split of an image folder; classes are the sorted folder names of train/ (of val/ when
    there is no train/).

    Raises:
        SourceError: a missing, empty or flat folder, a class without pictures, or a val class that
            train/ lacks.
    """
    folder = path / split
    if not folder.is_dir():
        raise SourceError(f"{path} holds no folder {split!r}: {_advice(path)}")
    present = class_folders(folder)
    train = path / "train"
    classes = class_folders(train) if split == "val" and train.is_dir() else present
    check_known(present, classes, folder)
    names, labels, notes = list_files(folder, present, classes)
    source = FileSource("image_folder", folder, names, labels, classes, synset_names(path, classes))
    source.notes = notes
    return source


def _advice(path: Path) -> str:
    """What to do about a folder without train/ and val/, after a look at what it holds."""
    for kind, pattern in _OTHER_KINDS.items():
        if next(path.glob(pattern), None) is not None:
            return f"it looks like another layout, try --source.kind={kind}"
    return "--source.path must be the folder that has train/ and val/ in it"


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the class folders in `folder`.

    Raises:
        SourceError: there are none.
    """
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in visible if entry.is_dir())
    dangling = sorted(e.name for e in visible if e.is_symlink() and not Path(e.path).exists())
    if dangling:
        raise SourceError(
            f"{folder / dangling[0]} is a link to {os.readlink(folder / dangling[0])}, which is"
            " not there: mount its disk, or remove the link, since every class counts"
        )
    if classes:
        return classes
    if not visible:
        raise SourceError(f"{folder} is empty: it must hold one folder a class")
    raise SourceError(
        f"{folder} is flat: {len(visible):,} files and no class folders, so their classes are"
        " unknown; with Kaggle's CSV use --source.kind=kaggle, with the official devkit use"
        " --source.kind=ilsvrc_tar, or move each picture into a folder named after its wnid"
    )


def check_known(present: list[str], classes: list[str], folder: Path) -> None:
    """Refuse class folders that are not among `classes`."""
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise SourceError(
            f"{folder} has {len(unknown)} classes that train/ lacks ({', '.join(unknown[:5])}):"
            " the two splits must come from the same data set"
        )


def list_files(
    folder: Path, present: list[str], classes: list[str]
) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Names relative to `folder`, sorted within each class, their labels (int64 [n]), and notes.

    Files whose name has an ending that no picture has (README.txt, Thumbs.db) are left out; a note
    says so.

    Raises:
        SourceError: a class folder without files.
    """
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    names, labels, others = [], [], []
    for wnid in present:
        found = []
        for name in sorted(_walk(folder, wnid)):
            is_picture = os.path.splitext(name)[1].lower() in PICTURE_ENDINGS
            (found if is_picture else others).append(name)
        if not found:
            raise SourceError(
                f"the class folder {folder / wnid} holds no pictures: fill or remove it"
            )
        names += found
        labels += [label_of[wnid]] * len(found)
    notes = ()
    if others:
        left = f"{len(others):,} files are not named like pictures and were left out"
        notes = (f"{left}, the first is {folder / others[0]}",)
    return names, np.array(labels, np.int64), notes


def _walk(folder: Path, prefix: str) -> list[str]:
    """Visible files below `folder`/`prefix`, as 'prefix/...'; their content is looked at later."""
    names, waiting = [], [prefix]
    while waiting:
        inner = waiting.pop()
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                is_folder = entry.is_dir(follow_symlinks=False)
                (waiting if is_folder else names).append(f"{inner}/{entry.name}")
    return names


def synset_names(path: Path, classes: list[str]) -> list[str] | None:
    """Readable class names, where a synset list lies in the folder or beside it."""
    candidates = [folder / file for folder in (path, path.parent) for file in _SYNSET_FILES]
    found = (read_synset_names(candidate, classes) for candidate in candidates)
    return next((names for names in found if names is not None), None)
