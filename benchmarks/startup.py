"""Seconds from building a Loader to its first batch, imports excluded: compiling, in fact.

    python benchmarks/startup.py --json out.json

Each start is a process of its own. Ours runs once before, so that its kernels are in the cache on
disk as in every start but the first; stock FFCV cannot cache and compiles at every start.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

PICTURES = 32


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write the result")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each kind (3)")
    parser.add_argument("--first-batch", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_file(path: str) -> None:
    """A few synthetic JPEGs; their content does not matter here."""
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (PICTURES, 64, 80, 3), dtype=np.uint8)
    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    samples = [(image, index) for index, image in enumerate(images)]
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(samples)


def time_first_batch(kind: str, path: str) -> None:
    """Print the seconds to the first batch and to the end of the process's imports before it."""
    begin = time.perf_counter()
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    from fast_imagenet.ops import CropDecode

    imported = time.perf_counter()
    operations = [CropDecode(32)]
    if kind == "ffcv":
        operations = [RandomResizedCropRGBImageDecoder((32, 32)), RandomHorizontalFlip()]
    pipelines = {"image": [*operations, ToTensor()]}
    loader = Loader(path, batch_size=8, num_workers=1, os_cache=True, pipelines=pipelines)
    next(iter(loader))
    print(json.dumps([time.perf_counter() - imported, imported - begin]), flush=True)


def start(kind: str, path: str) -> float:
    """Seconds to the first batch in a new process."""
    command = [sys.executable, __file__, "--first-batch", kind, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[0])[0]


def main() -> None:
    arguments = read_arguments()
    if arguments.first_batch:
        time_first_batch(*arguments.first_batch)
        return
    machine = common.describe_machine(common.pin_to_cores(1))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "data.beton"))
        write_file(path)
        starts = {kind: lambda kind=kind: start(kind, path) for kind in ("ours", "ffcv")}
        seconds = common.interleave(starts, arguments.rounds)
    for kind, value in seconds.items():
        print(f"{kind}: {value['median']:.2f} s to the first batch ({value['rounds']})")
    common.write_json(arguments.json, {"seconds_to_first_batch": seconds, "machine": machine})


if __name__ == "__main__":
    main()
