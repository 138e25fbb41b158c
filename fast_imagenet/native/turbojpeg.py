"""Where libturbojpeg is."""

import ctypes
import ctypes.util
import glob
import os
import sys

_LIBRARY_FOLDERS = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")


def _library_candidates() -> list[str]:
    """Paths and names to try, the active environment before the system."""
    prefixes = [os.environ.get("CONDA_PREFIX", ""), sys.prefix]
    folders = [os.path.join(prefix, "lib") for prefix in dict.fromkeys(prefixes) if prefix]
    paths = [
        path
        for folder in (*folders, *_LIBRARY_FOLDERS)
        for path in sorted(glob.glob(os.path.join(folder, "libturbojpeg.so*")), key=len)
    ]
    named = ctypes.util.find_library("turbojpeg")
    return [*paths, *([named] if named else []), "libturbojpeg.so.0"]


def load_turbojpeg() -> ctypes.CDLL:
    """Open libturbojpeg (2.0 or newer; 2.1 is what Debian 12 and Ubuntu 22.04 have).

    Raises: ImportError naming the package to install, when no usable library is found.
    """
    tried = []
    for candidate in _library_candidates():
        try:
            library = ctypes.CDLL(candidate)
            library.tjGetErrorCode  # noqa: B018  absent before 2.0
            return library
        except (OSError, AttributeError) as error:
            tried.append(f"{candidate} ({error})")
    raise ImportError(
        "libturbojpeg 2.0 or newer was not found; install it with "
        "`apt-get install libturbojpeg0-dev` or `conda install -c conda-forge libjpeg-turbo`. "
        "Tried: " + "; ".join(tried)
    )


def addresses() -> list[int]:
    """Of the functions that decode.c calls, in its order."""
    found = load_turbojpeg()
    names = ("InitDecompress", "Destroy", "Decompress2", "GetErrorCode", "DecompressHeader3")
    return [ctypes.cast(getattr(found, f"tj{name}"), ctypes.c_void_p).value or 0 for name in names]
