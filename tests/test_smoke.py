"""Every shipped recipe trains a step, evaluates and leaves its weights, shrunk by smoke.yaml."""

import json

import pytest

from tests.conftest import ROOT
from tests.test_shipped_configs import FAMILIES, members

CONFIGS = sorted(ROOT.glob("*_configs/*.yaml"))
# of a family, whose members differ only in their budget, one
RECIPES = sorted({*CONFIGS}.difference(*(members(pattern)[1:] for pattern in FAMILIES)))


def test_no_config_is_missed():
    assert len(CONFIGS) == 34
    everywhere = ROOT.rglob("*_configs/**/*.yaml")
    assert sorted(path for path in everywhere if ".venv" not in path.parts) == CONFIGS


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_one_step(quick_run, path):
    fresh = ["--model.pretrained=false", "--model.new_head=false"]  # weights of no cache
    folder = quick_run(*fresh, config=path.name)  # by its bare name, as the README says
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(log) == 1 and log[0]["resolution"] == 32
    steps = json.loads((folder / "steps.jsonl").read_text())
    assert len(steps["losses"]) == 1
    arch = json.loads((folder / "config.json").read_text())["model"]["arch"]
    if path.stem.startswith("rn50"):
        assert arch.endswith("resnet50")
    elif path.stem.startswith("rn18"):
        assert arch.endswith("resnet18")
    assert (folder / "weights.safetensors").stat().st_size > 1e6
