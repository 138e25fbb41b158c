"""Whether two files number the same classes, from whatever each of them says of its classes."""

from __future__ import annotations

from types import SimpleNamespace

from fast_imagenet.beton.checksums import class_digest
from fast_imagenet.terminal import readable


def class_list(classes: list[str]) -> SimpleNamespace:
    """A list of classes, as `difference` takes it."""
    return SimpleNamespace(
        classes=classes, class_digest=class_digest(classes), num_classes=len(classes)
    )


def difference(one, other) -> str | None:
    """How the class lists of two sides differ, in words; None where no difference can be seen.

    Args:
        one, other: loaders, BetonFiles or `class_list`s: num_classes; classes in the order of the
            labels, or None; class_digest of these, or None.
    """
    if one.classes and other.classes and one.classes != other.classes:
        pairs = zip([*one.classes, "none"], [*other.classes, "none"], strict=False)
        number, (mine, theirs) = next((n, p) for n, p in enumerate(pairs) if p[0] != p[1])
        return f"class {number} is {readable(mine)} there and {readable(theirs)} here"
    if one.class_digest and other.class_digest and one.class_digest != other.class_digest:
        return "the checksums of their class lists differ"
    return None


def same_names(one, other: list[str]) -> bool:
    """Whether `one`, of any type, is a list of the names in `other`, in whatever order."""
    return isinstance(one, list) and sorted(map(str, one)) == sorted(other)


def unequal(train, val) -> str | None:
    """Why a validation set does not belong to a training set, in words; None: it may."""
    if found := difference(train, val):
        return f"have different classes ({found})"
    if train.num_classes < val.num_classes:
        return f"have {train.num_classes} and {val.num_classes} classes"
    return None


def notes(loaders: dict) -> list[str]:
    """What a user should know of the data: chosen fields, parts, classes that are unknown.

    Args:
        loaders: file -> loader.
    """
    found = [
        f"note: {readable(str(name))}: {one.note}" for name, one in loaders.items() if one.note
    ]
    silent = [readable(str(name)) for name, one in loaders.items() if not one.class_digest]
    if silent:
        found.append(f"note: no class list with {' and '.join(silent)}: labels are taken as stored")
    return found
