"""Bytes that decoding needs beside the batches it fills: ours and stock FFCV's.

    python benchmarks/decoder_memory.py --json out.json

Counted, not estimated: the arrays that each loader holds for one epoch of 500 px images in
batches of 1024, less the batches themselves (as many for both). Ours needs memory per thread, stock
FFCV per sample of every batch under way.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import common

IMAGES = 8  # their number does not matter
FLAGS = {
    "batch_size": {"default": 1024, "help": "images"},
    "side": {"default": 500, "help": "resolution of the stored images, px"},
    "out_side": {"default": 160, "help": "resolution of the batch, px"},
    "cores": {"default": 1, "help": "cores and loader threads"},
}


def held_bytes(allocations: Any) -> int:
    """Bytes of all arrays in FFCV's nested tuples and dictionaries."""
    if allocations is None:
        return 0
    if isinstance(allocations, dict):
        return sum(map(held_bytes, allocations.values()))
    if isinstance(allocations, tuple | list):
        return sum(map(held_bytes, allocations))
    return allocations.nbytes


def measure(arguments: argparse.Namespace, path: str) -> dict[str, int]:
    """Bytes by contestant, and of the batches."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    from fast_imagenet.ops import CropDecode

    size, batch_size = arguments.out_side, arguments.batch_size
    decoders = {"ours": CropDecode(size), "ffcv": RandomResizedCropRGBImageDecoder((size, size))}
    scratch = {}
    for name, decoder in decoders.items():
        pipelines = {"image": [decoder, ToTensor()], "label": None}
        place = (path, batch_size, arguments.cores)
        loader = Loader(*place, os_cache=True, drop_last=False, pipelines=pipelines)
        epoch = iter(loader)
        held = held_bytes(epoch.memory_allocations)
        next(epoch)  # ours allocates when it sees the first images
        epoch.close()
        workspaces = getattr(decoder, "_workspaces", [])
        held += sum(buffer.nbytes for work in workspaces for buffer in work.buffers)
        batches = (loader.batches_ahead + 2) * batch_size * size * size * 3
        scratch[name] = held - batches
    return scratch | {"batches": batches}


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=1, **FLAGS)
    machine = common.start(arguments.cores, arguments.smoke)
    import numpy as np

    import data

    shape = (IMAGES, arguments.side, arguments.side, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = data.write_file(Path(folder, "data.beton"), images, markers=True)
        scratch = measure(arguments, path)
    ratio = float(f"{scratch['ours'] / scratch['ffcv']:.3g}")
    for name, count in scratch.items():
        print(f"{name}: {count / 2**20:.1f} MiB")
    print(f"scratch_vs_ffcv {ratio:.5f} x")
    settings = {name: getattr(arguments, name) for name in FLAGS}
    result = {"scratch_vs_ffcv": ratio, "scratch_bytes": scratch}
    common.write_json(arguments.json, {**result, "data": settings, "machine": machine})


if __name__ == "__main__":
    main()
