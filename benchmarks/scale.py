"""Seconds and bytes per sample of what grows with a dataset: loaders, orders, verify, the writer.

    python benchmarks/scale.py --json out.json

On made-up tables, each measurement in a process of its own, forked with its imports done.
Stock FFCV's Loader is measured at the smallest number of samples alone: at 13 million it takes half
a minute and 8 GB.
"""

import itertools
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import common

SAMPLES = (1_300_000, 13_000_000)
FLAGS = {"clock": common.CLOCK}
KINDS = ("open", "loader", "loader_paged", "train_loader", "order", "order_paged", "verify")
KINDS += ("writer", "ffcv_loader")
BATCH = 256
KIB = 1024


def call_of(kind: str, path: str, count: int) -> Callable[[], Any]:
    """What is measured, its imports and the files that it takes as open done."""
    from ffcv import loader as ffcv
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.transforms import ToTensor

    from fast_imagenet.beton.reader import BetonFile
    from fast_imagenet.beton.verify import verify
    from fast_imagenet.data.ffcv_loader import Augment, Loader, TrainLoader, image_operations
    from fast_imagenet.data.sampler import epoch_order, paged_epoch_order

    def loader(in_memory: bool) -> Callable[[], Any]:
        """What is built on an open file."""
        decoder = image_operations(Augment(), 160, 0)[0]
        options = dict(batch_size=BATCH, num_workers=1, device="cpu", in_memory=in_memory)
        return partial(Loader, BetonFile(path), decoder, **options)

    def order_paged() -> Callable[[], Any]:
        file = BetonFile(path)
        return partial(paged_epoch_order, file.offsets // file.page_size, 128, 0, 0)

    def ffcv_loader() -> Callable[[], Any]:
        pipelines = {"image": [RandomResizedCropRGBImageDecoder((160, 160)), ToTensor()]}
        options = dict(batch_size=BATCH, num_workers=1, os_cache=True, pipelines=pipelines)
        return partial(ffcv.Loader, path, **options)

    makers = {
        "open": lambda: partial(BetonFile, path),
        "loader": lambda: loader(in_memory=True),
        "loader_paged": lambda: loader(in_memory=False),
        "train_loader": lambda: partial(
            TrainLoader, path, global_batch=BATCH, seed=0, num_workers=1
        ),
        "order": lambda: partial(epoch_order, count, 0, 0),
        "order_paged": order_paged,
        "verify": lambda: partial(verify, path),
        "writer": lambda: writing(path, count),
        "ffcv_loader": ffcv_loader,
    }
    return makers[kind]()


def writing(path: str, count: int) -> Callable[[], Any]:
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


def memory() -> dict[str, int]:
    """Bytes of this process: its own ("held"), of mapped files ("mapped"), the "peak" of both."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines)
    names = {"held": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}
    return {name: int(found[key].split()[0]) * KIB for name, key in names.items()}


def measure(kind: str, path: str, count: int, clock: str, answer: Connection) -> None:
    """Send seconds and bytes per sample that one call takes, and end this process."""
    call = call_of(kind, path, count)
    with suppress(OSError):  # sets the peak to what is in use now
        Path("/proc/self/clear_refs").write_text("5")
    before, now = memory(), common.CLOCKS[clock]
    begin = now()
    result = call()
    seconds, after = now() - begin, memory()
    grown = {f"{name}_bytes": round((after[name] - before[name]) / count, 1) for name in before}
    answer.send({"seconds": round(seconds, 4), **grown})
    del result
    os._exit(0)


def measured(*what: Any) -> dict[str, float]:
    """What `measure` sends from a fork of this process.

    Raises: EOFError: it failed, and has printed why.
    """
    fork = multiprocessing.get_context("fork")
    answer, end = fork.Pipe(duplex=False)
    process = fork.Process(target=measure, args=(*what, end))
    process.start()
    end.close()
    try:
        return answer.recv()
    finally:
        process.join()


def measure_all(path: str, count: int, kinds: list[str], arguments: Any) -> dict[str, dict]:
    """name -> {"seconds": summary, "held_bytes", "mapped_bytes", "peak_bytes": medians}."""
    found: dict[str, list] = {kind: [] for kind in kinds}
    for _, kind in itertools.product(range(arguments.rounds), kinds):
        found[kind].append(measured(kind, path, count, arguments.clock))
        print(f"{count} samples, {kind}: {found[kind][-1]}", flush=True)
        for ending in ("", ".json"):
            Path(f"{path}.written{ending}").unlink(missing_ok=True)
    results = {}
    for kind, runs in found.items():
        values = {key: [one[key] for one in runs] for key in runs[0]}
        seconds = common.summary(values.pop("seconds"))
        medians = {key: statistics.median(each) for key, each in values.items()}
        results[kind] = {"seconds": seconds, **medians}
    return results


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=3, **FLAGS)
    machine = common.describe_machine(common.pin_to_cores(1)) | {"smoke": arguments.smoke}
    # not TBB, whose threads a fork would leave waiting at the end
    os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
    from data import write_made_up

    for kind in ("order", "writer"):  # the imports, which all forks share: 7 s each time otherwise
        call_of(kind, "", 1)
    results, kinds = {}, ["open", "loader", "writer"] if arguments.smoke else list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        for count in [20_000] if arguments.smoke else SAMPLES:
            path = write_made_up(Path(folder, "data.beton"), count)
            results[str(count)] = measure_all(path, count, kinds, arguments)
            kinds = [kind for kind in kinds if kind != "ffcv_loader"]
    data = {"clock": arguments.clock}
    common.publish(arguments.json, samples=results, data=data, machine=machine)


if __name__ == "__main__":
    main()
