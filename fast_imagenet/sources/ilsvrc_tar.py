"""The official archives of ILSVRC2012, read in place: no extraction, no million files on the disk.

    ILSVRC2012_img_train.tar        1,000 tars n01440764.tar ..., each of images
    ILSVRC2012_img_val.tar          50,000 images, labels in the devkit
    ILSVRC2012_devkit_t12.tar.gz    ground truth by ILSVRC2012_ID, and the table of ids and wnids

Only members with the expected names are accepted. The summary reports whether they are the official
archives (official.py).
"""

import re
from pathlib import Path
from typing import Any

from fast_imagenet.sources.base import LeftOut, SourceError
from fast_imagenet.sources.labels import DEVKIT, label_images, read_devkit
from fast_imagenet.sources.official import check_official
from fast_imagenet.sources.recognize import missing
from fast_imagenet.sources.tar import TarSource, check_member, list_members

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"

_CLASS_TAR = re.compile(r"(?:\./)?(n\d{8})\.tar")
_TRAIN_IMAGE = re.compile(r"(?:\./)?(n\d{8})_\d+\.JPEG")
_VAL_IMAGE = re.compile(r"(?:\./)?(?:val/)?(ILSVRC2012_val_\d{8}\.JPEG)")


def open_ilsvrc_tar(path: Path, split: str, md5: str = "devkit", **_: Any) -> TarSource:
    """One split out of the official archives in the folder `path`.

    Args:
        md5: which archives' md5 to compare first; see check_official.

    Raises:
        SourceError: an archive is missing, truncated or holds something unexpected.
    """
    names = (TRAIN_TAR,) if split == "train" else (VAL_TAR, DEVKIT)
    for name in names:
        if not (path / name).is_file():
            raise missing(path, split, "ilsvrc_tar", name)
    notes = [check_official(path / name, md5) for name in names]
    source = _open_train(path / TRAIN_TAR) if split == "train" else _open_val(path)
    source.notes = (*notes, *source.notes)
    return source


def _match(pattern: re.Pattern[str], name: str, path: Path) -> str:
    """The part of a member's name that is in parentheses in `pattern`."""
    match = pattern.fullmatch(name)
    if match is None:
        raise SourceError(
            f"{path} holds {name!r}, which is not in the official archive: fetch it again"
        )
    return match.group(1)


def _open_train(path: Path) -> TarSource:
    inner = {}
    for member in list_members(path):
        wnid = _match(_CLASS_TAR, member.name, path)
        if wnid in inner:
            raise SourceError(f"{path} holds {member.name!r} twice: fetch it again")
        inner[wnid] = member
    classes = sorted(inner)
    found, labels = [], []
    for label, wnid in enumerate(classes):
        tar = inner[wnid]
        for member in list_members(path, tar.offset, tar.offset + tar.size):
            if _match(_TRAIN_IMAGE, member.name, path) != wnid:
                what = f"{member.name!r} in {tar.name!r}, which is another class"
                raise SourceError(f"{path} holds {what}: fetch it again")
            found.append(check_member(member, path))
            labels.append(label)
    missing = sorted(set(range(len(classes))) - set(labels))
    if missing or not found:
        which = classes[missing[0]] if missing else "train"
        raise SourceError(f"{path} has no images of {which}: fetch it again")
    return TarSource([path], [0] * len(found), found, labels, classes)


def _open_val(folder: Path) -> TarSource:
    path, labels = folder / VAL_TAR, read_devkit(folder / DEVKIT)
    classes, left_out = sorted(labels.names), LeftOut()
    found = [check_member(member, path) for member in list_members(path)]
    names = [_match(_VAL_IMAGE, member.name, path) for member in found]
    if not found:
        raise SourceError(f"{path} holds no images: fetch it again")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceError(f"{path} holds {twice!r} twice: fetch it again")
    ordered = label_images(names, labels, classes, path, left_out)
    readable = [labels.names[wnid] for wnid in classes]
    source = TarSource([path], [0] * len(found), found, ordered, classes, readable)
    source.notes = left_out.notes()
    return source
