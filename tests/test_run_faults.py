"""A training run without memory or without disk space: what is kept, and what is said."""

import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fast_imagenet import models
from fast_imagenet.checkpoint import CheckpointError, load_checkpoint
from fast_imagenet.guard import SIGNALS, STOPPED, Agreement, Guard, Stopped
from fast_imagenet.runlog import RunLog
from tests.agents import free_port, wait_until
from tests.conftest import ROOT, SMOKE
from tests.faults import CannotInject, name_space
from tests.torture.warm import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_full_disk_keeps_the_previous_checkpoint_and_says_so(quick_run):
    """Under a limit on the size of files, as when a disk is full in the middle of a write."""
    flags = ["--training.epochs=1", "--lr.lr_peak_epoch=0", "--model.arch=timm/test_resnet"]
    folder = quick_run(*flags, "--training.max_steps=1")
    before = (folder / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            quick_run(*flags, "--training.max_steps=2", "--training.resume=auto", folder=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = f"cannot write checkpoint {folder}/last.pt ([Errno 27] File too large); the previous one"
    assert str(caught.value).startswith(said)
    assert "make room or choose another logging.folder" in str(caught.value)
    assert (folder / "last.pt").read_bytes() == before
    assert not list(folder.glob(".*"))
    quick_run(
        *flags, "--training.max_steps=2", "--training.resume=auto", folder=folder
    )  # with room again
    assert load_checkpoint(folder / "last.pt")["step"] == 2


def run_as_script(monkeypatch, *flags):
    """train_imagenet.py as a command, in this process; what it ends with."""
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *flags])
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "train_imagenet.py"), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ended.value.code


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("place", ["trial", "step"])
def test_out_of_memory_says_which_setting_to_lower(place, error, tiny_beton, tmp_path, monkeypatch):
    def full(*_, **__):
        raise error

    flags = [f"--config={SMOKE}", "--model.arch=timm/test_resnet", "--training.epochs=3"]
    flags += [f"--data.{s}_dataset={tiny_beton}/{s}.beton" for s in ("train", "val")]
    if place == "trial" and isinstance(error, torch.OutOfMemoryError):
        monkeypatch.setattr(models, "warm_up", lambda step, *_: step(32))
        monkeypatch.setattr(torch.nn.Conv2d, "forward", full)
    elif place == "trial":
        monkeypatch.setattr(models, "try_network", full)
    else:
        monkeypatch.setattr(torch.Tensor, "backward", full)
    assert run_as_script(monkeypatch, *flags, f"--logging.folder={tmp_path}/run") == (
        f"train_imagenet.py: {str(error) or 'out of memory'}\n"
        "Lower training.micro_batch_size (images per forward pass) or validation.batch_size"
    )


@pytest.mark.parametrize("name", ["config.json", "environment.json", "log.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_a_sentence(name, tiny_beton, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (folder / name).mkdir(parents=True)
    flags = [f"--config={SMOKE}", "--model.arch=timm/test_resnet", "--training.resume=auto"]
    flags += [f"--data.{s}_dataset={tiny_beton}/{s}.beton" for s in ("train", "val")]
    said = run_as_script(monkeypatch, *flags, f"--logging.folder={folder}")
    assert said.startswith("train_imagenet.py: ") and "Is a directory; check the path" in said
    assert name in said


def test_a_folder_that_vanishes_is_a_sentence(tiny_beton, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def vanish(*_):
        shutil.rmtree(folder)

    monkeypatch.setattr(RunLog, "truncate_after", vanish)
    flags = [f"--config={SMOKE}", "--model.arch=timm/test_resnet", "--training.max_steps=0"]
    flags += ["--training.epochs=2", "--lr.lr_peak_epoch=0"]
    flags += [f"--data.{s}_dataset={tiny_beton}/{s}.beton" for s in ("train", "val")]
    said = run_as_script(monkeypatch, *flags, f"--logging.folder={folder}")
    assert said.startswith(f"train_imagenet.py: {folder}") and "No such file" in said


def test_a_full_disk_under_the_log_is_a_sentence(tiny_beton, tmp_path):
    """A disk of its own, full to the brim as the first epoch ends; only a mount shows it."""
    try:
        space = name_space()
    except CannotInject as error:
        pytest.skip(str(error))
    folder = tmp_path / "run"
    folder.mkdir()
    flags = [f"--config={SMOKE}", "--model.arch=timm/test_resnet", "--training.epochs=1"]
    flags += ["--lr.lr_peak_epoch=0", "--training.max_steps=0", f"--logging.folder={folder}"]
    flags += [f"--data.{s}_dataset={tiny_beton}/{s}.beton" for s in ("train", "val")]
    command = 'mount -t tmpfs -o size=7m tmpfs "$0" && head -c 6m /dev/zero > "$0/other" && "$@"'
    done = subprocess.run(
        [*space, "sh", "-c", command, str(folder), sys.executable, "train_imagenet.py", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "No space left on device" in done.stderr and "make room or" in done.stderr


# ── several ranks ──


@pytest.fixture
def two_ranks(tiny_beton, tmp_path):
    """Two ranks that train for ever, beyond their first checkpoint; their folder, too."""
    folder = tmp_path / "run"
    flags = [f"--config={SMOKE}", "--model.arch=timm/test_resnet", "--training.epochs=5000"]
    flags += ["--training.max_steps=0", "--training.checkpoint_minutes=0.001"]
    flags += [f"--data.{s}_dataset={tiny_beton}/{s}.beton" for s in ("train", "val")]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    place |= {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    trainers = [
        Trainer(*flags, f"--logging.folder={folder}", environment=place | {"RANK": rank})
        for rank in "01"
    ]
    try:
        assert wait_until((folder / "log.jsonl").exists, 120), trainers[0].poll()
        yield trainers, folder
    finally:
        for trainer in trainers:
            trainer.send_signal(signal.SIGKILL)
            trainer.communicate()


def test_a_signal_to_one_rank_stops_both_at_the_same_step(two_ranks):
    trainers, folder = two_ranks
    begin = time.monotonic()
    trainers[1].send_signal(signal.SIGTERM)
    said = [trainer.communicate(60)[1] for trainer in trainers]
    assert [trainer.returncode for trainer in trainers] == [STOPPED, STOPPED], said
    assert time.monotonic() - begin < 25
    assert "stopped by a signal to another rank, saved; go on with" in said[0]
    assert "stopped by SIGTERM, saved; go on with" in said[1]
    state = load_checkpoint(folder / "last.pt")
    assert len(state["losses"]) == state["step"]


def test_a_rank_that_dies_ends_the_other(two_ranks):
    trainers, _ = two_ranks
    trainers[1].send_signal(signal.SIGKILL)
    trainers[0].communicate(60)
    assert trainers[0].returncode == 1


def test_ranks_leave_an_evaluation_together():
    """A signal to one of two: both stop before the same batch, though one has a batch more."""
    barrier, wishes, ended = threading.Barrier(2, timeout=20), [0, 0], {}

    def rank(number, batches):
        def most(value):
            wishes[number] = value
            barrier.wait()
            largest = max(wishes)
            barrier.wait()
            return largest

        guard = Guard()
        ranks = SimpleNamespace(world_size=2, most=most)
        seen = []
        try:
            for batch in guard.watch(range(1, batches), Agreement(ranks), asked=40):
                seen.append(batch)
                if number == 1 and batch == 14:
                    guard.signal = "SIGTERM"
        except Stopped as stop:
            seen.append(str(stop))
        ended[number] = seen

    threads = [threading.Thread(target=rank, args=pair) for pair in ((0, 41), (1, 42))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ended[0] == [*range(1, 21), "a signal to another rank"]
    assert ended[1] == [*range(1, 21), "SIGTERM"]
