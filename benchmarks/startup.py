"""Seconds from building a Loader to its first batch, of a file of ImageNet's number of samples.

    python benchmarks/startup.py --json out.json

Imports are excluded. Each start is a process of its own. Ours runs once before, so that its kernels
are in the cache on disk as in every start but the first; stock FFCV cannot cache and compiles at
every start. The file's tables are real, its images are holes but for those of the first batches.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import common

SAMPLES, SMOKE_SAMPLES = 1_300_000, 2_000
BATCH, IMAGES = 8, 80  # those of the first batches, decoded ahead, are there
HEIGHT, WIDTH, ROOM = 64, 80, 16_384  # of a stored image, and bytes for it
KINDS = ("ours", "ffcv")
FLAGS = {"clock": common.CLOCK, "first_batch": {"nargs": 2, "help": argparse.SUPPRESS}}


def write_data(path: Path, count: int) -> str:
    """A file whose first samples, in its own order and in that of epoch 0, are images."""
    import numpy as np

    from data import write_made_up
    from fast_imagenet.beton.jpeg import encode_jpeg
    from fast_imagenet.data.sampler import epoch_order

    # synthetic: their content does not matter here
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    used = [*range(IMAGES), *epoch_order(count, 0, 0)[:IMAGES].tolist()]
    stored = dict.fromkeys(used, encode_jpeg(image, 90))
    return write_made_up(path, count, stored, height=HEIGHT, width=WIDTH, size=ROOM)


def time_first_batch(kind: str, path: str, clock: str, smoke: bool) -> None:
    """Print the seconds to the first batch and end this process, in the midst of its epoch."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.pipeline.compiler import Compiler
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    from fast_imagenet.data.ffcv_loader import TrainLoader

    Compiler.set_enabled(not smoke)
    now = common.CLOCKS[clock]
    begin = now()
    if kind == "ffcv":
        operations = [RandomResizedCropRGBImageDecoder((32, 32)), RandomHorizontalFlip()]
        pipelines = {"image": [*operations, ToTensor()]}
        options = dict(num_workers=1, os_cache=True, pipelines=pipelines)
        batches = iter(Loader(path, batch_size=BATCH, **options))
    else:
        loader = TrainLoader(path, global_batch=BATCH, seed=0, num_workers=1)
        batches = loader.epoch(0, 32)
    next(batches)
    print(json.dumps(now() - begin), flush=True)
    os._exit(0)


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=3, **FLAGS)
    if arguments.first_batch:
        time_first_batch(*arguments.first_batch, arguments.clock, arguments.smoke)
    machine = common.start(1, arguments.smoke)
    count = SMOKE_SAMPLES if arguments.smoke else SAMPLES
    more = [f"--clock={arguments.clock}", *["--smoke"] * arguments.smoke]
    with tempfile.TemporaryDirectory() as folder:
        path = write_data(Path(folder, "data.beton"), count)
        start = partial(common.answer_of, __file__, "--first-batch")
        starts = {kind: partial(start, kind, path, *more) for kind in KINDS}
        seconds = common.interleave(starts, arguments.rounds)
    result = {f"{kind}_compile_seconds": value["median"] for kind, value in seconds.items()}
    data = {"samples": count, "clock": arguments.clock}
    result |= {"seconds_to_first_batch": seconds, "data": data}
    common.publish(arguments.json, **result, machine=machine)


if __name__ == "__main__":
    main()
