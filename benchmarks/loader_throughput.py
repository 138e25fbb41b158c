"""Images per second and core: our operations and their peers on the same images, in one run.

    python benchmarks/loader_throughput.py --images FOLDER --json out.json

Each group of peers is a process of its own; all are restricted to the same cores and take turns,
round after round. What is measured, and what is not: benchmarks/README.md.
"""

import argparse
import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from contestants import PLAIN, RATIOS, STRONG, TABLE, Row, expected_area, ramp

HERE = Path(__file__).resolve().parent
FLAGS = common.IMAGES | {
    "cores": {"default": 1, "help": "cores and loader threads; with more than one, FFCV alone"},
    "clock": common.CLOCK,
    "peers": common.PEERS,
}
SECONDS = 1.0  # about how long a round of one contestant takes
DRAWS = {False: 512, True: 64}  # images whose crop areas are checked, by --smoke
VARIABLES = {  # of all processes
    "CUDA_VISIBLE_DEVICES": "",
    "NUMBA_THREADING_LAYER": "omp",  # TBB's threads would wait for ever at the end
    "NO_ALBUMENTATIONS_UPDATE": "1",  # it would ask the network for its newest version
    "PYTHONWARNINGS": "ignore",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
TIMEOUT = 600  # seconds until a process that does not answer is ended


class PeerError(RuntimeError):
    """A contestant cannot be measured; the message is the reason."""


class Process:
    """A running worker.py: commands in, answers out."""

    def __init__(self, python: str, cores: int, variables: dict[str, str]) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(cores))
        environment = os.environ | VARIABLES | threads | variables
        command = [python, str(HERE / "worker.py"), str(cores)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        try:
            self.process = subprocess.Popen(command, env=environment, **pipes)
        except OSError as problem:
            name = os.path.relpath(python, common.ROOT)
            reason = f"{name} does not start ({problem.strerror}): run `make bench`"
            raise PeerError(reason) from None

    def ask(self, do: str, **what: Any) -> dict:
        """The answer to one command.

        Raises: PeerError with the reason, also when the process ended or hangs.
        """
        try:
            print(json.dumps({"do": do, **what}), file=self.process.stdin, flush=True)
        except OSError:
            line = ""
        else:
            if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
                self.process.kill()
                raise PeerError(f"no answer in {TIMEOUT} s")
            line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"its process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Contest:
    """Contestants by name. One that fails is left out, with the reason."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, table: dict[str, Row]) -> None:
        self.arguments, self.folder = arguments, folder
        self.entries = {f"{name}_{recipe}": (row, recipe)
                        for name, row in table.items() for recipe in row.recipes}  # fmt: skip
        self.processes: dict[tuple, Process] = {}
        self.left_out: dict[str, str] = {}
        self.paths: dict[str, str] = {}
        if arguments.cores > 1:
            reason = "on one core only: its user starts one process per core"
            for name, (row, _) in list(self.entries.items()):
                if row.variables or not row.home:
                    self.leave_out(name, reason)

    def leave_out(self, name: str, reason: str) -> None:
        """Raises: SystemExit for ours and stock FFCV, unless a processor may miss their path."""
        row, _ = self.entries.pop(name)
        self.left_out[name] = reason
        if row.home and not row.variables:
            raise SystemExit(f"{name}: {reason}")

    def process_of(self, row: Row) -> Process:
        key = (row.home, row.place.partition(":")[0], *row.variables.items())
        if key not in self.processes:
            venv = Path(self.arguments.peers).absolute()
            python = sys.executable if row.home else str(venv / "bin" / "python")
            variables = {name: value.format(venv=venv) for name, value in row.variables.items()}
            self.processes[key] = Process(python, self.arguments.cores, variables)
        return self.processes[key]

    def load(self, name: str) -> None:
        """Check what it makes of the ramp, then build it on the images.

        Raises: PeerError.
        """
        (row, recipe), a = self.entries[name], self.arguments
        process, what = self.process_of(row), {"place": row.place, "options": row.options}
        tasks = ([str(self.folder / kind), recipe, a.cores, a.smoke] for kind in ("ramp", "images"))
        check_output(
            process.ask("check", count=DRAWS[a.smoke], task=next(tasks), **what), row, recipe
        )
        if path := process.ask("load", name=name, task=next(tasks), **what)["path"]:
            self.paths[name] = path

    def take_turns(self, do: Callable[[str, Row], Any]) -> dict[str, Any]:
        """What `do` returns for every contestant; those for which it fails are left out."""
        found = {}
        for name, (row, _) in list(self.entries.items()):
            try:
                found[name] = do(name, row)
            except PeerError as problem:
                self.leave_out(name, str(problem))
        return found

    def run(self, images: int) -> dict[str, list[dict]]:
        """Rates by both clocks of every round, after one that warms up and sets their length."""

        def warm_up(name: str, row: Row) -> int:
            self.load(name)
            rate = self.process_of(row).ask("round", name=name, count=images)["wall"]
            # every image equally often
            seconds = 0 if self.arguments.smoke else SECONDS
            return images * max(1, round(rate * seconds / images))

        def measure(name: str, row: Row) -> dict:
            return self.process_of(row).ask("round", name=name, count=counts[name])

        counts = self.take_turns(warm_up)
        rounds = [self.take_turns(measure) for _ in range(self.arguments.rounds)]
        return {name: [found[name] for found in rounds] for name in self.entries}

    def versions(self) -> dict[str, str]:
        """Of the peers' packages, without pillow-simd, which has a folder of its own."""
        names = re.findall(r"([\w-]+)==", (HERE / "requirements.txt").read_text())
        rows = [row for row, _ in self.entries.values() if not row.home]
        return self.process_of(rows[0]).ask("versions", names=names) if rows else {}


def check_output(found: dict, row: Row, recipe: str) -> None:
    """Raises: PeerError where the output is not uint8 of the asked size, or crops differ."""
    count, *shape = found["shape"]
    size = int(recipe.rpartition("_")[2])
    if found["dtype"] != "uint8" or shape not in ([size, size, 3], [3, size, size]):
        raise PeerError(f"its output is {found['dtype']} {found['shape']}")
    if recipe == STRONG:
        return
    mean, deviation = expected_area()
    areas, slack = found["areas"], 0.01 + 5 * deviation / count**0.5
    if not row.own_crops and abs(sum(areas) / count - mean) > slack:
        raise PeerError(f"its crops have {sum(areas) / count:.2f} of the area, asked: {mean:.2f}")
    if not 0.05 < min(areas) <= max(areas) < 1.05:
        raise PeerError(f"its crops have {min(areas):.2f} to {max(areas):.2f} of the area")


def write_files(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The images and the ramp, as JPEG files and in FFCV's format, and what they are."""
    import data

    images = data.read_images(arguments.images, arguments.limit, arguments.max_side)
    kinds = {"ours": {"markers": True}, "raw": {"mode": "raw"}, "stock": {}}
    for name, arrays in {"ramp": [ramp()] * DRAWS[arguments.smoke], "images": images}.items():
        (folder / name).mkdir()
        sizes = {}
        for kind, extra in kinds.items():
            path = data.write_file(folder / name / f"{kind}.beton", arrays, **extra)
            samples = data.sample_bytes(path)
            sizes[kind] = sum(map(len, samples))
        for number, encoded in enumerate(samples):  # of stock FFCV's file, as peers see them
            (folder / name / f"{number:06}.jpg").write_bytes(encoded)
    pixels = [image.shape[0] * image.shape[1] for image in images]
    found = {"images": len(images), "mean_pixels": sum(pixels) // len(pixels)}
    return found | {"image_bytes": sizes, "max_side": arguments.max_side, "quality": data.QUALITY}


def measure(arguments: argparse.Namespace, table: dict[str, Row]) -> tuple[dict, dict[str, Any]]:
    """Rates by contestant, and what they were measured on."""
    with tempfile.TemporaryDirectory() as folder:
        found = write_files(arguments, Path(folder))
        contest = Contest(arguments, Path(folder), table)
        try:
            rounds = contest.run(found["images"])
            versions = contest.versions()
        finally:
            for process in contest.processes.values():
                process.close()
    first, second = sorted(common.CLOCKS, key=lambda clock: clock != arguments.clock)
    cores, rates = arguments.cores, {}
    for name, values in rounds.items():
        by = {clock: common.summary([value[clock] for value in values]) for clock in common.CLOCKS}
        per_core = by[first]["median"] / (cores if first == "wall" else 1)
        rates[name] = {"per_core": per_core, **by[first], second: by[second]}
    reasons = Path(arguments.peers, "left_out.txt")
    return rates, found | {
        "cores": cores,
        "clock": first,
        "left_out": contest.left_out,
        "not_installed": reasons.read_text().splitlines() if reasons.is_file() else [],
        "paths": contest.paths,
        "peer_versions": versions,
    }


def hardest_peer(rates: dict[str, dict], table: dict[str, Row]) -> str | None:
    """Name of the fastest contestant that is not ours, 160 px."""
    names = [f"{name}_{PLAIN[0]}" for name in table if not name.startswith("ours")]
    return max((n for n in names if n in rates), key=lambda n: rates[n]["median"], default=None)


def main(table: dict[str, Row] = TABLE) -> None:
    arguments = common.read_arguments(None, __doc__, rounds=9, **FLAGS)
    machine = common.start(arguments.cores, arguments.smoke)
    rates, data = measure(arguments, table)
    hardest = hardest_peer(rates, table)
    pairs = {key: (ours, hardest if "{" in peer else peer) for key, (ours, peer) in RATIOS.items()}
    ratios = {key: common.ratio(rates, *pair) for key, pair in pairs.items() if {*pair} <= {*rates}}
    found = {**ratios, "rates": rates, "hardest": hardest, "data": data}
    common.publish(arguments.json, **found, machine=machine)


if __name__ == "__main__":
    main()
