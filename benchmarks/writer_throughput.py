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
import resource
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import common

QUALITY = 90
ENDINGS = {".jpeg", ".jpg", ".png"}


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of images, searched recursively")
    parser.add_argument("--json", help="where to write the result")
    parser.add_argument("--cores", type=int, default=1, help="cores, and worker processes (1)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--limit", type=int, default=200, help="different images at most (200)")
    parser.add_argument("--repeats", type=int, default=4, help="long file / short file (4)")
    parser.add_argument("--max-side", type=int, default=500, help="pixels (500)")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="wall time, or processor time with all processes where cores are shared (wall)",
    )
    return parser.parse_args()


# ==== Data ========================================================================================


def lay_out(images: str, limit: int, repeats: int, folder: Path) -> list:
    """Sources of the short and the long file: links to the same images, once and `repeats` times.

    Raises: SystemExit when there are no images.
    """
    from fast_imagenet.sources import open_source

    paths = [path for path in sorted(Path(images).rglob("*")) if path.suffix.lower() in ENDINGS]
    if not paths:
        raise SystemExit(f"--images {images}: no .jpeg, .jpg or .png below it")
    chosen = paths[:: max(1, len(paths) // limit)][:limit]
    sources = []
    for times in (1, repeats):
        for number, path in enumerate(chosen * times):
            place = folder / str(times) / "train" / f"class_{number % 10}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}{path.suffix}").symlink_to(path.resolve())
        sources.append(open_source("image_folder", folder / str(times), "train"))
    return sources


class Pictures:
    """What FFCV's writer reads: (PIL image, label), as torchvision's ImageFolder gives them."""

    def __init__(self, source):
        self.names = [source.name(index) for index in range(len(source))]
        self.labels = source.labels.tolist()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        from PIL import Image

        with open(self.names[index], "rb") as file:
            return Image.open(file).convert("RGB"), self.labels[index]


# ==== Contestants =================================================================================


def write_stock(source, path: str, max_side: int, workers: int) -> None:
    """FFCV's own writer."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(write_mode="jpg", max_resolution=max_side, jpeg_quality=QUALITY)
    writer = DatasetWriter(path, {"image": image, "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(Pictures(source))


def write_ours(source, path: str, max_side: int, workers: int) -> None:
    """The writer behind write_dataset.py."""
    from fast_imagenet.beton.encode import EncodeSettings
    from fast_imagenet.beton.writer import write_beton

    settings = EncodeSettings(mode="jpg", quality=QUALITY, max_side=max_side)
    write_beton(path, source, settings, workers=workers, overwrite=True)


def processor_time() -> float:
    """Seconds of processor time of this process and of those that it has waited for."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    return total


def seconds_of(write, source, folder: str, clock) -> float:
    """How long writing one file takes."""
    begin = clock()
    write(source, os.path.join(folder, f"{write.func.__name__}.beton"))
    for child in multiprocessing.active_children():
        child.join()  # FFCV does not wait for its workers; their time is known only then
    return clock() - begin


def measure(writers: dict, sources: list, rounds: int, clock) -> tuple[dict, dict]:
    """Rates without and with starting up, name -> summary."""
    steady, whole = ({name: [] for name in writers} for _ in range(2))
    short, long = sources
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            for name, write in writers.items():
                seconds = [seconds_of(write, source, folder, clock) for source in sources]
                if turn:  # the first round warms up: compiling, page cache
                    steady[name].append((len(long) - len(short)) / (seconds[1] - seconds[0]))
                    whole[name].append(len(long) / seconds[1])
    return tuple(
        {name: common.summary(values) for name, values in rates.items()}
        for rates in (steady, whole)
    )


def image_bytes(path: str) -> int:
    """Bytes of all samples; the file itself is rounded up to whole pages."""
    from ffcv.reader import Reader

    return int(Reader(path).alloc_table["size"].sum())


def sizes_of(writers: dict, source) -> dict:
    """Bytes of all images in the short file of each contestant."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for name, write in writers.items():
            path = os.path.join(folder, f"{name}.beton")
            write(source, path)
            sizes[name] = image_bytes(path)
    return sizes


# ==== Main ========================================================================================


def main() -> None:
    arguments = read_arguments()
    cores = common.pin_to_cores(arguments.cores)
    machine = common.describe_machine(cores)
    # TBB's threads would wait for ever at the end, as FFCV's writer forks this process
    os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
    import cv2

    cv2.setNumThreads(1)  # FFCV's workers are forks of this process; ours set it themselves
    options = dict(max_side=arguments.max_side, workers=len(cores))
    writers = {"ffcv": partial(write_stock, **options), "ours": partial(write_ours, **options)}
    clock = {"wall": time.perf_counter, "cpu": processor_time}[arguments.clock]
    folder = Path(tempfile.mkdtemp())
    try:
        sources = lay_out(arguments.images, arguments.limit, arguments.repeats, folder)
        sizes = sizes_of(writers, sources[0])
        steady, whole = measure(writers, sources, arguments.rounds, clock)
    finally:
        shutil.rmtree(folder)
    result = {
        "writer_vs_ffcv": round(steady["ours"]["median"] / steady["ffcv"]["median"], 3),
        "writer_bytes_vs_ffcv": round(sizes["ours"] / sizes["ffcv"], 4),
        "writer_with_start_vs_ffcv": round(whole["ours"]["median"] / whole["ffcv"]["median"], 3),
    }
    for name in writers:
        rate, start = steady[name], whole[name]
        print(
            f"{name:6} {rate['median']:6.0f} images/s ({rate['min']:.0f} to {rate['max']:.0f}),"
            f" {start['median']:.0f} with starting up, {sizes[name]:,} bytes"
        )
    for name, ratio in result.items():
        print(f"{name:28} {ratio:.3f} x")
    data = {
        "pictures": [len(source) for source in sources],
        "max_side": arguments.max_side,
        "quality": QUALITY,
        "workers": len(cores),
        "clock": arguments.clock,
    }
    result |= {"rates": steady, "rates_with_start": whole, "image_bytes": sizes}
    common.write_json(arguments.json, {**result, "data": data, "machine": machine})


if __name__ == "__main__":
    main()
