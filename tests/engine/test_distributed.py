"""Ranks that decide together."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fast_imagenet.engine.distributed import Consensus, Distributed


def ranks_that_take(*milliseconds):
    """Stand-ins for the ranks: all_reduce_max gives what the slowest of them would answer."""
    answers, asked = list(milliseconds), []

    def all_reduce_max(value):
        asked.append(value)
        return value if len(asked) % 2 else answers.pop(0)

    return SimpleNamespace(world_size=2, all_reduce_max=all_reduce_max)


def test_ranks_with_slow_steps_ask_each_other_after_each_of_them():
    fast, slow = (Consensus(ranks_that_take(*[ms] * 30)) for ms in (1, 9000))
    assert [step for step in range(32) if fast.ask(0) is not None] == [0, 10, 20, 30]
    assert all(slow.ask(0) is not None for _ in range(20))
    between = Consensus(ranks_that_take(9000, *[1300] * 30))
    assert [step for step in range(11) if between.ask(0) is not None] == [0, 1, 4, 7, 10]


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_mean_of_equal_numbers_is_that_number(monkeypatch, ranks):
    torch.manual_seed(0)
    tensors = [torch.randn(64, 3, 2, 2).to(memory_format=torch.channels_last), torch.tensor(5)]
    tensors += [torch.randn(()), torch.randn(9, dtype=torch.float64)]
    before = [tensor.clone() for tensor in tensors]
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.mul_(ranks))
    Distributed(0, ranks, ranks, torch.device("cpu")).all_reduce_mean(tensors)
    assert all(map(torch.equal, tensors[:3], before[:3]))
    torch.testing.assert_close(tensors[3], before[3])
