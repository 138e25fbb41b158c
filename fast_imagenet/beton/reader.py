"""Read and check a .beton file with numpy alone, without FFCV.

FFCV trusts a file blindly: it opens an unfinished or truncated one and then trains on wrong
images or crashes. `BetonFile` refuses such a file with one sentence, in under a second for 1.3
million samples. It checks structure and, where the file has them, the checksum of its header and
tables; image bytes are checked by verify.py.

The tables are read where they lie, through a read-only mapping: nothing of them is copied that
grows with the file, and all processes of a machine share the memory.
"""

import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.checksums import class_digest, read_header_json, table_from_text
from fast_imagenet.beton.fields import MAX_FIELDS, Fields, read_fields
from fast_imagenet.beton.format import REMEDY, FormatError, damaged

KEEP_PAIR = "keep each pair together, or"
CHUNK = 1 << 15  # samples checked at a time: what is computed of them stays in the cache
_maps: WeakValueDictionary[tuple[int, ...], np.memmap] = WeakValueDictionary()


class BetonError(ValueError):
    """Not a complete .beton file; the message names the file, the fault and the fix."""


class BetonFile:
    """A checked .beton file: one image and one label per sample, whatever else FFCV wrote.

    Picklable: a copy in another process opens the file again.

    Attributes:
        path: the file.
        data: all its bytes, uint8, read-only; loaders of one file in one process share the mapping.
        fields: which fields hold image and label, see fields.py.
        num_samples: number of samples, n.
        images: mode, width, height and data_ptr of each image, format.py's IMAGE [n]; as the next
            three a view of the file, with no memory of its own.
        labels: int64 [n].
        offsets, sizes: int64 [n], bytes: where an image lies in the file. Where the allocation
            table is in another order, as several workers of FFCV leave it, sizes are held: 8 bytes
            per sample.
        max_label: largest label.
        page_size: bytes.
        data_end: first byte after the data pages.
        sidecar: content of `<file>.json`, {} when there is none.
        classes: class identifiers in the order of the labels, None without sidecar.
        class_digest: checksums.py's `class_digest` of them, also known from the header of a file of
            ours; None for other files without sidecar.
        num_classes: of these; otherwise the largest label + 1.
        header_json: see checksums.py's `read_header_json`; {}: the file has no checksums.
        block_bytes, first_block: the blocks that checksums are of, see there; 0 without them.
        block_checksums: crc32 of every block of the data pages, uint32; None where unknown.

    Raises:
        BetonError: missing, empty, of another type, unfinished, truncated or damaged; or a sidecar
            that belongs to another file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.data = _map(self.path)
            about = self._read_tables()
        except FormatError as error:
            raise BetonError(f"{self.path} {error}") from error
        self.sidecar, self.block_checksums = _read_sidecar(self, about)
        self.classes: list[str] | None = self.sidecar.get("classes")
        self.class_digest: str | None = about.get("classes_sha256")
        self.num_classes: int = about.get("num_classes", self.max_label + 1)
        if self.classes:
            self.class_digest, self.num_classes = class_digest(self.classes), len(self.classes)

    def _read_tables(self) -> dict[str, Any]:
        """Read and check all but the images; returns what the header says of the classes."""
        header = _read_header(self.data)
        self.fields, self._start = _read_fields(self.data, int(header["num_fields"]))
        self.num_samples = int(header["num_samples"])
        self.page_size = int(header["page_size"])
        self.data_end = int(header["alloc_table_ptr"])
        _check_lengths(header, len(self.data), self.fields, self._start)
        self._view_tables()
        pointers, sizes = _places(self._allocations(), self.images["data_ptr"])
        _check_samples(self, pointers, sizes)
        self.sizes, self.max_label = sizes.view(np.int64), int(self.labels.max())
        if self.max_label >= fmt.MAX_CLASSES:
            raise FormatError(fmt.too_many_classes(f"the label {self.max_label}"))
        self.header_json, about = read_header_json(self.data, self.data_end)
        self.block_bytes: int = self.header_json.get("block_bytes", 0)
        self.first_block: int = self.header_json.get("first_block", 0)
        if about and not self.max_label < about["num_classes"] <= fmt.MAX_CLASSES:
            counts = f"{about['num_classes']} classes and the label {self.max_label}"
            raise damaged(f"its header has {counts}")
        return about

    @property
    def metadata_end(self) -> int:
        """First byte after the rows of the samples."""
        return self._start + self.num_samples * self.fields.dtype.itemsize

    def _view_tables(self) -> None:
        samples = np.asarray(self.data)[self._start : self.metadata_end].view(self.fields.dtype)
        self.images, self.labels = samples[self.fields.image], samples[self.fields.label]
        self.offsets = self.images["data_ptr"].view(np.int64)

    def _allocations(self) -> np.ndarray:
        return np.asarray(self.data)[self.data_end :].view(fmt.ALLOCATION)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def heights(self) -> np.ndarray:
        """Of the images, in pixels: int64 [n], computed at each call."""
        return self.images["height"].astype(np.int64)

    @property
    def widths(self) -> np.ndarray:
        """Of the images, in pixels: int64 [n], computed at each call."""
        return self.images["width"].astype(np.int64)

    @property
    def modes(self) -> np.ndarray:
        """'jpg' or 'raw' for each image: str [n], computed at each call."""
        return np.array(fmt.MODE_NAMES)[self.images["mode"]]

    @cached_property
    def labels_crc32(self) -> int:
        """Checksum of all labels."""
        crc = 0
        for part in _parts(len(self)):
            crc = zlib.crc32(self.labels[part].tobytes(), crc)
        return crc

    @property
    def content(self) -> str | None:
        """Checksums of images and labels, 16 hex digits; None for a file without checksums."""
        if not self.header_json:
            return None
        return f"{self.header_json['blocks_crc32']:08x}{self.labels_crc32:08x}"

    @property
    def note(self) -> str:
        """What a user should know of it: which fields are read, and that it is a part; or ''."""
        parts = self.header_json["shard"][1] if self.header_json else 1
        join = "`python -m fast_imagenet.beton merge` joins them"
        part = f"one of the {parts} parts of a dataset; {join}" if parts > 1 else ""
        return "; ".join(filter(None, (self.fields.note(), part)))

    def __getstate__(self) -> dict[str, Any]:
        mapped = dict.fromkeys(("data", "images", "labels", "offsets"))
        if np.may_share_memory(self.sizes, self.data):
            mapped["sizes"] = None
        return {**self.__dict__, **mapped, "data": len(self.data)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        try:
            self.data = _map(self.path)
        except FormatError as error:
            raise BetonError(f"{self.path} {error}") from error
        if len(self.data) != state["data"]:
            raise BetonError(f"{self.path} has changed since it was opened: start again")
        self._view_tables()
        if self.sizes is None:
            self.sizes = self._allocations()["size"].view(np.int64)

    def read(self, index: int) -> bytes | np.ndarray:
        """Stored image of sample `index`: JPEG bytes, or raw uint8 RGB [height, width, 3]."""
        start, image = self.offsets[index], self.images[index]
        stored = self.data[start : start + self.sizes[index]]
        if image["mode"] == fmt.MODE_JPG:
            return stored.tobytes()
        return np.array(stored).reshape(image["height"], image["width"], 3)

    def image(self, index: int) -> np.ndarray:
        """Pixels of sample `index`: uint8 RGB [height, width, 3].

        Raises:
            BetonError: the JPEG is damaged or of another size than the metadata says.
        """
        stored = self.read(index)
        if isinstance(stored, np.ndarray):
            return stored
        from PIL import Image  # here, so that checking a file loads numpy only

        try:
            rgb_hwc = np.array(Image.open(io.BytesIO(stored), formats=["JPEG"]).convert("RGB"))
            image = self.images[index]
            if rgb_hwc.shape[:2] == (image["height"], image["width"]):
                return rgb_hwc
            fault = f"has the wrong size {rgb_hwc.shape[:2]}"
        except (OSError, SyntaxError, ValueError) as error:
            fault = f"cannot be decoded ({error})"
        raise BetonError(f"{self.path} {damaged(f'the JPEG of sample {index} {fault}')}")


def sidecar_path(path: str | Path) -> Path:
    """Where the summary of a data file lies: `train.beton` -> `train.beton.json`."""
    return Path(f"{path}.json")


# ------------------------------------------------------------------------------------------------
# Header and tables
# ------------------------------------------------------------------------------------------------


def _map(path: Path) -> np.memmap:
    if not path.is_file():
        what = "is not an ordinary file" if path.exists() else "does not exist"
        what = "is a folder, not a file" if path.is_dir() else what
        raise FormatError(f"{what}: make a data file with write_dataset.py")
    if path.stat().st_size == 0:
        raise FormatError(f"is empty (0 bytes): {REMEDY}")
    if path.suffix == ".json":
        file = path.with_suffix("")
        raise FormatError(f"is the summary of a data file: name the file itself, {file}")
    with open(path, "rb") as stream:
        status = os.fstat(stream.fileno())
        key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        data = _maps.get(key)
        if data is None:
            data = _maps[key] = np.memmap(stream, np.uint8, mode="r")
    return data


def _read_header(data: np.ndarray) -> np.void:
    if len(data) < fmt.HEADER.itemsize:
        raise FormatError(f"is not a .beton file: it has only {len(data)} bytes; {REMEDY}")
    header = data[: fmt.HEADER.itemsize].view(fmt.HEADER)[0]
    version, page_size = int(header["version"]), int(header["page_size"])
    if version == 0 and not data[: fmt.METADATA_START].any():
        raise FormatError(f"is unfinished: its header was never written; {REMEDY}")
    if version != fmt.FORMAT_VERSION:
        raise FormatError(
            f"is not a .beton file of format version {fmt.FORMAT_VERSION} (it has {version}):"
            f" {REMEDY}"
        )
    if int(header["alloc_table_ptr"]) == 0:
        raise FormatError(f"is unfinished: its writer was stopped before the end; {REMEDY}")
    if page_size < fmt.MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise damaged(f"page size {page_size} is not a power of two from 2 MiB up")
    return header


def _read_fields(data: np.ndarray, num_fields: int) -> tuple[Fields, int]:
    """What the field descriptors say, and the first byte after them."""
    end = fmt.HEADER.itemsize + num_fields * fmt.FIELD.itemsize
    if not 1 <= num_fields <= MAX_FIELDS or end > len(data):
        raise damaged(f"{num_fields} fields in a file of {len(data)} bytes")
    return read_fields(data[fmt.HEADER.itemsize : end].view(fmt.FIELD)), end


def _check_lengths(header: np.void, length: int, fields: Fields, start: int) -> None:
    """Refuse a file of `length` bytes that is not as long as header and fields say."""
    count, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    end = start + count * fields.dtype.itemsize
    if count == 0:
        raise FormatError(f"holds no samples: {REMEDY}")
    if end > table:
        raise damaged(f"{count:,} samples do not fit before the allocation table")
    if end > length:
        raise FormatError(
            f"is truncated: the metadata ends at byte {end:,} of {length:,}; {REMEDY}"
        )
    rows = count * fields.allocations
    expected = table + rows * fmt.ALLOCATION.itemsize
    if length < expected:
        raise FormatError(
            f"is truncated: it has {length:,} bytes instead of {expected:,}; {REMEDY}"
        )
    if length > expected:
        raise damaged(f"{length - expected:,} bytes follow the allocation table of {rows:,} rows")


def _parts(count: int) -> Iterator[slice]:
    """0 .. count - 1 in slices of CHUNK."""
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _places(allocations: np.ndarray, pointers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pointer and size of each sample's image, uint64 [n]; views where rows are those of samples.

    Args: allocations: the rows of all fields. pointers: of the images, by the metadata, uint64 [n].
    """
    count, ids = len(pointers), allocations["sample_id"]
    in_order = len(ids) == count and all(
        (ids[part] == np.arange(part.start, part.stop, dtype=np.uint64)).all()
        for part in _parts(count)
    )
    if in_order:
        return allocations["ptr"], allocations["size"]
    if len(allocations) > count:
        allocations = _of_images(allocations, pointers)
        ids = allocations["sample_id"]
    seen = np.zeros(count, bool)
    seen[ids[ids < count]] = True
    if not seen.all():
        raise damaged(f"sample {int(np.argmin(seen))} is missing in the allocation table")
    offsets, sizes = np.empty(count, np.uint64), np.empty(count, np.uint64)
    offsets[ids], sizes[ids] = allocations["ptr"], allocations["size"]
    return offsets, sizes


def _check_samples(file: BetonFile, pointers: np.ndarray, sizes: np.ndarray) -> None:
    """Check every image's place (uint64 [n], of the allocation table) against everything else."""
    for part in _parts(len(file)):
        places = pointers[part].copy(), sizes[part].copy()  # aligned, each on its own
        _check_places(file, *places, part.start)
        _check_images(file.images[part], *places, part.start)
    _check_overlaps(pointers, sizes)
    for part in _parts(len(file)):
        _refuse(file.labels[part] < 0, "has a negative label", part.start)


def _check_places(file: BetonFile, offsets: np.ndarray, sizes: np.ndarray, first: int) -> None:
    page_size, end = np.uint64(file.page_size), np.uint64(file.data_end)
    # Sizes are compared first: after that no sum below can overflow.
    _refuse((sizes == 0) | (sizes > page_size), "has an impossible size", first)
    wrong = (offsets < file.metadata_end) | (offsets > end)
    _refuse(wrong, "points outside the data pages", first)
    _refuse(offsets + sizes > end, "reaches beyond the data pages", first)
    last = offsets + sizes - np.uint64(1)
    _refuse(offsets ^ last >= page_size, "does not lie inside one page", first)  # a power of two


def _check_overlaps(offsets: np.ndarray, sizes: np.ndarray) -> None:
    count = len(offsets)
    if all(
        (offsets[part] + sizes[part] <= offsets[part.start + 1 : part.stop + 1]).all()
        for part in _parts(count - 1)
    ):
        return  # in order, as one writer leaves them
    order = np.argsort(offsets, kind="stable")
    ends, starts = (offsets + sizes)[order[:-1]], offsets[order[1:]]
    overlaps = np.zeros(count, bool)
    overlaps[order[1:]] = ends > starts
    _refuse(overlaps, "overlaps another one")


def _of_images(allocations: np.ndarray, pointers: np.ndarray) -> np.ndarray:
    """The rows of the images: those of other fields point elsewhere, or are empty."""
    ids = allocations["sample_id"]
    known = (ids < len(pointers)) & (allocations["size"] > 0)
    known[known] = pointers[ids[known]] == allocations["ptr"][known]
    return allocations[known]


def _check_images(images: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, first: int) -> None:
    modes, heights, widths = images["mode"].copy(), images["height"], images["width"]
    _refuse(modes > fmt.MODE_RAW, "is neither JPEG nor raw", first)
    _refuse((heights == 0) | (widths == 0), "has no pixels", first)
    wrong = images["data_ptr"] != offsets
    _refuse(wrong, "lies elsewhere than the allocation table says", first)
    is_raw = modes == fmt.MODE_RAW
    if is_raw.any():
        wrong = is_raw & (sizes != 3 * heights.astype(np.uint64) * widths)
        _refuse(wrong, "is raw and does not have 3 x height x width bytes", first)


def _refuse(is_bad: np.ndarray, what: str, first: int = 0) -> None:
    """Name the first sample of `is_bad`, whose own first one is sample `first` of the file."""
    if is_bad.any():
        raise damaged(f"sample {first + int(np.argmax(is_bad))} {what}")


# ------------------------------------------------------------------------------------------------
# The summary beside the file
# ------------------------------------------------------------------------------------------------


def _read_sidecar(file: BetonFile, about: dict[str, Any]) -> tuple[dict, np.ndarray | None]:
    """The summary beside the file, {} without one, and the checksums of the blocks in it.

    Args:
        about: what the header says of the classes.
    """
    sidecar = sidecar_path(file.path)
    try:
        summary = json.loads(sidecar.read_text(encoding="utf-8"))
        _check_summary(summary, file, about)
        return summary, _block_checksums(summary.get("blocks_crc32"), file.header_json)
    except FileNotFoundError:
        return {}, None
    except FormatError as error:
        raise BetonError(f"{sidecar} {error} {REMEDY}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BetonError(f"{sidecar} cannot be read ({error}): {REMEDY}") from error


def _check_summary(summary: Any, file: BetonFile, about: dict[str, Any]) -> None:
    """Refuse a summary that does not describe this file."""
    expected = {"num_samples": len(file), "labels_crc32": file.labels_crc32}
    if not isinstance(summary, dict) or any(summary.get(k) != v for k, v in expected.items()):
        raise FormatError(f"describes another file than {file.path}: {KEEP_PAIR}")
    classes, names = summary.get("classes"), summary.get("class_names")
    if not isinstance(classes, list) or len(classes) <= file.max_label:
        raise FormatError(f"names fewer classes than {file.path} has labels:")
    if len(classes) > fmt.MAX_CLASSES:
        raise FormatError(f"{fmt.too_many_classes(f'{len(classes):,} classes')}, or")
    if names is not None and (not isinstance(names, list) or len(names) != len(classes)):
        raise FormatError("does not have one readable name for each class:")
    if wrong := [name for name in [*classes, *(names or [])] if not isinstance(name, str)]:
        raise FormatError(f"names a class {wrong[0]!r:.80}, which is not text:")
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise FormatError(f"names the class {twice[0]!r:.80} twice:")
    digests = {"classes_sha256": class_digest(classes), "names_sha256": class_digest(names or [])}
    if any(about.get(key, digest) != digest for key, digest in digests.items()):
        raise FormatError(f"names other classes than {file.path} was written with: {KEEP_PAIR}")


def _block_checksums(text: Any, header_json: dict[str, Any]) -> np.ndarray | None:
    if not header_json or text is None:
        return None
    try:
        table = table_from_text(text)
        if zlib.crc32(table.tobytes()) == header_json["blocks_crc32"]:
            return table
    except (TypeError, ValueError):
        pass
    raise FormatError(f"has other checksums than its file was written with: {KEEP_PAIR}")
