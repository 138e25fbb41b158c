"""Files that appear under their final name only when they are complete."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(
    path: str | Path,
    write: Callable[[BinaryIO], object],
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Give `path` a new content at one instant; before it, and on any failure, the old one stays.

    Args:
        path: final name; its folder is made when missing.
        write: called with a binary file, open for writing beside the final name.
        verify: called with the name of the complete temporary file; raises to refuse it.
    Raises:
        OSError: for instance a full disk, with the name; the temporary file is removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name per file: what a killed process left is overwritten by the next save.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    fsync_folder(path.parent)


def write_json(path: str | Path, content: dict) -> None:
    """Write a dict as indented JSON, atomically.

    Raises:
        TypeError, ValueError: a value JSON does not know, NaN and infinity included.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def fsync_folder(folder: Path) -> None:
    """Sync a folder to the disk: without this a rename in it may be lost by a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
