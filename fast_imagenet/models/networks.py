"""A network as the loops call it: uint8 images in, logits out; on several ranks, and compiled."""

from __future__ import annotations

import inspect
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from fast_imagenet.data.device_transforms import normalize_and_mix, normalize_in_graph
from fast_imagenet.engine.distributed import Distributed
from fast_imagenet.engine.train_state import Networks
from fast_imagenet.models.origin import input_norm


class ImageNetwork(nn.Module):
    """A network that takes images as they are loaded, and normalizes and mixes them itself.

    Compiled, that is one pass over the batch, from bytes to the dtype of the first layer. The
    counters of batch norm are raised by one call per forward pass, not one per layer.

    Args:
        model: the raw network; its batch norms no longer count when it is called without this one.
    """

    scale_c: torch.Tensor
    shift_c: torch.Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self._norm = model, input_norm(model)
        self._norms = _uncounted_norms(model)
        device = next(model.parameters(), torch.empty(0)).device
        mean, std = torch.tensor(self._norm, dtype=torch.float64)
        for name, value in (("scale_c", 1 / (255 * std)), ("shift_c", -mean / std)):
            self.register_buffer(name, value.float().to(device), persistent=False)

    def forward(self, images: torch.Tensor, mixing: Any = None) -> Any:
        """Logits [b, K] of images.

        Args:
            images: images_bhwc uint8 [b, h, w, 3], or images_bchw float, which are ready.
            mixing: of uint8 images: `Mixing.tensor`, where this is not compiled a Mixing too.
        """
        if self.training and self._norms:
            torch._foreach_add_([norm.num_batches_tracked for norm in self._norms], 1)
        if images.dtype != torch.uint8:
            return self.model(images)
        if torch.compiler.is_compiling() or isinstance(mixing, torch.Tensor):
            images = normalize_in_graph(images, self.scale_c, self.shift_c, mixing)
            return self.model(images)
        return self.model(normalize_and_mix(images, *self._norm, mixing))


class _UncountedBatchNorm2d(nn.BatchNorm2d):
    momentum: float

    def forward(self, images_bchw: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(images_bchw)
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        training, momentum, eps = self.training, self.momentum, self.eps
        return F.batch_norm(images_bchw, mean, var, weight, bias, training, momentum, eps)


def _uncounted_norms(model: nn.Module) -> list[Any]:
    """All ordinary batch norms, which leave counting to the caller from now on.

    Nothing but a file of weights ever shows them, and they were 53 of the 290 kernels of a compiled
    ResNet-50's forward pass.
    """
    kinds = (nn.BatchNorm2d, _UncountedBatchNorm2d)  # other subclasses have a forward of their own
    norms: list[Any] = [m for m in model.modules() if type(m) in kinds]
    norms = [m for m in norms if m.track_running_stats and m.momentum is not None]
    for norm in norms:
        norm.__class__ = _UncountedBatchNorm2d
    return norms


class FixedBatch(nn.Module):
    """A compiled network that sees one size of batch: a graph holds for one size only.

    A smaller batch, as the last of an evaluation, is filled with black images, whose logits are
    dropped.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.size = network, 0

    def forward(self, images_bhwc: torch.Tensor) -> torch.Tensor:
        """Logits [b, K] of uint8 images; b is the largest so far, or less."""
        count = len(images_bhwc)
        self.size = max(self.size, count)
        images_bhwc = F.pad(images_bhwc, (0, 0, 0, 0, 0, 0, 0, self.size - count))
        return self.network(images_bhwc)[:count]


def build_networks(
    model: nn.Module, distributed: Distributed, compile: str, gradients: str = "fp32"
) -> Networks:
    """The network, and as called in training and evaluation: distributed, compiled when asked.

    Args:
        model: the raw network on its device.
        distributed: the ranks that train it.
        compile: 'on', 'off', or 'auto': on a GPU.
        gradients: 'fp32', or 'bf16': how they cross the ranks.

    Raises:
        ValueError: 'bf16' with one rank.
    """
    torch.backends.cudnn.benchmark = True  # shapes are few: the fastest algorithm for each is kept
    network = ImageNetwork(model)
    train_network: nn.Module = network
    if distributed.world_size > 1:
        train_network = distribute(network, distributed.device, gradients)
    elif gradients != "fp32":
        raise ValueError(
            f"training.gradients={gradients} is for several ranks, and this is one process; "
            f"start it with torchrun, or use fp32"
        )
    if compile == "off" or (compile == "auto" and distributed.device.type != "cuda"):
        return Networks(model, train_network, network)
    compiled = compile_network(train_network)
    alone = compiled if train_network is network else compile_network(network)
    return Networks(model, compiled, FixedBatch(alone))


def distribute(network: nn.Module, device: torch.device, gradients: str = "fp32") -> nn.Module:
    """The network for several ranks: gradients are averaged, batch-norm statistics are not.

    Args:
        network: with its parameters on `device`.
        gradients: as build_networks.
    """
    wrapper = nn.parallel.DistributedDataParallel
    known = inspect.signature(wrapper.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # as views the gradients need no copy into the buffers that cross the ranks
    options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    wrapped = wrapper(network, device_ids=[device] if device.type == "cuda" else None, **options)
    if gradients == "bf16":
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def is_compiled(network: nn.Module) -> bool:
    """Whether it is one of `compile_network`."""
    return hasattr(network, "_orig_mod")


def compile_network(network: nn.Module) -> Any:
    """torch.compile, whose results are kept in the user's cache: torch's default is lost at boot.

    TORCHINDUCTOR_CACHE_DIR chooses another folder.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder /= "fast_imagenet/inductor"
    with suppress(OSError):  # a home that cannot be written
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.config.recompile_limit = 64  # one graph per resolution and mode; default 8
    return torch.compile(network, dynamic=False)
