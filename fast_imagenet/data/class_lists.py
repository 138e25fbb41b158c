"""Whether two files number the same classes, from whatever is known of the classes of each."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from types import SimpleNamespace
from typing import Any, Protocol

from fast_imagenet.beton.checksums import class_digest
from fast_imagenet.sources.classes import WNID
from fast_imagenet.terminal import readable


class Classes(Protocol):
    """Classes of a loader, a BetonFile or a `class_list`.

    Attributes:
        num_classes: how many there are.
        classes: identifiers in the order of the labels, or None.
        class_digest: of these identifiers, see beton/checksums.py; or None.
    """

    num_classes: int
    classes: list[str] | None
    class_digest: str | None


def class_list(classes: list[str]) -> Classes:
    """A list of classes, as `difference` takes it."""
    digest = class_digest(classes)
    return SimpleNamespace(classes=classes, class_digest=digest, num_classes=len(classes))


def difference(one: Classes, other: Classes) -> str | None:
    """How two class lists differ, in words; None where no difference can be seen."""
    if one.classes and other.classes and one.classes != other.classes:
        pairs = zip([*one.classes, "none"], [*other.classes, "none"], strict=False)
        number, (mine, theirs) = next((n, p) for n, p in enumerate(pairs) if p[0] != p[1])
        return f"class {number} is {readable(mine)} there and {readable(theirs)} here"
    if one.class_digest and other.class_digest and one.class_digest != other.class_digest:
        return "the checksums of their class lists differ"
    return None


def class_name(identifier: str) -> str:
    """'great white shark' for n01484850: the first of timm's names of a wnid.

    The identifier itself where timm does not know it, or is not installed. Two classes
    may have one name: ImageNet has two cranes.
    """
    if WNID.fullmatch(identifier):
        with suppress(ImportError, KeyError):
            return _wordnet().label_name_to_description(identifier).partition(",")[0]
    return identifier


@cache
def _wordnet() -> Any:
    from timm.data import ImageNetInfo  # takes seconds, and not every installation has it

    return ImageNetInfo()


def same_names(one: Any, other: list[str]) -> bool:
    """Whether `one`, of any type, is a list of the names in `other`, in whatever order."""
    return isinstance(one, list) and sorted(map(str, one)) == sorted(other)


def unequal(train: Classes, val: Classes) -> str | None:
    """Why a validation set does not belong to a training set, in words; None: it may."""
    if found := difference(train, val):
        return f"have different classes ({found})"
    if train.num_classes < val.num_classes:
        return f"have {train.num_classes} and {val.num_classes} classes"
    return None


def notes(loaders: Mapping[str, Any]) -> list[str]:
    """What a user should know of the data: chosen fields, parts, classes that are unknown.

    Args:
        loaders: file -> loader.
    """
    shown = {readable(str(name)): loader for name, loader in loaders.items()}
    found = [f"note: {name}: {loader.note}" for name, loader in shown.items() if loader.note]
    unknown = [name for name, loader in shown.items() if not loader.class_digest]
    if unknown:
        files = " and ".join(unknown)
        found.append(f"note: no class list with {files}: labels are used as stored")
    return found


def check_loaders(train_path: str, train: Any, val_path: str, val: Any, report: bool) -> None:
    """Refuse files of different classes, and print what should be known of the data.

    Args:
        train_path, val_path: files of the loaders.
        train, val: loaders; train may be None.
        report: print, on one rank.
    Raises:
        ValueError: names both files.
    """
    loaders = {val_path: val}
    if train is not None:
        if fault := unequal(train, val):
            raise ValueError(f"{train_path} and {val_path} {fault}; write both from one source")
        loaders = {train_path: train} | loaders
    if report:
        print(*(f"{sentence}\n" for sentence in notes(loaders)), sep="", end="", flush=True)
