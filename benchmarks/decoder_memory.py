"""Bytes that decoding needs beside the batches it fills: ours and stock FFCV's.

    python benchmarks/decoder_memory.py --json out.json

Counted, not estimated: what each loader holds after one epoch of 500 px images in batches of 1024,
less the batches themselves (as many for both).
"""

import tempfile
from pathlib import Path
from typing import Any

import common

IMAGES = 8  # their number does not matter
DATA = {"batch_size": 1024, "side": 500, "out_side": 160, "cores": 1}
SMOKE = {"batch_size": 64, "side": 64}


def held_bytes(allocations: Any) -> int:
    """Bytes of all arrays in FFCV's nested tuples and dictionaries."""
    if isinstance(allocations, dict):
        allocations = list(allocations.values())
    if isinstance(allocations, tuple | list):
        return sum(map(held_bytes, allocations))
    return 0 if allocations is None else allocations.nbytes


def measure(path: str, batch_size: int, out_side: int, cores: int) -> dict[str, int]:
    """Bytes by contestant, and of the batches."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    from fast_imagenet.ops import CropDecode

    ours, ffcv = CropDecode(out_side), RandomResizedCropRGBImageDecoder((out_side, out_side))
    scratch = {}
    for name, decoder in {"ours": ours, "ffcv": ffcv}.items():
        pipelines = {"image": [decoder, ToTensor()], "label": None}
        options = dict(os_cache=True, drop_last=False, pipelines=pipelines)
        loader = Loader(path, batch_size, cores, **options)
        epoch = iter(loader)
        held = held_bytes(epoch.memory_allocations)
        for _ in epoch:  # our decoders grow with the images they see
            pass
        batches = (loader.batches_ahead + 2) * batch_size * out_side * out_side * 3
        scratch[name] = held - batches
    scratch["ours"] += sum(decoder.bytes for decoder in ours._decoders)
    return scratch | {"batches": batches}


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=1)
    settings = DATA | (SMOKE if arguments.smoke else {})
    machine = common.start(settings["cores"], arguments.smoke)
    import numpy as np

    import data

    side = settings["side"]
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = data.write_file(Path(folder, "data.beton"), images, markers=True)
        scratch = measure(path, settings["batch_size"], settings["out_side"], settings["cores"])
    ratio = float(f"{scratch['ours'] / scratch['ffcv']:.3g}")
    result = {"scratch_vs_ffcv": ratio, "scratch_bytes": scratch}
    common.publish(arguments.json, **result, data=settings, machine=machine)


if __name__ == "__main__":
    main()
