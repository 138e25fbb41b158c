"""Images for the benchmarks, and files of them in FFCV's format; the tests use the writer too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from ffcv.fields import IntField, RGBImageField, rgb_image
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter
from PIL import Image

from fast_imagenet.beton.jpeg import encode_jpeg

QUALITY = 90
ENDINGS = {".jpeg", ".jpg", ".png"}


class Samples:
    """What FFCV's writer reads: (image, index)."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], index


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
    page_size: int = 8 << 20,
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
        writer.from_indexed_dataset(Samples(images), chunksize=chunksize, shuffle_indices=False)
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
