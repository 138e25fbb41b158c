"""Read and check a .beton file with numpy alone, without FFCV.

FFCV trusts a file blindly: it opens an unfinished or truncated one and then trains on wrong
images or crashes. `BetonFile` refuses such a file with one sentence, in under a second for 1.3
million samples. It checks structure and, where the file is stamped, the checksum of its header and
tables; image bytes are checked by verify.py.
"""

import io
import json
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.checksums import (
    StampError,
    class_digest,
    read_class_note,
    read_stamp,
    table_from_text,
)
from fast_imagenet.beton.fields import MAX_FIELDS, FieldError, Fields, read_fields

REMEDY = "copy it again from where it came, or write it again with write_dataset.py"


class BetonError(ValueError):
    """Not a complete .beton file; the message names the file, the fault and the remedy."""


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
        stamp: what checksums.py's `read_stamp` returns; None: the file has no checksums.
        block_sums: crc32 of every block of the data pages, uint32; None where unknown.

    Args:
        path: the file.

    Raises:
        BetonError: missing, empty, of another type, unfinished, truncated or damaged; or a sidecar
            that belongs to another file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._bytes = _map(self.path)
        header, self.fields = _read_header(self.path, self._bytes)
        self.num_samples = int(header["num_samples"])
        self.page_size = int(header["page_size"])
        self.data_end = int(header["alloc_table_ptr"])
        samples = _read_samples(self.path, self._bytes, header, self.fields)
        allocations = _read_allocations(self.path, self._bytes, header, self.fields)
        images = samples[self.fields.image]
        self.labels = samples[self.fields.label].astype(np.int64)
        self.heights = images["height"].astype(np.int64)
        self.widths = images["width"].astype(np.int64)
        self.offsets, self.sizes = _check_samples(self.path, header, images, samples, allocations)
        self.modes = np.array(fmt.MODE_NAMES)[images["mode"]]
        _check_labels(self.path, self.labels)
        self.stamp, about = _read_stamp(self.path, self._bytes, self)
        self.sidecar = _read_sidecar(self.path, self, about)
        self.block_sums = _read_block_sums(self.path, self)
        self.classes = self.sidecar.get("classes")
        self.class_digest = about.get("classes_sha256")
        self.num_classes = about.get("num_classes", int(self.labels.max()) + 1)
        if self.classes:
            self.class_digest, self.num_classes = class_digest(self.classes), len(self.classes)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def content(self) -> str | None:
        """Checksums of images and labels, 16 hex digits; None for a file without a stamp."""
        if self.stamp is None:
            return None
        return f"{self.stamp['blocks_crc32']:08x}{zlib.crc32(self.labels.tobytes()):08x}"

    @property
    def note(self) -> str:
        """What a user should know of it: which fields are read, and that it is a part; or ''."""
        parts = self.stamp["shard"][1] if self.stamp else 1
        merge = "`python -m fast_imagenet.beton merge` joins them"
        told = [self.fields.note(), f"one of the {parts} parts of a data set; {merge}"]
        return "; ".join(filter(None, told if parts > 1 else told[:1]))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_bytes": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._bytes = _map(self.path)

    def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """Stored image and label of sample `index`.

        Returns:
            JPEG bytes, or uint8 RGB [height, width, 3] where it is raw; and the label.
        """
        start = int(self.offsets[index])
        stored = self._bytes[start : start + int(self.sizes[index])]
        label = int(self.labels[index])
        if self.modes[index] == "jpg":
            return stored.tobytes(), label
        shape = int(self.heights[index]), int(self.widths[index]), 3
        return np.array(stored).reshape(shape), label

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
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(
                self.path, f"the JPEG of sample {index} cannot be decoded ({error})"
            ) from error
        if rgb_hwc.shape[:2] != (self.heights[index], self.widths[index]):
            raise _damaged(
                self.path, f"the JPEG of sample {index} has the wrong size {rgb_hwc.shape[:2]}"
            )
        return rgb_hwc


def sidecar_path(path: str | Path) -> Path:
    """Where the summary of a data file lies: `train.beton` -> `train.beton.json`."""
    return Path(f"{path}.json")


# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------


def _damaged(path: Path, what: str) -> BetonError:
    return BetonError(f"{path} is damaged: {what}; {REMEDY}")


def _map(path: Path) -> np.ndarray:
    if not path.is_file():
        what = "is no ordinary file" if path.exists() else "does not exist"
        what = "is a folder, not a file" if path.is_dir() else what
        raise BetonError(f"{path} {what}: make a data file with write_dataset.py")
    if path.stat().st_size == 0:
        raise BetonError(f"{path} is empty (0 bytes): {REMEDY}")
    return np.memmap(path, np.uint8, mode="r")


def _read_header(path: Path, data: np.ndarray) -> tuple[np.void, Fields]:
    """The header, and what the field descriptors after it say."""
    if path.suffix == ".json":
        what = f"is the summary of a data file: name the file itself, {path.with_suffix('')}"
        raise BetonError(f"{path} {what}")
    if len(data) < fmt.HEADER.itemsize:
        raise BetonError(f"{path} is no .beton file: it has {len(data)} bytes only; {REMEDY}")
    header = data[: fmt.HEADER.itemsize].view(fmt.HEADER)[0]
    version, page_size = int(header["version"]), int(header["page_size"])
    if version == 0 and not data[: fmt.METADATA_START].any():
        raise BetonError(f"{path} is unfinished: its header was never written; {REMEDY}")
    if version != fmt.FORMAT_VERSION:
        raise BetonError(
            f"{path} is no .beton file of format version {fmt.FORMAT_VERSION} (it says {version}):"
            f" {REMEDY}"
        )
    if int(header["alloc_table_ptr"]) == 0:
        raise BetonError(f"{path} is unfinished: its writer was stopped before the end; {REMEDY}")
    if page_size < fmt.MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise _damaged(path, f"page size {page_size} is no power of two from 2 MiB up")
    return header, _read_fields(path, data, int(header["num_fields"]))


def _read_fields(path: Path, data: np.ndarray, num_fields: int) -> Fields:
    end = fmt.HEADER.itemsize + num_fields * fmt.FIELD.itemsize
    if not 1 <= num_fields <= MAX_FIELDS or end > len(data):
        raise _damaged(path, f"{num_fields} fields in a file of {len(data)} bytes")
    try:
        return read_fields(data[fmt.HEADER.itemsize : end].view(fmt.FIELD))
    except FieldError as error:
        raise BetonError(
            f"{path} {error}; write it again with one image and one label per sample, as"
            " write_dataset.py does"
        ) from error


def _read_samples(path: Path, data: np.ndarray, header: np.void, fields: Fields) -> np.ndarray:
    count = int(header["num_samples"])
    start = fmt.HEADER.itemsize + int(header["num_fields"]) * fmt.FIELD.itemsize
    end = start + count * fields.dtype.itemsize
    if count == 0:
        raise BetonError(f"{path} holds no samples: {REMEDY}")
    if end > int(header["alloc_table_ptr"]):
        raise _damaged(path, f"{count:,} samples do not fit before the allocation table")
    if end > len(data):
        raise BetonError(
            f"{path} is truncated: the metadata ends at byte {end:,} of {len(data):,}; {REMEDY}"
        )
    return np.array(data[start:end]).view(fields.dtype)


def _read_allocations(path: Path, data: np.ndarray, header: np.void, fields: Fields) -> np.ndarray:
    count, start = int(header["num_samples"]) * fields.allocations, int(header["alloc_table_ptr"])
    expected = start + count * fmt.ALLOCATION.itemsize
    if len(data) < expected:
        raise BetonError(
            f"{path} is truncated: it has {len(data):,} bytes instead of {expected:,}; {REMEDY}"
        )
    if len(data) > expected:
        raise _damaged(
            path, f"{len(data) - expected:,} bytes follow the allocation table of {count:,} rows"
        )
    return np.array(data[start:]).view(fmt.ALLOCATION)


def _check_samples(
    path: Path, header: np.void, images: np.ndarray, samples: np.ndarray, allocations: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Offset and size of every image (int64 [n]), checked against everything else."""
    count, end = len(samples), int(header["alloc_table_ptr"])
    if len(allocations) > count:
        allocations = _of_images(allocations, images["data_ptr"])
    ids = allocations["sample_id"]
    seen = np.zeros(count, bool)
    seen[ids[ids < count]] = True
    if not seen.all():
        raise _damaged(path, f"the allocation table lacks sample {int(np.argmin(seen))}")
    offsets, sizes = np.empty(count, np.uint64), np.empty(count, np.uint64)
    offsets[ids], sizes[ids] = allocations["ptr"], allocations["size"]
    start = end_of_metadata(header, samples)
    page_size = np.uint64(header["page_size"])
    # Sizes are compared first: after that no sum below can overflow.
    _refuse(path, (sizes == 0) | (sizes > page_size), "has an impossible size")
    _refuse(path, (offsets < start) | (offsets > end), "points outside the data pages")
    _refuse(path, offsets + sizes > end, "reaches beyond the data pages")
    last = offsets + sizes - np.uint64(1)
    _refuse(path, offsets // page_size != last // page_size, "does not lie inside one page")
    _check_images(path, images, offsets, sizes)
    order = np.argsort(offsets, kind="stable")
    overlaps = np.zeros(count, bool)
    overlaps[order[1:]] = last[order[:-1]] >= offsets[order[1:]]
    _refuse(path, overlaps, "overlaps another one")
    return offsets.astype(np.int64), sizes.astype(np.int64)


def _of_images(allocations: np.ndarray, pointers: np.ndarray) -> np.ndarray:
    """The rows of the images: those of other fields point elsewhere, or are empty."""
    ids = allocations["sample_id"]
    known = (ids < len(pointers)) & (allocations["size"] > 0)
    known[known] = pointers[ids[known]] == allocations["ptr"][known]
    return allocations[known]


def _check_labels(path: Path, labels: np.ndarray) -> None:
    _refuse(path, labels < 0, "has a negative label")
    if labels.max() >= fmt.MAX_CLASSES:
        raise BetonError(fmt.too_many_classes(path, f"the label {labels.max()}"))


def end_of_metadata(header: np.void, samples: np.ndarray) -> int:
    """First byte after the metadata table."""
    fields = int(header["num_fields"]) * fmt.FIELD.itemsize
    return fmt.HEADER.itemsize + fields + samples.nbytes


def _check_images(path: Path, images: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> None:
    heights, widths = images["height"].astype(np.uint64), images["width"].astype(np.uint64)
    _refuse(path, images["mode"] > fmt.MODE_RAW, "is neither JPEG nor raw")
    _refuse(path, (heights == 0) | (widths == 0), "has no pixels")
    _refuse(path, images["data_ptr"] != offsets, "lies elsewhere than the allocation table says")
    wrong = (images["mode"] == fmt.MODE_RAW) & (sizes != 3 * heights * widths)
    _refuse(path, wrong, "is raw and has not 3 x height x width bytes")


def _refuse(path: Path, is_bad: np.ndarray, what: str) -> None:
    if is_bad.any():
        raise _damaged(path, f"sample {int(np.argmax(is_bad))} {what}")


def _read_stamp(path: Path, data: np.ndarray, file: BetonFile) -> tuple[dict | None, dict]:
    """The stamp, and what the header says of the classes, {} where it says nothing."""
    try:
        stamp = read_stamp(data, file.data_end)
        about = stamp or read_class_note(data) or {}
    except StampError as error:
        raise _damaged(path, str(error)) from error
    if about and not file.labels.max() < about["num_classes"] <= fmt.MAX_CLASSES:
        what = f"{about['num_classes']} classes and the label {file.labels.max()}"
        raise _damaged(path, f"its header has {what}")
    return stamp, about


def _read_sidecar(path: Path, file: BetonFile, about: dict) -> dict:
    """The summary beside the file, {} without one; refused unless it describes this file.

    Args: about: what the header says of the classes.
    """
    sidecar = sidecar_path(path)
    try:
        summary = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise BetonError(f"{sidecar} cannot be read ({error}): {REMEDY}") from error
    expected = {"num_samples": file.num_samples, "labels_crc32": zlib.crc32(file.labels.tobytes())}
    if not isinstance(summary, dict) or any(summary.get(k) != v for k, v in expected.items()):
        raise BetonError(
            f"{sidecar} describes another file than {path}: keep each pair together, or {REMEDY}"
        )
    classes, names = summary.get("classes"), summary.get("class_names")
    if not isinstance(classes, list) or len(classes) <= int(file.labels.max()):
        raise BetonError(f"{sidecar} names fewer classes than {path} has labels: {REMEDY}")
    if len(classes) > fmt.MAX_CLASSES:
        raise BetonError(fmt.too_many_classes(sidecar, f"{len(classes):,} classes"))
    if fault := _fault_of_names(classes, names):
        raise BetonError(f"{sidecar} {fault}: {REMEDY}")
    digests = {"classes_sha256": class_digest(classes), "names_sha256": class_digest(names or [])}
    if any(about.get(key, digest) != digest for key, digest in digests.items()):
        raise BetonError(
            f"{sidecar} names other classes than {path} was written with: keep each pair together,"
            f" or {REMEDY}"
        )
    return summary


def _fault_of_names(classes: list, names) -> str | None:
    """What is wrong with a list of classes and their readable names, or None."""
    if names is not None and (not isinstance(names, list) or len(names) != len(classes)):
        return "has not one readable name for each class"
    if wrong := [name for name in [*classes, *(names or [])] if not isinstance(name, str)]:
        return f"names a class {wrong[0]!r:.80}, which is not text"
    twice = next((name for name, count in Counter(classes).items() if count > 1), None)
    return None if twice is None else f"names the class {twice!r:.80} twice"


def _read_block_sums(path: Path, file: BetonFile) -> np.ndarray | None:
    text = file.sidecar.get("blocks_crc32")
    if file.stamp is None or text is None:
        return None
    try:
        sums = table_from_text(text)
        if zlib.crc32(sums.tobytes()) == file.stamp["blocks_crc32"]:
            return sums
    except (TypeError, ValueError):
        pass
    raise BetonError(
        f"{sidecar_path(path)} has other checksums than {path} was written with: keep each pair"
        f" together, or {REMEDY}"
    )
