"""Compile every kernel of the operations for this machine, once; later processes read the cache.

    python -m fast_imagenet.ops.compile

`make setup` runs it. Without it the first training compiles what it uses, up to a minute.
Nothing is compiled again until a source file of a kernel, numba or the processor changes.
"""

import time

import numpy as np

from .. import ops
from .operation import KeyedOperation
from .rand_augment import MODES


def try_draws() -> None:
    """The boxes of a batch; what follows them is in the native library."""
    sides = np.full(8, 48)
    ops.CropDecode(16).draw(np.arange(8), sides, sides, (16, 16))


def changes() -> list[KeyedOperation]:
    """Every operation after the decoder, RandAugment in each mode: all kernels are called."""
    kinds = [getattr(ops, name) for name in ops.__all__]
    plain = [
        kind() for kind in kinds if isinstance(kind, type) and issubclass(kind, KeyedOperation)
    ]
    return [*plain, *(ops.RandAugment(mode=mode, mstd=0.5) for mode in MODES)]


def try_changes() -> None:
    """Every operation on uint8 images; Normalize to each type, and erasing behind it."""
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    samples = np.arange(len(images))
    for operation in changes():
        operation.transform(images.copy(), samples)
    for dtype in ("float32", "float16", "bfloat16"):
        normalized = ops.Normalize((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), dtype).transform(images)
        for mode in ("const", "rand", "pixel"):
            ops.RandomErasing(1.0, mode).transform(normalized, samples)


def main() -> None:
    """Compile everything and say how long it took."""
    start = time.perf_counter()
    try_draws()
    try_changes()
    print(f"operations ready after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
