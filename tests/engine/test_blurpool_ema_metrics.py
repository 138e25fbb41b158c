"""BlurPool, the weight average and the score against slow, obvious versions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast_imagenet.engine.ema import WeightAverage
from fast_imagenet.engine.metrics import Score
from fast_imagenet.models.blurpool import BlurPoolConv2d, apply_blurpool
from tests.reference import blur_image, top_k_hits

# ── BlurPool ──


@pytest.mark.parametrize("kernel, stride, padding", [(3, 2, 1), (1, 2, 0), (7, 2, 3), (3, 3, 0)])
@pytest.mark.parametrize("height, width", [(9, 9), (8, 11), (1, 5)])
def test_blurpool_is_blur_then_convolution(kernel, stride, padding, height, width):
    if height + 2 * padding < kernel:
        pytest.skip("the image is smaller than the kernel")
    torch.manual_seed(kernel + height)
    conv = nn.Conv2d(16, 4, kernel, stride=stride, padding=padding, bias=True)
    images = torch.randn(2, 16, height, width)
    blurred = np.stack([[blur_image(channel) for channel in image] for image in images.numpy()])
    expected = conv(torch.from_numpy(blurred).float())
    torch.testing.assert_close(BlurPoolConv2d(conv)(images), expected, rtol=1e-4, atol=1e-5)


def test_blurpool_keeps_weight_names_and_values():
    from torchvision.models import resnet18

    model = resnet18()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert apply_blurpool(model) == 6  # three strided blocks, each with a shortcut
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    resnet18().load_state_dict(after)  # a plain network takes the weights
    assert type(model.conv1) is nn.Conv2d  # the stem reads three channels: left alone


def test_blurpool_trains_its_weights():
    conv = BlurPoolConv2d(nn.Conv2d(16, 3, 3, stride=2, padding=1))
    conv(torch.randn(1, 16, 8, 8)).sum().backward()
    assert conv.weight.grad.abs().sum() > 0
    assert [name for name, _ in conv.named_parameters()] == ["weight", "bias"]


def test_blurpool_does_not_change_a_constant_image_inside():
    conv = nn.Conv2d(16, 2, 3, stride=2, padding=1)
    images = torch.ones(1, 16, 12, 12)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(BlurPoolConv2d(conv)(images)[inside], conv(images)[inside])


# ── weight average ──


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


# ── score ──


@pytest.mark.parametrize("classes", [3, 10])
def test_score_against_a_loop(classes):
    torch.manual_seed(classes)
    logits, labels = torch.randn(57, classes), torch.randint(classes, (57,))
    score = Score(torch.device("cpu"))
    for part in (slice(0, 20), slice(20, 57)):  # batches of different sizes
        score.add(logits[part], labels[part])
    result = score.read()
    assert result["top1"] == pytest.approx(100 * np.mean(top_k_hits(logits, labels, 1)))
    assert result["top5"] == pytest.approx(100 * np.mean(top_k_hits(logits, labels, 5)))
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


class Crossings(TorchDispatchMode):
    """Collects the operations between host and device: each of them waits for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        values = tree_leaves((args, kwargs, result))
        devices = {value.device.type for value in values if isinstance(value, torch.Tensor)}
        if len(devices) > 1 or "_local_scalar" in str(operation):
            self.found.append(str(operation))
        return result


def test_counting_a_batch_does_not_wait_for_the_device():
    with FakeTensorMode():
        score = Score(torch.device("cuda", 0))
        logits_bk = torch.empty(8, 10, device="cuda")
        labels_b = torch.zeros(8, dtype=torch.int64, device="cuda")
        with Crossings() as crossings:
            score.add(logits_bk, labels_b)
            assert crossings.found == []
            logits_bk.new_tensor(8)  # what is looked for is found
        assert crossings.found


def test_score_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="validation set is empty"):
        Score(torch.device("cpu")).read()
