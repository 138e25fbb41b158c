"""Data files with real tables and hardly an image: what grows with the number of samples."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.checksums import BlockChecksums, write_tables

PAGE = 8 << 20
ABOUT = {
    "written_by": "made up",
    "num_classes": 1000,
    "classes_sha256": "0" * 64,
    "settings": {},
    "order_crc32": 0,
    "shard": [0, 1],
}


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
