"""What will this run take? Measure its parts on this machine for two minutes, and report.

    python -m tools.plan --config rn50_88_epochs.yaml
    python -m tools.plan --config X.yaml --data.num_workers=4 --seconds=300 --json plan.json

It prints the hours by phase, the bottleneck, whether the data fits the memory and the batch the
GPU, and what to change first. Under torchrun it plans for as many ranks. Nothing is left behind:
what a run writes is written to a folder beside logging.folder and removed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

from fastargs import Param

from fast_imagenet.config import Number, Str, extended, read_config
from fast_imagenet.engine.schedules import resolution_at
from fast_imagenet.engine.work import work_of
from fast_imagenet.files import write_json
from fast_imagenet.machine import available_memory
from fast_imagenet.program import LOWER_MEMORY, run_program
from fast_imagenet.terminal import announce
from fast_imagenet.validation import unwritable, validate
from tools.plan import forecast
from tools.plan.report import Machine, Memory, Plan, render

if TYPE_CHECKING:  # torch is imported when the settings are read
    from fast_imagenet.engine.distributed import Distributed

# Settings of the run that do not matter to a plan: it may be made while the run is under way.
UNUSED = ("training.resume=", "logging.folder={} already holds")


def read_settings(script: ModuleType, argv: list[str] | None = None) -> SimpleNamespace:
    """The settings of a run and of the plan; every mistake is reported at once, exit status 2."""
    params = {
        "json": Param(Str(), "file for all that was measured; empty = none", default=""),
        "seconds": Param(Number(1), "to spend on measuring, about", default=90.0),
    }
    return read_config(
        extended(script.SETTINGS, "plan", "how it is measured", params),
        argv,
        search=script.CONFIG_FOLDERS,
        check=_problems,
        prog="-m tools.plan",
        description="Predict what a training run takes on this machine.",
    )


def _problems(cfg: SimpleNamespace) -> list[str]:
    unused = tuple(start.format(Path(cfg.logging.folder)) for start in UNUSED)
    problems = [problem for problem in validate(cfg) if not problem.startswith(unused)]
    if cfg.training.eval_only:
        problems.append("training.eval_only trains nothing: leave it out to plan a training")
    return problems + (unwritable("--json", cfg.json) if cfg.json else [])


def make_plan(
    cfg: SimpleNamespace, script: ModuleType, distributed: Distributed, note: Callable[[str], None]
) -> Plan:
    """Measure and predict; `note` is called with a line about what is done."""
    from fast_imagenet.engine.watchdog import Watchdog
    from tools.plan import measure, storage

    begin, room = time.perf_counter(), available_memory()
    start = time.process_time()  # of the imports, which use one core
    note("disk and page cache")  # before the loaders have the file in their memory
    data = storage.measure_storage(cfg, distributed.workers(cfg.data.num_workers))
    place = Path(cfg.logging.folder).absolute()  # on the disk that the run will write to
    place = next(one for one in (place, *place.parents) if one.is_dir())
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=place) as folder:
        run, cold = measured_settings(cfg, folder), (data.resident or 0.0) < 0.999
        watchdog = Watchdog(cfg.data.timeout, on_stall=partial(shutil.rmtree, folder))
        places = (cfg.seconds, note, cold, room, watchdog.watch)
        session = measure.Session(script, run, distributed, *places)
        start += session.build()
        steps = forecast.steps_of_epochs(cfg.training.epochs, session.steps, cfg.training.max_steps)
        sizes = [resolution_at(epoch, **vars(cfg.resolution)) for epoch in range(len(steps))]
        asked = session.fitting
        with watchdog:
            times, costs = session.measure(sizes, start)
    data = replace(data, room=max(0, room - session.own_peak * distributed.ranks_on_node))
    saving = (cfg.training.checkpoint_minutes, cfg.validation.every)
    return Plan(
        cfg=cfg,
        augment=script.augment_of(cfg),
        forecast=forecast.predict(sizes, steps, session.steps, times, costs, data, *saving),
        times=times,
        costs=costs,
        storage=data,
        memory=Memory(*session.memory(), session.fitting, asked),
        machine=machine_of(cfg, distributed),
        work=work_of(cfg, (session.loader.num_samples, session.val_loader.num_samples)),
        measuring_seconds=time.perf_counter() - begin,
        measured_batch=run.training.batch_size,
        ways=session.ways,
    )


def measured_settings(cfg: SimpleNamespace, folder: str) -> SimpleNamespace:
    """The run's settings for the time of measuring."""
    run = copy.deepcopy(cfg)
    del run.json, run.seconds
    run.logging.folder, run.logging.wandb = folder, ""
    run.training.resume = "none"
    run.data.check_pages = False  # once per page: a few steps would meet nothing but first times
    return run


def machine_of(cfg: SimpleNamespace, distributed: Distributed) -> Machine:
    """Where the plan is made."""
    from fast_imagenet.environment import environment

    device, is_gpu = environment()["device"], distributed.device.type == "cuda"
    cores, workers = len(os.sched_getaffinity(0)), distributed.workers(cfg.data.num_workers)
    return Machine(device, is_gpu, cores, workers, distributed.world_size)


def main(argv: list[str] | None = None) -> None:
    """Read the settings, measure, print; argv: None takes `sys.argv[1:]`."""
    announce("importing PyTorch: about 5 s")
    import train_imagenet as script
    from fast_imagenet.engine.distributed import init_distributed

    cfg = read_settings(script, argv)
    distributed = init_distributed()

    def note(line: str) -> None:
        if distributed.is_main:
            announce(f"plan: {line}")

    try:
        plan = make_plan(cfg, script, distributed, note)
    finally:
        distributed.close()
    if distributed.is_main:
        print(render(plan), end="")
        if cfg.json:
            write_json(cfg.json, json.loads(json.dumps(plan.as_dict())))


if __name__ == "__main__":
    ended = "interrupted, nothing is left behind"
    run_program("plan", main, interrupted=ended, out_of_memory=LOWER_MEMORY)
