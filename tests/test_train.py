"""The parts of train_imagenet.py, and short runs of the whole of it."""

import contextlib
import copy
import itertools
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import train_imagenet
from fast_imagenet.beton.reader import BetonFile, sidecar_path
from fast_imagenet.beton.writer import write_beton
from fast_imagenet.data.device_transforms import mix_keys
from fast_imagenet.engine import dry_run
from fast_imagenet.engine.checkpoint import load_checkpoint, save_checkpoint
from fast_imagenet.engine.distributed import Distributed, choose_precision
from fast_imagenet.engine.ema import WeightAverage
from fast_imagenet.engine.json_lines import read_jsonl
from fast_imagenet.engine.logger import LOG_KEYS
from fast_imagenet.engine.metrics import metric_keys, raw_keys
from fast_imagenet.engine.run import StepRecorder, data_wait_line
from fast_imagenet.engine.train_state import TrainState
from fast_imagenet.engine.weights import load_weights
from fast_imagenet.models.factory import (
    classification_layer,
    create_model,
    try_network,
    zero_init_residual,
)
from fast_imagenet.models.networks import ImageNetwork
from tests.conftest import ROOT, SMOKE, write_tiny
from tests.data.test_class_lists import HEADER_JSON_START
from tests.engine.test_optimizers import train_imagenet_settings
from tests.faults import Faulty
from tests.torture.training import differences

SMALL = "--model.arch=timm/test_resnet"


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read_losses(folder):
    lines = (folder / "steps.jsonl").read_text().splitlines()
    return [loss for line in lines for loss in json.loads(line)["losses"]]


# ── model ──


def test_names_choose_the_library():
    assert type(create_model("resnet18", 7)).__module__.startswith("torchvision")
    assert type(create_model("timm/resnet18", 7)).__module__.startswith("timm")
    assert type(create_model("resnet26d", 7)).__module__.startswith("timm")  # torchvision has none
    for arch in ("resnet18", "squeezenet1_0", "timm/resnetv2_50"):  # linear and convolution heads
        assert classification_layer(create_model(arch, 7), 7).weight.shape[0] == 7
    with pytest.raises(ValueError, match="model.arch=resnet51 is not"):
        create_model("resnet51", 7)
    with pytest.raises(ValueError, match="torchvision/resnet26d"):
        create_model("torchvision/resnet26d", 7)


def test_stochastic_depth_where_the_network_has_it():
    from timm.layers import DropPath

    model = create_model("timm/resnet18", 7, drop_path=0.1)
    assert any(isinstance(module, DropPath) for module in model.modules())
    with pytest.raises(ValueError, match="drop_path=0.1.*has no stochastic depth.*timm/resnet18"):
        create_model("resnet18", 7, drop_path=0.1)


@pytest.mark.parametrize("arch, blocks", [("resnet18", 8), ("resnet50", 16), ("timm/resnet50", 16)])
def test_zero_init_makes_every_block_start_as_the_identity(arch, blocks):
    model = create_model(arch, 3)
    assert zero_init_residual(model) == blocks
    block = next(m for m in model.modules() if hasattr(m, "downsample") and m.downsample is None)
    x = torch.randn(1, block.conv1.in_channels, 8, 8).relu()
    torch.testing.assert_close(block.eval()(x), x)


def test_networks_that_cannot_be_trained_are_refused_in_a_sentence():
    cases = [("vit_b_16", 32, 2, "32 px"),
             ("alexnet", 16, 2, "16 px"), ("resnet18", 32, 1, "1 images")]  # fmt: skip
    for arch, side, images, words in cases:
        with pytest.raises(ValueError, match=words):
            try_network(create_model(arch, 5).train(), [side], images)

    class Two(nn.Linear):
        def forward(self, images):
            return (images, images)

    with pytest.raises(ValueError, match="Two gives tuple, not one tensor"):
        try_network(Two(1, 5), [32], 2)
    model = create_model("resnet18", 5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not try_network(model, [32, 64], 2)
    assert try_network(create_model("timm/resnet18", 5, drop_path=0.1).train(), [32], 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_precision_follows_the_device():
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) is torch.float32
    assert choose_precision("bf16", cpu) is torch.bfloat16
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        choose_precision("fp16", cpu)


# ── step ──


def test_the_step_follows_the_schedule_and_accumulates_exactly():
    """Two micro-batches give the gradients of one whole batch on a network without batch norm."""
    torch.manual_seed(0)
    weights = torch.randn(3 * 4 * 4, 5)
    results = []
    for micro in (8, 4):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
        with torch.no_grad():
            model[1].weight.copy_(weights.T)
            model[1].bias.zero_()
        state = state_of(model, micro)
        torch.manual_seed(1)
        images = torch.randint(256, (8, 4, 4, 3), dtype=torch.uint8)
        batches = [(images, torch.arange(8) % 5, np.arange(8))] * 3
        recorder, rates = StepRecorder(first_step=6), {}
        record = recorder.after_step
        recorder.after_step = lambda step, loss, lr, images, rates=rates, record=record: (
            rates.update({step: lr}),
            record(step, loss, lr, images),
        )
        train_imagenet.train_epoch(state, batches, recorder)
        assert rates == pytest.approx({6: 2.0, 7: 2 + 1 / 3, 8: 2 + 2 / 3})
        assert recorder.images == 24
        results.append((torch.stack(recorder.losses), model[1].weight.detach().clone()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_each_forward_pass_has_its_key_of_the_mixing():
    state, keys = state_of(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), 2), []
    state.draw_at, prepare = mix_keys("pass", 1, 2), state.prepare
    state.prepare = lambda *batch: (keys.append(batch[4]), prepare(*batch))[1]
    batch = (torch.zeros(4, 4, 4, 3), torch.zeros(4, dtype=torch.int64), np.arange(4))
    train_imagenet.forward_backward(state, batch, 7)
    assert keys == [7 * 4 + 2, 7 * 4 + 3]  # of the second of two ranks, two passes each


def state_of(model, micro):
    return TrainState(
        *(model, model, model),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        ema=WeightAverage(model),
        loss=F.cross_entropy,
        prepare=lambda images, labels, samples, epoch, step: ((images / 255,), labels),
        autocast=lambda: torch.autocast("cpu", enabled=False),
        lr_at_epoch=lambda epoch: epoch,
        decay_at_step=lambda step: 0.0,
        seed_at_step=lambda step: step,
        steps_per_epoch=3,
        micro_batch=micro,
        clip_grad=1.0,
    )


# ── evaluation ──


def test_both_evaluations_are_scored():
    """A network that knows left from right: the flip changes the config eval only."""

    class LeftOrRight(nn.Module):
        def forward(self, images):
            left, right = images[..., 0].mean((1, 2)), images[..., -1].mean((1, 2))
            return torch.stack([left, right], 1) * torch.tensor([1.0, 1.0 - 1e-3])

    images = torch.zeros(4, 6, 6, 3, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 1])
    images[:2, :, 0] = images[2:, :, -1] = 255
    views = []

    def batches(resolution, crop_ratio):
        views.append((resolution, crop_ratio))
        yield images, labels

    v = dict(resolution=6, crop_ratio=1.0, plain_resolution=6, plain_crop_ratio=1.0, lr_tta=True)
    cfg = SimpleNamespace(validation=SimpleNamespace(**v))
    args = (ImageNetwork(LeftOrRight()), batches, cfg)
    autocast = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
    scores = train_imagenet.evaluate(*args, autocast, torch.device("cpu"))
    assert views == [(6, 1.0)]  # one pass serves both
    assert scores["standard"]["top1"] == 100
    assert scores["config"]["top1"] == 50  # both sides average to a near tie
    cfg.validation.plain_crop_ratio = 0.875
    train_imagenet.evaluate(*args, autocast, torch.device("cpu"))
    assert views[1:] == [(6, 0.875), (6, 1.0)]


def test_the_last_evaluation_is_in_fp32_and_of_both_weights(monkeypatch):
    seen = []

    class Network(nn.Linear):
        def forward(self, images):
            seen.append((super().forward(images).dtype, torch.backends.cudnn.allow_tf32))
            return images

    def evaluate(model, batches, cfg, autocast, device):
        with autocast():
            model(torch.zeros(1, 2))
        return {view: {"loss": 1.0, "top1": 2.0, "top5": 3.0} for view in ("standard", "config")}

    monkeypatch.setattr(train_imagenet, "evaluate", evaluate)
    bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
    compiled = torch.compile(Network(2, 2), backend=lambda *_: pytest.fail("compiled"))
    alone = Distributed(0, 1, 1, torch.device("cpu"))
    for decay, weights in ((0.0, 1), (0.9, 2)):
        ema = WeightAverage(nn.Linear(2, 2), enabled=decay > 0)
        cfg = SimpleNamespace(ema=SimpleNamespace(decay=decay))
        kept = dict(model=Network(2, 2), ema=ema, autocast=bf16)
        state = SimpleNamespace(**kept, eval_model=Network(2, 2))
        keys = train_imagenet.evaluate_both(state, None, cfg, alone, False).keys()
        assert keys >= {"ema_top1", "val_loss_ema"} and ("top1" in keys) == (weights == 1)
        assert seen == [(torch.bfloat16, True)]
        state = SimpleNamespace(**kept, eval_model=compiled)
        keys = train_imagenet.evaluate_both(state, None, cfg, alone, True).keys()
        assert keys == set(metric_keys()) and seen[1:] == [(torch.float32, False)] * weights
        seen.clear()


# ── whole runs ──


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_a_run_leaves_everything_it_promises(quick_run, backend, capsys):
    folder = quick_run(
        f"--data.backend={backend}", "--training.epochs=3", "--training.max_steps=0",
        "--lr.lr_peak_epoch=1", "--ema.decay=0.9", "--resolution.max_res=64",
        "--resolution.start_ramp=1", "--resolution.end_ramp=2", "--validation.lr_tta=true",
        "--validation.crop_ratio=1.0",
    )  # fmt: skip
    files = {path.name for path in folder.iterdir()}
    assert files >= {"config.json", "environment.json", "log.jsonl", "steps.jsonl", "last.pt",
                     "best.pt", "weights.safetensors", "weights.json", "curves.png"}  # fmt: skip
    log = read_log(folder)
    assert [line["epoch"] for line in log] == [1, 2, 3]
    assert [line["resolution"] for line in log] == [32, 32, 64]
    raw = set(raw_keys())  # evaluated at the end only, beside the EMA
    assert [raw & line.keys() for line in log] == [set(), set(), raw]
    assert {key for line in log for key in line} == set(LOG_KEYS)
    assert all(value is not None for line in log for value in line.values())
    assert len(read_losses(folder)) == 3 * (80 // 16)
    assert np.isfinite(read_losses(folder)).all()
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"{log[-1]['plain_top1']:.2f} %" in last_line and "EMA" in last_line
    state = load_checkpoint(folder / "last.pt")
    assert state["epoch"] == 3 and state["best"] == max(line["ema_top1"] for line in log)


def test_a_run_that_waits_for_data_says_so(quick_run, capsys):
    line = data_wait_line
    assert line(0.2, 99, 1) == "" == line(0.9, 19, 1)  # a short run waits for the loader's start
    cores = len(os.sched_getaffinity(0))
    for workers in (0, cores):
        assert "34% of the last epoch was waiting for data: write" in line(0.34, 20, workers)
    if cores > 1:
        assert "34% of the last epoch was waiting for data: raise" in line(0.34, 20, 1)
    folder = quick_run("--training.epochs=5", "--training.max_steps=0")  # 25 steps
    said, share = capsys.readouterr().out, read_log(folder)[-1]["data_wait_share"]
    assert said.count("waiting for data") == (share > 0.2)


def test_a_run_cut_by_max_steps_is_called_a_smoke_run(quick_run, capsys, tmp_path):
    folder = quick_run("--training.epochs=3", "--training.max_steps=4", folder=tmp_path / "cut")
    text = "a smoke run: 4 of 15 steps (training.max_steps)"
    assert f"; {text} after " in capsys.readouterr().out
    assert json.loads((folder / "summary.json").read_text())["cut_short"] == text
    folder = quick_run("--training.epochs=3", "--training.max_steps=15")
    assert "smoke run" not in capsys.readouterr().out
    assert "cut_short" not in json.loads((folder / "summary.json").read_text())


def test_final_weights_load_into_the_plain_network(quick_run, tiny_beton):
    from fast_imagenet.models.blurpool import apply_blurpool

    folder = quick_run("--training.max_steps=3", "--model.arch=resnet18")
    state, info = load_weights(folder / "weights.safetensors")
    model = torchvision.models.resnet18(num_classes=info["num_classes"])
    model.load_state_dict(state)
    assert info["use_blurpool"] is True and apply_blurpool(model) == 6


def test_resume_at_an_epoch_boundary_is_exact(quick_run, tmp_path):
    common = ["--data.backend=torchvision", "--training.epochs=2", "--lr.lr_peak_epoch=0.5",
              "--ema.decay=0.9", "--augment.mixup=0.2"]  # fmt: skip
    whole = quick_run(*common, "--training.max_steps=0", folder=tmp_path / "whole")
    parts = quick_run(*common, "--training.max_steps=7", folder=tmp_path / "parts")
    assert len(read_log(parts)) == 2  # the second epoch was cut: its line is written again
    quick_run(*common, "--training.max_steps=0", "--training.resume=auto", folder=parts)
    assert read_losses(parts) == read_losses(whole)
    first, second = (load_checkpoint(folder / "last.pt") for folder in (whole, parts))
    for key in ("model", "ema"):
        assert all(torch.equal(first[key][name], second[key][name]) for name in first[key]), key


@pytest.mark.slow
def test_evaluations_can_be_rarer(quick_run, tmp_path):
    common = ["--training.epochs=5", "--lr.lr_peak_epoch=1", "--training.max_steps=0"]
    often = quick_run(*common, folder=tmp_path / "often")
    rare = quick_run(*common, "--validation.every=3", folder=tmp_path / "rare")
    clocks = {"seconds", "total_seconds", "eval_seconds", "images_per_second", "data_wait_share"}
    clocks |= {"memory_gb"}

    def learnt(folder):
        lines = [{k: v for k, v in line.items() if k not in clocks} for line in read_log(folder)]
        return {line["epoch"]: line for line in lines}

    assert sorted(learnt(rare)) == [3, 5]
    assert all(learnt(rare)[epoch] == learnt(often)[epoch] for epoch in (3, 5))
    assert read_losses(rare) == read_losses(often) and len(read_losses(rare)) == 25
    first, last = read_log(rare)
    assert last["total_seconds"] > first["total_seconds"] + last["seconds"] + last["eval_seconds"]
    best = load_checkpoint(rare / "last.pt")["best"]
    assert best == max(line["top1"] for line in learnt(rare).values())
    # cut inside the second epoch, where none is due: the cut run has its end evaluated
    parts = quick_run(*common, "--validation.every=3", "--training.max_steps=8",
                      folder=tmp_path / "parts")  # fmt: skip
    assert sorted(learnt(parts)) == [2]
    quick_run(*common, "--validation.every=3", "--training.resume=auto", folder=parts)
    assert learnt(parts) == learnt(rare)


def test_resume_refuses_other_settings(quick_run, tmp_path):
    common = ["--data.backend=torchvision", "--training.epochs=3", "--training.max_steps=5"]
    folder = quick_run(*common, folder=tmp_path / "run")
    with pytest.raises(ValueError, match=r"lr.lr: 0.125 -> 0.5"):
        quick_run(*common, "--training.resume=auto", "--lr.lr=0.5", folder=folder)


def test_a_checkpoint_from_before_a_setting_was_there_is_resumed(quick_run, tmp_path):
    common = ["--data.backend=torchvision", "--training.epochs=2", "--lr.lr_peak_epoch=0.5"]
    folder = quick_run(*common, "--training.max_steps=5", folder=tmp_path / "run")
    state = load_checkpoint(folder / "last.pt")
    del state["config"]["training"]["norm_weight_decay"]
    save_checkpoint(folder / "last.pt", state)
    common += ["--training.max_steps=0", "--training.resume=auto"]
    with pytest.raises(ValueError, match=r"training.norm_weight_decay: 0.0 -> 0.1"):
        quick_run(*common, "--training.norm_weight_decay=0.1", folder=folder)
    quick_run(*common, folder=folder)
    assert read_log(folder)[-1]["epoch"] == 2


def test_resume_refuses_what_cannot_be_resumed(quick_run, tmp_path):
    common = ["--data.backend=torchvision", "--training.epochs=3", "--training.resume=auto"]
    folder = quick_run(*common, "--training.max_steps=10", folder=tmp_path / "run")
    config, state = (folder / "config.json").read_bytes(), load_checkpoint(folder / "last.pt")
    changes = {
        "other classes": {"data": {**state["data"], "classes": ["a", "b"]}},
        "fewer images": {"data": {**state["data"], "images": 7}},
        "no optimizer": {"optimizer": {}},
        "flat config": {"config": {"lr": 3}},
        "worded epoch": {"epoch": "two"},
    }
    for name, change in changes.items():
        torch.save({**state, **change}, folder / "last.pt")
        with pytest.raises(ValueError, match="last.pt"):
            quick_run(*common, "--training.max_steps=0", folder=folder)
        assert (folder / "config.json").read_bytes() == config, name
    torch.save(state["model"], folder / "last.pt")
    with pytest.raises(ValueError, match="not a checkpoint of a run: model, config"):
        quick_run(*common, folder=folder)
    (folder / "last.pt").unlink()
    with pytest.raises(ValueError, match="holds the log of a run and no last.pt"):
        quick_run(*common, folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_resume_refuses_other_images_of_the_same_classes(quick_run, tiny_beton, tmp_path, backend):
    data = tmp_path / "data"
    shutil.copytree(tiny_beton, data)
    common = [f"--data.train_dataset={data}/train.beton", f"--data.backend={backend}", SMALL]
    common += ["--training.resume=auto", "--training.epochs=3"]
    folder = quick_run(*common, "--training.max_steps=2", folder=tmp_path / "run")
    write_tiny(data, "--write.quality=60", "--write.overwrite=true")  # same labels, same order
    with pytest.raises(ValueError, match="last.pt was made with other settings .data.content: "):
        quick_run(*common, "--training.max_steps=4", folder=folder)
    state = load_checkpoint(folder / "last.pt")
    del state["data"]["content"]  # of an earlier version: nobody knows
    torch.save(state, folder / "last.pt")
    quick_run(*common, "--training.max_steps=4", folder=folder)
    assert load_checkpoint(folder / "last.pt")["step"] == 4


def test_training_from_weights_of_other_blurpool_is_refused(quick_run, tmp_path):
    folder = quick_run("--data.backend=torchvision", "--training.max_steps=5")
    flags = ["--data.backend=torchvision", "--training.use_blurpool=false"]
    for name in ("last.pt", "weights.safetensors"):
        with pytest.raises(ValueError, match=f"{name} was trained with use_blurpool=True"):
            quick_run(*flags, f"--model.checkpoint={folder}/{name}", folder=tmp_path / "other")


def test_a_loss_that_diverges_is_reported_and_never_saved(quick_run, tmp_path):
    flags = ["--data.backend=torchvision", "--lr.lr=1e30", "--lr.lr_peak_epoch=0"]
    with pytest.raises(ValueError, match="not finite from step 1 on; lower lr.lr"):
        quick_run(*flags, "--training.max_steps=5", folder=tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_finished_run_says_so(quick_run, capsys):
    flags = ("--data.backend=torchvision", "--training.epochs=1", "--lr.lr_peak_epoch=0")
    folder = quick_run(*flags, "--training.max_steps=0")
    before = (folder / "log.jsonl").read_bytes()
    quick_run(*flags, "--training.max_steps=0", "--training.resume=auto", folder=folder)
    assert "is finished, epoch 1: nothing to do" in capsys.readouterr().out
    assert (folder / "log.jsonl").read_bytes() == before


def test_a_finished_smoke_run_says_so_and_keeps_its_numbers(quick_run, capsys):
    flags = ["--data.backend=torchvision", "--training.epochs=3", "--training.resume=auto", SMALL]
    folder = quick_run(*flags, "--training.max_steps=7")
    names = ("log.jsonl", "summary.json", "last.pt")
    before = {name: (folder / name).read_bytes() for name in names}
    quick_run(*flags, "--training.max_steps=7", folder=folder)
    assert "is finished, training.max_steps=7: nothing to do" in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in names} == before
    lines = before["log.jsonl"].splitlines(keepends=True)
    (folder / "log.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed in writing
    (folder / "summary.json").unlink()
    with pytest.warns(UserWarning, match="incomplete .the process was killed. and is dropped"):
        quick_run(*flags, "--training.max_steps=7", folder=folder)
    assert read_log(folder)[-1]["top1"] == json.loads(lines[-1])["top1"]
    assert (folder / "summary.json").exists()
    quick_run(*flags, "--training.max_steps=9", folder=folder)
    assert load_checkpoint(folder / "last.pt")["step"] == 9 - 5


def test_a_second_run_in_the_same_folder_is_refused(quick_run, capsys):
    quick_run("--data.backend=torchvision")
    with pytest.raises(SystemExit) as stop:
        quick_run("--data.backend=torchvision")
    assert stop.value.code == 2 and "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ours", "torchvision", "timm"])
def test_eval_only_takes_a_file_of_any_maker(quick_run, tmp_path, capsys, kind):
    arch = "timm/resnet18" if kind == "timm" else "resnet18"
    if kind == "ours":
        few = ["--training.max_steps=2", f"--model.arch={arch}"]
        folder = quick_run("--data.backend=torchvision", *few)
        log, path = read_log(folder)[-1], folder / "weights.safetensors"
    else:
        path = tmp_path / "weights.pth"
        state = create_model(arch, 10).state_dict()
        torch.save({"state_dict": state} if kind == "timm" else state, path)
    blur = "true" if kind == "ours" else "false"
    quick_run("--data.backend=torchvision", "--training.eval_only=1", f"--model.arch={arch}",
              f"--model.checkpoint={path}", f"--training.use_blurpool={blur}")  # fmt: skip
    *_, standard, config, line = capsys.readouterr().out.strip().splitlines()
    assert "30 images" in line
    if kind == "ours":
        for row, view in ((standard, "plain_"), (config, "")):
            shown = [log[f"{view}{metric}"] for metric in ("top1", "top5")]
            assert [float(word) for word in row.split()[-5:-1:2]] == pytest.approx(shown, abs=0.005)
        assert float(standard.split()[-1]) == pytest.approx(log["val_loss"], abs=5e-5)


def test_an_evaluation_can_be_a_file(quick_run, tmp_path):
    """Both evaluations and every class; the classes' hits are those of all images."""
    path, out = tmp_path / "weights.pth", tmp_path / "evaluation.json"
    torch.save(create_model("timm/test_resnet", 10).state_dict(), path)
    quick_run("--data.backend=torchvision", "--training.eval_only=1", "--validation.lr_tta=1",
              f"--model.checkpoint={path}", f"--logging.eval_json={out}")  # fmt: skip
    found = json.loads(out.read_text())
    assert (found["images"], found["config"]["flip"], found["standard"]["flip"]) == (
        30,
        True,
        False,
    )
    assert [row["class"] for row in found["classes"]] == BetonFile(found["dataset"]).classes
    for view in ("standard", "config"):
        rows = [row[view] for row in found["classes"]]
        for key in ("top1", "top5"):
            hits = sum(row["images"] * row[key] for row in rows)
            assert hits / 30 == pytest.approx(found[view][key])


def test_weights_of_other_classes_are_refused(quick_run, monkeypatch, tiny_beton):
    """The same number of them in another order: every label would be wrong, and no size tells."""
    folder = quick_run("--data.backend=torchvision", "--training.max_steps=2", SMALL)
    info = json.loads((folder / "weights.json").read_text())
    info["classes"] = info["classes"][::-1]
    (folder / "weights.json").write_text(json.dumps(info))
    flags = ["--data.backend=torchvision", SMALL]
    flags.append(f"--model.checkpoint={folder}/weights.safetensors")
    for more in ([], ["--training.eval_only=1"]):
        with pytest.raises(ValueError, match="trained on other classes than .*: class 0 is .* t"):
            quick_run(*flags, *more, folder=folder.parent / "other")
    assert not (folder.parent / "other").exists()


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_two_files_of_other_classes_are_refused(quick_run, tmp_path, backend):
    def run_on(count):
        source, path = Faulty(), tmp_path / f"{count}.beton"
        source.classes = [f"other{number}" for number in range(count)]
        source.labels = np.arange(80) % count
        write_beton(path, source)
        flags = [f"--data.backend={backend}", f"--data.val_dataset={path}", SMALL]
        for _ in range(2):
            with pytest.raises(ValueError, match="have different classes .*; write both from one"):
                quick_run(*flags, folder=tmp_path / "refused")
            sidecar_path(path).unlink(missing_ok=True)  # then the header has a checksum
        with open(path, "r+b") as file:
            file.seek(HEADER_JSON_START)
            file.write(bytes(1024))  # without that, too, the labels decide
        return flags

    quick_run(*run_on(10))
    with pytest.raises(ValueError, match="12.beton have 10 and 12 classes; write both"):
        quick_run(*run_on(12), folder=tmp_path / "more")


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(tiny_beton, tmp_path):
    """Same global batch, same losses; batch norm sees 8 images at a time in both runs."""
    flags = [
        f"--config={SMOKE}", "--data.backend=torchvision", "--training.max_steps=0",
        "--training.epochs=2", "--lr.lr_peak_epoch=0.5", "--training.micro_batch_size=8",
        f"--data.train_dataset={tiny_beton}/train.beton", "--model.arch=resnet18",
        f"--data.val_dataset={tiny_beton}/val.beton",
    ]  # fmt: skip
    launch = {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    }
    for ranks, command in launch.items():
        folder = f"--logging.folder={tmp_path}/{ranks}"
        command = [*command, "train_imagenet.py", *flags, folder]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = read_losses(tmp_path / "1"), read_losses(tmp_path / "2")
    assert len(one) == 10
    np.testing.assert_allclose(two, one, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("terminal", "progress"), [(True, True), (True, False), (False, False)])
def test_accuracy_of_every_evaluated_epoch_is_a_line(tiny_beton, tmp_path, terminal, progress):
    """Beside the live bar; without one, so is every other epoch. Two of three are evaluated."""
    command = [
        *(
            sys.executable,
            "train_imagenet.py",
            f"--config={SMOKE}",
            "--model.arch=timm/test_resnet",
        ),
        *(f"--data.{split}_dataset={tiny_beton / f'{split}.beton'}" for split in ("train", "val")),
        *("--training.epochs=3", "--training.max_steps=0", "--lr.lr_peak_epoch=1"),
        *("--validation.every=2", f"--logging.folder={tmp_path / 'run'}"),
        f"--logging.progress={progress}",
    ]
    outer, inner = pty.openpty() if terminal else os.pipe()
    if terminal:  # else it has no columns, and the bar is empty
        termios.tcsetwinsize(inner, (24, 120))
    output = dict(stdout=inner, stderr=inner if terminal else subprocess.DEVNULL)
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **output):
        os.close(inner)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal whose last writer has ended
            while part := os.read(outer, 1 << 16):
                shown += part
    os.close(outer)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [2, 3]
    lines = re.split(r"[\r\n]+", shown.decode())
    lines = [line for line in lines if "px, loss" in line]
    has_bar = terminal and progress
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 2", "epoch 3"][has_bar:]
    assert has_bar or ("img/s" in lines[0] and "top-1" not in lines[0])
    assert (b", evaluating" in shown) == has_bar
    for line, record in zip(lines[-2:], log, strict=True):
        assert f"top-1 {record['plain_top1']:.2f} % standard eval, {record['top1']:.2f} %" in line


# ── a run that stands in no place of it ──

FORGED = {
    "step above the epoch's": {"step": 6, "losses": [1.0] * 6},
    "negative step": {"step": -1},
    "fractional step": {"step": 2.5},
    "epoch above the run's": {"epoch": 4},
    "negative epoch": {"epoch": -1},
    "steps of no epoch": {"epoch": 3},
    "worded epoch": {"epoch": "1"},
    "fewer losses": {"losses": [1.0]},
    "more losses": {"losses": [1.0] * 3},
    "losses that are none": {"losses": 2},
    "a loss of NaN": {"losses": [1.0, math.nan]},
    "a best of NaN": {"best": math.nan},
    "a best above 100": {"best": 100.5},
    "negative seconds": {"seconds": -1.0},
    "endless seconds": {"seconds": math.inf},
    "no time spent": {"spent": 0.0, "waited": 0.0},
    "more waited than spent": {"spent": 1.0, "waited": 2.0},
}


def forge_parts(state):
    """Checkpoints whose tensors or options are not those of the run."""

    def changed(part, change):
        forged = copy.deepcopy(state[part])
        change(forged)
        return {part: forged}

    def first(optimizer):
        return next(iter(optimizer["state"].values()))

    name = "conv1.0.weight"
    return {
        "EMA of another shape": changed("ema", lambda p: p.update({name: p[name][:1]})),
        "EMA of NaN": changed("ema", lambda p: p.update({name: p[name] * math.nan})),
        "EMA without a tensor": changed("ema", lambda p: p.pop(name)),
        "momentum of NaN": changed(
            "optimizer", lambda p: first(p)["momentum_buffer"].mul_(math.nan)
        ),
        "momentum of another shape": changed(
            "optimizer", lambda p: first(p).update(momentum_buffer=torch.zeros(1))
        ),
        "other decay": changed("optimizer", lambda p: p["param_groups"][0].update(weight_decay=9)),
        "other momentum": changed("optimizer", lambda p: p["param_groups"][1].update(momentum=0)),
    }


def test_a_forged_or_damaged_state_is_refused(quick_run, tmp_path):
    flags = ["--data.backend=torchvision", "--training.epochs=3", "--training.resume=auto", SMALL]
    folder = quick_run(*flags, "--training.max_steps=7", folder=tmp_path / "run")
    state, log = load_checkpoint(folder / "last.pt"), (folder / "log.jsonl").read_bytes()
    accepted = []
    for name, change in (FORGED | forge_parts(state)).items():
        torch.save({**state, **change}, folder / "last.pt")
        try:
            quick_run(*flags, "--training.max_steps=8", folder=folder)
            accepted.append(name)
        except ValueError as error:
            if "last.pt cannot be resumed from" not in str(error) or "\n" in str(error):
                accepted.append(f"{name}: {error}")
        except Exception as error:
            accepted.append(f"{name}: {error!r}")
        assert accepted or (folder / "log.jsonl").read_bytes() == log, name
    assert accepted == []
    torch.save(state, folder / "last.pt")
    quick_run(*flags, "--training.max_steps=8", folder=folder)
    assert load_checkpoint(folder / "last.pt")["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_resume_refuses_another_validation_file(quick_run, tiny_beton, tmp_path, backend):
    data = tmp_path / "data"
    shutil.copytree(tiny_beton, data)
    common = [f"--data.val_dataset={data}/val.beton", f"--data.backend={backend}", SMALL]
    common += ["--training.resume=auto", "--training.epochs=3"]
    folder = quick_run(*common, "--training.max_steps=2", folder=tmp_path / "run")
    (data / "val.beton").rename(data / "moved.beton")  # the same file elsewhere is no other one
    sidecar_path(data / "val.beton").rename(sidecar_path(data / "moved.beton"))
    moved = [*common, f"--data.val_dataset={data}/moved.beton"]
    quick_run(*moved, "--training.max_steps=3", folder=folder)
    write_tiny(data, "--write.quality=60", "--write.overwrite=true")  # same labels, same order
    with pytest.raises(ValueError, match=r"other settings .data.val_content: \w+ -> \w+.; restore"):
        quick_run(*common, "--training.max_steps=4", folder=folder)
    state = load_checkpoint(folder / "last.pt")
    for key in ("val_content", "val_images"):  # of an earlier version: nobody knows
        del state["data"][key]
    torch.save(state, folder / "last.pt")
    quick_run(*common, "--training.max_steps=4", folder=folder)
    assert load_checkpoint(folder / "last.pt")["step"] == 4


def change_class(data):
    for old, new in (("class0/0.png", "class1/0.png"), ("class1/1.png", "class0/1.png")):
        (data / old).rename(data / new)


def replace_image(data):
    Image.new("L", (9, 9), 7).save(data / "class0/2.png")


@pytest.mark.parametrize("split, key", [("train", "content"), ("val", "val_content")])
@pytest.mark.parametrize("change", [change_class, replace_image])
def test_resume_refuses_a_folder_whose_images_changed(quick_run, tmp_path, split, key, change):
    for place, number in itertools.product(("train", "val"), range(32)):
        file = tmp_path / f"data/{place}/class{number % 2}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number * 7, 0, 0)).save(file)
    common = ["--data.backend=torchvision", SMALL, "--training.resume=auto", "--training.epochs=3"]
    common += [f"--data.{place}_dataset={tmp_path}/data/{place}" for place in ("train", "val")]
    folder = quick_run(*common, "--training.max_steps=1", folder=tmp_path / "run")
    quick_run(*common, "--training.max_steps=2", folder=folder)
    change(tmp_path / "data" / split)
    with pytest.raises(ValueError, match=rf"other settings .data.{key}: \w+ -> \w+.; restore"):
        quick_run(*common, "--training.max_steps=3", folder=folder)


def test_the_end_of_a_run_in_another_folder_is_one_sentence(quick_run, tmp_path):
    flags = ["--data.backend=torchvision", "--training.epochs=1", "--lr.lr_peak_epoch=0", SMALL]
    folder = quick_run(*flags, "--training.max_steps=0", folder=tmp_path / "run")
    for name in ("best.pt", "last.pt"):
        resume = f"--training.resume={folder}/{name}"
        with pytest.raises(
            ValueError, match=f"{name} is where its run ended, epoch 1: there is no"
        ):
            quick_run(*flags, resume, "--training.max_steps=0", folder=tmp_path / "new")
        assert not (tmp_path / "new").exists()
    again = [*flags, f"--training.resume={folder}/last.pt", "--training.max_steps=0"]
    quick_run(*again, folder=folder)  # in its own folder there is nothing to do
    (folder / "log.jsonl").unlink()
    with pytest.raises(ValueError, match="without its log.jsonl: bring that back; .* model.check"):
        quick_run(*flags, "--training.resume=auto", "--training.max_steps=0", folder=folder)


# ── longer, in another folder, or not at all ──

WHOLE = ["--data.backend=torchvision", "--training.max_steps=0", "--ema.decay=0.9", SMALL]
DROPS = ["--lr.lr_schedule_type=step", "--lr.step_length=1", "--lr.lr_peak_epoch=0"]


def same_weights(one, two):
    first, second = (load_checkpoint(folder / "last.pt") for folder in (one, two))
    assert first["epoch"] == second["epoch"] and first["losses"] == second["losses"] == []
    for part in ("model", "ema"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])


def test_a_finished_run_is_made_longer_where_its_rates_stay(quick_run, tmp_path, capsys):
    once = quick_run(*WHOLE, *DROPS, "--training.epochs=3", folder=tmp_path / "once")
    more = ["--training.resume=auto", "--training.epochs=3"]
    parts = quick_run(*WHOLE, *DROPS, "--training.epochs=2", folder=tmp_path / "parts")
    assert quick_run(*WHOLE, *DROPS, *more, folder=parts)
    same_weights(once, parts)
    for name in ("log.jsonl", "steps.jsonl"):
        lines = [read_jsonl(folder / name) for folder in (once, parts)]
        assert [len(lines[0])] * 2 == list(map(len, lines))
    assert read_losses(once) == read_losses(parts)
    assert json.loads((parts / "summary.json").read_text())["epoch"] == 3
    with pytest.raises(ValueError, match="epochs: 3 -> 2, under which .*=step has other rates"):
        quick_run(*WHOLE, *DROPS, *more, "--training.epochs=2", folder=parts)


def test_a_schedule_that_ends_names_the_way_to_train_on(quick_run, tmp_path):
    flags = [*WHOLE, "--lr.lr_peak_epoch=0.5"]
    run = quick_run(*flags, "--training.epochs=1", folder=tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    longer = [*flags, "--training.epochs=2", "--training.resume=auto"]
    with pytest.raises(ValueError, match=f"linear has other .*model.checkpoint={run}/last.pt"):
        quick_run(*longer, folder=run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    begin = [*flags, f"--model.checkpoint={run}/last.pt", "--training.epochs=1"]
    assert (quick_run(*begin, folder=tmp_path / "next") / "summary.json").exists()


def test_a_run_that_has_ended_is_forked_from_its_best_checkpoint(quick_run, tmp_path, monkeypatch):
    flags = [*WHOLE, "--training.epochs=3"]
    scores = iter((50.0, 60.0, 40.0, 55.0))
    evaluate = train_imagenet.evaluate_both

    def worse_at_the_end(*arguments):
        return evaluate(*arguments) | {"ema_top1": next(scores)}

    monkeypatch.setattr(train_imagenet, "evaluate_both", worse_at_the_end)
    whole = quick_run(*flags, folder=tmp_path / "whole")
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert load_checkpoint(whole / "best.pt")["epoch"] == 2
    fork = [*flags, f"--training.resume={whole}/best.pt"]
    fork = quick_run(*fork, folder=tmp_path / "fork")
    same_weights(whole, fork)
    assert [line["epoch"] for line in read_jsonl(fork / "log.jsonl")] == [1, 2, 3]
    assert read_losses(fork) == read_losses(whole)
    assert load_checkpoint(fork / "best.pt")["best"] == 60.0  # it has not been better since
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


@pytest.mark.slow
def test_a_run_without_an_evaluation_so_far_is_kept(quick_run, tmp_path, monkeypatch, capsys):
    """It has checkpoints and no log: neither a new run nor a fork may take its folder."""
    flags = [*WHOLE, "--training.epochs=3", "--validation.every=3"]
    whole, train_epoch = quick_run(*flags, folder=tmp_path / "whole"), train_imagenet.train_epoch

    def killed_in_the_second(state, batches, run):
        if run.position.epoch == 1:
            raise RuntimeError("killed")
        train_epoch(state, batches, run)

    monkeypatch.setattr(train_imagenet, "train_epoch", killed_in_the_second)
    with pytest.raises(RuntimeError, match="killed"):
        quick_run(*flags, folder=tmp_path / "parts")
    parts, names = tmp_path / "parts", {"last.pt", "steps.jsonl", "config.json", "environment.json"}
    before = {path.name: path.read_bytes() for path in parts.iterdir()}
    assert before.keys() == names
    for more in ([], [f"--training.resume={whole}/best.pt"]):
        with pytest.raises(SystemExit):
            quick_run(*flags, *more, folder=parts)
        assert "already holds a run: add --training.resume=auto" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == before
    monkeypatch.setattr(train_imagenet, "train_epoch", train_epoch)
    quick_run(*flags, f"--training.resume={parts}/last.pt", folder=parts)
    assert differences(parts, whole) == []


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_a_dry_run_checks_and_leaves_nothing(quick_run, tmp_path, capsys, backend):
    flags = [f"--data.backend={backend}", "--training.max_steps=0", SMALL, "--dry-run"]
    folder = quick_run(*flags, folder=tmp_path / "runs" / "run")
    out = capsys.readouterr().out
    assert not folder.parent.exists() and "would run: timm/test_resnet" in out
    assert re.search(r"16 images of 32 px at a time take about \d+\.\d GB of \d+\.\d GB", out)


def test_a_dry_run_leaves_a_run_under_way_as_it_was(quick_run, tmp_path, capsys):
    flags = ["--training.resume=auto", "--training.epochs=3", SMALL]
    folder = quick_run(*flags, "--training.max_steps=3", folder=tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    quick_run(*flags, "--training.max_steps=0", "--dry-run", folder=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "resumes in epoch 1 after step 3" in capsys.readouterr().out


def test_a_dry_run_refuses_what_does_not_fit(quick_run, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "available_memory", lambda: 1_000_000)
    with pytest.raises(ValueError, match="of 0.0 GB; Lower training.micro_batch_size"):
        quick_run("--data.backend=torchvision", SMALL, "--dry-run", folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ── an epoch that is done is kept ──


def test_an_evaluation_that_fails_loses_no_epoch(quick_run, tmp_path, monkeypatch):
    flags = ["--training.epochs=3", "--training.max_steps=0", "--ema.decay=0.9", SMALL]
    whole = quick_run(*flags, folder=tmp_path / "whole")
    evaluate, calls = train_imagenet.evaluate, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:  # of the second epoch
            raise RuntimeError("evaluation failed")
        return evaluate(*arguments)

    monkeypatch.setattr(train_imagenet, "evaluate", failing)
    with pytest.raises(RuntimeError, match="evaluation failed"):
        quick_run(*flags, folder=tmp_path / "parts")
    state = load_checkpoint(tmp_path / "parts" / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 5) and len(read_log(tmp_path / "parts")) == 1
    quick_run(*flags, "--training.resume=auto", folder=tmp_path / "parts")
    assert differences(tmp_path / "parts", whole) == []
    assert len(read_log(tmp_path / "parts")) == 3


@pytest.mark.parametrize("killed_at", ["best.pt", "last.pt", "log.jsonl"])
def test_best_follows_the_log_wherever_a_run_is_killed(quick_run, tmp_path, monkeypatch, killed_at):
    """The second evaluation is the better one: killed in the writes after it, it still becomes
    best.pt."""
    from fast_imagenet.engine import logger as runlog
    from fast_imagenet.engine import run_state as runstate

    flags = ["--training.epochs=2", "--lr.lr_peak_epoch=1", "--training.max_steps=0", SMALL]
    scores = iter([10.0, 20.0, 20.0, 20.0])
    both = train_imagenet.evaluate_both
    monkeypatch.setattr(
        train_imagenet, "evaluate_both", lambda *a: both(*a) | {"ema_top1": next(scores)}
    )
    save, write = runstate.save_checkpoint, runlog.RunLog.write

    def dying_save(path, state):
        if path.name == killed_at and state["epoch"] == 2:
            raise KeyboardInterrupt
        save(path, state)

    def dying_write(log, **record):
        written = write(log, **record)
        if killed_at == "log.jsonl" and record["epoch"] == 2:
            raise KeyboardInterrupt
        return written

    monkeypatch.setattr(runstate, "save_checkpoint", dying_save)
    monkeypatch.setattr(runlog.RunLog, "write", dying_write)
    with pytest.raises(KeyboardInterrupt):
        quick_run(*flags, folder=tmp_path / "run")
    monkeypatch.setattr(runstate, "save_checkpoint", save)
    monkeypatch.setattr(runlog.RunLog, "write", write)
    quick_run(*flags, "--training.resume=auto", folder=tmp_path / "run")
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert (best["best"], best["epoch"]) == (20.0, 2)
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [1, 2]


# ── what cannot work is reported before the work ──

VIT = ["--model.arch=deit_tiny_patch16_224", "--training.use_blurpool=false"]


@pytest.mark.parametrize("sides", [(256, 224), (224, 256)])
def test_every_size_of_the_evaluation_is_tried_before_the_first_step(
    quick_run, tmp_path, monkeypatch, sides
):
    def no_step(*_):
        raise AssertionError("a step was done")

    flags = [
        *VIT,
        f"--validation.resolution={sides[0]}",
        f"--validation.plain_resolution={sides[1]}",
    ]
    flags += ["--resolution.min_res=224", "--resolution.max_res=224"]
    monkeypatch.setattr(train_imagenet, "forward_backward", no_step)
    with pytest.raises(ValueError, match="cannot be evaluated on 16 images of 256 px .*change val"):
        quick_run(*flags, folder=tmp_path / "run")
    path = tmp_path / "weights.pth"
    torch.save(create_model(VIT[0].partition("=")[2], 10).state_dict(), path)
    monkeypatch.setattr(train_imagenet, "evaluate", no_step)
    with pytest.raises(ValueError, match="cannot be evaluated on 16 images of 256 px"):
        quick_run(*flags, "--training.eval_only=1", f"--model.checkpoint={path}")


def test_the_batch_of_an_evaluation_is_no_larger_than_the_data(quick_run, tmp_path):
    quick_run(SMALL, "--validation.batch_size=1000000", "--training.max_steps=1")


def test_binary_loss_with_a_head_without_a_bias(monkeypatch):
    cfg = train_imagenet_settings("--model.arch=maxvit_t", "--training.loss=bce")
    model = train_imagenet.build_model(cfg, 5, torch.device("cpu"))
    assert classification_layer(model, 5).bias is None
    cfg = train_imagenet_settings("--model.arch=resnet18", "--training.loss=bce")
    bias = classification_layer(train_imagenet.build_model(cfg, 5, torch.device("cpu")), 5).bias
    torch.testing.assert_close(bias.detach(), torch.full((5,), -math.log(5)))
