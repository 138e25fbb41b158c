"""What needs a GPU, the most valuable first, in so many minutes: tests, steps, memory, training.

make gpu GPU_DATA=data/imagenette GPU_MINUTES=10
python benchmarks/gpu.py --data data/imagenette --minutes 10       without make and .venv

Every part leaves a record in the folder --records: gpu/DATE_GPU/PART.json, and a training
CONFIG/DATE_GPU/seedN, as tools.report reads it. The same command continues: a part with a record is
not run again, one that was cut off begins anew, a training at its checkpoint, the memory of configs
at the next one. A part starts where the time it will take is left; one that resumes, as soon as it
can get anywhere. --data holds train.beton and val.beton of Imagenette; without it data/imagenette
is taken, and written where it is missing.

Exit status: 0 no part failed, 1 one did, and the others ran, 2 no GPU or wrong arguments.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import common
from fast_imagenet.engine.json_lines import read_object
from fast_imagenet.environment import environment
from fast_imagenet.files import write_json
from fast_imagenet.program import FAILED, STOPPED, WRONG_SETTINGS, run_program

HERE, ROOT = Path(__file__).resolve().parent, common.ROOT
ARCHS = {"resnet50": 120.0, "resnet18": 70.0}  # seconds of train_step, compilation included
SIDES = (160, 128, 224, 192)
SEEDS = 3
CAP = 16.0  # GB of a step
SPACE = 24.0  # GB of the GPU, and CORES, that a process of step_memory takes, its context included
CORES = 4
START, EPOCH = 60.0, 4.0  # seconds of a training
SAVING = 15.0  # seconds that a training which is stopped has to save itself
SMOKE_FLAGS = [f"--config={ROOT}/tests/smoke.yaml", "--model.arch=timm/test_resnet"]
SMOKE_FLAGS += ["--training.max_steps=0", "--training.epochs=2"]
DONE, CUT = "done", "cut off"


@dataclass(frozen=True)
class Part:
    """A process that leaves a record."""

    name: str
    seconds: float  # that it takes on a GPU of a data center, roughly
    command: list[str]
    record: Path
    resumes: bool = False  # what it has done when it is cut off is kept
    run: Path | None = None  # of a training: its folder

    def typical(self) -> float:
        return self.seconds


def parts_of(args: argparse.Namespace, place: Path, data: Path | None) -> list[Part]:
    """All parts, the most valuable first. data: folder; None: there is none, and no training."""
    tests = ["benchmarks/gpu.py", f"--run-tests={place / 'tests.json'}", f"--device={args.device}"]
    parts = [Part("tests", 60, [*tests, *["--smoke"] * args.smoke], place / "tests.json")]
    steps, memory = step_parts(args, place, data), memory_part(args, place)
    trainings = training_parts(args, place, data) if data else []
    return [*parts, steps[0], *trainings[:1], memory, *steps[1:], *trainings[1:]]


def step_parts(args: argparse.Namespace, place: Path, data: Path | None) -> list[Part]:
    """benchmarks/train_step.py for each network and resolution."""
    archs, sides = ({"timm/test_resnet": 20.0}, (32,)) if args.smoke else (ARCHS, SIDES)
    parts = []
    for arch, seconds in archs.items():
        for side in sides:
            record = place / f"train_step_{Path(arch).name}_{side}.json"
            command = ["benchmarks/train_step.py", f"--arch={arch}", f"--side={side}"]
            command += [f"--device={args.device}", f"--json={record}"]
            command += [f"--data={data / 'train.beton'}"] * bool(data)
            command += ["--smoke", "--rounds=1"] * args.smoke
            parts.append(Part(record.stem, seconds, command, record))
    return parts


def memory_part(args: argparse.Namespace, place: Path) -> Part:
    """benchmarks/step_memory.py for every config of rn50_configs, as many at a time as fit."""
    import torch

    record, lanes = place / "step_memory.json", 1
    configs = [path.name for path in sorted((ROOT / "rn50_configs").glob("*.yaml"))]
    if args.device == "cuda" and torch.cuda.is_available():
        room = torch.cuda.get_device_properties(0).total_memory / 1e9 / SPACE
        lanes = max(1, min(int(room), len(os.sched_getaffinity(0)) // CORES))
    command = ["benchmarks/step_memory.py", f"--gb={CAP}", f"--lanes={lanes}"]
    command += [f"--device={args.device}", f"--json={record}"] + ["--smoke"] * args.smoke
    command += ["--config", *([f"{ROOT}/tests/smoke.yaml"] if args.smoke else configs)]
    seconds = 20 if args.smoke else 50 * len(configs) / lanes
    return Part(record.stem, seconds, command, record, resumes=True)


def training_parts(args: argparse.Namespace, place: Path, data: Path) -> list[Part]:
    """The configs at 128 px by cost; a further seed comes later than the first of a longer one."""
    paths = (ROOT / "imagenette_configs").glob("rn50_128px_*_epochs.yaml")
    configs = {int(path.stem.split("_")[2]): path.stem for path in paths}
    every = [(epochs * (seed + 1), epochs, seed) for epochs in configs for seed in range(SEEDS)]
    parts = []
    for _, epochs, seed in sorted(every)[: 1 if args.smoke else None]:
        name = configs[epochs]
        run = args.runs.absolute() / place.name / f"seed{seed}" / name  # the name of its record
        command = ["train_imagenet.py", f"--config={name}.yaml", *SMOKE_FLAGS * args.smoke]
        command += [f"--training.seed={seed}", f"--logging.folder={run}", "--training.resume=auto"]
        command += ["--logging.progress=false"]
        command += [f"--data.{s}_dataset={data}/{s}.beton" for s in ("train", "val")]
        record = place.parents[1] / name / place.name / f"seed{seed}"
        seconds = START + EPOCH * epochs
        parts.append(Part(f"{name}_seed{seed}", seconds, command, record, True, run))
    return parts


class Session:
    """Runs parts until the time is over, and notes in parts.json what each took."""

    def __init__(self, place: Path, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.path = place / "parts.json"
        self.notes: dict[str, dict] = read_object(self.path).get("parts", {})
        place.mkdir(parents=True, exist_ok=True)

    def has(self, part: Part) -> bool:
        """Whether its record is complete."""
        return self.notes.get(part.name, {}).get("status") == DONE and part.record.exists()

    def failed_before(self, part: Part) -> bool:
        """Whether an earlier call began it in vain: others come first."""
        return part.name in self.notes and not self.has(part)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def expected(self, part: Part) -> float:
        """Seconds, by what the parts before have taken; longer than when it was cut off."""
        done = [note for note in self.notes.values() if note["status"] == DONE]
        taken, typical = (sum(note[key] for note in done) for key in ("seconds", "typical"))
        before = self.notes.get(part.name, {})
        cut = 1.2 * before["seconds"] if before.get("status") == CUT else 0.0
        return max(cut, part.seconds * (max(0.5, taken / typical) if done else 1.0))

    def starts(self, part: Part) -> bool:
        """Whether the time that is left will do; for a part that resumes, some of it does."""
        return self.left > (START + SAVING if part.resumes else self.expected(part))

    def run_all(self, parts: list[Part]) -> list[str]:
        """Run the parts without a record that fit, once each; the names of those that failed."""
        return [
            part.name
            for part in sorted(parts, key=self.failed_before)
            if not self.has(part) and self.starts(part) and self.run(part) not in (DONE, CUT)
        ]

    def run(self, part: Part) -> str:
        """Run a part, for as long as there is time; what `run_process` returns."""
        print(f"== {part.name}: {' '.join(part.command)}", flush=True)
        begin = time.monotonic()
        status = run_process(part.command, self.left - SAVING)
        if status == DONE and part.run:
            status = add_record(part)
        seconds = round(time.monotonic() - begin, 1)
        self.notes[part.name] = dict(status=status, seconds=seconds, typical=part.seconds)
        write_json(self.path, dict(commit=environment()["commit"], parts=self.notes))
        print(f"== {part.name}: {status}, {seconds:.0f} s{figures(part)}", flush=True)
        return status


def run_process(command: list[str], seconds: float) -> str:
    """Run a Python program in the repository: DONE, CUT after so many seconds, or its failure."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        process_group=0,  # Ctrl-C reaches this process alone
    )
    try:
        status = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return CUT
    finally:
        process.terminate()  # a training saves itself
        with suppress(subprocess.TimeoutExpired):
            process.wait(SAVING)
        with suppress(ProcessLookupError):  # and its own processes
            os.killpg(process.pid, signal.SIGKILL)
    return {0: DONE, STOPPED: CUT}.get(status, f"failed with status {status}")


def add_record(part: Part) -> str:
    """Make a record of a finished training; what `run_process` returns."""
    from tools.report.add import add_run

    group, name = part.record.parent, part.record.parents[1].name
    try:
        add_run(part.run, group.parents[1], name=name, group=group.name)
    except (ValueError, OSError) as error:
        return f"failed: {error}"
    return DONE


def figures(part: Part) -> str:
    """The numbers of a record that stand alone in it."""
    found = read_object(part.record) if part.record.suffix and part.record.exists() else {}
    return "".join(f", {key} {x}" for key, x in found.items() if isinstance(x, int | float))


def run_tests(path: str, device: str) -> int:
    """Run the tests marked gpu in this process, and write the outcome of each; pytest's status."""
    import pytest

    outcomes: dict[str, str] = {}

    class Recorder:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.nodeid] = report.outcome

    files = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()]
    os.chdir(ROOT)
    words = ["-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "-o", "addopts=", *map(str, files)]
    status = pytest.main(words, plugins=[Recorder()])
    counts = {one: list(outcomes.values()).count(one) for one in ("passed", "failed", "skipped")}
    machine = common.describe_machine([]) | common.describe_gpu(device)
    common.publish(path, **counts, tests=outcomes, machine=machine)
    return status


def folder_of(records: Path) -> Path:
    """Where the records of this GPU go: a new day's, or those that its last commit began."""
    now = environment()
    machine = re.sub(r"[^a-z0-9]+", "-", now["device"].lower()).strip("-")
    today = records / "gpu" / f"{time.strftime('%Y-%m-%d')}_{machine}"
    for last in sorted((records / "gpu").glob(f"*_{machine}"))[-1:]:
        if read_object(last / "parts.json").get("commit") == now["commit"]:
            return last
    return today


def missing_files(folder: Path) -> list[str]:
    """The data files that are not there."""
    files = [folder / f"{split}.beton" for split in ("train", "val")]
    return [str(file) for file in files if not file.exists()]


def find_data(args: argparse.Namespace) -> Path | None:
    """The folder of train.beton and val.beton, written where none is given and there is none."""
    folder = (args.data or ROOT / "data" / "imagenette").absolute()
    if not (missing := missing_files(folder)):
        return folder
    print(f"== data: {folder} is written", flush=True)
    flags = ["--source.kind=imagenette", f"--write.folder={folder}"]
    if run_process(["write_dataset.py", *flags], 60 * args.minutes) == DONE:
        return folder
    print(f"== data: none; give --data (GPU_DATA=), a folder with {' and '.join(missing)}")
    return None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of train.beton and val.beton")
    parser.add_argument("--records", type=Path, default=ROOT / "records", help="(records)")
    runs = ROOT / "runs" / "gpu"
    parser.add_argument("--runs", type=Path, default=runs, help="trainings under way (runs/gpu)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of this call at most (10)")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: with --smoke"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny parts, whose figures mean nothing"
    )
    parser.add_argument("--run-tests", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.smoke:
        parser.error("--device=cpu measures nothing: give --smoke too, to try the parts")
    if args.data and (missing := missing_files(args.data)):
        parser.error(f"--data={args.data} does not hold {' and '.join(missing)}: write_dataset.py")
    return args


def refuse(parts: list[Part], minutes: float) -> int:
    """Report what is needed, and what would be done with it; the exit status."""
    print(
        f"gpu: needs a CUDA GPU, and torch finds none here; on a machine with one it runs these "
        f"{len(parts)} parts, as many as fit into {minutes:g} minutes a call (minutes each on a "
        f"GPU of a data center): {listed(parts, Part.typical)}",
        file=sys.stderr,
    )
    return WRONG_SETTINGS


def listed(parts: list[Part], seconds: Callable[[Part], float]) -> str:
    """Names and minutes."""
    return ", ".join(f"{part.name} {seconds(part) / 60:.1f}" for part in parts)


def main(argv: list[str] | None = None) -> int:
    """Run what is left of the parts; returns the exit status."""
    args = parse(argv)
    if args.run_tests:
        return run_tests(args.run_tests, args.device)
    import torch

    place = folder_of(args.records.absolute())
    if args.device == "cuda" and not torch.cuda.is_available():
        return refuse(parts_of(args, place, HERE), args.minutes)
    from fast_imagenet.data import ffcv_loader  # noqa: F401  (fails here rather than in each part)

    session = Session(place, args.minutes)
    data = find_data(args)
    parts = parts_of(args, place, data)
    failed = ([] if data else ["data"]) + session.run_all(parts)
    if left := [part for part in parts if not session.has(part)]:
        print(f"left, with minutes: {listed(left, session.expected)}; the same command continues")
    print(f"{len(parts) - len(left)} of {len(parts)} parts have records: {place}")
    print(f"failed: {', '.join(failed)}" if failed else "benchmarks/table.py shows them")
    return FAILED if failed else 0


if __name__ == "__main__":
    run_program("gpu", main, interrupted="interrupted; the same command continues")
