"""A training run without memory or without disk space: what is kept, and what is said."""

import resource
import runpy
import signal
import sys

import pytest
import torch

from fast_imagenet import models
from fast_imagenet.checkpoint import CheckpointError, load_checkpoint
from fast_imagenet.guard import SIGNALS
from tests.conftest import ROOT, SMOKE

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_full_disk_keeps_the_previous_checkpoint_and_says_so(quick_run):
    """Under a limit on the size of files, as when a disk is full in the middle of a write."""
    flags = ["--training.epochs=1", "--lr.lr_peak_epoch=0"]
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


def test_out_of_memory_says_which_setting_to_lower(tiny_beton, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(models, "try_network", full)
    flags = [f"--config={SMOKE}", "--model.arch=resnet18", f"--logging.folder={tmp_path}/run"]
    flags += [f"--data.{s}_dataset={tiny_beton}/{s}.beton" for s in ("train", "val")]
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *flags, "--training.epochs=3"])
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "train_imagenet.py"), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.value.code == (
        "train_imagenet.py: CUDA out of memory. Tried to allocate 20.00 GiB.\n"
        "Lower training.micro_batch_size (images per forward pass) or validation.batch_size"
    )
