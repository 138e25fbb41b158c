"""Processes that train together: one a GPU under torchrun, on one node or many; gloo on CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from fast_imagenet.engine.train_state import Autocast, TrainState
from fast_imagenet.machine import worker_count

ASK_STEPS = 10  # several ranks ask each other after so many steps at most ...
ASK_SECONDS = 4.0  # ... and after so much time, of the slowest; one rank asks after every step


@dataclass(frozen=True)
class Distributed:
    """This process among those that train together; without torchrun it is rank 0 of 1."""

    rank: int
    world_size: int
    ranks_on_node: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def workers(self, requested: int) -> int:
        """Loader workers: `requested`, or with 0 an equal part of the usable cores, at least 1."""
        return worker_count(requested, self.ranks_on_node)

    @torch.no_grad()
    def all_reduce_mean(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace every floating-point tensor by its mean over the ranks, in place, in one call.

        In float64, so that the mean of equal numbers is that number for any number of ranks.
        """
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        if self.world_size == 1 or not floats:
            return
        flat = torch.cat([tensor.double().flatten() for tensor in floats])
        dist.all_reduce(flat)
        means = (flat / self.world_size).split([tensor.numel() for tensor in floats])
        for tensor, mean in zip(floats, means, strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def average_statistics(self, state: TrainState) -> None:
        """Batch norm's running statistics, and their EMA, become their means over the ranks."""
        self.all_reduce_mean([*state.model.buffers(), *state.ema.statistics])

    def all_reduce_max(self, value: int) -> int:
        """The largest of the ranks' numbers, the same on all; waits for them."""
        if self.world_size == 1:
            return value
        number = torch.tensor(value, device=self.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Consensus:
    """Ranks that ask each other now and then, all after the same step, what to do.

    Asking makes the ranks wait for each other, so fast steps are not asked after each; slow ones
    are, since a signal must be obeyed within seconds.

    Args: distributed: its ranks must call `ask` equally often.
    """

    def __init__(self, distributed: Distributed) -> None:
        self._distributed, self._left, self._every = distributed, 1, 1
        self._since = time.monotonic()

    def ask(self, request: int) -> int | None:
        """The largest request of all ranks, the same on each; None: they do not ask now."""
        if self._distributed.world_size == 1:
            return request
        self._left -= 1
        if self._left:
            return None
        milliseconds = round(1000 * (time.monotonic() - self._since) / self._every)
        largest = self._distributed.all_reduce_max(request)
        slowest = self._distributed.all_reduce_max(milliseconds)
        fitting = int(1000 * ASK_SECONDS / max(1, slowest))
        self._every = self._left = min(ASK_STEPS, max(1, fitting))
        self._since = time.monotonic()
        return largest


def init_distributed() -> Distributed:
    """Join the group that torchrun describes in the environment, and choose this rank's device."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return Distributed(rank, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), device)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of forward passes.

    Args:
        name: bf16, fp16, fp32, or auto: bf16 where the GPU has it, else fp16; fp32 on a CPU.
        device: where the network lives.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise ValueError("training.precision=fp16 needs a GPU; on a CPU use auto, fp32 or bf16")
    if name == "auto" and device.type == "cpu":
        name = "fp32"
    if name == "auto":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


@contextmanager
def full_precision() -> Iterator[None]:
    """A forward pass in fp32, without TF32, not compiled: a graph would serve it once."""
    cudnn = torch.backends.cudnn
    options = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "allow_tf32": False}
    with torch.compiler.set_stance("force_eager"), cudnn.flags(**options):
        yield


def autocast_of(dtype: torch.dtype, device: torch.device) -> Autocast:
    """() -> the context of a forward pass in `dtype`."""
    return partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
