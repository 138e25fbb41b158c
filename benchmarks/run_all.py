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
from pathlib import Path

import common

HERE = Path(__file__).resolve().parent
FLAGS = {
    "images": common.IMAGES["images"],
    "out": {"help": "folder for the results (benchmarks/results/DATE_MACHINE)"},
    "clock": common.CLOCK,
    "peers": common.PEERS,
    "only": {"nargs": "+", "help": "results to make, by name; default: all"},
}
# name of the result -> the script and its flags
SCRIPTS = {
    "loader_1_core": "loader_throughput {images} {clock} {peers}",
    "loader_all_cores": "loader_throughput {images} {cores}",
    "op_kernels": "op_kernels {images}",
    "decoder_memory": "decoder_memory",
    "scale": "scale {clock}",
    "thread_balance": "thread_balance {images}",
    "startup": "startup {clock}",
    "writer": "writer_throughput {images} {clock}",
}


def default_folder() -> Path:
    """results/DATE_N-core-PROCESSOR: what a reader of a table wants to know first."""
    machine = common.describe_machine([])
    name = re.sub(r"\((R|TM)\)|@.*|CPU|Processor", "", machine["processor"])
    name = "-".join(re.findall(r"[A-Za-z0-9]+", name)).lower()
    return HERE / "results" / f"{machine['date']}_{os.cpu_count()}-core-{name}"


def run(script: str, *flags: str, smoke: bool) -> bool:
    """Run one script. Returns whether it succeeded; in a smoke run, errors are raised."""
    command = [str(HERE / f"{script}.py"), *flags]
    if not smoke:
        return subprocess.run([sys.executable, *command], check=False).returncode == 0
    sys.argv = [*command, "--smoke", "--rounds=1"]
    runpy.run_path(command[0], run_name="__main__")
    return True


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=1, **FLAGS)
    if not Path(arguments.images).is_dir():
        sys.exit(f"IMAGES={arguments.images} is not a folder; name one with photographs")
    folder = Path(arguments.out) if arguments.out else default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    runs, cores = dict(SCRIPTS), len(os.sched_getaffinity(0))
    if arguments.smoke or cores == 1:
        del runs["loader_all_cores"]
    if unknown := set(arguments.only or []) - set(runs):
        sys.exit(f"--only {' '.join(sorted(unknown))}: unknown; give some of {', '.join(runs)}")
    images = Path(arguments.images).resolve()
    words = dict(images=f"--images={images}", clock=f"--clock={arguments.clock}")
    words |= dict(peers=f"--peers={arguments.peers}", cores=f"--cores={cores}")
    failed = []
    for name in arguments.only or runs:
        command = [word.format(**words) for word in runs[name].split()]
        print(f"== {name}", flush=True)
        if not run(*command, f"--json={folder / name}.json", smoke=arguments.smoke):
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the tables stay as they were")
    if not arguments.out:
        subprocess.run([sys.executable, str(HERE / "table.py")], check=True)


if __name__ == "__main__":
    main()
