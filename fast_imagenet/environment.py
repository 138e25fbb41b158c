"""Where a program ran, without its owner: code, versions and hardware; no host, user or folder."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "ffcv", "numba", "timm", "numpy", "pillow", "safetensors")


def environment() -> dict[str, Any]:
    """Code, versions and hardware of this process, without its owner: no host, user or folder."""
    import torch

    # of a study the first runs' records are there before the last run begins
    changes = _git("status", "--porcelain", "--", ":/", ":(top,exclude)records")
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(changes),  # untracked files count: the run may import them
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda or "none",
        "device": _device_name(),
        "devices_on_node": torch.cuda.device_count(),
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def with_real_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with absolute paths of the data: found again from any folder."""
    data = dict(config.get("data", {}))
    for key in {"train_dataset", "val_dataset"} & data.keys():
        data[key] = os.path.abspath(Path(data[key]).expanduser())
    return config | {"data": data} if data else config


def redact_paths(value: Any) -> Any:
    """A copy of nested settings whose absolute paths say nothing of the machine.

    Paths inside the repository become relative to it; of others only '.../name' is left.
    """
    if isinstance(value, dict):
        return {key: redact_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_paths(item) for item in value]
    if not isinstance(value, str) or not value.startswith(("/", "~")):
        return value
    path = Path(value).expanduser()
    if path.is_relative_to(REPOSITORY):
        return str(path.relative_to(REPOSITORY))
    return f".../{path.name}"


def _git(*arguments: str) -> str:
    """Output of a git command in the repository, '' where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
