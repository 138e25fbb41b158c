"""What every source has in common: labels, classes, names, order."""

import errno
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

import numpy as np

from fast_imagenet.beton.format import MAX_CLASSES, too_many_classes
from fast_imagenet.terminal import plural, readable

WNID = re.compile(r"n\d{8}")
# As a word of a longer name. WordNet's numbers end at n153...: n20240102 is a date.
_WNID_IN_NAME = re.compile(r"(?<![A-Za-z0-9])n(?:0\d|1[0-5])\d{6}(?![A-Za-z0-9])")
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
MAX_IMAGE_BYTES = (
    64 << 20
)  # the largest ImageNet file has 15 MB; a bigger archive member is an accident or an attack


class ImageError(ValueError):
    """No complete image of a known kind; the message says why, without the path."""


class SourceError(ValueError):
    """The data does not look as its kind says; the message is one sentence with the fix."""


class LeftOut:
    """What a source does not read: counted by reason, with the first name of each."""

    def __init__(self):
        self._counts = Counter()
        self._first = {}

    def add(self, reason: str, name: str | Path, count: int = 1) -> None:
        """Count files, or samples, that are not read for this reason."""
        self._counts[reason] += count
        self._first.setdefault(reason, name)

    def notes(self) -> tuple[str, ...]:
        """A sentence for each reason."""
        return tuple(
            readable(f"left out ({reason}): {count:,}, the first is {self._first[reason]}")
            for reason, count in self._counts.items()
        )


class Source:
    """Images of one split, in a fixed order.

    Attributes:
        kind: the name in `--source.kind`.
        labels: int64 [n], each in [0, len(classes)).
        classes: class identifiers in the order of the labels: sorted wnids where wnids are known.
        class_names: readable names in the same order, or None.
        blocks: int64 [n], number of the block an image is stored in, where only whole blocks can
            be read at a fair price (parquet row groups); None where any order costs the same.
        numbered: True where `classes` are the labels themselves, for want of names.
        notes: sentences for the summary about what the user should know.
        makes_pixels: True when `pixels(i)` serves instead of `read(i)`.
    """

    kind = ""
    makes_pixels = False
    blocks: np.ndarray | None = None
    numbered = False
    notes: tuple[str, ...] = ()

    def __init__(
        self, labels: np.ndarray, classes: Sequence[str], class_names: Sequence[str] | None = None
    ):
        self.labels = np.asarray(labels, np.int64)
        self.classes = _told_apart(classes)
        self.class_names = None
        if class_names is not None:
            self.class_names = [readable(name) for name in class_names]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Where image `index` lies, as a user would look for it."""
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """Encoded bytes of image `index`, exactly as stored."""
        raise NotImplementedError

    def pixels(self, index: int) -> np.ndarray:
        """Image `index` as uint8 RGB [height, width, 3]; only where `makes_pixels`."""
        raise NotImplementedError


def _told_apart(classes: Sequence[str]) -> list[str]:
    """Class identifiers as they can be shown.

    Raises:
        SourceError: two of them look alike then.
    """
    shown = [readable(name) for name in classes]
    if len(set(shown)) < len(set(classes)):
        first = dict(zip(reversed(shown), reversed(classes), strict=True))
        twice = next(name for name, old in zip(shown, classes, strict=True) if first[name] != old)
        raise SourceError(f"two classes look alike when shown, as {twice!r}: rename one of them")
    return shown


class Subset(Source):
    """Some images of a source, with its class list.

    Args:
        source: of all images.
        indices: int64 [n], which of them, ascending.
        note: sentence for the summary that says which.
    """

    def __init__(self, source: Source, indices: np.ndarray, note: str):
        super().__init__(source.labels[indices], source.classes, source.class_names)
        self._source, self._indices = source, indices
        self.kind, self.makes_pixels = source.kind, source.makes_pixels
        self.blocks = None if source.blocks is None else source.blocks[indices]
        self.notes = (*source.notes, note)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._indices[index]))

    def pixels(self, index: int) -> np.ndarray:
        return self._source.pixels(int(self._indices[index]))


def set_aside(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """A source without a share of its images, and that share, drawn evenly over the classes.

    Args:
        source: the training images.
        share: 0 < share < 1; of n images round(share n) are set aside.
        seed: of the draw.

    Raises:
        SourceError: one of the two would be empty.
    """
    count = round(share * len(source))
    if not 0 < count < len(source):
        raise SourceError(
            f"--source.holdout={share:g} of {len(source)} images is {count}: train and val need"
            " at least one each, choose another share"
        )
    aside = choose(source.labels, count, seed)
    rest = np.setdiff1d(np.arange(len(source)), aside, assume_unique=True)
    words = f"{share:.0%} of the training images were set aside (--source.holdout)"
    return (
        Subset(source, rest, f"{words}; this is the rest"),
        Subset(source, aside, f"{words}; these are they, the validation images are untouched"),
    )


class PackedNames:
    """A million short strings in two arrays: a list of them would take 100 MB in every process."""

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._blob = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def checksum(self) -> int:
        """Of all strings in their order."""
        return zlib.crc32(self._ends.tobytes(), zlib.crc32(self._blob))

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return self._blob[start : int(self._ends[index])].decode("utf-8", "surrogateescape")


class FileHandles:
    """Files opened on first use and kept open; a copy sent to another process starts with none."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._open = {}

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "_open": {}}

    def __del__(self):
        for handle in self._open.values():
            handle.close()

    def read_at(self, file_index: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of file `file_index`.

        Raises:
            SourceError: the file ends earlier.
        """
        handle = self._open.get(file_index)
        if handle is None:
            handle = self._open[file_index] = open(self.paths[file_index], "rb")  # noqa: SIM115
        handle.seek(offset)
        data = handle.read(size)
        if len(data) != size:
            raise SourceError(
                f"{self.paths[file_index]} ends {size - len(data)} bytes before an image does:"
                " the archive is truncated, fetch it again"
            )
        return data


def list_below(root: Path, left_out: LeftOut) -> list[str]:
    """Files below `root`, relative to it and sorted, without hidden files and system folders.

    Links to folders are followed, as torchvision does, but no folder is read twice.

    Raises:
        SourceError: a link leads back to a folder that it lies in.
    """
    names, waiting, seen = [], [""], set()
    while waiting:
        inner = waiting.pop()
        folder = _identity(root / inner)
        if folder in seen:
            left_out.add("folder reached a second time, through a link", root / inner)
            continue
        seen.add(folder)
        with os.scandir(root / inner) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if reason := why_left_out(entry):
                    left_out.add(reason, entry.path)
                elif not is_folder(entry):
                    names.append(inner + entry.name)
                else:
                    refuse_cycle(entry)
                    waiting.append(f"{inner}{entry.name}/")
    return sorted(names)


def why_left_out(entry: os.DirEntry) -> str:
    """Why an entry of a folder belongs to no data set; empty for all others."""
    if entry.name.startswith("."):
        return "hidden"
    return SYSTEM_FOLDERS.get(entry.name, "") if is_folder(entry) else ""


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry of a folder is a folder, or a link to one.

    Raises:
        SourceError: it is a link that leads to itself, or through very many others.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise SourceError(
            f"{entry.path} is a link that leads to itself, or through too many others: remove it"
        ) from error


def refuse_cycle(entry: os.DirEntry) -> None:
    """Refuse a link to a folder that it lies in.

    Raises:
        SourceError: it is one.
    """
    if not entry.is_symlink():
        return
    target, folder = os.path.realpath(entry.path), os.path.realpath(os.path.dirname(entry.path))
    if os.path.commonpath([target, folder]) == target:
        raise SourceError(
            f"{entry.path} is a link to {target}, a folder that it lies in: remove the link"
        )


def map_once(pairs: Iterable[tuple], where: str) -> dict:
    """A dictionary of `pairs`.

    Raises:
        SourceError: one key stands for two values.
    """
    found = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise SourceError(
                f"{where} has two entries for {key!r}, {found[key]!r} and {value!r}: remove the"
                " wrong one"
            )
    return found


def no_val_advice(split: str) -> str:
    """The end of a sentence about a missing split: what to do without val."""
    if split != "val":
        return ""
    return "; without a val split, --source.holdout=0.02 takes one from train"


def read_class_file(path: Path) -> list[str]:
    """Class names from a text file, one a line, in the order of the labels.

    Raises:
        SourceError: no such file, an empty one, or a name that occurs twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"the class file {path} cannot be read: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) != len(names):
        raise SourceError(
            f"the class file {path} must hold one different name a line; it has {len(names)} names,"
            f" {len(set(names))} of them different"
        )
    return names


def sort_wnids(
    labels: np.ndarray, classes: Sequence[str], class_names: Sequence[str] | None
) -> tuple[np.ndarray, list[str], list[str] | None]:
    """Renumber labels so that wnids stand in sorted order; other names keep their order."""
    names = list(class_names) if class_names is not None else None
    if not all(WNID.fullmatch(name) for name in classes):
        return np.asarray(labels, np.int64), list(classes), names
    order = sorted(range(len(classes)), key=lambda old: classes[old])
    new_of_old = np.empty(len(classes), np.int64)
    new_of_old[order] = np.arange(len(classes))
    sorted_names = [names[old] for old in order] if names is not None else None
    return new_of_old[labels], [classes[old] for old in order], sorted_names


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
    readable_names = source.class_names or source.classes
    new_labels = np.array(
        [
            label_of.get(name, label_of.get(other, -1))
            for name, other in zip(source.classes, readable_names, strict=True)
        ]
    )
    used = np.unique(source.labels)
    unknown = [source.classes[label] for label in used[new_labels[used] < 0]]
    if unknown:
        raise SourceError(
            f"the val split has {plural(len(unknown), 'class')} that train does not have"
            f" ({', '.join(unknown[:5])}): both must come from the same data set, and name its"
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
    if not source.class_names or not train.class_names:
        return
    ours, theirs = _labels_by_name(source.class_names), _labels_by_name(train.class_names)
    for name in ours.keys() & theirs.keys():
        ours_is, theirs_is = source.classes[ours[name]], train.classes[theirs[name]]
        if ours_is != theirs_is:
            raise SourceError(
                f"{name!r} is the class {theirs_is} in train and {ours_is} in val: one of the two"
                " has a wrong list of class names, correct it or give --source.classes"
            )


def read_synset_names(path: Path, classes: Sequence[str]) -> list[str] | None:
    """Readable names of `classes` from a file of lines 'wnid name'; None unless it has them all."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (line.strip().split(maxsplit=1) for line in lines if len(line.split()) > 1)
    names = map_once(pairs, str(path))
    return [names[wnid] for wnid in classes] if all(wnid in names for wnid in classes) else None


def choose(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Indices of at most `limit` images (0 = all), drawn evenly over the classes; ascending
    int64.

    A class with too few images gives all it has, and the others share the rest.
    """
    if limit <= 0 or limit >= len(labels):
        return np.arange(len(labels))
    rng = np.random.default_rng([seed, 1])
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    rank_in_class = np.arange(len(labels)) - starts[labels[by_class]]
    class_turn = rng.permutation(len(counts))[labels[by_class]]
    return np.sort(by_class[np.lexsort((class_turn, rank_in_class))[:limit]])


def shuffle(indices: np.ndarray, blocks: np.ndarray | None, seed: int) -> np.ndarray:
    """A permutation of `indices` from `seed`.

    With `blocks` (block number of every image of the source) whole blocks change places, and
    images inside a block: then a run of neighbours can be read from one block.
    """
    rng = np.random.default_rng([seed, 2])
    shuffled = rng.permutation(indices)
    if blocks is None:
        return shuffled
    turn = rng.permutation(int(blocks.max()) + 1)
    return shuffled[np.argsort(turn[blocks[shuffled]], kind="stable")]


class WnidVotes:
    """Which wnid each label means, learnt from the names of images until two disagree."""

    def __init__(self):
        self._wnid_of_label = {}
        self._quarrel = ""

    def add(self, label: int, text: str) -> None:
        """Take the last wnid in `text`, as in 'ILSVRC2012_val_00000293_n01440764.JPEG'."""
        found = _WNID_IN_NAME.findall(text)
        if not found:
            return
        known = self._wnid_of_label.setdefault(label, found[-1])
        if known != found[-1] and not self._quarrel:
            self._quarrel = f"label {label} is {known} and, in {text.strip()!r}, {found[-1]}"

    def classes(self, count: int) -> list[str] | None:
        """The wnids of labels 0 to `count` - 1; None unless all are known and different."""
        wnids = [self._wnid_of_label.get(label) for label in range(count)]
        known = not self._quarrel and None not in wnids and len(set(wnids)) == count
        return wnids if known else None

    def notes(self) -> tuple[str, ...]:
        """A warning when labels and the wnids in names do not agree."""
        if not self._quarrel:
            return ()
        what = "labels disagree with the wnids in the names of images"
        told = f"warning: {what}: {self._quarrel}; labels were kept as they are stored"
        return (readable(told),)


def name_classes(
    labels: np.ndarray, votes: WnidVotes, names: Sequence[str] | None, where: str
) -> tuple[np.ndarray, list[str], list[str] | None]:
    """Labels, classes and class names of data that stores numbers: wnids if known, else `names`.

    Args:
        labels: int64 [n], as stored.
        votes: wnids met in the names of images.
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
        raise SourceError(too_many_classes(where, what))
    wnids = votes.classes(count)
    if wnids:
        return sort_wnids(labels, wnids, names)
    twice = [name for name, times in Counter(names or []).items() if times > 1]
    if twice:
        raise SourceError(
            f"{where} gives the name {twice[0]!r} to two classes: name each differently, in a file"
            " for --source.classes"
        )
    return sort_wnids(labels, names or [str(label) for label in range(count)], None)


def split_files(
    path: Path, suffix: str, split: str, beside: Sequence[str] = ()
) -> tuple[list[Path], LeftOut]:
    """Files below `path` with this suffix that belong to `split`, and what was left out.

    Of a file's name and its folders, the nearest one that names a split decides: `split_of`.

    Args:
        beside: names below `path` that are read in another way.

    Raises:
        SourceError: there are none, one is no regular file, or one could belong to two splits.
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
            f" split {split!r}: {advice}{no_val_advice(split)}"
        )
    folders = (file for file in path.rglob(f"*{suffix}") if file.is_dir())
    for file in [*folders, *chosen]:
        if not file.is_file():
            what = "a folder" if file.is_dir() else "no regular file"
            raise SourceError(f"{file} is {what}, but named *{suffix}: rename or remove it")
    return chosen, left_out


def _of_split(
    path: Path, found: list[PurePath], split: str, suffix: str, left_out: LeftOut
) -> list[Path]:
    """Those of the files that belong to `split`, each file once whatever links lead to it.

    Raises:
        SourceError: one file belongs to two splits.
    """
    chosen, first_of = [], {}
    for name in found:
        belongs = split_of(name, path)
        if belongs is None:
            left_out.add(f"*{suffix} file named after no split", path / name)
            continue
        real = os.path.realpath(path / name)
        first, its_split = first_of.setdefault(real, (name, belongs))
        if its_split != belongs:
            raise SourceError(
                f"{path / first} and {path / name} are one file, in two splits: remove one of them"
            )
        if first != name:
            left_out.add("file reached a second time, through a link", path / name)
        elif belongs == split:
            chosen.append(path / name)
    return chosen


def refuse_same_folder(train: Path, val: Path) -> None:
    """Refuse a val folder, or a folder in it, that is one of train by another name.

    Raises:
        SourceError: it is.
    """
    if not (train.is_dir() and val.is_dir()):
        return
    of_train = {_identity(folder): folder for folder in (train, *_folders_in(train))}
    for folder in (val, *_folders_in(val)):
        if same := of_train.get(_identity(folder)):
            raise SourceError(
                f"{same} and {folder} are one folder: each split needs its own images"
            )


def _folders_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(
            Path(entry) for entry in entries if not why_left_out(entry) and is_folder(entry)
        )


def _identity(folder: Path) -> tuple[int, int]:
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def split_of(file: PurePath, root: Path) -> str | None:
    """The split in the name of a file or, if that names none, of the nearest folder that does.

    Args:
        file: path below `root`.
        root: for the message only; its own name says nothing about its files.

    Raises:
        SourceError: that name holds the words of two splits.
    """
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
