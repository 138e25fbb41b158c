"""Processes that train together: one a GPU under torchrun, on one node or many; gloo on CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Who this process is. A run without torchrun is rank 0 of 1."""

    rank: int
    world_size: int
    ranks_on_node: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def workers(self, asked: int) -> int:
        """Loader workers: `asked`, or with 0 this rank's share of the usable cores, at least 1."""
        return asked or max(1, len(os.sched_getaffinity(0)) // self.ranks_on_node)

    @torch.no_grad()
    def average(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replace every floating-point tensor by its mean over the ranks, in place."""
        if self.world_size == 1:
            return
        for tensor in tensors.values():
            if tensor.is_floating_point():
                dist.all_reduce(tensor)
                tensor /= self.world_size

    def most(self, value: int) -> int:
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


def start_ranks() -> Ranks:
    """Join the group that torchrun describes in the environment, and choose this rank's device."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(rank, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), device)


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
