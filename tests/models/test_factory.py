"""What is done to a network before it is trained."""

import torch
from torch import nn

from fast_imagenet.models.factory import create_model, init_mosaic


def test_mosaic_start_is_kaiming_by_inputs_and_uniform_scales():
    torch.manual_seed(0)
    model = create_model("resnet18", 10)
    init_mosaic(model)
    conv = model.layer4[0].conv2.weight  # 512 inputs of 3 x 3
    assert abs(conv.std().item() / (2 / (512 * 9)) ** 0.5 - 1) < 0.01
    assert abs(model.fc.weight.std().item() / (2 / 512) ** 0.5 - 1) < 0.05
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    scales = torch.cat([norm.weight.detach() for norm in norms]).sort().values
    uniform = torch.linspace(0, 1, len(scales))
    assert (scales - uniform).abs().max() < 0.03  # Kolmogorov-Smirnov, 4,800 scales
    assert all(norm.bias.abs().max() == 0 for norm in norms)
