"""Data and settings that several tests share: a tiny pair of .beton files, and a quick run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several test processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "tests" / "smoke.yaml"
sys.path.insert(0, str(ROOT))
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # below nohup: programs under test inherit it
    signal.signal(signal.SIGHUP, lambda *_: None)  # this process survives a hang-up, they do not


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder with imagenette/ and imagenet_samples/: real photographs, not in the repository."""
    folder = os.environ.get("FAST_IMAGENET_PHOTOS", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FAST_IMAGENET_PHOTOS names no folder of photographs")
    return Path(folder)


@pytest.fixture
def one_thread():
    """Two threads would wait for each other at every layer of a tiny network."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_beton(tmp_path_factory) -> Path:
    """Folder with train.beton (80 synthetic images) and val.beton (30), ten classes."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def write_tiny(folder: Path, *flags: str) -> Path:
    """Write train.beton (80 synthetic images) and val.beton (30), ten classes, to a folder."""
    for split, count in (("train", 80), ("val", 30)):
        command = [sys.executable, "write_dataset.py", "--source.kind=synthetic"]
        command += [f"--source.split={split}", f"--write.limit={count}", f"--write.folder={folder}"]
        command += flags
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def quick_run(tiny_beton, tmp_path):
    """Train in this process on the tiny data: quick_run(*flags, config=None) -> the run's folder.

    Later flags win over the smoke overlay; `folder` defaults to a new one.
    """
    import train_imagenet

    def run(*flags: str, config: str | None = None, folder: Path | None = None) -> Path:
        folder = folder or tmp_path / "run"
        argv = [f"--config={name}" for name in (config, SMOKE) if name]
        argv += [] if config else ["--model.arch=timm/test_resnet"]
        argv += [
            f"--data.{split}_dataset={tiny_beton / f'{split}.beton'}" for split in ("train", "val")
        ]
        train_imagenet.main(
            train_imagenet.read_settings([*argv, f"--logging.folder={folder}", *flags])
        )
        return folder

    return run
