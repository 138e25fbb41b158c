"""A training run without memory or without disk space: what is kept, and what is said."""

import contextlib
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from PIL import Image

from fast_imagenet.engine import signals
from fast_imagenet.engine.checkpoint import CheckpointError, load_checkpoint
from fast_imagenet.engine.distributed import Consensus
from fast_imagenet.engine.logger import RunLog
from fast_imagenet.engine.signals import SignalWatch, Stopped
from fast_imagenet.engine.watchdog import Watchdog
from fast_imagenet.models import factory as models
from fast_imagenet.processes import SIGNALS
from fast_imagenet.program import STALLED, STOPPED
from tests.agents import free_port, wait_until
from tests.conftest import ROOT, SMOKE
from tests.faults import CannotInject, name_space, session
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
    monkeypatch.setattr(signals, "_end_by_force", lambda error: None)  # it would end the tests
    monkeypatch.setattr(signals, "_is_program", False)  # as it was, after the test
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
@pytest.mark.parametrize("place", ["try", "step"])
def test_out_of_memory_says_which_setting_to_lower(place, error, tiny_beton, tmp_path, monkeypatch):
    def full(*_, **__):
        raise error

    flags = [f"--config={SMOKE}", "--model.arch=timm/test_resnet", "--training.epochs=3"]
    flags += [f"--data.{s}_dataset={tiny_beton}/{s}.beton" for s in ("train", "val")]
    if place == "try":
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


@pytest.mark.slow
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


# ── torchvision's workers ──


@pytest.fixture
def start_torchvision(tiny_beton, tmp_path):
    """start(*flags, before=()) -> the command under way, with two workers, in a session of its own.

    What it has left is killed in the end.
    """
    started = []

    def start(*flags, before=()):
        command = [*before, sys.executable, "train_imagenet.py", f"--config={SMOKE}"]
        command += ["--model.arch=timm/test_resnet", "--training.epochs=5000"]
        command += ["--training.max_steps=0", "--training.checkpoint_minutes=0.001"]
        command += [f"--data.{s}_dataset={tiny_beton}/{s}.beton" for s in ("train", "val")]
        command += ["--data.backend=torchvision", "--data.num_workers=2"]
        command += [f"--logging.folder={tmp_path}/run", *flags]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        options["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options))
        return started[-1]

    yield start
    for process in started:
        for pid in [*workers_of(process), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def workers_of(process) -> list[int]:
    """Process ids of the workers, which the command's fork server started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            parents[int(path.parent.name)] = int(parent) if state != "Z" else 0
    children = {pid for pid, parent in parents.items() if parent == process.pid}
    return [pid for pid, parent in parents.items() if parent in children]


def wait_for_workers(process, tmp_path) -> list[int]:
    """The two of training: those of an evaluation, where there has been one, came later."""
    last = tmp_path / "run" / "last.pt"
    assert wait_until(lambda: last.exists() or process.poll() is not None, 120)
    assert process.poll() is None, process.stderr.read()
    assert wait_until(lambda: len(workers_of(process)) >= 2, 30), workers_of(process)
    return sorted(workers_of(process))[:2]


def nothing_is_left(process, seconds=20) -> bool:
    return wait_until(lambda: not session(process.pid), seconds)


@pytest.mark.slow
def test_a_run_ends_with_its_workers_when_an_image_is_damaged(start_torchvision, tmp_path):
    for split, count in (("train", 12), ("val", 2)):
        for number in range(count):
            path = tmp_path / split / f"class{number % 2}" / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((80, 80), 90).convert("RGB").save(path, "JPEG")
    path = tmp_path / "train" / "class1" / "5.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    folders = [f"--data.{split}_dataset={tmp_path}/{split}" for split in ("train", "val")]
    process = start_torchvision(*folders, "--training.batch_size=4")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    _, error, *_ = said.splitlines()  # after the line about the imports
    assert error.startswith("train_imagenet.py: sample 9 (") and str(path) in error
    assert nothing_is_left(process)


@pytest.mark.slow
def test_a_run_ends_with_its_workers_when_one_is_killed(start_torchvision, tmp_path):
    process = start_torchvision()
    os.kill(wait_for_workers(process, tmp_path)[0], signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "train_imagenet.py: a data worker ended with SIGKILL: if memory was too small" in said
    assert "Traceback" not in said
    assert nothing_is_left(process)


@pytest.mark.slow
def test_a_run_ends_with_its_workers_when_its_evaluation_fails(start_torchvision, tmp_path):
    code = """
import sys, runpy
from fast_imagenet.engine.metrics import Score
def fail(*_): raise RuntimeError("of the test")
Score.add = fail
sys.argv = sys.argv[2:]  # without the interpreter
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    process = start_torchvision(before=[sys.executable, "-c", code])
    said = process.communicate(timeout=90)[1]
    assert process.returncode == 1 and "RuntimeError: of the test" in said
    assert nothing_is_left(process)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["nothing", "workers", "server"])
def test_nothing_outlives_a_killed_run(start_torchvision, tmp_path, stopped):
    """Fork server, resource tracker and workers, even those that are stopped themselves."""
    process = start_torchvision()
    workers = wait_for_workers(process, tmp_path)
    assert len(session(process.pid)) >= 5, session(process.pid)
    server = [psutil.Process(workers[0]).ppid()]
    for number in {"nothing": [], "workers": workers, "server": server}[stopped]:
        os.kill(number, signal.SIGSTOP)
    process.kill()
    assert nothing_is_left(process), session(process.pid)


@pytest.mark.slow
def test_a_run_whose_workers_hang_ends_with_a_sentence_and_alone(start_torchvision, tmp_path):
    process = start_torchvision("--data.timeout=25")
    for worker in wait_for_workers(process, tmp_path):
        os.kill(worker, signal.SIGSTOP)
    said = process.communicate(timeout=90)[1]
    assert process.returncode == STALLED
    _, error, *_ = said.splitlines()  # after the line about the imports
    assert error.startswith("no batch came for 25 s: the disk, a worker or the loader hangs")
    assert "Traceback" not in said
    assert nothing_is_left(process), session(process.pid)


@pytest.mark.slow
def test_an_evaluation_alone_is_watched_too():
    code = """
import time, torch, train_imagenet
from types import SimpleNamespace
def batches(*view):
    yield torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    time.sleep(100)
loader = SimpleNamespace(batches=batches, close=print, num_classes=2, classes=None, num_samples=4)
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2))
network(torch.zeros(2, 3, 32, 32))
train_imagenet.build_loaders = lambda *_: (None, loader)
train_imagenet.bring_view = train_imagenet.check_classes = lambda *_: None
train_imagenet.build_model = lambda *_, **__: network
train_imagenet.try_evaluation = lambda *_: None
train_imagenet.main(train_imagenet.read_settings([
    "--training.eval_only=1", "--model.checkpoint=LICENSE", "--data.timeout=1.5",
    "--data.backend=ffcv", "--data.val_dataset=pyproject.toml", "--validation.resolution=32",
]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == STALLED, done.stderr
    assert "no batch came for 1.5 s" in done.stderr
    assert "and start the command again, or allow" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", ["2m", "20k"])
def test_a_full_shm_is_a_sentence(start_torchvision, size):
    """Room for the locks of the workers, not for their batches (2.4 MB each); or for no lock."""
    try:
        space = name_space()
    except CannotInject as error:
        pytest.skip(str(error))
    mount = ["sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]
    flags = ["--resolution.min_res=224", "--resolution.max_res=224", "--training.batch_size=16"]
    process = start_torchvision(*flags, before=[*space, *mount])
    said = process.communicate(timeout=90)[1]
    assert process.returncode == 1, said
    assert size == "20k" or "Traceback" not in said  # torch's own, ignored, where no lock fits
    assert "train_imagenet.py: the workers need 12.0 MB in /dev/shm and " in said
    assert "--shm-size=1g" in said and "or lower data.num_workers; resume with" in said
    assert nothing_is_left(process)


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
    assert "stopped by a signal to another rank, saved; resume with" in said[0]
    assert "stopped by SIGTERM, saved; resume with" in said[1]
    state = load_checkpoint(folder / "last.pt")
    assert len(state["losses"]) == state["step"]


def test_a_rank_that_dies_ends_the_other(two_ranks):
    trainers, _ = two_ranks
    trainers[1].send_signal(signal.SIGKILL)
    trainers[0].communicate(60)
    assert trainers[0].returncode == 1


@pytest.mark.slow
def test_ranks_leave_an_evaluation_together():
    """A signal to one of two: both stop before the same batch, though one has a batch more."""
    barrier, requests, ended = threading.Barrier(2, timeout=20), [0, 0], {}

    def rank(number, batches):
        def all_reduce_max(value):
            requests[number] = value
            barrier.wait()
            largest = max(requests)
            barrier.wait()
            return largest

        watch = SignalWatch()
        ranks = SimpleNamespace(world_size=2, all_reduce_max=all_reduce_max)
        watched = Watchdog(signals=watch).watch(range(1, batches), Consensus(ranks), common=40)
        seen = []
        try:
            for batch in watched:
                seen.append(batch)
                if number == 1 and batch == 14:
                    watch.received = "SIGTERM"
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
