"""A folder per split, in it a folder per class: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.

As Kaggle packs it, below ILSVRC/Data/CLS-LOC/, beside LOC_synset_mapping.txt; val/ may be flat.
"""

import os
import stat
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fast_imagenet.sources import listing
from fast_imagenet.sources.base import (
    MAX_IMAGE_BYTES,
    ImageError,
    LeftOut,
    PackedNames,
    Source,
    SourceError,
)
from fast_imagenet.sources.classes import read_synset_names
from fast_imagenet.sources.labels import (
    DEVKIT,
    SOLUTION,
    find_labels,
    label_images,
    near,
)
from fast_imagenet.sources.recognize import KAGGLE_PLACES, missing
from fast_imagenet.terminal import plural

_SYNSET_FILES = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")
CLASS_ORDERS = ("text", "numeric")


class FileSource(Source):
    """Images that are files with these names below the folder `root`; else see Source."""

    def __init__(
        self,
        root: Path,
        names: Iterable[str],
        labels: np.ndarray,
        classes: Sequence[str],
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(labels, classes, class_names)
        self.root = str(root)
        self._names = PackedNames(names)

    @property
    def content(self) -> str:
        """Checksums of names, labels and file sizes, 24 hex digits; no file is opened.

        An image replaced by another of the same size in bytes is not noticed.
        """
        sizes = np.array([os.stat(self.name(i)).st_size for i in range(len(self))], np.int64)
        arrays = (self.labels, sizes)
        checksums = (self._names.checksum(), *(zlib.crc32(array.tobytes()) for array in arrays))
        return "".join(f"{checksum:08x}" for checksum in checksums)

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


def open_image_folder(path: Path, split: str, class_order: str = "text", **_: Any) -> FileSource:
    """One split of an image folder; classes are the sorted folder names of train/ (of val/ when
    there is no train/). The images of a flat val/ have the labels of a file beside it: labels.py.
    Kaggle's folder CLS-LOC is looked for below `path`.

    Args:
        class_order: of CLASS_ORDERS; 'numeric' sorts names that are numbers as numbers.

    Raises:
        SourceError: a missing or empty folder, a flat one without labels, a class without images, a
            val class that train/ does not have, or a name that is not a number.
    """
    roots = (path / place for place in (".", *KAGGLE_PLACES))
    root = next((root for root in roots if (root / split).is_dir()), None)
    if root is None:
        raise missing(path, split, "image_folder", f"folder {split!r}")
    folder, left_out, train = root / split, LeftOut(), root / "train"
    listing.refuse_same_folder(train, root / "val")
    labels = find_labels(root) if split == "val" else None
    present = sorted({*labels.class_of.values()}) if labels else _class_folders(folder, left_out)
    has_train = split == "val" and train.is_dir()
    classes = _in_order(_class_folders(train, LeftOut()) if has_train else present, class_order)
    if labels:
        names = listing.keep_images(folder, listing.list_below(folder, left_out), left_out)
        ordered = label_images(names, labels, classes, folder, left_out)
    else:
        _check_known(present, classes, folder)
        names, ordered = _list_files(folder, present, classes, left_out)
    source = FileSource(folder, names, ordered, classes, _synsets(root, classes))
    note = (f"labels of {folder} are those of {labels.file}",) if labels else ()
    source.notes = (*note, *left_out.notes(), *_number_note(classes))
    return source


def _in_order(classes: list[str], class_order: str) -> list[str]:
    """Sorted class names in another order."""
    if class_order == "text":
        return classes
    if other := [name for name in classes if not name.isdecimal()]:
        raise SourceError(
            f"--source.class_order=numeric sorts numbers, and the class {other[0]!r} is not one:"
            " leave it out"
        )
    return sorted(classes, key=int)


def _class_folders(folder: Path, left_out: LeftOut) -> list[str]:
    """Sorted names of the class folders in `folder`.

    Raises:
        SourceError: there are none, or one is a link that leads nowhere, to a folder that holds it,
            or to another class.
    """
    classes, files = [], []
    first_of: dict[tuple[int, int], str] = {}
    for entry, is_folder in listing.visible(folder, left_out):
        if is_folder:
            listing.refuse_cycle(entry)
            other = first_of.setdefault(listing.identity(entry), entry.name)
            if other != entry.name:
                raise SourceError(
                    f"the classes {other!r} and {entry.name!r} in {folder} are one folder: remove"
                    " the link, since an image has one class"
                )
            classes.append(entry.name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            raise SourceError(
                f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there: mount"
                " its disk, or remove the link, since every class counts"
            )
        else:
            files.append(entry.path)
    if not classes and not files:
        raise SourceError(f"{folder} is empty: it must hold one folder per class")
    if not classes:
        raise SourceError(
            f"{folder} is flat: {plural(len(files), 'file')}, the first is {files[0]}, and no class"
            " folders, so their classes are unknown: move each into a folder named after its class;"
            f" labels of val/ are read from {SOLUTION} or {DEVKIT} beside it (docs/datasets.md)"
        )
    for file in files:
        left_out.add("beside the class folders", file)
    return classes


def _list_files(
    folder: Path, present: list[str], classes: list[str], left_out: LeftOut
) -> tuple[list[str], np.ndarray]:
    """Names relative to `folder`, sorted within each class, and their labels (int64 [n]).

    Files whose name has an ending that no image has (README.txt, Thumbs.db) are left out. A class
    folder without images is a SourceError.
    """
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    names: list[str] = []
    labels: list[int] = []
    for wnid in present:
        below = listing.list_below(folder / wnid, left_out)
        found = listing.keep_images(folder, [f"{wnid}/{name}" for name in below], left_out)
        if not found:
            place = folder / wnid
            raise SourceError(f"the class folder {place} holds no images: fill or remove it")
        names += found
        labels += [label_of[wnid]] * len(found)
    return names, np.array(labels, np.int64)


def _synsets(path: Path, classes: list[str]) -> list[str] | None:
    """Readable class names, where a synset list lies in the folder or near it."""
    candidates = [folder / file for folder in near(path) for file in _SYNSET_FILES]
    found = (read_synset_names(candidate, classes) for candidate in candidates)
    return next((names for names in found if names), None)


def _check_known(present: list[str], classes: list[str], folder: Path) -> None:
    """Refuse class folders that are not among `classes`."""
    unknown = sorted(set(present) - set(classes))
    if not unknown:
        return
    raise SourceError(
        f"{folder} has {plural(len(unknown), 'class')} that train/ does not have"
        f" ({', '.join(map(ascii, unknown[:5]))}): both splits must have the same classes, add"
        " them to train/ or remove them"
    )


def _number_note(classes: list[str]) -> tuple[str, ...]:
    """A note when classes are numbers whose order as text is not their order as numbers."""
    if not all(name.isdecimal() for name in classes) or classes == sorted(classes, key=int):
        return ()
    place = next(place for place, name in enumerate(classes) if int(name) != place)
    return (
        f"class names are numbers and were sorted as text, as torchvision does: {classes[place]!r}"
        f" has the label {place}; --source.class_order=numeric sorts them as numbers",
    )
