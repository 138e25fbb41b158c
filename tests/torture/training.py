"""Training killed and signalled at any moment; errors of the loader's thread."""

import random
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from fast_imagenet.program import STOPPED
from tests.torture.common import (
    PATIENCE,
    end,
    kill_session,
    source_flags,
    start_trainer,
    succeed,
    train,
)

# Imagenette's CPU recipe in seconds, with everything on that draws or averages. The network is
# small, as a checkpoint every fifth of a second would otherwise be most of the run.
RECIPE = [
    "--config=rn18_64px_16_epochs.yaml", "--model.arch=timm/test_resnet", "--training.epochs=2",
    "--training.batch_size=16", "--lr.lr_peak_epoch=0.5", "--ema.decay=0.9",
    "--resolution.min_res=32", "--resolution.end_ramp=1", "--augment.mixup=0.2",
    "--augment.cutmix=1", "--augment.erasing=0.5", "--augment.erasing_mode=pixel",
    "--augment.saturation=0.4", "--augment.policy=rand_augment_lite", "--validation.resolution=32",
    "--validation.plain_resolution=32", "--data.num_workers=1", "--logging.tensorboard=0",
    "--logging.progress=0", "--training.checkpoint_minutes=0.003",
]  # fmt: skip
IMAGES, BATCH = (160, 40), 16
COLD = 5  # every fifth life is started as a user does it


def training_kills(moments: int, photos: Path | None, seed: int = 0) -> dict:
    """Kill the run with SIGKILL at `moments` random moments of its life, resume, compare its end.

    Two runs go on side by side. Each is killed up to twice before it may end; every fifth is
    started cold, and in half of them the draw begins with the first checkpoint.
    """

    def life(number: int, place: _Place) -> dict:
        draw, cold = random.Random(f"{seed} {number}"), number % COLD == 0
        folder, statuses, steps = place.folder / f"killed-{number}", [], []
        for _ in range(1 + number % 2):
            process = start_trainer(*place.flags, f"--logging.folder={folder}", cold=cold)
            late = number % 4 > 1 and _wait_for(folder / "last.pt", process)
            longest = place.cold_seconds if cold else place.seconds
            time.sleep(draw.uniform(0, longest / 2 if late else longest))
            kill_session(process)
            statuses.append(process.returncode)
            steps.append(steps_done(folder))
        train(*place.flags, f"--logging.folder={folder}")
        differing = differences(folder, place.whole)
        return {"statuses": statuses, "saved_steps": steps, "differs_in": differing}

    runs = _lives(moments, photos, life)
    return {
        "moments": moments,
        "killed_before_the_end": sum(-signal.SIGKILL in run["statuses"] for run in runs),
        "killed_with_a_checkpoint": sum(any(run["saved_steps"]) for run in runs),
        "ended_bit_identical": sum(not run["differs_in"] for run in runs),
        "runs": runs,
    }


def training_signals(moments: int, photos: Path | None, seed: int = 0) -> dict:
    """Send SIGTERM, SIGINT or SIGUSR1 at random moments: seconds to the end, status, and resume."""
    names = ("SIGTERM", "SIGINT", "SIGUSR1")

    def life(number: int, place: _Place) -> dict:
        draw, cold = random.Random(f"{seed} signal {number}"), number % COLD == 0
        folder, name = place.folder / f"signalled-{number}", names[number % 3]
        process = start_trainer(*place.flags, f"--logging.folder={folder}", cold=cold)
        late = number % 2 and _wait_for(folder / "last.pt", process)
        # cold, not before Python has read the script: until then nobody can answer
        first, last = (2, place.cold_seconds) if cold else (0, place.seconds)
        time.sleep(draw.uniform(0, place.seconds / 2) if late else draw.uniform(first, last))
        begin, before = time.monotonic(), steps_done(folder)
        process.send_signal(signal.Signals[name])
        said = end(process)
        seconds, after = time.monotonic() - begin, steps_done(folder)
        train(*place.flags, f"--logging.folder={folder}")
        saves = after >= before and bool(after) == ("before the run began" not in said)
        good = process.returncode in (STOPPED, 0) and seconds < 25 and saves
        return {
            "signal": name,
            "status": process.returncode,
            "seconds": round(seconds, 2),
            "saved_steps": after,
            "said": said.strip().splitlines()[-1:],
            "good": good,
            "differs_in": differences(folder, place.whole),
        }

    runs = _lives(moments, photos, life)
    return {
        "moments": moments,
        "ended_within_25_s": sum(run["good"] for run in runs),
        "stopped_with_a_checkpoint": sum(
            run["status"] == STOPPED and run["saved_steps"] > 0 for run in runs
        ),
        "longest_seconds": max((run["seconds"] for run in runs), default=0),
        "ended_bit_identical_after_resume": sum(not run["differs_in"] for run in runs),
        "runs": runs,
    }


def steps_done(folder: Path) -> int:
    """Steps behind the run in `folder`, by its last checkpoint; 0 without one."""
    from fast_imagenet.engine.checkpoint import load_checkpoint

    if not (folder / "last.pt").exists():
        return 0
    state = load_checkpoint(folder / "last.pt")
    return state["epoch"] * (IMAGES[0] // BATCH) + state["step"]


def _wait_for(path: Path, process) -> bool:
    """Until a file is there, or the process has ended; whether it is there."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.exists()


class _Place:
    """Data, flags and an uninterrupted run to compare with.

    Attributes:
        folder: for runs.
        whole: the uninterrupted run, started as a user does it.
        cold_seconds, seconds: that one takes, and one that is forked.
    """

    def __init__(self, photos: Path | None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = folder = Path(self._folder.name)
        self.whole = folder / "whole"
        for split, count in zip(("train", "val"), IMAGES, strict=True):
            flags = [*source_flags(photos), f"--source.split={split}", f"--write.limit={count}"]
            succeed("write_dataset.py", *flags, f"--write.folder={folder}")
        self.flags = [*RECIPE, "--training.resume=auto"]
        self.flags += [f"--data.{s}_dataset={folder / f'{s}.beton'}" for s in ("train", "val")]
        self.cold_seconds = train(*self.flags, f"--logging.folder={self.whole}", cold=True)
        train(*self.flags, f"--logging.folder={folder / 'first'}")  # the imports before the fork
        self.seconds = train(*self.flags, f"--logging.folder={folder / 'second'}")


_place = cache(_Place)  # kills and signals compare with the same uninterrupted run


def _lives(moments: int, photos: Path | None, life) -> list[dict]:
    with ThreadPoolExecutor(2) as pool:
        place = _place(photos)
        return list(pool.map(lambda number: life(number, place), range(moments)))


def differences(folder: Path, whole: Path) -> list[str]:
    """What differs between two finished runs: weights, average, optimizer state, losses, log."""
    from fast_imagenet.engine.checkpoint import load_checkpoint
    from fast_imagenet.engine.json_lines import read_jsonl

    states = [load_checkpoint(path / "last.pt") for path in (folder, whole)]
    found = [key for key in ("model", "ema", "optimizer") if not _same(*(s[key] for s in states))]
    losses = [
        [loss for line in read_jsonl(path / "steps.jsonl") for loss in line["losses"]]
        for path in (folder, whole)
    ]
    if losses[0] != losses[1]:
        found.append("losses")
    logs = [[_untimed(line) for line in read_jsonl(p / "log.jsonl")] for p in (folder, whole)]
    if logs[0] != logs[1]:
        found.append("log")
    weights = [(path / "weights.safetensors").read_bytes() for path in (folder, whole)]
    if weights[0] != weights[1]:
        found.append("weights.safetensors")
    return found


def _same(first, second) -> bool:
    import torch

    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second


def _untimed(line: dict) -> dict:
    """A line of the log without what the clock and the machine say."""
    timed = ("seconds", "per_second", "wait_share", "memory_gb")
    return {key: value for key, value in line.items() if not key.endswith(timed)}


def loader_errors(times: int, seed: int = 0) -> dict:
    """An exception in the loader's thread, at a random batch: seconds until the loop has it."""
    from fast_imagenet.data.ffcv_loader import TrainLoader

    draw, waits, traced = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as name:
        flags = ["--source.kind=synthetic", "--source.split=train", "--write.limit=320"]
        succeed("write_dataset.py", *flags, f"--write.folder={name}")
        loader = TrainLoader(f"{name}/train.beton", global_batch=8, seed=0, num_workers=1)
        list(loader.epoch(0, 32))
        for number in range(times):
            raised = _Raising(draw.randrange(40))
            loader._operations[0].before_batch = raised
            try:
                list(loader.epoch(number, 32))
            except RuntimeError as error:
                waits.append(time.monotonic() - raised.moment)
                traced += _trace_names(error.__cause__, "_Raising")
    return {
        "times": times,
        "surfaced_within_2_s": sum(wait < 2 for wait in waits),
        "with_its_traceback": traced,
        "longest_seconds": round(max(waits, default=0), 3),
    }


class _Raising:
    """Stands before every batch and fails before one of them."""

    def __init__(self, batch: int) -> None:
        self.left, self.moment = batch, 0.0

    def __call__(self, samples) -> None:
        self.left -= 1
        if self.left < 0:
            self.moment = time.monotonic()
            raise OSError("the disk of the test is gone")


def _trace_names(error: BaseException | None, name: str) -> bool:
    trace = error.__traceback__ if error else None
    while trace:
        if trace.tb_frame.f_code.co_qualname.startswith(name):
            return True
        trace = trace.tb_next
    return False
