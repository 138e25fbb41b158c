"""Images for the benchmarks, and files of them in FFCV's format; the tests use the writer too."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from ffcv.fields import IntField, RGBImageField, rgb_image
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter
from PIL import Image

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.checksums import BlockChecksums, write_tables
from fast_imagenet.beton.jpeg import encode_jpeg

QUALITY = 90
ENDINGS = {".jpeg", ".jpg", ".png"}
PAGE = 8 << 20
ABOUT = {"written_by": "made up", "num_classes": 1000, "classes_sha256": "0" * 64, "settings": {}}
ABOUT |= {"order_crc32": 0, "shard": [0, 1]}


def image_files(folder: str, limit: int) -> list[Path]:
    """At most `limit` files, taken evenly from the sorted names in all folders below.

    Raises: SystemExit when there is no image.
    """
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in ENDINGS]
    if not paths:
        raise SystemExit(f"--images {folder}: no .jpeg, .jpg or .png below it; name another folder")
    return paths[:: max(1, len(paths) // limit)][:limit]


def read_images(folder: str, limit: int, max_side: int) -> list[np.ndarray]:
    """uint8 [h, w, 3] images of a folder, shrunk to `max_side` pixels as FFCV's writer does it."""
    files = image_files(folder, limit)
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in files]
    return [rgb_image.resizer(image, max_side) for image in arrays]


def write_file(
    path: str | Path,
    images: Sequence[np.ndarray],
    *,
    mode: str = "jpg",
    markers: bool = False,
    workers: int = 1,
    page_size: int = PAGE,
    chunksize: int = 100,
    **options: Any,
) -> str:
    """A file by FFCV's own writer, in the order given; labels are indices. Returns the path.

    Args: images: uint8 [h, w, 3] each. mode: FFCV's write_mode. markers: JPEGs come from our
        encoder, with restart markers. options: of RGBImageField.
    """
    fields = {"image": RGBImageField(write_mode=mode, **options), "label": IntField()}
    encode = _encode_with_markers if markers else rgb_image.encode_jpeg
    with mock.patch.object(rgb_image, "encode_jpeg", encode):
        writer = DatasetWriter(str(path), fields, num_workers=workers, page_size=page_size)
        samples = [(image, index) for index, image in enumerate(images)]
        writer.from_indexed_dataset(samples, chunksize=chunksize, shuffle_indices=False)
    return str(path)


def _encode_with_markers(image: np.ndarray, quality: int) -> np.ndarray:
    return np.frombuffer(encode_jpeg(image, quality), np.uint8)


def sample_bytes(path: str) -> list[bytes]:
    """The encoded images of a file, in order."""
    reader, memory = Reader(path), np.memmap(path, "uint8", mode="r")
    table = reader.alloc_table
    sizes = dict(zip(table["ptr"].tolist(), table["size"].tolist(), strict=True))
    starts = reader.metadata["f0"]["data_ptr"].tolist()
    return [memory[start : start + sizes[start]].tobytes() for start in starts]


def write_made_up(
    path: str | Path,
    count: int,
    stored: Mapping[int, bytes] | None = None,
    *,
    size: int = 700,
    height: int = 64,
    width: int = 80,
) -> str:
    """A file of `count` JPEGs of `size` bytes, which are holes except those in `stored`.

    Sparse: on disk it takes 48 bytes per sample. Header and tables have their checksum; pages have
    none, as there is no summary. Returns the path.

    Args: stored: JPEGs of height x width pixels by sample, at most `size` bytes.
    """
    index = np.arange(count, dtype=np.int64)
    samples, allocations = np.zeros(count, fmt.SAMPLE), np.zeros(count, fmt.ALLOCATION)
    start, in_page = fmt.align_up(fmt.METADATA_START + samples.nbytes, PAGE), PAGE // size
    offsets = start + index // in_page * PAGE + index % in_page * size
    images = samples["image"]
    images["height"], images["width"], images["data_ptr"] = height, width, offsets
    samples["label"] = index % ABOUT["num_classes"]
    allocations["sample_id"], allocations["ptr"], allocations["size"] = index, offsets, size
    pages = PAGE, start, fmt.align_up(int(offsets[-1]) + size, PAGE)
    with open(path, "wb") as file:
        for sample, jpeg in (stored or {}).items():
            file.seek(int(offsets[sample]))
            file.write(jpeg)
        write_tables(file, samples, [allocations], pages, BlockChecksums(PAGE), ABOUT)
    return str(path)
