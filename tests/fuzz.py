"""The native library under sanitizers: tests/fuzz_native.c, compiled for a path, fed with files."""

import re
import runpy
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from fast_imagenet import native
from fast_imagenet.native import decoder
from tests.conftest import ROOT

SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# What must hold for every file; each is a count of those for which it does not.
PROMISES = ("accepted", "refused", "other_pixels", "other_size", "neighbor")


def paths() -> dict[str, list[str]]:
    """Each way to compile the library that this processor can run, and its flags."""
    vectors = runpy.run_path(str(ROOT / "setup.py"))["VECTORS"]
    found = {name: vectors[name] for name in native.supported()}
    return found | {"portable": ["-DPORTABLE"]}


def has_sanitizers(folder: Path) -> bool:
    """Whether the C compiler has them: asked with a program of one line."""
    source, program = folder / "empty.c", folder / "empty"
    source.write_text("int main(void) { return 0; }\n")
    if not shutil.which("cc"):
        return False
    made = subprocess.run(["cc", *SANITIZERS, source, "-o", program], capture_output=True)
    return made.returncode == 0 and subprocess.run([program]).returncode == 0


def compile_fuzzer(folder: Path, flags: list[str], sources: Path = native.FOLDER) -> Path:
    """tests/fuzz_native.c for one path. Raises: CalledProcessError: it does not compile."""
    program = folder / "fuzz"
    options = [*runpy.run_path(str(ROOT / "setup.py"))["FLAGS"], "-O1", *SANITIZERS, *flags]
    source = ROOT / "tests" / "fuzz_native.c"
    command = ["cc", *options, "-I", sources, source, "-o", program, "-lm", "-ldl"]
    subprocess.run(command, check=True)
    return program


def turbojpeg_file() -> str:
    """Path of the libturbojpeg that the decoder has opened."""
    assert decoder.REASONS
    return re.findall(r"/.*/libturbojpeg\.so.*", Path("/proc/self/maps").read_text())[0]


def fuzz(program: Path, files: Iterable[bytes], kept: Path) -> dict[str, int]:
    """Feed files to a compiled fuzzer. Returns its counts; files that break a promise go to `kept`.

    Raises: RuntimeError: a sanitizer has ended it.
    """
    command = [program, turbojpeg_file(), kept]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        open(kept / "errors", "w+") as errors,
        subprocess.Popen(command, stderr=errors, **pipes) as run,
    ):
        try:
            for data in files:
                run.stdin.write(len(data).to_bytes(8, "little") + data)
        except BrokenPipeError:
            pass  # it has ended: its status says so
        text = run.communicate()[0].decode()
        errors.seek(0)
        if run.returncode:
            raise RuntimeError(f"fuzzer ended with {run.returncode}: {errors.read()[-3000:]}")
    return {name: int(count) for name, count in map(str.split, text.splitlines())}
