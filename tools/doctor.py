"""Look at this machine and say what is missing or odd, and how to mend it.

    make doctor          or: python -m tools.doctor

One line a finding, then its mend. Exit status 1 when something that is required is missing, else 0.
Only the standard library is imported here, and every other package is tried in a process of its
own, so that it runs, and names the culprit, where torch or FFCV cannot be imported, crash or hang.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fast_imagenet.machine import cpu_quota, memory_limit
from fast_imagenet.terminal import ignore_broken_pipe

HERE = Path(__file__).resolve().parents[1]
GB = 1e9
PROBE_SECONDS = 180
SET_UP = "run `make setup`"


@dataclass(frozen=True)
class Finding:
    """What was looked at, its state (`ok`, `odd` or `missing`), what was found, how to mend it."""

    name: str
    state: str
    found: str
    mend: str = ""


def main() -> int:
    """Print every finding; 1 when something required is missing."""
    ignore_broken_pipe()  # paths may hold what it cannot show
    findings = [finding for check in CHECKS for finding in guarded(check)]
    for finding in findings:
        print(f"{finding.state:8}{finding.name:20}{finding.found}")
        if finding.state != "ok" and finding.mend:
            print(f"{'':28}mend: {finding.mend}")
    count = {state: sum(f.state == state for f in findings) for state in ("missing", "odd")}
    print(f"doctor: {count['missing']} missing, {count['odd']} odd")
    return 1 if count["missing"] else 0


def guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Findings of one check; a check that fails is odd, and does not stop the others."""
    try:
        return list(check())
    except Exception as error:
        name = getattr(check, "__name__", "check").removeprefix("check_")
        return [Finding(name, "odd", f"could not be looked at: {type(error).__name__}: {error}")]


# ------------------------------------------------------------------------------------------------
# Software
# ------------------------------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    """The interpreter, and whether it is the one that `make setup` fills."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036  an older one may run this very file
        mend = "make setup PYTHON=/path/to/python3.11"
        yield Finding("Python", "missing", f"{version}; 3.11 or later is needed", mend)
    elif sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        yield Finding("Python", "odd", f"{version}, no virtual environment", SET_UP)
    else:
        yield Finding("Python", "ok", f"{version} in {sys.prefix}")


def check_packages() -> Iterator[Finding]:
    """Installed versions against requirements.txt."""
    pins = read_pins((HERE / "requirements.txt").read_text(encoding="utf-8"))
    yield judge_packages(pins, installed_versions(pins))


def read_pins(text: str) -> dict[str, str]:
    """`{name: version}` of the lines `name==version`."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def installed_versions(names: dict[str, str]) -> dict[str, str]:
    """`{name: version}` of those that are installed; nothing is imported."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def judge_packages(pins: dict[str, str], found: dict[str, str]) -> Finding:
    """Missing packages are missing, other versions than the tested ones are odd."""
    absent = [name for name in pins if name not in found]
    other = [f"{name} {found[name]} (tested: {pins[name]})" for name in pins
             if name in found and found[name].partition("+")[0] != pins[name]]  # fmt: skip
    if absent:
        names = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if absent[5:] else "")
        return Finding("packages", "missing", f"not installed: {names}", SET_UP)
    if other:
        return Finding("packages", "odd", "; ".join(other), SET_UP)
    return Finding("packages", "ok", f"all {len(pins)} as pinned in requirements.txt")


def check_turbojpeg() -> Iterator[Finding]:
    """The JPEG library that FFCV is linked to."""
    try:
        ctypes.CDLL("libturbojpeg.so.0")
    except OSError as error:
        yield Finding("libturbojpeg", "missing", str(error), f"{SET_UP}, or install libturbojpeg0")
    else:
        yield Finding("libturbojpeg", "ok", "libturbojpeg.so.0 loads")


def probe(code: str, seconds: float = PROBE_SECONDS, **environment: str) -> dict:
    """Run Python code that prints one JSON object last, in a process of its own.

    Returns:
        The object, or `{"error": one line}` when the code raised, crashed, hung or printed none.
    """
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **environment}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=seconds,
            env=environment,
            cwd=HERE,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:g} s"}
    if done.returncode < 0:
        return {"error": f"the process was killed by signal {-done.returncode}"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode:
        return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(lines[-1])


FFCV_PROBE = """
import json, re
import ffcv.libffcv
modules = set(re.findall(r"libopencv_(\\w+)\\.so", open("/proc/self/maps").read()))
import ffcv.loader, cv2
print(json.dumps({"modules": sorted(modules), "cv2": cv2.__version__}))
"""


def check_ffcv() -> Iterator[Finding]:
    """FFCV imports, beside OpenCV for Python, and links no more of OpenCV than it uses."""
    yield judge_ffcv(probe(FFCV_PROBE))


def judge_ffcv(answer: dict) -> Finding:
    """What an import of FFCV says: `{"modules": [...], "cv2": version}` or `{"error": ...}`."""
    if "error" in answer:
        mend = f"{SET_UP}; it needs pkg-config, g++, Python headers, OpenCV and libturbojpeg"
        return Finding("FFCV", "missing", answer["error"], mend)
    count = len(answer["modules"])
    text = f"imports, with OpenCV for Python {answer['cv2']}; links {count} modules of OpenCV"
    if count > 10:
        return Finding("FFCV", "odd", text, "rebuild: .venv/bin/pip uninstall ffcv, make setup")
    return Finding("FFCV", "ok", text)


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
        row = {"name": p.name, "bytes": p.total_memory, "capability": [p.major, p.minor]}
        answer["gpus"].append({**row, "bf16": bf16, "works": total == 64**3})
print(json.dumps(answer))
"""


def check_library() -> Iterator[Finding]:
    """The writer's C library, built for this processor."""
    yield judge_library(probe(LIBRARY_PROBE))


LIBRARY_PROBE = """
import json
from fast_imagenet import native as recode
print(json.dumps({"path": str(recode.built_file()), "there": recode.built_file().exists()}))
"""


def judge_library(answer: dict) -> Finding:
    """`{"path": file, "there": bool}` or `{"error": ...}`."""
    if "error" in answer:
        return Finding("C library", "odd", answer["error"], SET_UP)
    if not answer["there"]:
        mend = "python -m fast_imagenet.native says why; it needs a C compiler"
        found = "not built for this processor: writing data takes twice the time"
        return Finding("C library", "odd", found, mend)
    return Finding("C library", "ok", answer["path"])


def check_torch() -> Iterator[Finding]:
    """torch and torchvision are a pair; then the GPUs that they see, and whether bf16 is native."""
    answer = probe(TORCH_PROBE)
    if "error" in answer:
        yield Finding("torch, torchvision", "missing", answer["error"], SET_UP)
        return
    yield judge_pair(answer["torch"], answer["torchvision"])
    yield from judge_gpus(answer["gpus"], answer["cuda"], shutil.which("nvidia-smi") is not None)


def judge_pair(torch: str, torchvision: str) -> Finding:
    """torchvision 0.N goes with torch 2.(N-15), since 0.15 with 2.0."""
    major, minor = map(int, re.match(r"(\d+)\.(\d+)", torch).groups())
    vision = tuple(map(int, re.match(r"(\d+)\.(\d+)", torchvision).groups()))
    text = f"{torch} and {torchvision}"
    if (major, minor) < (2, 11):
        return Finding("torch, torchvision", "missing", f"{text}; torch >= 2.11 is needed", SET_UP)
    if major == 2 and vision != (0, minor + 15):
        mend = f"{SET_UP}; torch 2.{minor} goes with torchvision 0.{minor + 15}"
        return Finding("torch, torchvision", "odd", f"{text} are no pair", mend)
    return Finding("torch, torchvision", "ok", text)


def judge_gpus(gpus: list[dict], cuda: str | None, has_driver: bool) -> Iterator[Finding]:
    """One finding for each GPU that torch sees, or one for none.

    Args:
        gpus: each with name, bytes, capability [major, minor], bf16 (bool), works (bool).
        cuda: the CUDA version that torch was built for, None for a CPU build.
        has_driver: NVIDIA's tools are on this machine.
    """
    if not gpus and has_driver:
        found = f"nvidia-smi is here, but torch (built for CUDA {cuda}) sees no GPU"
        mend = "update the driver to one for this CUDA, or see CUDA_VISIBLE_DEVICES"
        yield Finding("GPU", "odd", found, mend)
    elif not gpus:
        mend = "none needed for `make demo`; ImageNet wants a GPU"
        yield Finding("GPU", "odd", "none: training runs on the CPU in fp32", mend)
    for gpu in gpus:
        text = f"{gpu['name']}, {gpu['bytes'] / GB:.1f} GB"
        if not gpu["works"]:
            mend = "this torch has no code for it, or the driver is broken: see `nvidia-smi`"
            yield Finding("GPU", "odd", f"{text}: a matrix product came out wrong", mend)
        elif not gpu["bf16"]:
            mend = "nothing to do: training.precision=auto takes fp16 with loss scaling"
            yield Finding("GPU", "odd", f"{text}, no bf16", mend)
        else:
            yield Finding("GPU", "ok", f"{text}, bf16")


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


KERNEL_PROBE = """
import json
from fast_imagenet import kernel_cache as kernel
from fast_imagenet.ops.grayscale import apply_grayscale
cache = getattr(apply_grayscale._cache, "cache_path", "")
private = kernel.use_private_cache.cache_info().currsize > 0
print(json.dumps({"folder": cache, "private": private}))
"""


def check_kernels() -> Iterator[Finding]:
    """Where compiled kernels are kept, as a run would keep them."""
    yield judge_kernels(probe(KERNEL_PROBE))


def judge_kernels(answer: dict) -> Finding:
    """`{"folder": path or "", "private": bool}` or `{"error": ...}`."""
    if "error" in answer:
        return Finding("kernel cache", "missing", answer["error"], SET_UP)
    mend = "set NUMBA_CACHE_DIR to a folder that can be written and stays"
    if not answer["folder"]:
        found = "nowhere: every start compiles for a minute"
        return Finding("kernel cache", "odd", found, mend)
    if answer["private"]:
        found = f"{answer['folder']}, lost with the temporary files"
        return Finding("kernel cache", "odd", found, mend)
    return Finding("kernel cache", "ok", answer["folder"])


def check_numba() -> Iterator[Finding]:
    """The threading layer that the loader will get."""
    layer = os.environ.get("NUMBA_THREADING_LAYER", "omp")
    yield judge_numba(probe(NUMBA_PROBE, NUMBA_THREADING_LAYER=layer))


def judge_numba(answer: dict) -> Finding:
    """`{"layer": name, "threads": n}` or `{"error": ...}`; workqueue aborts with two loaders."""
    if "error" in answer:
        mend = f"{SET_UP}; unset NUMBA_THREADING_LAYER and NUMBA_NUM_THREADS"
        return Finding("numba threads", "missing", answer["error"], mend)
    text = f"layer {answer['layer']}, {answer['threads']} threads"
    if answer["layer"] == "workqueue":
        mend = "export NUMBA_THREADING_LAYER=omp (workqueue aborts when two loaders run)"
        return Finding("numba threads", "odd", text, mend)
    return Finding("numba threads", "ok", text)


# ------------------------------------------------------------------------------------------------
# Machine
# ------------------------------------------------------------------------------------------------


def check_cores() -> Iterator[Finding]:
    """Cores that this process may use."""
    quota = cpu_quota(Path("/sys/fs/cgroup"))
    yield judge_cores(len(os.sched_getaffinity(0)), os.cpu_count() or 1, quota)


def judge_cores(affinity: int, total: int, quota: float | None) -> Finding:
    """Odd when time is rationed below the cores that may be used: workers would be throttled."""
    text = f"{affinity} usable of {total}"
    if quota is not None and quota < affinity:
        mend = f"--data.num_workers={max(1, int(quota))}, or give the container more"
        return Finding("cores", "odd", f"{text}, limited to {quota:g} cores of time", mend)
    if affinity < 4:
        mend = "none needed for `make demo`; one GPU wants 6 to 8 cores to be fed"
        return Finding("cores", "odd", text, mend)
    return Finding("cores", "ok", text)


def check_memory() -> Iterator[Finding]:
    """Memory for the page cache, against the training file where there is one."""
    fields = dict(
        re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    )
    limit = memory_limit(Path("/sys/fs/cgroup"))
    file = HERE / "data/train.beton"
    size = file.stat().st_size if file.exists() else 0
    yield judge_memory(int(fields["MemTotal"]) * 1024, limit, size)


def judge_memory(total: int, limit: int | None, file_bytes: int) -> Finding:
    """Odd when the training file does not fit beside 4 GB for the program, or below 8 GB.

    Args:
        total: bytes of the machine.
        limit: bytes that the container may use, None for all.
        file_bytes: size of data/train.beton, 0 when it is not there.
    """
    usable = total if limit is None else min(total, limit)
    text = f"{usable / GB:.1f} GB" + ("" if usable == total else f" of {total / GB:.1f} (limit)")
    if file_bytes > usable - 4 * GB:
        found = f"{text}, less than data/train.beton ({file_bytes / GB:.1f} GB) and 4 GB"
        return Finding("memory", "odd", found, "--data.in_memory=false, or a smaller max_side")
    if usable < 8 * GB:
        return Finding("memory", "odd", text, "enough for `make demo`; ImageNet wants 32 GB")
    return Finding("memory", "ok", text)


def check_disk() -> Iterator[Finding]:
    """Free space where the data will lie."""
    folder = HERE / "data" if (HERE / "data").exists() else HERE
    yield judge_disk(shutil.disk_usage(folder).free, str(folder))


def judge_disk(free: int, folder: str) -> Finding:
    """Odd below 50 GB: ImageNet as JPEG of 384 px takes about 40 (FFCV's documentation)."""
    text = f"{free / GB:.0f} GB free in {folder}"
    if free < 50 * GB:
        mend = "ImageNet as JPEG of 400 px takes over 40 GB: --write.folder on another disk"
        return Finding("disk", "odd", text, mend)
    return Finding("disk", "ok", text)


def check_shared_memory() -> Iterator[Finding]:
    """/dev/shm, which DataLoader workers and the writer use."""
    yield judge_shared_memory(shutil.disk_usage("/dev/shm").free)


def judge_shared_memory(free: int) -> Finding:
    """Odd below 1 GB: containers get 64 MB by default, and a worker then dies of a bus error."""
    text = f"{free / GB:.2f} GB free"
    if free < GB:
        mend = "docker run --ipc=host, or --shm-size=8g"
        return Finding("/dev/shm", "odd", text, mend)
    return Finding("/dev/shm", "ok", text)


CHECKS = (
    check_python,
    check_packages,
    check_turbojpeg,
    check_ffcv,
    check_library,
    check_torch,
    check_numba,
    check_kernels,
    check_cores,
    check_memory,
    check_disk,
    check_shared_memory,
)

if __name__ == "__main__":
    raise SystemExit(main())
