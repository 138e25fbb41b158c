"""The official archives of ILSVRC2012, read in place: no extraction, no million files on the disk.

    ILSVRC2012_img_train.tar        1,000 tars n01440764.tar ..., each of images
    ILSVRC2012_img_val.tar          50,000 images, labels in the devkit
    ILSVRC2012_devkit_t12.tar.gz    ground truth by ILSVRC2012_ID, and the table of ids and wnids

Only members with the expected names are accepted. The summary reports whether they are the official
archives (official.py).
"""

import re
import tarfile
from pathlib import Path
from typing import Any

from fast_imagenet.sources.base import LeftOut, SourceError
from fast_imagenet.sources.classes import unique_dict
from fast_imagenet.sources.matfile import MatError, read_struct_array
from fast_imagenet.sources.official import check_official
from fast_imagenet.sources.tar import (
    UNREADABLE,
    SmallHeaders,
    TarSource,
    check_member,
    list_members,
)

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
MAX_DEVKIT_BYTES = 64 << 20

_CLASS_TAR = re.compile(r"(?:\./)?(n\d{8})\.tar")
_TRAIN_IMAGE = re.compile(r"(?:\./)?(n\d{8})_\d+\.JPEG")
_VAL_IMAGE = re.compile(r"(?:\./)?(?:val/)?ILSVRC2012_val_(\d{8})\.JPEG")


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
            raise SourceError(
                f"{path} does not hold {name}: put the official archive there, or read unpacked"
                " images with --source.kind=image_folder (docs/datasets.md)"
            )
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
    return TarSource("ilsvrc_tar", [path], [0] * len(found), found, labels, classes)


def _open_val(folder: Path) -> TarSource:
    path, devkit = folder / VAL_TAR, folder / DEVKIT
    truth, wnid_of_id, name_of_wnid = read_devkit(devkit)
    classes = sorted(wnid_of_id.values())
    label_of_id = {key: classes.index(wnid) for key, wnid in wnid_of_id.items()}
    found, labels, absent = [], [], set(range(1, len(truth) + 1))
    for member in list_members(path):
        number = int(_match(_VAL_IMAGE, member.name, path))
        if not 1 <= number <= len(truth) or truth[number - 1] not in label_of_id:
            raise SourceError(f"{devkit} has no label for {member.name!r}: fetch both again")
        if number not in absent:
            raise SourceError(f"{path} holds {member.name!r} twice: fetch it again")
        absent.remove(number)
        found.append(check_member(member, path))
        labels.append(label_of_id[truth[number - 1]])
    if not found:
        raise SourceError(f"{path} holds no images: fetch it again")
    names = [name_of_wnid[wnid] for wnid in classes]
    source = TarSource("ilsvrc_tar", [path], [0] * len(found), found, labels, classes, names)
    left_out = LeftOut()
    if absent:
        left_out.add("label without an image", f"ILSVRC2012_val_{min(absent):08}", len(absent))
    source.notes = left_out.notes()
    return source


def read_devkit(path: Path) -> tuple[list[int], dict[int, str], dict[str, str]]:
    """Labels and class tables out of ILSVRC2012_devkit_t12.tar.gz.

    Returns the ILSVRC2012_ID of every val image in the order of their numbers; the wnid of every id
    that occurs as a class of the challenge; the readable name of every such wnid.
    """
    files = _devkit_files(path)
    try:
        truth = [int(word) for word in files[GROUND_TRUTH].split()]
        rows = read_struct_array(files[META], "synsets")
        leaves = [row for row in rows if int(row["num_children"][0]) == 0]
        ids = [(int(row["ILSVRC2012_ID"][0]), row["WNID"]) for row in leaves]
        names = unique_dict(((row["WNID"], row["words"]) for row in leaves), str(path))
    except (MatError, KeyError, ValueError, TypeError, IndexError) as error:
        raise SourceError(f"{path} cannot be understood ({error}): fetch it again") from error
    unique_dict(((wnid, number) for number, wnid in ids), str(path))
    return truth, unique_dict(ids, str(path)), names


def _devkit_files(path: Path) -> dict[str, bytes]:
    """The two files that we need, by the end of their names."""
    try:
        with tarfile.open(path, "r:gz", tarinfo=SmallHeaders) as archive:
            members = [info for info in archive if info.isreg() and info.size <= MAX_DEVKIT_BYTES]
            found = {
                wanted: file.read()
                for info in members
                for wanted in (GROUND_TRUTH, META)
                if info.name.endswith(wanted) and (file := archive.extractfile(info))
            }
    except UNREADABLE as error:
        raise SourceError(f"{path} is not a complete tar.gz ({error}): fetch it again") from error
    missing = {GROUND_TRUTH, META} - found.keys()
    if missing:
        raise SourceError(f"{min(missing)} is missing in {path}: it must be the official {DEVKIT}")
    return found
