"""Every program: output that nobody reads, closed streams, errors as sentences."""

import os
import shlex
import subprocess
import sys

import pytest

from fast_imagenet.program import errors_as_sentences
from tests.conftest import ROOT
from tests.engine.test_run import run_flags


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["train_imagenet.py", "--help"],
        ["write_dataset.py", "--help"],
        ["-m", "tools.study", "records/ablation_third", "--list"],
        ["-m", "tools.plan", "--help"],
        ["-m", "tools.preview", "--help"],
        ["-m", "tools.report", "--help"],
        ["-m", "fast_imagenet.beton", "--help"],
    ],
)
def test_a_command_that_nobody_reads_ends_quietly(command):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    said = done.stderr.splitlines()  # how long the imports take, at most
    assert done.returncode == 0 and all(b": about " in line for line in said), said


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["train_imagenet.py --nope=1", "write_dataset.py --nope=1"])
def test_a_script_with_closed_streams_keeps_its_status(command, closed):
    done = in_shell(f"{command} {closed}")
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr and (b"nope" in done.stderr) == (closed == ">&-")


MODULES = [f"tools.{name}" for name in ("report", "study", "plan", "preview", "predict", "export")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fast_imagenet.beton", *MODULES])
def test_a_module_with_closed_streams_keeps_its_status(name):
    assert in_shell(f"-m {name} --nope=1 <&- >&- 2>&-").returncode == 2


def in_shell(command):
    command = f"{shlex.quote(sys.executable)} {command}"
    return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_work_is_done_with_closed_streams(closed, tmp_path):
    """Both scripts, with processes of their own: none of their files gets a stream's number."""
    for split, count in (("train", 80), ("val", 30)):
        write = f"write_dataset.py --source.kind=synthetic --source.split={split} --write.workers=2"
        write += f" --write.limit={count} --write.folder={tmp_path}"
        assert in_shell(f"{write} {closed}").returncode == 0
    flags = ["--training.max_steps=2", "--data.backend=torchvision", "--data.num_workers=1"]
    flags = run_flags(tmp_path, tmp_path / "run", *flags)
    assert in_shell(f"train_imagenet.py {shlex.join(flags)} {closed}").returncode == 0
    assert (tmp_path / "run" / "summary.json").exists()
    verify = f"-m fast_imagenet.beton verify {tmp_path}/train.beton {tmp_path}/val.beton"
    assert in_shell(verify).returncode == 0


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("lr.lr=x is not a number"), "lr.lr=x is not a number"),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied; check the pa"),
        (
            OSError(28, "No space left on device"),
            "No space left on device; make room or choose",
        ),
        (OSError("cannot identify image file"), "cannot identify image file"),
        (MemoryError(), "out of memory"),
    ],
)
def test_an_error_of_the_user_is_one_sentence(error, sentence):
    with pytest.raises(SystemExit) as ended, errors_as_sentences("tool"):
        raise error
    assert ended.value.code.startswith(f"tool: {sentence}")
    assert "training." not in ended.value.code  # that advice is the training program's


def test_a_defect_keeps_its_traceback(capsys):
    for defect in (TypeError("x"), OSError(32, "Broken pipe")):
        with pytest.raises(type(defect)), errors_as_sentences("tool"):
            raise defect
    with pytest.raises(SystemExit, match="130"), errors_as_sentences("tool", "nothing is left"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "tool: nothing is left\n"
