"""The writer killed at any moment, and workers that fail."""

import contextlib
import os
import queue
import random
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fast_imagenet.beton.verify import verify
from tests.faults import SHM, WORKER_FAULTS, CannotInject, inject, session
from tests.torture.common import end, kill_session, source_flags, start, succeed

COMPLETE = ("train.beton", "train.beton.json")
VICTIMS = ("the writing process", "one worker", "all at once")


def writer_kills(moments: int, photos: Path | None, images: int = 250, seed: int = 0) -> dict:
    """Kill write_dataset.py `moments` times, each time run it again; what was left each time.

    In turn the writing process, a worker or all of them are killed with SIGKILL, at a moment drawn
    uniformly from the time that a conversion takes. Every second one replaces a file. Two
    conversions go on side by side, each in a folder of its own.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        flags = [*source_flags(photos), "--source.split=train", f"--write.limit={images}"]
        flags += ["--write.workers=2", "--write.overwrite=true"]
        seconds = succeed("write_dataset.py", *flags, f"--write.folder={name}/first")
        cases = [(number, draw.uniform(0.1, seconds)) for number in range(moments)]
        spare = queue.SimpleQueue()
        for number in (0, 1):
            spare.put(Path(name, str(number)))

        def one(case: tuple[int, float]) -> dict:
            folder = spare.get()
            try:
                return _one_kill(flags, folder, *case)
            finally:
                spare.put(folder)

        runs = list(pool.map(one, cases))
    return {
        "moments": moments,
        "seconds_of_a_conversion": round(seconds, 2),
        "killed_before_the_end": sum(run["status"] != 0 for run in runs),
        "damaged_files_under_the_final_name": sum(run["damaged"] for run in runs),
        "leaked_processes": sum(run["processes"] for run in runs),
        "leaked_segments": sum(run["segments"] for run in runs),
        "leftovers_after_the_next_run": sum(run["leftovers"] for run in runs),
        "runs": runs,
    }


def _one_kill(flags: list[str], folder: Path, moment: int, after: float) -> dict:
    victim, flags = VICTIMS[moment % 3], [*flags, f"--write.folder={folder}"]
    folder.mkdir(exist_ok=True)
    if moment % 2 == 0:
        for path in folder.iterdir():
            path.unlink()
    elif not (folder / "train.beton").exists():
        succeed("write_dataset.py", *flags)
    process = start("write_dataset.py", *flags)
    time.sleep(after)
    try:
        _kill(process, victim)
        end(process)
    except TimeoutError:
        pass
    deadline = time.monotonic() + 10
    while (living := session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    target = folder / "train.beton"
    damaged = target.exists() and bool(verify(target, full=True)[0])
    if living:
        os.killpg(process.pid, signal.SIGKILL)
    succeed("write_dataset.py", *flags)
    damaged |= bool(verify(target, full=True)[0])
    return {
        "victim": victim,
        "after_seconds": round(after, 2),
        "status": process.returncode,
        "damaged": bool(damaged),
        "processes": len(living),
        "segments": len(list(SHM.glob(f"*fast-imagenet-{process.pid}-*"))),
        "leftovers": len([path for path in folder.iterdir() if path.name not in COMPLETE]),
    }


def _kill(process, victim: str) -> None:
    if victim == "all at once":
        kill_session(process)
        return
    number = process.pid
    if victim == "one worker":
        others = [int(line.split()[1].rstrip(":")) for line in session(process.pid)]
        number = max([pid for pid in others if pid != process.pid], default=number)
    with contextlib.suppress(ProcessLookupError):  # it had just ended
        os.kill(number, signal.SIGKILL)


def worker_faults() -> dict:
    """Each kind of fault in a worker once: seconds to the end, status, and what was left."""
    kinds = {}
    for kind in WORKER_FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = inject(kind, Path(folder))
            except CannotInject as reason:
                kinds[kind] = {"not_tried": str(reason)}
                continue
        kinds[kind] = {
            "seconds": round(outcome.seconds, 2),
            "status": outcome.status,
            "left": len(outcome.leftovers),
            "said": outcome.message.strip().splitlines()[-1:],
        }
    tried = [kind for kind in kinds.values() if "status" in kind]
    good = [k for k in tried if k["status"] > 0 and k["seconds"] < 10 and not k["left"]]
    return {"tried": len(tried), "ended_within_10_s_and_left_nothing": len(good), "kinds": kinds}
