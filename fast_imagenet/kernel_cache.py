"""numba's njit with a cache on the disk, where there can be one.

Where numba finds no folder for its cache (a read-only installation and a home without rights), a
private one below the system's temporary folder is taken. Where that fails too, and where a cache
cannot be read or written later, kernels are compiled at every start: a cache never ends a program.
"""

import functools
import os
import pickle
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba

from fast_imagenet.terminal import announce

_PACKAGE = Path(__file__).resolve().parent


def cached_njit(**options: Any) -> Callable:
    """Decorator: njit(cache=True, **options), or without a cache where there can be none."""

    def decorate(function: Callable) -> Any:
        dispatcher = _dispatcher(function, options)
        # No public way to say this; without the attribute a cache that fails ends the program.
        if hasattr(dispatcher._cache, "_guard_against_spurious_io_errors"):
            dispatcher._cache._guard_against_spurious_io_errors = _without_cache
        return dispatcher

    return decorate


def _dispatcher(function: Callable, options: dict[str, Any]) -> Any:
    """numba looks for the folder of a cache in these very calls."""
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    return numba.njit(cache=use_private_cache(), **options)(function)


@functools.cache
def use_private_cache() -> bool:
    """Let numba cache in a private temporary folder from now on, child processes too, and print it.

    Returns: whether there is one.
    """
    try:
        folder = private_folder()
    except OSError as error:
        _note(f"compiled kernels cannot be kept ({error}): every start compiles them, in a minute")
        return False
    _note(
        f"compiled kernels are kept in {folder}, as neither {_PACKAGE} nor a cache folder of the "
        f"user can be written; set NUMBA_CACHE_DIR to a folder that can"
    )
    os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = str(folder)
    return True


def private_folder() -> Path:
    """A folder below the system's temporary one that this user alone can enter; made when missing.

    What is in it will be executed, so a folder that somebody else could have filled is refused.

    Raises: OSError: there is none, and none can be made.
    """
    folder = Path(tempfile.gettempdir(), f"fast_imagenet_kernels_{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone: remove it")
    tempfile.TemporaryFile(dir=folder).close()
    return folder


@contextmanager
def _without_cache() -> Iterator[None]:
    """A cache that cannot be read or written costs time only: the kernel is compiled."""
    try:
        yield
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        _note(f"the cache of compiled kernels failed ({error}): they are compiled anew")


@functools.cache  # each once
def _note(sentence: str) -> None:
    announce(f"note: {sentence}")
