"""Is the plan right? Predicts a run with tools.plan, then does the run, round after round.

    python benchmarks/plan_check.py --json out.json -- --config X.yaml --training.epochs=4

What follows `--` are settings of train_imagenet.py; the run's folder is a temporary one. With
`--clock cpu` both are processor time: where other jobs run, wall time is that of the others too.
"""

import argparse
import json
import os
import re
import statistics
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
FLAGS = {
    "seconds": {"default": 60.0, "help": "of measuring a plan"},
    "cores": {"default": 0, "help": "0 = all that are usable"},
    "clock": common.CLOCK,
}


def call(module: str, words: list[str], clock: str) -> dict[str, float]:
    """Seconds of a program, wall and processor; its output is shown where it fails."""
    program = ["-c", ON_CPU_CLOCK.format(module)] if clock == "cpu" else ["-m", module]
    command = [*program, *words]
    before, begin = common.children_time(), time.perf_counter()
    # threads that spin while they wait would count as processor time
    quiet = {"OMP_WAIT_POLICY": "PASSIVE"} if clock == "cpu" else {}
    options = dict(cwd=common.ROOT, env={**os.environ, **quiet}, capture_output=True, text=True)
    done = subprocess.run([sys.executable, *command], check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-3000:]}")
    wall, used = time.perf_counter() - begin, common.children_time() - before
    return {"wall": round(wall, 2), "cpu": round(used, 2)}


def plan_and_run(arguments: argparse.Namespace, run_settings: list[str]) -> dict:
    """One prediction and the run after it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*run_settings, f"--logging.folder={folder}/run"]
        page, load = Path(folder, "plan.json"), os.getloadavg()[0]
        options = [f"--json={page}", f"--seconds={arguments.seconds}"]
        planning = call("tools.plan", [*settings, *options], arguments.clock)
        plan = json.loads(page.read_text())
        run = call("train_imagenet", settings, arguments.clock)
        lines = Path(folder, "run", "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    parts = dict.fromkeys((row["name"] for row in plan["forecast"]["rows"]), 0.0)
    for row in plan["forecast"]["rows"]:
        parts[row["name"]] += round(row["seconds"], 2)
    predicted, seen = round(plan["forecast"]["seconds"], 2), run[arguments.clock]
    return {
        "predicted": predicted,
        "seen": seen,
        "predicted_vs_seen": round(predicted / seen, 3),
        "predicted_parts": parts,
        "seen_parts": {
            "training": round(sum(line["seconds"] for line in log), 2),
            "evaluation": round(sum(line["eval_seconds"] for line in log), 2),
        },
        "run": run,
        "planning": planning,
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "times": plan["times"],
    }


def main() -> None:
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = common.read_arguments(sys.argv[1:end], __doc__, rounds=3, **FLAGS)
    settings, rounds = sys.argv[end + 1 :], []
    # the commands inherit the cores
    machine = common.describe_machine(common.pin_to_cores(arguments.cores))
    for number in range(arguments.rounds):
        rounds.append(plan_and_run(arguments, settings))
        predicted, seen = (sum(one[key] for one in rounds) for key in ("predicted", "seen"))
        ratios = [one["predicted_vs_seen"] for one in rounds]
        one = "predicted {predicted:.1f} s, seen {seen:.1f} s, ratio {predicted_vs_seen:.3f}"
        print(f"round {number + 1}: {one.format(**rounds[-1])}", flush=True)
        result = {
            "clock": arguments.clock,
            "predicted_vs_seen": statistics.median(ratios),
            "predicted_vs_seen_sum": round(predicted / seen, 3),
            "rounds": rounds,
            # of a path only the name: the rest is of this machine alone
            "settings": [re.sub(r"=/.*/", "=.../", word) for word in settings],
            "machine": machine,
        }
        common.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
