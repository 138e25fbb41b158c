"""Class lists: from files of names, from the names of images, and one list for both splits."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fast_imagenet.beton.format import MAX_CLASSES, too_many_classes
from fast_imagenet.sources.base import Source, SourceError
from fast_imagenet.terminal import plural, readable

WNID = re.compile(r"n\d{8}")
# As a word of a longer name. WordNet's numbers end at n153...: n20240102 is a date.
_WNID_IN_NAME = re.compile(r"(?<![A-Za-z0-9])n(?:0\d|1[0-5])\d{6}(?![A-Za-z0-9])")
Classes = tuple[np.ndarray, list[str], list[str] | None]  # labels, classes, class names


def unique_dict(pairs: Iterable[tuple], where: str) -> dict[Any, Any]:
    """A dictionary of `pairs`; a key with two values is a SourceError."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise SourceError(
                f"{where} has two entries for {key!r}, {found[key]!r} and {value!r}: remove the"
                " wrong one"
            )
    return found


def read_class_file(path: Path) -> list[str]:
    """Class names from a text file, one per line, all different, in the order of the labels."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"the class file {path} cannot be read: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) != len(names):
        raise SourceError(
            f"the class file {path} must hold one different name per line; it has"
            f" {plural(len(names), 'name')}, {len(set(names))} of them different"
        )
    return names


def read_synset_names(path: Path, classes: Sequence[str]) -> list[str] | None:
    """Readable names of `classes` from a file of lines 'wnid name'; None unless it has them all."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (tuple(line.strip().split(maxsplit=1)) for line in lines if len(line.split()) > 1)
    names = unique_dict(pairs, str(path))
    return [names[wnid] for wnid in classes] if all(wnid in names for wnid in classes) else None


class WnidVotes:
    """Which wnid each label means, learned from the names of images until two disagree."""

    def __init__(self) -> None:
        self._wnid_of_label: dict[int, str] = {}
        self._conflict = ""

    def add(self, label: int, text: str) -> None:
        """Take the last wnid in `text`, as in 'ILSVRC2012_val_00000293_n01440764.JPEG'."""
        found = _WNID_IN_NAME.findall(text)
        if not found:
            return
        known = self._wnid_of_label.setdefault(label, found[-1])
        if known != found[-1] and not self._conflict:
            self._conflict = f"label {label} is {known} and, in {text.strip()!r}, {found[-1]}"

    def classes(self, count: int) -> list[str] | None:
        """The wnids of labels 0 to `count` - 1; None unless all are known and different."""
        wnids = [self._wnid_of_label.get(label, "") for label in range(count)]
        known = not self._conflict and "" not in wnids and len(set(wnids)) == count
        return wnids if known else None

    def notes(self) -> tuple[str, ...]:
        """A warning when labels and the wnids in names do not agree."""
        if not self._conflict:
            return ()
        what = f"labels disagree with the wnids in the names of images: {self._conflict}"
        return (readable(f"warning: {what}; labels were kept as they are stored"),)


def name_classes(
    labels: np.ndarray, votes: WnidVotes, names: Sequence[str] | None, where: str
) -> Classes:
    """Labels, classes and class names of data that stores numbers: wnids if known, else `names`.

    Args:
        labels: int64 [n], as stored.
        votes: wnids found in the names of images.
        names: class names in the order of the stored labels, or None.
        where: the data, for the message.

    Raises:
        SourceError: no images, a label that is negative or has no name, or a name that two
            classes have.
    """
    if not len(labels):
        raise SourceError(f"{where} holds no images")
    count = len(names) if names else int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= count:
        raise SourceError(
            f"{where} has labels from {labels.min()} to {labels.max()}, but {count} class names:"
            " a label of -1 marks a test split, otherwise give the names with --source.classes"
        )
    if count > MAX_CLASSES:
        what = f"{count:,} classes" if names else f"the label {labels.max()}"
        raise SourceError(f"{where} {too_many_classes(what)}")
    if wnids := votes.classes(count):
        return _sort_wnids(labels, wnids, names)
    twice = [name for name, times in Counter(names or []).items() if times > 1]
    if twice:
        raise SourceError(
            f"{where} gives the name {twice[0]!r} to two classes: name each differently, in a file"
            " for --source.classes"
        )
    return _sort_wnids(labels, names or [str(label) for label in range(count)], None)


def _sort_wnids(
    labels: np.ndarray, classes: Sequence[str], class_names: Sequence[str] | None
) -> Classes:
    """Renumber labels so that wnids stand in sorted order; other names keep their order."""
    order = list(range(len(classes)))
    if all(WNID.fullmatch(name) for name in classes):
        order.sort(key=lambda old: classes[old])
    new_of_old = np.argsort(order)
    names = None if class_names is None else [class_names[old] for old in order]
    return new_of_old[labels], [classes[old] for old in order], names


def use_classes(source: Source, train: Source) -> None:
    """Renumber the labels of `source` after the class list of the train split, in place.

    Classes are matched by identifier or, where a split was too small to learn all wnids, by name.

    Raises:
        SourceError: it has images of a class that `train` does not know, or the two name a class
            differently.
    """
    _refuse_contradiction(source, train)
    if source.numbered != train.numbered:
        without, other = ("val", "train") if source.numbered else ("train", "val")
        raise SourceError(
            f"the {without} split has numbers for its classes and no names, and {other} has names:"
            " give the names in the order of the numbers with --source.classes"
        )
    if source.classes == train.classes:
        return
    label_of = _labels_by_name(train.class_names) | _labels_by_name(train.classes)
    pairs = zip(source.classes, source.class_names or source.classes, strict=True)
    new_labels = np.array([label_of.get(one, label_of.get(other, -1)) for one, other in pairs])
    used = np.unique(source.labels)
    unknown = [source.classes[label] for label in used[new_labels[used] < 0]]
    if unknown:
        raise SourceError(
            f"the val split has {plural(len(unknown), 'class')} that train does not have"
            f" ({', '.join(unknown[:5])}): both must come from the same dataset, and name its"
            " classes alike"
        )
    if len(np.unique(new_labels[used])) < len(used):
        raise SourceError(
            "the val split has two classes that are one class of train: both must name their"
            " classes alike, as with --source.classes"
        )
    source.labels = new_labels[source.labels]
    source.classes, source.class_names = train.classes, train.class_names


def _labels_by_name(names: Sequence[str] | None) -> dict[str, int]:
    """Label of every name that occurs once."""
    counts = Counter(names or [])
    return {name: label for label, name in enumerate(names or []) if counts[name] == 1}


def _refuse_contradiction(source: Source, train: Source) -> None:
    """Refuse splits that give the same name to different identifiers."""
    val_labels, train_labels = (_labels_by_name(one.class_names) for one in (source, train))
    for name in val_labels.keys() & train_labels.keys():
        in_train, in_val = train.classes[train_labels[name]], source.classes[val_labels[name]]
        if in_train != in_val:
            raise SourceError(
                f"{name!r} is the class {in_train} in train and {in_val} in val: one of the two"
                " has a wrong list of class names, correct it or give --source.classes"
            )
