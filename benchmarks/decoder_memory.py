"""Bytes that decoding needs beside the batches it fills: ours and stock FFCV's.

    python benchmarks/decoder_memory.py --json out.json

Counted, not estimated: the arrays that each loader holds for one epoch of 500 px images in
batches of 1024, less the batches themselves (as many for both). Ours needs memory per thread, stock
FFCV per sample of every batch under way.
"""

import tempfile
from pathlib import Path

import common

IMAGES = 8  # their number does not matter


def read_arguments(argv):
    parser = common.argument_parser(__doc__, images=False, rounds=1)
    parser.add_argument("--batch-size", type=int, default=1024, help="images (1024)")
    parser.add_argument("--side", type=int, default=500, help="of the stored images, px (500)")
    parser.add_argument("--out-side", type=int, default=160, help="of the batch, px (160)")
    parser.add_argument("--cores", type=int, default=1, help="cores and loader threads (1)")
    return parser.parse_args(argv)


def make_loader(path: str, operations: list, batch_size: int, cores: int):
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    pipelines = {"image": [*operations, ToTensor()], "label": None}
    return Loader(path, batch_size, cores, os_cache=True, drop_last=False, pipelines=pipelines)


def held_bytes(allocations) -> int:
    """Bytes of all arrays in FFCV's nested tuples and dictionaries."""
    if allocations is None:
        return 0
    if isinstance(allocations, dict):
        return sum(map(held_bytes, allocations.values()))
    if isinstance(allocations, tuple | list):
        return sum(map(held_bytes, allocations))
    return allocations.nbytes


def measure(arguments, path: str) -> dict:
    """Bytes by contestant, and of the batches."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder

    from fast_imagenet.ops import CropDecode

    side, batch_size = arguments.out_side, arguments.batch_size
    decoders = {"ours": CropDecode(side), "ffcv": RandomResizedCropRGBImageDecoder((side, side))}
    result = {}
    for name, decoder in decoders.items():
        loader = make_loader(path, [decoder], batch_size, arguments.cores)
        epoch = iter(loader)
        result[name] = held_bytes(epoch.memory_allocations)
        next(epoch)  # ours allocates when it sees the first images
        epoch.close()
        workspaces = getattr(decoder, "_workspaces", [])
        result[name] += sum(buffer.nbytes for work in workspaces for buffer in work.buffers)
        result["batches"] = (loader.batches_ahead + 2) * batch_size * side * side * 3
    return {name: result[name] - result["batches"] for name in decoders} | {
        "batches": result["batches"]
    }


def main(argv=None) -> None:
    arguments = read_arguments(argv)
    machine = common.start(arguments.cores, arguments.smoke)
    import data
    import numpy as np

    shape = (IMAGES, arguments.side, arguments.side, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = data.write_file(Path(folder, "data.beton"), images, markers=True)
        scratch = measure(arguments, path)
    ratio = float(f"{scratch['ours'] / scratch['ffcv']:.3g}")
    for name, count in scratch.items():
        print(f"{name}: {count / 2**20:.1f} MiB")
    print(f"scratch_vs_ffcv {ratio:.5f} x")
    settings = {"side": arguments.side, "batch_size": arguments.batch_size}
    settings |= {"out_side": arguments.out_side, "cores": arguments.cores}
    result = {"scratch_vs_ffcv": ratio, "scratch_bytes": scratch}
    common.write_json(arguments.json, {**result, "data": settings, "machine": machine})


if __name__ == "__main__":
    main()
