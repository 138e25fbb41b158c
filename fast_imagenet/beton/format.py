"""Layout of FFCV's file format, version 2, as numpy dtypes.

    header | one descriptor per field | metadata, one row per sample | gap | data pages |
    allocation table

Data pages begin at multiples of the page size, counted from the start of the file. An image lies
inside one page. The allocation table is everything from `alloc_table_ptr` to the end of the file:
one row per image. All integers are little-endian.

Source: ffcv 1.0.2, ffcv/types.py, ffcv/fields/rgb_image.py and ffcv/memory_allocator.py.
"""

import numpy as np

FORMAT_VERSION = 2
MIN_PAGE_SIZE = 1 << 21
MAX_PAGE_SIZE = 1 << 31  # the largest power of two in the 32 bits that FFCV stores
MAX_SIDE = 65535  # height and width are stored in 16 bits
MAX_CLASSES = 1_000_000  # a larger label is not a class: a name for each would fill the memory

INT_FIELD, IMAGE_FIELD = 1, 2  # type_id of the two fields that we write
MODE_JPG, MODE_RAW = 0, 1
MODE_NAMES = ("jpg", "raw")

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
ARGUMENT_BYTES = 1024
FIELD = np.dtype([("type_id", "u1"), ("name", "u1", (16,)), ("arguments", "u1", (ARGUMENT_BYTES,))])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
ROW_BYTES = SAMPLE.itemsize + ALLOCATION.itemsize  # per sample, besides its image

METADATA_START = HEADER.itemsize + 2 * FIELD.itemsize
REMEDY = "copy it again from its source, or write it again with write_dataset.py"


class FormatError(ValueError):
    """What is wrong with a file, with the fix: a sentence that continues after the file's name."""


def damaged(what: str) -> FormatError:
    """The error for a file whose bytes contradict each other."""
    return FormatError(f"is damaged: {what}; {REMEDY}")


def align_up(position: int, page_size: int) -> int:
    """Smallest multiple of `page_size` that is not below `position` (both in bytes)."""
    return -(-position // page_size) * page_size


def field_descriptors() -> np.ndarray:
    """Descriptors of our two fields, 'image' and 'label': FIELD [2]."""
    fields = np.zeros(2, FIELD)
    for row, name, type_id in zip(
        fields, (b"image", b"label"), (IMAGE_FIELD, INT_FIELD), strict=True
    ):
        row["type_id"] = type_id
        row["name"][: len(name)] = np.frombuffer(name, np.uint8)
    return fields


def too_many_classes(what: str) -> str:
    """The sentence, after a file's name, for `what`: a label or a count beyond MAX_CLASSES."""
    return (
        f"has {what}, and {MAX_CLASSES:,} classes are allowed: labels must count the classes from"
        " 0, write it again with such labels"
    )
