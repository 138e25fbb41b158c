"""Compiles fast_imagenet/native/ into the package; pyproject.toml has everything else.

    pip install .                               or python setup.py build_ext --inplace
    FAST_IMAGENET_PATHS=plain pip install .     without code for vector instructions

One library for each code path, all from the same sources; native/__init__.py chooses between them
when it is imported. They are not Python modules: ctypes opens them.
"""

import os
import platform
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("fast_imagenet/native")
NATIVE = runpy.run_path(str(FOLDER / "sources.py"))
# Rewritten JPEGs must have the same bytes on every processor: no multiply-add in one.
FLAGS = ["-std=gnu11", "-O3", "-g0", "-ffp-contract=off", "-fwrapv"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
AVX2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-mprefer-vector-width=256"]  # for loops that are not written as vectors: docs/LOG.md
VECTORS = {"plain": [], "avx2": AVX2, "avx512": AVX512}  # supported_path() asks for the same


class BuildNative(build_ext):
    """One library after the other, and what to do where the compiler does not know a flag."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = None  # all libraries have the same name of the object file

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except CompileError as error:
            fix = "FAST_IMAGENET_PATHS=plain leaves vector instructions out; GCC then"
            raise CompileError(f"{ext.name}: {error}; {fix} does") from error


def wanted_paths() -> list[str]:
    """The libraries to compile; `plain` is always among them, since it asks the processor."""
    known = list(VECTORS) if platform.machine() in ("x86_64", "AMD64") else ["plain"]
    wanted = (os.environ.get("FAST_IMAGENET_PATHS") or ",".join(known)).split(",")
    if "plain" not in wanted or not set(wanted) <= set(known):
        raise SystemExit(
            f"FAST_IMAGENET_PATHS is {','.join(wanted)!r}: give plain, alone or with more of"
            f" {','.join(known)}, or unset it"
        )
    return wanted


def extension(path: str) -> Extension:
    """The library of one code path."""
    return Extension(
        f"fast_imagenet.native._{path}",
        [str(FOLDER / "library.c")],
        depends=["setup.py", *map(str, NATIVE["sources"](FOLDER))],
        define_macros=[("NATIVE_FINGERPRINT", f'"{NATIVE["fingerprint"](FOLDER)}"')],
        extra_compile_args=[*FLAGS, *VECTORS[path]],
    )


if __name__ == "__main__":
    setup(ext_modules=list(map(extension, wanted_paths())), cmdclass={"build_ext": BuildNative})
