"""Milliseconds per image of each operation: ours and, where it has one, stock FFCV's.

    python benchmarks/op_kernels.py --images FOLDER --json out.json

One core, batches of crops of photographs at 160 and 224 px, every operation at full probability.
Operations that work in place get a fresh copy of the batch each time, outside the timing. Other
libraries are compared as wholes: loader_throughput.py.
"""

import time
from collections.abc import Callable
from typing import Any

import common

LEAST_SECONDS = 0.01  # a timed call repeats its batch until it lasts so long
FLAGS = common.IMAGES | {"limit": {"default": 64, "help": "different images at most"}}
SIDES, SMOKE_SIDES = (160, 224), (32,)  # px


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


def measure(images: list, size: int, rounds: int, smoke: bool) -> dict[str, dict]:
    """Operation -> who -> ms per image, median and spread; on the images squeezed to a square."""
    import cv2
    import numpy as np

    from operations import batch_operations, image_operations

    squares = [cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images]
    images_bhwc, times = np.stack(squares), {}
    for name, makers in {**image_operations(), **batch_operations(size)}.items():
        runs = {who: timed(make(images_bhwc), images_bhwc, smoke) for who, make in makers.items()}
        times[name] = common.interleave(runs, rounds)
    return times


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=5, **FLAGS)
    machine = common.start(1, arguments.smoke)
    from data import read_images

    images = read_images(arguments.images, arguments.limit, arguments.max_side)
    sides, how = SMOKE_SIDES if arguments.smoke else SIDES, (arguments.rounds, arguments.smoke)
    times = {str(size): measure(images, size, *how) for size in sides}
    data = {"images": len(images)}
    common.publish(arguments.json, milliseconds=times, data=data, machine=machine)


if __name__ == "__main__":
    main()
