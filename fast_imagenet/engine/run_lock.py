"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def lock_folder(folder: str | Path, enabled: bool = True) -> Iterator[None]:
    """Keep other runs out of `folder` meanwhile; a killed process keeps nobody out.

    The folder itself is locked: nothing is left in it, and it is removed if it was made for this
    and is empty, as are those above it. Where a file system cannot do that, nobody is kept out.

    Raises:
        ValueError: another process holds it; nothing was touched.
    """
    if not enabled:
        yield
        return
    new = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"{folder} is in use by another process; wait for it, stop it or choose another "
            f"logging.folder"
        ) from None
    except OSError:  # NFS locks only files open for writing
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            for path in new:
                path.rmdir()
        os.close(descriptor)
