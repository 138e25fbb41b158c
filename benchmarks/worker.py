"""The process of one group of contestants: reads commands, one JSON object a line, and answers.

    python benchmarks/worker.py CORES

Started by loader_throughput.py, with our interpreter or that of .venv-bench. Commands: `load`,
`check`, `round`, `versions`; an answer has the key `error` where one failed.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import common
from contestants import Contestant, Task, crop_areas

LOADED: dict[str, Contestant] = {}


def build(place: str, task: list, options: dict) -> Contestant:
    module, _, name = place.partition(":")
    folder, *rest = task
    return getattr(import_module(module), name)(Task(Path(folder), *rest), **options)


def load(name: str, **what: Any) -> dict:
    LOADED[name] = build(**what)
    return {"path": LOADED[name].path}


def check(count: int, **what: Any) -> dict:
    """Shapes and types of `count` images of the ramp, and the fractions of it that they show."""
    contestant = build(**what)
    batches = [np.array(batch) for batch in contestant.epoch(count)][contestant.untimed :]
    images = np.concatenate(batches)
    found = {"shape": images.shape, "dtype": str(images.dtype)}
    if images.ndim != 4:
        return found | {"areas": []}
    images = images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images
    return found | {"areas": crop_areas(images).round(4).tolist()}


def time_round(name: str, count: int) -> dict:
    """Images per second of one epoch, by both clocks."""
    contestant = LOADED[name]
    batches = iter(contestant.epoch(count))
    for _ in range(contestant.untimed):
        next(batches)
    begin = {key: clock() for key, clock in common.CLOCKS.items()}
    seen = sum(map(len, batches))
    taken = {key: clock() - begin[key] for key, clock in common.CLOCKS.items()}
    if seen < count:
        raise ValueError(f"{seen} images instead of {count}")
    return {key: seen / max(seconds, 1e-9) for key, seconds in taken.items()}


COMMANDS = {"load": load, "check": check, "round": time_round, "versions": common.versions}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    common.pin_to_cores(int(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = COMMANDS[command.pop("do")](**command)
        except Exception as problem:  # whatever a library raises, its reason is reported
            text = (str(problem).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(problem).__name__}: {text}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
