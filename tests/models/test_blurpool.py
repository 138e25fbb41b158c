"""BlurPool against a slow, obvious version."""

import numpy as np
import pytest
import torch
from torch import nn

from fast_imagenet.models.blurpool import BlurMaxPool2d, BlurPoolConv2d, apply_blurpool
from tests.reference import blur_image


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


@pytest.mark.parametrize("kernel, padding", [(3, 1), (2, 0), (3, 0)])
@pytest.mark.parametrize("height, width", [(9, 9), (8, 11)])
def test_blurred_max_pooling_is_pooling_at_every_pixel_then_blur(kernel, padding, height, width):
    torch.manual_seed(height)
    pool, images = nn.MaxPool2d(kernel, 2, padding), torch.randn(2, 3, height, width)
    largest = nn.MaxPool2d(kernel, 1, padding)(images).numpy()
    blurred = np.stack([[blur_image(channel) for channel in image] for image in largest])
    found = BlurMaxPool2d(pool)(images)
    torch.testing.assert_close(found, torch.from_numpy(blurred[:, :, ::2, ::2]).float())
    assert found.shape == pool(images).shape


def test_max_pooling_is_blurred_when_asked():
    from torchvision.models import resnet18

    model = resnet18()
    assert apply_blurpool(model, max_pool=True) == 7
    assert type(model.maxpool) is BlurMaxPool2d
    resnet18().load_state_dict(model.state_dict())
