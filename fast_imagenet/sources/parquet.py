"""Parquet files as Hugging Face keeps images: a column image{bytes, path} and an integer label.

    data/train-00000-of-00294.parquet ..., data/validation-00000-of-00014.parquet ...

Bytes are passed on as stored. A row group can only be read from its start, so the order of groups
is drawn, and then the order inside each; a worker keeps the last one it has read. Large groups are
read in pieces, and everything in batches: a few kB of file can stand for GB of pixels or names.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fast_imagenet.sources.base import Source, SourceError
from fast_imagenet.sources.classes import WNID, WnidVotes, name_classes, read_class_file
from fast_imagenet.sources.listing import split_files

PIECE_BYTES = 128 << 20  # of a row group, by its own statement, that is kept at a time
KEPT_BYTES = 256 << 20  # of them, whatever it states
BATCH_BYTES = 64 << 20
MAX_BATCH_ROWS = 4096
BUFFER_BYTES = 1 << 20  # with it columns are read bit by bit


class ParquetSource(Source):
    """Rows of parquet files.

    Args:
        paths: the files.
        pieces: int64 [p, 4], file, row group, first row and end row of each piece.
        labels, classes, class_names: see Source.
    """

    kind = "parquet"

    def __init__(
        self,
        paths: Sequence[Path],
        pieces: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str],
        class_names: Sequence[str] | None,
    ) -> None:
        super().__init__(labels, classes, class_names)
        self.paths, self.pieces = list(paths), pieces
        lengths = self.pieces[:, 3] - self.pieces[:, 2]
        self.blocks = self._pieces_of = np.repeat(np.arange(len(self.pieces)), lengths)
        self._firsts = np.cumsum(lengths) - lengths
        self._loaded: tuple[int, dict[int, bytes]] = (-1, {})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": (-1, {})}

    def _place(self, index: int) -> tuple[int, int]:
        """Piece of a sample, and its row in the row group."""
        block = int(self._pieces_of[index])
        return block, int(self.pieces[block, 2] + index - self._firsts[block])

    def name(self, index: int) -> str:
        block, row = self._place(index)
        file, group = self.pieces[block, :2]
        return f"{self.paths[file]}, row group {group}, row {row}"

    def read(self, index: int) -> bytes:
        block, row = self._place(index)
        if self._loaded[0] != block or row not in self._loaded[1]:
            self._loaded = (-1, {})  # its memory is needed
            self._loaded = (block, self._read_piece(block, row))
        return self._loaded[1][row]

    def _read_piece(self, block: int, wanted: int) -> dict[int, bytes]:
        """The row `wanted` and, as long as there is room, the others of a piece."""
        file, group, start, end = self.pieces[block].tolist()
        kept: dict[int, bytes] = {}
        size = 0
        try:
            for row, image in self._rows(file, group, start, end):
                if size < KEPT_BYTES or row == wanted:
                    kept[row] = image.as_py() or b""
                    size += len(kept[row])
                if size >= KEPT_BYTES and wanted in kept:
                    break
        except pa.ArrowException as error:
            raise SourceError(
                f"{self.paths[file]}, row group {group} cannot be read ({error}): fetch it again"
            ) from error
        return kept

    def _rows(self, file: int, group: int, start: int, end: int) -> Iterator[tuple[int, Any]]:
        """Number and image of rows `start` to `end` of a row group."""
        row = 0
        with pq.ParquetFile(self.paths[file], buffer_size=BUFFER_BYTES) as parquet:
            for batch in _batches(parquet, group, ["image.bytes"]):
                (images,) = batch["image"].flatten()
                for inside in range(max(0, start - row), min(len(images), end - row)):
                    yield row + inside, images[inside]
                row += len(images)
                if row >= end:
                    return


def _batches(
    parquet: pq.ParquetFile, group: int, columns: list[str], least: int = 1
) -> Iterator[pa.RecordBatch]:
    """Some columns of a row group in batches of bounded size, but of at least so many rows.

    No value is longer than the stored bytes of its group, although a repeated one is stored once.
    """
    rows = min(MAX_BATCH_ROWS, BATCH_BYTES // max(1, _stored_bytes(parquet, group)))
    return parquet.iter_batches(max(least, rows), [group], columns, use_threads=False)


def _stored_bytes(parquet: pq.ParquetFile, group: int) -> int:
    """Uncompressed bytes of a row group, as it states; asking for those of its columns may end the
    process, where they are damaged."""
    return parquet.metadata.row_group(group).total_byte_size


def open_parquet(path: Path, split: str, classes: str = "", **_: Any) -> ParquetSource:
    """One split of a folder of parquet files.

    Class names come from the file `classes`, from the files' own metadata, or are the numbers;
    wnids found in the names of the images take their place.

    Raises:
        SourceError: no such files, a damaged one, other columns than expected, or files that
            number their classes differently.
    """
    paths, left_out = split_files(path, ".parquet", split)
    given = read_class_file(Path(classes)) if classes else None
    names = _common_names(paths, given)
    votes, pieces, labels = WnidVotes(), [], [np.zeros(0, np.int64)]
    for number, file in enumerate(paths):
        for group, (labels_here, stored_bytes) in enumerate(_scan(file, votes)):
            labels.append(labels_here)
            pieces += [(number, group, *piece) for piece in _pieces(len(labels_here), stored_bytes)]
    found = name_classes(np.concatenate(labels), votes, given or names, f"{path} ({split})")
    source = ParquetSource(paths, np.array(pieces, np.int64), *found)
    source.numbered = not (given or names or WNID.fullmatch(source.classes[0]))
    source.notes = (
        *left_out.notes(),
        *votes.notes(),
        *_order_note(source.labels, source._pieces_of),
    )
    return source


def _common_names(paths: list[Path], given: list[str] | None) -> list[str] | None:
    """Class names that all files have, in one order; None when none has.

    For files without names the names of --source.classes, `given`, are used.
    """
    names_of = {}
    for file in paths:
        with _opened(file) as parquet:
            names_of[file] = _names_in(parquet.schema_arrow)
    first, names = next((item for item in names_of.items() if item[1]), (paths[0], None))
    if given and names and given != names and sorted(given) == sorted(names):
        raise SourceError(
            f"--source.classes has the class names of {first} in another order: leave it out"
        )
    for file, here in names_of.items():
        if here != names and not (here is None and given):
            raise SourceError(
                f"{file} has not the class names of {first} in the same order: write the files"
                " again with one list, or give --source.classes for a file without names"
            )
    return names


@contextmanager
def _opened(file: Path) -> Iterator[pq.ParquetFile]:
    """An open file; any damage that is found inside the block is a SourceError."""
    try:
        with pq.ParquetFile(file, buffer_size=BUFFER_BYTES) as parquet:
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file} is not a complete parquet file ({error}): fetch it again"
        ) from error


def _scan(file: Path, votes: WnidVotes) -> list[tuple[np.ndarray, int]]:
    """Labels, and stored bytes of the images, of each row group."""
    with _opened(file) as parquet:
        _check_columns(parquet.schema_arrow, file)
        groups = range(parquet.num_row_groups)
        return [(_read_labels(parquet, file, g, votes), _stored_bytes(parquet, g)) for g in groups]


def _pieces(rows: int, stored_bytes: int) -> list[tuple[int, int]]:
    """First and end row of the pieces that a row group is read in."""
    length = max(1, rows * PIECE_BYTES // max(stored_bytes, 1))
    return [(start, min(start + length, rows)) for start in range(0, rows, length)]


def _check_columns(schema: pa.Schema, file: Path) -> None:
    image = schema.field("image").type if "image" in schema.names else pa.null()
    is_image = (
        pa.types.is_struct(image)
        and image.get_field_index("bytes") >= 0
        and _is_binary(image.field("bytes").type)
    )
    is_label = "label" in schema.names and pa.types.is_integer(schema.field("label").type)
    if not (is_image and is_label):
        raise SourceError(
            f"{file} has the columns {', '.join(schema.names)}: it must have image{{bytes, path}}"
            " with binary bytes, and an integer label"
        )


def _is_binary(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    names = ("is_binary", "is_large_binary", "is_binary_view", "is_fixed_size_binary")
    return any(getattr(pa.types, name)(kind) for name in names)


def _names_in(schema: pa.Schema) -> list[str] | None:
    """Class names out of the metadata that Hugging Face's library leaves in a file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _read_labels(parquet: pq.ParquetFile, file: Path, group: int, votes: WnidVotes) -> np.ndarray:
    """Labels of a row group (int64); the names of its images vote on wnids."""
    has_path = parquet.schema_arrow.field("image").type.get_field_index("path") >= 0
    columns = ["label", "image.path"] if has_path else ["label"]
    found = [np.zeros(0, np.int64)]
    for batch in _batches(parquet, group, columns, least=8):
        if batch["label"].null_count:
            what = f"{file}, row group {group} has rows without label"
            raise SourceError(f"{what}: write it again without them")
        labels = batch["label"].to_numpy(zero_copy_only=False).astype(np.int64)
        found.append(labels)
        for label, path in zip(labels.tolist(), _paths(batch) if has_path else (), strict=False):
            votes.add(label, path)
    return np.concatenate(found)


def _paths(batch: pa.RecordBatch) -> Iterator[str]:
    """Names of the images of a batch, none where they are not text; a byte that is not UTF-8 is
    kept as in file names."""
    (paths,) = batch["image"].flatten()
    if pa.types.is_dictionary(paths.type):
        paths = paths.dictionary_decode()
    try:
        stored = paths.cast(pa.large_binary())
    except pa.ArrowException:
        return
    for path in stored:
        yield (path.as_py() or b"").decode("utf-8", "surrogateescape")


def _order_note(labels: np.ndarray, blocks: np.ndarray) -> tuple[str, ...]:
    """A warning when row groups hold few classes each: then neighbors in the file are alike."""
    groups = int(blocks[-1]) + 1
    pairs = len(np.unique(blocks * (labels.max() + 1) + labels))
    largest = min(len(labels) / groups, labels.max() + 1)
    if pairs / groups > 0.25 * largest:
        return ()
    return (
        f"row groups hold {pairs / groups:.1f} classes on average, so neighbors in the file are"
        " alike: train with data.in_memory=true, whose order is fully random",
    )
