"""Optimizers by name, and which parameters decay."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def decay_groups(
    model: nn.Module,
    weight_decay: float,
    of_norms: float = 0.0,
    scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Two groups, each with its decay: weights of convolution and linear layers; norms and biases.

    By module type: ffcv-imagenet looks for 'bn' in the name and so decays downsample.1 as well.
    Frozen parameters are in none.

    Args:
        scales: factor of the learning rate by parameter, where it is not 1: groups of their own,
            which hold it as `lr_scale`.
    """
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, layers)}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = id(parameter) in decayed, (scales or {}).get(name, 1.0)
            groups.setdefault(kind, []).append(parameter)
    decays = {True: weight_decay, False: of_norms}
    return [
        {"params": params, "weight_decay": decays[kind]} | ({"lr_scale": x} if x != 1 else {})
        for (kind, x), params in groups.items()
    ]


def build_optimizer(
    options: SimpleNamespace, model: nn.Module, scales: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """SGD in one fused call, or any optimizer that timm names; each step sets the rate.

    Args:
        options: section `training` of the settings.
        model: the raw network.
        scales: as decay_groups.

    Raises:
        ValueError: timm does not know the name, or it needs second derivatives.
    """
    groups = decay_groups(model, options.weight_decay, options.norm_weight_decay, scales)
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=0.0, momentum=options.momentum, nesterov=options.nesterov, fused=True
        )
    from timm.optim import create_optimizer_v2, list_optimizers

    name = options.optimizer
    if name not in list_optimizers():
        raise ValueError(f"training.optimizer={name} is not known to timm; try sgd, lamb or adamw")
    known: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "momentum": options.momentum}
    optimizer = create_optimizer_v2(groups, opt=name, **known)
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(
            f"training.optimizer={name} needs second derivatives, which the step does not take; "
            f"try sgd, lamb or adamw"
        )
    return optimizer
