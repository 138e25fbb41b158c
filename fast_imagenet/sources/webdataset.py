"""WebDataset shards: plain tars in which the files of one sample stand together.

    imagenet1k-train-0000.tar: n01440764_10026.jpg, n01440764_10026.cls, n01440764_10026.json, ...

A sample has one picture (jpg, jpeg, png or webp) and its label: a number in .cls, or "label" in
.json. Everything else is ignored. Tars are indexed once and then read in place.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from fast_imagenet.sources.base import (
    SourceError,
    WnidVotes,
    name_classes,
    read_class_file,
    split_files,
)
from fast_imagenet.sources.tar import Member, TarSource, check_member, list_members

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CLASS_FILE = "classes.txt"
MAX_TEXT_BYTES = 1 << 20
MAX_LABEL = 1 << 62


def open_webdataset(path: Path, split: str, classes: str = "", **_) -> TarSource:
    """One split of a folder of shards.

    Class names come from the file `classes`, from classes.txt in the folder, or are the numbers;
    wnids found in keys or .json take their place.

    Raises:
        SourceError: no shards, a damaged one, or a sample without picture or label.
    """
    shards = split_files(path, ".tar", split)
    class_file = Path(classes) if classes else path / CLASS_FILE
    names = read_class_file(class_file) if classes or class_file.is_file() else None
    votes, files, found, labels = WnidVotes(), [], [], []
    for number, shard in enumerate(shards):
        for image, label, hint in _samples(shard):
            votes.add(label, hint)
            files.append(number)
            found.append(image)
            labels.append(label)
    result = name_classes(np.array(labels, np.int64), votes, names, f"{path} ({split})")
    offsets, sizes = [one.offset for one in found], [one.size for one in found]
    member_names = [one.name for one in found]
    return TarSource("webdataset", shards, files, offsets, sizes, member_names, *result)


def _samples(shard: Path) -> Iterator[tuple[Member, int, str]]:
    """Picture, label, and text that may contain the wnid, of every sample of a shard."""
    with open(shard, "rb") as file:
        for key, group in groupby(list_members(shard), lambda member: _split_name(member.name)[0]):
            members = [(_split_name(member.name)[1], member) for member in group]
            parts = dict(members)
            if len(parts) < len(members):
                raise SourceError(
                    f"{shard} has a file of the sample {key!r} twice: two samples need two keys"
                )
            images = [parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts]
            if not images and not {"cls", "json"} & parts.keys():
                continue  # a file beside the samples, such as a README
            if len(images) != 1:
                raise SourceError(
                    f"{shard} has {len(images)} pictures for the sample {key!r}, not 1"
                )
            label, hint = _label(file, shard, key, parts)
            yield check_member(images[0], shard), label, hint


def _split_name(name: str) -> tuple[str, str]:
    """Key and suffix: the name splits at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _label(file, shard: Path, key: str, parts: dict[str, Member]) -> tuple[int, str]:
    about = _read_json(file, parts["json"]) if "json" in parts else {}
    try:
        label = _number(_read_text(file, parts["cls"]) if "cls" in parts else about["label"])
    except (KeyError, ValueError, TypeError) as error:
        raise SourceError(
            f"{shard} has no label for the sample {key!r}: it needs a number in {key}.cls"
        ) from error
    told = next(
        (str(about[word]) for word in ("wnid", "synset", "class_name") if word in about), ""
    )
    return label, f"{key} {told}"


def _number(value: str | int | float) -> int:
    """A label as somebody wrote it; ValueError for 1.7, true, Infinity and 65 bits."""
    whole = not isinstance(value, bool) and (not isinstance(value, float) or value.is_integer())
    label = int(value) if whole else MAX_LABEL
    if abs(label) >= MAX_LABEL:
        raise ValueError(f"{value} is no label")
    return label


def _read_text(file, member: Member) -> str:
    if member.size > MAX_TEXT_BYTES:
        return ""
    file.seek(member.offset)
    return file.read(member.size).decode("utf-8", "replace")


def _read_json(file, member: Member) -> dict:
    try:
        about = json.loads(_read_text(file, member))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}
