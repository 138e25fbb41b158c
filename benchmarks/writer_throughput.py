"""Images per second and core that become a data file: our writer and FFCV's, in one run.

    python benchmarks/writer_throughput.py --images FOLDER --json out.json

Both read the same image files, shrink to the same longest side, store JPEGs of the same quality
and run as many worker processes. They take turns, round after round. Each writes a short and a long
file in every round: the rate counts what the long one took more, so that starting up is left out;
the rates of the whole long file, with all that goes before, are published beside it.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

import common
from fast_imagenet.beton.encode import EncodeSettings
from fast_imagenet.sources import Source, open_source

FLAGS = common.IMAGES | {
    "cores": {"default": 1, "help": "cores, and worker processes"},
    "clock": common.CLOCK,
}
REPEATS, QUALITY = 4, 90  # long file / short file; of JPEG
Write = Callable[[Source, str], None]


class Samples:
    """What FFCV's writer reads: (PIL image, label), as torchvision's ImageFolder gives them."""

    def __init__(self, source: Source) -> None:
        self.names = [source.name(index) for index in range(len(source))]
        self.labels = source.labels.tolist()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with open(self.names[index], "rb") as file:
            return Image.open(file).convert("RGB"), self.labels[index]


def link_images(arguments: argparse.Namespace, folder: Path) -> list[Source]:
    """Sources of the short and the long file: links to the same images, once and more often."""
    import data

    chosen, sources = data.image_files(arguments.images, arguments.limit), []
    for times in (1, REPEATS):
        for number, path in enumerate(chosen * times):
            place = folder / str(times) / "train" / f"class_{number % 10}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}{path.suffix}").symlink_to(path.resolve())
        sources.append(open_source("image_folder", folder / str(times), "train"))
    return sources


def write_stock(settings: EncodeSettings, workers: int, source: Source, path: str) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    size, quality = settings.max_side, settings.quality
    image = RGBImageField(write_mode="jpg", max_resolution=size, jpeg_quality=quality)
    writer = DatasetWriter(path, {"image": image, "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(Samples(source))


def seconds_of(write: Write, source: Source, path: str, clock: Callable[[], float]) -> float:
    """How long writing one file takes."""
    begin = clock()
    write(source, path)
    for child in multiprocessing.active_children():
        child.join()  # FFCV does not wait for its workers; their time is known only then
    return clock() - begin


def measure(arguments: argparse.Namespace, writers: dict[str, Write]) -> dict[str, dict]:
    """Rates without and with starting up, name -> summary; samples and bytes of the files."""
    from ffcv.reader import Reader

    clock = common.CLOCKS[arguments.clock]
    if arguments.clock == "cpu":  # of the workers, too
        clock = lambda: time.process_time() + common.children_time()  # noqa: E731
    steady, whole = ({name: [] for name in writers} for _ in range(2))
    with tempfile.TemporaryDirectory() as links, tempfile.TemporaryDirectory() as folder:
        short, long = link_images(arguments, Path(links))
        paths, sizes = {name: os.path.join(folder, f"{name}.beton") for name in writers}, {}
        for name in list(writers) * (arguments.rounds + 1):
            first = seconds_of(writers[name], short, paths[name], clock)
            # of all samples: the file itself is rounded up to whole pages
            sizes[name] = int(Reader(paths[name]).alloc_table["size"].sum())
            second = seconds_of(writers[name], long, paths[name], clock)
            steady[name].append((len(long) - len(short)) / (second - first))
            whole[name].append(len(long) / second)
    # the first round warms up: compiling, page cache
    rates = [{name: common.summary(r[1:]) for name, r in of.items()} for of in (steady, whole)]
    data = {"images": [len(short), len(long)], "workers": arguments.cores}
    data |= {"max_side": arguments.max_side, "quality": QUALITY, "clock": arguments.clock}
    return {"rates": rates[0], "rates_with_start": rates[1], "image_bytes": sizes, "data": data}


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=9, **FLAGS)
    machine, workers = common.start(arguments.cores, arguments.smoke), arguments.cores
    from fast_imagenet.beton.writer import write_beton

    settings = EncodeSettings(mode="jpg", quality=QUALITY, max_side=arguments.max_side)
    writers = {
        "ffcv": partial(write_stock, settings, workers),
        "ours": lambda source, path: write_beton(
            path, source, settings, workers=workers, overwrite=True
        ),
    }
    found = measure(arguments, writers)
    sizes = found["image_bytes"]
    ratios = {
        "writer_vs_ffcv": common.ratio(found["rates"], "ours", "ffcv"),
        "writer_bytes_vs_ffcv": round(sizes["ours"] / sizes["ffcv"], 4),
        "writer_with_start_vs_ffcv": common.ratio(found["rates_with_start"], "ours", "ffcv"),
    }
    common.publish(arguments.json, **ratios, **found, machine=machine)


if __name__ == "__main__":
    main()
