"""A GPU that is not there: tensors that say `cuda` and hold nothing, and what crosses to the host.

Everything is the trainer's own code; the tensors are FakeTensors, so that a step of any size takes
a second and no memory. Two things are put in by hand. torch's autograd refuses to run a backward
pass for a device that does not exist, so gradients appear without one (the backward pass itself is
looked at on the meta device and, compiled, in test_kernels.py). And a few fused kernels that change
tensors in place have no fake form: they do nothing.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_imagenet as recipe
from fast_imagenet.engine.distributed import Distributed
from tests.conftest import ROOT

GPU = torch.device("cuda", 0)
IN_PLACE = {"_fused_sgd_"}  # kernels without a fake form
COPIES = {"_to_copy", "copy_"}


class Crossings(TorchDispatchMode):
    """Counts what makes the host wait for the device, or the other way round.

    Attributes:
        waits: (function of this repository, operation) -> how often the host waited: a value was
            read, or copied other than from pinned memory without blocking.
        flows: the same for copies that nobody waits for.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.flows = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.__name__.partition(".")[0]
        if name == "_local_scalar_dense":
            if args[0].device.type != "cpu":
                self.waits[_place(), name] += 1
            return 1.0
        result = None if name in IN_PLACE else operation(*args, **kwargs)
        hosts = [t for t in _tensors((args, kwargs, result)) if t.device.type == "cpu"]
        others = [t for t in _tensors((args, kwargs, result)) if t.device.type != "cpu"]
        # a number on the host that meets a tensor on the device is an argument of the kernel
        if others and ((hosts and name in COPIES) or any(t.ndim for t in hosts)):
            quiet = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            pinned = all(hasattr(t, "is_pinned_here") for t in hosts)
            (self.flows if quiet and pinned else self.waits)[_place(), name] += 1
        return result


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _place() -> str:
    """The innermost function of this repository, tests aside, that is running."""
    frame = sys._getframe(2)
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and "site-packages" not in file and "/tests/" not in file:
            return frame.f_code.co_qualname
        frame = frame.f_back
    return "a test"


@contextmanager
def fake_gpu():
    """Within the block, tensors are fake, and a network can be moved to GPU and trained there."""
    with ExitStack() as stack:
        for target, stand_in in {
            "torch.nn.Module.to": move,
            "torch.Tensor.pin_memory": _pin_memory,
            "torch._subclasses.fake_tensor.FakeTensor.tolist": _tolist,
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda.current_device": lambda: 0,
        }.items():
            stack.enter_context(mock.patch(target, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def move(model, device, memory_format):
    """As nn.Module.to, which cannot exchange fake parameters in place."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None:  # a layer without a bias
                    continue
                options = {"memory_format": memory_format} if old.ndim == 4 else {}
                new = torch.empty(old.shape, dtype=old.dtype, device=device, **options)
                store[name] = nn.Parameter(new) if store is module._parameters else new
    return model


def _pin_memory(tensor):
    tensor.is_pinned_here = True
    return tensor


def _tolist(tensor):
    """One copy for all numbers, as of real tensors; a fake one would read each."""
    return np.ones(tensor.cpu().shape).tolist()


def settings(*flags: str):
    """Settings of the trainer: a network of four blocks at 64 px, and these flags."""
    small = ["--model.arch=timm/test_resnet", "--training.batch_size=4", "--training.compile=off"]
    sizes = ["--resolution.min_res=64", "--resolution.max_res=64", "--training.precision=bf16"]
    return recipe.read_config(recipe.SETTINGS, [*small, *sizes, *flags], prog="", description="")


def build_state(cfg, device=GPU, classes=10):
    """The trainer's own TrainState on a device; its backward passes only make gradients."""
    alone = Distributed(rank=0, world_size=1, ranks_on_node=1, device=device)
    model = recipe.build_model(cfg, classes, alone.device)
    return recipe.build_state(cfg, recipe.wrap_model(model, cfg, alone), classes, 100, alone)


@contextmanager
def gradients_by_hand(model):
    """Within the block, `backward` of any tensor gives every parameter a gradient."""

    def backward(_):
        for parameter in model.parameters():
            old = parameter.grad
            parameter.grad = torch.empty_like(parameter) if old is None else old.add_(old)

    with mock.patch.object(torch.Tensor, "backward", backward):
        yield


def batch(images=4, side=64, device=GPU):
    """(images_bhwc, labels_b, samples_b) as a loader gives them."""
    images_bhwc = torch.empty(images, side, side, 3, dtype=torch.uint8, device=device)
    labels_b = torch.zeros(images, dtype=torch.int64, device=device)
    return images_bhwc, labels_b, np.arange(images)
