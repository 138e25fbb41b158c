"""Where images come from: one class for each way in which people keep ImageNet.

`open_source(kind, path, split)` returns a Source: `labels` (int64 [n]), `classes` (in the order of
the labels), `name(i)` for messages and `read(i)` -> the encoded bytes of one image. A Source is
picklable and small, and opens its files on first use, so that many processes can read the same one.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from fast_imagenet.sources.base import Source, SourceError, hold_out
from fast_imagenet.sources.classes import use_classes
from fast_imagenet.sources.recognize import SPLITS, recognize

__all__ = ["KINDS", "ONLY_FOR", "SPLITS", "Source", "SourceError", "hold_out", "open_source"]
__all__ += ["recognize", "use_classes"]

# Each but kaggle is a module with a function open_KIND; imported on use: parquet needs pyarrow,
# imagenette needs torchvision.
KINDS = (
    "image_folder",
    "ilsvrc_tar",
    "kaggle",
    "parquet",
    "webdataset",
    "imagenette",
    "synthetic",
)


# Options that only some kinds have a use for: given to another, they are refused.
ONLY_FOR = {
    "classes": ("parquet", "webdataset"),
    "class_order": ("image_folder", "kaggle", "imagenette"),
}


def open_source(
    kind: str, path: str | Path, split: str, *, seed: int = 0, **options: Any
) -> Source:
    """Open one split of a dataset.

    Args:
        kind: one of KINDS.
        path: folder that holds the data; unused for 'synthetic'.
        split: 'train' or 'val'.
        seed: seed of the images ('synthetic' only).
        options: settings of one kind; a kind ignores those of others, so that a caller may pass
            the same ones for all. `classes`: file of class names, one per line (parquet,
            webdataset). `class_order`: 'text' or 'numeric' (folders of classes). `download`:
            'full', '320px' or '160px' (imagenette). `size`: number of images (synthetic). `md5`:
            'devkit', 'all' or 'none' (ilsvrc_tar).

    Raises:
        SourceError: the path does not hold such data; the message is one sentence that names what
            is wrong and the fix.
    """
    if kind not in KINDS:
        raise SourceError(f"source kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise SourceError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    for name, kinds in ONLY_FOR.items():
        if kind not in kinds and options.get(name, "text") not in ("", "text"):
            raise SourceError(
                f"--source.{name}={options[name]} is for {', '.join(kinds)}, and this is {kind}:"
                " leave it out"
            )
    reader = "image_folder" if kind == "kaggle" else kind
    module = import_module(f"fast_imagenet.sources.{reader}")
    source = getattr(module, f"open_{reader}")(Path(path), split, seed=seed, **options)
    source.kind = kind
    return source
