"""Is the plan right? Predicts a run with tools.plan, then does the run, round after round.

    python benchmarks/plan_check.py --json out.json -- --config X.yaml --training.epochs=4

What follows `--` are settings of train_imagenet.py; the run's folder is a temporary one. With
`--clock cpu` both are processor time: where other jobs run, wall time is that of the others too.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

# The trainer with another clock: its log then holds processor seconds.
ON_CPU_CLOCK = """
import runpy, time
time.perf_counter = time.process_time
runpy.run_path("train_imagenet.py", run_name="__main__")
"""


def read_arguments(argv):
    parser = common.argument_parser(__doc__, images=False, rounds=3)
    parser.add_argument("--seconds", type=float, default=60, help="of measuring a plan (60)")
    parser.add_argument("--cores", type=int, default=0, help="cores; 0 = all usable (0)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="(wall)")
    parser.add_argument("settings", nargs=argparse.REMAINDER, help="after --: of train_imagenet.py")
    arguments = parser.parse_args(argv)
    arguments.settings = [word for word in arguments.settings if word != "--"]
    return arguments


def call(command: list[str], clock: str) -> dict:
    """Seconds of a command, wall and processor; its output is shown where it fails."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # threads that spin while they wait would count as processor time
    quiet = {"OMP_WAIT_POLICY": "PASSIVE"} if clock == "cpu" else {}
    environment = {**os.environ, **quiet}
    options = dict(cwd=common.ROOT, env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, *command], check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-3000:]}")
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = [after.ru_utime + after.ru_stime, -before.ru_utime - before.ru_stime]
    return {"wall": round(wall, 2), "cpu": round(sum(used), 2)}


def plan_and_run(arguments) -> dict:
    """One prediction and the run after it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*arguments.settings, f"--logging.folder={folder}/run"]
        page, load = Path(folder, "plan.json"), os.getloadavg()[0]
        options = [f"--json={page}", f"--seconds={arguments.seconds}", f"--clock={arguments.clock}"]
        planning = call(["-m", "tools.plan", *settings, *options], arguments.clock)
        plan = json.loads(page.read_text())
        script = ["-c", ON_CPU_CLOCK] if arguments.clock == "cpu" else ["train_imagenet.py"]
        seen = call([*script, *settings], arguments.clock)
        lines = Path(folder, "run", "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    predicted = {row["name"]: 0.0 for row in plan["forecast"]["rows"]}
    for row in plan["forecast"]["rows"]:
        predicted[row["name"]] += round(row["seconds"], 2)
    total = round(plan["forecast"]["seconds"], 2)
    return {
        "predicted": total,
        "seen": seen[arguments.clock],
        "predicted_vs_seen": round(total / seen[arguments.clock], 3),
        "predicted_parts": predicted,
        "seen_parts": {
            "training": round(sum(line["seconds"] for line in log), 2),
            "evaluation": round(sum(line["eval_seconds"] for line in log), 2),
        },
        "run": seen,
        "planning": planning,
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "times": plan["times"],
    }


def main(argv=None) -> None:
    arguments = read_arguments(argv)
    # the commands inherit it
    cores = common.pin_to_cores(arguments.cores or len(os.sched_getaffinity(0)))
    machine = common.describe_machine(cores)
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(plan_and_run(arguments))
        one = rounds[-1]
        print(
            f"round {number + 1}: predicted {one['predicted']:.1f} s, seen {one['seen']:.1f} s, "
            f"ratio {one['predicted_vs_seen']:.3f}",
            flush=True,
        )
        common.write_json(arguments.json, summary(arguments, rounds, machine))


def summary(arguments, rounds: list[dict], machine: dict) -> dict:
    """The result of the rounds so far."""
    sums = [sum(one[key] for one in rounds) for key in ("predicted", "seen")]
    words = arguments.settings  # of a path only the name: it says nothing of the machine
    return {
        "clock": arguments.clock,
        "predicted_vs_seen": statistics.median(one["predicted_vs_seen"] for one in rounds),
        "predicted_vs_seen_sum": round(sums[0] / sums[1], 3),
        "rounds": rounds,
        "settings": [re.sub(r"=/.*/", "=.../", word) for word in words],
        "machine": machine,
    }


if __name__ == "__main__":
    main()
