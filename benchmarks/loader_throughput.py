"""Pictures per second and core: our operations and their peers on the same pictures, in one run.

    python benchmarks/loader_throughput.py --images FOLDER --json out.json

Contestants take turns, round after round, on the same cores; rates are medians. What is measured,
and what not, stands in benchmarks/README.md.
"""

import argparse
import tempfile
import time
from pathlib import Path

import common

BATCH_SIZE = 64
SLOTS = 5  # FFCV's buffers: the batches before all are touched are left out of the timing
QUALITY = 90


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of pictures, searched recursively")
    parser.add_argument("--json", help="where to write the result")
    parser.add_argument("--cores", type=int, default=1, help="cores and loader threads (1)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--limit", type=int, default=200, help="pictures taken at most (200)")
    parser.add_argument("--per-round", type=int, default=1000, help="pictures per round (1000)")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="wall time, or the processor time of this process where the cores are shared (wall)",
    )
    parser.add_argument("--max-side", type=int, default=500, help="pixels (500)")
    return parser.parse_args()


# ==== Data ========================================================================================


def read_pictures(folder: str, limit: int, max_side: int) -> list:
    """uint8 [h, w, 3] pictures, resized as FFCV's writer does it."""
    import numpy as np
    from ffcv.fields.rgb_image import resizer
    from PIL import Image

    endings = {".jpeg", ".jpg", ".png"}
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in endings]
    if not paths:
        raise SystemExit(f"--images {folder}: no .jpeg, .jpg or .png below it")
    step = max(1, len(paths) // limit)
    chosen = paths[::step][:limit]
    return [resizer(np.asarray(Image.open(path).convert("RGB")), max_side) for path in chosen]


class Pictures:
    """What FFCV's writer reads: (picture, index)."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index


def write_files(images: list, folder: str) -> dict:
    """The same pictures as FFCV writes them, with our JPEG encoder, and raw: name -> path."""
    import numpy as np
    from ffcv.fields import IntField, RGBImageField, rgb_image
    from ffcv.writer import DatasetWriter

    from fast_imagenet.jpeg import encode_jpeg

    def encode_with_markers(image, quality):
        return np.frombuffer(encode_jpeg(image, quality), np.uint8)

    stock_encoder, paths = rgb_image.encode_jpeg, {}
    for name in ("stock", "ours", "raw"):
        rgb_image.encode_jpeg = encode_with_markers if name == "ours" else stock_encoder
        mode = "raw" if name == "raw" else "jpg"
        field = RGBImageField(write_mode=mode, jpeg_quality=QUALITY)
        paths[name] = str(Path(folder, f"{name}.beton"))
        writer = DatasetWriter(paths[name], {"image": field, "label": IntField()}, num_workers=1)
        writer.from_indexed_dataset(Pictures(images), shuffle_indices=False)
    rgb_image.encode_jpeg = stock_encoder
    return paths


def image_bytes(path: str) -> int:
    """Bytes of all samples; the file itself is rounded up to whole pages."""
    from ffcv.reader import Reader

    return int(Reader(path).alloc_table["size"].sum())


# ==== Contestants =================================================================================


def ffcv_epoch(path: str, operations: list, cores: int, count: int, clock):
    """A function that runs one epoch of `count` pictures and returns the rate."""
    import numpy as np
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader
    from ffcv.transforms import ToTensor

    loader = Loader(
        path,
        batch_size=BATCH_SIZE,
        num_workers=cores,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        indices=np.resize(np.arange(int(Reader(path).num_samples)), count + SLOTS * BATCH_SIZE),
        drop_last=True,
        pipelines={"image": [*operations, ToTensor()], "label": None},
    )

    def run() -> float:
        batches = iter(loader)
        for _ in range(SLOTS):
            next(batches)
        begin, pictures = clock(), 0
        for (images,) in batches:
            pictures += len(images)
        return pictures / (clock() - begin)

    return run


def torchvision_epoch(path: str, size: int, count: int, clock):
    """Pillow decode and torchvision's v2 transforms in this process, no worker processes."""
    import io

    import numpy as np
    import torch
    from ffcv.reader import Reader
    from PIL import Image
    from torchvision.transforms import v2

    reader, memory = Reader(path), np.memmap(path, "uint8", mode="r")
    places = dict(
        zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True)
    )
    starts = reader.metadata["f0"]["data_ptr"].tolist()
    files = [memory[start : start + places[start]].tobytes() for start in starts]
    transform = v2.Compose(
        [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )

    def run() -> float:
        begin = clock()
        for first in range(0, count, BATCH_SIZE):
            batch = range(first, min(count, first + BATCH_SIZE))
            pictures = (Image.open(io.BytesIO(files[i % len(files)])) for i in batch)
            torch.stack([transform(picture.convert("RGB")) for picture in pictures])
        return count / (clock() - begin)

    return run


def contestants(paths: dict, cores: int, count: int, clock) -> dict:
    """Name -> function that returns a rate."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder as StockDecoder
    from ffcv.transforms import RandomHorizontalFlip

    from fast_imagenet.ops import CropDecode

    def ours(file, size, **options):
        return ffcv_epoch(paths[file], [CropDecode(size, **options)], cores, count, clock)

    def stock(file, size):
        operations = [StockDecoder((size, size)), RandomHorizontalFlip()]
        return ffcv_epoch(paths[file], operations, cores, count, clock)

    runs = {
        "ffcv_plain_160": stock("stock", 160),
        "ours_plain_160": ours("ours", 160),
        "ffcv_plain_224": stock("stock", 224),
        "ours_plain_224": ours("ours", 224),
        "ffcv_raw_160": stock("raw", 160),
        "ours_raw_160": ours("raw", 160),
        "ours_plain_160_exact_decode": ours("ours", 160, reduced_decode=False),
        "ours_plain_160_bicubic": ours("ours", 160, method="bicubic"),
        "ours_plain_160_on_stock_file": ours("stock", 160),
    }
    if cores == 1:
        runs["torchvision_plain_160"] = torchvision_epoch(paths["stock"], 160, count // 4, clock)
    return runs


RATIOS = {
    "plain_160_vs_ffcv": ("ours_plain_160", "ffcv_plain_160"),
    "plain_224_vs_ffcv": ("ours_plain_224", "ffcv_plain_224"),
    "raw_160_vs_ffcv": ("ours_raw_160", "ffcv_raw_160"),
    "plain_160_vs_torchvision": ("ours_plain_160", "torchvision_plain_160"),
}


# ==== Main ========================================================================================


def main() -> None:
    arguments = read_arguments()
    cores = common.pin_to_cores(arguments.cores)
    machine = common.describe_machine(cores)
    common.fail_with_threads()
    import cv2
    import torch

    torch.set_num_threads(len(cores))
    cv2.setNumThreads(1)
    images = read_pictures(arguments.images, arguments.limit, arguments.max_side)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(images, folder)
        sizes = {name: image_bytes(path) for name, path in paths.items()}
        clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
        runs = contestants(paths, len(cores), arguments.per_round, clock)
        rates = common.interleave(runs, arguments.rounds)
    ratios = {
        name: round(rates[ours]["median"] / rates[theirs]["median"], 3)
        for name, (ours, theirs) in RATIOS.items()
        if theirs in rates
    }
    for name, rate in rates.items():
        print(
            f"{name:32} {rate['median']:8.0f} pictures/s ({rate['min']:.0f} to {rate['max']:.0f})"
        )
    for name, ratio in ratios.items():
        print(f"{name:32} {ratio:8.2f} x")
    data = {
        "pictures": len(images),
        "max_side": arguments.max_side,
        "mean_pixels": int(sum(i.shape[0] * i.shape[1] for i in images) / len(images)),
        "quality": QUALITY,
        "batch_size": BATCH_SIZE,
        "clock": arguments.clock,
        "image_bytes": sizes,
    }
    common.write_json(arguments.json, {**ratios, "rates": rates, "data": data, "machine": machine})


if __name__ == "__main__":
    main()
