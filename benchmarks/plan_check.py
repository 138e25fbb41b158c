"""Is the plan right? Predicts a run with tools.plan, then does the run, round after round.

    python benchmarks/plan_check.py --json out.json -- --config X.yaml --training.epochs=4

What follows `--` are settings of train_imagenet.py; the run's folder is a temporary one. With
`--clock cpu` both are processor time: where other jobs run, wall time is that of the others too.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

# A program with another clock: what it measures are then processor seconds.
ON_CPU_CLOCK = """
import runpy, time
time.perf_counter = time.process_time
runpy.run_module({!r}, run_name="__main__")
"""
FLAGS = {"cores": {"default": 0, "help": "0 = all that are usable"}, "clock": common.CLOCK}


def call(module: str, words: list[str], clock: str) -> float:
    """Seconds of a program; its output is shown where it fails."""
    program = ["-c", ON_CPU_CLOCK.format(module)] if clock == "cpu" else ["-m", module]
    now = common.children_time if clock == "cpu" else time.perf_counter
    begin = now()
    # threads that spin while they wait would count as processor time
    quiet = {"OMP_WAIT_POLICY": "PASSIVE"} if clock == "cpu" else {}
    options = dict(cwd=common.ROOT, env={**os.environ, **quiet}, capture_output=True, text=True)
    done = subprocess.run([sys.executable, *program, *words], check=False, **options)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(words)}: {done.stderr[-3000:]}")
    return round(now() - begin, 2)


def plan_and_run(settings: list[str], clock: str) -> dict:
    """One prediction and the run after it, by part: seconds."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*settings, f"--logging.folder={folder}/run"]
        page = Path(folder, "plan.json")
        call("tools.plan", [*settings, f"--json={page}"], clock)
        plan = json.loads(page.read_text())
        seen = call("train_imagenet", settings, clock)
        lines = Path(folder, "run", "log.jsonl").read_text().splitlines()
    log, forecast = [json.loads(line) for line in lines], plan["forecast"]
    return {
        "predicted": round(forecast["seconds"], 2),
        "seen": seen,
        "predicted_vs_seen": round(forecast["seconds"] / seen, 3),
        "predicted_parts": forecast["rows"],
        "seen_parts": {
            "training": round(sum(line["seconds"] for line in log), 2),
            "evaluation": round(sum(line["eval_seconds"] for line in log), 2),
        },
        "times": plan["times"],
    }


def main() -> None:
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = common.read_arguments(sys.argv[1:end], __doc__, rounds=3, **FLAGS)
    settings = sys.argv[end + 1 :]
    # the commands inherit the cores
    machine = common.describe_machine(common.pin_to_cores(arguments.cores))
    rounds = [plan_and_run(settings, arguments.clock) for _ in range(arguments.rounds)]
    result = {
        "clock": arguments.clock,
        "predicted_vs_seen": common.summary([one["predicted_vs_seen"] for one in rounds]),
        "rounds": rounds,
        # of a path only the name: the rest is of this machine alone
        "settings": [re.sub(r"=/.*/", "=.../", word) for word in settings],
    }
    common.publish(arguments.json, **result, machine=machine)


if __name__ == "__main__":
    main()
