"""Training steps on this machine's GPU: ours, ffcv-imagenet's, and ours fed by the loader.

    python benchmarks/train_step.py --arch resnet50 --side 160 --json out.json
    python benchmarks/train_step.py --data data/train.beton --json out.json

Ours is train_imagenet.py's own step: eager in fp16 and in bf16, and in bf16 compiled, as it
trains. The peer is ffcv-imagenet's step: fp16 under autocast, eager, GradScaler, SGD, its BlurPool,
cudnn.benchmark. All see one batch that lies on the device, and take turns; with --data, a .beton
file, our compiled step also trains on the loader's batches.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import common

CLASSES = 1000
SLOTS = 5  # the loader's buffers: steps before all are touched are left out of the timing
SETTINGS = {
    "device": {"default": "cuda", "help": "cuda or cpu"},
    "arch": {"default": "resnet50", "help": "torchvision or timm name"},
    "batch_size": {"default": 256, "help": "images per step"},
    "side": {"default": 160, "help": "resolution of the images, px"},
    "steps": {"default": 20, "help": "per round"},
}
SMOKE = dict(arch="timm/test_resnet", batch_size=4, side=32, steps=1)
FLAGS = SETTINGS | {
    "data": {"help": "a .beton file: train on the loader's batches, too"},
    "cores": {"default": 0, "help": "0 = all that are usable"},
}
PEER = "ffcv_imagenet_fixed"
OURS = {  # precision, training.compile
    "ours_fixed": ("bf16", "on"),
    "ours_bf16_eager": ("bf16", "off"),
    "ours_fp16_eager": ("fp16", "off"),
}
Train = Callable[[Iterable[tuple]], Any]  # a step on each batch; waits for the device at the end


def settings(arguments: argparse.Namespace, precision: str, compiled: str) -> SimpleNamespace:
    """The recipe's; on a CPU fp32, not compiled."""
    if arguments.device == "cpu":
        precision, compiled = "fp32", "off"
    flags = [f"--model.arch={arguments.arch}", f"--training.batch_size={arguments.batch_size}"]
    flags += [f"--training.precision={precision}", f"--training.compile={compiled}"]
    return common.read_config(*flags)


def build_ours(arguments: argparse.Namespace, precision: str, compiled: str) -> Train:
    """train_imagenet.py's step."""
    import train_imagenet as recipe
    from fast_imagenet.engine.run import StepRecorder

    cfg = settings(arguments, precision, compiled)
    state = common.build_state(cfg, CLASSES, arguments.device)

    def train(batches: Iterable[tuple]) -> None:
        steps = StepRecorder()
        recipe.train_epoch(state, batches, steps)
        steps.losses[-1].item()

    return train


def build_peer(arguments: argparse.Namespace, images_bhwc: Any) -> Train:
    """ffcv-imagenet's step. Its loader normalizes; here that is done beforehand, in its favor."""
    import torch

    import train_imagenet as recipe
    from fast_imagenet.data.device_transforms import normalize
    from fast_imagenet.engine.optimizers import decay_groups
    from fast_imagenet.models.blurpool import BlurPoolConv2d

    torch.backends.cudnn.benchmark = True  # as ours
    device, half = arguments.device, arguments.device != "cpu"
    cfg = settings(arguments, "fp16", "off")
    options, model = cfg.training, recipe.build_model(cfg, CLASSES, torch.device(device))
    for module in model.modules():
        if isinstance(module, BlurPoolConv2d):
            module._blur_strided = False  # the peer blurs also what a stride leaves out
    groups = decay_groups(model, options.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=options.momentum)
    dtype = torch.float16 if half else torch.float32
    scaler = torch.amp.GradScaler(device, enabled=half)
    compute_loss = torch.nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    ready_bchw = normalize(images_bhwc, recipe.MEAN, recipe.STD, dtype)

    def train(batches: Iterable[tuple]) -> None:
        model.train()
        for _, labels_b, _ in batches:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.float16, enabled=half):
                loss = compute_loss(model(ready_bchw), labels_b)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        loss.item()

    return train


def rate(train: Train, batches: Iterable[tuple], images: int) -> float:
    """Images per second of training on batches that hold so many."""
    begin = perf_counter()
    train(batches)
    return images / (perf_counter() - begin)


def loader_rounds(train: Train, arguments: argparse.Namespace) -> common.Rate:
    """Rounds of steps on the loader's batches, each round an epoch of its own.

    Raises: SystemExit where the file is too small.
    """
    from fast_imagenet.data.ffcv_loader import TrainLoader

    size, steps, epochs = arguments.batch_size, arguments.steps, itertools.count()
    loader = TrainLoader(arguments.data, global_batch=size, seed=0, device=arguments.device)
    if len(loader) < SLOTS + steps:
        raise SystemExit(
            f"--data {arguments.data}: an epoch has {len(loader)} batches of {size} images, and "
            f"{SLOTS + steps} are needed; give fewer --steps or a smaller --batch-size"
        )

    def run() -> float:
        batches: Iterator[tuple] = loader.epoch(next(epochs), arguments.side)
        train(itertools.islice(batches, SLOTS))
        found = rate(train, itertools.islice(batches, steps), steps * size)
        batches.close()
        return found

    return run


def with_memory(make: Callable[[], Train], batch: tuple, device: str) -> tuple[Train, int | None]:
    """(what `make` makes, peak bytes that it and two steps need on a GPU, else None)."""
    import torch

    if device == "cpu":
        return make(), None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = make()
    made([batch] * 2)
    return made, torch.cuda.max_memory_allocated() - before


def measure(arguments: argparse.Namespace) -> tuple[dict[str, dict], dict[str, int | None]]:
    """Images per second and peak bytes by contestant."""
    device, steps = arguments.device, arguments.steps
    batch = common.noise(arguments.batch_size, arguments.side, CLASSES, device)
    makers: dict[str, Callable[[], Train]] = {PEER: partial(build_peer, arguments, batch[0])}
    makers |= {name: partial(build_ours, arguments, *way) for name, way in OURS.items()}
    made = {name: with_memory(make, batch, device) for name, make in makers.items()}
    images = steps * arguments.batch_size
    runs = {
        name: partial(rate, train, [batch] * steps, images) for name, (train, _) in made.items()
    }
    if arguments.data:
        runs["ours_loader"] = loader_rounds(made["ours_fixed"][0], arguments)
    rates = common.interleave(runs, arguments.rounds)
    return rates, {name: peak for name, (_, peak) in made.items()}


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=5, **FLAGS)
    vars(arguments).update(SMOKE if arguments.smoke else {})
    cores = arguments.cores or len(os.sched_getaffinity(0))
    machine = common.start(cores, arguments.smoke) | common.describe_gpu(arguments.device)
    rates, memory = measure(arguments)
    size = arguments.batch_size
    milliseconds = {name: round(1000 * size / r["median"], 3) for name, r in rates.items()}
    ratios = {f"{name}_vs_ffcv_imagenet": common.ratio(rates, name, PEER) for name in OURS}
    if arguments.data:
        ratios["loader_fed_vs_fixed"] = common.ratio(rates, "ours_loader", "ours_fixed")
    data = {name: getattr(arguments, name) for name in SETTINGS}
    found = ratios | dict(milliseconds=milliseconds, peak_bytes=memory, rates=rates)
    common.publish(arguments.json, **found, data=data, machine=machine)


if __name__ == "__main__":
    main()
