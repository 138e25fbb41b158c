"""A run that is stopped, killed or resumed: what is saved, and what is printed."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_imagenet
from fast_imagenet.config import interpreter
from fast_imagenet.engine import logger
from fast_imagenet.engine import run as run_module
from fast_imagenet.engine.checkpoint import load_checkpoint
from fast_imagenet.engine.distributed import Distributed
from fast_imagenet.engine.finite import mean_losses
from fast_imagenet.engine.json_lines import read_jsonl
from fast_imagenet.engine.progress import Progress
from fast_imagenet.engine.run import StepMonitor
from fast_imagenet.engine.signals import SignalWatch, Stopped
from fast_imagenet.models import networks
from fast_imagenet.program import STOPPED
from tests.conftest import ROOT, SMOKE
from tests.torture.training import differences
from tools.report.records import read_run

EVERYTHING = [
    "--training.epochs=2", "--lr.lr_peak_epoch=0.5", "--training.max_steps=0", "--ema.decay=0.9",
    "--resolution.max_res=64", "--resolution.end_ramp=1", "--augment.mixup=0.2",
    "--augment.cutmix=1", "--augment.erasing=0.5", "--augment.erasing_mode=pixel",
    "--augment.policy=rand_augment_lite", "--augment.brightness=0.4", "--augment.saturation=0.4",
    "--augment.repeats=2", "--augment.flip_mode=alternating", "--augment.mix_by=pass",
    "--ema.every=3",
    "--model.arch=timm/test_resnet", "--model.drop_path=0.2", "--training.seed=5",
]  # fmt: skip
SMALL = "--model.arch=timm/test_resnet"  # a checkpoint of 134 MB takes longer than ten steps
STEPS = 10  # 2 epochs of 80 // 16 steps


pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_run(folder, whole):
    """Weights, average, optimizer state, losses and log agree to the last bit."""
    assert differences(folder, whole) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_a_run_restarted_at_every_step_is_the_uninterrupted_run(quick_run, tmp_path, backend):
    flags = [*EVERYTHING, f"--data.backend={backend}"]
    whole = quick_run(*flags, folder=tmp_path / "whole")
    for step in range(1, STEPS + 1):
        more = [f"--training.max_steps={step}", "--training.resume=auto"]
        quick_run(*flags, *more, folder=tmp_path / "parts")
    assert_same_run(tmp_path / "parts", whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_the_step_and_the_run_goes_on(quick_run, tmp_path, monkeypatch, name):
    flags = [*EVERYTHING, "--training.resume=auto"]
    whole = quick_run(*flags, folder=tmp_path / "whole")
    show = Progress.step

    def interrupt(bar, step, *values):
        if step == 6:
            signal.raise_signal(signal.Signals[name])
        show(bar, step, *values)

    monkeypatch.setattr(Progress, "step", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=name):
        quick_run(*flags, folder=tmp_path / "parts")
    assert signal.getsignal(signal.SIGTERM) is before
    state = load_checkpoint(tmp_path / "parts" / "last.pt")
    assert (state["epoch"], state["step"], len(state["losses"])) == (1, 2, 2)
    monkeypatch.setattr(Progress, "step", show)
    quick_run(*flags, folder=tmp_path / "parts")
    assert_same_run(tmp_path / "parts", whole)


@pytest.mark.slow
def test_a_signal_in_evaluation_does_not_wait_for_its_end(quick_run, tmp_path, monkeypatch):
    whole = quick_run(*EVERYTHING, folder=tmp_path / "whole")
    normalize, calls = networks.normalize_and_mix, []

    def interrupt(*arguments):
        if not torch.is_grad_enabled():
            calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return normalize(*arguments)

    monkeypatch.setattr(networks, "normalize_and_mix", interrupt)
    with pytest.raises(Stopped):
        quick_run(*EVERYTHING, folder=tmp_path / "parts")
    assert len(calls) == 1
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 5
    assert not (tmp_path / "parts" / "log.jsonl").exists()
    state = load_checkpoint(tmp_path / "parts" / "last.pt")
    quick_run(*EVERYTHING, "--training.resume=auto", folder=tmp_path / "parts")
    assert_same_run(tmp_path / "parts", whole)
    # the epoch whose steps the first process did is logged with that one's clock
    first, again = (read_run(folder) for folder in (whole, tmp_path / "parts"))
    assert again.images_per_epoch == first.images_per_epoch == 80
    log = again.log[0]
    assert state["spent"] > 0 and log["seconds"] == pytest.approx(state["spent"], rel=0.5)
    waited = log["data_wait_share"] * log["seconds"]
    assert state["waited"] > 0 and waited == pytest.approx(state["waited"], rel=0.5)


FORMAT_1 = {  # keys of a checkpoint before it had a format; the first ones had no info and waited
    *("model", "ema", "optimizer", "scaler", "config", "data", "info"),
    *("epoch", "step", "losses", "spent", "waited", "best", "seconds"),
}


@pytest.mark.slow
@pytest.mark.parametrize("missing", [[], ["waited"], ["waited", "info"]])
def test_a_checkpoint_of_an_older_format_is_resumed(quick_run, tmp_path, missing):
    folder = quick_run(*EVERYTHING, "--training.max_steps=7")
    whole = quick_run(*EVERYTHING, folder=tmp_path / "whole")
    state = load_checkpoint(folder / "last.pt")
    assert state.pop("format") == 2 and state.keys() == FORMAT_1
    torch.save({k: v for k, v in state.items() if k not in missing}, folder / "last.pt")
    quick_run(*EVERYTHING, "--training.resume=auto", folder=folder)
    assert_same_run(folder, whole)


def test_a_checkpoint_of_a_newer_format_is_refused_by_name(quick_run):
    flags = [SMALL, "--training.epochs=2", "--lr.lr_peak_epoch=1"]
    folder = quick_run(*flags)
    state = load_checkpoint(folder / "last.pt")
    for version in (3, True, torch.zeros(3)):
        torch.save({**state, "format": version}, folder / "last.pt")
        with pytest.raises(ValueError, match=r"last.pt has format .*, and this .* reads 1 to 2"):
            quick_run(*flags, "--training.resume=auto", folder=folder)


def run_flags(tiny_beton, folder, *flags):
    return [f"--config={SMOKE}", *EVERYTHING, "--training.resume=auto",
            f"--data.train_dataset={tiny_beton}/train.beton",
            f"--data.val_dataset={tiny_beton}/val.beton", f"--logging.folder={folder}",
            *flags]  # fmt: skip


def start_run(tiny_beton, folder, *flags, **options):
    options = {"stderr": subprocess.PIPE} | options
    return subprocess.Popen(
        [sys.executable, "train_imagenet.py", *run_flags(tiny_beton, folder, *flags)],
        cwd=ROOT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # below nohup or a background shell, Ctrl-C would be ignored by inheritance
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def finish(process):
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said


def wait_for(path, process):
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_and_a_signal_in_one_life(tiny_beton, tmp_path):
    """The command as a user runs it: killed, stopped, and run again to its end."""
    often = ["--training.checkpoint_minutes=0.0001"]
    folder = tmp_path / "run"
    process = start_run(tiny_beton, folder, *often)
    wait_for(folder / "last.pt", process)
    process.kill()
    process.communicate()
    (folder / "environment.json").unlink(missing_ok=True)  # written again when the second life runs
    process = start_run(tiny_beton, folder, *often)
    wait_for(folder / "environment.json", process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (STOPPED, 0), said  # 0: it had just finished
    if process.returncode == STOPPED:
        assert f"saved; resume with {interpreter()} train_imagenet.py --config=" in said
        assert said.count("--training.resume=auto") == 1
        finish(start_run(tiny_beton, folder))
    finish(start_run(tiny_beton, tmp_path / "whole"))
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_the_whole_group_is_not_for_the_workers(tiny_beton, tmp_path):
    folder = tmp_path / "run"
    flags = ["--data.backend=torchvision", "--training.checkpoint_minutes=0.0001"]
    # it must not be over before the signal comes
    flags += ["--training.epochs=500", "--model.arch=timm/resnet18"]
    process = start_run(tiny_beton, folder, *flags, start_new_session=True)
    wait_for(folder / "last.pt", process)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == STOPPED, said


def test_a_tracker_gets_images_once_and_values_when_losses_are_read(quick_run, monkeypatch):
    shown, values, read = [], [], []

    class Listed(logger.Tracker):
        def log(self, new, step):
            values.append((step, new))

        def show(self, grid_hwc):
            shown.append((grid_hwc.shape, list(read)))

        def finish(self, summary):
            values.append(summary["epoch"])

    def reading(losses, *rest):
        read.append(len(losses))
        return mean_losses(losses, *rest)

    monkeypatch.setattr(logger, "SINKS", (*logger.SINKS, Listed))
    monkeypatch.setattr(run_module, "FINITE_STEPS", 2)
    monkeypatch.setattr(run_module, "mean_losses", reading)
    flags = [SMALL, "--training.epochs=2", "--lr.lr_peak_epoch=1", "--training.max_steps=0"]
    folder = quick_run(*flags)
    losses = [loss for line in read_jsonl(folder / "steps.jsonl") for loss in line["losses"]]
    *scalars, epochs = values
    steps = [step for step, new in scalars if "train/loss" in new]
    assert (len(losses), steps, epochs) == (STEPS, [2, 4, 5, 6, 8, 10], 2)
    assert read == [2, 4, 5, 1, 3, 5, 5]  # no loss is read for the tracker alone
    assert shown == [((128, 128, 3), [2])]
    found = {step: new for step, new in scalars if "train/loss" in new}
    assert found[2]["train/loss"] == pytest.approx(np.mean(losses[:2]))
    assert found[8]["train/loss"] == pytest.approx(np.mean(losses[6:8]))
    assert set(found[2]) == {"train/loss", "train/lr", "train/images_per_second"}
    assert [step for step, new in scalars if "val/top1" in new] == [5, 10]


def monitor_of(saved, received="", minutes=0.0):
    signals = SignalWatch()
    signals.received = received
    alone = Distributed(rank=0, world_size=1, ranks_on_node=1, device=torch.device("cpu"))
    return StepMonitor(signals, alone, minutes, saved.append)


def test_a_wild_loss_is_reported_within_fifty_steps_and_never_saved():
    saved, losses = [], []
    monitor = monitor_of(saved)
    for step in range(100, 149):
        losses.append(torch.tensor(float("nan") if step == 117 else 1.0))
        monitor(step + 1, losses)
    with pytest.raises(ValueError, match="not finite from step 117 on; lower lr.lr"):
        monitor(150, [*losses, torch.tensor(1.0)])
    assert not saved
    with pytest.raises(ValueError, match="step 7 on"):  # nor on request
        monitor_of(saved, "SIGTERM")(8, [torch.tensor(float("inf"))])
    assert not saved


def test_weights_that_are_not_finite_are_never_saved(quick_run, tmp_path, monkeypatch):
    """A step of finite loss may leave them: the checkpoint before it stays, and is named."""
    flags = ["--training.epochs=3", "--training.resume=auto", "--lr.lr_peak_epoch=0", SMALL]
    folder = quick_run(*flags, "--training.max_steps=7", folder=tmp_path / "run")
    before, take = (folder / "last.pt").read_bytes(), train_imagenet.forward_backward

    def spoil(state, batch, step):
        loss = take(state, batch, step)
        if step == 8:
            next(state.model.parameters()).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(train_imagenet, "forward_backward", spoil)
    said = r"conv1.* is not finite in epoch 2 after 4 steps of it; lower lr.lr.*; the last good "
    with pytest.raises(ValueError, match=rf"{said}checkpoint, .*last.pt, is unchanged"):
        quick_run(*flags, "--training.max_steps=9", folder=folder)
    assert (folder / "last.pt").read_bytes() == before
    with pytest.raises(ValueError, match="the loss is not finite from step 9 on; lower lr.lr.*las"):
        quick_run(*flags, "--training.max_steps=0", folder=folder)
    assert (folder / "last.pt").read_bytes() == before


def test_checkpoints_come_by_the_clock(monkeypatch):
    now, saved, losses = [0.0], [], []
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monitor = monitor_of(saved, minutes=10)
    for step in range(6):
        losses.append(torch.tensor(float(step)))
        now[0] += 240.0
        monitor(step + 1, losses)
    assert [len(saved_losses) for saved_losses in saved] == [3, 6]
    never = monitor_of(saved, minutes=0)
    now[0] += 1e9
    never(7, losses)
    assert len(saved) == 2


def test_a_run_killed_before_its_final_weights_leaves_them_on_resume(quick_run, capsys):
    flags = ["--training.epochs=1", "--lr.lr_peak_epoch=0", "--training.max_steps=0", SMALL]
    folder = quick_run(*flags)
    weights, summary = (
        (folder / name).read_bytes() for name in ("weights.safetensors", "summary.json")
    )
    for name in ("weights.safetensors", "summary.json", "curves.png"):
        (folder / name).unlink()
    quick_run(*flags, "--training.resume=auto", folder=folder)
    assert (folder / "weights.safetensors").read_bytes() == weights
    assert (folder / "summary.json").read_bytes() == summary
    assert (folder / "curves.png").exists()


def test_a_run_says_what_it_does_and_where_it_goes_on(quick_run, capsys):
    flags = ["--training.epochs=2", "--training.resume=auto", "--lr.lr_peak_epoch=1", SMALL]
    folder = quick_run(*flags, "--training.max_steps=7")
    said = capsys.readouterr().out
    assert "on cpu: 80 images of 10 classes, 30 to evaluate; 2 epochs of 5 steps" in said
    assert "resumes" not in said
    quick_run(*flags, "--training.max_steps=0", folder=folder)
    assert "; resumes in epoch 2 after step 2\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_what_it_says(tiny_beton, tmp_path):
    process = start_run(tiny_beton, tmp_path, "--training.max_steps=2", stdout=subprocess.PIPE)
    process.stdout.close()
    finish(process)
    assert (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_a_run_outlives_its_terminal(tiny_beton, tmp_path):
    reader, terminal = os.openpty()
    process = start_run(
        tiny_beton, tmp_path, "--training.max_steps=2", stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    os.close(reader)
    assert process.wait(120) == 0
    assert (tmp_path / "summary.json").exists()
