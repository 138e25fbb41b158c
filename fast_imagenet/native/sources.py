"""Which sources a native library was compiled from; setup.py runs this file by itself."""

import hashlib
from pathlib import Path


def sources(folder: Path) -> list[Path]:
    """The C files of the library in `folder`; none where it came in a wheel."""
    return sorted([*folder.glob("*.c"), *folder.glob("*.h")])


def fingerprint(folder: Path) -> str:
    """A hash of these files, which setup.py compiles into the library."""
    files = [path.name.encode() + b"\0" + path.read_bytes() for path in sources(folder)]
    return hashlib.sha256(b"\0".join(files)).hexdigest()[:16]
