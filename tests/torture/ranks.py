"""A rank that dies, and a node that dies and comes back, under torchrun on loopback."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import agents
from tests.conftest import write_tiny
from tests.torture.common import PATIENCE, ROOT


def lost_rank() -> dict:
    """Two ranks, one killed with SIGKILL while they train: seconds until all has ended."""
    with tempfile.TemporaryDirectory() as name:
        data = write_tiny(Path(name))
        run = data / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "train_imagenet.py", "--config=tests/smoke.yaml"]
        command += ["--model.arch=timm/test_resnet", "--training.epochs=5000"]
        command += ["--training.max_steps=0"]
        command += [f"--data.{s}_dataset={data / f'{s}.beton'}" for s in ("train", "val")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with subprocess.Popen(
            [*command, f"--logging.folder={run}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as agent:
            try:
                trains = agents.wait_until((run / "last.pt").exists, PATIENCE)
                below = agents.ranks_of(agent)
                begin = time.monotonic()
                os.kill(max(filter(_is_rank, below)), signal.SIGKILL)
                ended = agents.wait_until(
                    lambda: agent.poll() is not None and not any(map(_is_rank, below)), PATIENCE
                )
                seconds = time.monotonic() - begin
            finally:
                agents.kill_node(agent)
        return {
            "trained_before": trains,
            "all_ended": ended,
            "seconds": round(seconds, 1),
            "status": agent.returncode,
        }


def _is_rank(number: int) -> bool:
    """Whether a process is alive and one of the trainer's."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        words = Path(f"/proc/{number}/cmdline").read_text().split("\0")
    except OSError:
        return False
    return state != "Z" and "train_imagenet.py" in words and "torch.distributed.run" not in words


def lost_node(lost: int) -> dict:
    """One of two nodes loses power and is started again: the run must go on and finish."""
    with tempfile.TemporaryDirectory() as name:
        return agents.lose_node(lost, write_tiny(Path(name)), PATIENCE)
