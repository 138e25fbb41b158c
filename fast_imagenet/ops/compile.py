"""Compile every kernel of the operations for this machine, once; later processes read the cache.

    python -m fast_imagenet.ops.compile

`make setup` runs it. Without it the first training compiles what it uses, about a minute. Nothing
is compiled again until a source file of a kernel, numba or the processor changes.
"""

import time

import numpy as np

from .. import ops
from ..beton import jpeg
from .operation import KeyedOperation
from .rand_augment import MODES

SIDE = 48  # pixels of the image that is tried: three MCUs, so that markers are written


def try_decoders() -> None:
    """Both decoders and both resize methods on a marked JPEG, one without markers, raw pixels."""
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    jpegs = [jpeg.encode_jpeg(image), jpeg.encode_jpeg(image, interval=0)]
    stored = [*(np.frombuffer(data, np.uint8) for data in jpegs), image]
    rows = [(data.ctypes.data, data.size, data is image, SIDE, SIDE) for data in stored]
    samples = np.array(rows, np.int64)
    images = np.empty((len(rows), 16, 16, 3), np.uint8)
    for decoder in (ops.CropDecode(16), ops.CenterCropDecode(16, 0.5)):
        for decoder.method in ("bilinear", "bicubic"):
            indices = np.arange(len(rows))
            crops = decoder.draw(indices, samples[:, 3], samples[:, 4], (16, 16))
            assert not decoder.apply(samples, crops, images).any()


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
    try_decoders()
    try_changes()
    print(f"operations ready after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
