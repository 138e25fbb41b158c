"""Networks by name, and what is done to one before it is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import nn
from torch._subclasses import fake_tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from fast_imagenet.engine.train_state import Autocast, Batch, TrainState
from fast_imagenet.models.networks import is_compiled
from fast_imagenet.terminal import announce


def create_model(arch: str, num_classes: int, drop_path: float = 0.0) -> nn.Module:
    """A classifier by name, with fresh weights: torchvision's if it has one, else timm's.

    Args:
        arch: name such as resnet50; torchvision/resnet50 or timm/resnet50 forces the library.
        num_classes: outputs of the last layer.
        drop_path: stochastic depth, 0 <= p < 1.

    Raises:
        ValueError: neither library knows the name, or the network has no stochastic depth.
    """
    library, _, name = arch.rpartition("/")
    known = torchvision.models.list_models(torchvision.models)
    if library in ("", "torchvision") and name in known:
        make, option = torchvision.models.get_model, "stochastic_depth_prob"
    elif library in ("", "timm") and timm.is_model(name):
        make, option = timm.create_model, "drop_path_rate"
    else:
        raise ValueError(
            f"model.arch={arch} is not a torchvision or timm classifier; check the name in "
            f"torchvision.models.list_models() or timm.list_models()"
        )
    if not drop_path:
        return make(name, num_classes=num_classes)
    try:
        return make(name, num_classes=num_classes, **{option: drop_path})
    except TypeError as error:
        raise ValueError(
            f"model.drop_path={drop_path} but {arch} has no stochastic depth; use 0, or timm/{name}"
        ) from error


def zero_init_residual(model: nn.Module) -> int:
    """Zero the scale of the last norm of every residual block: each block starts as the identity.

    Returns:
        How many blocks were found; 0 for a network without ResNet blocks.

    Source: Goyal et al., "Accurate, Large Minibatch SGD" (arXiv 1706.02677), section 5.1.
    """
    count = 0
    for block in model.modules():
        last = getattr(block, "bn3", getattr(block, "bn2", None))
        scale = getattr(last, "weight", None)
        if hasattr(block, "downsample") and isinstance(scale, nn.Parameter):
            nn.init.zeros_(scale)
            count += 1
    return count


def init_mosaic(model: nn.Module) -> None:
    """MosaicML's start: Kaiming normal by inputs, scales of batch norms uniform from 0 to 1.

    Draws from torch's generator.

    Source: examples/benchmarks/resnet_imagenet of mosaicml/examples; Composer's initializers
        kaiming_normal and bn_uniform.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.zeros_(module.bias)


def classification_layer(model: nn.Module, num_classes: int) -> nn.Module:
    """The layer whose outputs are the classes: the last linear or convolution layer of that width.

    Raises:
        ValueError: there is none.
    """
    wide = [
        module
        for module in model.modules()
        if getattr(module, "out_features", getattr(module, "out_channels", 0)) == num_classes
    ]
    if not wide:
        raise ValueError(f"{type(model).__name__} has no layer with {num_classes} outputs")
    return wide[-1]


def start_improbable(model: nn.Module, num_classes: int) -> None:
    """Bias of the classes such that each is one among many: binary losses need not learn that.

    A head without a bias stays as it is.

    Source: Mosaic ResNet.
    """
    bias = getattr(classification_layer(model, num_classes), "bias", None)
    if isinstance(bias, nn.Parameter):
        nn.init.constant_(bias, -math.log(num_classes))


COMPILING = "about 1 to 4 minutes on two CPU cores, 5 s where an earlier run has done it"
DATA_DECIDES = fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException


class _Draws(TorchDispatchMode):
    """Notes whether an operation draws from torch's generator."""

    found = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.found |= torch.Tag.nondeterministic_seeded in operation.tags
        return operation(*args, **(kwargs or {}))


def try_network(
    model: nn.Module, resolutions: Iterable[int], images: int, autocast: Autocast = nullcontext
) -> bool:
    """Refuse a network that cannot take images of these sizes, before anything is written.

    Only the shapes are computed: no memory is taken, and the network is left as it was.

    Args:
        model: the raw network, in the mode that it is tried in.
        resolutions: in pixels.
        images: per forward pass.
        autocast: () -> context of a forward pass.

    Returns:
        Whether a forward pass draws from torch's generator, as stochastic depth and dropout do.

    Raises:
        ValueError: a forward pass fails, or gives more than one tensor of logits.
    """
    device = next(model.parameters()).device
    use, lower = "trained", "the resolution, the batch"
    if not model.training:
        use, lower = "evaluated", "validation.resolution, validation.plain_resolution"

    def step(size: int) -> None:
        try:
            with autocast():
                batch = torch.zeros(images, 3, size, size, device=device)
                logits = functional_call(model, fake, (batch,))
        except DATA_DECIDES:
            draws.found = True  # the values of the images decide: its first step will show it
            return
        except Exception as error:  # each network has its own way to refuse a size
            raise ValueError(
                f"{type(model).__name__} cannot be {use} on {images} images of {size} px "
                f"({error}); change {lower} or model.arch"
            ) from error
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                f"{type(model).__name__} gives {type(logits).__name__}, not one tensor of logits; "
                f"choose a model.arch without auxiliary outputs"
            )

    errors = logging.getLogger(fake_tensor.__name__)  # of shapes: a traceback beside ours
    silent, errors.disabled = errors.disabled, True
    shapes_only = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), shapes_only as mode, _Draws() as draws:
            fake: dict[str, torch.Tensor] = {}
            fake |= {name: mode.from_tensor(value) for name, value in model.state_dict().items()}
            for resolution in resolutions:
                step(resolution)
    finally:
        errors.disabled = silent
    return draws.found


def try_evaluation(
    model: nn.Module,
    validation: SimpleNamespace,
    samples: int,
    autocast: Autocast = nullcontext,
) -> None:
    """Refuse a network that one of the two evaluations cannot take; leaves it as it was.

    Args:
        model: the raw network.
        validation: its attributes resolution, plain_resolution and batch_size are used.
        samples: that one rank evaluates.
        autocast: () -> context of a forward pass.

    Raises:
        ValueError: as try_network.
    """
    was_training = model.training
    sizes = sorted({validation.plain_resolution, validation.resolution})
    try:
        try_network(model.eval(), sizes, max(1, min(validation.batch_size, samples)), autocast)
    finally:
        model.train(was_training)


def warm_up(step: Callable[[int], None], model: nn.Module, resolutions: Iterable[int]) -> None:
    """Run `step(resolution)` once for every resolution and leave the network as it was.

    With torch.compile that is when the graphs are made, before the clock of the run starts.

    Args:
        step: one forward and backward pass at a resolution in pixels.
        model: the raw network; its weights, statistics and gradients are restored.
        resolutions: in pixels.
    """
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for resolution in resolutions:
        step(resolution)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.load_state_dict(state)


def prepare_network(
    state: TrainState,
    resolutions: Iterable[int],
    forward_backward: Callable[[TrainState, Batch, int], torch.Tensor],
    evaluated: Iterable[int] = (),
    images: int = 0,
) -> None:
    """Try the network at every resolution of a run, and compile it for them where asked.

    Args:
        state: its networks, and images per forward pass; `draws` is set.
        resolutions: in pixels.
        forward_backward: of a step, with its number.
        evaluated: resolutions of evaluations, in pixels.
        images: of an evaluation's batch.

    Raises:
        ValueError: as try_network.
    """
    sizes = sorted(resolutions)
    state.draws = try_network(state.model.train(), sizes, state.micro_batch)
    if not is_compiled(state.train_model):
        return

    def compile_step(size: int) -> None:
        announce(f"compiling the training step at {size} px: {COMPILING}")
        blank_step(state, size, forward_backward)

    warm_up(compile_step, state.model, sizes)
    state.eval_model.eval()
    with torch.no_grad(), state.autocast():
        for size in sorted(set(evaluated)):
            announce(f"compiling the evaluation at {size} px: {COMPILING}")
            state.eval_model(_noise(state, images, size))


def blank_step(
    state: TrainState,
    resolution: int,
    forward_backward: Callable[[TrainState, Batch, int], torch.Tensor],
) -> None:
    """A forward and backward pass on noise."""
    noise = _noise(state, state.micro_batch, resolution)
    labels = torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
    forward_backward(state, (noise, labels, np.arange(len(noise))), 0)


def _noise(state: TrainState, images: int, size: int) -> torch.Tensor:
    device = next(state.model.parameters()).device
    return torch.randint(256, (images, size, size, 3), dtype=torch.uint8, device=device)
