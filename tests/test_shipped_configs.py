"""Every YAML file that we ship: it loads, says what to expect, and differs from its family as told.

That each of them also trains a step is tested in test_smoke.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fast_imagenet.config import read_config, to_dict, to_yaml
from fast_imagenet.config_list import PARTS, head_parts, head_text, hours_of, list_configs
from fast_imagenet.engine.work import IMAGENET_IMAGES, work_of

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("rn50_configs", "rn18_configs", "imagenette_configs")
SHIPPED = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.yaml"))
NAMES = [path.name for path in SHIPPED]

BUDGET = {"training.epochs", "logging.folder"}
FAMILIES = {
    r"rn50_\d+_epochs\.yaml": (
        ["rn50_16", "rn50_24", "rn50_32", "rn50_40", "rn50_56", "rn50_88"],
        BUDGET | {"resolution.start_ramp", "resolution.end_ramp"},
    ),
    r"rn50_\d+_epochs_mild\.yaml": (
        ["rn50_16", "rn50_24", "rn50_32", "rn50_40", "rn50_56"],
        BUDGET | {"resolution.start_ramp", "resolution.end_ramp", "lr.lr_peak_epoch"},
    ),
    r"rn18_\d+_epochs\.yaml": (
        ["rn18_16", "rn18_24", "rn18_32", "rn18_40", "rn18_56", "rn18_88"],
        BUDGET | {"resolution.start_ramp", "resolution.end_ramp"},
    ),
    r"rn50_128px_\d+_epochs\.yaml": (
        ["rn50_128px_5", "rn50_128px_20", "rn50_128px_80", "rn50_128px_200"],
        BUDGET,
    ),
}
BY_ANOTHER_RECIPE = {"rn50_300_epochs.yaml"}  # its name looks like one of the rn50 family
# for training, for validation; else ImageNet's
IMAGES = {"imagenette_configs": (9_469, 3_925), "demo.yaml": (4_000, 1_000)}
IMAGES["rn50_12_epochs_fine_tuning.yaml"] = (10_000, 2_000)
# images/s at 160 px of one RTX 5060 Ti, with BlurPool or without: estimates, one for all headers
RATES = {("resnet50", True): 1_000, ("resnet50", False): 1_225, ("resnet18", True): 2_750}


def settings(path: Path) -> SimpleNamespace:
    """The resolved settings of one file."""
    from train_imagenet import SETTINGS

    words = ["--config", str(path)]
    return read_config(SETTINGS, words, prog="train_imagenet.py", description="")


def read(path: Path) -> dict:
    """The same, flat: {'training.epochs': 16, ...}."""
    tree = to_dict(settings(path))
    return {f"{section}.{key}": v for section, keys in tree.items() for key, v in keys.items()}


def test_all_of_them_are_here():
    assert len(SHIPPED) == 34
    assert len(set(NAMES)) == 34, "a bare name would be found twice"


def test_no_yaml_of_a_run_lies_elsewhere():
    known = {*SHIPPED, ROOT / "environment.yml", ROOT / "tests" / "smoke.yaml"}
    skip = {"data", "runs", "records"}
    found = {p for end in ("yaml", "yml") for p in ROOT.rglob(f"[!.]*.{end}")
             if not any(x in skip or x[0] == "." for x in p.relative_to(ROOT).parts)}  # fmt: skip
    assert found - known == set()


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_it_loads_and_every_value_is_its_own(path):
    cfg = read(path)
    given = yaml.safe_load(path.read_text())
    assert cfg["logging.folder"] in (f"runs/{path.stem}", "runs/demo")
    assert set(given) <= {key.partition(".")[0] for key in cfg}
    assert cfg["resolution.min_res"] <= cfg["resolution.max_res"]
    assert cfg["lr.lr_peak_epoch"] < cfg["training.epochs"]


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_the_name_tells_the_network_and_the_epochs(path):
    cfg = read(path)
    if path.name == "demo.yaml":
        return
    depth, epochs = re.match(r"rn(\d+)_(?:\d+px_)?(\d+)_epochs", path.stem).groups()
    assert cfg["model.arch"].rpartition("/")[2] == f"resnet{depth}"
    assert cfg["training.epochs"] == int(epochs)
    if size := re.search(r"_(\d+)px_", path.stem):
        keys = ("resolution.max_res", "validation.resolution", "validation.plain_resolution")
        assert {cfg[key] for key in keys} == {int(size[1])}


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_its_header_says_what_to_expect_and_how_to_launch(path):
    text = head_text(path)
    launch = f"python train_imagenet.py --config {path.name}"
    assert launch in text
    assert re.findall(r"--config (\S+)", text) == [path.name]
    assert path.read_text().startswith("# ")
    for part in PARTS:
        assert text.count(f"{part}: ") == 1, f"{path.name} has no `{part}: `"
    parts, time = head_parts(path), text.split("Time: ")[1]
    assert tuple(parts) == PARTS
    assert re.search(r"top-1|unknown", parts["Expected"])
    assert f"{read(path)['training.epochs']} epochs" in text
    if "estimate" in time:
        assert re.search(r"(nobody has|was not|not) measured", time), "an estimate must say so"
    if "5060" in time:
        assert "estimate" in time, "nobody has timed it on that card"


def two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,g}"


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_its_header_has_the_pixels_the_evaluation_and_the_time_of_its_settings(path):
    cfg, text = settings(path), head_text(path)
    images = IMAGES.get(path.parent.name, IMAGENET_IMAGES)
    work = work_of(cfg, IMAGES.get(path.name, images))
    every, epochs = cfg.validation.every, cfg.training.epochs
    often = {1: "after every epoch", epochs: "after the last epoch"}
    assert work.evaluation_fraction <= 0.04, "evaluate less often"
    assert f"Pixels: {work.training:.1f} epochs of 160 px. Evaluation: " in text
    share = f"{100 * work.evaluation_fraction:.1f} % of the training's FLOPs"
    assert f"Evaluation: {share}, {often.get(every, f'every {every} epochs')}. " in text
    time = text.split("Time: ")[1]
    rate = float(re.search(r" estimate from ([\d,]+) images/s at 160 px", time)[1].replace(",", ""))
    hours = work.hours(rate)
    span = f"{two_digits(hours)} hours" if hours >= 1 else f"{two_digits(60 * hours)} minutes"
    days = f" ({two_digits(hours / 24)} days)" if hours > 48 else ""
    assert hours_of(path).partition(" on ")[0] == span + days
    if "RTX 5060 Ti" in time:
        arch = cfg.model.arch.rpartition("/")[2]
        assert rate == RATES[arch, cfg.training.use_blurpool]


def test_the_list_of_configs_has_all_of_them():
    lines = list_configs([ROOT / folder for folder in FOLDERS]).splitlines()
    listed = [line.split()[0] for line in lines if re.match("  [a-z]", line)]
    assert sorted(listed) == sorted(path.stem for path in SHIPPED)
    assert max(map(len, lines)) <= 100 and not any("not stated" in line for line in lines)


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_its_printed_settings_are_a_config_of_the_same_settings(path, tmp_path):
    (tmp_path / "printed.yaml").write_text(to_yaml(settings(path)))
    assert settings(tmp_path / "printed.yaml") == settings(path)


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_it_fits_one_consumer_gpu(path):
    cfg = read(path)
    assert (cfg["training.micro_batch_size"] or cfg["training.batch_size"]) <= 256
    assert cfg["resolution.max_res"] <= 224


def members(pattern: str) -> list[Path]:
    """The configs of one of FAMILIES."""
    family = [path for path in SHIPPED if re.fullmatch(pattern, path.name)]
    return [path for path in family if path.name not in BY_ANOTHER_RECIPE]


@pytest.mark.parametrize(("pattern", "expected"), FAMILIES.items(), ids=FAMILIES)
def test_members_of_a_family_differ_only_in_their_budget(pattern, expected):
    names, budget = expected
    family, ending = members(pattern), pattern.partition("_epochs")[2].replace("\\", "")
    assert sorted(p.name for p in family) == sorted(f"{name}_epochs{ending}" for name in names)
    configs = [read(path) for path in family]
    differing = {key for key in configs[0] if len({str(cfg[key]) for cfg in configs}) > 1}
    assert differing <= budget
    assert {"training.epochs", "logging.folder"} <= differing
    layouts = {
        str({k: sorted(v) for k, v in yaml.safe_load(p.read_text()).items()}) for p in family
    }
    assert len(layouts) == 1, "the files do not list the same keys"


def test_the_reported_runs_stand_in_their_files():
    """Learning rates and ramps of ffcv-imagenet, whose 8-GPU rate belongs to a batch of 4096."""
    ramps = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}
    for depth, rate, decay in ((50, 1.7 / 4096, 1e-4), (18, 0.5 / 1024, 5e-5)):
        for epochs, ramp in ramps.items():
            cfg = read(ROOT / f"rn{depth}_configs" / f"rn{depth}_{epochs}_epochs.yaml")
            assert cfg["lr.lr"] == pytest.approx(256 * rate)
            assert (cfg["resolution.start_ramp"], cfg["resolution.end_ramp"]) == ramp
            assert cfg["training.weight_decay"] == decay
            assert (cfg["validation.resolution"], cfg["validation.lr_tta"]) == (256, True)


@pytest.mark.parametrize("epochs", [16, 24, 32, 40, 56])
def test_mild_is_the_arithmetic_of_its_source(epochs):
    """resnet50_mild.yaml of MosaicML, whose 90 epochs are scaled to any length."""
    cfg = read(ROOT / "rn50_configs" / f"rn50_{epochs}_epochs_mild.yaml")
    assert cfg["lr.lr"] == pytest.approx(2.048 * 256 / 2048)
    assert cfg["training.weight_decay"] == cfg["training.norm_weight_decay"]
    assert cfg["training.weight_decay"] == pytest.approx(5e-4 * (1 - 0.875) / 2.048, rel=1e-3)
    assert cfg["ema.decay"] ** cfg["ema.every"] == pytest.approx(0.5 ** (20 / 100), rel=1e-4)
    assert cfg["lr.lr_peak_epoch"] == pytest.approx(8 * epochs / 90, abs=0.01)
    assert cfg["validation.crop_ratio"] == pytest.approx(224 / 232, abs=1e-4)
    ramp = (epochs * 0.4, epochs * 0.8)  # the middle of an epoch is where its size is right
    middles = (cfg["resolution.start_ramp"] + 0.5, cfg["resolution.end_ramp"] + 0.5)
    assert middles == pytest.approx(ramp, abs=0.5)


PUBLISHED = {  # config: batch, rate of the batch, at the start, weight decay, repeats
    "rn50_100_epochs_rsb_a3": (2048, 8e-3, 1e-4, 0.02, 1),
    "rn50_300_epochs_rsb_a2": (2048, 5e-3, 1e-4, 0.02, 3),
    "rn50_600_epochs_rsb_a1": (2048, 5e-3, 1e-4, 0.01, 3),
    "rn50_600_epochs_torchvision_v2": (1024, 0.5, 0.5 * 0.01, 2e-5, 4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_are_the_arithmetic_of_their_sources(name):
    cfg = read(ROOT / "rn50_configs" / f"{name}.yaml")
    batch, rate, start, decay, repeats = PUBLISHED[name]
    keys = ("training.batch_size", "training.weight_decay", "augment.repeats")
    assert tuple(cfg[key] for key in keys) == (batch, decay, repeats)
    assert cfg["lr.lr"] * batch / 256 == pytest.approx(rate)
    assert cfg["lr.warmup_start"] * rate == pytest.approx(start)
    assert cfg["training.norm_weight_decay"] == 0 and not cfg["training.use_blurpool"]
    assert cfg["augment.mix_by"] == "pass"
    if cfg["ema.decay"]:  # torchvision's own arithmetic, from its 0.99998
        per_update = 1 - 2e-5 * batch * cfg["ema.every"] / cfg["training.epochs"]
        assert cfg["ema.decay"] ** cfg["ema.every"] == pytest.approx(per_update, rel=1e-6)


def test_imagenette_rules_hold_for_the_plain_protocol():
    for path in SHIPPED:
        if "128px" in path.name:
            cfg = read(path)
            assert cfg["validation.plain_resolution"] <= cfg["resolution.max_res"] == 128
