"""The record of a run: the same keys every line, torn lines, resuming, and nothing private."""

import getpass
import json
import os
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from fast_imagenet import environment as environment_module
from fast_imagenet.engine import logger as runlog
from fast_imagenet.engine import metrics, plots
from fast_imagenet.engine.json_lines import RunLogError, read_jsonl
from fast_imagenet.engine.logger import LOG_KEYS, RunLog
from fast_imagenet.engine.plots import plot_curves
from fast_imagenet.engine.progress import accuracy_text
from fast_imagenet.environment import REPOSITORY, redact_paths
from tests.figures import check_figure
from tools.report.records import read_run


def record(epoch, **changes):
    values = {key: float(i) + 0.5 for i, key in enumerate(LOG_KEYS)}
    return values | {"epoch": epoch, "resolution": 160, "total_seconds": 60.0 * epoch} | changes


def open_log(folder, **options):
    return RunLog(folder, **{"config": {"training": {"epochs": 3}}} | options)


def logging(**settings):
    return {"logging": settings}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files(tmp_path):
    log = open_log(tmp_path / "runs" / "a")
    for epoch in (1, 2):
        log.write(**record(epoch))
    log.finish({"top1": 71.5})
    folder = tmp_path / "runs" / "a"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "curves.png",
        "environment.json",
        "log.jsonl",
        "summary.json",
    ]
    assert lines_of(folder) == [record(1), record(2)]
    assert json.loads((folder / "config.json").read_text()) == {"training": {"epochs": 3}}
    assert json.loads((folder / "summary.json").read_text()) == {"top1": 71.5}


def test_each_line_is_on_disk_at_once(tmp_path, monkeypatch):
    log, synced = open_log(tmp_path), []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(real(fd)))
    log.write(**record(1))
    assert synced
    assert lines_of(tmp_path) == [record(1)]


def test_numbers_of_numpy_and_torch_become_plain(tmp_path):
    log = open_log(tmp_path)
    log.write(**record(np.int64(1), lr=np.float32(0.5), top1=np.float64(3.25), note="x"))
    assert lines_of(tmp_path)[0] == record(1, lr=0.5, top1=3.25, note="x")


@pytest.mark.parametrize(
    "bad", [None, float("nan"), float("inf"), np.float32("nan"), torch.ones(1), [1]]
)
def test_values_that_are_no_finite_number_are_refused_by_name(tmp_path, bad):
    log = open_log(tmp_path)
    with pytest.raises(RunLogError, match="log key val_loss is"):
        log.write(**record(1, val_loss=bad))
    assert not (tmp_path / "log.jsonl").exists()


def test_every_line_has_the_same_keys(tmp_path):
    log = open_log(tmp_path)
    with pytest.raises(RunLogError, match="lr, resolution is missing"):
        log.write(**{k: v for k, v in record(1).items() if k not in ("lr", "resolution")})
    log.write(**record(1, extra=1))
    with pytest.raises(RunLogError, match="extra is missing and other is new"):
        log.write(**record(2, other=1))
    again = open_log(tmp_path, resume=True)
    with pytest.raises(RunLogError, match="extra is missing"):
        again.write(**record(2))
    again.write(**record(2, extra=2))
    assert [list(line) for line in lines_of(tmp_path)] == [list(record(1, extra=1))] * 2


def test_with_an_ema_raw_weights_come_with_the_last_line(tmp_path):
    raw = set(metrics.raw_keys())
    part = {key: value for key, value in record(1).items() if key not in raw}
    with pytest.raises(RunLogError, match="plain_top1, top1.* is missing"):
        open_log(tmp_path / "none").write(**part)
    config = {"training": {"epochs": 3}, "ema": {"decay": 0.9}}
    open_log(tmp_path, config=config).write(**part)
    log = open_log(tmp_path, config=config, resume=True)
    with pytest.raises(RunLogError, match="ema_top1 is missing"):
        log.write(**{key: value for key, value in part.items() if key != "ema_top1"})
    plot_curves(tmp_path / "log.jsonl", tmp_path / "c.png")
    for line in (part | {"epoch": 2}, record(3)):
        log.write(**line)
    log.finish({})
    plain, other = (f"EMA {part[f'ema_{view}top1']:.2f} %" for view in ("plain_", ""))
    assert accuracy_text(part) == f"{plain} standard eval, {other} config eval"
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = read_run(tmp_path)
    assert run.column("ema_top1") and run.numbers["config"] == record(3)["ema_top1"]
    assert (tmp_path / "curves.png").exists()
    assert json.loads((tmp_path / "environment.json").read_text())["record_version"] == 2


# ------------------------------------------------------------------------------------------------
# Resuming
# ------------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_refused_unless_resumed(tmp_path):
    open_log(tmp_path).write(**record(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunLogError, match=r"already holds a run.*training.resume=auto.*folder"):
        open_log(tmp_path, config={})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    open_log(tmp_path, resume=True).write(**record(2))
    assert lines_of(tmp_path) == [record(1), record(2)]


def test_resuming_nothing_is_a_fresh_start(tmp_path):
    log = open_log(tmp_path / "new", resume=True)
    log.truncate_after(0)
    log.write(**record(1))
    assert lines_of(tmp_path / "new") == [record(1)]


def test_epochs_done_again_lose_their_old_lines(tmp_path):
    log = open_log(tmp_path)
    for epoch in (1, 2, 3):
        log.write(**record(epoch))
    log = open_log(tmp_path, resume=True)
    log.truncate_after(1)
    log.write(**record(2, top1=99.0))
    assert lines_of(tmp_path) == [record(1), record(2, top1=99.0)]


@pytest.mark.parametrize("cut", [1, 5, 300])
def test_a_torn_last_line_is_dropped_with_a_warning(tmp_path, cut):
    log = open_log(tmp_path)
    log.write(**record(1))
    log.write(**record(2))
    content = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(content[:-cut])
    with pytest.warns(UserWarning, match=r"last line of .*log.jsonl is incomplete"):
        log = open_log(tmp_path, resume=True)
    log.write(**record(2, lr=7.0))
    assert lines_of(tmp_path) == [record(1), record(2, lr=7.0)]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    log = open_log(tmp_path)
    log.write(**record(1))
    (tmp_path / "log.jsonl").write_text("{oops\n" + (tmp_path / "log.jsonl").read_text())
    with pytest.raises(RunLogError, match=r"line 1 of .*log.jsonl is damaged"):
        open_log(tmp_path, resume=True).truncate_after(0)


def test_losses_of_steps_replace_those_done_again(tmp_path):
    log = open_log(tmp_path)
    log.write_steps(0, [1.0, 2.0, 3.0])
    log.write_steps(3, [4.0, 5.0, 6.0])
    written = read_jsonl(tmp_path / "steps.jsonl")
    assert [line["losses"] for line in written] == [[1, 2, 3], [4, 5, 6]]
    log = open_log(tmp_path, resume=True)
    log.write_steps(4, [50.0, 60.0, 70.0])
    series = [
        (line["first_step"] + i, loss)
        for line in read_jsonl(tmp_path / "steps.jsonl")
        for i, loss in enumerate(line["losses"])
    ]
    assert series == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 50), (5, 60), (6, 70)]
    with pytest.raises(RunLogError, match="loss of step 8 is nan"):
        log.write_steps(7, [1.0, float("nan")])


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "a", enabled=False, config=logging(wandb="x"))
    log.write(**record(1))
    log.write_steps(0, [1.0])
    log.truncate_after(0)
    log.finish({})
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------------------------------------
# Where it ran
# ------------------------------------------------------------------------------------------------


def test_environment_has_what_is_needed_and_nothing_private(tmp_path):
    open_log(tmp_path)
    text = (tmp_path / "environment.json").read_text()
    where = json.loads(text)
    assert where["torch"]
    assert where["python"] == ".".join(map(str, sys.version_info[:3]))
    assert where["cores"] >= 1
    assert where["ram_gb"] > 0
    assert where["device"]
    assert None not in where.values()
    words = set(text.replace('"', " ").replace(",", " ").split())
    assert not {socket.gethostname(), getpass.getuser()} & words
    assert "/" not in text


def test_commit_and_dirty_flag_are_gits(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", tmp_path, *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(environment_module, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment_module.environment()["commit"] == "unknown"
    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-q", "-m", "a")
    where = environment_module.environment()
    assert where["commit"] == git("rev-parse", "HEAD")
    assert where["dirty"] is False
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "summary.json").write_text("{}")
    assert environment_module.environment()["dirty"] is False  # a study's earlier runs are no code
    (tmp_path / "records.py").write_text("1")
    assert environment_module.environment()["dirty"] is True
    (tmp_path / "records.py").unlink()
    (tmp_path / "a.py").write_text("2")
    assert environment_module.environment()["dirty"] is True


def test_a_run_resumed_elsewhere_keeps_both_environments(tmp_path, monkeypatch):
    for device in ("one", "one", "two", "three"):
        monkeypatch.setattr(environment_module, "_device_name", lambda device=device: device)
        open_log(tmp_path, resume=True)
    where = json.loads((tmp_path / "environment.json").read_text())
    assert where["device"] == "three"
    assert [old["device"] for old in where["earlier"]] == ["one", "two"]


def test_settings_name_the_data_and_are_read_without_private_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paths.json").write_text("{}")  # of an older version, now out of date
    data = {"train_dataset": "a.beton", "val_dataset": str(REPOSITORY / "data" / "b.beton")}
    config = {"data": data, "model": {"checkpoint": "~/c.pt", "list": ["data/d.pt", 3, None]}}
    log = open_log(tmp_path, config=config, resume=True)
    log.write(**record(1))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == config | {"data": data | {"train_dataset": str(tmp_path / "a.beton")}}
    assert not (tmp_path / "paths.json").exists()
    assert (
        read_run(tmp_path).settings
        == redact_paths(written)
        == {
            "data": {"train_dataset": ".../a.beton", "val_dataset": "data/b.beton"},
            "model": {"checkpoint": ".../c.pt", "list": ["data/d.pt", 3, None]},
        }
    )


# ------------------------------------------------------------------------------------------------
# TensorBoard, W&B, curves
# ------------------------------------------------------------------------------------------------


def test_tensorboard_holds_the_record_once_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = open_log(tmp_path, config=logging(tensorboard=True), steps=60)
    log.show_images(np.zeros((4, 8, 8, 3), np.uint8))
    for epoch in (1, 2, 3):
        log.log_step(60 * epoch - 10, loss=epoch / 2)
        log.write(**record(epoch, top1=epoch * 10.0))
    log.close()
    log = open_log(tmp_path, config=logging(tensorboard=True), resume=True, steps=60)
    log.truncate_after(2)
    log.log_step(170, loss=7.0)
    log.write(**record(3, top1=77.0))
    log.close()  # killed before its end, which another process makes up for
    log = open_log(tmp_path, config=logging(tensorboard=True), resume=True, steps=60)
    log.finish({"epoch": 3, "top1": 77.0})
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()["scalars"]
    evaluated = {key for key in LOG_KEYS if "top" in key or "val_loss" in key} | {"eval_seconds"}
    assert {tag.partition("/")[2] for tag in tags if tag.startswith("val/")} == evaluated
    of_steps = {"lr", "images_per_second"}  # the record would repeat them
    trained = set(LOG_KEYS) - evaluated - {"epoch"} - of_steps | {"loss"}
    assert {tag.partition("/")[2] for tag in tags if tag.startswith("train/")} == trained
    tops = [(e.step, e.value) for e in events.Scalars("val/top1")]
    assert tops == [(60, 10), (120, 20), (180, 77)]
    losses = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert losses == [(50, 0.5), (110, 1.0), (170, 7.0)]
    (image,) = events.Images("train/images")
    assert (image.width, image.height, image.step) == (16, 16, 0)
    (table,) = events.Tensors("val/summary/text_summary")
    assert b"| top1 | 77.0 |" in table.tensor_proto.string_val[0] and table.step == 180


def test_no_tensorboard_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = open_log(tmp_path, config=logging(tensorboard=True))
    log.write(**record(1))
    assert not list(tmp_path.glob("events*"))


def test_wandb_absent_is_reported_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunLogError, match=r"logging.wandb=imagenet needs the package wandb"):
        open_log(tmp_path, config=logging(wandb="imagenet"))


def fake_wandb(monkeypatch):
    """What wandb.init is called with, and what is logged: (step, values)."""
    starts, logged = [], []

    def init(**options):
        starts.append(options)
        return types.SimpleNamespace(
            log=lambda values, step=None: logged.append((step, values)), finish=lambda: None
        )

    def table(columns, data):
        return columns, data

    fake = types.SimpleNamespace(init=init, Image=lambda image: image, Table=table)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return starts, logged


def test_wandb_gets_the_record_and_resumes_the_same_run(tmp_path, monkeypatch):
    starts, logged = fake_wandb(monkeypatch)
    for epoch in (1, 2):
        log = open_log(tmp_path, config=logging(wandb="p"), resume=True, steps=60)
        log.write(**record(epoch))
        log.close()
    assert [start["project"] for start in starts] == ["p", "p"]
    assert starts[0]["id"] == starts[1]["id"]
    assert starts[0]["id"]
    assert [step for step, _ in logged] == [60, 120]
    assert logged[1][1]["val/top1"] == record(2)["top1"]
    assert logged[1][1]["train/memory_gb"] == record(2)["memory_gb"]


def test_wandb_gets_steps_images_and_a_table(tmp_path, monkeypatch):
    _, logged = fake_wandb(monkeypatch)
    log = open_log(tmp_path, config=logging(wandb="p"))
    images_bhwc = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), "u1")
    log.show_images(images_bhwc)
    log.log_step(50, loss=0.5, lr=0.1, images_per_second=9.0)
    log.write(**record(1))
    log.finish({"top1": 71.5, "out": "/home/someone/x"})
    (zero, first), (step, values), _, (_, last) = logged
    grid_hw = first["train/images"][:, :, 0]
    assert zero == 0 and grid_hw[::2, ::3].tolist() == [[0, 1], [2, 3]] and grid_hw.shape == (4, 6)
    assert step == 50
    assert values == {"train/loss": 0.5, "train/lr": 0.1, "train/images_per_second": 9.0}
    assert last["val/summary"] == (["key", "value"], [["top1", "71.5"], ["out", ".../x"]])
    log.log_step(100, loss=0.5)  # closed
    assert len(logged) == 4


@pytest.mark.parametrize(("epochs", "ema"), [(1, False), (40, True)])
def test_curves_are_drawn(tmp_path, epochs, ema):
    log = open_log(tmp_path)
    for epoch in range(1, epochs + 1):
        values = record(epoch)
        same = {f"ema_{key}": values[key] for key in ("top1", "top5", "plain_top1", "plain_top5")}
        same["val_loss_ema"] = values["val_loss"]
        log.write(**(values if ema else values | same))
    plot_curves(tmp_path / "log.jsonl", tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert image.width > 1000
        assert image.height > (1000 if epochs > 1 else 400)
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert {(27, 79, 145), (232, 132, 44), (47, 143, 91)} <= colors
    check_figure(plots.draw_curves(lines_of(tmp_path), [{"first_step": 0, "losses": [2.0, 1.0]}]))


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize(
    "missing",
    [
        ("train_loss", "val_loss", "val_loss_ema"),
        ("ema_top1", "ema_plain_top1", "val_loss_ema"),
        ("top1", "ema_top1"),
        ("total_seconds",),
        ("images_per_second", "data_wait_share", "lr", "resolution", "memory_gb"),
        tuple(key for key in LOG_KEYS if key not in ("epoch", "plain_top1")),
    ],
)
def test_curves_of_another_version_show_what_there_is(missing, epochs):
    line = record(1, top1=60.0, lr=0.1)
    short = {key: value for key, value in line.items() if key not in missing}
    # two epochs: the second was resumed by the other version
    check_figure(plots.draw_curves([short, line | {"epoch": 2}][:epochs], []))


def test_the_loss_of_a_step_stands_where_the_step_ends():
    steps = [{"first_step": 0, "losses": [4.0, 3.0]}, {"first_step": 2, "losses": [2.0, 1.0]}]
    figure = plots.draw_curves([record(1), record(2)], steps)
    curves = [line for axes in figure.axes for line in axes.lines]
    (every,) = [line for line in curves if line.get_label() == "training, every step"]
    assert [*every.get_xdata()] == [0.5, 1.0, 1.5, 2.0]


def test_curves_of_nothing(tmp_path):
    with pytest.raises(RunLogError, match="is empty"):
        plot_curves(tmp_path / "log.jsonl", tmp_path / "c.png")


@pytest.mark.parametrize("content", [b"\xff\xfe{}\n", b"[1]\n", b"nope\n"])
@pytest.mark.parametrize("name", ["log.jsonl", "steps.jsonl", "environment.json"])
def test_a_file_edited_by_hand_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunLogError, match=rf"{name} is damaged .*; restore it or delete it"):  # noqa: PT012
        log = RunLog(tmp_path, resume=True)
        log.truncate_after(0)
        log.write_steps(0, [1.0])


@pytest.mark.parametrize(
    "name, content",
    [
        ("log.jsonl", b"{}\n"),
        ("log.jsonl", b'{"epoch": "one"}\n'),
        ("log.jsonl", b"[" * 100_000 + b"\n"),
        ("steps.jsonl", b'{"first_step": "0", "losses": []}\n'),
        ("steps.jsonl", b'{"first_step": 0, "losses": 5}\n'),
    ],
)
def test_a_log_of_other_things_is_refused_before_the_run(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunLogError, match=rf"line 1 of .*{name} is damaged .*; restore it or"):
        RunLog(tmp_path, resume=True)
    assert (tmp_path / name).read_bytes() == content


def test_a_lost_log_has_no_last_line(tmp_path):
    with pytest.raises(RunLogError, match=r"log\.jsonl has lost its lines; restore it"):
        RunLog(tmp_path, resume=True).last()


def test_equal_curves_of_accuracy_are_drawn_once_under_both_names():
    lines = [dict.fromkeys(LOG_KEYS, 10.0 * epoch) | {"epoch": epoch} for epoch in (1, 2)]
    axes = plots.draw_curves(lines, []).axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["standard eval and config eval: 20.00 %"]


# ------------------------------------------------------------------------------------------------
# A logger and a metric more
# ------------------------------------------------------------------------------------------------


def test_a_logger_is_one_class_and_one_row(tmp_path, monkeypatch):
    lines = []

    class Listed(runlog.Sink):
        def write(self, record):
            lines.append(record)

        def close(self):
            lines.append("closed")

    monkeypatch.setattr(runlog, "SINKS", (*runlog.SINKS, Listed))
    log = open_log(tmp_path)
    log.write(**record(1))
    log.finish({})
    assert lines == [record(1), "closed"]


class Confidence(metrics.Metric):
    """Mean probability of the best class."""

    name, since = "confidence", metrics.RECORD_VERSION + 1

    def add(self, logits_bk, labels_b):
        self.sum += logits_bk.softmax(1).amax(1).sum()


@pytest.fixture
def one_more_metric(monkeypatch):
    def add():
        monkeypatch.setattr(metrics, "METRICS", [*metrics.METRICS, Confidence])
        for module in (metrics, runlog):
            monkeypatch.setattr(module, "RECORD_VERSION", Confidence.since)

    return add


def test_a_metric_is_one_class_and_one_row(tmp_path, one_more_metric):
    one_more_metric()
    score = metrics.Score(torch.device("cpu"))
    score.add(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    scores = {"standard": score.read(), "config": score.read()}
    values = record(1) | metrics.evaluation_record(scores, scores)
    assert values["confidence"] == values["ema_plain_confidence"] == 0.25
    log = open_log(tmp_path)
    with pytest.raises(RunLogError, match="plain_confidence, confidence"):
        log.write(**record(1))
    log.write(**values)
    assert read_run(tmp_path).log[0]["ema_confidence"] == 0.25


def test_a_record_of_an_older_version_is_read_and_resumed(tmp_path, one_more_metric):
    open_log(tmp_path).write(**record(1))
    where = tmp_path / "environment.json"
    content = json.loads(where.read_text())
    version = content.pop("record_version")
    if version == 1:  # as records were before they had a version
        where.write_text(json.dumps(content))
    one_more_metric()
    assert read_run(tmp_path).log == [record(1)]
    log = open_log(tmp_path, resume=True)
    written = log.write(**record(2) | dict.fromkeys(Confidence.log_keys(), 0.5))
    log.finish(written)
    assert not Confidence.log_keys().keys() & written.keys()
    assert lines_of(tmp_path) == [record(1), record(2)]  # the run keeps its version
    assert json.loads(where.read_text())["record_version"] == version


def test_committed_records_are_readable_when_a_metric_is_added(one_more_metric):
    one_more_metric()
    logs = sorted((REPOSITORY / "records").glob("*/*/*/log.jsonl"))
    assert logs and all(read_run(log.parent).log for log in logs)
