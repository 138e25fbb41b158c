"""Read and check a .beton file with numpy alone, without FFCV.

FFCV trusts a file blindly: it opens an unfinished or truncated one and then trains on wrong
images or crashes. `BetonFile` refuses such a file with one sentence, in under a second for 1.3
million samples. It checks structure and, where the file has them, the checksum of its header and
tables; image bytes are checked by verify.py.
"""

import io
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.checksums import class_digest, read_header_json, table_from_text
from fast_imagenet.beton.fields import MAX_FIELDS, Fields, read_fields
from fast_imagenet.beton.format import REMEDY, FormatError, damaged

KEEP_PAIR = "keep each pair together, or"


class BetonError(ValueError):
    """Not a complete .beton file; the message names the file, the fault and the fix."""


class BetonFile:
    """A checked .beton file: one image and one label per sample, whatever else FFCV wrote.

    Picklable: a copy in another process opens the file again.

    Attributes:
        path: the file.
        fields: which fields hold image and label, see fields.py.
        num_samples: number of samples, n.
        labels: int64 [n].
        heights, widths: int64 [n], pixels.
        modes: 'jpg' or 'raw', str [n].
        offsets, sizes: int64 [n], bytes: where an image lies in the file.
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
            self._bytes = _map(self.path)
            about = self._read_tables()
        except FormatError as error:
            raise BetonError(f"{self.path} {error}") from error
        self.sidecar, self.block_checksums = _read_sidecar(self, about)
        self.classes: list[str] | None = self.sidecar.get("classes")
        self.class_digest: str | None = about.get("classes_sha256")
        self.num_classes: int = about.get("num_classes", int(self.labels.max()) + 1)
        if self.classes:
            self.class_digest, self.num_classes = class_digest(self.classes), len(self.classes)

    def _read_tables(self) -> dict[str, Any]:
        """Read and check all but the images; returns what the header says of the classes."""
        header = _read_header(self._bytes)
        self.fields, metadata_start = _read_fields(self._bytes, int(header["num_fields"]))
        self.num_samples = int(header["num_samples"])
        self.page_size = int(header["page_size"])
        self.data_end = int(header["alloc_table_ptr"])
        samples = _read_samples(self._bytes, header, self.fields, metadata_start)
        allocations = _read_allocations(self._bytes, header, self.fields)
        images = samples[self.fields.image]
        self.labels = samples[self.fields.label].astype(np.int64)
        self.heights = images["height"].astype(np.int64)
        self.widths = images["width"].astype(np.int64)
        start = metadata_start + samples.nbytes
        self.offsets, self.sizes = _check_samples(header, start, images, allocations)
        self.modes = np.array(fmt.MODE_NAMES)[images["mode"]]
        _refuse(self.labels < 0, "has a negative label")
        if self.labels.max() >= fmt.MAX_CLASSES:
            raise FormatError(fmt.too_many_classes(f"the label {self.labels.max()}"))
        self.header_json, about = read_header_json(self._bytes, self.data_end)
        self.block_bytes: int = self.header_json.get("block_bytes", 0)
        self.first_block: int = self.header_json.get("first_block", 0)
        if about and not self.labels.max() < about["num_classes"] <= fmt.MAX_CLASSES:
            counts = f"{about['num_classes']} classes and the label {self.labels.max()}"
            raise damaged(f"its header has {counts}")
        return about

    def __len__(self) -> int:
        return self.num_samples

    @property
    def content(self) -> str | None:
        """Checksums of images and labels, 16 hex digits; None for a file without checksums."""
        if not self.header_json:
            return None
        return f"{self.header_json['blocks_crc32']:08x}{zlib.crc32(self.labels.tobytes()):08x}"

    @property
    def note(self) -> str:
        """What a user should know of it: which fields are read, and that it is a part; or ''."""
        parts = self.header_json["shard"][1] if self.header_json else 1
        join = "`python -m fast_imagenet.beton merge` joins them"
        part = f"one of the {parts} parts of a dataset; {join}" if parts > 1 else ""
        return "; ".join(filter(None, (self.fields.note(), part)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        try:
            self._bytes = _map(self.path)
        except FormatError as error:
            raise BetonError(f"{self.path} {error}") from error

    def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """Stored image and label of sample `index`.

        Returns:
            JPEG bytes, or uint8 RGB [height, width, 3] where it is raw; and the label.
        """
        stored, label = self.raw_bytes(self.offsets[index], self.sizes[index]), self.labels[index]
        if self.modes[index] == "jpg":
            return stored.tobytes(), int(label)
        pixels_hwc = np.array(stored).reshape(self.heights[index], self.widths[index], 3)
        return pixels_hwc, int(label)

    def raw_bytes(self, start: int, size: int) -> np.ndarray:
        """`size` bytes from byte `start` of the file: uint8, a view, read when they are used."""
        return self._bytes[start : start + size]

    def image(self, index: int) -> np.ndarray:
        """Pixels of sample `index`: uint8 RGB [height, width, 3].

        Raises:
            BetonError: the JPEG is damaged or of another size than the metadata says.
        """
        stored, _ = self.read(index)
        if isinstance(stored, np.ndarray):
            return stored
        from PIL import Image  # here, so that checking a file loads numpy only

        try:
            rgb_hwc = np.array(Image.open(io.BytesIO(stored), formats=["JPEG"]).convert("RGB"))
            if rgb_hwc.shape[:2] == (self.heights[index], self.widths[index]):
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


def _map(path: Path) -> np.ndarray:
    if not path.is_file():
        what = "is not an ordinary file" if path.exists() else "does not exist"
        what = "is a folder, not a file" if path.is_dir() else what
        raise FormatError(f"{what}: make a data file with write_dataset.py")
    if path.stat().st_size == 0:
        raise FormatError(f"is empty (0 bytes): {REMEDY}")
    if path.suffix == ".json":
        file = path.with_suffix("")
        raise FormatError(f"is the summary of a data file: name the file itself, {file}")
    return np.memmap(path, np.uint8, mode="r")


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


def _read_samples(data: np.ndarray, header: np.void, fields: Fields, start: int) -> np.ndarray:
    count = int(header["num_samples"])
    end = start + count * fields.dtype.itemsize
    if count == 0:
        raise FormatError(f"holds no samples: {REMEDY}")
    if end > int(header["alloc_table_ptr"]):
        raise damaged(f"{count:,} samples do not fit before the allocation table")
    if end > len(data):
        raise FormatError(
            f"is truncated: the metadata ends at byte {end:,} of {len(data):,}; {REMEDY}"
        )
    return np.array(data[start:end]).view(fields.dtype)


def _read_allocations(data: np.ndarray, header: np.void, fields: Fields) -> np.ndarray:
    count, start = int(header["num_samples"]) * fields.allocations, int(header["alloc_table_ptr"])
    expected = start + count * fmt.ALLOCATION.itemsize
    if len(data) < expected:
        raise FormatError(
            f"is truncated: it has {len(data):,} bytes instead of {expected:,}; {REMEDY}"
        )
    if len(data) > expected:
        extra = len(data) - expected
        raise damaged(f"{extra:,} bytes follow the allocation table of {count:,} rows")
    return np.array(data[start:]).view(fmt.ALLOCATION)


def _check_samples(
    header: np.void, start: int, images: np.ndarray, allocations: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Offset and size of every image (int64 [n]), checked against everything else.

    The metadata end at byte `start`; `allocations` has the rows of all fields.
    """
    count, end = len(images), int(header["alloc_table_ptr"])
    if len(allocations) > count:
        allocations = _of_images(allocations, images["data_ptr"])
    ids = allocations["sample_id"]
    seen = np.zeros(count, bool)
    seen[ids[ids < count]] = True
    if not seen.all():
        raise damaged(f"sample {int(np.argmin(seen))} is missing in the allocation table")
    offsets, sizes = np.empty(count, np.uint64), np.empty(count, np.uint64)
    offsets[ids], sizes[ids] = allocations["ptr"], allocations["size"]
    page_size = np.uint64(header["page_size"])
    # Sizes are compared first: after that no sum below can overflow.
    _refuse((sizes == 0) | (sizes > page_size), "has an impossible size")
    _refuse((offsets < start) | (offsets > end), "points outside the data pages")
    _refuse(offsets + sizes > end, "reaches beyond the data pages")
    last = offsets + sizes - np.uint64(1)
    _refuse(offsets // page_size != last // page_size, "does not lie inside one page")
    _check_images(images, offsets, sizes)
    order = np.argsort(offsets, kind="stable")
    overlaps = np.zeros(count, bool)
    overlaps[order[1:]] = last[order[:-1]] >= offsets[order[1:]]
    _refuse(overlaps, "overlaps another one")
    return offsets.astype(np.int64), sizes.astype(np.int64)


def _of_images(allocations: np.ndarray, pointers: np.ndarray) -> np.ndarray:
    """The rows of the images: those of other fields point elsewhere, or are empty."""
    ids = allocations["sample_id"]
    known = (ids < len(pointers)) & (allocations["size"] > 0)
    known[known] = pointers[ids[known]] == allocations["ptr"][known]
    return allocations[known]


def _check_images(images: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> None:
    heights, widths = images["height"].astype(np.uint64), images["width"].astype(np.uint64)
    _refuse(images["mode"] > fmt.MODE_RAW, "is neither JPEG nor raw")
    _refuse((heights == 0) | (widths == 0), "has no pixels")
    _refuse(images["data_ptr"] != offsets, "lies elsewhere than the allocation table says")
    wrong = (images["mode"] == fmt.MODE_RAW) & (sizes != 3 * heights * widths)
    _refuse(wrong, "is raw and does not have 3 x height x width bytes")


def _refuse(is_bad: np.ndarray, what: str) -> None:
    if is_bad.any():
        raise damaged(f"sample {int(np.argmax(is_bad))} {what}")


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
    expected = {"num_samples": len(file), "labels_crc32": zlib.crc32(file.labels.tobytes())}
    if not isinstance(summary, dict) or any(summary.get(k) != v for k, v in expected.items()):
        raise FormatError(f"describes another file than {file.path}: {KEEP_PAIR}")
    classes, names = summary.get("classes"), summary.get("class_names")
    if not isinstance(classes, list) or len(classes) <= int(file.labels.max()):
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
