"""What the program computes, as digests, to show that a refactoring changes nothing.

    python -m tests.frozen OUT.json             run the two scripts on made data, write digests
    python -m tests.frozen OUT.json OTHER.json  the same, then compare with another checkout's file

Only the command lines of the two scripts and the files they leave are used, so the same program
runs on a checkout before and after a move. Digests are of: every byte of the .beton files; losses,
accuracies and rates of every step and epoch; final weights; all tensors of the last checkpoint.
They hold for one machine and one environment; never commit them. About three minutes on two cores.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"images_per_second", "data_wait_share", "memory_gb", "seconds", "eval_seconds"}
TIMES |= {"total_seconds"}

WRITES = {  # name: flags of write_dataset.py
    "folder": "--source.path=FOLDER",
    "folder_raw": "--source.path=FOLDER --write.mode=raw",
    "folder_small": "--source.path=FOLDER --write.max_side=48 --write.quality=80",
    "synthetic": "--source.kind=synthetic --write.limit=64",
}
RUNS = {  # name: flags of train_imagenet.py
    "plain": "",
    "torchvision": "--data.backend=torchvision",
    "strong": "--augment.policy=rand_augment_lite --augment.brightness=0.4 --augment.hue=0.1 "
    "--augment.grayscale=0.2 --augment.solarize=0.2 --augment.blur=0.2 --augment.erasing=0.5 "
    "--augment.erasing_mode=pixel --augment.mixup=0.2 --augment.cutmix=1.0 --ema.decay=0.9",
    "strong_torchvision": "--data.backend=torchvision --augment.policy=rand_augment "
    "--augment.brightness=0.4 --augment.blur=0.2 --augment.erasing=0.5 --ema.decay=0.9",
    "timm_policy": "--augment.policy=rand_augment_timm --augment.policy_mstd=0.5",
    "bce_lamb": "--training.loss=bce --training.optimizer=lamb --lr.lr_schedule_type=cosine",
    "ramp_micro": "--resolution.min_res=32 --resolution.max_res=48 --resolution.end_ramp=1 "
    "--training.micro_batch_size=8 --training.clip_grad=1.0 --validation.lr_tta=true",
    "paged": "--data.in_memory=false --lr.lr_schedule_type=step --lr.step_length=1",
}
COMMON = (
    "--model.arch=resnet18 --data.num_workers=1 --training.epochs=2 --training.batch_size=16 "
    "--lr.lr_peak_epoch=1 --resolution.min_res=32 --resolution.max_res=32 "
    "--validation.resolution=40 --validation.plain_resolution=32 --logging.tensorboard=false "
    "--logging.progress=false"
)


def make_images(folder: Path) -> None:
    """An image folder of three classes: JPEGs of several kinds, a PNG, a gray one."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for name in ("ant", "bee", "cow"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (6, 7, 3)).astype(np.uint8)
                image = Image.fromarray(pixels).resize((60 + 5 * number, 80), Image.BICUBIC)
                path = folder / split / name / f"{number:02}.JPEG"
                if number == 1:
                    image.convert("L").save(path, quality=90)
                elif number == 2:
                    image.save(path, "PNG")
                else:
                    image.save(path, quality=90, subsampling=number % 3, progressive=number == 3)


def run(script: str, flags: str) -> None:
    """Run a script of this checkout, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *flags.split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


def digest(*parts: bytes) -> str:
    """16 hexadecimal digits of all parts."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def digest_of_tensors(value) -> str:
    """Of every tensor and number inside, with the path to it; times are left out."""
    import torch

    found = []

    def walk(value, path: str) -> None:
        if isinstance(value, torch.Tensor):
            array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            found.extend([f"{path} {value.dtype} {tuple(value.shape)}".encode(), array.tobytes()])
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                walk(value[key], f"{path}/{key}")
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                walk(item, f"{path}/{number}")

    walk(value, "")
    return digest(*found)


def digests_of_run(folder: Path) -> dict:
    """Digests of what a run left, and its losses and accuracies themselves."""
    import torch
    from safetensors.torch import load_file

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return {
        "epochs": [{k: v for k, v in line.items() if k not in TIMES} for line in lines],
        "losses": [loss for step in steps for loss in step["losses"]],
        "weights": digest_of_tensors(load_file(folder / "weights.safetensors")),
        "checkpoint": digest_of_tensors(torch.load(folder / "last.pt", weights_only=True)),
    }


def measure(folder: Path) -> dict:
    """All digests, made in an empty folder."""
    make_images(folder / "images")
    results = {}
    for name, flags in WRITES.items():
        flags = flags.replace("FOLDER", str(folder / "images"))
        run("write_dataset.py", f"{flags} --write.folder={folder / name} --write.workers=1")
        for split in ("train", "val"):
            results[f"{name}/{split}"] = digest((folder / name / f"{split}.beton").read_bytes())
    data = " ".join(f"--data.{s}_dataset={folder / 'folder' / s}.beton" for s in ("train", "val"))
    for name, flags in RUNS.items():
        flags = f"{COMMON} {data} {flags} --logging.folder={folder / f'run_{name}'}"
        if name == "plain":  # stopped inside an epoch and resumed
            run("train_imagenet.py", f"{flags} --training.max_steps=4")
            flags += " --training.resume=auto"
        run("train_imagenet.py", flags)
        results[f"run {name}"] = digests_of_run(folder / f"run_{name}")
        print(name, flush=True)
    return results


def main(out: str, other: str = "") -> None:
    """Write the digests to `out`; with `other`, say where the two differ and end with status 1."""
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder))
    Path(out).write_text(json.dumps(results, indent=1) + "\n")
    if not other:
        return
    before = json.loads(Path(other).read_text())
    changed = [key for key in {**before, **results} if before.get(key) != results.get(key)]
    print(f"{len(results)} results, changed: {', '.join(changed) or 'none'}")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main(*sys.argv[1:])
