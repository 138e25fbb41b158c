"""Two torchrun agents on loopback as two nodes, one of which dies and comes back.

    .venv/bin/python -m tests.agents              kill either node once, print what became of it

A node is an agent and all processes below it, which are killed at once, as when a machine loses
power.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fast_imagenet.engine.json_lines import read_jsonl
from tests.conftest import ROOT, SMOKE, write_tiny

EPOCHS = 4
# torchrun otherwise tells the address of its store in the first round only, and a node that joins
# later waits for it in vain (torch 2.14, dynamic_rendezvous.py, next_rendezvous)
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# a node without a sign of life for 4 x 2 s is dead, where torchrun waits for 3 x 5 s; a node that
# finds no others ends within two minutes, to be started again, where torchrun lets it wait for ten
SOON = "--rdzv-conf=keep_alive_interval=2,keep_alive_max_attempt=4,join_timeout=120"
STEPS = 5  # of an epoch: 80 images in batches of 16


def free_port() -> int:
    """A port of loopback that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_node(data: Path, folder: Path, port: int, log: Path) -> subprocess.Popen:
    """One node of two, with one rank on gloo; its output goes to the end of `log`."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1",
        "--max-restarts=3", SOON, "train_imagenet.py", f"--config={SMOKE}",
        "--model.arch=timm/test_resnet",
        f"--data.train_dataset={data}/train.beton", f"--data.val_dataset={data}/val.beton",
        "--data.backend=ffcv", f"--training.epochs={EPOCHS}", "--training.max_steps=0",
        "--lr.lr_peak_epoch=1", f"--logging.folder={folder}", "--training.resume=auto",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **NEW_STORE}
    with open(log, "a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def epochs_logged(folder: Path) -> int:
    """Finished epochs of the run in `folder`."""
    log = folder / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_until(true, seconds: float) -> bool:
    """Whether `true()` became true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(found)


def ranks_of(agent: subprocess.Popen) -> set[int]:
    """Process ids of all living processes below an agent, whatever their sessions."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found, waiting = set(), [agent.pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


def kill_node(agent: subprocess.Popen) -> None:
    """End an agent and everything below it with SIGKILL."""
    for number in (agent.pid, *ranks_of(agent)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    agent.wait()


def lose_node(lost: int, data: Path, patience: float = 600) -> dict:
    """Kill node `lost` of two with SIGKILL after the first epoch, then start it again.

    Node 0 hosts the rendezvous: with it the other agent ends, too, and is started again.

    Args:
        data: folder with a tiny train.beton and val.beton.
        patience: seconds that each wait may last.

    Returns:
        Seconds until the other node's training process had ended (None: it had not), and from the
        restart until an epoch was logged and until both agents had ended; how often the agent of
        each node failed and was started again; epochs and losses logged, of how many; exit statuses
        of both agents in the end (None: still running, it was killed).
    """
    with tempfile.TemporaryDirectory() as name:
        folder, port, nodes = Path(name) / "run", free_port(), []
        logs = [Path(name) / f"{number}.log" for number in (0, 1)]

        def again(number: int) -> None:
            nodes[number:] = [start_node(data, folder, port, logs[number]), *nodes[number + 1 :]]

        try:
            for number in (0, 1):
                again(number)
                wait_until(lambda: is_open(port), patience)  # node 0 is to host the rendezvous
            wait_until(lambda: epochs_logged(folder) or ended(nodes), patience)
            if not epochs_logged(folder) or ended(nodes):
                return {"lost": lost} | _tails(logs)
            result = {"lost": lost}
            result["others_ended_after_seconds"] = _kill_and_wait(nodes, lost, patience)
            begin = time.monotonic()
            again(lost)
            result |= _keep_running(nodes, again, folder, patience)
            result["ended_after_seconds"] = round(time.monotonic() - begin, 1)
            result |= progress(folder) | {"status": [node.poll() for node in nodes]}
            return result if result["status"] == [0, 0] else result | _tails(logs)
        finally:
            for node in nodes:
                kill_node(node)


def _tails(logs: list[Path]) -> dict:
    return {"failed": [log.read_text()[-3000:] for log in logs]}


def _kill_and_wait(nodes: list[subprocess.Popen], lost: int, patience: float) -> float | None:
    """Kill one node; seconds until the training processes of the other had ended, or None."""
    other, start = nodes[1 - lost], time.monotonic()
    ranks = ranks_of(other)
    kill_node(nodes[lost])
    gone = wait_until(lambda: not ranks & ranks_of(other), patience)
    return round(time.monotonic() - start, 1) if gone else None


def _keep_running(nodes: list[subprocess.Popen], again, folder: Path, patience: float) -> dict:
    """Start a node again whenever its agent has failed, as a cluster does, until all have ended.

    Returns: how often, by node, and the seconds until the run has logged another epoch.
    """
    counts, begin, before, seconds = [0, 0], time.monotonic(), epochs_logged(folder), None
    while len(ended(nodes)) < len(nodes) and time.monotonic() < begin + patience:
        if seconds is None and epochs_logged(folder) > before:
            seconds = round(time.monotonic() - begin, 1)
        for number, node in enumerate(nodes):
            # not one of a finished run: it would wait for the other in vain
            if node.poll() and counts[number] < 3 and not (folder / "summary.json").exists():
                counts[number] += 1
                again(number)
        time.sleep(0.2)
    return {"failed_agents_started_again": counts, "went_on_after_seconds": seconds}


def ended(nodes: list[subprocess.Popen]) -> list[subprocess.Popen]:
    """The agents that have ended."""
    return [node for node in nodes if node.poll() is not None]


def is_open(port: int) -> bool:
    """Whether somebody listens to a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def progress(folder: Path) -> dict:
    """How far the run has come."""
    losses = [loss for line in read_jsonl(folder / "steps.jsonl") for loss in line["losses"]]
    return {"epochs": [epochs_logged(folder), EPOCHS], "losses": [len(losses), EPOCHS * STEPS]}


def main() -> None:
    """Lose either node once and print what became of it."""
    with tempfile.TemporaryDirectory() as data:
        write_tiny(Path(data))
        for lost in (1, 0):
            print(json.dumps(lose_node(lost, Path(data))), flush=True)


if __name__ == "__main__":
    main()
