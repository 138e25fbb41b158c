"""Does every config fit a GPU of 16 GB? Its largest step and its evaluation under a cap.

    python benchmarks/step_memory.py --json out.json

A process for each different case: the allocator may hold `--gb` and no more, then come three
training steps at the largest resolution of the schedule and one batch of each view of evaluation.
The figure is the most that the allocator held; the CUDA context, some hundred megabytes, is not in
it.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import common

CLASSES = 1000
STEPS = 3
FOLDERS = ("rn50_configs", "rn18_configs")
FLAGS = {
    "gb": {"default": 16.0, "help": "gigabytes, 10^9 bytes"},
    "lanes": {"default": 1, "help": "processes side by side"},
    "device": {"default": "cuda", "help": "cuda or cpu, which has no cap"},
    "config": {"nargs": "*", "help": "YAML files (all rn50 and rn18)"},
    "case": {"help": argparse.SUPPRESS},
}


def case_of(cfg: SimpleNamespace) -> tuple:
    """What the memory depends on: configs of one case need the same."""
    options, v = cfg.training, cfg.validation
    network = (cfg.model.arch, cfg.model.drop_path > 0, options.use_blurpool, options.optimizer)
    network += (options.blur_max_pool,)
    step = (options.batch_size, options.micro_batch_size, options.precision, options.compile)
    mixes = cfg.augment.mixup > 0 or cfg.augment.cutmix > 0
    views = (v.batch_size, v.resolution, v.plain_resolution, v.lr_tta)
    return (*network, *step, cfg.resolution.max_res, options.loss, mixes, *views)


def measure(name: str, device: str) -> dict:
    """Train and evaluate as the config says, on noise; bytes that the allocator held at most."""
    import torch

    import train_imagenet as recipe
    from fast_imagenet.engine.run import StepRecorder

    cfg = common.read_config(f"--config={name}")
    state, steps = common.build_state(cfg, CLASSES, device), StepRecorder()
    batch = common.noise(cfg.training.batch_size, cfg.resolution.max_res, CLASSES, device)
    recipe.train_epoch(state, [batch] * STEPS, steps)
    steps.losses[-1].item()

    def batches(resolution: int, crop_ratio: float) -> list[tuple]:
        return [common.noise(cfg.validation.batch_size, resolution, CLASSES, device)[:2]]

    recipe.evaluate(state.eval_model, batches, cfg, state.autocast, torch.device(device))
    cuda = device == "cuda"
    return {
        "held_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "used_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def run_case(arguments: argparse.Namespace) -> None:
    """One case in this process: prints its result as the last line."""
    import torch

    result = {"fits": True}
    if arguments.device == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.gb * 1e9 / whole))
    try:
        result |= measure(arguments.case, arguments.device)
    except torch.cuda.OutOfMemoryError as error:
        result = {"fits": False, "error": str(error).splitlines()[0]}
    print(json.dumps(result))


def measure_all(arguments: argparse.Namespace, names: list[str]) -> dict[str, dict]:
    """Stem of every config -> what `run_case` printed, or the end of what went wrong."""
    own = [sys.executable, __file__, f"--gb={arguments.gb}", f"--device={arguments.device}"]

    def measure_case(members: list[str]) -> dict:
        command = [*own, f"--case={members[0]}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"fits": False, "error": done.stderr.strip()[-500:]}
        return json.loads(done.stdout.splitlines()[-1])

    cases = {}
    for name in names:
        cases.setdefault(case_of(common.read_config(f"--config={name}")), []).append(name)
    with ThreadPoolExecutor(arguments.lanes) as pool:
        found = list(pool.map(measure_case, cases.values()))
    pairs = zip(cases.values(), found, strict=True)
    return {Path(name).stem: result for members, result in pairs for name in members}


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=1, **FLAGS)
    if arguments.case:
        run_case(arguments)
        return
    machine = common.describe_machine(list(range(arguments.lanes)))
    machine |= common.describe_gpu(arguments.device)
    paths = [path for folder in FOLDERS for path in sorted((common.ROOT / folder).glob("*.yaml"))]
    results = measure_all(arguments, arguments.config or [path.name for path in paths])
    for name, result in sorted(results.items()):
        held = result.get("held_bytes")
        size = f"{held / 1e9:.2f} GB" if held else result.get("error", "not measured on a CPU")
        print(f"{name:28} {'fits' if result['fits'] else 'does not fit'}, {size}")
    data = {"cap_bytes": arguments.gb * 1e9, "device": arguments.device, "steps": STEPS}
    common.publish(arguments.json, configs=results, data=data, machine=machine)


if __name__ == "__main__":
    main()
