"""Ranks that train together over gloo, for test_ranks.py.

    python -m tests.gpu_path.ranks FOLDER      NAME.pt for each of RUNS: what every rank gave

The ranks are forked from this program, which has imported all and not yet trained: autograd's
threads do not survive a fork.
"""

import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import train_imagenet as recipe
from fast_imagenet.engine.distributed import Distributed
from fast_imagenet.engine.run import StepRecorder
from fast_imagenet.models import networks
from tests.gpu_path.fake_gpu import settings

CPU = torch.device("cpu")
STEPS, IMAGES, CLASSES = 4, 4, 10
FLAGS = ("--training.precision=fp32", "--lr.lr=1", "--lr.lr_peak_epoch=0", "--ema.decay=0.9")
# two forward passes a step: only the last one's gradients cross
SMALL = ("--training.micro_batch_size=2", "--validation.resolution=32")
SMALL += ("--validation.plain_resolution=32",)


def on_ranks(count, function, folder):
    """What function(distributed) gives on each of `count` ranks, in processes forked from here."""
    folder.mkdir(exist_ok=True)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(r, count, function, folder)) for r in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * count
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _rank(rank, count, function, folder):
    torch.set_num_threads(1)  # threads of the parent do not exist here
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    torch.save(function(Distributed(rank, count, count, CPU)), folder / f"{rank}.pt")
    os._exit(0)


def batch(rank, step, side=32):
    """Noise, other on every rank and at every step."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    images_bhwc = torch.randint(256, (IMAGES, side, side, 3), generator=draw, dtype=torch.uint8)
    return images_bhwc, torch.randint(CLASSES, (IMAGES,), generator=draw), np.arange(IMAGES)


def trained(distributed, *flags):
    """(settings, TrainState, losses) after some steps of the trainer on this rank."""
    cfg, steps = settings(*FLAGS, *SMALL, *flags), StepRecorder()
    model = recipe.build_model(cfg, CLASSES, CPU)
    wrapped = recipe.wrap_model(model, cfg, distributed)
    state = recipe.build_state(cfg, wrapped, CLASSES, STEPS, distributed)
    recipe.train_epoch(state, [batch(distributed.rank, step) for step in range(STEPS)], steps)
    return cfg, state, torch.stack(steps.losses)


def losses(distributed, flags=(), plain=False):
    """Of the trainer's steps; `plain`: by DistributedDataParallel as torch has it."""

    def wrapped(network, *_):
        return nn.parallel.DistributedDataParallel(network)

    with mock.patch.object(networks, "distribute", wrapped if plain else networks.distribute):
        return trained(distributed, *flags)[2]


def evaluated(distributed):
    """The EMA before and after an evaluation on this rank."""
    cfg, state, _ = trained(distributed)
    before = {name: tensor.clone() for name, tensor in state.ema.state_dict().items()}

    def batches(resolution, crop_ratio):
        return [batch(distributed.rank, 0, resolution)[:2]]

    recipe.evaluate_both(state, batches, cfg, distributed, last=False)
    return (
        before,
        dict(state.ema.state_dict()),
        [name for name, _ in state.model.named_parameters()],
    )


RUNS = {
    "plain": (2, partial(losses, plain=True)),
    "ours": (2, losses),
    "bf16": (2, partial(losses, flags=("--training.gradients=bf16",))),
    "average": (3, evaluated),
}

if __name__ == "__main__":
    for name, (count, function) in RUNS.items():
        place = Path(sys.argv[1], name)
        torch.save(on_ranks(count, function, place), place.with_suffix(".pt"))
