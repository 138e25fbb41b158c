"""The templates of docs/clusters.md: parsed, compared with our settings, run where that is cheap.

The programs of a cluster (srun, sbatch, scontrol, ray) are replaced by a few lines each.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import train_imagenet
import write_dataset
from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.program import STALLED, STOPPED
from tests import make_sources as make
from tests.conftest import ROOT

PAGE = (ROOT / "docs/clusters.md").read_text()
CONVERSION, TRAINING = ["bash", "bash", "yaml", "python"], ["bash", "yaml", "bash"]
BLOCKS = re.findall(r"```(bash|yaml|python)\n(.*?)```", PAGE, flags=re.S)
SBATCH = {
    *("array", "cpus-per-task", "gpus-per-node", "job-name", "nodes", "ntasks-per-node"),
    *("open-mode", "requeue", "signal", "time"),
}


def block(name: str) -> str:
    """The one template that begins with a comment of this name."""
    (found,) = [text for _, text in BLOCKS if re.search(rf"\A(#!.*\n)?# {name}\b", text)]
    return found


def commands(script: str) -> list[list[str]]:
    """Arguments of every call of `script` in the templates, shell and YAML alike."""
    calls = []
    for kind, text in BLOCKS:
        if kind == "yaml":
            container = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"][0]
            text = " ".join(container["command"] + container["args"]).replace("sh -c ", "")
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if script in line and kind != "python" else []
            words = words[: words.index("&")] if "&" in words else words
            calls += [words[words.index(script) + 1 :]] if script in words else []
    return calls


# ------------------------------------------------------------------------------------------------
# What stands there
# ------------------------------------------------------------------------------------------------


def test_all_templates_are_here():
    assert [kind for kind, _ in BLOCKS] == [*CONVERSION, *TRAINING]
    assert len(commands("write_dataset.py")) == 2
    assert len(commands("train_imagenet.py")) == 3


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "bash"])
def test_shell_is_shell(text, tmp_path):
    (tmp_path / "script").write_text(text)
    done = subprocess.run(["bash", "-n", "script"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert {line.split("=")[0] for line in re.findall(r"^#SBATCH --(\S+)", text, re.M)} <= SBATCH
    if "#SBATCH" in text:
        assert text.startswith("#!/bin/bash\n")
        assert not re.search(r"^[^#\n].*\n(.*\n)*#SBATCH", text, re.M)  # they end at a command


def test_every_setting_exists_with_such_a_value(tiny_beton, monkeypatch):
    for arguments in commands("train_imagenet.py"):
        flags = [word.replace("/shared/runs", "/nowhere") for word in arguments]
        flags = [word.replace("/shared", str(tiny_beton)) for word in flags]
        cfg = train_imagenet.read_settings(flags)
        assert cfg.training.resume == "auto" and cfg.training.epochs == 88
    for arguments in commands("write_dataset.py"):
        text = re.sub(r"\$\w+", "1", " ".join(arguments).replace("/shared", str(tiny_beton)))
        cfg = write_dataset.read_settings(text.replace("/imagenet", "").split())
        assert (cfg.source.shards, cfg.source.shard) == (16, 1)
    mentioned = set(re.findall(r"`(?:--)?([a-z]+\.[a-z_]+)[`=]", PAGE)) - {"tests.agents"}
    known = {**train_imagenet.SETTINGS.entries, **write_dataset.SETTINGS.entries}
    assert mentioned - {".".join(key) if isinstance(key, tuple) else key for key in known} == set()


def jobs() -> list[dict]:
    return [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]


@pytest.mark.parametrize("job", jobs(), ids=lambda job: job["metadata"]["name"])
def test_kubernetes_fields_fit_together(job):
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy demands
    assert ("backoffLimitPerIndex" in spec) == (spec.get("completionMode") == "Indexed")
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("Ignore", "Count", "FailJob", "FailIndex")
        assert len(rule.keys() & {"onExitCodes", "onPodConditions"}) == 1
        codes = rule.get("onExitCodes", {"containerName": container["name"], "operator": "In"})
        assert codes["containerName"] == container["name"] and codes["operator"] == "In"
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_kubernetes_knows_our_exit_statuses():
    rules = jobs()[1]["spec"]["podFailurePolicy"]["rules"]
    action = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in rules[1:]}
    assert action == {STOPPED: "Ignore", STALLED: "Count", 2: "FailJob"}
    assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert jobs()[1]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 30
    assert f"{STOPPED} stopped on request" in PAGE and f"{STALLED} no batch came" in PAGE
    spec = jobs()[0]["spec"]  # a killed writer's lock: the delays are 10 s, 20 s, 40 s and so on
    delays = sum(10 * 2**number for number in range(spec["backoffLimitPerIndex"]))
    assert delays > 2 * 120
    text = spec["template"]["spec"]["containers"][0]["args"][0]
    assert f"--source.shards={spec['completions']} " in text and "\n" not in text


# ------------------------------------------------------------------------------------------------
# What it does
# ------------------------------------------------------------------------------------------------


def put(path: Path, text: str) -> None:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A folder like a set-up checkout, in which scripts of a cluster find what they call."""
    put(tmp_path / ".venv/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for name in ("write_dataset.py", "fast_imagenet"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(command: list[str], folder: Path, **environment) -> str:
    """Run a command of a template in `folder` with its replaced programs; returns what it says."""
    path = f"{folder / 'programs'}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(folder / "programs")} | environment
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tiny(text: str, folder: Path) -> str:
    """A template with the data of a test and two parts."""
    text = text.replace("/shared", str(folder / "shared")).replace("shards=16", "shards=2")
    text = text.replace("PARTS, CORES, FOLDER = 16, 8", "PARTS, CORES, FOLDER = 2, 8")
    return text.replace("workers=8", "workers=1").replace("{CORES}", "1")


RAY = """
class _Task:
    def __init__(self, function):
        self.remote = function

def remote(num_cpus, max_retries, retry_exceptions):
    assert num_cpus == 8 and max_retries > 0 and retry_exceptions
    return _Task

def init(address):
    assert address == "auto"

get = list
"""
SBATCH_STUB = """#!/bin/sh
if [ "$1" = --parsable ]; then echo 7; exit; fi
[ "$1" = --dependency=afterok:7 ] && [ "$2" = --wrap ] && exec sh -c "$3"
"""


@pytest.mark.slow
def test_parts_by_slurm_kubernetes_and_ray_become_one_file(checkout):
    """SLURM's writes part 0, Kubernetes' part 1; Ray's finds both; then they are merged."""
    make.make_image_folder(checkout / "shared/imagenet")
    put(checkout / "write_parts.sbatch", tiny(block("write_parts.sbatch"), checkout))
    slurm = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_CPUS_PER_TASK": "1"}
    assert "part-0000-of-0002.beton: " in run(["./write_parts.sbatch"], checkout, **slurm)
    container = jobs()[0]["spec"]["template"]["spec"]["containers"][0]
    command = [*container["command"], tiny(container["args"][0], checkout)]
    assert "part-0001-of-0002.beton: " in run(command, checkout, JOB_COMPLETION_INDEX="1")
    put(checkout / "programs/ray.py", RAY)
    put(checkout / "write_parts.py", tiny(block("write_parts.py"), checkout))
    said = run([sys.executable, "write_parts.py"], checkout)
    assert said.count("complete, kept") == 2
    put(checkout / "programs/sbatch", SBATCH_STUB)
    merge = ["sh", "-euc", tiny(block("submit both"), checkout)]
    assert "27 images from 2 parts" in run(merge, checkout)
    assert len(BetonFile(checkout / "shared/train.beton")) == 27


TORCHRUN = """#!/bin/bash
echo "$@" > torchrun.txt
trap 'echo TERM > signal.txt; sleep 0.3; exit 1' TERM
touch ready
while [ ! -e status ]; do sleep 0.05; done
exit $(cat status)
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "$@" > requeued; fi
"""


@pytest.mark.parametrize(
    ("status", "sent", "expected", "requeued"),
    [
        ("0", None, 0, False),
        (str(STOPPED), None, 0, True),
        ("1", None, 1, False),
        ("", signal.SIGUSR1, 0, True),
        ("", signal.SIGTERM, 0, True),
    ],
)
def test_slurm_training_requeues_itself(status, sent, expected, requeued, checkout):
    put(checkout / "train.sbatch", block("train.sbatch"))
    put(checkout / "programs/srun", '#!/bin/sh\nexec "$@"\n')
    put(checkout / "programs/scontrol", SCONTROL)
    put(checkout / ".venv/bin/torchrun", TORCHRUN)
    env = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "42"}
    path = f"{checkout / 'programs'}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["./train.sbatch"],
        cwd=checkout,
        env=os.environ | env | {"SLURM_JOB_NODELIST": "node[7-8]", "PATH": path},
    )
    deadline = time.monotonic() + 30
    while not (checkout / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if status:
        (checkout / "status").write_text(status)
    else:
        process.send_signal(sent)
    assert process.wait(30) == expected
    assert (checkout / "signal.txt").exists() == (sent is not None)
    assert (checkout / "requeued").exists() == requeued
    if requeued:
        assert (checkout / "requeued").read_text() == "requeue 42\n"
    arguments = (checkout / "torchrun.txt").read_text()
    assert arguments.startswith("--nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d")
    assert "--rdzv-endpoint=node7:29400 --rdzv-id=42" in arguments


def test_torchrun_knows_its_flags():
    from torch.distributed.run import get_args_parser

    text = PAGE.replace("\\\n", " ")
    flags = re.findall(r"torchrun (--nnodes.*?) train_imagenet.py", text, flags=re.S)
    assert len(flags) == 2
    for text in flags:
        arguments = text.replace('"', "").replace("$SLURM_", "1").split()
        parsed = get_args_parser().parse_args([*arguments, "train_imagenet.py"])
        assert parsed.rdzv_backend == "c10d" and int(parsed.max_restarts) == 3
