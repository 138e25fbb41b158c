"""Images per second and core: our operations and their peers on the same images, in one run.

    python benchmarks/loader_throughput.py --images FOLDER --json out.json

Contestants take turns, round after round, on the same cores; rates are medians. What is measured,
and what not, stands in benchmarks/README.md.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import common

BATCH_SIZE = 64
SLOTS = 5  # FFCV's buffers: the batches before all are touched are left out of the timing


def read_arguments(argv):
    parser = common.argument_parser(__doc__, images=True, rounds=7)
    parser.add_argument("--cores", type=int, default=1, help="cores and loader threads (1)")
    parser.add_argument("--per-round", type=int, default=1000, help="images per round (1000)")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="wall time, or the processor time of this process where the cores are shared (wall)",
    )
    return parser.parse_args(argv)


def write_files(images: list, folder: str, workers: int) -> dict:
    """The same images as FFCV writes them, with our JPEG encoder, and raw: name -> path."""
    import data

    options = {"ours": {"markers": True}, "raw": {"mode": "raw"}, "stock": {}}
    return {
        name: data.write_file(Path(folder, f"{name}.beton"), images, workers=workers, **extra)
        for name, extra in options.items()
    }


# ==== Contestants =================================================================================


class FfcvEpochs:
    """One epoch after the other of an FFCV loader.

    Calling it with a size runs `count` images and returns the rate. One loader serves all sizes,
    as in training with a growing resolution: stock FFCV would compile each anew.
    """

    def __init__(self, path: str, operations: list, cores: int, count: int, clock):
        import numpy as np
        from ffcv.loader import Loader, OrderOption
        from ffcv.reader import Reader
        from ffcv.transforms import ToTensor

        self.decoder, self.clock = operations[0], clock
        batch_size = min(BATCH_SIZE, count)
        total = count + SLOTS * batch_size
        self.loader = Loader(
            path,
            batch_size=batch_size,
            num_workers=cores,
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            indices=np.resize(np.arange(int(Reader(path).num_samples)), total),
            drop_last=True,
            pipelines={"image": [*operations, ToTensor()], "label": None},
        )

    def __call__(self, size: int) -> float:
        self.decoder.output_size = (size, size)
        batches = iter(self.loader)
        for _ in range(SLOTS):
            next(batches)
        begin, pictures = self.clock(), 0
        for (images,) in batches:
            pictures += len(images)
        assert images.shape[1:] == (size, size, 3)
        return pictures / (self.clock() - begin)


def strong_operations(policy: str) -> list:
    """RandAugment (2 operations, magnitude 9), ColorJitter 0.4/0.4/0.4, RandomErasing 0.25."""
    from fast_imagenet.ops import ColorJitter, RandAugment, RandomErasing

    return [
        RandAugment(2, 9, mode=policy),
        ColorJitter(0.4, 0.4, 0.4),
        RandomErasing(0.25, mode="const"),
    ]


def ffcv_contestants(paths: dict, cores: int, count: int, clock) -> dict:
    """Name -> function that returns a rate; all through FFCV's loader."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder as StockDecoder
    from ffcv.transforms import RandomHorizontalFlip

    from fast_imagenet.ops import CropDecode

    def epochs(file, *operations):
        return FfcvEpochs(paths[file], operations, cores, count, clock)

    def stock(file):
        return epochs(file, StockDecoder((160, 160)), RandomHorizontalFlip())

    def ours(file, *more, **options):
        return epochs(file, CropDecode(160, **options), *more)

    stock_jpeg, our_jpeg, strong = stock("stock"), ours("ours"), strong_operations
    return {
        "ffcv_plain_160": partial(stock_jpeg, 160),
        "ours_plain_160": partial(our_jpeg, 160),
        "ffcv_plain_224": partial(stock_jpeg, 224),
        "ours_plain_224": partial(our_jpeg, 224),
        "ffcv_raw_160": partial(stock("raw"), 160),
        "ours_raw_160": partial(ours("raw"), 160),
        "ours_strong_160": partial(ours("ours", *strong("lite")), 160),
        "ours_strong_full_160": partial(ours("ours", *strong("full")), 160),
        "ours_plain_160_exact_decode": partial(ours("ours", reduced_decode=False), 160),
        "ours_plain_160_bicubic": partial(ours("ours", method="bicubic"), 160),
        "ours_plain_160_on_stock_file": partial(ours("stock"), 160),
    }


def peer_contestants(path: str, cores: int, count: int, clock) -> dict:
    """Name -> function that returns a rate; those that are installed, on FFCV's JPEGs."""
    import data
    import peers

    files, missing, runs = data.sample_bytes(path), peers.missing_packages(), {}
    pictures = max(cores, count // 4)  # they are slower: rounds of about equal length
    for recipe in ("plain", "strong"):
        for name, transform in peers.TRANSFORMS.items():
            if name not in missing:
                samples = peers.Samples(files, transform(160, recipe == "strong"), pictures)
                runs[f"{name}_{recipe}_160"] = peers.epoch(samples, cores, clock)
        if "dali" not in missing:
            runs[f"dali_{recipe}_160"] = peers.dali_epoch(
                files, 160, recipe == "strong", cores, pictures, clock
            )
    return runs


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


# ==== Main ========================================================================================


def measure(arguments) -> tuple[dict, dict]:
    """Rates by contestant, and what they were measured on."""
    import data
    import peers

    images = data.read_images(arguments.images, arguments.limit, arguments.max_side)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
    options = (arguments.cores, arguments.per_round, clock)
    left_out = peers.missing_packages()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(images, folder, arguments.cores)
        sizes = {name: sum(map(len, data.sample_bytes(path))) for name, path in paths.items()}
        runs = ffcv_contestants(paths, *options)
        if arguments.cores > 1 and arguments.clock == "cpu":
            left_out |= dict.fromkeys(peers.TRANSFORMS, "its workers are other processes: no clock")
        else:
            runs |= peer_contestants(paths["stock"], *options)
        rates = common.interleave(runs, arguments.rounds)
    pixels = [image.shape[0] * image.shape[1] for image in images]
    return rates, {
        "pictures": len(images),
        "max_side": arguments.max_side,
        "mean_pixels": sum(pixels) // len(pixels),
        "quality": data.QUALITY,
        "batch_size": BATCH_SIZE,
        "cores": arguments.cores,
        "clock": arguments.clock,
        "peers_run_in": "one process" if arguments.cores == 1 else "a DataLoader's workers",
        "left_out": left_out,
        "image_bytes": sizes,
    }


def main(argv=None) -> None:
    arguments = read_arguments(argv)
    machine = common.start(arguments.cores, arguments.smoke)
    rates, data = measure(arguments)
    # processor time is of one core already
    cores = arguments.cores if arguments.clock == "wall" else 1
    rates = {name: {"per_core": rate["median"] / cores, **rate} for name, rate in rates.items()}
    ratios = {
        name: round(rates[ours]["median"] / rates[theirs]["median"], 3)
        for name, (ours, theirs) in RATIOS.items()
        if theirs in rates
    }
    for name, rate in rates.items():
        spread = f"{rate['min']:.0f} to {rate['max']:.0f}"
        print(f"{name:32} {rate['median']:8.0f} images/s ({spread})")
    for name, ratio in ratios.items():
        print(f"{name:32} {ratio:8.2f} x")
    common.write_json(arguments.json, {**ratios, "rates": rates, "data": data, "machine": machine})


if __name__ == "__main__":
    main()
