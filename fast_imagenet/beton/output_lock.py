"""The final name of a data file: one writer at a time, nothing replaced unasked, nothing left over.

train.beton                 only ever a complete file
train.beton.json            its summary
train.beton.lock            process id and host of the writer at work, touched every few seconds
train.beton.partial-<pid>   the growing file of that process, and its .json
"""

import errno
import fcntl
import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fast_imagenet.beton.reader import sidecar_path
from fast_imagenet.files import fsync_folder

BEAT_SECONDS = 10  # between two touches of a lock
DEAD_SECONDS = 120  # a lock of another machine that was not touched for so long is a dead writer's


def find_folder_problem(folder: Path) -> str | None:
    """Why files cannot be written into `folder`, which is made when missing; or None."""
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        return f"{place} is not a folder, so {folder} cannot be used"
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place} cannot be written ({error.strerror or error})"


def find_output_problem(path: Path, overwrite: bool) -> str | None:
    """Why `path` cannot be written, as one sentence with the fix, or None."""
    for name in (path, sidecar_path(path)):
        if name.is_dir():
            return f"{name} is a folder where a file must go: remove it or choose another folder"
    if os.path.lexists(path) and not overwrite:
        return f"{path} exists: choose another folder or allow it to be replaced"
    lock = _lock_path(path)
    if holder := _live_holder(lock):
        what = f"{path} is being written by {holder}"
        return f"{what}: wait for it, or if no such process writes it, remove {lock}"
    return None


@contextmanager
def output_file(path: Path, overwrite: bool, fix: str) -> Iterator[tuple[Path, list[Path]]]:
    """Write a file under the lock of its name, which it gets when the block ends without an error.

    Args:
        path: the final name; its folder is made when missing.
        overwrite: whether an existing file is replaced.
        fix: what to do about a full disk, besides freeing some space.

    Yields:
        The name to write to, which is gone afterwards whatever happens; its summary goes beside
        it. And the files of dead writers that were removed.

    Raises:
        FileExistsError: see `lock_output`; or `path` has appeared meanwhile, or the lock was lost.
        OSError: the folder cannot be written; a full disk, with the bytes written until then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_output(path, overwrite) as removed:
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            yield partial, removed
            _check_held(path)
            publish(partial, path, overwrite)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            # blocks, not the length: the file begins with a hole
            written = partial.stat().st_blocks * 512 if partial.exists() else 0
            raise OSError(
                f"{path}: {error.strerror} after {written / 1e6:,.1f} MB (the unfinished file was"
                f" removed): free some space, {fix}"
            ) from error
        finally:
            for leftover in (partial, sidecar_path(partial)):
                leftover.unlink(missing_ok=True)


@contextmanager
def lock_output(path: Path, overwrite: bool) -> Iterator[list[Path]]:
    """Hold the lock file of `path`; yields the files of dead writers that were removed.

    Raises:
        FileExistsError: see `find_output_problem`.
    """
    with _folder_held(path.parent):
        if problem := find_output_problem(path, overwrite):
            raise FileExistsError(problem)
        lock, mine = _lock_path(path), _my_name()
        lock.unlink(missing_ok=True)  # of a dead writer
        with open(lock, "x", encoding="utf-8") as file:
            file.write(mine)
        removed = _remove_leftovers(path)
    end = threading.Event()
    toucher = threading.Thread(target=_touch, args=(lock, end), daemon=True)
    toucher.start()
    try:
        yield removed
    finally:
        end.set()
        toucher.join(timeout=5)  # no longer where the folder's disk does not answer
        if _read_lock(lock) == mine:
            lock.unlink(missing_ok=True)


def _check_held(path: Path) -> None:
    """Refuse to publish where another process has taken the lock, say while this one was frozen."""
    if _read_lock(_lock_path(path)) != _my_name():
        raise FileExistsError(
            f"{path} was taken over by another process, as this one had stood still for"
            f" {DEAD_SECONDS} s or its lock was removed: leave it to that process"
        )


def publish(partial: Path, path: Path, overwrite: bool) -> None:
    """Give a complete file and the summary beside it their final names.

    With `overwrite` at no moment an old summary stands beside a new file. Without it the file gets
    its name by a hard link, which fails if anybody else has taken the name meanwhile.

    Raises:
        FileExistsError: `path` has appeared and `overwrite` is off; it stays as it is.
    """
    if overwrite:
        sidecar_path(path).unlink(missing_ok=True)
        os.replace(partial, path)
    else:
        _name_without_replacing(partial, path)
    os.replace(sidecar_path(partial), sidecar_path(path))
    fsync_folder(path.parent)


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


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextmanager
def _folder_held(folder: Path) -> Iterator[None]:
    """Keep other writers out of `folder` for a moment, so that only one takes over an old lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot; creating a lock is exclusive
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _my_name() -> str:
    return f"{os.getpid()} {socket.gethostname()}\n"


def _touch(lock: Path, end: threading.Event) -> None:
    """Show other machines that this process lives, until `end` is set."""
    while not end.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(lock)


def _is_untouched(lock: Path) -> bool:
    """Whether `lock` is older than DEAD_SECONDS, by the clock of its own file system."""
    try:
        with tempfile.TemporaryFile(dir=lock.parent) as now, open(lock, "rb") as file:
            age = os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime
    except OSError:
        return False
    return age > DEAD_SECONDS


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
    if host == socket.gethostname() and pid.isdecimal():
        return f"process {pid} on {host}" if is_other_process(int(pid)) else None
    if _is_untouched(lock):
        return None
    return f"process {pid} on the machine {host!r}" if pid.isdecimal() else "an unknown process"


def is_other_process(pid: int) -> bool:
    """Whether `pid` is a living process other than this one; a zombie does not live."""
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
        if found and not is_other_process(int(found[1])):
            file.unlink()
            removed.append(file)
    return removed
