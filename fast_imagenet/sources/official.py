"""Whether an archive is the official one of ILSVRC2012: by its size always, by its md5 on request.

The size costs nothing. The md5 of the devkit, which has the labels, takes a moment; those of the
images take reading 7 and 148 GB.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fast_imagenet.sources.base import SourceError
from fast_imagenet.terminal import announce

MD5_CHOICES = ("devkit", "all", "none")


class Official(NamedTuple):
    """What is known of an archive; size in bytes, None where it is not known."""

    md5: str
    size: int | None


# md5: torchvision.datasets.imagenet.ARCHIVE_META; sizes: as the server reports them
OFFICIAL = {
    "ILSVRC2012_img_train.tar": Official("1d675b47d978889d74fa0da5fadfb00e", 147_897_477_120),
    "ILSVRC2012_img_val.tar": Official("29b22e2961454d5413ddabcf34fc5622", 6_744_924_160),
    "ILSVRC2012_devkit_t12.tar.gz": Official("fa75699e90414af021442c21a62c3abf", None),
}


def check_official(path: Path, md5: str) -> str:
    """Compare an archive with the official one of its name; returns a sentence for the summary.

    Args:
        path: the archive.
        md5: one of MD5_CHOICES: compute the md5 of the devkit, of all archives, or of none.

    Raises:
        SourceError: with 'all', an archive that is not the official one.
    """
    known, size = OFFICIAL[path.name], path.stat().st_size
    advice = "fetch it again, or accept it with --source.md5=devkit"
    if known.size not in (None, size):
        what = f"{path.name} has {size:,} bytes, the official archive {known.size:,}"
        if md5 == "all":
            raise SourceError(f"{path.parent}/{what}: {advice}")
        return f"{what}: it is another one"
    if md5 == "none" or (md5 == "devkit" and known.size is not None):
        of_size = "has the official size; its" if known.size else "was accepted, its"
        return f"{path.name} {of_size} md5 was not compared (--source.md5=all does)"
    found = md5_of(path)
    if found == known.md5:
        return f"{path.name} is the official archive, md5 {found}"
    what = f"{path.name} has the md5 {found}, the official archive {known.md5}"
    if md5 == "all":
        raise SourceError(f"{path.parent}/{what}: {advice}")
    return f"{what}: it is another one, or damaged"


def md5_of(path: Path) -> str:
    """The md5 of a file as 32 hexadecimal digits; reported first when it takes minutes."""
    size = path.stat().st_size
    if size > 1e9:
        minutes = size / 0.6e9 / 60  # of the processor alone; a slow disk takes longer
        read = f"{size / 1e9:.0f} GB to read, about {minutes:.1f} minutes or more"
        announce(f"comparing the md5 of {path}: {read}")
    try:
        with open(path, "rb") as file:  # md5 is what the publisher gives; against accidents
            md5 = partial(hashlib.md5, usedforsecurity=False)
            return hashlib.file_digest(file, md5).hexdigest()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}): fetch it again") from error
