"""Seconds and bytes per sample of what grows with a dataset: loaders, orders, verify, the writer.

    python benchmarks/scale.py --json out.json

On made-up tables (made_up.py), each measurement in a process of its own with its imports done.
Stock FFCV's Loader is measured at the smallest number of samples alone: at 13 million it takes half
a minute and 8 GB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import common

KINDS = ("open", "loader", "loader_paged", "train_loader", "order", "order_paged", "verify")
KINDS += ("writer", "ffcv_loader")
FLAGS = {
    "samples": {"nargs": "+", "type": int, "help": "of the files (1300000 13000000)"},
    "clock": common.CLOCK,
    "measure": {"nargs": 3, "help": argparse.SUPPRESS},
}
BATCH = 256
KIB = 1024


# ------------------------------------------------------------------------------------------------
# What is measured: each function does its imports and returns the call
# ------------------------------------------------------------------------------------------------


def _open(path: str, count: int) -> Callable[[], Any]:
    from fast_imagenet.beton.reader import BetonFile

    return lambda: BetonFile(path)


def _verify(path: str, count: int) -> Callable[[], Any]:
    from fast_imagenet.beton.verify import verify

    return lambda: verify(path)


def _loader(path: str, count: int, in_memory: bool = True) -> Callable[[], Any]:
    """What is built on an open file."""
    from fast_imagenet.beton.reader import BetonFile
    from fast_imagenet.data.ffcv_loader import Augment, Loader, image_operations

    file = BetonFile(path)
    decoder = image_operations(Augment(), 160, 0)[0]
    options = dict(batch_size=BATCH, num_workers=1, device="cpu", in_memory=in_memory)
    return lambda: Loader(file, decoder, **options)


def _loader_paged(path: str, count: int) -> Callable[[], Any]:
    return _loader(path, count, in_memory=False)


def _train_loader(path: str, count: int) -> Callable[[], Any]:
    from fast_imagenet.data.ffcv_loader import TrainLoader

    return lambda: TrainLoader(path, global_batch=BATCH, seed=0, num_workers=1)


def _ffcv_loader(path: str, count: int) -> Callable[[], Any]:
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    operations = [RandomResizedCropRGBImageDecoder((160, 160)), ToTensor()]
    options = dict(num_workers=1, os_cache=True, pipelines={"image": operations})
    return lambda: Loader(path, batch_size=BATCH, **options)


def _order(path: str, count: int) -> Callable[[], Any]:
    from fast_imagenet.data.sampler import epoch_order

    return lambda: epoch_order(count, 0, 0)


def _order_paged(path: str, count: int) -> Callable[[], Any]:
    from fast_imagenet.beton.reader import BetonFile
    from fast_imagenet.data.sampler import paged_epoch_order

    file = BetonFile(path)
    pages = file.offsets // file.page_size
    return lambda: paged_epoch_order(pages, 128, 0, 0)


def _writer(path: str, count: int) -> Callable[[], Any]:
    """The parent of a conversion whose images, of two bytes each, cost nothing."""
    import numpy as np

    from fast_imagenet.beton import writer
    from fast_imagenet.beton.encode import Chunk, EncodedImage
    from fast_imagenet.sources.base import Source

    class Labels(Source):
        kind = "made up"

    source = Labels(np.arange(count) % 1000, [f"{label:03}" for label in range(1000)])

    def encoded(source: Source, indices: np.ndarray, *_: Any) -> Iterator[Chunk]:
        for start in range(0, len(indices), 4096):
            labels = source.labels[indices[start : start + 4096]].tolist()
            yield Chunk([EncodedImage(b"\xff\xd8", 0, 80, 64, label) for label in labels])

    def write() -> None:
        with mock.patch.object(writer, "encoded", encoded):
            writer.write_beton(f"{path}.written", source, workers=1)

    return write


# ------------------------------------------------------------------------------------------------
# How
# ------------------------------------------------------------------------------------------------


def memory() -> dict[str, int]:
    """Bytes of this process: its own ("held"), of mapped files ("mapped"), the "peak" of both."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines)
    names = {"held": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}
    return {name: int(found[key].split()[0]) * KIB for name, key in names.items()}


def measure(kind: str, path: str, count: int, clock: str) -> None:
    """Print seconds and bytes per sample that one call takes."""
    call = globals()[f"_{kind}"](path, count)
    with suppress(OSError):  # sets the peak to what is in use now
        Path("/proc/self/clear_refs").write_text("5")
    before, now = memory(), common.CLOCKS[clock]
    begin = now()
    result = call()
    seconds, after = now() - begin, memory()
    grown = {f"{name}_bytes": round((after[name] - before[name]) / count, 1) for name in before}
    print(json.dumps({"seconds": round(seconds, 4), **grown}), flush=True)
    del result
    os._exit(0)


def run(kind: str, path: str, count: int, clock: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", kind, path, str(count), "--clock", clock]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
    Path(f"{path}.written").unlink(missing_ok=True)
    Path(f"{path}.written.json").unlink(missing_ok=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(path: str, count: int, kinds: tuple[str, ...], arguments: Any) -> dict[str, dict]:
    """name -> {"seconds": summary, "held_bytes", "mapped_bytes", "peak_bytes": medians}."""
    import statistics

    found: dict[str, list] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind in kinds:
            found[kind].append(run(kind, path, count, arguments.clock))
    results = {}
    for kind, runs in found.items():
        values = {key: [one[key] for one in runs] for key in runs[0]}
        seconds = common.summary(values.pop("seconds"))
        medians = {key: statistics.median(each) for key, each in values.items()}
        results[kind] = {"seconds": seconds, **medians}
        text = ", ".join(f"{key} {value:.1f}" for key, value in medians.items())
        print(f"{count:>10,} {kind:14} {seconds['median']:8.3f} s; per sample: {text}")
    return results


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=3, **FLAGS)
    if arguments.measure:
        kind, path, count = arguments.measure
        measure(kind, path, int(count), arguments.clock)
    machine = common.describe_machine(common.pin_to_cores(1)) | {"smoke": arguments.smoke}
    from benchmarks import made_up

    counts = arguments.samples or ([20_000] if arguments.smoke else [1_300_000, 13_000_000])
    kinds, results = ("open", "loader", "writer") if arguments.smoke else KINDS, {}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            path = made_up.write_made_up(Path(folder, "data.beton"), count)
            results[str(count)] = measure_all(path, count, kinds, arguments)
            kinds = tuple(kind for kind in kinds if kind != "ffcv_loader")
    result = {"samples": results, "data": {"clock": arguments.clock}, "machine": machine}
    common.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
