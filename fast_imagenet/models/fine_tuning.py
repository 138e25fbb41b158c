"""Training from weights: what is taken of them, which parameters are held, and their rates."""

from __future__ import annotations

import fnmatch
from types import SimpleNamespace
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fast_imagenet.engine.weights import CheckpointError, load_into, plain_names
from fast_imagenet.models.factory import classification_layer


def head_of(model: nn.Module, num_classes: int) -> str:
    """Start of the names of the classifying layer's parameters, as in 'fc.'."""
    layer = classification_layer(model, num_classes)
    return next(name for name, module in model.named_modules() if module is layer) + "."


def take_weights(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    options: SimpleNamespace,
    num_classes: int,
    name: str,
) -> str:
    """Copy weights into a network: all of them, or the body where a new head is asked for.

    Args:
        model: with fresh weights.
        state: as load_weights returns it; names of a trainer's wrapper are found.
        options: section `model` of the settings.
        num_classes: of the data.
        name: of the weights, for messages.

    Returns:
        What was taken and what not, in words; '' for everything.
    Raises:
        CheckpointError: they do not fit; the network is unchanged.
    """
    wanted, head = model.state_dict(), head_of(model, num_classes)
    state, words = plain_names(state, wanted, options.use_ema)
    found = {key: value for key, value in state.items() if key.startswith(head)}
    if options.new_head:
        fresh = {key: value for key, value in wanted.items() if key.startswith(head)}
        body = {key: value for key, value in state.items() if key not in found}
        load_into(model, body | fresh)
        sizes = [f"{key} {tuple(value.shape)}" for key, value in found.items()]
        words.append(f"{len(body)} tensors taken, not {', '.join(sizes) or 'a head: it has none'}")
        words.append(f"new {', '.join(fresh)} for {num_classes} classes (model.new_head)")
        return f"{name}: {'; '.join(words)}"
    others = {len(v) for k, v in found.items() if k in wanted and v.shape != wanted[k].shape}
    if len(others) == 1:
        raise CheckpointError(
            f"{name} has {others.pop()} classes, and the data has {num_classes}: set "
            f"model.new_head=true to keep the body and draw a new head, or check the data and "
            f"model.arch"
        )
    load_into(model, state)
    return f"{name}: {'; '.join(words)}" if words else ""


class _Held:
    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


def freeze(model: nn.Module, what: str, num_classes: int) -> None:
    """Hold parameters at their values; a batch norm among them keeps its statistics, too.

    Args:
        model: before it is compiled and wrapped for several ranks.
        what: 'none', 'backbone' (all but the head), or patterns of names as in 'conv1.*,bn1.*'.
        num_classes: of the head.

    Raises:
        ValueError: a pattern fits no parameter, or nothing is left to train.
    """
    if what == "none":
        return
    names, patterns = [name for name, _ in model.named_parameters()], what.split(",")
    held = {name for one in patterns for name in fnmatch.filter(names, one.strip())}
    if what == "backbone":
        head = head_of(model, num_classes)
        held = {name for name in names if not name.startswith(head)}
    elif misses := [one for one in patterns if not fnmatch.filter(names, one.strip())]:
        raise ValueError(
            f"training.freeze={what}: no parameter is called {misses[0]}; they are {names[0]}, "
            f"{names[1]}, ...; write none, backbone or patterns as in {names[0].split('.')[0]}.*"
        )
    if len(held) == len(names):
        raise ValueError(f"training.freeze={what} leaves nothing to train; leave out the head")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in held)
    for module in model.modules():
        scale = getattr(module, "weight", None)
        if isinstance(module, _BatchNorm) and scale is not None and not scale.requires_grad:
            kind: Any = type(module)
            module.__class__ = type(f"Held{kind.__name__}", (_Held, kind), {})


def lr_scales(model: Any, lr: SimpleNamespace, num_classes: int) -> dict[str, float]:
    """Factor of the learning rate by name of the parameter, where it is not 1.

    Args:
        model: the raw network.
        lr: section `lr` of the settings: head_multiplier; layer_decay, which the last layer
            has to the power 0, the one before it to the power 1.
        num_classes: of the head.

    Raises:
        ValueError: timm does not say how the layers of the network are grouped.
    """
    names = [name for name, _ in model.named_parameters()]
    scales = dict.fromkeys(names, 1.0)
    if lr.layer_decay != 1:
        if not hasattr(model, "group_matcher"):
            raise ValueError(
                f"lr.layer_decay={lr.layer_decay} needs a network of timm, which groups its "
                f"layers, not {type(model).__name__}: write model.arch=timm/NAME, or leave it at 1"
            )
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        last = max(layers.values())
        scales = {name: lr.layer_decay ** (last - layers.get(name, last)) for name in names}
    if lr.head_multiplier != 1:
        head = head_of(model, num_classes)
        scales |= {n: scales[n] * lr.head_multiplier for n in names if n.startswith(head)}
    return {name: scale for name, scale in scales.items() if scale != 1}
