"""Training killed and signalled at any moment; errors of the loader's thread."""

import random
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fast_imagenet.guard import STOPPED
from tests.torture.common import end, kill_session, source_flags, start, succeed

# Imagenette's CPU recipe in seconds, with everything on that draws or averages.
RECIPE = [
    "--config=rn18_64px_16_epochs.yaml", "--training.epochs=2", "--training.batch_size=16",
    "--lr.lr_peak_epoch=0.5", "--ema.decay=0.9", "--resolution.min_res=32",
    "--resolution.end_ramp=1", "--augment.mixup=0.2", "--augment.cutmix=1",
    "--augment.erasing=0.5", "--augment.erasing_mode=pixel", "--augment.saturation=0.4",
    "--augment.policy=rand_augment_lite", "--validation.resolution=32",
    "--validation.plain_resolution=32", "--data.num_workers=1", "--logging.tensorboard=0",
    "--logging.progress=0", "--training.checkpoint_minutes=0.003",
]  # fmt: skip
PICTURES = (160, 40)


def training_kills(moments: int, photos: Path | None, seed: int = 0) -> dict:
    """Kill the run with SIGKILL at `moments` random moments of its life, resume, compare its end.

    Two runs go on side by side. Each is killed up to twice before it may end.
    """

    def life(number: int, place: _Place) -> dict:
        draw = random.Random(f"{seed} {number}")
        folder, statuses = place.folder / f"killed-{number}", []
        for _ in range(1 + number % 2):
            process = start("train_imagenet.py", *place.flags, f"--logging.folder={folder}")
            time.sleep(draw.uniform(0, place.seconds))
            kill_session(process)
            statuses.append(process.returncode)
        succeed("train_imagenet.py", *place.flags, f"--logging.folder={folder}")
        return {"statuses": statuses, "differs_in": differences(folder, place.whole)}

    runs = _lives(moments, photos, life)
    same = sum(not run["differs_in"] for run in runs)
    return {"moments": moments, "ended_bit_identical": same, "runs": runs}


def training_signals(moments: int, photos: Path | None, seed: int = 0) -> dict:
    """Send SIGTERM, SIGINT or SIGUSR1 at random moments: seconds to the end, status, and resume."""
    names = ("SIGTERM", "SIGINT", "SIGUSR1")

    def life(number: int, place: _Place) -> dict:
        draw = random.Random(f"{seed} signal {number}")
        folder, name = place.folder / f"signalled-{number}", names[number % 3]
        process = start("train_imagenet.py", *place.flags, f"--logging.folder={folder}")
        # not before Python has read the script: until then nobody can answer
        time.sleep(draw.uniform(2, place.seconds))
        begin, saved = time.monotonic(), (folder / "last.pt").exists()
        process.send_signal(signal.Signals[name])
        said = end(process)
        seconds = time.monotonic() - begin
        saves = (folder / "last.pt").exists() or not saved
        succeed("train_imagenet.py", *place.flags, f"--logging.folder={folder}")
        good = process.returncode in (STOPPED, 0) and seconds < 25 and saves
        return {
            "signal": name,
            "status": process.returncode,
            "seconds": round(seconds, 2),
            "said": said.strip().splitlines()[-1:],
            "good": good,
            "differs_in": differences(folder, place.whole),
        }

    runs = _lives(moments, photos, life)
    return {
        "moments": moments,
        "ended_within_25_s": sum(run["good"] for run in runs),
        "longest_seconds": max(run["seconds"] for run in runs),
        "ended_bit_identical_after_resume": sum(not run["differs_in"] for run in runs),
        "runs": runs,
    }


class _Place:
    """Data, flags and an uninterrupted run to compare with.

    Attributes: folder: for runs. whole: the uninterrupted run. seconds: a run takes.
    """

    def __init__(self, folder: Path, photos: Path | None) -> None:
        self.folder, self.whole = folder, folder / "whole"
        for split, count in zip(("train", "val"), PICTURES, strict=True):
            flags = [*source_flags(photos), f"--source.split={split}", f"--write.limit={count}"]
            succeed("write_dataset.py", *flags, f"--write.folder={folder}")
        self.flags = [*RECIPE, "--training.resume=auto"]
        self.flags += [f"--data.{s}_dataset={folder / f'{s}.beton'}" for s in ("train", "val")]
        succeed("train_imagenet.py", *self.flags, f"--logging.folder={folder / 'first'}")
        self.seconds = succeed("train_imagenet.py", *self.flags, f"--logging.folder={self.whole}")


def _lives(moments: int, photos: Path | None, life) -> list[dict]:
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        place = _Place(Path(name), photos)
        return list(pool.map(lambda number: life(number, place), range(moments)))


def differences(folder: Path, whole: Path) -> list[str]:
    """What differs between two finished runs: weights, average, optimizer state, losses, log."""
    from fast_imagenet.checkpoint import load_checkpoint
    from fast_imagenet.runlog import read_jsonl

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
    from fast_imagenet.loader import TrainLoader

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
