"""Optimizers by name, and what decays."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from torch import nn

import train_imagenet
from fast_imagenet.config import read_config
from fast_imagenet.data.augmentation import IMAGENET
from fast_imagenet.data.device_transforms import BatchTransforms
from fast_imagenet.engine.distributed import Distributed
from fast_imagenet.engine.optimizers import build_optimizer, decay_groups
from fast_imagenet.models.blurpool import apply_blurpool
from fast_imagenet.models.factory import create_model
from fast_imagenet.models.networks import build_networks


def train_imagenet_settings(*flags):
    """Settings without looking for files."""
    return read_config(train_imagenet.SETTINGS, list(flags), prog="test", description="")


def test_decay_touches_weights_of_convolution_and_linear_layers_only():
    model = create_model("resnet18", 10)
    decayed, free = decay_groups(model, 1e-4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_decay = {names[id(parameter)] for parameter in decayed["params"]}
    expected = {name for name, p in model.named_parameters() if p.ndim > 1}  # holds for a ResNet
    assert in_decay == expected and decayed["weight_decay"] == 1e-4
    # the shortcut's norm, which a search for 'bn' in the name would have decayed
    assert "layer2.0.downsample.1.weight" not in in_decay and free["weight_decay"] == 0
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_decay_groups_survive_blurpool():
    model = create_model("resnet18", 10)
    before = len(decay_groups(model, 1e-4)[0]["params"])
    apply_blurpool(model)
    assert len(decay_groups(model, 1e-4)[0]["params"]) == before


def test_norms_can_decay_too():
    cfg = train_imagenet_settings("--training.norm_weight_decay=2e-5")
    optimizer = build_optimizer(cfg.training, create_model("resnet18", 10))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 2e-5]


@pytest.mark.parametrize("name", ["sgd", "lamb", "adamw"])
def test_optimizers_by_name_keep_the_groups(name):
    cfg = train_imagenet_settings(f"--training.optimizer={name}")
    optimizer = build_optimizer(cfg.training, create_model("resnet18", 10))
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 1e-4]


def test_unknown_optimizer_is_named():
    cfg = train_imagenet_settings("--training.optimizer=sgdd")
    with pytest.raises(ValueError, match="training.optimizer=sgdd"):
        build_optimizer(cfg.training, create_model("resnet18", 10))


@pytest.mark.parametrize("norm", [nn.Identity, partial(nn.BatchNorm2d, 8)])
def test_lamb_by_micro_batches_is_that_of_timm_on_one_batch(norm):
    """The settings of ResNet Strikes Back; batch norm sees one micro-batch at a time."""
    flags = ["--training.optimizer=lamb", "--training.loss=bce_mean"]
    flags += ["--training.weight_decay=0.02", "--training.label_smoothing=0", "--lr.lr=0.16"]
    flags += ["--training.bce_threshold=0.2", "--training.batch_size=8"]
    flags += ["--training.micro_batch_size=4", "--lr.lr_peak_epoch=0", "--lr.step_length=99"]
    cfg = train_imagenet_settings(*flags, "--lr.lr_schedule_type=step", "--augment.mixup=0.1")
    torch.manual_seed(0)
    # before a batch norm the gradient of a bias is rounding, which LAMB scales up
    conv = nn.Conv2d(3, 8, 3, bias=norm is nn.Identity)
    ours = nn.Sequential(conv, norm(), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    timms = copy.deepcopy(ours)
    optimizer = create_optimizer_v2(timms, opt="lamb", lr=0.16 * 8 / 256, weight_decay=0.02)
    one = Distributed(0, 1, 1, torch.device("cpu"))
    state = train_imagenet.build_state(cfg, build_networks(ours, one, "off"), 5, 100, one)
    prepare = BatchTransforms(train_imagenet.augment_of(cfg), *IMAGENET, 5, 0.0, seed=0)
    loss = BinaryCrossEntropy(0.0, 0.2)
    for step in range(4):
        images, labels = torch.randint(256, (8, 8, 8, 3), dtype=torch.uint8), torch.arange(8) % 5
        train_imagenet.train_step(state, (images, labels, np.arange(8)), step)
        images_bchw, targets = prepare(images, labels, None, 0, step)
        parts = [images_bchw] if norm is nn.Identity else images_bchw.split(4)
        optimizer.zero_grad()
        loss(torch.cat([timms(part) for part in parts]), targets).backward()
        optimizer.step()
    for found, expected in zip(
        ours.state_dict().values(), timms.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
