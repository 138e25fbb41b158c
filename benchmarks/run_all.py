"""All benchmarks that need no GPU, one after the other, and the tables made from their results.

    make bench IMAGES=FOLDER

Each script is a process of its own. Results land in
benchmarks/results/DATE_MACHINE/, then docs/performance.md and the table in README.md are written.
Leave the machine alone meanwhile; the load before each script is in its file.
"""

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import common

HERE = Path(__file__).resolve().parent
FLAGS = {
    "images": common.IMAGES["images"],
    "out": {"help": "folder for the results (benchmarks/results/DATE_MACHINE)"},
    "clock": common.CLOCK,
    "peers": {"default": str(HERE.parent / ".venv-bench"), "help": "environment of the peers"},
    "only": {"nargs": "+", "help": "results to make, by name; default: all"},
}
# name of the result -> the script and its flags
SCRIPTS = {
    "loader_1_core": "loader_throughput {images} {clock} {peers}",
    "loader_all_cores": "loader_throughput {images} --cores {cores}",
    "op_kernels": "op_kernels {images}",
    "decoder_memory": "decoder_memory",
    "scale": "scale {clock}",
    "thread_balance": "thread_balance {images}",
    "startup": "startup {clock}",
    "writer": "writer_throughput {images} {clock} --rounds 9",
}
TINY = {  # for tests, and the training step too: one core, at sizes that mean nothing
    "loader_1_core": "loader_throughput {images} {quick} {peers} --seconds 0 --draws 64",
    "op_kernels": "op_kernels {images} {quick} --limit 2 --sides 32",
    "decoder_memory": "decoder_memory --smoke",
    "scale": "scale --smoke --rounds 1",
    "thread_balance": "thread_balance {images} {quick} --limit 3",
    "startup": "startup --smoke",
    "train_step": "train_step {images} {quick} --device cpu --arch timm/test_resnet --compile off "
    "--cores 1 --batch-size 4 --side 32 --steps 1",
    "writer": "writer_throughput {images} {quick} --repeats 2",
}


def default_folder() -> Path:
    """results/DATE_N-core-PROCESSOR: what a reader of a table wants to know first."""
    machine = common.describe_machine([])
    name = re.sub(r"\((R|TM)\)|@.*|CPU|Processor", "", machine["processor"])
    name = "-".join(re.findall(r"[A-Za-z0-9]+", name)).lower()
    return HERE / "results" / f"{machine['date']}_{os.cpu_count()}-core-{name}"


def run(script: str, flags: list[str], smoke: bool) -> bool:
    """Run one script. Returns whether it succeeded; in a smoke run, errors are raised."""
    path = str(HERE / f"{script}.py")
    if not smoke:
        return subprocess.run([sys.executable, path, *flags], check=False).returncode == 0
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")
    return True


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=1, **FLAGS)
    if not Path(arguments.images).is_dir():
        sys.exit(f"IMAGES={arguments.images} is not a folder; name one with photographs")
    folder = Path(arguments.out) if arguments.out else default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    runs, cores = TINY if arguments.smoke else SCRIPTS, len(os.sched_getaffinity(0))
    if cores == 1:
        runs.pop("loader_all_cores", None)
    if unknown := set(arguments.only or []) - set(runs):
        sys.exit(f"--only {' '.join(sorted(unknown))}: unknown; give some of {', '.join(runs)}")
    words = {
        "{images}": ["--images", str(Path(arguments.images).resolve())],
        "{clock}": ["--clock", arguments.clock],
        "{peers}": ["--peers", arguments.peers],
        "{cores}": [str(cores)],
        "{quick}": ["--smoke", "--rounds", "1"],
    }
    failed = []
    for name in arguments.only or runs:
        script, *flags = runs[name].split()
        flags = [part for flag in flags for part in words.get(flag, [flag])]
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        if not run(script, [*flags, "--json", str(folder / f"{name}.json")], arguments.smoke):
            failed.append(name)
        print(f"   {time.perf_counter() - begin:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the tables stay as they were")
    if not arguments.out:
        subprocess.run([sys.executable, str(HERE / "table.py")], check=True)


if __name__ == "__main__":
    main()
