"""Optimizers by name, and what decays."""

import pytest

import train_imagenet
from fast_imagenet.config import read_config
from fast_imagenet.engine.optimizers import build_optimizer, decay_groups
from fast_imagenet.models.blurpool import apply_blurpool
from fast_imagenet.models.factory import create_model


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
