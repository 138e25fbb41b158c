"""Look at this machine: what is missing, what deserves a warning, and how to fix it.

    make doctor          or: python -m tools.doctor

One line per finding, then its fix. Exit status 1 when something required is missing, else 0. Only
the standard library is imported, and every package is tried in a process of its own: so the doctor
runs, and names the culprit, where torch or FFCV cannot be imported, crashes or hangs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fast_imagenet.machine import cpu_quota, memory_limit
from fast_imagenet.program import run_program
from fast_imagenet.terminal import announce

ROOT = Path(__file__).resolve().parents[1]
CGROUP = Path("/sys/fs/cgroup")
GB = 1e9
PROBE_SECONDS = 180
SETUP = "run `make setup`"
Answer = dict  # of a probe: what its JSON holds, or {"error": one line}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `state` is ok, warning or missing, and `fix` says what to do."""

    name: str
    state: str
    found: str
    fix: str = ""


def main(argv: list[str] | None = None) -> int:
    """Print every finding; 1 when something required is missing."""
    description = __doc__.partition("\n")[0]
    argparse.ArgumentParser("python -m tools.doctor", description=description).parse_args(argv)
    announce("doctor: every library is tried in a process of its own: about 20 s")
    findings = []
    for name, check in CHECKS.items():
        for finding in guarded(name, check):
            findings.append(finding)
            fix = f"\n{'':29}fix: {finding.fix}" if finding.fix else ""
            print(f"{finding.state:9}{finding.name:20}{finding.found}{fix}", flush=True)
    missing, warnings = (
        sum(f.state == state for f in findings) for state in ("missing", "warning")
    )
    print(f"doctor: {missing} missing, {warnings} warning{'s' * (warnings != 1)}")
    return 1 if missing else 0


def warn_if(broken: bool, name: str, found: str, fix: str) -> Finding:
    """A warning with its fix, or ok."""
    return Finding(name, "warning", found, fix) if broken else Finding(name, "ok", found)


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Findings of one check; a check that fails is a warning and does not stop the others."""
    try:
        return list(check())
    except Exception as error:
        return [Finding(name, "warning", f"the check failed: {type(error).__name__}: {error}")]


def probe(code: str, seconds: float = PROBE_SECONDS, **environment: str) -> Answer:
    """Run Python code that prints one JSON object last, in a process of its own.

    Returns that object, or `{"error": one line}` when the code raised, crashed or hung.
    """
    options = {"capture_output": True, "text": True, "errors": "backslashreplace", "cwd": ROOT}
    options |= {"env": {**os.environ, **environment}, "timeout": seconds}
    try:
        done = subprocess.run([sys.executable, "-c", code], **options)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:g} s"}
    if done.returncode < 0:
        return {"error": f"the process was killed by signal {-done.returncode}"}
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    if done.returncode:
        return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(lines[-1])


def check_python() -> Iterator[Finding]:
    """The interpreter, and whether it is the one that `make setup` fills."""
    version = ".".join(map(str, sys.version_info[:3]))
    bare = sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ
    if sys.version_info < (3, 11):  # noqa: UP036  an older one may run this very file
        fix = "make setup PYTHON=/path/to/python3.11"
        yield Finding("Python", "missing", f"{version}; 3.11 or later is needed", fix)
    else:
        place = "no virtual environment" if bare else sys.prefix
        yield warn_if(bare, "Python", f"{version}, {place}", SETUP)


def check_packages() -> Iterator[Finding]:
    """Installed versions against requirements.txt; nothing is imported."""
    pins = read_pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    installed = {}
    for name in pins:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    yield judge_packages(pins, installed)


def read_pins(text: str) -> dict[str, str]:
    """`{name: version}` of the lines `name==version`."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def judge_packages(pins: dict[str, str], installed: dict[str, str]) -> Finding:
    """Packages that are not installed are missing; other versions than the tested: a warning."""
    absent = [name for name in pins if name not in installed]
    other = [f"{name} {installed[name]} (tested: {pins[name]})" for name in pins
             if name in installed and installed[name].partition("+")[0] != pins[name]]  # fmt: skip
    if absent:
        names = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if absent[5:] else "")
        return Finding("packages", "missing", f"not installed: {names}", SETUP)
    as_pinned = f"all {len(pins)} as pinned in requirements.txt"
    return warn_if(bool(other), "packages", "; ".join(other) or as_pinned, SETUP)


def check_turbojpeg() -> Iterator[Finding]:
    """The JPEG library that FFCV is linked to."""
    try:
        ctypes.CDLL("libturbojpeg.so.0")
    except OSError as error:
        yield Finding("libturbojpeg", "missing", str(error), f"{SETUP}, or install libturbojpeg0")
    else:
        yield Finding("libturbojpeg", "ok", "libturbojpeg.so.0 loads")


FFCV_PROBE = """
import json, re
import ffcv.libffcv
modules = set(re.findall(r"libopencv_(\\w+)\\.so", open("/proc/self/maps").read()))
import ffcv.loader, cv2
print(json.dumps({"modules": sorted(modules), "cv2": cv2.__version__}))
"""


def judge_ffcv(answer: Answer) -> Finding:
    """FFCV imports beside OpenCV: `{"modules": linked, "cv2": version}` or `{"error": ...}`."""
    if "error" in answer:
        fix = f"{SETUP}; it needs pkg-config, g++, Python headers, OpenCV and libturbojpeg"
        return Finding("FFCV", "missing", answer["error"], fix)
    count = len(answer["modules"])
    text = f"imports, with OpenCV for Python {answer['cv2']}; links {count} modules of OpenCV"
    return warn_if(count > 10, "FFCV", text, "rebuild: .venv/bin/pip uninstall ffcv, make setup")


LIBRARY_PROBE = """
import json
from fast_imagenet import native
print(json.dumps({"path": native.IN_USE, "built": native.built(), "best": native.supported()[-1]}))
"""


def judge_library(answer: Answer) -> Finding:
    """The code path in use: `{"path": name, "built": names, "best": name}` or `{"error": ...}`."""
    if "error" in answer:
        chosen = os.environ.get("FAST_IMAGENET_NATIVE")
        fix = "unset FAST_IMAGENET_NATIVE" if chosen else SETUP
        return Finding("native library", "missing", answer["error"], fix)
    path, best = answer["path"], answer["best"]
    if path == best:
        return Finding("native library", "ok", path)
    reason, fix = "not built", f"unset FAST_IMAGENET_PATHS, {SETUP}"
    if best in answer["built"]:
        reason, fix = "switched off by FAST_IMAGENET_NATIVE", "unset FAST_IMAGENET_NATIVE"
    return Finding("native library", "warning", f"{path}; {best} is {reason}", fix)


TORCH_PROBE = """
import json, torch, torchvision
answer = {"torch": torch.__version__, "torchvision": torchvision.__version__, "gpus": []}
answer["cuda"] = torch.version.cuda
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        with torch.cuda.device(i):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            ones = torch.ones(64, 64, device="cuda")
            total = int((ones @ ones).sum())
        row = {"name": p.name, "bytes": p.total_memory, "bf16": bf16, "works": total == 64**3}
        answer["gpus"].append(row)
print(json.dumps(answer))
"""


def check_torch() -> Iterator[Finding]:
    """torch and torchvision match; then the GPUs that they see, and whether bf16 is native."""
    answer = probe(TORCH_PROBE)
    if "error" in answer:
        yield Finding("torch, torchvision", "missing", answer["error"], SETUP)
        return
    yield judge_pair(answer["torch"], answer["torchvision"])
    yield from judge_gpus(answer["gpus"], answer["cuda"], shutil.which("nvidia-smi") is not None)


def judge_pair(torch: str, torchvision: str) -> Finding:
    """torchvision 0.N goes with torch 2.(N-15), since 0.15 with 2.0."""
    major, minor, vision_major, vision_minor = (
        int(part) for version in (torch, torchvision) for part in re.findall(r"\d+", version)[:2]
    )
    text = f"{torch} and {torchvision}"
    if (major, minor) < (2, 11):
        return Finding("torch, torchvision", "missing", f"{text}; torch >= 2.11 is needed", SETUP)
    mismatch = major == 2 and (vision_major, vision_minor) != (0, minor + 15)
    fix = f"{SETUP}; torch 2.{minor} goes with torchvision 0.{minor + 15}"
    return warn_if(mismatch, "torch, torchvision", text + " do not match" * mismatch, fix)


def judge_gpus(gpus: list[Answer], cuda: str | None, has_driver: bool) -> Iterator[Finding]:
    """One finding for each GPU that torch sees, or one for none.

    gpus: each with name, bytes, bf16, works; cuda: that torch was built for, None for a CPU build.
    """
    if not gpus:
        found = "none: training runs on the CPU in fp32"
        fix = "none needed for `make demo`; ImageNet needs a GPU"
        if has_driver:
            found = f"nvidia-smi is here, but torch (built for CUDA {cuda}) sees no GPU"
            fix = "update the driver to one for this CUDA, or see CUDA_VISIBLE_DEVICES"
        yield Finding("GPU", "warning", found, fix)
    for gpu in gpus:
        text = f"{gpu['name']}, {gpu['bytes'] / GB:.1f} GB"
        if not gpu["works"]:
            fix = "this torch has no code for it, or the driver is broken: see `nvidia-smi`"
            yield Finding("GPU", "warning", f"{text}: a matrix product came out wrong", fix)
        else:
            fix = "none needed: training.precision=auto takes fp16 with loss scaling"
            yield warn_if(not gpu["bf16"], "GPU", f"{text}, {'no ' * (not gpu['bf16'])}bf16", fix)


NUMBA_PROBE = """
import json, numba, numpy
@numba.njit(parallel=True)
def total(values):
    out = 0
    for i in numba.prange(values.size):
        out += values[i]
    return out
assert total(numpy.arange(1000)) == 499500
print(json.dumps({"layer": numba.threading_layer(), "threads": numba.get_num_threads()}))
"""


def check_numba() -> Iterator[Finding]:
    """The threading layer that the loader will get."""
    layer = os.environ.get("NUMBA_THREADING_LAYER", "omp")
    yield judge_numba(probe(NUMBA_PROBE, NUMBA_THREADING_LAYER=layer))


def judge_numba(answer: Answer) -> Finding:
    """`{"layer": name, "threads": n}` or `{"error": ...}`; workqueue aborts with two loaders."""
    if "error" in answer:
        fix = f"{SETUP}; unset NUMBA_THREADING_LAYER and NUMBA_NUM_THREADS"
        return Finding("numba threads", "missing", answer["error"], fix)
    text = f"layer {answer['layer']}, {answer['threads']} threads"
    fix = "export NUMBA_THREADING_LAYER=omp (workqueue aborts when two loaders run)"
    return warn_if(answer["layer"] == "workqueue", "numba threads", text, fix)


KERNEL_PROBE = """
import json
from fast_imagenet import kernel_cache
from fast_imagenet.ops.effects import apply_effects
folder = getattr(apply_effects._cache, "cache_path", "")
private = kernel_cache.use_private_cache.cache_info().currsize > 0
print(json.dumps({"folder": folder, "private": private}))
"""


def judge_kernels(answer: Answer) -> Finding:
    """Where compiled kernels are kept: `{"folder": path or "", "private": bool}` or an error."""
    if "error" in answer:
        return Finding("kernel cache", "missing", answer["error"], SETUP)
    found = answer["folder"] or "nowhere: every start compiles for a minute"
    found += ", lost with the temporary files" * answer["private"]
    fix = "set NUMBA_CACHE_DIR to a writable folder that is kept"
    return warn_if(answer["private"] or not answer["folder"], "kernel cache", found, fix)


def judge_cores(affinity: int, total: int, quota: float | None) -> Finding:
    """A warning below 4 cores, or where a quota below the usable cores would throttle workers."""
    text = f"{affinity} usable of {total}"
    if quota is not None and quota < affinity:
        fix = f"--data.num_workers={max(1, int(quota))}, or give the container more"
        return Finding("cores", "warning", f"{text}, limited to {quota:g} cores of time", fix)
    fix = "none needed for `make demo`; feeding one GPU needs 6 to 8 cores"
    return warn_if(affinity < 4, "cores", text, fix)


def check_memory() -> Iterator[Finding]:
    """Memory for the page cache, against the training file where there is one."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    file = ROOT / "data/train.beton"
    size = file.stat().st_size if file.exists() else 0
    yield judge_memory(int(total[1]) * 1024, memory_limit(CGROUP), size)


def judge_memory(total: int, limit: int | None, file_bytes: int) -> Finding:
    """A warning below 8 GB, or when data/train.beton does not fit beside 4 GB for the program.

    All in bytes; limit: of the container, None for no limit; file_bytes: 0 where there is no file.
    """
    usable = total if limit is None else min(total, limit)
    text = f"{usable / GB:.1f} GB" + ("" if usable == total else f" of {total / GB:.1f} (limit)")
    if file_bytes > usable - 4 * GB:
        found = f"{text}, less than data/train.beton ({file_bytes / GB:.1f} GB) and 4 GB"
        return Finding("memory", "warning", found, "--data.in_memory=false, or a smaller max_side")
    fix = "enough for `make demo`; ImageNet needs 32 GB"
    return warn_if(usable < 8 * GB, "memory", text, fix)


def judge_disk(free: int, folder: Path) -> Finding:
    """A warning below 50 GB: ImageNet as JPEG of 400 px takes over 40 (FFCV's documentation)."""
    fix = "ImageNet as JPEG of 400 px takes over 40 GB: --write.folder on another disk"
    return warn_if(free < 50 * GB, "disk", f"{free / GB:.0f} GB free in {folder}", fix)


def judge_shared_memory(free: int) -> Finding:
    """A warning below 1 GB: containers get 64 MB by default, where a worker dies of SIGBUS."""
    fix = "docker run --ipc=host, or --shm-size=8g"
    return warn_if(free < GB, "/dev/shm", f"{free / GB:.2f} GB free", fix)


def check_disk() -> Iterator[Finding]:
    """Free space where the data will lie."""
    folder = ROOT / "data" if (ROOT / "data").exists() else ROOT
    yield judge_disk(shutil.disk_usage(folder).free, folder)


CHECKS: dict[str, Callable[[], Iterable[Finding]]] = {
    "Python": check_python,
    "packages": check_packages,
    "libturbojpeg": check_turbojpeg,
    "FFCV": lambda: [judge_ffcv(probe(FFCV_PROBE))],
    "native library": lambda: [judge_library(probe(LIBRARY_PROBE))],
    "torch": check_torch,
    "numba threads": check_numba,
    "kernel cache": lambda: [judge_kernels(probe(KERNEL_PROBE))],
    "cores": lambda: [
        judge_cores(len(os.sched_getaffinity(0)), os.cpu_count() or 1, cpu_quota(CGROUP))
    ],
    "memory": check_memory,
    "disk": check_disk,
    "/dev/shm": lambda: [judge_shared_memory(shutil.disk_usage("/dev/shm").free)],
}

if __name__ == "__main__":
    run_program("doctor", main)
