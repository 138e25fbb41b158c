"""What data holds cannot move the cursor, recolour the terminal or fake a line of our own."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fast_imagenet.sources import SourceError, open_source
from fast_imagenet.terminal import announce, on_terminal, readable
from tests.conftest import ROOT

ESCAPES = "\x1b]0;owned\x07\x1b[31m\x9b2J\rfake\u202e\x7f"
RAW = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]|\rfake")  # a bar may begin with \r


def said(*words) -> tuple[int, str]:
    """Status, and stdout with stderr as a terminal would get them."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True)
    text = (done.stdout + done.stderr).decode("utf-8")
    assert not RAW.search(text), ascii(text)
    return done.returncode, text


@pytest.fixture
def folder(tmp_path):
    """Two classes, one of them with a name that no terminal should get."""
    for split in ("train", "val"):
        for name in ("plain", f"a{ESCAPES}\nb"):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for number in range(4):
                pixels = np.full((40, 40, 3), 60 * number, np.uint8)
                Image.fromarray(pixels).save(place / f"{number}{ESCAPES}\n.jpg")
    return tmp_path / "data"


def convert(folder, *flags):
    words = ("--source.kind=image_folder", f"--source.path={folder}")
    return said("write_dataset.py", *words, f"--write.folder={folder}/out", *flags)


def test_names_of_classes_and_files_are_escaped_in_a_conversion(folder):
    status, text = convert(folder)
    assert status == 0
    assert r"a\x1b]0;owned\x07\x1b[31m\x9b2J\rfake\u202e\x7f\nb 4" in text
    summary = json.loads((folder / "out" / "val.beton.json").read_text())
    assert not any(RAW.search(name) for name in summary["classes"])
    bad = next(folder.glob("train/a*/0*"))
    bad.write_bytes(b"no image")
    status, text = convert(folder, "--write.overwrite=true")
    assert status == 1
    assert r"fake\u202e\x7f\nb/0\x1b]0;owned" in text
    assert all("write_dataset.py: " in line for line in text.splitlines() if "fake" in line)
    status, text = convert(folder, "--write.overwrite=true", "--source.on_error=skip")
    assert status == 0
    assert r"\x1b]0;owned" in text


@pytest.mark.slow
def test_classes_of_a_checkpoint_and_names_of_files_are_escaped(tiny_beton, quick_run, tmp_path):
    run = quick_run()
    about = json.loads((run / "weights.json").read_text())
    about["classes"][3] = f"x{ESCAPES}\ntrain_imagenet.py: fake"
    (run / "weights.json").write_text(json.dumps(about))
    flags = [f"--data.val_dataset={tiny_beton}/val.beton", "--training.eval_only=true"]
    weights = f"--model.checkpoint={run}/weights.safetensors"
    status, text = said("train_imagenet.py", "--model.arch=timm/test_resnet", weights, *flags)
    assert status == 1
    assert r"class 3 is x\x1b]0;owned\x07" in text
    assert text.count("\n") == 3  # and what is imported, and the view that the file brings
    name = tmp_path / f"a{ESCAPES}\n.beton"
    shutil.copy(tiny_beton / "val.beton", name)
    status, text = said("-m", "fast_imagenet.beton", "verify", name)
    assert (status, text.count("\n")) == (0, 2)
    name.write_bytes(b"short")
    status, text = said("-m", "fast_imagenet.beton", "verify", name)
    assert (status, text.count("\n")) == (1, 1)


def test_a_traceback_is_escaped_too():
    code = (
        "from fast_imagenet.terminal import *; ignore_broken_pipe(); raise KeyError('a\\x1b[31mb')"
    )
    code = code.replace("KeyError", "RuntimeError")
    status, text = said("-c", code)
    assert status == 1 and r"RuntimeError: a\x1b[31mb" in text


def test_text_without_controls_stays_and_bars_still_move():
    for text in ("", "héllo wörld 猫 👩‍🔬 a\u00a0b", "back\\slash"):
        assert readable(text) == text == on_terminal(text)
    assert on_terminal("\r 50%|#  | a\rb \r") == "\r 50%|#  | a\\rb \r"
    assert on_terminal("\r") == "\r" and on_terminal("\r\r\n") == "\r\r\n"
    assert on_terminal("a\tb\nc\x1bd\n") == "a\tb\nc\\x1bd\n"
    assert readable("a\udcff\u2028") == "a\\xff\\u2028" and readable("\ud800") == "\\ud800"


def test_classes_that_look_alike_once_escaped_are_refused(tmp_path):
    for name in ("a\n", r"a\n"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "0.jpg")
    with pytest.raises(SourceError, match="two classes look alike when shown"):
        open_source("image_folder", tmp_path, "train")


def test_one_rank_of_a_node_says_what_is_done(capsys, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        announce("reading \x1b[2J: about 5 s")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "reading \\x1b[2J: about 5 s\n")
