"""Imagenette: ten easy classes of ImageNet, downloaded and checked by torchvision itself."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from fast_imagenet.sources.base import SourceError
from fast_imagenet.sources.image_folder import FileSource, open_image_folder

_FOLDERS = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}


def open_imagenette(path: Path, split: str, download: str = "320px", **_: Any) -> FileSource:
    """One split of Imagenette in the folder `path`, downloaded when it is not there yet.

    Args:
        download: 'full', '320px' or '160px' (length of the shorter side).

    Raises:
        SourceError: it can neither be found nor downloaded.
    """
    folder = path / _FOLDERS[download]
    if not (folder / "train").is_dir() or not (folder / "val").is_dir():
        _download(path, download)
    source = open_image_folder(folder, split)
    source.kind = "imagenette"
    return source


def _download(path: Path, size: str) -> None:
    from torchvision.datasets import Imagenette  # here: it takes seconds to import

    try:
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):  # torchvision prints its progress
            Imagenette(str(path), split="train", size=size, download=True)
    except (OSError, RuntimeError, EOFError) as error:  # URLError is an OSError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"Imagenette is not in {path} and cannot be downloaded ({reason}): connect to the"
            " internet, or unpack it there and use --source.kind=image_folder"
        ) from error
