"""Training steps on this machine's GPU: ours, ffcv-imagenet's way, and ours fed by the loader.

    python benchmarks/train_step.py --images FOLDER --json out.json

Ours is train_imagenet.py's own step: bf16, torch.compile, fused SGD. The peer is the same network,
BlurPool included, as ffcv-imagenet runs it: fp16 autocast, not compiled, GradScaler, plain SGD.
Both see one batch that lies on the device; ours also sees the loader's. They take turns.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common

CLASSES = 1000
SLOTS = 5  # the loader's buffers: steps before all are touched are left out of the timing
MANY = 10**6  # steps of an epoch: the learning rate stays that of the beginning
SETTINGS = {"device": "cuda", "arch": "resnet50", "batch_size": 256, "side": 160, "steps": 30}
SMOKE = {"device": "cpu", "arch": "timm/test_resnet", "batch_size": 4, "side": 32, "steps": 1}


def build(arguments: argparse.Namespace, precision: str, compiled: str) -> tuple[Any, Any]:
    """The recipe's TrainState on the device, and its settings."""
    import torch

    import train_imagenet as recipe
    from fast_imagenet.engine.distributed import Distributed

    if arguments.device == "cpu":
        precision, compiled = "fp32", "off"
    flags = [f"--model.arch={arguments.arch}", f"--training.batch_size={arguments.batch_size}"]
    flags += [f"--training.precision={precision}", f"--training.compile={compiled}"]
    options = dict(search=recipe.CONFIG_FOLDERS, prog="benchmark", description="")
    cfg = recipe.read_config(recipe.SETTINGS, flags, **options)
    alone = Distributed(0, world_size=1, ranks_on_node=1, device=torch.device(arguments.device))
    networks = recipe.wrap_model(recipe.build_model(cfg, CLASSES, alone.device), cfg, alone)
    return recipe.build_state(cfg, networks, CLASSES, MANY, alone), cfg


def build_peer(arguments: argparse.Namespace, images_bhwc: Any) -> Any:
    """ffcv-imagenet's step. Its loader normalizes; here that is done beforehand, in its favor."""
    import torch

    import train_imagenet as recipe
    from fast_imagenet.data.device_transforms import normalize

    state, cfg = build(arguments, "fp16", "off")
    groups = recipe.decay_groups(state.model, cfg.training.weight_decay)
    state.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.training.momentum)
    dtype = torch.float16 if arguments.device == "cuda" else torch.float32
    ready = normalize(images_bhwc, recipe.MEAN, recipe.STD, dtype)
    state.prepare = lambda images, labels, samples, epoch, step: (ready, labels)
    return state


def run_steps(state: Any, batches: Iterable[tuple]) -> float:
    """Train on all batches. Returns images per second; waits for the device at both ends."""
    import train_imagenet as recipe
    from fast_imagenet.engine.run import StepRecorder

    begin, steps = time.perf_counter(), StepRecorder()
    recipe.train_epoch(state, batches, steps)
    steps.losses[-1].item()
    return steps.images / (time.perf_counter() - begin)


def loader_rounds(state: Any, folder: str, arguments: argparse.Namespace) -> common.Rate:
    """Rounds of steps on the loader's batches, each round an epoch of its own."""
    import data
    from fast_imagenet.data.ffcv_loader import TrainLoader

    size, epochs = arguments.batch_size, itertools.count()
    images = data.read_images(arguments.images, arguments.limit, arguments.max_side)
    images = list(itertools.islice(itertools.cycle(images), (arguments.steps + SLOTS) * size))
    workers = len(os.sched_getaffinity(0))
    path = data.write_file(Path(folder, "data.beton"), images, markers=True, workers=workers)
    loader = TrainLoader(path, global_batch=size, seed=0, device=arguments.device)

    def run() -> float:
        batches = loader.epoch(next(epochs), arguments.side)
        # a label of the file is the image's place, of which there are more than classes
        inside = ((images, labels % CLASSES, samples) for images, labels, samples in batches)
        run_steps(state, itertools.islice(inside, SLOTS))
        rate = run_steps(state, itertools.islice(inside, arguments.steps))
        batches.close()
        return rate

    return run


def measure(arguments: argparse.Namespace) -> dict[str, dict]:
    """Images per second by contestant."""
    import numpy as np
    import torch

    count, side, steps = arguments.batch_size, arguments.side, arguments.steps
    place = {"device": arguments.device}
    images_bhwc = torch.randint(256, (count, side, side, 3), dtype=torch.uint8, **place)
    batch = (images_bhwc, torch.randint(CLASSES, (count,), **place), np.arange(count))
    ours, peer = build(arguments, "bf16", "on")[0], build_peer(arguments, images_bhwc)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "ours_fixed": lambda: run_steps(ours, [batch] * steps),
            "ffcv_imagenet_fixed": lambda: run_steps(peer, [batch] * steps),
            "ours_loader": loader_rounds(ours, folder, arguments),
        }
        return common.interleave(runs, arguments.rounds)


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=5, **common.IMAGES)
    settings = SMOKE if arguments.smoke else SETTINGS
    vars(arguments).update(settings)
    machine = common.start(1 if arguments.smoke else 0, arguments.smoke)
    import torch

    if not arguments.smoke:
        if not torch.cuda.is_available():
            raise SystemExit("torch finds no GPU; run this where it finds one")
        machine["gpu"] = torch.cuda.get_device_name()
    rates = measure(arguments)
    ratios = {
        "step_vs_ffcv_imagenet": common.ratio(rates, "ours_fixed", "ffcv_imagenet_fixed"),
        "loader_fed_vs_fixed": common.ratio(rates, "ours_loader", "ours_fixed"),
    }
    common.publish(arguments.json, **ratios, rates=rates, data=settings, machine=machine)


if __name__ == "__main__":
    main()
