"""What every source has in common: labels, classes, names of images, their order."""

import zlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fast_imagenet.terminal import readable

# The largest ImageNet file has 15 MB; a larger archive member is an accident or an attack.
MAX_IMAGE_BYTES = 64 << 20


class ImageError(ValueError):
    """Not a complete image of a known kind; the message says why, without the path."""


class SourceError(ValueError):
    """The data does not look as its kind says; the message is one sentence with the fix."""


class LeftOut:
    """What a source does not read: counted by reason, with the first name of each."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str | Path] = {}

    def add(self, reason: str, name: str | Path, count: int = 1) -> None:
        """Count files, or samples, that are not read for this reason."""
        self._counts[reason] = self._counts.get(reason, 0) + count
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
        makes_pixels: True when `pixels(i)` is called instead of `read(i)`.
    """

    kind = ""
    makes_pixels = False
    blocks: np.ndarray | None = None
    numbered = False
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        labels: np.ndarray | Sequence[int],
        classes: Sequence[str],
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.labels = np.asarray(labels, np.int64)
        self.classes = _distinct(classes)
        self.class_names = None if class_names is None else [readable(name) for name in class_names]

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


def _distinct(classes: Sequence[str]) -> list[str]:
    """Class identifiers as they can be shown; refused where two of them look alike then."""
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

    def __init__(self, source: Source, indices: np.ndarray, note: str) -> None:
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


def hold_out(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """A source without a fraction of its images, and that fraction, drawn evenly over the classes.

    Args:
        source: the training images.
        fraction: 0 < fraction < 1; of n images round(fraction n) are held out.
        seed: of the draw.

    Raises:
        SourceError: one of the two would be empty.
    """
    count = round(fraction * len(source))
    if not 0 < count < len(source):
        raise SourceError(
            f"--source.holdout={fraction:g} of {len(source)} images is {count}: train and val need"
            " at least one each, choose another fraction"
        )
    held_out = choose(source.labels, count, seed)
    rest = np.setdiff1d(np.arange(len(source)), held_out, assume_unique=True)
    words = f"{fraction:.0%} of the training images were held out (--source.holdout)"
    unused = "these are used instead of the validation images"
    return (
        Subset(source, rest, f"{words}; this is the rest"),
        Subset(source, held_out, f"{words}; {unused}"),
    )


class PackedNames:
    """A million short strings in two arrays: a list of them would take 100 MB in every process."""

    def __init__(self, names: Iterable[str]) -> None:
        self._blob, ends = bytearray(), array("q")
        for name in names:
            self._blob += name.encode("utf-8", "surrogateescape")
            ends.append(len(self._blob))
        self._ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return self._blob[start : int(self._ends[index])].decode("utf-8", "surrogateescape")

    def checksum(self) -> int:
        """Of all strings in their order."""
        return zlib.crc32(self._ends.tobytes(), zlib.crc32(self._blob))


def choose(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` images (0 = all), drawn evenly over the classes: ascending indices, int64.

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
    images inside a block: then a run of neighbors can be read from one block.
    """
    rng = np.random.default_rng([seed, 2])
    shuffled = rng.permutation(indices)
    if blocks is None:
        return shuffled
    turn = rng.permutation(int(blocks.max()) + 1)
    return shuffled[np.argsort(turn[blocks[shuffled]], kind="stable")]
