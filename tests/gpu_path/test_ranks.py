"""Ranks that train together: how gradients cross changes no loss, and averages stay."""

import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.gpu_path.ranks import RUNS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every rank of each of RUNS gave."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.gpu_path.ranks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt") for name in RUNS}


def test_the_options_change_no_loss(found):
    plain, ours, bf16 = (torch.stack(found[name]) for name in ("plain", "ours", "bf16"))
    assert torch.equal(ours, plain)
    assert not torch.equal(ours[0], ours[1])  # of each rank's own images
    assert torch.equal(bf16[:, 0], plain[:, 0])  # before the first gradient
    assert not torch.equal(bf16, plain)
    # one rounded gradient later; batch norms of two images make more of it soon
    torch.testing.assert_close(bf16[:, 1], plain[:, 1], rtol=0.02, atol=0)


def test_an_evaluation_leaves_averaged_weights_as_they_are(found):
    """The sum of three equal numbers, divided by three, is another number in float32."""
    ranks = found["average"]
    first, weights = ranks[0][1], ranks[0][2]
    for before, after, _ in ranks:
        assert all(torch.equal(before[name], after[name]) for name in weights)
        assert all(torch.equal(first[name], after[name]) for name in after)
    statistics = [k for k in first if first[k].is_floating_point() and k not in weights]
    assert statistics
    for name in statistics:
        mean = torch.stack([before[name] for before, _, _ in ranks]).mean(0)
        torch.testing.assert_close(first[name], mean)
    assert any(not torch.equal(first[name], ranks[0][0][name]) for name in statistics)
