"""What will this run take? Measure its parts on this machine for two minutes, and say.

    python -m tools.plan --config rn50_88_epochs.yaml
    python -m tools.plan --config X.yaml --data.num_workers=4 --seconds=300 --json plan.json

It prints the hours by phase, the bottleneck, whether the data fits the memory and the batch the
GPU, and what to change first. Under torchrun it plans for as many ranks. Nothing is left behind:
what a run writes is written to a folder beside logging.folder and removed.

A front end like the two scripts: it takes the settings that train_imagenet.py declares and so runs
from the folder of that script. Nothing imports it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from fastargs import Param

from fast_imagenet.config import Number, OneOf, Str, extended, format_error, read_config
from fast_imagenet.engine.watchdog import Watchdog
from fast_imagenet.processes import HANG_UP
from fast_imagenet.program import resource_hint
from fast_imagenet.terminal import ignore_broken_pipe
from fast_imagenet.validation import unwritable, validate

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Settings of the run that do not matter to a plan: it may be made while the run goes on.
UNUSED = ("training.resume=", "logging.folder={} already holds")

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------


def read_settings(script, argv: list[str] | None = None):
    """The settings of a run and of the plan; every mistake is told at once, exit status 2.

    Args:
        script: the module train_imagenet.
        argv: the words after the command; None takes `sys.argv[1:]`.
    """
    params = {
        "json": Param(Str(), "file for all that was measured; empty = none", default=""),
        "seconds": Param(Number(1), "to spend on measuring, about", default=90.0),
        "clock": Param(OneOf(*CLOCKS), "cpu: processor time, where other jobs run", default="wall"),
    }
    return read_config(
        extended(script.SETTINGS, "plan", "how it is measured", params),
        argv,
        search=script.CONFIG_FOLDERS,
        check=_problems,
        prog="-m tools.plan",
        description="Predict what a training run takes on this machine.",
    )


def _problems(cfg) -> list[str]:
    unused = tuple(words.format(Path(cfg.logging.folder)) for words in UNUSED)
    mine = [problem for problem in validate(cfg) if not problem.startswith(unused)]
    if cfg.training.eval_only:
        mine.append("training.eval_only trains nothing: leave it out to plan a training")
    refuses, sentence = unwritable("--json", cfg.json)
    if cfg.json and refuses:
        mine.append(sentence)
    return mine


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def make_plan(cfg, script, ranks, imports: float, tell):
    """Measure and predict: a report.Plan.

    Args:
        cfg: settings of the run and of the plan.
        script: the module train_imagenet.
        ranks: who takes part.
        imports: seconds from the start of the process to here.
        tell: called with a line about what is done.
    """
    from tools.plan import forecast, measure, report, storage

    begin, clock, room = time.perf_counter(), CLOCKS[cfg.clock], storage.available_memory()
    imports -= clock()
    ready = kernels_ready(cfg)  # imports numba, as the run does
    imports += clock()
    tell("disk and page cache")  # before the loaders have the file in their memory
    disk = measure_disk(cfg, ranks)
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=existing(cfg.logging.folder)) as folder:
        run, cold = measured_settings(cfg, folder), (disk["resident"] or 0.0) < 0.999
        watchdog = Watchdog(cfg.data.timeout, on_stall=partial(shutil.rmtree, folder))
        watch = watchdog.watch
        session = measure.Session(script, run, ranks, cfg.seconds, tell, cold, clock, room, watch)
        start = imports + session.build()
        whole = session.steps
        steps = forecast.steps_of_epochs(cfg.training.epochs, whole, cfg.training.max_steps)
        sides = [script.resolution_at(epoch, **vars(cfg.resolution)) for epoch in range(len(steps))]
        with watchdog:
            times, costs = measure.measure_all(session, sides, start, ready)
    peak, capacity = session.memory()
    data = forecast.Storage(room=max(0, room - session.own_peak * ranks.ranks_on_node), **disk)
    minutes, every = cfg.training.checkpoint_minutes, cfg.validation.every
    return report.Plan(
        cfg=cfg,
        forecast=forecast.predict(sides, steps, whole, times, costs, data, minutes, every),
        times=times,
        costs=costs,
        storage=data,
        memory=report.Memory(peak, capacity, session.fitting, session.asked_micro_batch),
        machine=machine_of(cfg, ranks),
        images=session.loader.num_samples,
        seconds=time.perf_counter() - begin,
        measured=run.training.batch_size,
    )


def existing(folder: str) -> Path:
    """The nearest folder that is there: on the disk that the run will write to."""
    path = Path(folder).absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def kernels_ready(cfg) -> bool:
    """Whether the loader's kernels are on the disk already; compiling them takes a minute, once."""
    if cfg.data.backend != "ffcv":
        return True
    from fast_imagenet.ops.crop_decode import apply_crops
    from fast_imagenet.ops.kernel import is_compiled

    return is_compiled(apply_crops)


def measured_settings(cfg, folder: str) -> SimpleNamespace:
    """The run's settings for the time of measuring."""
    run = copy.deepcopy(cfg)
    del run.json, run.seconds, run.clock
    run.logging.folder, run.logging.wandb = folder, ""
    run.training.resume = "none"
    run.data.check_pages = False  # once a page: a few steps would meet nothing but first times
    return run


def measure_disk(cfg, ranks) -> dict:
    """The fields of forecast.Storage, but for the room in memory."""
    from tools.plan import measure, storage

    ours = cfg.data.backend == "ffcv"
    train, val = (open_data(getattr(cfg.data, f"{s}_dataset"), s, ours) for s in ("train", "val"))
    sizes = [measure.data_bytes(source) for source in (train, val)]
    found = {
        "bytes": sizes[0],
        "val_bytes": sizes[1],
        "random_order": cfg.data.in_memory or not ours,
        "checked": False,
        "check": 0.0,
        **dict.fromkeys(("resident", "sequential", "scattered")),
        "cold": False,
    }
    if not hasattr(train, "offsets"):
        return found
    found["resident"] = storage.resident(train.path)
    workers = ranks.workers(cfg.data.num_workers)
    rates = storage.reading_rates(train.path, train.offsets, train.sizes, workers)
    found |= dict(zip(("sequential", "scattered", "cold"), rates, strict=True))
    if ours and cfg.data.check_pages:
        found["check"] = measure.page_check_seconds(train)
        found["checked"] = found["check"] > 0
    return found


def open_data(path: str, split: str, ours: bool):
    """A BetonFile, or the images of the torchvision backend."""
    if ours:
        from fast_imagenet.beton.reader import BetonFile

        return BetonFile(path)
    from fast_imagenet.data.samples import open_dataset

    return open_dataset(path, split)


def machine_of(cfg, ranks):
    """A report.Machine."""
    from fast_imagenet.engine.logger import environment
    from fast_imagenet.machine import cpu_quota
    from tools.plan.report import Machine

    return Machine(
        device=environment()["device"],
        is_gpu=ranks.device.type == "cuda",
        cores=len(os.sched_getaffinity(0)),
        quota=cpu_quota(Path("/sys/fs/cgroup")),
        workers=ranks.workers(cfg.data.num_workers),
        ranks=ranks.world_size,
    )


def process_age() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def main(argv: list[str] | None = None, age: float = 0.0) -> None:
    """Read the settings, measure, print.

    Args:
        argv: the words after the command; None takes `sys.argv[1:]`.
        age: seconds since the process was started.
    """
    begin = time.perf_counter()
    import train_imagenet as script

    cfg = read_settings(script, argv)
    ranks = script.init_distributed()
    try:
        # processor time counts from the start of the process
        imports = age + time.perf_counter() - begin if cfg.clock == "wall" else time.process_time()
        plan = make_plan(cfg, script, ranks, imports, teller(ranks))
        if ranks.is_main:
            publish(plan, cfg.json)
    except script.torch.OutOfMemoryError as error:
        sys.exit(
            f"plan: {error}\n"
            f"Lower training.micro_batch_size (images per forward pass) or validation.batch_size"
        )
    except (ValueError, OSError) as error:
        sys.exit(f"plan: {format_error(error)}")
    except (RuntimeError, MemoryError) as error:
        if (said := resource_hint(error)) is None:
            raise
        sys.exit(f"plan: {said}")
    finally:
        ranks.close()


def teller(ranks):
    """Says on stderr what is done; rank 0 alone."""
    return lambda line: ranks.is_main and print(f"plan: {line}", file=sys.stderr, flush=True)


def publish(plan, path: str) -> None:
    """Print the plan; write it where asked."""
    from fast_imagenet.files import write_json
    from tools.plan import report

    print(report.render(plan), end="")
    if path:
        write_json(path, json.loads(json.dumps(report.as_dict(plan))))


def _stop(number: int, frame) -> None:
    sys.exit(128 + number)  # as an exception, so that the folder is removed


if __name__ == "__main__":
    ignore_broken_pipe()
    for number in (signal.SIGTERM, *HANG_UP):
        signal.signal(number, _stop)
    try:
        main(age=process_age())
    except KeyboardInterrupt:
        print("plan: interrupted, nothing is left behind", file=sys.stderr)
        sys.exit(130)
