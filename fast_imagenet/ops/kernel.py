"""`kernel`: numba's njit, cached on disk, compiled again when any file it is made of changes.

numba looks only at the file a function stands in: after an edit to histogram.py it would keep using
the old histograms that are compiled into policy.py's kernels, silently. Here the stamp of a cached
kernel covers its file and every file of this package that this one imports, directly or not.
"""

import ast
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..kernel_cache import cached_njit

_PACKAGE = Path(__file__).resolve().parent.parent


def _imported(file: Path) -> set[Path]:
    """Files that `file` names in its imports, as far as they are relative or of this package."""
    files = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if not isinstance(node, ast.ImportFrom):
            continue
        folder = file.parents[node.level - 1] if node.level else _PACKAGE.parent
        module = folder.joinpath(*(node.module or "").split("."))
        files.update([module.with_suffix(".py"), *(module / f"{n.name}.py" for n in node.names)])
    return {file for file in files if file.is_file()}


@functools.cache
def source_stamp(file: Path) -> tuple:
    """(path from the package, modification time in ns, size) of all that `file` is made of."""
    found: set[Path] = set()
    waiting = {file}
    while waiting:
        found |= waiting
        waiting = set().union(*map(_imported, waiting)) - found
    stats = [(os.path.relpath(path, _PACKAGE), path.stat()) for path in sorted(found)]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def kernel(function: Callable | None = None, **options: Any) -> Any:
    """Decorator: cached_njit(nogil=True, **options). Use with or without arguments."""
    if function is None:
        return lambda function: kernel(function, **options)
    dispatcher = cached_njit(nogil=True, **options)(function)
    # No public way to say this; without the attribute numba's own, narrower stamp stays.
    cache_file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(cache_file, "_source_stamp"):
        cache_file._source_stamp = source_stamp(Path(inspect.getfile(function)).resolve())
    return dispatcher


def is_compiled(dispatcher: Any) -> bool:
    """Whether a kernel's machine code lies in the cache; True where that is unknown."""
    try:
        return bool(dispatcher.signatures or dispatcher._cache._cache_file._load_index())
    except Exception:
        return True
