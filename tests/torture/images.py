"""Damaged and hostile JPEGs: read as libturbojpeg reads them, never a stray access."""

import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import fuzz
from tests.damaged_images import damaged_images
from tests.torture.common import ROOT

KEPT = ROOT / "runs" / "torture_images"  # files that break a promise


def damaged(count: int, seed: int = 0) -> dict:
    """`count` files, divided among the paths for which the library is compiled; two at a time.

    Raises: FileNotFoundError: the compiler has no sanitizers.
    """
    paths = fuzz.paths()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        if not fuzz.has_sanitizers(Path(name)):
            raise FileNotFoundError("cc with -fsanitize=address,undefined is missing: install gcc")
        begin = time.monotonic()
        parts = pool.map(lambda path: _fuzz(Path(name), path, count // len(paths), seed), paths)
        counts, crashes = Counter(), []
        for found, crash in parts:
            counts.update(found)
            crashes += crash
    return {
        **counts,
        "crashes": crashes,
        "paths": list(paths),
        "seconds": round(time.monotonic() - begin, 1),
    }


def _fuzz(folder: Path, path: str, count: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Counts of one path, and why the fuzzer has ended, if it did."""
    kept = KEPT / path
    kept.mkdir(parents=True, exist_ok=True)
    (folder / path).mkdir()
    program = fuzz.compile_fuzzer(folder / path, fuzz.paths()[path])
    try:
        seed += list(fuzz.paths()).index(path)
        return fuzz.fuzz(program, damaged_images(count, seed), kept), []
    except RuntimeError as error:
        return {}, [f"{path}: {error}"]
