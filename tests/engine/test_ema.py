"""The EMA of the weights against its definition, and swapped into a network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fast_imagenet.engine.ema import WeightAverage


def test_average_follows_the_definition_over_many_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = WeightAverage(model)
    slow = {name: tensor.clone().double() for name, tensor in model.state_dict().items()}
    for step in range(20):
        model(torch.randn(8, 3))  # moves the running statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        decay = min(0.9, (1 + step) / (10 + step))
        average.update(decay)
        for name, tensor in model.state_dict().items():
            slow[name] = decay * slow[name] + (1 - decay) * tensor.double()
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), slow[name], rtol=1e-5, atol=1e-6)
    assert average.state_dict()["1.num_batches_tracked"] == 20


def test_average_with_decay_zero_is_the_raw_weights():
    model = nn.Linear(2, 2)
    average = WeightAverage(model)
    nn.init.normal_(model.weight)
    average.update(0.0)
    assert torch.equal(average.state_dict()["weight"], model.weight)


def test_average_stays_between_two_updates():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model)
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    model(torch.randn(8, 2))
    nn.init.normal_(model[0].weight)
    average.update(1.0)
    floats = [name for name, tensor in before.items() if tensor.is_floating_point()]
    assert all(torch.equal(average.state_dict()[name], before[name]) for name in floats)


def test_no_average_takes_no_memory_and_is_the_raw_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, enabled=False)
    assert average.statistics == []
    nn.init.normal_(model[0].weight)
    average.update(0.5)
    average.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    for name, value in average.state_dict().items():
        assert value.data_ptr() == model.state_dict()[name].data_ptr()
    with average.applied():
        assert torch.equal(average.state_dict()["0.weight"], model[0].weight)


def test_applied_swaps_and_restores_even_after_an_error():
    model = nn.Linear(2, 2)
    average = WeightAverage(model)
    start = model.weight.detach().clone()
    nn.init.ones_(model.weight)
    with pytest.raises(RuntimeError, match="inside"), average.applied():  # noqa: PT012
        assert torch.equal(model.weight, start)
        raise RuntimeError("inside")
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_applied_reaches_a_compiled_network():
    model = nn.Linear(2, 2, bias=False)
    average = WeightAverage(model)
    called = torch.compile(model, backend="eager")
    x = torch.randn(3, 2)
    nn.init.ones_(model.weight)
    called(x)  # compiled while the raw weights are in place
    with average.applied():
        torch.testing.assert_close(called(x), F.linear(x, average.state_dict()["weight"]))
    torch.testing.assert_close(called(x), F.linear(x, torch.ones(2, 2)))


def test_average_survives_saving():
    model = nn.Linear(2, 2)
    first, second = WeightAverage(model), WeightAverage(model)
    nn.init.ones_(model.weight)
    first.update(0.5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state_dict()["weight"], first.state_dict()["weight"])
