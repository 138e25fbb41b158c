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
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import common

CLASSES = 1000
SLOTS = 5  # the loader's buffers: steps before all are touched are left out of the timing
SETTINGS = {
    "device": {"default": "cuda", "help": "cuda or cpu"},
    "arch": {"default": "resnet50", "help": "torchvision or timm name"},
    "batch_size": {"default": 256, "help": "images per step"},
    "side": {"default": 160, "help": "resolution of the images, px"},
    "steps": {"default": 30, "help": "per round"},
    "compile": {"default": "on", "choices": ["on", "off"], "help": "ours"},
}
SMOKE = dict(device="cpu", arch="timm/test_resnet", batch_size=4, side=32, steps=1, compile="off")
FLAGS = common.IMAGES | SETTINGS | {"cores": {"default": 0, "help": "0 = all that are usable"}}


def build(arguments: argparse.Namespace, precision: str, compiled: str) -> tuple[Any, Any]:
    """The recipe's TrainState on the device, and its settings."""
    flags = [f"--model.arch={arguments.arch}", f"--training.batch_size={arguments.batch_size}"]
    flags += [f"--training.precision={precision}", f"--training.compile={compiled}"]
    cfg = common.read_config(*flags)
    return common.build_state(cfg, CLASSES, arguments.device), cfg


def build_ours(arguments: argparse.Namespace) -> Any:
    return build(arguments, "bf16" if arguments.device == "cuda" else "fp32", arguments.compile)[0]


def build_peer(arguments: argparse.Namespace, images_bhwc: Any) -> Any:
    """ffcv-imagenet's step. Its loader normalizes; here that is done beforehand, in its favor."""
    import torch

    import train_imagenet as recipe
    from fast_imagenet.data.device_transforms import normalize
    from fast_imagenet.engine.optimizers import decay_groups

    half = arguments.device == "cuda"
    state, cfg = build(arguments, "fp16" if half else "fp32", "off")
    groups = decay_groups(state.model, cfg.training.weight_decay)
    state.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.training.momentum)
    dtype = torch.float16 if half else torch.float32
    ready = normalize(images_bhwc, recipe.MEAN, recipe.STD, dtype)
    state.prepare = lambda images, labels, samples, epoch, step: (ready, labels)
    return state


def run_steps(state: Any, batches: Iterable[tuple]) -> float:
    """Train on all batches. Returns images per second; waits for the device at both ends."""
    import train_imagenet as recipe
    from fast_imagenet.engine.run import StepRecorder

    begin = time.perf_counter()
    steps = StepRecorder()
    recipe.train_epoch(state, batches, steps)
    steps.losses[-1].item()
    return steps.images / (time.perf_counter() - begin)


def loader_rounds(state: Any, path: str, arguments: argparse.Namespace) -> common.Rate:
    """Rounds of steps on the loader's batches, each round an epoch of its own."""
    from fast_imagenet.data.ffcv_loader import TrainLoader

    size, device, epochs = arguments.batch_size, arguments.device, itertools.count()
    loader = TrainLoader(path, global_batch=size, seed=0, device=device)

    def run() -> float:
        batches = loader.epoch(next(epochs), arguments.side)
        # a label of the file is the image's place, of which there are more than classes
        inside = ((images, labels % CLASSES, samples) for images, labels, samples in batches)
        run_steps(state, itertools.islice(inside, SLOTS))
        rate = run_steps(state, itertools.islice(inside, arguments.steps))
        batches.close()
        return rate

    return run


def with_memory(make: Callable[[], Any], batch: tuple, device: str) -> tuple[Any, int | None]:
    """(what `make` makes, peak bytes that it and two steps need on a GPU, else None)."""
    import torch

    if device != "cuda":
        return make(), None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = make()
    run_steps(made, [batch] * 2)
    return made, torch.cuda.max_memory_allocated() - before


def write_images(arguments: argparse.Namespace, folder: str) -> str:
    """A file with enough of the images for a round, repeated."""
    import data

    images = data.read_images(arguments.images, arguments.limit, arguments.max_side)
    count = (arguments.steps + SLOTS) * arguments.batch_size
    images = list(itertools.islice(itertools.cycle(images), count))
    path = Path(folder, "data.beton")
    return data.write_file(path, images, markers=True, workers=len(os.sched_getaffinity(0)))


def measure(arguments: argparse.Namespace) -> tuple[dict[str, dict], dict[str, int]]:
    """Images per second and peak bytes by contestant."""
    device, steps = arguments.device, arguments.steps
    batch = common.noise(arguments.batch_size, arguments.side, CLASSES, device)
    ours, our_bytes = with_memory(partial(build_ours, arguments), batch, device)
    peer, peer_bytes = with_memory(partial(build_peer, arguments, batch[0]), batch, device)
    with tempfile.TemporaryDirectory() as folder:
        path = write_images(arguments, folder)
        runs = {
            "ours_fixed": lambda: run_steps(ours, [batch] * steps),
            "ffcv_imagenet_fixed": lambda: run_steps(peer, [batch] * steps),
            "ours_loader": loader_rounds(ours, path, arguments),
        }
        rates = common.interleave(runs, arguments.rounds)
    memory = {"ours_peak_bytes": our_bytes, "ffcv_imagenet_peak_bytes": peer_bytes}
    return rates, {name: count for name, count in memory.items() if count is not None}


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=5, **FLAGS)
    vars(arguments).update(SMOKE if arguments.smoke else {})
    cores = arguments.cores or len(os.sched_getaffinity(0))
    machine = common.start(cores, arguments.smoke) | common.describe_gpu(arguments.device)
    rates, memory = measure(arguments)
    ratios = {
        "step_vs_ffcv_imagenet": common.ratio(rates, "ours_fixed", "ffcv_imagenet_fixed"),
        "loader_fed_vs_fixed": common.ratio(rates, "ours_loader", "ours_fixed"),
    }
    data = {name: getattr(arguments, name) for name in SETTINGS}
    common.publish(arguments.json, **ratios, **memory, rates=rates, data=data, machine=machine)


if __name__ == "__main__":
    main()
