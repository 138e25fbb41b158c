"""Every shipped config trains a step, evaluates and leaves its weights, shrunk by smoke.yaml."""

import json

import pytest

from tests.conftest import ROOT

CONFIGS = sorted(ROOT.glob("*_configs/*.yaml"))


def test_no_config_is_missed():
    assert len(CONFIGS) == 25
    everywhere = ROOT.rglob("*_configs/**/*.yaml")
    assert sorted(path for path in everywhere if ".venv" not in path.parts) == CONFIGS


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_one_step(quick_run, path):
    folder = quick_run(config=path.name)  # by its bare name, as the README says
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
