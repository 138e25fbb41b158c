"""Images per second and core: our operations and their peers on the same images, in one run.

    python benchmarks/loader_throughput.py --images FOLDER --json out.json

Contestants take turns, round after round, on the same cores; rates are medians. What is measured,
and what is not: benchmarks/README.md.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common

BATCH_SIZE = 64
SLOTS = 5  # FFCV's buffers: the batches before all are touched are left out of the timing
FLAGS = common.IMAGES | {
    "cores": {"default": 1, "help": "cores and loader threads"},
    "per_round": {"default": 1000, "help": "images per round"},
    "clock": common.CLOCK,
}
RATIOS = {
    "plain_160_vs_ffcv": ("ours_plain_160", "ffcv_plain_160"),
    "plain_224_vs_ffcv": ("ours_plain_224", "ffcv_plain_224"),
    "strong_160_vs_torchvision": ("ours_strong_160", "torchvision_strong_160"),
    "strong_160_vs_ffcv_plain": ("ours_strong_160", "ffcv_plain_160"),
    "raw_160_vs_ffcv": ("ours_raw_160", "ffcv_raw_160"),
    "plain_160_vs_torchvision": ("ours_plain_160", "torchvision_plain_160"),
    "strong_160_vs_timm": ("ours_strong_160", "timm_strong_160"),
    "strong_160_vs_albumentations": ("ours_strong_160", "albumentations_strong_160"),
    "strong_160_vs_dali": ("ours_strong_160", "dali_strong_160"),
}
Clock = Callable[[], float]


def epochs(
    path: str, operations: list[Any], cores: int, count: int, clock: Clock
) -> Callable[[int], float]:
    """Resolution -> rate of `count` images through an FFCV loader.

    One loader serves all resolutions, as in training: stock FFCV would compile each anew.
    """
    import numpy as np
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader
    from ffcv.transforms import ToTensor

    size = min(BATCH_SIZE, count)
    loader = Loader(
        path,
        batch_size=size,
        num_workers=cores,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        indices=np.resize(np.arange(int(Reader(path).num_samples)), count + SLOTS * size),
        drop_last=True,
        pipelines={"image": [*operations, ToTensor()], "label": None},
    )

    def run(resolution: int) -> float:
        operations[0].output_size = (resolution, resolution)
        batches = iter(loader)
        for _ in range(SLOTS):
            next(batches)
        begin, seen = clock(), 0
        for (images,) in batches:
            seen += len(images)
        assert images.shape[1:] == (resolution, resolution, 3)
        return seen / (clock() - begin)

    return run


def ffcv_contestants(
    paths: dict[str, str], cores: int, count: int, clock: Clock
) -> dict[str, common.Rate]:
    """Name -> function that returns a rate; all through FFCV's loader."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder as StockDecoder
    from ffcv.transforms import RandomHorizontalFlip

    from fast_imagenet.ops import ColorJitter, CropDecode, RandAugment, RandomErasing

    def stock(file: str) -> Callable[[int], float]:
        operations = [StockDecoder((160, 160)), RandomHorizontalFlip()]
        return epochs(paths[file], operations, cores, count, clock)

    def ours(file: str, *more: Any, **options: Any) -> Callable[[int], float]:
        return epochs(paths[file], [CropDecode(160, **options), *more], cores, count, clock)

    def strong(mode: str) -> Callable[[int], float]:
        """RandAugment (2 operations, magnitude 9), ColorJitter 0.4/0.4/0.4, RandomErasing 0.25."""
        color = (RandAugment(2, 9, mode=mode), ColorJitter(0.4, 0.4, 0.4))
        return ours("ours", *color, RandomErasing(0.25, mode="const"))

    stock_jpeg, our_jpeg = stock("stock"), ours("ours")
    return {
        "ffcv_plain_160": partial(stock_jpeg, 160),
        "ours_plain_160": partial(our_jpeg, 160),
        "ffcv_plain_224": partial(stock_jpeg, 224),
        "ours_plain_224": partial(our_jpeg, 224),
        "ffcv_raw_160": partial(stock("raw"), 160),
        "ours_raw_160": partial(ours("raw"), 160),
        "ours_strong_160": partial(strong("lite"), 160),
        "ours_strong_full_160": partial(strong("full"), 160),
        "ours_plain_160_exact_decode": partial(ours("ours", reduced_decode=False), 160),
        "ours_plain_160_bicubic": partial(ours("ours", method="bicubic"), 160),
        "ours_plain_160_on_stock_file": partial(ours("stock"), 160),
    }


def peer_contestants(path: str, cores: int, count: int, clock: Clock) -> dict[str, common.Rate]:
    """Name -> function that returns a rate; those that are installed, on FFCV's JPEGs."""
    import data
    import peers

    files, missing, runs = data.sample_bytes(path), peers.missing_packages(), {}
    count = max(cores, count // 4)  # they are slower: rounds of about equal length
    for recipe in ("plain", "strong"):
        strong = recipe == "strong"
        for name, transform in peers.TRANSFORMS.items():
            if name not in missing:
                samples = peers.Samples(files, transform(160, strong), count)
                runs[f"{name}_{recipe}_160"] = peers.epoch(samples, cores, clock)
        if "dali" not in missing:
            run = peers.dali_epoch(files, 160, strong, cores, count, clock)
            runs[f"dali_{recipe}_160"] = run
    return runs


def measure(arguments: argparse.Namespace) -> tuple[dict[str, dict], dict[str, Any]]:
    """Rates by contestant, and what they were measured on."""
    import data
    import peers

    images = data.read_images(arguments.images, arguments.limit, arguments.max_side)
    cores, left_out = arguments.cores, peers.missing_packages()
    options = (cores, arguments.per_round, common.CLOCKS[arguments.clock])
    kinds = {"ours": {"markers": True}, "raw": {"mode": "raw"}, "stock": {}}
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            name: data.write_file(Path(folder, f"{name}.beton"), images, workers=cores, **extra)
            for name, extra in kinds.items()
        }
        sizes = {name: sum(map(len, data.sample_bytes(path))) for name, path in paths.items()}
        runs = ffcv_contestants(paths, *options)
        if cores > 1 and arguments.clock == "cpu":
            left_out |= dict.fromkeys(peers.TRANSFORMS, "its workers are other processes: no clock")
        else:
            runs |= peer_contestants(paths["stock"], *options)
        rates = common.interleave(runs, arguments.rounds)
    pixels = [image.shape[0] * image.shape[1] for image in images]
    return rates, {
        "images": len(images),
        "max_side": arguments.max_side,
        "mean_pixels": sum(pixels) // len(pixels),
        "quality": data.QUALITY,
        "batch_size": BATCH_SIZE,
        "cores": cores,
        "clock": arguments.clock,
        "peers_run_in": "one process" if cores == 1 else "a DataLoader's workers",
        "left_out": left_out,
        "image_bytes": sizes,
    }


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=7, **FLAGS)
    machine = common.start(arguments.cores, arguments.smoke)
    rates, data = measure(arguments)
    # processor time is of one core already
    cores = arguments.cores if arguments.clock == "wall" else 1
    rates = {name: {"per_core": rate["median"] / cores, **rate} for name, rate in rates.items()}
    ratios = {key: common.ratio(rates, *pair) for key, pair in RATIOS.items() if pair[1] in rates}
    common.publish(arguments.json, rates, ratios, data=data, machine=machine)


if __name__ == "__main__":
    main()
