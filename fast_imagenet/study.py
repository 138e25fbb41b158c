"""Train every run of a study, and make records of them.

python -m fast_imagenet.study records/ablation --pictures /path/to/imagenette     train what lacks
python -m fast_imagenet.study records/ablation --list                              what there is

The plan is the study.yaml of the folder (its keys: fast_imagenet/report/studies.py). Every group is
trained with the first seed, then every group with the next, so that a study that is broken off
compares groups of equal seeds. Runs go side by side, --lanes at a time, each with its share of the
cores. A run that was stopped goes on where it was when the command is given again; a finished one
becomes a record beside the plan, and is not trained again.

Exit status: 0 all done, 1 a run failed, 2 wrong arguments or plan, 75 stopped by a signal.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fast_imagenet.config import interpreter
from fast_imagenet.guard import HANG_UP, STOPPED, outlive_reader
from fast_imagenet.report.add import add_run
from fast_imagenet.report.errors import RecordError
from fast_imagenet.report.studies import FILE, Study, read_study

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    group: str
    label: str
    seed: int
    flags: tuple[str, ...]  # for train_imagenet.py
    run: Path  # its folder while it trains
    record: Path  # and afterwards

    @property
    def name(self) -> str:
        return f"{self.group}, seed {self.seed}"


def jobs_of(study: Study, folder: Path, runs: Path, data: Path) -> list[Job]:
    """All runs, the first seed of every group first.

    Args:
        study: with a plan.
        folder: of the records.
        runs: folder of the runs under way.
        data: folder of train.beton and val.beton.
    """
    jobs = []
    for seed in study.seeds:
        for group in study.groups:
            settings = (study.settings or {}) | group.settings | {"training.seed": seed}
            settings |= {f"data.{s}_dataset": data / f"{s}.beton" for s in ("train", "val")}
            run = runs / group.name / f"seed{seed}"
            settings["logging.folder"] = run
            flags = [f"--config={config}" for config in study.configs]
            flags += [f"--{key}={_text(value)}" for key, value in settings.items()]
            record = folder / group.name / f"seed{seed}"
            jobs.append(Job(group.name, group.label, seed, tuple(flags), run, record))
    return jobs


def _text(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_settings(jobs: list[Job]) -> None:
    """Every setting of every run, before the first is trained: exit status 2 with the mistakes."""
    import train_imagenet as script
    from fast_imagenet.config import read_config

    for job in jobs:
        words = dict(search=script.CONFIG_FOLDERS, prog=f"study, {job.name}", description="")
        read_config(script.SETTINGS, list(job.flags), **words)


def write_data(study: Study, data: Path, pictures: str) -> None:
    """Convert the pictures as the plan says; files that are there are kept.

    Raises:
        RecordError: a conversion failed; its messages went to stderr.
    """
    for settings in study.write:
        if (data / f"{settings.get('source.split', 'train')}.beton").exists():
            continue
        flags = [f"--{key}={_text(value)}" for key, value in settings.items()]
        command = [sys.executable, "write_dataset.py", *flags, f"--write.folder={data}"]
        command += [f"--source.path={pictures}"] if pictures else []
        if subprocess.run(command, cwd=ROOT).returncode:
            raise RecordError(f"the data could not be written into {data}, for the reason above")


class Trainer:
    """Runs jobs, and makes records of them.

    Args:
        threads: of each run.
        timed: whether the times mean something: one run at a time on a machine at rest.
        extra: more flags for every run, which change nothing that is learnt.
    """

    def __init__(self, threads: int, timed: bool, extra: list[str]):
        self.threads, self.timed, self.extra = threads, timed, extra
        self.stopped, self._lock, self._running = False, threading.Lock(), set()

    def stop(self, *_) -> None:
        """Ask every run to save and end; none is started any more."""
        self.stopped = True
        for process in list(self._running):
            process.terminate()

    def train(self, job: Job) -> str:
        """Train a job to its end: '' when it is a record, else what happened."""
        if self.stopped:
            return "not started"
        job.run.mkdir(parents=True, exist_ok=True)
        print(f"{job.name}: begins\n", end="", flush=True)  # one write: of several threads
        status, said = self._run(job)
        if self.stopped:
            return "stopped; it goes on when the command is given again"
        if status:
            return f"failed with status {status}: {said.strip()[-1000:]}"
        about = {"label": job.label} | ({} if self.timed else {"timed": False})
        place = dict(name=job.record.parent.parent.name, group=job.group, about=about)
        try:
            with self._lock:
                add_run(job.run, job.record.parent.parent.parent, **place)
        except (ValueError, OSError) as error:  # the other runs go on
            return f"is trained, and no record: {error}"
        print(f"{job.name}: {said.strip().splitlines()[-1]}\n", end="", flush=True)
        return ""

    def _run(self, job: Job) -> tuple[int, str]:
        flags = [*job.flags, "--training.resume=auto", f"--data.num_workers={self.threads}"]
        command = [sys.executable, "train_imagenet.py", *flags, *self.extra]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # a session of its own: Ctrl-C reaches this process, which stops the runs once
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, **pipes
        )
        self._running.add(process)
        if self.stopped:  # meanwhile
            process.terminate()
        said = process.communicate()[0]
        self._running.discard(process)
        return process.returncode, said


def main(argv: list[str] | None = None) -> int:
    """Do as `argv` says; returns the exit status."""
    args, extra = parse(argv)
    try:
        study = read_study(args.folder / FILE)
        if study is None or not study.groups:
            raise RecordError(f"{args.folder / FILE} is no plan of a study: it needs groups")
        runs = args.runs or ROOT / "runs" / args.folder.absolute().name
        data = args.data or ROOT / "data" / args.folder.absolute().name
        jobs = jobs_of(study, args.folder.absolute(), runs.absolute(), data.absolute())
        check_settings(jobs)
        missing = [job for job in jobs if not job.record.exists()]
        if args.list:
            for job in jobs:
                print(f"{'missing' if job in missing else 'there  '}  {job.name}")
            return 0
        write_data(study, data.absolute(), args.pictures)
    except (ValueError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    if not missing:
        print(f"all {len(jobs)} runs are there already")
        return 0
    return train_all(missing, args.lanes, args.timed, extra)


def train_all(jobs: list[Job], lanes: int, timed: bool, extra: list[str]) -> int:
    """Train jobs, so many at a time; the exit status."""
    cores = len(os.sched_getaffinity(0))
    trainer = Trainer(max(1, cores // lanes), timed, extra)
    for number in (signal.SIGINT, signal.SIGTERM, *HANG_UP):
        signal.signal(number, trainer.stop)
    with ThreadPoolExecutor(lanes) as pool:
        found = list(pool.map(trainer.train, jobs))
    problems = [f"{job.name}: {what}" for job, what in zip(jobs, found, strict=True) if what]
    print("\n".join([f"{len(jobs) - len(problems)} of {len(jobs)} runs done", *problems]))
    print(
        f"{interpreter()} -m fast_imagenet.report writes the records' tables into docs/results.md"
    )
    return STOPPED if trainer.stopped else int(bool(problems))


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The words of the command line, and those for train_imagenet.py."""
    parser = argparse.ArgumentParser(prog="python -m fast_imagenet.study", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="below records/, of the study")
    parser.add_argument("--pictures", default="", help="folder of the pictures: --source.path")
    parser.add_argument("--lanes", type=int, default=1, help="runs side by side (1)")
    parser.add_argument("--runs", type=Path, help="of the runs under way (runs/NAME)")
    parser.add_argument("--data", type=Path, help="of train.beton and val.beton (data/NAME)")
    parser.add_argument("--timed", action="store_true", help="the machine is at rest: show times")
    parser.add_argument("--list", action="store_true", help="say what is there, train nothing")
    args, extra = parser.parse_known_args(argv)
    allowed = ("--training.checkpoint_minutes=", "--data.timeout=", "--logging.progress=")
    if wrong := [word for word in extra if not word.startswith(allowed)]:
        parser.error(f"{' '.join(wrong)}: only {' '.join(allowed)} are handed on")
    if args.lanes < 1:
        parser.error(f"--lanes={args.lanes} must be 1 or more")
    if args.timed and args.lanes > 1:
        parser.error(f"--timed with --lanes={args.lanes}: runs side by side take each other's time")
    return args, extra


if __name__ == "__main__":
    outlive_reader()
    sys.exit(main())
