"""What every benchmark shares: arguments, pinning, interleaved rounds, machine, result file."""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fast_imagenet.files import write_json  # noqa: E402  (standard library only, as this module)

PACKAGES = ["ffcv", "numba", "numpy", "torch", "torchvision", "timm", "pillow"]
CLOCK = {"choices": ["wall", "cpu"], "default": "wall", "help": "cpu where other jobs run"}
IMAGES = {
    "images": {"required": True, "help": "folder of images, with subfolders"},
    "limit": {"default": 200, "help": "different images at most"},
    "max_side": {"default": 500, "help": "pixels"},
}
PEERS = {"default": str(ROOT / ".venv-bench"), "help": "environment of the peers"}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Rate = Callable[[], float]  # returns images per second, or another number


def read_arguments(
    argv: list[str] | None, description: str, *, rounds: int, **flags: dict[str, Any]
) -> argparse.Namespace:
    """The flags that every script has and its own: name -> keywords of `add_argument`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    flags |= {
        "json": {"help": "where to write the result; default: it is printed"},
        "rounds": {"default": rounds, "help": "timed rounds"},
        "smoke": {"action": "store_true", "help": "for tests: tiny, and FFCV is not compiled"},
    }
    for name, options in flags.items():
        default = options.get("default")
        kind = {"type": type(default)} if isinstance(default, int | float) else {}
        if default is not None:
            kind["help"] = f"{options['help']} (%(default)s)"
        parser.add_argument(f"--{name.replace('_', '-')}", **options | kind)
    return parser.parse_args(argv)


def start(count: int, smoke: bool) -> dict:
    """Restrict this process to `count` cores (0: all), give torch and OpenCV as many threads.

    Returns: `describe_machine`. Call before numba is imported.
    """
    cores = pin_to_cores(count)
    machine = describe_machine(cores) | {"smoke": smoke}
    threading.excepthook = end_process
    # FFCV starts numba's threads when it is imported; TBB's would wait for ever at the end
    os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
    import cv2
    import torch
    from ffcv.pipeline.compiler import Compiler

    Compiler.set_enabled(not smoke)
    torch.set_num_threads(len(cores))
    cv2.setNumThreads(1)
    return machine


def pin_to_cores(count: int) -> list[int]:
    """Restrict this process to the last `count` usable cores; 0 = all. Call before numba's import.

    Raises: SystemExit when fewer cores are usable.
    """
    usable = sorted(os.sched_getaffinity(0))
    if count > len(usable):
        raise SystemExit(f"--cores {count}: only {len(usable)} usable; give fewer")
    os.sched_setaffinity(0, usable[-count:])
    return usable[-count:]


def end_process(failure: threading.ExceptHookArgs) -> NoReturn:
    """When a thread fails, end the process: FFCV's loader would wait for its thread for ever."""
    threading.__excepthook__(failure)
    os._exit(1)


def answer_of(script: str, *words: str) -> Any:
    """What the last line that a script prints holds, as JSON.

    Raises: RuntimeError with the end of its errors where it fails.
    """
    command = [sys.executable, script, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:])
    return json.loads(done.stdout.splitlines()[-1])


def children_time() -> float:
    """Seconds of processor time of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def interleave(functions: dict[str, Rate], rounds: int) -> dict[str, dict]:
    """Call every function once per round, in turn, after one call each to warm up.

    Args: functions: name -> function returning a rate. rounds: >= 1.
    Returns: name -> `summary`. Interleaved, because a machine that slows down in the middle must
        not slow down one contestant only.
    """
    for function in functions.values():
        function()
    rates = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            rates[name].append(function())
    return {name: summary(values) for name, values in rates.items()}


def summary(values: list[float]) -> dict:
    """Median, extremes and all values, rounded to 4 significant digits."""
    short = [float(f"{value:.4g}") for value in values]
    median = float(f"{statistics.median(values):.4g}")
    return {"median": median, "min": min(short), "max": max(short), "rounds": short}


def ratio(rates: dict[str, dict], ours: str, theirs: str) -> float:
    """Of two medians."""
    return round(rates[ours]["median"] / rates[theirs]["median"], 3)


def describe_machine(cores: list[int]) -> dict:
    """Processor, cores, memory, load, versions, commit: what a rate means nothing without."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    changes = _git("status", "--porcelain", "fast_imagenet", "benchmarks/*.py")
    return {
        "processor": models[0] if models else platform.machine(),
        "cores_used": len(cores),
        "cores_of_machine": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "opencv": version("opencv-python-headless") or version("opencv-python"),
        "commit": _git("rev-parse", "--short", "HEAD") + (" and changes" if changes else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def describe_gpu(device: str) -> dict:
    """{"gpu": its name} for 'cuda', nothing for 'cpu'.

    Raises: SystemExit where torch finds no GPU.
    """
    import torch

    if device != "cuda":
        return {}
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU; give --device cpu")
    return {"gpu": torch.cuda.get_device_name()}


def read_config(*flags: str) -> SimpleNamespace:
    """Settings of train_imagenet.py."""
    import train_imagenet as recipe

    options = dict(search=recipe.CONFIG_FOLDERS, prog="benchmark", description="")
    return recipe.read_config(recipe.SETTINGS, list(flags), **options)


def build_state(cfg: SimpleNamespace, classes: int, device: str) -> Any:
    """What train_imagenet.py trains with, on one device: a TrainState."""
    import torch

    import train_imagenet as recipe
    from fast_imagenet.engine.distributed import Distributed

    alone = Distributed(rank=0, world_size=1, ranks_on_node=1, device=torch.device(device))
    model = recipe.build_model(cfg, classes, alone.device)
    networks = recipe.wrap_model(model, cfg, alone)
    many = 10**6  # steps of an epoch: the learning rate stays that of the beginning
    state = recipe.build_state(cfg, networks, classes, many, alone)
    state.draws = cfg.model.drop_path > 0  # as a run finds out
    return state


def noise(count: int, resolution: int, classes: int, device: str) -> tuple[Any, Any, Any]:
    """A batch on the device: (images_bhwc, labels_b, samples_b)."""
    import numpy as np
    import torch

    shape = (count, resolution, resolution, 3)
    images_bhwc = torch.randint(256, shape, dtype=torch.uint8, device=device)
    return images_bhwc, torch.randint(classes, shape[:1], device=device), np.arange(count)


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def version(name: str) -> str | None:
    """Of an installed package."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)


def versions(names: list[str]) -> dict[str, str]:
    """Of the packages that are installed."""
    return {name: found for name in names if (found := version(name))}


def publish(path: str | None, **result: Any) -> None:
    """Write the result file, keys in the order given; without a path, print it."""
    if path:
        write_json(path, result)
    print(f"wrote {path}" if path else json.dumps(result, indent=2))
