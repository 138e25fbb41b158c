"""The final name of a data file: one writer at a time, nothing replaced unasked, no litter.

train.beton                 only ever a complete file
train.beton.json            its summary
train.beton.lock            process id and host of the writer at work
train.beton.partial-<pid>   the growing file of that process, and its .json
"""

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fast_imagenet.beton.reader import sidecar_path


def find_target_problem(path: Path, overwrite: bool) -> str | None:
    """Why `path` cannot be written, as one sentence with the fix, or None."""
    for name in (path, sidecar_path(path)):
        if name.is_dir():
            return f"{name} is a folder where a file must go: remove it or choose another folder"
    if os.path.lexists(path) and not overwrite:
        return f"{path} exists: choose another folder or allow it to be replaced"
    holder = _live_holder(_lock_path(path))
    if holder:
        return (
            f"{path} is being written by {holder}: wait for it, or if no such process writes it,"
            f" remove {_lock_path(path)}"
        )
    return None


@contextmanager
def claim(path: Path, overwrite: bool) -> Iterator[list[Path]]:
    """Hold the lock file of `path`; gives the files of dead writers that were removed.

    Raises:
        FileExistsError: `path` exists and `overwrite` is off, it is a folder, or another process
            is writing it.
        OSError: the folder cannot be written.
    """
    lock, mine = _lock_path(path), f"{os.getpid()} {socket.gethostname()}\n"
    with _folder_held(path.parent):
        problem = find_target_problem(path, overwrite)
        if problem:
            raise FileExistsError(problem)
        lock.unlink(missing_ok=True)  # of a dead writer
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(mine)
        removed = _remove_leftovers(path)
    try:
        yield removed
    finally:
        if _read_lock(lock) == mine:
            lock.unlink(missing_ok=True)


def publish(partial: Path, path: Path, overwrite: bool) -> None:
    """Give a complete file and the summary beside it their final names.

    With `overwrite` at no moment an old summary stands beside a new file. Without it the file gets
    its name by a hard link, which fails if anybody else has taken the name meanwhile.

    Raises:
        FileExistsError: `path` has appeared and `overwrite` is off; it stays as it is.
    """
    partial_sidecar, sidecar = sidecar_path(partial), sidecar_path(path)
    if overwrite:
        sidecar.unlink(missing_ok=True)
        os.replace(partial, path)
    else:
        _name_without_replacing(partial, path)
    os.replace(partial_sidecar, sidecar)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _name_without_replacing(partial: Path, path: Path) -> None:
    appeared = f"{path} has appeared during the conversion and was kept: choose another folder"
    try:
        os.link(partial, path)
    except FileExistsError as error:
        raise FileExistsError(appeared) from error
    except OSError:  # a file system without hard links, such as exFAT: look, then rename
        if os.path.lexists(path):
            raise FileExistsError(appeared) from None
        os.rename(partial, path)


# ------------------------------------------------------------------------------------------------
# Locks and leftovers
# ------------------------------------------------------------------------------------------------


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextmanager
def _folder_held(folder: Path) -> Iterator[None]:
    """Keep other writers out of `folder` for a moment, so that only one takes over an old lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot; O_EXCL still holds there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_lock(lock: Path) -> str | None:
    try:
        return lock.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _live_holder(lock: Path) -> str | None:
    """Who holds a lock file, in words; None when there is none or its process is gone.

    A lock of this very process id is an old one: in a restarted container the ids repeat.
    """
    text = _read_lock(lock)
    if not text:  # none, or a writer that was killed before it had filled the file
        return None
    pid, _, host = text.strip().partition(" ")
    if not pid.isdecimal():
        return "an unknown process"
    here = host == socket.gethostname()
    if here and not _is_other_process(int(pid)):
        return None
    return f"process {pid}" if here else f"process {pid} on the machine {host!r}"


def _is_other_process(pid: int) -> bool:
    """Whether `pid` is a living process other than this one; a zombie is none."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:  # hidden from other users
        return True
    return status.rpartition(")")[2].split()[0] != "Z"


def _remove_leftovers(path: Path) -> list[Path]:
    """Remove and list what killed writers of `path` have left beside it."""
    pattern = re.compile(re.escape(path.name) + r"\.partial-(\d+)(\.json)?")
    removed = []
    for file in sorted(path.parent.iterdir()):
        found = pattern.fullmatch(file.name)
        if found and not _is_other_process(int(found[1])):
            file.unlink()
            removed.append(file)
    return removed
