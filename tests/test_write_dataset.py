"""write_dataset.py as a user runs it: what it writes, refuses and leaves behind."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import write_dataset
from fast_imagenet.beton import encode
from fast_imagenet.beton.encode import ConversionError, EncodeSettings
from fast_imagenet.beton.merge import merge
from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.beton.writer import write_beton
from fast_imagenet.native.decoder import GOOD, decode_whole
from fast_imagenet.sources import open_source
from fast_imagenet.sources.base import shuffle
from tests import make_sources as make
from tests.faults import Faulty
from tests.odd_images import as_jpeg, broken_images, odd_images, pillow_rgb, scene

ROOT = Path(__file__).resolve().parent.parent
SIDE_KEYS = {
    *("sidecar_version", "file", "format", "num_samples", "num_classes", "classes", "class_names"),
    *("counts", "source", "settings", "file_bytes", "image_bytes", "page_size", "modes", "notes"),
    *("max_height", "max_width", "odd", "skipped", "labels_crc32", "blocks_crc32", "seconds"),
    "images_per_second",
}


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    """The command with these flags, without IMAGENET_DIR unless given."""
    env = {key: value for key, value in os.environ.items() if key != "IMAGENET_DIR"}
    command = [sys.executable, str(ROOT / "write_dataset.py"), *flags]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**env, **environment}
    )


def call(*flags: str) -> int:
    """The same in this process, which is quicker; settings errors end in SystemExit."""
    return write_dataset.main(list(flags))


@pytest.fixture
def folder(tmp_path) -> Path:
    """An image folder of the odd images (train, 27) and plain ones (val, 7)."""
    make.make_image_folder(tmp_path / "images")
    return tmp_path / "images"


def files_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir()) if path.exists() else []


# ------------------------------------------------------------------------------------------------
# What it writes
# ------------------------------------------------------------------------------------------------


def test_imagenet_dir_alone_is_enough(folder, tmp_path):
    """`python write_dataset.py` in the default folder: data/train.beton and data/val.beton."""
    env = {**os.environ, "IMAGENET_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "write_dataset.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    names = ["train.beton", "train.beton.json", "val.beton", "val.beton.json"]
    assert files_in(tmp_path / "data") == names
    assert "27 images of 3 classes" in done.stdout
    assert "images" in done.stderr  # the progress bar
    assert "MB" in done.stderr
    assert BetonFile(tmp_path / "data/val.beton").classes == make.WNIDS


@pytest.mark.parametrize("kind", make.MAKERS)
def test_every_kind_is_recognized_and_becomes_the_same_images(kind, tmp_path, capsys):
    """Stored raw, so that the pixels in the file are exactly Pillow's."""
    getattr(make, f"make_{kind}")(tmp_path / "in")
    flags = [f"--source.path={tmp_path / 'in'}", "--write.mode=raw"]
    assert call(*flags, f"--write.folder={tmp_path / 'out'}", "--write.workers=1") == 0
    assert f"source.kind=auto: {kind}, as it holds " in capsys.readouterr().out
    for split in ("train", "val"):
        file = BetonFile(tmp_path / "out" / f"{split}.beton")
        held = [
            (file.classes[file.labels[i]], file.image(i).shape, file.image(i).tobytes())
            for i in range(len(file))
        ]
        expected = []
        for wnid, data in make.by_wnid(split):
            rgb_hwc = _pillow(data)
            expected.append((wnid, rgb_hwc.shape, rgb_hwc.tobytes()))
        assert sorted(held) == sorted(expected)


def _pillow(data: bytes) -> np.ndarray:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pillow_rgb(data)


def test_synthetic_needs_no_path(tmp_path):
    flags = ["--source.kind=synthetic", "--source.synthetic_train=50", "--source.synthetic_val=20"]
    assert call(*flags, f"--write.folder={tmp_path}", "--write.workers=1") == 0
    assert len(BetonFile(tmp_path / "train.beton")) == 50
    assert len(BetonFile(tmp_path / "val.beton")) == 20


def test_summary_on_screen_and_beside_the_file(folder, tmp_path, capsys):
    flags = [f"--source.path={folder}", f"--write.folder={tmp_path}", "--write.workers=1"]
    assert call(*flags, "--source.split=train", "--write.max_side=64") == 0
    summary = json.loads((tmp_path / "train.beton.json").read_text())
    assert set(summary) == SIDE_KEYS
    expected = {}
    for _, kinds in odd_images().values():
        # names promise JPEG in this layout, so that other kinds of files are misnamed
        for kind in kinds - {"misnamed"}:
            expected[kind] = expected.get(kind, 0) + 1
    found = {kind: odd["count"] for kind, odd in summary["odd"].items() if kind != "misnamed"}
    assert found == expected
    assert all(Path(name).exists() for name in summary["odd"]["cmyk"]["files"])
    assert summary["classes"] == make.WNIDS
    assert sum(summary["counts"]) == summary["num_samples"] == 27
    assert summary["modes"] == {"jpg": 27, "raw": 0}
    assert max(summary["max_height"], summary["max_width"]) == 64
    assert summary["file"] == "train.beton"
    assert summary["file_bytes"] == (tmp_path / "train.beton").stat().st_size
    assert summary["settings"]["max_side"] == 64
    screen = capsys.readouterr().out
    for word in ("27 images of 3 classes", "27 jpg", "1 cmyk", "n01440764 9", "train.beton.json"):
        assert word in screen


@pytest.mark.slow
def test_scaled_and_repaired_images_are_counted_and_named(tmp_path):
    """Also of a file that was written in parts; what is stored is sound, and libjpeg is silent."""
    sound = as_jpeg(scene())
    kinds = [odd_images()["sixteen_bit.png"][0], sound[:-90] + sound[-2:], sound]
    for number in range(6):
        file = tmp_path / f"in/train/a/{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(kinds[number % 3])
    flags = (f"--source.path={tmp_path / 'in'}", "--source.split=train", "--write.workers=1")
    done = run(*flags, f"--write.folder={tmp_path / 'out'}")
    assert done.returncode == 0 and "Corrupt" not in done.stderr
    for words in (r"\(value / 257\)", "repaired by libjpeg"):
        assert len(re.findall(rf"note .*{words}.*: 2, the first is .*/a/\d\.jpg", done.stdout)) == 1
    for number in (0, 1):
        parts = ("--source.shards=2", f"--source.shard={number}")
        assert run(*flags, *parts, f"--write.folder={tmp_path / 'parts'}").returncode == 0
    merge(tmp_path / "parts/train.beton", sorted((tmp_path / "parts").glob("*.beton")))
    for folder in ("out", "parts"):
        file = BetonFile(tmp_path / folder / "train.beton")
        assert sum(": 2, the first is" in note for note in file.sidecar["notes"]) == 2
        names = {Path(name).name for name in file.sidecar["odd"]["repaired"]["files"]}
        assert names == {"1.jpg", "4.jpg"}
        for data in map(file.read, range(len(file))):
            assert decode_whole(data, scene().shape[:2], own=False)[1] == GOOD


def test_bytes_do_not_depend_on_workers(folder, tmp_path):
    source = open_source("image_folder", folder, "train")
    settings = EncodeSettings(mode="proportion", max_side=70, seed=5)
    digests = set()
    for workers in (0, 1, 2, 3):
        path = tmp_path / f"{workers}.beton"
        write_beton(path, source, settings, workers=workers)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1
    modes = BetonFile(path).modes.tolist()
    assert 4 < modes.count("jpg") < 22
    write_beton(tmp_path / "other.beton", source, EncodeSettings(max_side=70, seed=6))
    assert BetonFile(tmp_path / "other.beton").labels.tolist() != BetonFile(path).labels.tolist()


@pytest.mark.parametrize("side", [0, 30])
def test_every_jpeg_has_restart_markers(side, folder, tmp_path):
    """Written anew as they are (0) and from pixels; the fitting ones keep their pixels nearly."""
    source = open_source("image_folder", folder, "train")
    write_beton(tmp_path / "x.beton", source, EncodeSettings(max_side=side, quality=92))
    file = BetonFile(tmp_path / "x.beton")
    stored = [file.read(index) for index in range(len(file))]
    for data in stored:
        at = data.index(b"\xff\xdd\0\4")
        assert 1 <= int.from_bytes(data[at + 4 : at + 6], "big") <= 4
        assert data.index(b"\xff\xda") > at
    plain = pillow_rgb(as_jpeg(scene()))
    kept = [data for data in stored if np.array_equal(pillow_rgb(data), plain)]
    assert bool(kept) == (side == 0)


def test_limit_is_even_over_classes(folder, tmp_path):
    flags = [f"--source.path={folder}", f"--write.folder={tmp_path}", "--write.workers=1"]
    assert call(*flags, "--write.limit=6") == 0
    for split in ("train", "val"):
        assert np.bincount(BetonFile(tmp_path / f"{split}.beton").labels).tolist() == [2, 2, 2]


def test_a_fraction_of_train_is_held_out(tmp_path):
    flags = ("--source.kind=synthetic", "--source.synthetic_train=200", "--write.workers=2")
    for folder, split, holdout in (("all", "all", 0.1), ("val", "val", 0.1), ("whole", "train", 0)):
        more = (f"--source.split={split}", f"--source.holdout={holdout}")
        assert call(*flags, *more, f"--write.folder={tmp_path / folder}") == 0

    def images(path):
        file = BetonFile(path)
        return sorted(bytes(file.read(i)) for i in range(len(file)))

    train, val = (images(tmp_path / f"all/{split}.beton") for split in ("train", "val"))
    assert (len(train), len(val)) == (180, 20) and len(set(train) & set(val)) == 0
    assert sorted(train + val) == images(tmp_path / "whole/train.beton")
    assert val == images(tmp_path / "val/val.beton")  # either split can be written alone
    summary = json.loads((tmp_path / "all/val.beton.json").read_text())
    assert summary["counts"] == [2] * 10
    assert any("held out" in note for note in summary["notes"])
    message = run(*flags, "--source.holdout=0.001", f"--write.folder={tmp_path / 'none'}")
    assert message.returncode == 2 and "--source.holdout=0.001 of 200" in message.stderr


def test_val_keeps_the_class_list_of_train(tmp_path):
    """A val split with one class only has that class's number in train, not zero."""
    make.make_parquet(tmp_path / "in")
    import pyarrow.parquet as pq

    path = next((tmp_path / "in/data").glob("validation*"))
    table = pq.read_table(path)
    pq.write_table(table.filter([label == 2 for label in table["label"].to_pylist()]), path)
    flags = ["--source.kind=parquet", f"--source.path={tmp_path / 'in'}", "--write.workers=1"]
    assert call(*flags, f"--write.folder={tmp_path}") == 0
    file = BetonFile(tmp_path / "val.beton")
    assert set(file.labels.tolist()) == {2}
    assert file.classes == BetonFile(tmp_path / "train.beton").classes


def test_real_photographs(photos, tmp_path):
    """100 Imagenette images: within JPEG's loss of Pillow's pixels, and labelled by folder."""
    source = open_source("image_folder", photos / "imagenette", "val")
    assert len(source) == 3925
    write_beton(tmp_path / "val.beton", source, EncodeSettings(max_side=224), limit=100, workers=2)
    file = BetonFile(tmp_path / "val.beton")
    assert np.bincount(file.labels).tolist() == [10] * 10
    assert len(open_source("image_folder", photos / "imagenette", "train")) == 9469


# ------------------------------------------------------------------------------------------------
# What it refuses before anything is written (exit 2)
# ------------------------------------------------------------------------------------------------


def test_nothing_given_is_one_sentence(tmp_path):
    done = run(f"--write.folder={tmp_path}")
    assert done.returncode == 2
    assert "set the environment variable IMAGENET_DIR" in done.stderr
    assert files_in(tmp_path) == []


SETTINGS_ERRORS = {
    "--write.qualitty=90": "did you mean write.quality",
    "--write.quality=0": "1 to 100",
    "--write.mode=png": "jpg, raw, proportion, smart",
    "--write.jpeg_share=1.5": "from 0 to 1",
    "--source.kind=tfds": "image_folder",
    "--source.path=nowhere": "source folder nowhere does not exist",
}


def test_wrong_settings_are_reported_together(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(*list(SETTINGS_ERRORS)[:5], f"--write.folder={tmp_path}")
    assert stopped.value.code == 2
    reported = capsys.readouterr().err
    for words in list(SETTINGS_ERRORS.values())[:5]:
        assert words in reported


def test_a_class_file_that_would_be_ignored_is_refused(folder, tmp_path, capsys):
    flags = [f"--source.path={folder}", f"--write.folder={tmp_path / 'out'}"]
    assert call(*flags, "--source.classes=names.txt") == 2
    printed = capsys.readouterr().err
    assert "--source.classes=names.txt is for parquet" in printed and "image_folder" in printed
    assert not (tmp_path / "out").exists()


def test_two_layouts_in_one_folder_are_a_question(folder, tmp_path, capsys):
    make.make_parquet(folder)
    assert call(f"--source.path={folder}", f"--write.folder={tmp_path / 'out'}") == 2
    printed = capsys.readouterr().err
    assert "--source.kind=image_folder (train/) or --source.kind=parquet (data/" in printed


def test_missing_source_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        call("--source.path=nowhere", f"--write.folder={tmp_path}")
    assert stopped.value.code == 2
    assert SETTINGS_ERRORS["--source.path=nowhere"] in capsys.readouterr().err


def test_layout_problems_exit_2_before_writing(folder, tmp_path, capsys):
    (folder / "val/n99999999").mkdir()
    flags = [f"--source.path={folder}", f"--write.folder={tmp_path / 'out'}"]
    assert call(*flags) == 2
    assert "n99999999" in capsys.readouterr().err
    assert files_in(tmp_path / "out") == []


def test_existing_file_is_kept_unless_overwrite_is_set(folder, tmp_path, capsys):
    target = tmp_path / "val.beton"
    target.write_bytes(b"precious")
    flags = [f"--source.path={folder}", f"--write.folder={tmp_path}", "--write.workers=1"]
    with pytest.raises(SystemExit) as stopped:
        call(*flags)
    assert stopped.value.code == 2
    assert "val.beton: choose --write.folder" in capsys.readouterr().err
    assert target.read_bytes() == b"precious"
    assert files_in(tmp_path) == ["images", "val.beton"]
    assert call(*flags, "--source.split=val", "--write.overwrite=true") == 0
    assert len(BetonFile(target)) == 7
    with pytest.raises(FileExistsError):
        write_beton(target, open_source("synthetic", "", "val", size=10))


# ------------------------------------------------------------------------------------------------
# What goes wrong on the way (exit 1): nothing is left behind
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["truncated.JPEG", "empty.JPEG", "text.JPEG", "huge.png"])
def test_broken_file_stops_with_its_path(name, folder, tmp_path):
    data, words = broken_images()[name]
    bad = folder / "train" / make.WNIDS[1] / name
    bad.write_bytes(data)
    started = time.monotonic()
    done = run(f"--source.path={folder}", f"--write.folder={tmp_path / 'out'}", "--write.workers=2")
    assert done.returncode == 1
    assert str(bad) in done.stderr
    assert words in done.stderr
    assert "repair or remove it" in done.stderr and "--source.on_error=skip" in done.stderr
    assert "Traceback" not in done.stderr
    assert files_in(tmp_path / "out") == []
    assert time.monotonic() - started < 30


def test_files_that_are_no_images_by_name_are_left_out_and_reported(folder, tmp_path, capsys):
    flags = [f"--source.path={folder}", "--source.split=train"]
    assert call(*flags, f"--write.folder={tmp_path / 'plain'}") == 0
    for name in ("README.txt", "Thumbs.db"):
        (folder / "train" / make.WNIDS[0] / name).write_text("notes")
    capsys.readouterr()
    assert call(*flags, f"--write.folder={tmp_path / 'more'}") == 0
    printed = capsys.readouterr().out
    assert "left out (not named like an image): 2, the first is" in printed
    plain, more = (tmp_path / name / "train.beton" for name in ("plain", "more"))
    assert BetonFile(plain).num_samples == BetonFile(more).num_samples


def test_a_val_class_without_images_is_reported(folder, tmp_path, capsys):
    shutil.rmtree(folder / "val" / make.WNIDS[0])
    assert call(f"--source.path={folder}", f"--write.folder={tmp_path / 'out'}") == 0
    assert f"classes without images here: 1, {make.WNIDS[0]}" in capsys.readouterr().out


def test_broken_files_can_be_skipped(folder, tmp_path, capsys):
    for name, (data, _) in broken_images().items():
        (folder / "train" / make.WNIDS[0] / name).write_bytes(data)
    flags = [f"--source.path={folder}", f"--write.folder={tmp_path}", "--source.on_error=skip"]
    assert call(*flags, "--write.workers=2") == 0
    file = BetonFile(tmp_path / "train.beton")
    assert len(file) == 27
    skipped = {Path(skip["file"]).name: skip["reason"] for skip in file.sidecar["skipped"]}
    assert set(skipped) == set(broken_images())
    for name, (_, words) in broken_images().items():
        assert words in skipped[name]
    assert "truncated.JPEG" in capsys.readouterr().out


def test_nothing_but_broken_files(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "in" / split / "a").mkdir(parents=True)
        (tmp_path / "in" / split / "a" / "1.JPEG").write_bytes(b"text")
    flags = [f"--source.path={tmp_path / 'in'}", f"--write.folder={tmp_path / 'out'}"]
    assert call(*flags, "--source.on_error=skip", "--write.workers=1") == 1
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fault", ["raise", "kill", "exit"])
def test_worker_that_raises_or_dies_ends_the_command(fault, workers, tmp_path):
    started = time.monotonic()
    with pytest.raises(ConversionError, match=r"faulty/17\.JPEG") as caught:
        write_beton(tmp_path / "x.beton", Faulty(fault), workers=workers)
    assert time.monotonic() - started < 10
    assert ("of the test" in str(caught.value)) == (fault == "raise")
    assert files_in(tmp_path) == []
    assert not _children()


def test_failure_does_not_wait_for_a_worker_that_hangs(tmp_path):
    """The first chunk fails while the second hangs, say on a file server."""
    order = shuffle(np.arange(80), None, seed=0).tolist()
    source = Faulty("raise", bad=order[3], sleepy=order[20])
    started = time.monotonic()
    with pytest.raises(ConversionError, match=rf"faulty/{order[3]}\.JPEG"):
        write_beton(tmp_path / "x.beton", source, workers=2)
    assert time.monotonic() - started < 30
    assert not _children()


def test_storage_that_hangs_is_reported(tmp_path, monkeypatch):
    from fast_imagenet.beton import pool

    monkeypatch.setattr(pool, "STALL_SECONDS", 6)
    first = shuffle(np.arange(80), None, seed=0)[0]
    with pytest.raises(ConversionError, match=rf"faulty/{first}\.JPEG: nothing was finished for 6"):
        write_beton(tmp_path / "x.beton", Faulty(sleepy=first), workers=1)
    assert not _children()
    assert files_in(tmp_path) == []


def _children() -> list[str]:
    """Command lines of this process's living worker processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            line = path.with_name("cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z" and "spawn_main" in line:
            found.append(line)
    return found


def test_failure_in_this_process(tmp_path):
    with pytest.raises(ConversionError, match=r"faulty/17\.JPEG: ZeroDivisionError"):
        write_beton(tmp_path / "x.beton", Faulty("raise"), workers=0)
    assert files_in(tmp_path) == []


def test_failed_replacement_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.beton"
    write_beton(path, Faulty())
    before = path.read_bytes(), (tmp_path / "x.beton.json").read_bytes()
    with pytest.raises(ConversionError):
        write_beton(path, Faulty("raise"), overwrite=True)
    assert (path.read_bytes(), (tmp_path / "x.beton.json").read_bytes()) == before


def test_full_disk_removes_the_partial_file(tmp_path, monkeypatch):
    from fast_imagenet.beton import writer

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_beton(tmp_path / "x.beton", Faulty())
    assert files_in(tmp_path) == []
    printed = re.fullmatch(
        r"(.*): No space left on device after ([\d.]+) MB .*: free some space, .*",
        str(caught.value),
    )
    assert printed[1] == str(tmp_path / "x.beton")
    assert 0 < float(printed[2]) < 1  # of a file that is 8 MB long, most of it a hole


SLOW = """
import runpy, sys
sys.path.insert(0, {root!r})
from fast_imagenet import sources
from tests.faults import Faulty
if __name__ == "__main__":
    sources.open_source = lambda *_, **__: Faulty("slow", {note!r})
    runpy.run_path({root!r} + "/write_dataset.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGHUP, 130), (signal.SIGKILL, -9)],
)
def test_interrupted_command_leaves_nothing_running(number, status, tmp_path):
    """Ctrl-C and a hang-up reach the whole group; SIGTERM and SIGKILL only the command itself."""
    script, out, note = tmp_path / "slow.py", tmp_path / "out", str(tmp_path / "worker")
    script.write_text(SLOW.format(root=str(ROOT), note=note))
    command = [sys.executable, str(script), "--source.kind=synthetic", "--source.split=train"]
    process = subprocess.Popen(
        [*command, f"--write.folder={out}", "--write.workers=2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # below nohup or a background shell, Ctrl-C would be ignored by inheritance
        preexec_fn=lambda: [
            signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)
        ],
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("worker.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(path.suffix[1:]) for path in tmp_path.glob("worker.*")]
    assert len(pids) == 2
    if number in (signal.SIGINT, signal.SIGHUP):
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(10) == status
    message = process.stderr.read()
    process.stderr.close()
    _wait_for_end_of(pids, 10)
    left = [name.removesuffix(f"-{process.pid}") for name in files_in(out)]
    assert set(left) <= {"train.beton.partial", "train.beton.lock"}
    if number != signal.SIGKILL:
        assert files_in(out) == []
        assert "interrupted" in message
        assert "Traceback" not in message


def _wait_for_end_of(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"worker processes {pids} still run"
        time.sleep(0.1)


def test_oversized_side_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "MAX_SIDE", 22)
    with pytest.raises(ConversionError, match=r"24 x 20 pixels.*max_side"):
        write_beton(tmp_path / "x.beton", Faulty())


def test_oversized_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(ConversionError, match="more than the allowed 100"):
        write_beton(tmp_path / "x.beton", Faulty())


def test_vanished_file_is_named(folder, tmp_path):
    source = open_source("image_folder", folder, "val")
    gone = Path(source.name(3))
    gone.unlink()
    with pytest.raises(ConversionError, match="No such file"):
        write_beton(tmp_path / "x.beton", source)


# ------------------------------------------------------------------------------------------------
# Odd names and odd files
# ------------------------------------------------------------------------------------------------


def odd_name(folder: Path, split: str, data: bytes) -> None:
    """A file whose name is not UTF-8."""
    path = os.fsencode(folder / split / make.WNIDS[0]) + b"/z\xff.JPEG"
    Path(os.fsdecode(path)).write_bytes(data)


def test_names_that_are_not_utf8(folder, tmp_path, capsys):
    """One is skipped and one is odd (CMYK); a folder of that kind gives a class of that name."""
    odd_name(folder, "train", b"text")
    odd_name(folder, "val", next(data for data, kinds in odd_images().values() if "cmyk" in kinds))
    for split in ("train", "val"):
        (folder / split / make.WNIDS[2]).rename(folder / split / os.fsdecode(b"w\xfe"))
    flags = [f"--source.path={folder}", f"--write.folder={tmp_path}", "--source.on_error=skip"]
    assert call(*flags, "--write.workers=1") == 0
    skipped = BetonFile(tmp_path / "train.beton").sidecar["skipped"]
    assert skipped[0]["file"].endswith("/z\\xff.JPEG")
    val = BetonFile(tmp_path / "val.beton")
    assert val.sidecar["odd"]["cmyk"]["files"][0].endswith("/z\\xff.JPEG")
    assert val.classes[2] == "w\\xfe"
    assert "z\\xff.JPEG: not an image" in capsys.readouterr().out


def test_name_that_is_not_utf8_in_a_message(folder, tmp_path, capsys):
    odd_name(folder, "train", b"text")
    flags = [f"--source.path={folder}", f"--write.folder={tmp_path}", "--write.workers=1"]
    assert call(*flags) == 1
    assert "z\\xff.JPEG: not an image" in capsys.readouterr().err


def test_pipe_is_refused_at_once(folder, tmp_path):
    pipe = folder / "val" / make.WNIDS[0] / "pipe.JPEG"
    os.mkfifo(pipe)
    source = open_source("image_folder", folder, "val")
    with pytest.raises(ConversionError, match=r"pipe\.JPEG: it is not a regular file"):
        write_beton(tmp_path / "x.beton", source, workers=1)
    summary = write_beton(tmp_path / "x.beton", source, EncodeSettings(skip_bad=True))
    assert summary["skipped"] == [{"file": str(pipe), "reason": "it is not a regular file"}]


def test_class_without_images_left_is_reported(folder, tmp_path, capsys):
    for path in (folder / "val" / make.WNIDS[1]).iterdir():
        path.write_bytes(b"text")
    flags = [f"--source.path={folder}", f"--write.folder={tmp_path}", "--source.on_error=skip"]
    assert call(*flags, "--write.workers=1", "--source.split=val") == 0
    reported = f"warning: all images of 1 class were skipped: {make.WNIDS[1]}"
    assert reported in capsys.readouterr().out
    assert reported in BetonFile(tmp_path / "val.beton").sidecar["notes"]
    source = open_source("image_folder", folder, "train")
    notes = write_beton(tmp_path / "train.beton", source)["notes"]
    assert not any("were skipped" in note for note in notes)


# ------------------------------------------------------------------------------------------------
# Where it writes
# ------------------------------------------------------------------------------------------------


def refusal(capsys, *flags: str) -> str:
    """The error about settings that end with status 2."""
    with pytest.raises(SystemExit) as stopped:
        call("--source.kind=synthetic", *flags)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize("name", ["train.beton", "val.beton.json"])
def test_target_that_is_a_folder(name, overwrite, tmp_path, capsys):
    (tmp_path / name).mkdir()
    flags = [f"--write.folder={tmp_path}", f"--write.overwrite={overwrite}"]
    assert f"{name} is a folder where a file must go" in refusal(capsys, *flags)
    assert files_in(tmp_path) == [name]


def test_folder_that_cannot_be_written(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below" / "it"):
        assert f"{file} is not a folder" in refusal(capsys, f"--write.folder={folder}")
    assert "/proc cannot be written" in refusal(capsys, "--write.folder=/proc/data/here")


def test_target_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    path, source = tmp_path / "x.beton", Faulty()
    monkeypatch.setattr(Faulty, "name", lambda *_: path.write_bytes(b"of another") and "name")
    with pytest.raises(FileExistsError, match="has appeared"):
        write_beton(path, source)
    assert path.read_bytes() == b"of another"
    assert files_in(tmp_path) == ["x.beton"]
    write_beton(path, source, overwrite=True)
    assert len(BetonFile(path)) == 80


def test_file_system_without_hard_links(tmp_path, monkeypatch):
    from fast_imagenet.beton import output_lock

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(output_lock.os, "link", refuse)
    path = tmp_path / "x.beton"
    write_beton(path, Faulty())
    assert len(BetonFile(path)) == 80
    assert files_in(tmp_path) == ["x.beton", "x.beton.json"]
    (tmp_path / "y").touch()
    with pytest.raises(FileExistsError, match="has appeared"):
        output_lock.publish(path, tmp_path / "y", overwrite=False)


def test_second_writer_ends_at_once(tmp_path, capsys):
    """The lock of a living process, of another machine, and one that nobody understands."""
    lock, pid, here = tmp_path / "train.beton.lock", os.getppid(), socket.gethostname()
    holders = {
        f"{pid} {here}": f"process {pid} on {here}:",
        "1 elsewhere": "process 1 on the machine 'elsewhere'",
        "odd": "an unknown process",
    }
    for text, words in holders.items():
        lock.write_text(text)
        begin = time.process_time()
        reported = refusal(capsys, f"--write.folder={tmp_path}")
        assert time.process_time() - begin < 1
        assert f"train.beton is being written by {words}" in reported
        with pytest.raises(FileExistsError, match="is being written"):
            write_beton(tmp_path / "train.beton", Faulty())
        assert lock.read_text() == text
        assert files_in(tmp_path) == [lock.name]


def test_lock_is_there_while_it_writes(tmp_path, monkeypatch):
    locks = set()
    monkeypatch.setattr(Faulty, "name", lambda *_: locks.update(tmp_path.glob("*.lock")) or "name")
    write_beton(tmp_path / "x.beton", Faulty())
    assert locks == {tmp_path / "x.beton.lock"}
    assert files_in(tmp_path) == ["x.beton", "x.beton.json"]


@pytest.mark.slow
@pytest.mark.parametrize("holder", ["dead", "own", "empty"])
def test_leftovers_of_dead_writers_are_removed(holder, tmp_path):
    """Also a lock with this process's own id: in a restarted container ids repeat."""
    done = subprocess.Popen(["true"])
    done.wait()
    pid = os.getpid() if holder == "own" else done.pid
    text = "" if holder == "empty" else f"{pid} {socket.gethostname()}\n"
    (tmp_path / "x.beton.lock").write_text(text)
    for name in (f"x.beton.partial-{pid}", f"x.beton.partial-{pid}.json"):
        (tmp_path / name).touch()
    kept = [f"x.beton.partial-{os.getppid()}", f"y.beton.partial-{pid}"]
    for name in kept:
        (tmp_path / name).touch()
    summary = write_beton(tmp_path / "x.beton", Faulty())
    assert files_in(tmp_path) == sorted(["x.beton", "x.beton.json", *kept])
    names = f"x.beton.partial-{pid}, x.beton.partial-{pid}.json"
    assert summary["notes"] == [f"removed what a killed conversion had left: {names}"]


# ------------------------------------------------------------------------------------------------
# Workers that are stopped, or die at their start
# ------------------------------------------------------------------------------------------------


class Stopping(Faulty):
    """Stops the worker that reads one image, as SIGSTOP does, while another fails."""

    def read(self, index: int) -> bytes:
        if index == self.sleepy:
            os.kill(os.getpid(), signal.SIGSTOP)
        if index == self.bad:
            time.sleep(0.5)  # until the other worker has stopped
        return super().read(index)


def test_stopped_worker_is_killed(tmp_path, monkeypatch):
    from fast_imagenet.beton import pool

    monkeypatch.setattr(pool, "STOP_SECONDS", 0.5)
    order = shuffle(np.arange(80), None, seed=0).tolist()
    source = Stopping("raise", bad=order[15], sleepy=order[16])
    ended = []

    def write() -> None:
        with pytest.raises(ConversionError, match=rf"faulty/{order[15]}\.JPEG"):
            write_beton(tmp_path / "x.beton", source, workers=2)
        ended.append(True)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(30)
    left = _children()
    assert ended
    assert not left


class DiesAtStart(Faulty):
    """Ends the worker process that receives it."""

    def __setstate__(self, state: dict) -> None:
        os._exit(3)


def test_worker_that_dies_at_its_start_ends_the_command(tmp_path):
    with pytest.raises(ConversionError, match="before the first image: a worker process died"):
        write_beton(tmp_path / "x.beton", DiesAtStart(), workers=1)
    assert files_in(tmp_path) == []
    assert not _children()
