"""Milliseconds per image of each operation: ours, stock FFCV's, Pillow's and torchvision's.

    python benchmarks/op_kernels.py --images FOLDER --json out.json

One core, batches of crops of photographs at 160 and 224 px, every operation at full probability.
Operations that work in place get a fresh copy of the batch each time, outside the timing. The list
is in operations.py.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import common

LEAST_SECONDS = 0.01  # a timed call repeats its batch until it lasts so long
FLAGS = common.IMAGES | {
    "limit": {"default": 64, "help": "different images at most"},
    "sides": {"type": int, "nargs": "+", "default": [160, 224], "help": "resolutions, px"},
}


def timed(run: Callable[[Any], Any], images_bhwc: Any, smoke: bool) -> common.Rate:
    """A function that returns ms per image of `run` over the batch."""

    def once() -> float:
        batch = images_bhwc.copy()
        begin = time.perf_counter()
        run(batch)
        return time.perf_counter() - begin

    once()  # compiles
    repeats = 1 if smoke else max(1, round(LEAST_SECONDS / once()))
    return lambda: 1e3 * sum(once() for _ in range(repeats)) / repeats / len(images_bhwc)


def measure(images: list, size: int, arguments: argparse.Namespace) -> dict[str, dict]:
    """Operation -> who -> ms per image, median and spread; on the images squeezed to a square."""
    import cv2
    import numpy as np

    import operations

    squares = [cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images]
    images_bhwc, times = np.stack(squares), {}
    for name, makers in operations.operations_at(size).items():
        runs = {who: make(images_bhwc) for who, make in makers.items()}
        runs = {who: timed(run, images_bhwc, arguments.smoke) for who, run in runs.items()}
        times[name] = common.interleave(runs, arguments.rounds)
        medians = ", ".join(f"{who} {value['median']:.3f}" for who, value in times[name].items())
        print(f"{size} px, {name}: {medians} ms")
    return times


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=5, **FLAGS)
    machine = common.start(1, arguments.smoke)
    import data

    images = data.read_images(arguments.images, arguments.limit, arguments.max_side)
    times = {str(size): measure(images, size, arguments) for size in arguments.sides}
    result = {"milliseconds": times, "data": {"images": len(images)}, "machine": machine}
    common.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
