"""Which layout a folder has: what `--source.kind=auto` takes, and what a refusal advises."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from fast_imagenet.sources.base import LeftOut, SourceError
from fast_imagenet.sources.listing import ADVICE, IMAGE_ENDINGS, visible

SPLITS = ("train", "val")
KAGGLE_PLACES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
_OFFICIAL = re.compile(r"ILSVRC2012_img_(train|val)\.tar")
_OF_A_CLASS = re.compile(r"n\d{8}\.tar")
IMAGENETTE = {"imagenette2.tgz": "full"}
IMAGENETTE |= {f"imagenette2-{side}.tgz": f"{side}px" for side in (320, 160)}
_SPLIT_OF = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("val", "valid", "validation"), "val"),
}
_LOOKED_FOR = {
    "image_folder": "train/ or val/ with images, in folders of classes",
    "kaggle": "ILSVRC/Data/CLS-LOC/",
    "ilsvrc_tar": "ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar",
    "parquet": "*.parquet",
    "webdataset": "*.tar",
}


def candidates(path: Path) -> dict[str, str]:
    """Kinds of source that a folder may be, each with the file or folder that says so."""
    found: dict[str, str] = {}
    for split in SPLITS:
        if any(is_folder or _is_image(name) for name, is_folder in _inside(path / split)):
            found.setdefault("image_folder", f"{split}/")
    for place in KAGGLE_PLACES:
        if any((path / place / split).is_dir() for split in SPLITS):
            found.setdefault("kaggle", f"{place}/")
    for name in _files_near(path, "", 3):
        base = os.path.basename(name).lower()
        if _OFFICIAL.fullmatch(name):
            found.setdefault("ilsvrc_tar", name)
        elif base.endswith(".parquet"):
            found.setdefault("parquet", name)
        elif base.endswith(".tar") and not _OF_A_CLASS.fullmatch(base):
            found.setdefault("webdataset", name)
    return found


def recognize(path: Path) -> tuple[str, str]:
    """The kind of source that a folder is, and the file or folder that says so.

    Raises:
        SourceError: it may be two, or none.
    """
    found = candidates(path)
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        layouts = [f"--source.kind={kind} ({name})" for kind, name in found.items()]
        raise SourceError(f"{path} can be read in {len(found)} ways: give {' or '.join(layouts)}")
    looked = "; ".join(f"{kind}: {what}" for kind, what in _LOOKED_FOR.items())
    holds = f"{path} has no known layout, it holds {_contents(path)}"
    raise SourceError(f"{holds}: {_advice(path)} (looked for {looked})")


def missing(path: Path, split: str, kind: str, what: str) -> SourceError:
    """The error about `what` of a split that a folder does not hold, with what to do."""
    same = {kind, "kaggle"} if kind == "image_folder" else {kind}
    others = [other for other in candidates(path) if other not in same]
    advice = _advice(path)
    if others:
        advice = f"it looks like another layout, try --source.kind={' or '.join(others)}"
    return SourceError(f"{path} holds no {what}: {advice}{ADVICE[split]}")


def _advice(path: Path) -> str:
    """What to do about a folder that does not hold what was looked for."""
    folders = [name for name, is_folder in _inside(path) if is_folder]
    for name in folders:
        if (split := _SPLIT_OF.get(name.lower(), name)) != name:
            return f"it has {name!r}, rename that to {split!r}"
    for name in folders:
        if name not in SPLITS and candidates(path / name):
            return f"{path / name} does, give it as --source.path"
    for name in _files_near(path, "", 2):
        if _OF_A_CLASS.fullmatch(os.path.basename(name)):
            return f"unpack {name} and its like, each into a folder of its name"
        if size := IMAGENETTE.get(name):
            flags = f"--source.kind=imagenette --source.imagenette_size={size}"
            return f"{name} is an archive of Imagenette, {flags} checks and unpacks it"
        if name.endswith((".tar.gz", ".tgz", ".zip")):
            return f"{name} is an archive, unpack it first"
    if any(_is_image(name) for folder in folders for name, _ in _inside(path / folder)):
        return "if these are classes, link this as train/ of a new folder, and use --source.holdout"
    return "--source.path must be a folder as in docs/datasets.md, with train/ and val/ in it"


def _contents(path: Path) -> str:
    names = [name + "/" * is_folder for name, is_folder in _inside(path)]
    more = f" and {len(names) - 8:,} more" if len(names) > 8 else ""
    return f"{', '.join(names[:8])}{more}" if names else "nothing"


def _inside(folder: Path) -> Iterator[tuple[str, bool]]:
    """Names in a folder, sorted, and whether each is a folder; without hidden and system files."""
    if folder.is_dir():
        for entry, is_folder in visible(folder, LeftOut()):
            yield entry.name, is_folder


def _is_image(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    return bool(suffix) and suffix in IMAGE_ENDINGS


def _files_near(path: Path, inner: str, depth: int) -> Iterator[str]:
    """Files at most so many levels below a folder; of a split, not those of its classes."""
    for name, is_folder in _inside(path / inner):
        if not is_folder:
            yield inner + name
        elif depth > 1:
            yield from _files_near(path, f"{inner}{name}/", 1 if name in SPLITS else depth - 1)
