"""Convolutions on tiny maps: the same numbers and gradients as the convolution, the same names."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fast_imagenet.models import small_maps
from fast_imagenet.models.small_maps import SmallMapConv2d, use_small_maps


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (1, 9), (4, 2)])
def test_it_is_the_convolution_with_its_gradients(size, bias, monkeypatch):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 5, 3, padding=1, bias=bias)
    images = torch.randn(3, 8, *size, dtype=torch.float64)
    plain, ours = conv.double(), SmallMapConv2d(copy.deepcopy(conv).double())
    called = []
    monkeypatch.setattr(F, "linear", lambda *a, real=F.linear: called.append(1) or real(*a))
    found = []
    for layer in (plain, ours):
        x = images.clone().requires_grad_()
        y = layer(x)
        (y * torch.arange(y.numel()).reshape(y.shape)).sum().backward()
        found.append((y.detach(), x.grad, *(p.grad for p in layer.parameters())))
    assert len(called) == 1 and len(found[0]) == 3 + bias
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected)


def test_larger_maps_stay_convolutions(monkeypatch):
    conv = SmallMapConv2d(nn.Conv2d(4, 4, 3, padding=1))
    images = torch.randn(2, 4, 5, 2)
    monkeypatch.setattr(F, "linear", None)  # would fail
    torch.testing.assert_close(conv(images), F.conv2d(images, conv.weight, conv.bias, padding=1))
    monkeypatch.setattr(small_maps, "MAX_PIXELS", 10)
    with pytest.raises(TypeError):
        conv(images)


def test_the_network_keeps_its_names_values_and_answers():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=7).eval().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    before, expected = copy.deepcopy(model.state_dict()), model(images)
    assert use_small_maps(model) == 13  # of 20; the others are strided, 1x1 or 7x7
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert use_small_maps(model) == 0


def test_what_is_no_plain_3x3_is_left_alone():
    layers = [
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, (3, 1), padding=1),
        nn.ConvTranspose2d(4, 4, 3, padding=1),
    ]  # fmt: skip
    assert use_small_maps(nn.Sequential(*layers)) == 0
