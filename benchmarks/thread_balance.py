"""How long the slowest thread works on a batch, against the mean of all: simulated.

    python benchmarks/thread_balance.py --images FOLDER --json out.json

The processor time of every image is measured in one thread, in FFCV's loader; with these times the
batches of more threads than this machine has are dealt out by the function that deals them out in
the loader. 1 is perfect. Not in it: the interpreter's lock, and cores that differ in speed.
"""

import argparse
import heapq
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import common

DRAWS = 200  # batches, each of random images
THREADS, BATCHES = (8, 16), (64, 256)
FLAGS = common.IMAGES | {"limit": {"default": 500, "help": "different images at most"}}


def image_times(path: str, then: list[Any], epochs: int) -> Any:
    """Seconds of processor time, float64 [images of all epochs]: the lower of two."""
    import numpy as np
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    from fast_imagenet.ops import CropDecode

    times: list[float] = []

    def timed(work: Callable[[int, int, int], Any], count: int) -> None:
        for b in range(count):
            begin = time.thread_time()
            work(0, b, b + 1)
            times.append(time.thread_time() - begin)

    decoder = CropDecode(160, then=then)
    pipelines = {"image": [decoder, ToTensor()], "label": None}
    loader = Loader(path, 64, num_workers=1, os_cache=True, drop_last=False, pipelines=pipelines)
    for _ in loader:  # compiles
        pass
    with mock.patch("fast_imagenet.ops.crop_decode.run_threads", timed):
        for epoch in range(2 * epochs):
            decoder.set_epoch(epoch // 2)
            for _ in loader:
                pass
    return np.array(times).reshape(epochs, 2, -1).min(1).reshape(-1)


def slowest(times_b: Any, threads: int) -> float:
    """Seconds until all threads are done when each takes the next range after its last."""
    from fast_imagenet.ops.precompiled import split_batch

    ends = [0.0] * threads
    for first, end in split_batch(len(times_b), threads):
        heapq.heapreplace(ends, ends[0] + times_b[first:end].sum())
    return max(ends)


def balance(times: Any, threads: int, batch: int) -> float:
    """Slowest thread / mean of all, over DRAWS batches. times: float64 [images]."""
    import numpy as np

    picks = np.random.default_rng(0).integers(0, len(times), (DRAWS, batch))
    seconds = sum(slowest(times[places], threads) for places in picks)
    return round(float(seconds / (times[picks].sum() / threads)), 3)


def measure(arguments: argparse.Namespace) -> dict[str, dict]:
    """Recipe -> ms per image, deviation / mean of images, and `balance` by 'threads x batch'."""
    import data
    from fast_imagenet.ops import ColorJitter, RandAugment, RandomErasing

    images = data.read_images(arguments.images, arguments.limit, arguments.max_side)
    strong = [RandAugment(2, 9), ColorJitter(0.4, 0.4, 0.4), RandomErasing(0.25)]
    found, cases = {}, list(itertools.product(THREADS, BATCHES))
    with tempfile.TemporaryDirectory() as folder:
        path = data.write_file(Path(folder, "data.beton"), images, markers=True)
        for name, then in {"plain": [], "strong": strong}.items():
            times = image_times(path, then, arguments.rounds)
            found[name] = {
                "milliseconds": float(f"{1e3 * times.mean():.4g}"),
                "deviation": round(float(times.std() / times.mean()), 3),
                **{f"{n} x {batch}": balance(times, n, batch) for n, batch in cases},
            }
    return found


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=4, **FLAGS)
    machine = common.start(1, arguments.smoke)
    settings = {"limit": arguments.limit, "max_side": arguments.max_side}
    found = measure(arguments)
    common.publish(arguments.json, slowest_vs_mean=found, data=settings, machine=machine)


if __name__ == "__main__":
    main()
