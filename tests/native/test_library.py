"""The C library as compiled by setup.py: which code path is opened, and why none is."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fast_imagenet import native
from tests.conftest import ROOT

NAME = "fast_imagenet.native.NativeLibraryError: "
SHOW = "from fast_imagenet import native; print(native.IN_USE, *native.built())"
# The same bytes from all paths: files that are kept, halved and shrunk, of sizes that end anywhere.
REWRITE = """
import hashlib
from tests.beton.test_jpeg import made_image
from tests.native.test_recode import rewrite
from tests.odd_images import as_jpeg

digest = hashlib.sha256()
for seed, (quality, subsampling) in enumerate(((96, 0), (90, 2), (60, 0))):
    data = as_jpeg(made_image(97, 150, seed), quality=quality, subsampling=subsampling)
    for size_wh in (None, (75, 49), (149, 97)):
        digest.update(rewrite(data, 90, size_wh))
print(digest.hexdigest())
"""


def run(code, folder=ROOT, **environment):
    """A Python process beside the package in `folder`: (exit status, output, last error line)."""
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout.strip(), (done.stderr.splitlines() or [""])[-1]


@pytest.fixture
def copy(tmp_path):
    """The package's own part in another folder, with setup.py and without compiled files."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(native.FOLDER, tmp_path / "fast_imagenet/native", ignore=ignored)
    shutil.copy(ROOT / "fast_imagenet/__init__.py", tmp_path / "fast_imagenet")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(folder, **environment):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def compiled(folder):
    return sorted(path.name.split(".")[0] for path in folder.glob("fast_imagenet/native/*.so"))


def features():
    """What setup.py's flags let the compiler use, for each path."""
    vectors = runpy.run_path(str(ROOT / "setup.py"))["VECTORS"]
    return {
        path: {flag.removeprefix("-m") for flag in flags if "=" not in flag}
        for path, flags in vectors.items()
    }


# ------------------------------------------------------------------------------------------------
# Choice
# ------------------------------------------------------------------------------------------------


def test_the_fastest_path_of_the_processor_is_opened():
    fastest = [path for path in native.built() if path in native.supported()][-1]
    assert run(SHOW, FAST_IMAGENET_NATIVE="") == (0, " ".join([fastest, *native.built()]), "")


def test_paths_agree_with_the_flags_of_the_processor():
    """Asked in another way: what the kernel reports."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    wanted = features() if platform.machine() == "x86_64" else {"plain": set()}
    names = {path: {{"bmi": "bmi1"}.get(x, x) for x in given} for path, given in wanted.items()}
    assert native.supported() == [path for path in names if names[path] <= flags]


def test_the_processor_is_asked_for_all_that_the_flags_allow():
    compiled = features()
    assert list(compiled) == list(native.PATHS)
    text = (native.FOLDER / "library.c").read_text()
    asked = [
        set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', part))
        for part in re.split(r"path = \d;", text)
    ]
    assert asked == [set(), compiled["avx2"], compiled["avx512"] - compiled["avx2"], set()]
    assert compiled["avx2"] < compiled["avx512"]


def test_all_paths_give_the_same_bytes():
    paths = [path for path in native.built() if path in native.supported()]
    found = {path: run(REWRITE, FAST_IMAGENET_NATIVE=path) for path in paths}
    assert {(status, error) for status, _, error in found.values()} == {(0, "")}
    assert len({digest for _, digest, _ in found.values()}) == 1
    assert len(next(iter(found.values()))[1]) == 64
    for path in paths:
        assert run(SHOW, FAST_IMAGENET_NATIVE=path)[1].split()[0] == path


def test_an_unknown_path_is_refused():
    status, _, error = run(SHOW, FAST_IMAGENET_NATIVE="sse4")
    assert status == 1
    assert error.startswith(
        NAME + "FAST_IMAGENET_NATIVE is 'sse4': give one of plain, avx2, avx512, or unset it"
    )


def test_programs_report_it_in_one_sentence(tmp_path):
    code = "import sys, runpy; sys.argv = ['write_dataset.py', '--source.kind=synthetic', "
    code += f"'--write.folder={tmp_path}/out']; runpy.run_path(sys.argv[0], run_name='__main__')"
    status, _, error = run(code, FAST_IMAGENET_NATIVE="sse4")
    assert status == 1 and error.startswith(
        "write_dataset.py: FAST_IMAGENET_NATIVE is 'sse4': give"
    )


OLD_PROCESSOR = """
import ctypes

class OldProcessor(ctypes.CDLL):
    def __init__(self, name):
        super().__init__(name)
        self.supported_path = lambda: 0

ctypes.CDLL = OldProcessor
"""


@pytest.mark.skipif("avx2" not in native.built(), reason="only the plain path is built")
def test_a_path_that_the_processor_does_not_support_is_refused():
    assert run(OLD_PROCESSOR + SHOW, FAST_IMAGENET_NATIVE="")[1].split()[0] == "plain"
    status, _, error = run(OLD_PROCESSOR + SHOW, FAST_IMAGENET_NATIVE="avx2")
    assert (status, error) == (
        1,
        NAME + "FAST_IMAGENET_NATIVE is 'avx2': this processor does not support it,"
        " or unset it to use plain",
    )


def test_a_big_endian_machine_is_refused():
    status, _, error = run("import sys; sys.byteorder = 'big'\n" + SHOW)
    assert status == 1
    assert error.startswith(NAME + "this machine is big-endian")


# ------------------------------------------------------------------------------------------------
# Build
# ------------------------------------------------------------------------------------------------


def test_a_library_that_is_missing_names_the_command(copy):
    status, _, error = run(SHOW, copy)
    assert status == 1
    assert error.startswith(NAME + "the native library is not built (")
    assert "run `make setup`, or `pip install -e .`" in error


@pytest.mark.parametrize(
    ("compiler_flags", "paths"), [("-mno-avx", ""), ("", "plain")], ids=["no AVX", "plain alone"]
)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="has one path alone")
def test_it_is_built_without_avx(copy, compiler_flags, paths):
    done = build(copy, CFLAGS=compiler_flags, FAST_IMAGENET_PATHS=paths)
    assert done.returncode == 0, done.stderr
    assert compiled(copy) == (["_plain"] if paths else ["_avx2", "_avx512", "_plain"])
    assert run(SHOW, copy, FAST_IMAGENET_NATIVE="plain")[1].split()[0] == "plain"
    code = "from fast_imagenet.native import recode; assert recode.read_header(b'no') is None"
    assert run(code, copy, FAST_IMAGENET_NATIVE="plain") == (0, "", "")
    if paths:
        status, _, error = run(SHOW, copy, FAST_IMAGENET_NATIVE="avx2")
        assert status == 1
        assert "'avx2': it is not built, run" in error or "does not support" in error


def test_other_sources_are_noticed_and_built_anew(copy):
    assert build(copy, FAST_IMAGENET_PATHS="plain").returncode == 0
    assert run(SHOW, copy)[:2] == (0, "plain plain")
    with open(copy / "fast_imagenet/native/huffman.h", "a") as header:
        header.write("/* changed */\n")
    status, _, error = run(SHOW, copy)
    assert status == 1
    assert "was compiled from other sources than those beside it: run `make setup`" in error
    assert build(copy, FAST_IMAGENET_PATHS="plain").returncode == 0
    assert run(SHOW, copy)[:2] == (0, "plain plain")


def test_unknown_paths_are_not_built(copy):
    for given in ("sse4", "avx2", "plain,sse4"):  # plain asks the processor, so it is always there
        done = build(copy, FAST_IMAGENET_PATHS=given)
        assert done.returncode == 1
        assert f"FAST_IMAGENET_PATHS is '{given}': give plain, alone or with more of" in done.stderr
    assert compiled(copy) == []


def test_a_compiler_that_fails_says_what_to_do(copy):
    done = build(copy, CFLAGS="-fno-such-flag")
    assert done.returncode == 1
    assert "fast_imagenet.native._plain: " in done.stderr
    assert "FAST_IMAGENET_PATHS=plain leaves vector instructions out" in done.stderr
