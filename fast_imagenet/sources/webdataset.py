"""WebDataset shards: plain tars in which the files of one sample stand together.

    imagenet1k-train-0000.tar: n01440764_10026.jpg, n01440764_10026.cls, n01440764_10026.json, ...

A sample has one image and its label: a number in .cls, or "label" in .json. By the standard's rule
a name splits at the first dot after the last slash: x.v2.jpg belongs to the sample x. What belongs
to no sample is counted in the summary. Tars are indexed once and then read in place.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fast_imagenet.sources.base import LeftOut, SourceError
from fast_imagenet.sources.classes import WnidVotes, name_classes, read_class_file
from fast_imagenet.sources.listing import IMAGE_ENDINGS, split_files
from fast_imagenet.sources.tar import Member, TarSource, check_member, list_members
from fast_imagenet.terminal import plural

_KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
CLASS_FILE = "classes.txt"
MAX_TEXT_BYTES = 1 << 20
MAX_LABEL = 1 << 62


def open_webdataset(path: Path, split: str, classes: str = "", **_: Any) -> TarSource:
    """One split of a folder of shards.

    Class names come from the file `classes`, from classes.txt in the folder, or are the numbers;
    wnids found in keys or .json take their place.

    Raises:
        SourceError: no shards, a damaged one, or a sample without image or label.
    """
    shards, left_out = split_files(path, ".tar", split, beside=[CLASS_FILE])
    class_file = Path(classes) if classes else path / CLASS_FILE
    names = read_class_file(class_file) if classes or class_file.is_file() else None
    votes, files, images, labels = WnidVotes(), [], [], []
    for number, shard in enumerate(shards):
        for image, label, hint in _samples(shard, left_out):
            votes.add(label, hint)
            files.append(number)
            images.append(image)
            labels.append(label)
    found = name_classes(np.array(labels, np.int64), votes, names, f"{path} ({split})")
    source = TarSource(shards, files, images, *found)
    copies = _copies(shards, files, images, labels)
    source.notes = (*left_out.notes(), *votes.notes(), *copies)
    return source


def _copies(
    shards: Sequence[Path], files: list[int], images: list[Member], labels: list[int]
) -> list[str]:
    """Warnings of shards that look like copies: their samples would count twice."""
    first_of: dict[int, Path] = {}
    warnings = []
    samples = zip(files, images, labels, strict=True)
    for number, group in groupby(samples, lambda sample: sample[0]):
        content = hash(tuple((image.name, image.size, label) for _, image, label in group))
        first = first_of.setdefault(content, shards[number])
        if first != shards[number]:
            warnings.append(
                f"warning: {shards[number]} has the names, sizes and labels of {first}: if one is"
                " a copy, remove it, since its samples count twice"
            )
    return warnings


def _samples(shard: Path, left_out: LeftOut) -> Iterator[tuple[Member, int, str]]:
    """Image, label, and text that may contain the wnid, of every sample of a shard."""
    with open(shard, "rb") as file:
        for key, group in groupby(_keyed(shard, left_out), lambda keyed: keyed[0]):
            members = [(suffix, member) for _, suffix, member in group]
            parts = dict(members)
            if len(parts) < len(members):
                raise SourceError(
                    f"{shard} has a file of the sample {key!r} twice: two samples need two keys"
                )
            suffix = _image_of(shard, key, parts, left_out)
            if not suffix:
                left_out.add("sample without an image", f"{shard}/{members[0][1].name}")
                continue
            label, hint = _label(file, shard, key, suffix, parts)
            yield check_member(parts[suffix], shard), label, hint


def _keyed(shard: Path, left_out: LeftOut) -> Iterator[tuple[str, str, Member]]:
    """Key, suffix and place of every file that belongs to a sample."""
    for member in list_members(shard):
        found = _KEY_AND_SUFFIX.fullmatch(member.name)
        base = member.name.rpartition("/")[2]
        if found is None or (base.startswith("__") and base.endswith("__")):
            reason = "hidden" if base.startswith(".") else "file of no sample"
            left_out.add(reason, f"{shard}/{member.name}")
        else:
            yield found.group(1), found.group(2).lower(), member


def _image_of(shard: Path, key: str, parts: dict[str, Member], left_out: LeftOut) -> str:
    """Suffix of the image of a sample; empty when it has none.

    x.jpg is the image even beside a mask x.seg.png that has no label of its own.
    """
    images = [suffix for suffix in parts if f".{suffix.rpartition('.')[2]}" in IMAGE_ENDINGS]
    plain = [suffix for suffix in images if "." not in suffix]
    others = [suffix for suffix in images if suffix not in plain]
    labeled = [suffix for suffix in others if _beside(suffix, "cls", parts) not in (None, "cls")]
    if len(images) <= 1:
        return images[0] if images else ""
    if len(plain) != 1 or labeled:
        raise SourceError(
            f"{shard} has {plural(len(images), 'image')} for the sample {key!r}, not 1"
            f" ({parts[images[0]].name}, {parts[images[1]].name}, ...): the key of a sample ends at"
            " the first dot, rename its files to have one key per image, such as x_v2.jpg"
        )
    for suffix in others:
        left_out.add("further image of a sample", f"{shard}/{parts[suffix].name}")
    return plain[0]


def _beside(suffix: str, kind: str, parts: dict[str, Member]) -> str | None:
    """Suffix of the file of this kind that goes with an image: v2.cls with v2.jpg, else cls."""
    own = suffix.rpartition(".")[0] + f".{kind}"
    return next((name for name in (own.lstrip("."), kind) if name in parts), None)


def _label(
    file: BinaryIO, shard: Path, key: str, suffix: str, parts: dict[str, Member]
) -> tuple[int, str]:
    """Label of a sample whose image has this suffix, and text that may contain the wnid."""
    cls, json_suffix = _beside(suffix, "cls", parts), _beside(suffix, "json", parts)
    about = _read_json(file, parts[json_suffix]) if json_suffix else {}
    try:
        label = _number(_read_text(file, parts[cls]) if cls else about["label"])
    except (KeyError, ValueError, TypeError) as error:
        raise SourceError(
            f"{shard} has no label for the sample {key!r}: it needs a number in {key}.cls, which"
            f" must stand beside {parts[suffix].name}"
        ) from error
    other = label
    with suppress(ValueError, TypeError):  # a .json may hold something else under this name
        other = _number(about.get("label", label))
    if other != label:
        raise SourceError(
            f"{shard} has two labels for the sample {key!r}: {label} in .cls, {other} in .json;"
            " write it again with one"
        )
    named = (str(about[word]) for word in ("wnid", "synset", "class_name") if word in about)
    return label, f"{key} {next(named, '')}"


def _number(value: str | int | float) -> int:
    """A label as somebody wrote it; ValueError for 1.7, true, Infinity and 65 bits."""
    whole = not isinstance(value, bool) and (not isinstance(value, float) or value.is_integer())
    label = int(value) if whole else MAX_LABEL
    if abs(label) >= MAX_LABEL:
        raise ValueError(f"{value} is not a valid label")
    return label


def _read_text(file: BinaryIO, member: Member) -> str:
    if member.size > MAX_TEXT_BYTES:
        return ""
    file.seek(member.offset)
    return file.read(member.size).decode("utf-8", "replace")


def _read_json(file: BinaryIO, member: Member) -> dict[str, Any]:
    try:
        about = json.loads(_read_text(file, member))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}
