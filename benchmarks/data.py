"""Images for the benchmarks, and files of them in FFCV's format; the tests use the writer too."""

import contextlib
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, RGBImageField, rgb_image
from ffcv.writer import DatasetWriter

from fast_imagenet.beton.jpeg import encode_jpeg

QUALITY = 90
ENDINGS = {".jpeg", ".jpg", ".png"}


class Pictures:
    """What FFCV's writer reads: (image, index)."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index


def read_images(folder: str, limit: int, max_side: int) -> list[np.ndarray]:
    """uint8 [h, w, 3] images of a folder, resized as FFCV's writer does it.

    Args: folder: searched recursively. limit: most images, taken evenly from the sorted names.
        max_side: pixels; smaller images stay as they are.
    Raises: SystemExit when there is no image.
    """
    from PIL import Image

    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in ENDINGS]
    if not paths:
        raise SystemExit(f"--images {folder}: no .jpeg, .jpg or .png below it; name another folder")
    step = max(1, len(paths) // limit)
    chosen = paths[::step][:limit]
    return [
        rgb_image.resizer(np.asarray(Image.open(path).convert("RGB")), max_side) for path in chosen
    ]


def write_file(path, images, *, mode="jpg", markers=False, workers=1, **options) -> str:
    """A file by FFCV's own writer, in the order given; labels are indices. Returns the path.

    Args: images: uint8 [h, w, 3] each. mode: FFCV's write_mode. markers: JPEGs come from our
        encoder, with restart markers. options: of RGBImageField, and page_size, chunksize.
    """
    page_size, chunksize = options.pop("page_size", 8 << 20), options.pop("chunksize", 100)
    fields = {"image": RGBImageField(write_mode=mode, **options), "label": IntField()}
    with _encoder(_encode_with_markers if markers else rgb_image.encode_jpeg):
        writer = DatasetWriter(str(path), fields, num_workers=workers, page_size=page_size)
        writer.from_indexed_dataset(Pictures(images), chunksize=chunksize, shuffle_indices=False)
    return str(path)


def _encode_with_markers(image, quality):
    return np.frombuffer(encode_jpeg(image, quality), np.uint8)


@contextlib.contextmanager
def _encoder(encode):
    """FFCV's writer encodes with `encode` meanwhile."""
    stock, rgb_image.encode_jpeg = rgb_image.encode_jpeg, encode
    try:
        yield
    finally:
        rgb_image.encode_jpeg = stock


def sample_bytes(path: str) -> list[bytes]:
    """The encoded images of a file, in order."""
    from ffcv.reader import Reader

    reader, memory = Reader(path), np.memmap(path, "uint8", mode="r")
    table = reader.alloc_table
    sizes = dict(zip(table["ptr"].tolist(), table["size"].tolist(), strict=True))
    starts = reader.metadata["f0"]["data_ptr"].tolist()
    return [memory[start : start + sizes[start]].tobytes() for start in starts]
