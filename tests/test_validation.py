"""Settings that are valid one by one and impossible together; and a warm-up without a trace."""

import dataclasses

import pytest
import torch
from torch import nn

import train_imagenet
from fast_imagenet.data.augmentation import Augment
from fast_imagenet.models.factory import warm_up
from fast_imagenet.validation import differences
from tests.test_shipped_configs import ROOT, SHIPPED
from tools.report.yaml_files import read_study
from tools.study import jobs_of

BAD_MIXES = ("mixup=1e-320", "cutmix=1e-308", "mixup=-1", "cutmix=1e308", "mixup=nan")
EVALUATE = ["--training.eval_only=1", "--model.checkpoint=LICENSE"]
# flags, and what the sentence must name
CASES = [
    (
        ["--data.in_memory=false", "--data.backend=torchvision"],
        "data.in_memory=false needs data.backend=ffcv",
    ),
    (["--resolution.min_res=128"], "resolution.min_res=128 is never used while"),
    (["--resolution.max_res=224"], "set it to resolution.max_res=224 too, or set the ramp"),
    *((["--augment." + mix], f"augment.{mix.split('=')[0]}") for mix in BAD_MIXES),
    (
        ["--training.batch_size=100", "--training.micro_batch_size=30"],
        "micro_batch_size=30 does not",
    ),
    (["--augment.mixup=0.2", "--training.batch_size=15"], "forward pass has 15"),
    (["--lr.lr_peak_epoch=16"], "lr.lr_peak_epoch=16.0 is not before the end"),
    (["--resolution.start_ramp=5", "--resolution.end_ramp=3"], "resolution.start_ramp=5 is after"),
    (["--augment.crop_min_area=0.5", "--augment.crop_max_area=0.2"], "crop_min_area=0.5 is above"),
    (["--data.transforms=gpu"], "needs data.backend=torchvision, not ffcv"),
    (["--training.eval_only=1"], "set model.checkpoint to a file"),
    (["--logging.eval_json=a.json"], "eval_json=a.json is written by training.eval_only"),
    (
        [*EVALUATE, "--logging.eval_json=nowhere/a.json"],
        "nowhere is not a folder that can be",
    ),
    ([*EVALUATE, "--logging.eval_json=tests"], "logging.eval_json=tests is a folder: add the name"),
    (["--training.nesterov=1", "--training.momentum=0"], "training.momentum=0"),
    (["--training.nesterov=1", "--training.optimizer=lamb"], "nesterov belongs to"),
    (
        ["--training.blur_max_pool=1", "--training.use_blurpool=0"],
        "training.blur_max_pool is a part of training.use_blurpool",
    ),
    (
        ["--training.bce_threshold=0.2", "--training.label_smoothing=0"],
        "bce_threshold=0.2 is of binary losses",
    ),
    (["--training.bce_threshold=0.2", "--training.loss=bce"], "label_smoothing=0.1 has no effect"),
    (["--data.resize=area", "--data.backend=torchvision"], "data.resize=area needs"),
    (["--augment.flip_mode=alternating", "--augment.flip=0.3"], "augment.flip=0.3, but"),
    (["--ema.every=20"], "ema.every=20 needs an EMA, and ema.decay=0"),
    (["--logging.folder=/dev/null/run"], "logging.folder=/dev/null/run cannot be made"),
    (["--model.checkpoint=nowhere.pt"], "model.checkpoint=nowhere.pt is not a file"),
    (["--training.resume=nowhere.pt"], "training.resume=nowhere.pt is not a file"),
    (["--data.train_dataset=nowhere.beton"], "data.train_dataset=nowhere.beton does not exist"),
    (["--data.train_dataset=tests"], "or read it as it is with data.backend=torchvision"),
    (["--data.val_dataset=tests"], "data.val_dataset=tests is a folder, and data.backend=ffcv"),
    (["--model.arch=resnet5O"], "model.arch=resnet5O is not a classifier of torchvision or timm"),
    (["--model.arch=ResNet50"], "did you mean resnet50"),
    (["--model.arch=resnet-50"], "did you mean resnet50"),
    (["--model.arch=timm/resnet5O"], "classifier of timm; did you mean timm/resnet50"),
    (["--model.arch=torchvision/resnet50d"], "did you mean torchvision/resnet50 or"),
    (["--model.arch=resnet50.a1_in1kk"], "did you mean resnet50.a1_in1k or"),
    (["--model.arch=torchvision/resnet50.a1_in1k"], "not a classifier of torchvision"),
    (["--model.arch=keras/resnet50"], "keras/ is not a library; write NAME, torchvision/NAME or"),
    (["--model.arch=fcn_resnet50"], "not a classifier of torchvision or timm"),  # segmentation
    (["--model.arch=hf-hub:timm/resnet50"], "hf-hub:timm/ is not a library"),
    (["--model.arch="], "model.arch= is not a classifier"),
    ([f"--data.train_dataset={'x' * 300}"], "xxx: File name too long; check the path"),
    ([f"--data.train_dataset={'x' * 5000}"], "xxx...: File name too long; check the path"),
    (["--validation.batch_size=1000001"], "must be a whole number from 1 to 1000000"),
    ([f"--logging.folder={'x' * 300}/run"], "File name too long; check the path"),
]


AT_ONCE = (
    "keras/ is not a library; write NAME, torchvision/NAME or",
    "forward pass has 15",
    "lr.lr_peak_epoch=16.0 is not before the end",
    "resolution.start_ramp=5 is after",
    "crop_min_area=0.5 is above",
    "needs data.backend=torchvision, not ffcv",
)


@pytest.fixture
def data_flags(tmp_path):
    for name in ("train.beton", "val.beton"):
        (tmp_path / name).touch()
    folder = f"--logging.folder={tmp_path}/run"
    return [f"--data.{name}_dataset={tmp_path}/{name}.beton" for name in ("train", "val")] + [
        folder
    ]


def refusal(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        train_imagenet.read_settings(flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("flags, sentence", CASES, ids=[" ".join(case[0])[:40] for case in CASES])
def test_impossible_combination_is_named(data_flags, capsys, flags, sentence):
    text = refusal(capsys, [*data_flags, *flags])
    assert sentence in " ".join(text.split())
    assert "1 problem" in text


def test_all_of_them_at_once(data_flags, capsys):
    wrong = [number for number, case in enumerate(CASES) if case[1] in AT_ONCE]
    flags = [flag for case in wrong for flag in CASES[case][0]]
    text = " ".join(refusal(capsys, [*data_flags, *flags]).split())
    assert all(CASES[case][1] in text for case in wrong) and "6 problems" in text


def test_an_evaluation_is_not_refused_for_settings_of_the_training(
    data_flags, tmp_path, monkeypatch
):
    for name, text in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("WORLD_SIZE", "3")
    (tmp_path / "w.pth").touch()
    flags = [*data_flags, "--training.eval_only=1", f"--model.checkpoint={tmp_path}/w.pth"]
    for wrong in ("--training.batch_size=256", "--training.epochs=1", "--training.nesterov=1"):
        cfg = train_imagenet.read_settings([*flags, wrong, "--training.momentum=0"])
        assert cfg.training.eval_only
    monkeypatch.setenv("WORLD_SIZE", "0")
    with pytest.raises(SystemExit):
        train_imagenet.read_settings(flags)


def test_the_batch_must_divide_by_the_ranks(data_flags, capsys, monkeypatch):
    for name, text in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "does not divide by 3 ranks" in refusal(capsys, data_flags)
    monkeypatch.setenv("WORLD_SIZE", "0")
    assert "WORLD_SIZE='0'" in refusal(capsys, data_flags)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"RANK": "x"}, "RANK='x' in the environment is not a valid number: unset"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "9" * 20}, f"WORLD_SIZE='{'9' * 20}'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is in the environment and RANK, MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK=5 in the environment is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "no"}, "MASTER_PORT='no'"),
    ],
)
def test_an_environment_of_no_ranks_is_named(data_flags, capsys, monkeypatch, given, sentence):
    for name, text in given.items():
        monkeypatch.setenv(name, text)
    assert sentence in " ".join(refusal(capsys, data_flags).split())


def test_another_run_is_not_written_into(data_flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    (tmp_path / "other.pt").touch()
    for resume in ("none", str(tmp_path / "other.pt")):
        text = refusal(capsys, [*data_flags, f"--training.resume={resume}"])
        assert "already holds a run" in " ".join(text.split())


def test_evaluation_needs_no_training_data(data_flags, tmp_path):
    weights = tmp_path / "weights.pth"
    weights.touch()
    flags = ["--training.eval_only=1", f"--model.checkpoint={weights}", "--data.train_dataset=no"]
    assert train_imagenet.read_settings([*data_flags, *flags]).training.eval_only is True


def test_a_folder_that_holds_the_file_names_it(data_flags, tmp_path, capsys):
    text = " ".join(refusal(capsys, [*data_flags, f"--data.val_dataset={tmp_path}"]).split())
    assert f"data.val_dataset={tmp_path} is a folder" in text
    assert f"set it to {tmp_path}/val.beton" in text
    flags = ["--data.backend=torchvision", f"--data.val_dataset={tmp_path}"]
    assert train_imagenet.read_settings([*data_flags, *flags])


def test_every_shipped_config_and_plan_passes(data_flags, tmp_path):
    for path in SHIPPED:
        flags = [f"--config={path}", *data_flags]
        assert train_imagenet.read_settings(flags).training.epochs >= 1
    (weights := tmp_path / "weights.pt").touch()  # those of a plan are made before its runs
    for path in (ROOT / "records").glob("*/study.yaml"):
        for job in jobs_of(read_study(path), tmp_path, tmp_path / "runs", tmp_path):
            given = any(flag.startswith("--model.checkpoint=") for flag in job.flags)
            made = [f"--model.checkpoint={weights}"] * given
            assert train_imagenet.read_settings([*job.flags, *made])


def test_differences_leave_out_what_does_not_decide_the_weights():
    old = {"lr": {"lr": 0.1}, "data": {"num_workers": 2}, "logging": {"folder": "a"}}
    new = {"lr": {"lr": 0.2}, "data": {"num_workers": 8}, "logging": {"folder": "b"}}
    assert differences(old, new) == ["lr.lr: 0.1 -> 0.2"]
    assert differences(old, {**old, "ema": {"decay": 0.9}}) == ["ema.decay: None -> 0.9"]


def test_warm_up_visits_every_resolution_and_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    visited = []

    def step(side):
        visited.append(side)
        model(torch.randn(2, 3, side, side)).sum().backward()

    warm_up(step, model, [32, 64])
    assert visited == [32, 64]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_augmentation_is_a_setting():
    settings = {key for section, key in train_imagenet.SETTINGS.entries if section == "augment"}
    fields = {field.name for field in dataclasses.fields(Augment)} - {"crop_area", "resize"}
    assert settings == fields | {"crop_min_area", "crop_max_area"}
