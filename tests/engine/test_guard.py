"""A run that is stopped, killed or stuck: what is saved, what goes on, and what is said."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import train_imagenet
from fast_imagenet.config import interpreter
from fast_imagenet.engine import guard as guard_module
from fast_imagenet.engine.checkpoint import load_checkpoint
from fast_imagenet.engine.guard import (
    STALLED,
    STOPPED,
    Agreement,
    Guard,
    StepMonitor,
    Stopped,
    lock_folder,
)
from tests.agents import free_port
from tests.conftest import ROOT, SMOKE
from tests.torture.training import differences
from tools.report.records import read_run

EVERYTHING = [
    "--training.epochs=2", "--lr.lr_peak_epoch=0.5", "--training.max_steps=0", "--ema.decay=0.9",
    "--resolution.max_res=64", "--resolution.end_ramp=1", "--augment.mixup=0.2",
    "--augment.cutmix=1", "--augment.erasing=0.5", "--augment.erasing_mode=pixel",
    "--augment.policy=rand_augment_lite", "--augment.brightness=0.4", "--augment.saturation=0.4",
    "--model.arch=timm/test_resnet", "--model.drop_path=0.2", "--training.seed=5",
]  # fmt: skip
SMALL = "--model.arch=timm/test_resnet"  # a checkpoint of 134 MB takes longer than ten steps
STEPS = 10  # 2 epochs of 80 // 16 steps


pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_run(folder, whole):
    """Weights, average, optimizer state, losses and log agree to the last bit."""
    assert differences(folder, whole) == []


# ── exact resume ──


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_a_run_restarted_at_every_step_is_the_uninterrupted_run(quick_run, tmp_path, backend):
    flags = [*EVERYTHING, f"--data.backend={backend}"]
    whole = quick_run(*flags, folder=tmp_path / "whole")
    for step in range(1, STEPS + 1):
        more = [f"--training.max_steps={step}", "--training.resume=auto"]
        quick_run(*flags, *more, folder=tmp_path / "parts")
    assert_same_run(tmp_path / "parts", whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_the_step_and_the_run_goes_on(quick_run, tmp_path, monkeypatch, name):
    flags = [*EVERYTHING, "--training.resume=auto"]
    whole = quick_run(*flags, folder=tmp_path / "whole")
    show = train_imagenet.Progress.step

    def interrupt(bar, step, *values):
        if step == 6:
            signal.raise_signal(signal.Signals[name])
        show(bar, step, *values)

    monkeypatch.setattr(train_imagenet.Progress, "step", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=name):
        quick_run(*flags, folder=tmp_path / "parts")
    assert signal.getsignal(signal.SIGTERM) is before
    state = load_checkpoint(tmp_path / "parts" / "last.pt")
    assert (state["epoch"], state["step"], len(state["losses"])) == (1, 2, 2)
    monkeypatch.setattr(train_imagenet.Progress, "step", show)
    quick_run(*flags, folder=tmp_path / "parts")
    assert_same_run(tmp_path / "parts", whole)


def test_a_signal_in_evaluation_does_not_wait_for_its_end(quick_run, tmp_path, monkeypatch):
    whole = quick_run(*EVERYTHING, folder=tmp_path / "whole")
    normalize, calls = train_imagenet.normalize, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return normalize(*arguments)

    monkeypatch.setattr(train_imagenet, "normalize", interrupt)
    with pytest.raises(Stopped):
        quick_run(*EVERYTHING, folder=tmp_path / "parts")
    assert len(calls) == 1
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 5
    assert not (tmp_path / "parts" / "log.jsonl").exists()
    state = load_checkpoint(tmp_path / "parts" / "last.pt")
    quick_run(*EVERYTHING, "--training.resume=auto", folder=tmp_path / "parts")
    assert_same_run(tmp_path / "parts", whole)
    # the epoch whose steps the first process did is logged with that one's clock
    first, again = (read_run(folder) for folder in (whole, tmp_path / "parts"))
    assert again.images_per_epoch == first.images_per_epoch == 80
    log = again.log[0]
    assert state["spent"] > 0 and log["seconds"] == pytest.approx(state["spent"], rel=0.5)
    waited = log["data_wait_share"] * log["seconds"]
    assert state["waited"] > 0 and waited == pytest.approx(state["waited"], rel=0.5)


def test_a_checkpoint_of_before_the_waits_were_kept_is_gone_on_from(quick_run, tmp_path):
    folder = quick_run(*EVERYTHING, "--training.max_steps=7")
    whole = quick_run(*EVERYTHING, folder=tmp_path / "whole")
    state = load_checkpoint(folder / "last.pt")
    assert state.pop("waited") > 0
    torch.save(state, folder / "last.pt")
    quick_run(*EVERYTHING, "--training.resume=auto", folder=folder)
    assert_same_run(folder, whole)


def run_flags(tiny_beton, folder, *flags):
    return [f"--config={SMOKE}", *EVERYTHING, "--training.resume=auto",
            f"--data.train_dataset={tiny_beton}/train.beton",
            f"--data.val_dataset={tiny_beton}/val.beton", f"--logging.folder={folder}",
            *flags]  # fmt: skip


def start_run(tiny_beton, folder, *flags, **options):
    options = {"stderr": subprocess.PIPE} | options
    return subprocess.Popen(
        [sys.executable, "train_imagenet.py", *run_flags(tiny_beton, folder, *flags)],
        cwd=ROOT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # below nohup or a background shell, Ctrl-C would be ignored by inheritance
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def finish(process):
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said


def wait_for(path, process):
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_goes_on_when_nobody_reads_what_it_says(tiny_beton, tmp_path):
    process = start_run(tiny_beton, tmp_path, "--training.max_steps=2", stdout=subprocess.PIPE)
    process.stdout.close()
    finish(process)
    assert (tmp_path / "summary.json").exists()


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
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["train_imagenet.py --nope=1", "write_dataset.py --nope=1"])
def test_a_script_with_closed_streams_keeps_its_status(command, closed):
    done = in_shell(f"{command} {closed}")
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr and (b"nope" in done.stderr) == (closed == ">&-")


@pytest.mark.parametrize("name", ["beton", "report", "study", "plan", "preview"])
def test_a_module_with_closed_streams_keeps_its_status(name):
    assert in_shell(f"-m fast_imagenet.{name} --nope=1 <&- >&- 2>&-").returncode == 2


def in_shell(command):
    command = f"{shlex.quote(sys.executable)} {command}"
    return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, timeout=120)


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


def test_a_run_outlives_its_terminal(tiny_beton, tmp_path):
    reader, terminal = os.openpty()
    process = start_run(
        tiny_beton, tmp_path, "--training.max_steps=2", stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    os.close(reader)
    assert process.wait(120) == 0
    assert (tmp_path / "summary.json").exists()


def test_a_signal_is_answered_when_nobody_reads_the_errors():
    program = """
import signal, time
from fast_imagenet.engine.guard import stop_at_once
from fast_imagenet.terminal import ignore_broken_pipe
stop_at_once()
ignore_broken_pipe()
signal.raise_signal(signal.SIGTERM)
time.sleep(60)
"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=write, timeout=50)
    os.close(write)
    assert done.returncode == STOPPED


def test_kill_9_and_a_signal_in_one_life(tiny_beton, tmp_path):
    """The command as a user runs it: killed, stopped, and run again to its end."""
    often = ["--training.checkpoint_minutes=0.0001"]
    folder = tmp_path / "run"
    process = start_run(tiny_beton, folder, *often)
    wait_for(folder / "last.pt", process)
    process.kill()
    process.communicate()
    (folder / "environment.json").unlink(missing_ok=True)  # written again when the second life runs
    process = start_run(tiny_beton, folder, *often)
    wait_for(folder / "environment.json", process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (STOPPED, 0), said  # 0: it had just finished
    if process.returncode == STOPPED:
        assert f"saved; go on with {interpreter()} train_imagenet.py --config=" in said
        assert said.count("--training.resume=auto") == 1
        finish(start_run(tiny_beton, folder))
    finish(start_run(tiny_beton, tmp_path / "whole"))
    assert_same_run(folder, tmp_path / "whole")


def test_a_signal_to_the_whole_group_is_not_for_the_workers(tiny_beton, tmp_path):
    folder = tmp_path / "run"
    flags = ["--data.backend=torchvision", "--training.checkpoint_minutes=0.0001"]
    # it must not be over before the signal comes
    flags += ["--training.epochs=500", "--model.arch=timm/resnet18"]
    process = start_run(tiny_beton, folder, *flags, start_new_session=True)
    wait_for(folder / "last.pt", process)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == STOPPED, said


# ── what ends a run ──


def test_a_stalled_loader_ends_the_process_with_its_stacks():
    code = """
import time
from fast_imagenet.engine.guard import Guard
def batches():
    yield 1
    time.sleep(60)
with Guard(0.4) as guard:
    for batch in guard.watch(batches()):
        print("batch", batch, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == STALLED and done.stdout == "batch 1\n"
    assert "no batch came for 0.4 s" in done.stderr and "--data.timeout" in done.stderr
    assert re.search(r'File "<string>", line 6 in batches', done.stderr)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_before_the_run_began_asks_to_start_again(name):
    code = f"""
import signal, time
from fast_imagenet.engine.guard import Guard, stop_at_once
stop_at_once()
signal.raise_signal(signal.{name})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (STOPPED, "")
    assert done.stderr == (
        f"stopped by {name} before the run began; start the same command again\n"
    )


@pytest.mark.parametrize("error", ["", "raise ValueError('of the test')"])
def test_a_signal_after_the_run_reports_no_stop(error):
    """On the way out, as what was opened is closed: the failure keeps its status and message."""
    code = f"""
import signal, time
from fast_imagenet.engine.guard import Guard, stop_at_once
stop_at_once()
try:
    with Guard() as guard:
        signal.raise_signal(signal.SIGTERM)
        print(guard.signal)
        {error}
finally:
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        signal.raise_signal(signal.Signals[name])
    time.sleep(1)  # for the thread that is notified of signals
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (int(bool(error)), "SIGTERM\n")
    assert "before the run began" not in done.stderr
    assert ("ValueError: of the test" in done.stderr) == bool(error)


@pytest.mark.parametrize(("error", "status"), [("ValueError('of the test')", 1), ("Stopped()", 75)])
def test_a_failed_program_ends_whatever_hangs_on_its_way_out(error, status):
    code = f"""
import atexit, time
from fast_imagenet.engine import guard
guard.CLOSE_SECONDS = 2
atexit.register(time.sleep, 100)
guard.stop_at_once()
with guard.Guard():
    raise {error.replace("Stopped", "guard.Stopped")}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status
    assert f"ended by force 2 s after: {error}" in done.stderr


def test_time_in_which_the_process_is_stopped_is_no_stall():
    code = """
import time
from fast_imagenet.engine.guard import Guard
def batches():
    print("waits", flush=True)
    for _ in range(10):
        time.sleep(0.15)
    yield 1
with Guard(3) as guard:
    print(list(guard.watch(batches())))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "[1]\n"), errors


def test_a_rank_that_waits_for_the_others_obeys_a_signal():
    """The wait is inside torch, where Python's handlers do not run."""
    code = """
from fast_imagenet.engine.guard import stop_at_once
stop_at_once()
from fast_imagenet.engine.distributed import start_ranks
print("waits", flush=True)
start_ranks()
"""
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | place | {"MASTER_PORT": str(free_port())},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "waits\n"
        time.sleep(2)  # until it does
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode == STOPPED
    assert "stopped by SIGTERM before the run began" in said


def test_a_run_without_batches_ends_with_its_stacks(tiny_beton, tmp_path):
    """The whole command, its loader stuck in a call that nothing can end."""
    code = f"""
import time, train_imagenet
from fast_imagenet.data import ffcv_loader as loader
def stuck(samples): time.sleep(100)
make = loader.TrainLoader.__init__
def make_stuck(self, *args, **options):
    make(self, *args, **options)
    self._operations[0].before_batch = stuck
loader.TrainLoader.__init__ = make_stuck
train_imagenet.main(train_imagenet.read_settings([
    "--config={SMOKE}", "--model.arch=timm/test_resnet", "--data.timeout=1.5",
    "--training.use_blurpool=false", "--logging.folder={tmp_path}/run",
    "--data.train_dataset={tiny_beton}/train.beton", "--data.val_dataset={tiny_beton}/val.beton",
]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == STALLED, done.stderr
    assert "no batch came for 1.5 s" in done.stderr
    assert ", line 4 in stuck" in done.stderr and "in train_epoch" in done.stderr  # both threads


def test_slow_steps_are_no_stall():
    with Guard(0.2) as guard:
        for _ in guard.watch(iter([1, 2])):
            time.sleep(0.5)


def pauses(saved, guard=None, minutes=0.0):
    ranks = SimpleNamespace(world_size=1, most=lambda value: value, average=lambda tensors: None)
    return StepMonitor(guard or SimpleNamespace(signal=""), ranks, minutes, saved.append)


def test_a_wild_loss_is_told_within_fifty_steps_and_never_saved():
    saved, losses = [], []
    pause = pauses(saved)
    for step in range(100, 149):
        losses.append(torch.tensor(float("nan") if step == 117 else 1.0))
        pause(step + 1, losses)
    with pytest.raises(ValueError, match="not finite from step 117 on; lower lr.lr"):
        pause(150, [*losses, torch.tensor(1.0)])
    assert not saved
    with pytest.raises(ValueError, match="step 7 on"):  # nor on request
        pauses(saved, SimpleNamespace(signal="SIGTERM"))(8, [torch.tensor(float("inf"))])
    assert not saved


def test_weights_that_are_not_finite_are_never_saved(quick_run, tmp_path, monkeypatch):
    """A step of finite loss may leave them: the checkpoint before it stays, and is named."""
    flags = ["--training.epochs=3", "--training.resume=auto", "--lr.lr_peak_epoch=0", SMALL]
    folder = quick_run(*flags, "--training.max_steps=7", folder=tmp_path / "run")
    before, take = (folder / "last.pt").read_bytes(), train_imagenet.forward_backward

    def spoil(t, *batch):
        loss = take(t, *batch)
        if batch[-1] == 8:  # the step
            next(t.model.parameters()).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(train_imagenet, "forward_backward", spoil)
    said = r"conv1.* is not finite in epoch 2 after 4 steps of it; lower lr.lr.*; the last good "
    with pytest.raises(ValueError, match=rf"{said}checkpoint, .*last.pt \(epoch 2, after 2 steps"):
        quick_run(*flags, "--training.max_steps=9", folder=folder)
    assert (folder / "last.pt").read_bytes() == before
    with pytest.raises(ValueError, match="the loss is not finite from step 9 on; lower lr.lr.*las"):
        quick_run(*flags, "--training.max_steps=0", folder=folder)
    assert (folder / "last.pt").read_bytes() == before


def test_checkpoints_come_by_the_clock(monkeypatch):
    now, saved, losses = [0.0], [], []
    monkeypatch.setattr(guard_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pause = pauses(saved, minutes=10)
    for step in range(6):
        losses.append(torch.tensor(float(step)))
        now[0] += 240.0
        pause(step + 1, losses)
    assert [len(saved_losses) for saved_losses in saved] == [3, 6]
    never = pauses(saved, minutes=0)
    now[0] += 1e9
    never(7, losses)
    assert len(saved) == 2


def ranks_that_take(*milliseconds):
    """Stand-ins for the ranks: `most` gives what the slowest of them would answer."""
    answers, asked = list(milliseconds), []

    def most(value):
        asked.append(value)
        return value if len(asked) % 2 else answers.pop(0)

    return SimpleNamespace(world_size=2, most=most)


def test_ranks_with_slow_steps_ask_each_other_after_each_of_them():
    fast, slow = (Agreement(ranks_that_take(*[ms] * 30)) for ms in (1, 9000))
    assert [step for step in range(32) if fast.ask(0) is not None] == [0, 10, 20, 30]
    assert all(slow.ask(0) is not None for _ in range(20))
    between = Agreement(ranks_that_take(9000, *[1300] * 30))
    assert [step for step in range(11) if between.ask(0) is not None] == [0, 1, 4, 7, 10]


def test_a_run_killed_before_its_final_weights_leaves_them_on_resume(quick_run, capsys):
    flags = ["--training.epochs=1", "--lr.lr_peak_epoch=0", "--training.max_steps=0", SMALL]
    folder = quick_run(*flags)
    weights, summary = (
        (folder / name).read_bytes() for name in ("weights.safetensors", "summary.json")
    )
    for name in ("weights.safetensors", "summary.json", "curves.png"):
        (folder / name).unlink()
    quick_run(*flags, "--training.resume=auto", folder=folder)
    assert (folder / "weights.safetensors").read_bytes() == weights
    assert (folder / "summary.json").read_bytes() == summary
    assert (folder / "curves.png").exists()


def test_a_run_says_what_it_does_and_where_it_goes_on(quick_run, capsys):
    flags = ["--training.epochs=2", "--training.resume=auto", "--lr.lr_peak_epoch=1", SMALL]
    folder = quick_run(*flags, "--training.max_steps=7")
    said = capsys.readouterr().out
    assert "on cpu: 80 images of 10 classes, 30 to evaluate; 2 epochs of 5 steps" in said
    assert "goes on" not in said
    quick_run(*flags, "--training.max_steps=0", folder=folder)
    assert "; goes on in epoch 2 after step 2\n" in capsys.readouterr().out


def test_a_second_interrupt_ends_at_once():
    with Guard() as guard:
        signal.raise_signal(signal.SIGINT)
        assert guard.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_guard_in_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: Guard().__enter__().__exit__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_folder_has_one_run_at_a_time(tmp_path, quick_run):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, fast_imagenet.engine.guard as g\n"
         f"with g.lock_folder({str(tmp_path / 'run')!r}): print(flush=True); sys.stdin.read()"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    with pytest.raises(ValueError, match="run is in use by another process; wait for it"):
        quick_run(folder=tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    holder.kill()  # a killed run keeps nobody out
    holder.communicate()
    with lock_folder(tmp_path / "run"):
        pass
