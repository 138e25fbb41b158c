"""Compile every kernel of the operations for this machine, once; later processes read the cache.

    python -m fast_imagenet.ops.compile

`make setup` runs it. Without it the first training compiles what it uses, about a minute. Nothing
is compiled again until a source file of a kernel, numba or the processor changes.
"""

import time
from typing import Any

import numpy as np

from .. import ops
from ..beton import jpeg

SIDE = 48  # pixels of the image that is tried: three MCUs, so that markers are written


def try_decoders() -> None:
    """Both decoders and both resize methods on a marked JPEG, one without markers, raw pixels."""
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    kinds: list[tuple[Any, int]] = [
        (jpeg.encode_jpeg(image), 0),
        (jpeg.encode_jpeg(image, interval=0), 0),
        (image, 1),
    ]
    stored = [(np.frombuffer(bytes(data), np.uint8), mode) for data, mode in kinds]
    rows = [(data.ctypes.data, data.size, mode, SIDE, SIDE) for data, mode in stored]
    samples = np.array(rows, np.int64)
    images = np.empty((len(rows), 16, 16, 3), np.uint8)
    for decoder in (ops.CropDecode(16), ops.CenterCropDecode(16, 0.5)):
        for decoder.method in ("bilinear", "bicubic"):
            indices = np.arange(len(rows))
            crops = decoder.draw(indices, samples[:, 3], samples[:, 4], (16, 16))
            assert not decoder.apply(samples, crops, images).any()


def changes() -> list:
    """Every operation after the decoder, so that each kernel is called once."""
    return [
        *(ops.RandAugment(mode=mode, mstd=0.5) for mode in ("lite", "full", "timm")),
        ops.TrivialAugmentWide(),
        ops.AutoAugment(),
        ops.ThreeAugment(),
        ops.ColorJitter(0.4, 0.4, 0.4, 0.1),
        ops.RandomGrayscale(),
        ops.RandomSolarize(),
        ops.GaussianBlur(),
        ops.RandomErasing(),
    ]


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
