"""Kaggle's "ImageNet Object Localization Challenge": an image folder whose flat val/ has a CSV.

ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG
ILSVRC/Data/CLS-LOC/val/*.JPEG      or sorted into folders of classes
LOC_val_solution.csv                see labels.py
LOC_synset_mapping.txt              wnid and name of every class
"""

from pathlib import Path
from typing import Any

from fast_imagenet.sources.image_folder import FileSource, open_image_folder
from fast_imagenet.sources.recognize import KAGGLE_PLACES, missing


def open_kaggle(path: Path, split: str, **options: Any) -> FileSource:
    """One split of Kaggle's layout; `path` holds ILSVRC/, or is that folder or one in it.

    Raises:
        SourceError: a folder or the CSV is missing, or they do not fit together.
    """
    roots = [path / place for place in (*KAGGLE_PLACES, ".")]
    root = next((root for root in roots if (root / split).is_dir()), None)
    if root is None:
        raise missing(path, split, "kaggle", f"{KAGGLE_PLACES[0]}/{split}")
    source = open_image_folder(root, split, **options)
    source.kind = "kaggle"
    return source
