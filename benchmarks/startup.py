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
from functools import partial
from pathlib import Path

import common

IMAGES = 32
KINDS = ("ours", "ours_strong", "ffcv")
FLAGS = {"clock": common.CLOCK, "first_batch": {"nargs": 2, "help": argparse.SUPPRESS}}


def time_first_batch(kind: str, path: str, clock: str, smoke: bool) -> None:
    """Print the seconds to the first batch and those of the imports before it."""
    now = common.CLOCKS[clock]
    begin = now()
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.pipeline.compiler import Compiler
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    from fast_imagenet.ops import ColorJitter, CropDecode, RandAugment, RandomErasing

    Compiler.set_enabled(not smoke)
    imported = now()
    if kind == "ffcv":
        operations = [RandomResizedCropRGBImageDecoder((32, 32)), RandomHorizontalFlip()]
    else:
        operations = [CropDecode(32)]
    if kind == "ours_strong":
        operations += [RandAugment(2, 9), ColorJitter(0.4, 0.4, 0.4), RandomErasing(0.25)]
    pipelines = {"image": [*operations, ToTensor()]}
    loader = Loader(path, batch_size=8, num_workers=1, os_cache=True, pipelines=pipelines)
    next(iter(loader))
    print(json.dumps([now() - imported, imported - begin]), flush=True)
    os._exit(0)  # the epoch is not at its end


def start(kind: str, path: str, clock: str, smoke: bool) -> float:
    """Seconds to the first batch in a new process."""
    command = [sys.executable, __file__, "--first-batch", kind, path, "--clock", clock]
    command += ["--smoke"] if smoke else []
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])[0]


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=3, **FLAGS)
    if arguments.first_batch:
        time_first_batch(*arguments.first_batch, arguments.clock, arguments.smoke)
    machine = common.start(1, arguments.smoke)
    import numpy as np

    import data

    # synthetic: their content does not matter here
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 64, 80, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = data.write_file(Path(folder, "data.beton"), images)
        kinds = KINDS[::2] if arguments.smoke else KINDS
        options = (path, arguments.clock, arguments.smoke)
        starts = {kind: partial(start, kind, *options) for kind in kinds}
        if arguments.smoke:
            seconds = {kind: common.summary([start()]) for kind, start in starts.items()}
        else:
            seconds = common.interleave(starts, arguments.rounds)
    for kind, value in seconds.items():
        print(f"{kind}: {value['median']:.2f} s to the first batch ({value['rounds']})")
    result = {f"{kind}_compile_seconds": value["median"] for kind, value in seconds.items()}
    result |= {"seconds_to_first_batch": seconds, "data": {"clock": arguments.clock}}
    common.write_json(arguments.json, {**result, "machine": machine})


if __name__ == "__main__":
    main()
