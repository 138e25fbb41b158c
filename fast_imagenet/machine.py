"""What the container leaves of the machine: cores and memory. Standard library only."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path


def worker_count(asked: int, ranks_on_node: int = 1) -> int:
    """Loader workers of one rank: `asked`, or with 0 its part of the usable cores, at least 1.

    Usable means the process's affinity mask, not the machine's core count: in a container or under
    SLURM the two differ.
    """
    return asked or max(1, len(os.sched_getaffinity(0)) // ranks_on_node)


def cpu_quota(cgroup: Path) -> float | None:
    """Cores' worth of time that a container may take, None when it is not limited."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def memory_limit(cgroup: Path) -> int | None:
    """Bytes that a container may use, None when it is not limited."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroup / name).read_text().strip()
        except OSError:
            continue
        return None if text == "max" or int(text) > 2**60 else int(text)
    return None


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that this process and the page cache can have: of the machine, or of the container."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.MULTILINE))
    free, limit = int(fields["MemAvailable"]) * 1024, memory_limit(cgroup)
    if limit is None:
        return free
    stat = _first_text(cgroup / "memory.stat", cgroup / "memory/memory.stat")
    taken = re.search(r"^(?:total_rss|anon) (\d+)$", stat, re.MULTILINE)
    return min(free, limit - (int(taken[1]) if taken else 0))


def _first_text(*paths: Path) -> str:
    return next((path.read_text() for path in paths if path.exists()), "")


def process_memory(*fields: str) -> int:
    """Bytes of this process: the sum of these fields of /proc/self/status."""
    status = Path("/proc/self/status").read_text(errors="replace")
    return 1024 * sum(int(kb) for name, kb in re.findall(r"^(\w+):\s+(\d+) kB", status, re.M)
                      if name in fields)  # fmt: skip


def memory_taken(act: Callable[[], object]) -> int:
    """Call it; bytes that this process had at its peak above those before; 0 = not known."""
    gc.collect()  # garbage that is freed during the call would hide as much of its peak
    before, peak_from_now_on = process_memory("VmRSS"), "5"
    try:
        Path("/proc/self/clear_refs").write_text(peak_from_now_on)
    except OSError:  # a container without it
        before = sys.maxsize
    act()
    return max(0, process_memory("VmHWM") - before)
