"""How long the slowest thread works on a batch, against the mean of all: simulated.

    python benchmarks/thread_balance.py --images FOLDER --json out.json

The processor time of every image is measured in one thread, in FFCV's loader; with these times the
batches of more threads than this machine has are dealt out by the function that deals them out in
the loader. 1 is perfect. Beside it, what it would be with images t, t + n, t + 2n, ... for thread t
of n, and with threads that wait for each other after every operation. Not in it: the interpreter's
lock, and cores that differ in speed.
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


def image_times(path: str, operations: list[Any], epochs: int) -> Any:
    """Seconds of processor time, float64 [operations, images of all epochs]: the lower of two."""
    import numpy as np
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    times: list[list[float]] = []

    def timed(work: Callable[[int, int, int], Any], count: int) -> None:
        times.append([])
        for b in range(count):
            begin = time.thread_time()
            work(0, b, b + 1)
            times[-1].append(time.thread_time() - begin)

    pipelines = {"image": [*operations, ToTensor()], "label": None}
    loader = Loader(path, 64, num_workers=1, os_cache=True, drop_last=False, pipelines=pipelines)
    for _ in loader:  # compiles
        pass
    module = "fast_imagenet.ops"
    with (
        mock.patch(f"{module}.crop_decode.run_threads", timed),
        mock.patch(f"{module}.operation.run_threads", timed),
    ):
        for epoch in range(2 * epochs):
            for operation in operations:
                operation.set_epoch(epoch // 2)
            for _ in loader:
                pass
    rows = [np.concatenate(times[k :: len(operations)]) for k in range(len(operations))]
    return np.array(rows).reshape(len(rows), epochs, 2, -1).min(2).reshape(len(rows), -1)


def slowest_in_turn(times_b: Any, threads: int) -> float:
    """Seconds until all threads are done when each takes the next range after its last."""
    from fast_imagenet.ops.precompiled import split_batch

    ends = [0.0] * threads
    for first, end in split_batch(len(times_b), threads):
        heapq.heapreplace(ends, ends[0] + times_b[first:end].sum())
    return max(ends)


def slowest_dealt(times_b: Any, threads: int) -> float:
    """Seconds until all threads are done when thread t has images t, t + threads, ..."""
    return max(times_b[t::threads].sum() for t in range(threads))


def balance(times: Any, threads: int, batch: int) -> dict[str, float]:
    """Slowest thread / mean of all, over DRAWS batches. times: float64 [operations, images]."""
    import numpy as np

    ways = {
        "one_visit": lambda part: slowest_in_turn(part.sum(0), threads),
        "each_operation": lambda part: sum(slowest_in_turn(row, threads) for row in part),
        "each_operation_dealt": lambda part: sum(slowest_dealt(row, threads) for row in part),
    }
    picks = np.random.default_rng(0).integers(0, times.shape[1], (DRAWS, batch))
    seconds = {name: sum(way(times[:, p]) for p in picks) for name, way in ways.items()}
    mean = times[:, picks].sum() / threads
    return {name: round(float(value / mean), 3) for name, value in seconds.items()}


def measure(arguments: argparse.Namespace) -> dict[str, dict]:
    """Recipe -> ms per image, deviation / mean of images, and `balance` by 'threads x batch'."""
    import data
    from fast_imagenet.ops import ColorJitter, CropDecode, RandAugment, RandomErasing

    images = data.read_images(arguments.images, arguments.limit, arguments.max_side)
    strong = [RandAugment(2, 9), ColorJitter(0.4, 0.4, 0.4), RandomErasing(0.25)]
    found, cases = {}, list(itertools.product(THREADS, BATCHES))
    with tempfile.TemporaryDirectory() as folder:
        path = data.write_file(Path(folder, "data.beton"), images, markers=True)
        for name, more in {"plain": [], "strong": strong}.items():
            times = image_times(path, [CropDecode(160), *more], arguments.rounds)
            whole = 1e3 * times.sum(0)
            found[name] = {
                "milliseconds": float(f"{whole.mean():.4g}"),
                "deviation": round(float(whole.std() / whole.mean()), 3),
                **{f"{n} x {batch}": balance(times, n, batch) for n, batch in cases},
            }
    return found


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=4, **FLAGS)
    machine = common.start(1, arguments.smoke)
    found = measure(arguments)
    for name, values in found.items():
        for key, value in values.items():
            print(f"{name:8} {key:14} {value}")
    settings = {"limit": arguments.limit, "max_side": arguments.max_side}
    result = {"slowest_vs_mean": found, "data": settings, "machine": machine}
    common.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
