"""python -m tools.plan: the arithmetic is that of a run; a small one prints all parts."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_imagenet
from fast_imagenet.engine.work import work_of
from fast_imagenet.machine import available_memory
from fast_imagenet.program import STALLED
from tests.conftest import ROOT, SMOKE
from tools.plan import __main__ as plan_command
from tools.plan import measure, report, storage
from tools.plan.forecast import (
    Costs,
    Forecast,
    Storage,
    Times,
    choose_resolutions,
    predict,
    reading_seconds,
    steps_of_epochs,
    times_at,
)

SMALL = Times(64, step=0.2, loader=0.1, together=0.25, first_batch=2.0, start=5.0, steps=9)
LARGE = Times(128, step=0.8, loader=0.4, together=1.0, first_batch=4.0, start=9.0, steps=9)
COSTS = Costs(
    start=10.0,
    evaluation=30.0,
    evaluation_start=3.0,
    weights=1,
    save=0.5,
    save_best=1.0,
    log=0.1,
    finish=2.0,
)
GB = 10**9
ROOMY = Storage(
    bytes=40 * GB,
    val_bytes=2 * GB,
    room=64 * GB,
    resident=1.0,
    sequential=5e8,
    scattered=1e8,
    random_order=True,
    checked=True,
)


# ---- arithmetic ----------------------------------------------------------------------------------


def test_epochs_and_steps_are_those_of_the_trainer():
    assert steps_of_epochs(3, 10) == [10, 10, 10]
    assert steps_of_epochs(3, 10, max_steps=25) == [10, 10, 5]
    assert steps_of_epochs(3, 10, max_steps=20) == [10, 10]
    assert steps_of_epochs(3, 10, max_steps=99) == [10, 10, 10]


def test_many_resolutions_are_thinned_and_interpolated_by_their_pixels():
    assert choose_resolutions([96, 64, 64], 4) == [64, 96]
    assert choose_resolutions(list(range(128, 256, 32)), 4) == [128, 160, 192, 224]
    assert choose_resolutions(list(range(64, 352, 32)), 4) == [64, 160, 224, 320]
    middle = times_at([SMALL, LARGE], 96)
    fraction = (96**2 - 64**2) / (128**2 - 64**2)
    assert middle.together == pytest.approx(0.25 + fraction * 0.75)
    assert middle.step == pytest.approx(0.2 + fraction * 0.6)
    assert (middle.resolution, middle.steps, middle.spread) == (96, 0, None)
    assert times_at([SMALL, LARGE], 128) is LARGE


def forecast(steps, costs=COSTS, data=ROOMY, minutes=0.0, sizes=(64, 64, 128)) -> Forecast:
    return predict(list(sizes), steps, 100, [SMALL, LARGE], costs, data, minutes)


def test_a_run_is_the_sum_of_its_parts():
    f = forecast([100, 100, 100])
    training = [row for row in f.rows if row.name == "training"]
    assert [(row.first, row.count, row.steps) for row in training] == [(1, 2, 200), (3, 1, 100)]
    assert [row.times for row in training] == [SMALL, LARGE]
    assert training[0].seconds == pytest.approx(2 * 2.0 + 200 * 0.25)
    assert training[1].seconds == pytest.approx(4.0 + 100 * 1.0)
    assert f.of("evaluation") == pytest.approx(3 * 30)
    assert f.of("checkpoints") == pytest.approx(3 * (0.5 + 1.0 + 0.1))  # before and after each
    assert f.of("reading") == 0
    assert f.of("start") == pytest.approx(10 + 5 + 9 + 3)
    assert f.of("end") == 2
    assert f.seconds == pytest.approx(158 + 90 + 4.8 + 27 + 2)
    assert f.as_dict()["hours"] == pytest.approx(f.seconds / 3600)


def test_evaluations_that_are_rarer_are_counted():
    places = ([64] * 7, [100] * 7, 100, [SMALL], COSTS, ROOMY, 0.0)
    assert predict(*places, every=3).of("evaluation") == pytest.approx(3 * 30)  # after 3, 6 and 7
    assert predict(*places, every=100).of("evaluation") == pytest.approx(30)


def test_an_ema_is_evaluated_too_and_a_cut_epoch_has_no_best():
    assert forecast([100] * 3, replace(COSTS, weights=2)).of("evaluation") == 120  # once more
    cut = forecast([100, 100, 50])
    assert cut.of("training") == pytest.approx(54 + 4 + 50)
    assert cut.of("checkpoints") == pytest.approx(2 * (0.5 + 1.0) + 0.5 + 3 * 0.1)
    # 104 s of the third epoch hold two checkpoints 45 s apart; 27 s of the others none
    assert forecast([100] * 3, minutes=0.75).of("checkpoints") == pytest.approx(4.8 + 2 * 0.5)


def test_reading_counts_where_it_is_slower_than_training():
    epochs = [20.0, 20.0, 20.0]
    assert reading_seconds(ROOMY, epochs) == 0
    half = replace(ROOMY, resident=0.5)  # 20 GB at 0.5 GB/s beside 20 s of training
    assert reading_seconds(half, epochs) == pytest.approx(40 - 20)
    assert reading_seconds(replace(half, checked=False), epochs) == pytest.approx(200 - 20)
    assert reading_seconds(replace(half, sequential=None), epochs) == 0
    assert reading_seconds(replace(ROOMY, resident=None), epochs) == 0


def test_data_beyond_memory_is_read_in_every_epoch():
    tight = replace(ROOMY, room=21 * GB)
    assert not tight.fits
    assert ROOMY.fits
    assert tight.missing == pytest.approx(20 * GB)  # half of it, in random order
    assert reading_seconds(tight, [20.0] * 3) == pytest.approx(3 * (200 - 20))
    window = replace(tight, random_order=False)
    assert window.missing == 40 * GB  # all of it, in large reads
    assert reading_seconds(window, [20.0] * 3) == pytest.approx(3 * (80 - 20))


# ---- advice --------------------------------------------------------------------------------------

MACHINE = report.Machine("a GPU", is_gpu=True, cores=16, workers=16, ranks=1)
FITS = report.Memory(peak=6 * GB, capacity=16 * GB, micro_batch=256, asked=256)


WAYS = {"eager": 0.052, "compiled": 0.041}


def make_plan(*flags, memory=FITS, machine=MACHINE, data=ROOMY, times=(SMALL, LARGE), ways=WAYS):
    cfg = train_imagenet.read_config(
        train_imagenet.SETTINGS, list(flags), prog="test", description=""
    )
    predicted = predict([64, 64, 128], [100] * 3, 100, list(times), COSTS, data, 10)
    found = (predicted, list(times), COSTS, data, memory, machine)
    found = (*found, work_of(cfg), 118.0, 256, ways)
    return report.Plan(cfg, train_imagenet.augment_of(cfg), *found)


def first_advice(*flags, **parts):
    return report.advise(make_plan(*flags, **parts))[0]


def test_the_most_urgent_fault_is_named_first_with_a_value():
    starved = [replace(t, loader=2 * t.step, together=2 * t.step) for t in (SMALL, LARGE)]
    few = replace(MACHINE, workers=2)
    cases = {
        "training.micro_batch_size=64": dict(memory=replace(FITS, micro_batch=64)),
        "training.micro_batch_size=128": dict(memory=replace(FITS, peak=15 * GB)),
        "data.in_memory=false": dict(data=replace(ROOMY, room=8 * GB)),
        "data.in_memory=true": dict(data=replace(ROOMY, random_order=False)),
        "data.num_workers=16": dict(times=starved, machine=few),
        "write.max_side=192": dict(times=starved),
    }
    for setting, parts in cases.items():
        assert first_advice(**parts).setting == setting
    by_flag = {
        "data.backend=ffcv": "--data.backend=torchvision",
        "augment.policy=rand_augment_lite": "--augment.policy=rand_augment",
    }
    for setting, flag in by_flag.items():
        assert first_advice(flag, times=starved).setting == setting
    healthy = [replace(t, together=t.step, loader=t.step / 3) for t in (SMALL, LARGE)]
    assert first_advice("--training.compile=off", times=healthy).setting == "training.compile=auto"
    slower = {"eager": 0.041, "compiled": 0.052}
    assert first_advice(times=healthy, ways=slower).setting == "training.compile=off"
    assert first_advice("--training.compile=off", times=healthy, ways=slower).setting == ""
    assert first_advice("--training.compile=off", times=healthy, ways={}).setting == ""
    assert first_advice(times=healthy).setting == ""


def test_a_plan_whose_rounds_differ_gives_a_range():
    unsure = [replace(SMALL, spread=0.1), replace(LARGE, spread=0.44)]
    plan = make_plan(times=unsure)
    total = plan.forecast.seconds
    page = report.render(plan)
    least, most = report.duration(0.78 * total), report.duration(1.22 * total)
    assert f"not sure:     {least} to {most}: the machine was busy" in page
    for spread in (0.2, None):  # within 10 %, or one round
        calm = [replace(t, spread=spread) for t in (SMALL, LARGE)]
        assert "not sure" not in report.render(make_plan(times=calm))


def test_the_page_says_everything():
    page = report.render(make_plan())
    for words in (
        "16.0 epochs of 160 px, evaluation adds 2.5%",
        "training, 64 px, epochs 1 to 2",
        "training, 128 px, epoch 3",
        "evaluation, 3 times",
        "1,000 ms per step, 256 images/s",
        "total ",
        "bottleneck:   the step, 2.0 times the loader's time",
        "fits into 64 GB",
        "random (data.in_memory=true)",
        "large reads 500 MB/s, images 100 MB/s",
        "256 images per forward pass: fits, 6.00 of 16.0 GB of the GPU",
        "compile:      eager 52.0 ms, compiled 41.0 ms, at 128 px",
        "change first: ",
    ):
        assert words in page
    bad = make_plan(
        memory=replace(FITS, micro_batch=64), data=replace(ROOMY, room=GB, sequential=None)
    )
    for words in (
        "does NOT fit; 64 images",
        "does NOT fit into 1.00 GB",
        "quasi-random (data.in_memory=false)",
        "disk:         not measured",
    ):
        assert words in report.render(bad)
    json.dumps(bad.as_dict(), allow_nan=False)


# ---- measuring -----------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    session = measure.Session(None, None, SimpleNamespace(world_size=1), 1.0, lambda line: None)
    session.model, session.state = torch.nn.Linear(1, 1), SimpleNamespace(micro_batch=96)
    tried = []

    def act():
        tried.append(session.state.micro_batch)
        if session.state.micro_batch > 24:
            raise torch.OutOfMemoryError

    session.fit_memory(act)
    assert tried == [96, 48, 24]
    assert measure.smaller_micro_batch(2) == measure.smaller_micro_batch(7) == 0
    session.state.micro_batch = 25  # no even divisor
    with pytest.raises(torch.OutOfMemoryError):
        session.fit_memory(act)


@pytest.mark.parametrize("compiled", [False, True])
def test_eager_and_compiled_take_turns_on_a_gpu(compiled, monkeypatch):
    session = measure.Session(None, None, SimpleNamespace(world_size=1), 1.0, lambda line: None)
    session.distributed.device = torch.device("cuda")
    network = torch.nn.Linear(1, 1)
    chosen = torch.compile(network) if compiled else network
    session.state = SimpleNamespace(train_model=chosen)
    turns = []

    def stepped(self, resolution, steps):
        turns.append(hasattr(session.state.train_model, "_orig_mod"))
        seconds = 0.1 if turns[2:] else 60.0  # the first compiles
        return measure.Pass(0.0, steps * seconds * (2 - turns[-1]), steps)

    monkeypatch.setattr(measure.Session, "stepped", stepped)
    assert session.measure_ways(64) == pytest.approx({"eager": 0.2, "compiled": 0.1})
    assert turns == [False, True] * 4 and session.state.train_model is chosen
    session.distributed.device = torch.device("cpu")
    assert session.measure_ways(64) == {}


class Simulated:
    """A machine on which nothing overlaps: a clock, a loader and a trainer that move it."""

    def __init__(self, steps: int) -> None:
        self.time, self.steps, self.fetched = 0.0, steps, []

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, resolution: int, start: int):
        self.fetched.append(self.steps - start)
        self.time += 2.0  # threads and buffers
        for _ in range(start, self.steps):
            self.time += 0.001 * resolution
            yield torch.zeros(1), torch.zeros(1), np.zeros(1)

    def train_epoch(self, state, batches, run):
        for step, _ in enumerate(batches):
            self.time += 0.01 * state.resolution
            run.after_step(step, torch.zeros(()), 0.1, images=1)

    def forward_backward(self, state, batch, step):
        raise AssertionError("a step is simulated")

    def prepare_network(self, state, resolutions, forward_backward):
        (state.resolution,) = resolutions
        self.time += 7.0


@pytest.fixture
def simulated_session(monkeypatch):
    return partial(session_of, monkeypatch)


def session_of(monkeypatch, seconds: float, cold: bool) -> measure.Session:
    machine = Simulated(steps=1000)
    monkeypatch.setattr(measure, "prepare_network", machine.prepare_network)
    ranks = SimpleNamespace(
        world_size=1, device=torch.device("cpu"), all_reduce_max=lambda value: value
    )
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: machine.time))
    session = measure.Session(machine, None, ranks, seconds, lambda line: None, cold)
    session.loader, session.model = machine, None
    session.state = SimpleNamespace(resolution=0)
    return session


def test_resolutions_are_timed_as_they_run(simulated_session):
    session = simulated_session(50.0, cold=False)
    (one,) = session.measure_training([32, 32, 32])
    assert one.resolution == 32
    assert one.step == pytest.approx(0.32)
    assert one.loader == pytest.approx(0.032)
    assert one.together == pytest.approx(0.352, rel=0.02)  # the first batch counts as waited for
    assert one.first_batch == pytest.approx(2.032)
    assert one.start == pytest.approx(7.0, abs=0.1)
    assert one.spread == pytest.approx(0, abs=0.02)
    assert 0.4 < one.steps * 0.352 / 50 < 0.6  # about the fraction that is meant


def test_data_on_the_disk_is_fetched_before_it_is_timed(simulated_session):
    session = simulated_session(500.0, cold=True)
    session.measure_training([32])
    passes = session.loader.fetched[2:]  # after the first steps
    whole = max(passes)
    before, after = passes[: passes.index(whole)], passes[passes.index(whole) + 1 :]
    assert before == [3 * 2**k for k in range(len(before))]
    assert whole > 20
    assert len(after) == 3 * measure.ROUNDS  # loader, a batch to keep, loader and step


def test_means_are_of_all_batches_together():
    passes = [measure.Pass(9.0, 2.0, 2), measure.Pass(9.0, 4.0, 1)]
    assert measure.mean_seconds(passes) == 2.0


def test_memory_is_that_of_the_container_where_it_is_less(tmp_path):
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    cgroup.mkdir()
    meminfo.write_text("MemTotal: 32000 kB\nMemAvailable:   16000 kB\n")
    assert available_memory(meminfo, cgroup) == 16000 * 1024
    (cgroup / "memory.max").write_text("10240000\n")
    (cgroup / "memory.stat").write_text("anon 240000\nfile 9000000\n")
    assert available_memory(meminfo, cgroup) == 10_000_000
    (cgroup / "memory.max").write_text("max\n")
    assert available_memory(meminfo, cgroup) == 16000 * 1024


def test_a_file_is_found_in_the_page_cache_and_timed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    assert storage.fraction_resident(path) == 1.0  # just written
    offsets = np.arange(0, 3 << 20, 50_000)
    large, single = storage.reading_rates(path, offsets, np.full(len(offsets), 40_000), 2)
    assert large > 0
    assert single > 0
    path.write_bytes(bytes(9 << 20)[: (8 << 20) + 5])  # the last page is not whole
    assert storage.reading_rates(path, np.array([5]), np.array([4096]), 1)[1] > 0
    assert storage.reading_rates(path, np.array([5 << 20]), np.array([9]), 2) == (None, None)


def test_the_memory_of_a_step_is_its_peak_above_what_there_was():
    """In a process of its own: this one may give memory back meanwhile."""
    code = """
import numpy as np
from fast_imagenet import machine as measure
held = np.ones(30 << 20, np.uint8)
taken = measure.memory_taken(lambda: np.ones(50 << 20, np.uint8).sum())  # freed at the end
assert 45 << 20 < taken < 55 << 20, taken
assert measure.memory_taken(lambda: None) < 1 << 20
assert measure.process_memory("RssAnon", "RssShmem") > held.size
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)


# ---- the command ---------------------------------------------------------------------------------


def command(tiny_beton, tmp_path, *flags):
    return [
        *(sys.executable, "-m", "tools.plan", "--config=demo.yaml", f"--config={SMOKE}"),
        *(f"--data.{split}_dataset={tiny_beton / f'{split}.beton'}" for split in ("train", "val")),
        *("--training.max_steps=0", "--training.epochs=3", "--seconds=1"),
        *("--resolution.max_res=64", "--resolution.end_ramp=2", "--lr.lr_peak_epoch=1"),
        "--validation.every=1",
        *(f"--logging.folder={tmp_path / 'run'}", f"--json={tmp_path / 'plan.json'}", *flags),
    ]


@pytest.mark.slow
def test_a_small_plan_prints_all_parts_and_leaves_nothing(tiny_beton, tmp_path, capsys):
    plan_command.main(command(tiny_beton, tmp_path)[3:])
    page = capsys.readouterr().out
    for words in ("training, 32 px, epoch 1", "training, 64 px, epochs 2 to 3",
                  "evaluation, 3 times", "start-up", "total", "bottleneck:", "data:", "disk:",
                  "batch:", "change first:"):  # fmt: skip
        assert words in page
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [t["resolution"] for t in found["times"]] == [32, 64]
    steps = [row["steps"] for row in found["forecast"]["rows"] if row["times"]]
    assert sum(steps) == 3 * (80 // 16)
    for one in found["times"]:
        assert min(one["step"], one["loader"], one["together"], one["first_batch"]) > 0
        assert one["together"] >= one["loader"]
    assert found["memory"]["peak"] > 1e8
    assert found["storage"]["fits"]
    assert found["forecast"]["seconds"] == pytest.approx(
        sum(row["seconds"] for row in found["forecast"]["rows"])
    )


@pytest.mark.slow
def test_an_epoch_of_one_step_is_planned(tiny_beton, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "SLOWEST_STEP", 1e9, raising=False)  # on any machine
    flags = ["--training.batch_size=80", "--seconds=20", "--resolution.max_res=32"]
    plan_command.main(command(tiny_beton, tmp_path, *flags)[3:])
    page = capsys.readouterr().out
    assert "bottleneck:   not known: an epoch is one batch" in page and "total" in page


@pytest.mark.slow
def test_a_slow_machine_is_measured_with_fewer_images(tiny_beton, tmp_path, capsys, monkeypatch):
    """A stand-in: each image of a step takes 20 ms, and they are counted."""
    step, trained = train_imagenet.forward_backward, []

    def slow(state, batch, number):
        trained.append(len(batch[0]))
        time.sleep(0.02 * len(batch[0]))
        return step(state, batch, number)

    monkeypatch.setattr(train_imagenet, "forward_backward", slow)
    plan_command.main(command(tiny_beton, tmp_path)[3:])
    page = capsys.readouterr().out
    assert sum(trained) < 130 and "extrapolated: a step was measured on 2 images, as 16" in page
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["measured_batch"] == 2
    assert all(one["step"] > 16 * 0.02 for one in found["times"])
    assert all(one["steps"] < 20 for one in found["times"])
    rows = [row for row in found["forecast"]["rows"] if row["times"]]
    assert sum(row["steps"] for row in rows) == 3 * (80 // 16)
    assert sum(row["seconds"] for row in rows) > 15 * 16 * 0.02


@pytest.mark.slow
def test_a_step_that_does_not_fit_into_memory_is_not_tried(tiny_beton, tmp_path):
    """In a process of its own: memory that earlier tests have given back would count as room."""
    flags = ["--resolution.min_res=160", "--resolution.max_res=160", "--seconds=9"]
    code = f"""
import train_imagenet
from tools.plan import __main__ as plan_command
plan_command.available_memory = lambda *_: 30_000_000
step = train_imagenet.forward_backward
def noted(state, *batch):
    print("trained on", state.micro_batch)
    return step(state, *batch)
train_imagenet.forward_backward = noted
plan_command.main({command(tiny_beton, tmp_path, *flags)[3:]})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "16 images per forward pass: does NOT fit" in done.stdout
    assert "training.micro_batch_size=" in done.stdout and "trained on 16\n" not in done.stdout
    assert "trained on " in done.stdout


def test_fewer_images_are_whole_forward_passes_or_an_even_part_of_one():
    assert measure.fewer_images(256, 256, 17) == 16
    assert measure.fewer_images(256, 32, 100) == 96
    assert measure.fewer_images(256, 32, 31) == 30
    assert measure.fewer_images(255, 255, 0) == 2


def test_mistakes_are_reported_as_by_the_trainer(tiny_beton, tmp_path, capsys):
    flags = command(tiny_beton, tmp_path)[3:]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("{}\n")
    plan_command.read_settings(train_imagenet, flags)  # a plan of a run that is there is no fault
    wrong = [*flags, "--data.train_dataset=nowhere.beton", "--training.eval_only=1"]
    wrong += ["--json=nowhere/plan.json"]
    with pytest.raises(SystemExit, match="2"):
        plan_command.read_settings(train_imagenet, wrong)
    printed = capsys.readouterr().err
    assert "data.train_dataset=nowhere.beton does not exist: run write_dataset.py" not in printed
    assert "training.eval_only trains nothing" in printed
    assert "--json=nowhere/plan.json" in printed
    with pytest.raises(SystemExit, match="2"):
        plan_command.read_settings(train_imagenet, [*flags, "--data.train_dataset=nowhere.beton"])
    printed = capsys.readouterr().err
    assert "data.train_dataset=nowhere.beton does not exist: run write_dataset.py" in printed


def test_a_damaged_file_ends_it_with_a_sentence(tiny_beton, tmp_path):
    broken = tmp_path / "broken.beton"
    broken.write_bytes((tiny_beton / "train.beton").read_bytes()[:5000])
    flags = command(tiny_beton, tmp_path, f"--data.train_dataset={broken}")[3:]
    with pytest.raises(ValueError, match=r"broken\.beton"):
        plan_command.main(flags)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.beton"]


@pytest.mark.slow
def test_an_interrupt_ends_it_and_leaves_nothing(tiny_beton, tmp_path):
    flags = command(tiny_beton, tmp_path, "--seconds=600")
    options = dict(cwd=ROOT, stderr=subprocess.PIPE, text=True)
    # below nohup or a background shell, Ctrl-C would be ignored by inheritance
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(flags, stdout=subprocess.DEVNULL, **options) as process:
        for line in process.stderr:
            if "round" in line:
                break
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert printed.endswith("plan: interrupted, nothing is left behind\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_loader_that_hangs_ends_the_plan_and_leaves_nothing_behind(tiny_beton, tmp_path):
    code = """
import runpy, sys, time
from fast_imagenet.data.torch_loader import TorchTrainLoader
TorchTrainLoader.epoch = lambda *_: iter(lambda: time.sleep(600), 0)
sys.argv = ["plan", *sys.argv[1:]]
runpy.run_module("tools.plan", run_name="__main__")
"""
    flags = [f"--config={SMOKE}", "--model.arch=timm/test_resnet"]
    flags += [f"--data.{s}_dataset={tiny_beton}/{s}.beton" for s in ("train", "val")]
    flags += ["--data.backend=torchvision", "--data.timeout=4", f"--logging.folder={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == STALLED, done.stderr
    assert "no batch came for 4 s" in done.stderr and "start the command again" in done.stderr
    assert not list(tmp_path.iterdir())
