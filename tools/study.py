"""Train every run of a study, and make records of them.

python -m tools.study records/ablation --images /path/to/imagenette     train what is missing
python -m tools.study records/ablation --list                           what there is

The plan is the study.yaml of the folder (its keys: tools/report/yaml_files.py). Every group is
trained with the first seed, then every group with the next, so that a study that is broken off
compares groups of equal seeds. Runs train side by side, --lanes at a time, each with its part of
the cores. A run that was stopped resumes when the command is given again; a finished one becomes a
record beside the plan, and is not trained again. Data and records that were made with other
settings than the plan has now are refused by name, never reused.

Exit status: 0 all done, 1 a run failed, 2 wrong arguments or plan, 75 stopped by a signal.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.config import interpreter, read_config, to_dict
from fast_imagenet.engine.json_lines import read_object
from fast_imagenet.files import write_json
from fast_imagenet.processes import HANG_UP
from fast_imagenet.program import STOPPED, WRONG_SETTINGS, run_program
from fast_imagenet.terminal import announce
from tools.report.add import add_run
from tools.report.records import flat, read_group_file, read_run, settings_that_differ
from tools.report.yaml_files import STUDY, RecordError, Study, flags_of, read_study

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = "study_data.json"  # beside the data: the settings that this program wrote it with
FREE = {"source.path", "source.md5", "write.folder", "write.workers", "write.overwrite"}
FREE |= {"write.check_space"}  # they do not change a file
PASSED_ON = ("--training.checkpoint_minutes=", "--data.timeout=", "--logging.progress=")


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    group: str
    label: str
    seed: int
    flags: list[str]  # for train_imagenet.py
    run: Path  # its folder while it trains
    record: Path  # and afterwards

    @property
    def name(self) -> str:
        return f"{self.group}, seed {self.seed}"


def jobs_of(study: Study, folder: Path, runs: Path, data: Path) -> list[Job]:
    """All runs of a plan, the first seed of every group first; their folders, and that of data."""
    jobs = []
    for seed in study.seeds:
        for group in study.groups:
            place = Path(group.name, f"seed{seed}")
            settings = study.settings | group.settings | {"training.seed": seed}
            settings |= {f"data.{s}_dataset": data / f"{s}.beton" for s in ("train", "val")}
            settings["logging.folder"] = runs / place
            flags = [f"--config={config}" for config in study.config] + flags_of(settings)
            jobs.append(Job(group.name, group.label, seed, flags, runs / place, folder / place))
    return jobs


def check_records(jobs: list[Job], write: list[dict[str, Any]]) -> None:
    """Refuse wrong settings of any run, and records that do not match the plan and its `write`."""
    announce(f"checking the settings of {len(jobs)} runs: about 6 s")
    import train_imagenet as script

    changed = []
    for job in jobs:
        words: dict[str, Any] = dict(
            search=script.CONFIG_FOLDERS, prog=f"study, {job.name}", description=""
        )
        planned = to_dict(read_config(script.SETTINGS, job.flags, **words))
        if not job.record.exists():
            continue
        differ = settings_that_differ(read_run(job.record), planned)
        trained_on = read_group_file(job.record.parent).get("write", write)
        if list(map(without_free, trained_on)) != list(map(without_free, write)):
            differ.append("write: the data")
        if differ:
            changed.append(f"{job.record} ({', '.join(differ)}; its run: {job.run})")
    if changed:
        raise RecordError(
            f"the plan has changed since these runs were trained: {'; '.join(changed)}; restore "
            f"the plan, or remove the record and the run's folder to train it again"
        )


def without_free(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of write_dataset that decide what a file holds."""
    return {k: value for k, value in settings.items() if k not in FREE and value != "auto"}


def write_data(study: Study, data: Path, images: str) -> None:
    """Convert the images as the plan says; files that were written so are kept, others refused."""
    import write_dataset as script

    for settings in study.write:
        flags = flags_of(settings)
        cfg = read_config(script.SETTINGS, flags, prog="study, write", description="")
        planned = without_free(flat(to_dict(cfg)))
        planned |= {"--images": str(Path(images).absolute())} if images else {}
        files = [data / path.name for path in script.output_files(cfg).values()]
        for file in files:
            check_file(file, planned)
        if all(file.exists() for file in files):
            continue
        places = {"write.folder": data} | ({"source.path": images} if images else {})
        command = [sys.executable, "write_dataset.py", *flags, *flags_of(places)]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise RecordError(f"the data could not be written into {data}, for the reason above")
        made = {
            one.name: {"settings": planned, "file": _checksums(BetonFile(one))} for one in files
        }
        write_json(data / WRITTEN, read_object(data / WRITTEN) | made)


def check_file(file: Path, planned: dict[str, Any]) -> None:
    """Refuse a data file that was written with other settings; one that is absent is fine."""
    if not file.exists():
        return
    beton = BetonFile(file)
    note = read_object(file.parent / WRITTEN).get(file.name, {})
    known = note.get("file") == _checksums(beton)  # else written by hand, or by an earlier version
    found = note["settings"] if known else _settings_in_file(beton, planned)
    differ = [f"{key}={found[key]}, planned {value}" for key, value in planned.items()
              if found.get(key, value) != value]  # fmt: skip
    if differ:
        raise RecordError(
            f"{file} was written with other settings than the plan has ({'; '.join(differ)}): "
            f"remove it to write it again, give another --data, or restore the plan"
        )
    if not known:
        silent = ", ".join(key for key in planned if key not in found)
        print(f"note: {file} was not written by this command, which cannot compare {silent}")


def _settings_in_file(beton: BetonFile, planned: dict[str, Any]) -> dict[str, Any]:
    """The settings that a file itself holds; write.limit where it is exceeded."""
    stored = dict((beton.header_json or beton.sidecar).get("settings", {}))
    found: dict[str, Any] = {}
    if "skip_bad" in stored:
        found["source.on_error"] = "skip" if stored.pop("skip_bad") else "fail"
    found |= {f"write.{key}": value for key, value in stored.items()}
    if kind := beton.sidecar.get("source", {}).get("kind"):
        found["source.kind"] = kind
    if 0 < planned["write.limit"] < beton.num_samples:
        found["write.limit"] = beton.num_samples
    return found


def _checksums(beton: BetonFile) -> dict[str, Any]:
    """What distinguishes a file from another."""
    keys = ("num_samples", "order_crc32", "blocks_crc32")
    return {key: (beton.header_json or {}).get(key) for key in keys}


@dataclass
class Trainer:
    """Runs jobs, and makes records of them."""

    threads: int  # of each run
    timed: bool  # whether the times mean something: one run at a time on an idle machine
    extra: list[str]  # more flags for every run, which change nothing that is learned
    write: list[dict[str, Any]]  # of the study: the data, noted in the records
    stopped: bool = False
    running: set[subprocess.Popen] = field(default_factory=set)
    adding: threading.Lock = field(default_factory=threading.Lock)

    def stop(self, *_: Any) -> None:
        """Ask every run to save and end; none is started any more."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()

    def train(self, job: Job) -> str:
        """Train a job to its end: '' when it is a record, else what happened."""
        if self.stopped:
            return "not started"
        job.run.mkdir(parents=True, exist_ok=True)
        print(f"{job.name}: starts\n", end="", flush=True)  # one write: of several threads
        status, output = self._run(job)
        if self.stopped:
            return "stopped; it resumes when the command is given again"
        if status:
            return f"failed with status {status}: {output.strip()[-1000:]}"
        about = {"label": job.label, "write": self.write} | ({} if self.timed else {"timed": False})
        records, name = job.record.parents[2], job.record.parents[1].name
        try:
            with self.adding:
                add_run(job.run, records, name=name, group=job.group, about=about)
        except (ValueError, OSError) as error:  # the other runs continue
            return f"is trained, but did not become a record: {error}"
        print(f"{job.name}: {output.strip().splitlines()[-1]}\n", end="", flush=True)
        return ""

    def _run(self, job: Job) -> tuple[int, str]:
        flags = [*job.flags, "--training.resume=auto", f"--data.num_workers={self.threads}"]
        process = subprocess.Popen(
            [sys.executable, "train_imagenet.py", *flags, *self.extra],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
            start_new_session=True,  # Ctrl-C reaches this process, which stops the runs once
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
        )
        self.running.add(process)
        if self.stopped:  # meanwhile
            process.terminate()
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("epoch "):
                print(f"{job.name}: {line}", end="", flush=True)
        self.running.discard(process)
        return process.wait(), "".join(lines)


def train_all(jobs: list[Job], lanes: int, trainer: Trainer) -> int:
    """Train jobs, so many at a time; the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, *HANG_UP):
        signal.signal(number, trainer.stop)
    with ThreadPoolExecutor(lanes) as pool:
        found = list(pool.map(trainer.train, jobs))
    problems = [f"{job.name}: {what}" for job, what in zip(jobs, found, strict=True) if what]
    print("\n".join([f"{len(jobs) - len(problems)} of {len(jobs)} runs done", *problems]))
    print(f"{interpreter()} -m tools.report writes the records' tables into docs/results.md")
    return STOPPED if trainer.stopped else int(bool(problems))


def planned_study(folder: Path) -> Study:
    """The study of a folder; RecordError when folder or study.yaml is missing or has no plan."""
    if not folder.is_dir():
        raise RecordError(f"{folder} is not a folder: give one that holds a {STUDY}")
    study = read_study(folder / STUDY)
    if study is None:
        raise RecordError(f"{folder} holds no {STUDY}: write the plan of the study into it")
    if not study.groups:
        raise RecordError(f"{folder / STUDY} is not a plan: it needs groups")
    return study


def main(argv: list[str] | None = None) -> int:
    """Carry out the study that `argv` names; returns the exit status."""
    args, extra = parse(argv)
    folder = args.folder.absolute()
    runs = (args.runs or ROOT / "runs" / folder.name).absolute()
    data = (args.data or ROOT / "data" / folder.name).absolute()
    try:
        study = planned_study(args.folder)
        jobs, write = jobs_of(study, folder, runs, data), list(study.write)
        check_records(jobs, write)
        missing = [job for job in jobs if not job.record.exists()]
        if missing and not args.list:
            write_data(study, data, args.images)
    except (ValueError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return WRONG_SETTINGS
    if args.list:
        print("\n".join(f"{'missing' if j in missing else 'done   '}  {j.name}" for j in jobs))
        return 0
    if not missing:
        print(f"all {len(jobs)} runs are done already")
        return 0
    threads = max(1, len(os.sched_getaffinity(0)) // args.lanes)
    return train_all(missing, args.lanes, Trainer(threads, args.timed, extra, write))


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it is for train_imagenet.py."""
    parser = argparse.ArgumentParser(prog="python -m tools.study", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="below records/, of the study")
    parser.add_argument("--images", default="", help="folder of the images: --source.path")
    parser.add_argument("--lanes", type=int, default=1, help="runs side by side (1)")
    parser.add_argument("--runs", type=Path, help="of the runs under way (runs/NAME)")
    parser.add_argument("--data", type=Path, help="of train.beton and val.beton (data/NAME)")
    parser.add_argument("--timed", action="store_true", help="the machine is idle: show times")
    parser.add_argument("--list", action="store_true", help="list the runs, train nothing")
    args, extra = parser.parse_known_args(argv)
    wrong = [word for word in extra if not word.startswith(PASSED_ON)]
    if wrong:
        parser.error(f"{' '.join(wrong)}: only {' '.join(PASSED_ON)} reach train_imagenet.py")
    if args.lanes < 1:
        parser.error(f"--lanes={args.lanes} must be 1 or more")
    if args.timed and args.lanes > 1:
        parser.error(f"--timed with --lanes={args.lanes}: runs side by side slow each other down")
    return args, extra


if __name__ == "__main__":
    run_program("study", main)
