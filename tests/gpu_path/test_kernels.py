"""Kernels and bytes of a compiled step, by Inductor for a GPU that is not there: within a budget.

A step of a ResNet is bound by memory: its time follows the bytes, and that of small layers the
number of launches.
"""

import json

import pytest
import torch

from tests.gpu_path.fake_inductor import BUDGET, NETWORKS, count

RENEW = (
    "if that is meant, run `python -m tests.gpu_path.fake_inductor`, commit budget.json, say why"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_compiled_step_stays_within_its_budget(name):
    budget = json.loads(BUDGET.read_text())
    if budget["torch"] != torch.__version__:
        pytest.skip(f"counted with torch {budget['torch']}, this is {torch.__version__}: {RENEW}")
    found = count(name)
    for direction, most in budget[name].items():
        for what, allowed in most.items():
            number, where = found[direction][what], f"{what} of the {direction} pass of {name}"
            assert number <= allowed, f"{where}: {number:,}, budget {allowed:,}; {RENEW}"
            assert number > 0.98 * allowed, f"{where}: {number:,} only, lower the budget; {RENEW}"
