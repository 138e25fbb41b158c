"""Training steps on this machine's GPU: ours, ffcv-imagenet's way, and ours fed by the loader.

    python benchmarks/train_step.py --images FOLDER --json out.json

Ours is train_imagenet.py's own step: bf16, torch.compile, fused SGD. The peer is the same network,
BlurPool included, as ffcv-imagenet runs it: fp16 autocast, not compiled, GradScaler, plain SGD.
Both see one batch that lies on the device; ours also sees the loader's. They take turns.
"""

import itertools
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import common

CLASSES = 1000
SLOTS = 5  # the loader's buffers: steps before all are touched are left out of the timing
MANY = 10**6  # steps of an epoch: the learning rate stays that of the beginning


def read_arguments(argv):
    parser = common.argument_parser(__doc__, images=True, rounds=5)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (cuda)")
    parser.add_argument("--arch", default="resnet50", help="torchvision or timm name (resnet50)")
    parser.add_argument("--batch-size", type=int, default=256, help="images a step (256)")
    parser.add_argument("--side", type=int, default=160, help="of the images, px (160)")
    parser.add_argument("--steps", type=int, default=30, help="per round (30)")
    parser.add_argument("--cores", type=int, default=0, help="cores; 0 = all that are usable (0)")
    parser.add_argument("--compile", choices=["on", "off"], default="on", help="ours (on)")
    return parser.parse_args(argv)


# ==== Contestants =================================================================================


def build(arguments, *flags):
    """The recipe's training objects on the device, and their settings: (Training, cfg)."""
    import train_imagenet as recipe

    settings = [f"--model.arch={arguments.arch}", f"--training.batch_size={arguments.batch_size}"]
    cfg = recipe.read_config(
        recipe.SETTINGS, [*settings, *flags], prog="train_step.py", description=""
    )
    return common.build_training(cfg, CLASSES, arguments.device)[0], cfg


def build_ours(arguments):
    precision = "bf16" if arguments.device == "cuda" else "fp32"
    flags = [f"--training.precision={precision}", f"--training.compile={arguments.compile}"]
    return build(arguments, *flags)[0]


def build_peer(arguments, images_bhwc):
    """ffcv-imagenet's step. Its loader normalises; here that is done beforehand, in its favour."""
    import torch

    import train_imagenet as recipe
    from fast_imagenet.data.device_transforms import normalize

    half = arguments.device == "cuda"
    precision = "fp16" if half else "fp32"
    t, cfg = build(arguments, f"--training.precision={precision}", "--training.compile=off")
    groups = recipe.decay_groups(t.model, cfg.training.weight_decay)
    t.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.training.momentum)
    dtype = torch.float16 if half else torch.float32
    ready = normalize(images_bhwc, recipe.MEAN, recipe.STD, dtype)
    t.prepare = lambda images, labels, samples, epoch, step: (ready, labels)
    return t


def run_steps(t, batches) -> float:
    """Train on all batches. Returns images per second; waits for the device at both ends."""
    import train_imagenet as recipe

    begin = time.perf_counter()
    losses, _, seen = recipe.train_epoch(t, batches, 0, MANY, lambda *_: None)
    losses[-1].item()
    return seen / (time.perf_counter() - begin)


class LoaderFed:
    """Rounds of steps on the loader's batches, each round an epoch of its own."""

    def __init__(self, t, path: str, arguments):
        from fast_imagenet.data.ffcv_loader import TrainLoader

        self.t, self.arguments, self.epochs = t, arguments, itertools.count()
        self.loader = TrainLoader(
            path, global_batch=arguments.batch_size, seed=0, device=arguments.device
        )

    def __call__(self) -> float:
        batches = self.loader.epoch(next(self.epochs), self.arguments.side)
        # a label of the file is the image's place, of which there are more than classes
        inside = ((images, labels % CLASSES, samples) for images, labels, samples in batches)
        run_steps(self.t, itertools.islice(inside, SLOTS))
        rate = run_steps(self.t, itertools.islice(inside, self.arguments.steps))
        batches.close()
        return rate


def with_memory(make, batch, device: str):
    """(what `make` makes, peak bytes that it and two steps need on a GPU, else None)."""
    import torch

    if device != "cuda":
        return make(), None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = make()
    run_steps(made, [batch] * 2)
    return made, torch.cuda.max_memory_allocated() - before


# ==== Main ========================================================================================


def fixed_batch(arguments):
    """(images_bhwc, labels_b, samples_b) of noise, on the device."""
    import numpy as np
    import torch

    shape = (arguments.batch_size, arguments.side, arguments.side, 3)
    images_bhwc = torch.randint(256, shape, dtype=torch.uint8, device=arguments.device)
    labels_b = torch.randint(CLASSES, shape[:1], device=arguments.device)
    return images_bhwc, labels_b, np.arange(len(labels_b))


def write_images(arguments, folder: str) -> str:
    """A file with enough of the images for a round, repeated."""
    import data

    images = data.read_images(arguments.images, arguments.limit, arguments.max_side)
    count = (arguments.steps + SLOTS) * arguments.batch_size
    images = list(itertools.islice(itertools.cycle(images), count))
    path = Path(folder, "data.beton")
    return data.write_file(path, images, markers=True, workers=len(os.sched_getaffinity(0)))


def measure(arguments) -> tuple[dict, dict]:
    """Images per second and peak bytes by contestant."""
    batch, device = fixed_batch(arguments), arguments.device
    ours, our_bytes = with_memory(partial(build_ours, arguments), batch, device)
    peer, peer_bytes = with_memory(partial(build_peer, arguments, batch[0]), batch, device)
    with tempfile.TemporaryDirectory() as folder:
        path = write_images(arguments, folder)
        runs = {
            "ours_fixed": lambda: run_steps(ours, [batch] * arguments.steps),
            "ffcv_imagenet_fixed": lambda: run_steps(peer, [batch] * arguments.steps),
            "ours_loader": LoaderFed(ours, path, arguments),
        }
        rates = common.interleave(runs, arguments.rounds)
    memory = {"ours_peak_bytes": our_bytes, "ffcv_imagenet_peak_bytes": peer_bytes}
    return rates, {name: count for name, count in memory.items() if count is not None}


def main(argv=None) -> None:
    arguments = read_arguments(argv)
    cores = arguments.cores or len(os.sched_getaffinity(0))
    machine = common.start(cores, arguments.smoke) | common.describe_gpu(arguments.device)
    rates, memory = measure(arguments)
    fixed = rates["ours_fixed"]["median"]
    ratios = {
        "step_vs_ffcv_imagenet": round(fixed / rates["ffcv_imagenet_fixed"]["median"], 3),
        "loader_fed_vs_fixed": round(rates["ours_loader"]["median"] / fixed, 3),
    }
    for name, rate in rates.items():
        print(f"{name:24} {rate['median']:9.1f} images/s ({rate['min']:.1f} to {rate['max']:.1f})")
    names = ("device", "arch", "batch_size", "side", "steps", "compile")
    data = {name: getattr(arguments, name) for name in names}
    result = {**ratios, "rates": rates, **memory, "data": data, "machine": machine}
    common.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
