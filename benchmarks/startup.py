"""Seconds from building a Loader to its first batch, imports excluded: compiling, in fact.

    python benchmarks/startup.py --json out.json

Each start is a process of its own. Ours runs once before, so that its kernels are in the cache on
disk as in every start but the first; stock FFCV cannot cache and compiles at every start.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import common

IMAGES = 32
KINDS = ("ours", "ours_strong", "ffcv")


def read_arguments(argv):
    parser = common.argument_parser(__doc__, images=False, rounds=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of the seconds")
    parser.add_argument("--first-batch", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def write_file(path: str) -> None:
    """A few synthetic JPEGs; their content does not matter here."""
    import data
    import numpy as np

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (IMAGES, 64, 80, 3), dtype=np.uint8)
    data.write_file(path, images)


def time_first_batch(kind: str, path: str, clock, smoke: bool) -> None:
    """Print the seconds to the first batch and those of the imports before it."""
    begin = clock()
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.pipeline.compiler import Compiler
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    from fast_imagenet.ops import ColorJitter, CropDecode, RandAugment, RandomErasing

    Compiler.set_enabled(not smoke)
    imported = clock()
    if kind == "ffcv":
        operations = [RandomResizedCropRGBImageDecoder((32, 32)), RandomHorizontalFlip()]
    else:
        operations = [CropDecode(32)]
    if kind == "ours_strong":
        operations += [RandAugment(2, 9), ColorJitter(0.4, 0.4, 0.4), RandomErasing(0.25)]
    pipelines = {"image": [*operations, ToTensor()]}
    loader = Loader(path, batch_size=8, num_workers=1, os_cache=True, pipelines=pipelines)
    next(iter(loader))
    print(json.dumps([clock() - imported, imported - begin]), flush=True)
    os._exit(0)  # the epoch is not at its end


def start(kind: str, path: str, clock: str, smoke: bool) -> float:
    """Seconds to the first batch in a new process."""
    command = [sys.executable, __file__, "--first-batch", kind, path, "--clock", clock]
    command += ["--smoke"] if smoke else []
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])[0]


def main(argv=None) -> None:
    arguments = read_arguments(argv)
    if arguments.first_batch:
        clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
        time_first_batch(*arguments.first_batch, clock, arguments.smoke)
    machine = common.start(1, arguments.smoke)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "data.beton"))
        write_file(path)
        kinds = KINDS[::2] if arguments.smoke else KINDS
        options = (path, arguments.clock, arguments.smoke)
        starts = {kind: partial(start, kind, *options) for kind in kinds}
        if arguments.smoke:
            seconds = {kind: common.summary([start()]) for kind, start in starts.items()}
        else:
            seconds = common.interleave(starts, arguments.rounds)
    for kind, value in seconds.items():
        print(f"{kind}: {value['median']:.2f} s to the first batch ({value['rounds']})")
    keys = {f"{kind}_compile_seconds": value["median"] for kind, value in seconds.items()}
    result = {**keys, "seconds_to_first_batch": seconds}
    result |= {"data": {"clock": arguments.clock}, "machine": machine}
    common.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
