"""Imagenette: ten easy classes of ImageNet, downloaded and checked by torchvision itself."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from fast_imagenet.sources.base import SourceError
from fast_imagenet.sources.image_folder import FileSource, open_image_folder
from fast_imagenet.sources.official import md5_of
from fast_imagenet.sources.recognize import IMAGENETTE

_MD5 = {  # of the published archives, as in torchvision.datasets.Imagenette
    "full": "fe2fc210e6bb7c5664d602c3cd71e612",
    "320px": "3df6f0d01a2c9592104656642f5e78a3",
    "160px": "e793b78cc4c9e9a4ccc0c1155377a412",
}


def open_imagenette(path: Path, split: str, download: str = "320px", **options: Any) -> FileSource:
    """One split of Imagenette in the folder `path`, downloaded when it is not there yet.

    Args:
        download: 'full', '320px' or '160px' (length of the shorter side).

    Raises:
        SourceError: it can neither be found nor downloaded, or there is another archive.
    """
    archive = path / next(name for name, size in IMAGENETTE.items() if size == download)
    folder = archive.with_suffix("")
    if not (folder / "train").is_dir() or not (folder / "val").is_dir():
        if archive.exists() and (found := md5_of(archive)) != _MD5[download]:
            raise SourceError(
                f"{archive} has the md5 {found}, the published archive {_MD5[download]}: remove it"
                f" to download that, or unpack it and read it with --source.path={folder}"
            )
        _download(path, download)
    return open_image_folder(folder, split, **options)


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
