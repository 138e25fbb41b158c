"""Where images come from: one class for each way in which people keep ImageNet.

`open_source(kind, path, split)` returns a Source: `labels` (int64 [n]), `classes` (in the order of
the labels), `name(i)` for messages and `read(i)` -> the encoded bytes of one image. A Source is
picklable and small, and opens its files on first use, so that many processes can read the same one.
"""

from importlib import import_module
from pathlib import Path

from fast_imagenet.sources.base import Source, SourceError, set_aside, use_classes

__all__ = ["KINDS", "SPLITS", "Source", "SourceError", "open_source", "set_aside", "use_classes"]

SPLITS = ("train", "val")

# kind -> (module, function); imported on use: parquet needs pyarrow, imagenette needs torchvision.
_OPENERS = {
    "image_folder": ("image_folder", "open_image_folder"),
    "ilsvrc_tar": ("ilsvrc_tar", "open_ilsvrc_tar"),
    "kaggle": ("kaggle", "open_kaggle"),
    "parquet": ("parquet", "open_parquet"),
    "webdataset": ("webdataset", "open_webdataset"),
    "imagenette": ("imagenette", "open_imagenette"),
    "synthetic": ("synthetic", "open_synthetic"),
}
KINDS = tuple(_OPENERS)


def open_source(kind: str, path: str | Path, split: str, *, seed: int = 0, **options) -> Source:
    """Open one split of a data set.

    Args:
        kind: one of KINDS.
        path: folder that holds the data; unused for 'synthetic'.
        split: 'train' or 'val'.
        seed: seed of drawn images ('synthetic' only).
        options: settings of one kind; a kind ignores those of others, so that a caller may pass
            the same ones for all. `classes`: file of class names, one a line (parquet, webdataset).
            `download`: 'full', '320px' or '160px' (imagenette). `size`: images to draw
            (synthetic). `md5`: 'devkit', 'all' or 'none' (ilsvrc_tar).

    Raises:
        SourceError: the path does not hold such data; the message is one sentence that names what
            is wrong and the fix.
    """
    if kind not in _OPENERS:
        raise SourceError(f"source kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise SourceError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    module, function = _OPENERS[kind]
    opener = getattr(import_module(f"fast_imagenet.sources.{module}"), function)
    return opener(Path(path), split, seed=seed, **options)
