"""`kernel`: numba's njit, cached on disk, compiled again when any file of the operations changes.

numba looks only at the file a function stands in: after an edit to resize.py it would go on using
the old resize that is compiled into crop_decode.py's kernels, silently. Here the stamp of a cached
kernel covers every file that kernels are made of.
"""

from pathlib import Path

from numba import njit

_PACKAGE = Path(__file__).resolve().parent


def _source_stamp() -> tuple:
    """(name, modification time in ns, size) of every file whose code ends up in kernels."""
    files = [*sorted(_PACKAGE.glob("*.py")), _PACKAGE.parent / "rng.py"]
    stats = [(file.name, file.stat()) for file in files]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


SOURCE_STAMP = _source_stamp()


def kernel(function=None, **options):
    """Decorator: njit(cache=True, nogil=True, **options). Use with or without arguments."""
    if function is None:
        return lambda function: kernel(function, **options)
    dispatcher = njit(cache=True, nogil=True, **options)(function)
    # No public way to say this; without the attribute numba's own, narrower stamp stays.
    cache_file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(cache_file, "_source_stamp"):
        cache_file._source_stamp = SOURCE_STAMP
    return dispatcher
