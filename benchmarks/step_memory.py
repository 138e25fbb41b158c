"""Does every config fit a GPU of 16 GB? Its largest step and its evaluation under a cap.

    python benchmarks/step_memory.py --json out.json

A process for each different case: the allocator may hold `--gb` and no more, then come training
steps at the largest resolution of the schedule and each view of an evaluation, beside as many
batches as the loader keeps on the device. The figure is the most that the allocator held; the CUDA
context, some hundred megabytes, is not in it. Results are written case by case, and those that the
file holds already, of the same commit and cap, are kept.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import common
from fast_imagenet.engine.json_lines import read_object
from fast_imagenet.files import write_json

CLASSES = 1000
SLOTS = 5  # batches that FFCV's loader keeps on the device
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

    def slots(size: int, resolution: int) -> list[tuple]:
        return [common.noise(size, resolution, CLASSES, device) for _ in range(SLOTS)]

    recipe.train_epoch(state, slots(cfg.training.batch_size, cfg.resolution.max_res), steps)
    steps.losses[-1].item()

    def batches(resolution: int, crop_ratio: float) -> list[tuple]:
        return [batch[:2] for batch in slots(cfg.validation.batch_size, resolution)]

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


def measure_all(
    arguments: argparse.Namespace, names: list[str], known: dict[str, dict]
) -> Iterator[tuple[list[str], dict]]:
    """Stems of configs of one case, and what `run_case` printed or, as `failed`, its errors."""
    own = [sys.executable, __file__, f"--gb={arguments.gb}", f"--device={arguments.device}"]

    def measure_case(members: list[str]) -> dict:
        if found := known.get(Path(members[0]).stem):
            return found
        command = [*own, f"--case={members[0]}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"failed": done.stderr.strip().rpartition("\n")[2][-500:]}
        return json.loads(done.stdout.splitlines()[-1])

    cases = {}
    for name in names:
        cases.setdefault(case_of(common.read_config(f"--config={name}")), []).append(name)
    with ThreadPoolExecutor(arguments.lanes) as pool:
        found = pool.map(measure_case, cases.values())
        for members, result in zip(cases.values(), found, strict=True):
            yield [Path(name).stem for name in members], result


def known_results(path: str | None, data: dict, machine: dict) -> dict[str, dict]:
    """What an earlier call of this commit has written for this GPU and cap."""
    old = read_object(Path(path)) if path else {}
    same = [old.get("machine", {}).get(key) == machine.get(key) for key in ("commit", "gpu")]
    return old["configs"] if all(same) and old.get("data") == data else {}


def line_of(name: str, result: dict) -> str:
    """For a reader."""
    held, verdict = result.get("held_bytes"), "fits" if result.get("fits") else "does not fit"
    if "failed" in result:
        return f"{name:28} failed: {result['failed']}"
    size = f"{held / 1e9:.2f} GB" if held else result.get("error", "not measured on a CPU")
    return f"{name:28} {verdict}, {size}"


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=1, **FLAGS)
    if arguments.case:
        run_case(arguments)
        return
    machine = common.describe_machine(list(range(arguments.lanes)))
    machine |= common.describe_gpu(arguments.device) | {"smoke": arguments.smoke}
    paths = [path for folder in FOLDERS for path in sorted((common.ROOT / folder).glob("*.yaml"))]
    names = arguments.config or [path.name for path in paths]
    data = {"cap_bytes": arguments.gb * 1e9, "device": arguments.device, "slots": SLOTS}
    known, failed = known_results(arguments.json, data, machine), 0
    results = dict(known)
    for members, result in measure_all(arguments, names, known):
        failed += "failed" in result
        for name in members:
            print(line_of(name, result), "(measured before)" * (name in known), flush=True)
            results |= {} if "failed" in result else {name: result}
        if arguments.json:
            write_json(arguments.json, dict(configs=results, data=data, machine=machine))
    sys.exit(f"{failed} of the different cases failed" if failed else 0)


if __name__ == "__main__":
    main()
