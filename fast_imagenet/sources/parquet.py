"""Parquet files as Hugging Face keeps pictures: a column image{bytes, path} and an integer label.

    data/train-00000-of-00294.parquet ..., data/validation-00000-of-00014.parquet ...

Bytes are passed on as stored. Only whole row groups can be read, so their order is drawn, and then
the order inside each; a worker keeps the last group it has read.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fast_imagenet.sources.base import (
    Source,
    SourceError,
    WnidVotes,
    name_classes,
    read_class_file,
    split_files,
)


class ParquetSource(Source):
    """Rows of parquet files.

    Args:
        paths: the files.
        groups: int64 [g, 2], file number and row group number of each group.
        blocks: int64 [n], number of the group of each row, ascending.
        labels, classes, class_names: see Source.
    """

    kind = "parquet"

    def __init__(self, paths, groups, blocks, labels, classes, class_names):
        super().__init__(labels, classes, class_names)
        self.paths = list(paths)
        self.groups = np.asarray(groups, np.int64)
        self.blocks = np.asarray(blocks, np.int64)
        self._firsts = np.searchsorted(self.blocks, np.arange(len(self.groups)))
        self._loaded = (-1, None)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_loaded": (-1, None)}

    def name(self, index: int) -> str:
        block = self.blocks[index]
        file, group = self.groups[block]
        return f"{self.paths[file]}, row group {group}, row {index - self._firsts[block]}"

    def read(self, index: int) -> bytes:
        block = int(self.blocks[index])
        if self._loaded[0] != block:
            self._loaded = (block, self._read_group(block))
        data = self._loaded[1][index - int(self._firsts[block])].as_py()
        return data or b""

    def _read_group(self, block: int) -> pa.ChunkedArray:
        file, group = self.groups[block]
        try:
            with pq.ParquetFile(self.paths[file]) as parquet:
                table = parquet.read_row_group(int(group), ["image.bytes"], use_threads=False)
        except pa.ArrowException as error:
            raise SourceError(
                f"{self.paths[file]}, row group {group} cannot be read ({error}): fetch it again"
            ) from error
        return pa.chunked_array([chunk.field("bytes") for chunk in table["image"].chunks])


def open_parquet(path: Path, split: str, classes: str = "", **_) -> ParquetSource:
    """One split of a folder of parquet files.

    Class names come from the file `classes`, from the files' own metadata, or are the numbers;
    wnids found in the names of the pictures take their place.

    Raises:
        SourceError: no such files, a damaged one, or other columns than expected.
    """
    paths = split_files(path, ".parquet", split)
    names = read_class_file(Path(classes)) if classes else None
    votes, groups, labels = WnidVotes(), [], []
    for number, file in enumerate(paths):
        names_here, labels_here = _scan(file, votes)
        names = names or names_here
        groups += [(number, group) for group in range(len(labels_here))]
        labels += labels_here
    stored = np.concatenate(labels) if labels else np.zeros(0, np.int64)
    found = name_classes(stored, votes, names, f"{path} ({split})")
    blocks = np.repeat(np.arange(len(groups)), [len(part) for part in labels])
    source = ParquetSource(paths, groups, blocks, *found)
    source.notes = _order_note(source.labels, blocks)
    return source


def _scan(file: Path, votes: WnidVotes) -> tuple[list[str] | None, list[np.ndarray]]:
    """Class names in the metadata of a file, and the labels of each of its row groups."""
    try:
        with pq.ParquetFile(file) as parquet:
            _check_columns(parquet.schema_arrow, file)
            groups = range(parquet.num_row_groups)
            labels = [_read_labels(parquet, group, votes) for group in groups]
            return _names_in(parquet.schema_arrow), labels
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{file} is no complete parquet file ({error}): fetch it again"
        ) from error


def _check_columns(schema: pa.Schema, file: Path) -> None:
    image = schema.field("image").type if "image" in schema.names else None
    good_image = (
        image is not None and pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
    )
    good_label = "label" in schema.names and pa.types.is_integer(schema.field("label").type)
    if not good_image or not good_label:
        raise SourceError(
            f"{file} has the columns {', '.join(schema.names)}: it must have image{{bytes, path}}"
            " and an integer label"
        )


def _names_in(schema: pa.Schema) -> list[str] | None:
    """Class names out of the metadata that Hugging Face's library leaves in a file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _read_labels(parquet: pq.ParquetFile, group: int, votes: WnidVotes) -> np.ndarray:
    """Labels of one row group (int64); the names of its pictures vote on wnids."""
    has_path = parquet.schema_arrow.field("image").type.get_field_index("path") >= 0
    columns = ["label", "image.path"] if has_path else ["label"]
    table = parquet.read_row_group(group, columns)
    if table["label"].null_count:
        raise SourceError(f"row group {group} of a parquet file has rows without label")
    labels = table["label"].to_numpy().astype(np.int64)
    paths = table["image"].to_pylist() if has_path else []
    for label, image in zip(labels.tolist(), paths, strict=bool(paths)):
        votes.add(label, (image or {}).get("path") or "")
    return labels


def _order_note(labels: np.ndarray, blocks: np.ndarray) -> tuple[str, ...]:
    """A warning when row groups hold few classes each: then neighbours in the file are alike."""
    groups = int(blocks[-1]) + 1
    pairs = len(np.unique(blocks * (labels.max() + 1) + labels))
    largest = min(len(labels) / groups, labels.max() + 1)
    if pairs / groups > 0.25 * largest:
        return ()
    return (
        f"row groups hold {pairs / groups:.1f} classes on average, so neighbours in the file are"
        " alike: train with data.in_memory=true, whose order is fully random",
    )
