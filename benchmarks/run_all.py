"""All benchmarks that need no GPU, one after the other, and the tables made from their results.

    make bench IMAGES=FOLDER

Each script is a process of its own. About 14 minutes on two cores. Results land in
benchmarks/results/DATE_MACHINE/, then docs/performance.md and the table in README.md are written.
Leave the machine alone meanwhile; the load before each script is in its file.
"""

import argparse
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of images, with subfolders")
    parser.add_argument("--out", help="folder for the results (benchmarks/results/DATE_MACHINE)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of the rates")
    parser.add_argument("--only", nargs="+", help="results to make, by name; default: all")
    parser.add_argument("--smoke", action="store_true", help="for tests: tiny, in one process")
    return parser.parse_args()


def scripts(images: str, clock: str) -> dict:
    """Name of the result -> the script and its flags."""
    pictures, cores = ["--images", images], len(os.sched_getaffinity(0))
    timed = [*pictures, "--clock", clock]
    runs = {
        "loader_1_core": ["loader_throughput", *timed],
        "loader_all_cores": ["loader_throughput", *timed, "--cores", str(cores)],
        "op_kernels": ["op_kernels", *pictures],
        "decoder_memory": ["decoder_memory"],
        "startup": ["startup", "--clock", clock],
        "writer": ["writer_throughput", *timed, "--rounds", "9"],
    }
    if cores == 1:
        del runs["loader_all_cores"]
    return runs


def tiny_scripts(images: str) -> dict:
    """As `scripts`, and the training step, on one core, at sizes that say nothing."""
    pictures, quick = ["--images", images, "--rounds", "1"], ["--smoke"]
    network = ["--device", "cpu", "--arch", "timm/test_resnet", "--compile", "off"]
    batch = ["--cores", "1", "--batch-size", "4", "--side", "32", "--steps", "1"]
    return {
        "loader_1_core": ["loader_throughput", *pictures, *quick, "--per-round", "8"],
        "op_kernels": ["op_kernels", *pictures, *quick, "--limit", "2", "--sides", "32"],
        "decoder_memory": ["decoder_memory", *quick, "--side", "64"],
        "startup": ["startup", *quick],
        "train_step": ["train_step", *pictures, *quick, *network, *batch],
        "writer": ["writer_throughput", *pictures, "--repeats", "2"],
    }


def default_folder() -> Path:
    """results/DATE_N-core-PROCESSOR: what a reader of a table wants to know first."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    name = re.sub(r"\((R|TM)\)|@.*|CPU|Processor", "", names[0] if names else "processor")
    name = "-".join(re.findall(r"[A-Za-z0-9]+", name)).lower()
    return HERE / "results" / f"{time.strftime('%Y-%m-%d')}_{os.cpu_count()}-core-{name}"


def run(script: str, flags: list[str], smoke: bool) -> bool:
    """Run one script. Returns whether it succeeded; in a smoke run, errors are raised."""
    path = str(HERE / f"{script}.py")
    if not smoke:
        return subprocess.run([sys.executable, path, *flags], check=False).returncode == 0
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")
    return True


def main() -> None:
    arguments = read_arguments()
    if not Path(arguments.images).is_dir():
        sys.exit(f"IMAGES={arguments.images} is no folder; name one with photographs")
    folder = Path(arguments.out) if arguments.out else default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    images = str(Path(arguments.images).resolve())
    runs = tiny_scripts(images) if arguments.smoke else scripts(images, arguments.clock)
    if unknown := set(arguments.only or []) - set(runs):
        sys.exit(f"--only {' '.join(sorted(unknown))}: unknown; give some of {', '.join(runs)}")
    failed = []
    for name in arguments.only or runs:
        script, *flags = runs[name]
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
