"""Folders of a user: which files are images, which belong to a split, what is left out."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from fast_imagenet.sources.base import LeftOut, SourceError
from fast_imagenet.terminal import plural

_SPLIT_WORDS = {
    split: re.compile(rf"(?<![a-z])({words})(?![a-z])")
    for split, words in {
        "train": "train(ing)?",
        "val": "val(id(ation)?)?",
        "test": "test(ing)?",
    }.items()
}
# What file systems, NAS boxes and archivers put among the files of a user.
SYSTEM_FOLDERS = {
    "@eaDir": "thumbnail folder of a NAS",
    "#recycle": "recycle bin of a NAS",
    "#snapshot": "snapshots of a NAS",
    "@Recycle": "recycle bin of a NAS",
    "$RECYCLE.BIN": "recycle bin of Windows",
    "System Volume Information": "folder of Windows",
    "__MACOSX": "file attributes of macOS",
    "lost+found": "folder of the file system",
}
# Files with other endings are left out and counted; one of these may hold any known kind of image.
IMAGE_ENDINGS = {
    *("", ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".tif", ".tiff", ".webp", ".avif", ".heic", ".jp2", ".svg"),
}
# The end of a sentence about a missing split.
ADVICE = {"train": "", "val": "; without a val split, --source.holdout=0.02 takes one from train"}
SECOND_TIME = "reached a second time, through a link"


def visible(folder: Path, left_out: LeftOut) -> Iterator[tuple[os.DirEntry, bool]]:
    """Entries of a folder, sorted, and whether each is a folder or a link to one.

    Hidden files and system folders are left out. A link that leads to itself is a SourceError.
    """
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        is_hidden = entry.name.startswith(".")
        is_folder = not is_hidden and _is_folder(entry)
        if is_hidden or (is_folder and entry.name in SYSTEM_FOLDERS):
            left_out.add("hidden" if is_hidden else SYSTEM_FOLDERS[entry.name], entry.path)
        else:
            yield entry, is_folder


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise SourceError(
            f"{entry.path} is a link that leads to itself, or through too many others: remove it"
        ) from error


def refuse_cycle(entry: os.DirEntry) -> None:
    """Refuse a link to a folder that it lies in: a SourceError."""
    if not entry.is_symlink():
        return
    target, folder = os.path.realpath(entry.path), os.path.realpath(os.path.dirname(entry.path))
    if os.path.commonpath([target, folder]) == target:
        raise SourceError(
            f"{entry.path} is a link to {target}, a folder that it lies in: remove the link"
        )


def list_below(root: Path, left_out: LeftOut) -> list[str]:
    """Files below `root`, relative to it and sorted, without hidden files and system folders.

    Links to folders are followed, as torchvision does, but no folder is read twice.
    """
    names, waiting, seen = [], [""], set()
    while waiting:
        inner = waiting.pop()
        folder = identity(root / inner)
        if folder in seen:
            left_out.add(f"folder {SECOND_TIME}", root / inner)
            continue
        seen.add(folder)
        for entry, is_folder in visible(root / inner, left_out):
            if is_folder:
                refuse_cycle(entry)
                waiting.append(f"{inner}{entry.name}/")
            else:
                names.append(inner + entry.name)
    return sorted(names)


def identity(folder: str | Path | os.DirEntry) -> tuple[int, int]:
    """What two paths have in common when they lead to the same folder."""
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def keep_images(folder: Path, names: list[str], left_out: LeftOut) -> list[str]:
    """The names below `folder` that an image may have; its content is read later."""
    kept = []
    for name in names:
        if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS:
            kept.append(name)
        else:
            left_out.add("not named like an image", folder / name)
    return kept


def refuse_same_folder(train: Path, val: Path) -> None:
    """Refuse a val folder, or a folder in it, that is one of train by another name."""
    if not (train.is_dir() and val.is_dir()):
        return
    of_train = {identity(folder): folder for folder in _with_folders(train)}
    for folder in _with_folders(val):
        if same := of_train.get(identity(folder)):
            raise SourceError(
                f"{same} and {folder} are one folder: each split needs its own images"
            )


def _with_folders(folder: Path) -> list[Path]:
    inner = [Path(entry) for entry, is_folder in visible(folder, LeftOut()) if is_folder]
    return [folder, *inner]


def split_files(
    path: Path, suffix: str, split: str, beside: Sequence[str] = ()
) -> tuple[list[Path], LeftOut]:
    """Files below `path` with this suffix that belong to `split`, and what was left out.

    The names in `beside` are read in another way. A SourceError: there are no files, one is not a
    regular file, or one could belong to two splits.
    """
    left_out, found = LeftOut(), []
    for name in list_below(path, left_out):
        if name.lower().endswith(suffix):
            found.append(PurePath(name))
        elif name not in beside:
            left_out.add(f"not named *{suffix}", path / name)
    chosen = _of_split(path, found, split, suffix, left_out)
    if not chosen:
        advice = f"names must contain 'train' or 'val' as a word, as in train-00000{suffix}"
        if not found and (path / split).is_dir():
            advice = f"its folder {split}/ may be for --source.kind=image_folder"
        raise SourceError(
            f"{path} holds {plural(len(found), f'*{suffix} file')}, none of them named after the"
            f" split {split!r}: {advice}{ADVICE[split]}"
        )
    folders = (file for file in path.rglob(f"*{suffix}") if file.is_dir())
    for file in [*folders, *chosen]:
        if not file.is_file():
            what = "a folder" if file.is_dir() else "not a regular file"
            raise SourceError(f"{file} is {what}, but named *{suffix}: rename or remove it")
    return chosen, left_out


def _of_split(
    path: Path, found: list[PurePath], split: str, suffix: str, left_out: LeftOut
) -> list[Path]:
    """Those of the files that belong to `split`, each file once whatever links lead to it."""
    chosen: list[Path] = []
    first_of: dict[str, tuple[PurePath, str]] = {}
    for name in found:
        belongs = _split_of(name, path)
        if belongs is None:
            left_out.add(f"*{suffix} file named after no split", path / name)
            continue
        first, its_split = first_of.setdefault(os.path.realpath(path / name), (name, belongs))
        if its_split != belongs:
            raise SourceError(
                f"{path / first} and {path / name} are one file, in two splits: remove one of them"
            )
        if first != name:
            left_out.add(f"file {SECOND_TIME}", path / name)
        elif belongs == split:
            chosen.append(path / name)
    return chosen


def _split_of(file: PurePath, root: Path) -> str | None:
    """The split in the name of a file below `root`, else of the nearest folder that names one."""
    for name in reversed(file.parts):
        found = [split for split, word in _SPLIT_WORDS.items() if word.search(name.lower())]
        if len(found) > 1:
            raise SourceError(
                f"{root / file} may belong to {' or '.join(found)}, for {name!r} holds both words:"
                " rename it, or put the files of each split into a folder of its name"
            )
        if found:
            return found[0]
    return None
