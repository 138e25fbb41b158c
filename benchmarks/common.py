"""What every benchmark shares: arguments, pinning, interleaved rounds, machine, result file."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PACKAGES = ["ffcv", "numba", "numpy", "torch", "torchvision", "timm", "pillow"]
PACKAGES += ["albumentations", "nvidia-dali-cuda120"]  # peers that may be missing


def argument_parser(description: str, *, images: bool, rounds: int) -> argparse.ArgumentParser:
    """The flags that every script has; `images`: it needs a folder of images."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    if images:
        parser.add_argument("--images", required=True, help="folder of images, with subfolders")
        parser.add_argument("--limit", type=int, default=200, help="images taken at most (200)")
        parser.add_argument("--max-side", type=int, default=500, help="pixels (500)")
    parser.add_argument("--json", help="where to write the result")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds ({rounds})")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="for tests: FFCV's operations are not compiled, so the rates mean nothing",
    )
    return parser


def start(cores: int, smoke: bool) -> dict:
    """Restrict this process to `cores` cores, give torch and OpenCV as many threads.

    Returns: `describe_machine`. Call before numba is imported.
    """
    machine = describe_machine(pin_to_cores(cores)) | {"smoke": smoke}
    fail_with_threads()
    # FFCV starts numba's threads when it is imported; TBB's would wait for ever at the end
    os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
    import cv2
    import torch
    from ffcv.pipeline.compiler import Compiler

    Compiler.set_enabled(not smoke)
    torch.set_num_threads(cores)
    cv2.setNumThreads(1)
    return machine


def pin_to_cores(count: int) -> list[int]:
    """Restrict this process to the last `count` usable cores. Call before numba is imported.

    Raises: SystemExit when fewer cores are usable.
    """
    usable = sorted(os.sched_getaffinity(0))
    if count > len(usable):
        raise SystemExit(f"--cores {count}: only {len(usable)} cores are usable; give fewer")
    os.sched_setaffinity(0, usable[-count:])
    return usable[-count:]


def fail_with_threads() -> None:
    """End the process when a thread fails: FFCV's loader would wait for its thread for ever."""

    def end(failure):
        threading.__excepthook__(failure)
        os._exit(1)

    threading.excepthook = end


def interleave(functions: dict, rounds: int) -> dict:
    """Call every function once per round, in turn, after one call each to warm up.

    Args: functions: name -> function returning a rate. rounds: >= 1.
    Returns: name -> {"median", "min", "max", "rounds"}. Interleaved, because a machine that slows
        down in the middle must not slow down one contestant only.
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


def describe_machine(cores: list[int]) -> dict:
    """Processor, cores, memory, load, versions, commit: what a rate means nothing without."""
    processor = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    changed = ["git", "-C", str(ROOT), "status", "--porcelain", "fast_imagenet", "benchmarks/*.py"]
    if subprocess.run(changed, capture_output=True, text=True, check=False).stdout.strip():
        commit += " and changes"
    return {
        "processor": processor,
        "cores_used": len(cores),
        "cores_of_machine": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "opencv": _version("opencv-python-headless") or _version("opencv-python"),
        "commit": commit,
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


def build_training(cfg, classes: int, device: str):
    """What train_imagenet.py trains with, on one device: (Training, the network in evaluation)."""
    import torch

    import train_imagenet as recipe
    from fast_imagenet.engine.distributed import Distributed

    alone = Distributed(rank=0, world_size=1, ranks_on_node=1, device=torch.device(device))
    model = recipe.build_model(cfg, classes, alone.device)
    called, evaluated = recipe.wrap_model(model, cfg, alone)
    return recipe.build_training(cfg, model, called, classes, alone), evaluated


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def write_json(path: str | None, result: dict) -> None:
    """Write the result file, keys in the order given; nothing without a path."""
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}")
