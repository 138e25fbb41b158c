"""3x3 convolutions on maps of a few pixels as matrix products: a third of the time on a CPU.

A ResNet-18 of 64 px ends in maps of 2 x 2. There oneDNN's direct convolution reaches a quarter of
the rate that it has on larger maps, and half of a training step is spent in three layers; a matrix
product over the nine neighbours of every pixel keeps the full rate (docs/LOG.md, 2026-11-26). On a
GPU nothing changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fast_imagenet.models.layers import replace_layers

MAX_PIXELS = 9  # of a map: at 4 x 4 the convolution is as fast


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution, stride 1, padding 1, that is a matrix product where its maps are tiny.

    Made of an nn.Conv2d, whose parameters it takes over under the same names, so that a checkpoint
    loads into the plain network and back. The result differs from the convolution's by rounding.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        channels = (conv.in_channels, conv.out_channels)
        has_bias = conv.bias is not None
        super().__init__(*channels, 3, padding=1, bias=has_bias, device="meta")  # nothing is drawn
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, images_bchw: torch.Tensor) -> torch.Tensor:
        """Shape: (B, C, H, W) -> (B, C', H, W), channels last where it is a product."""
        height, width = images_bchw.shape[2:]
        if images_bchw.device.type != "cpu" or height * width > MAX_PIXELS:
            return super().forward(images_bchw)
        padded_bhwc = F.pad(images_bchw.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        neighbours = [
            padded_bhwc[:, y : y + height, x : x + width] for y in range(3) for x in range(3)
        ]
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, -1)
        return F.linear(torch.cat(neighbours, -1), weight, self.bias).permute(0, 3, 1, 2)


def use_small_maps(model: nn.Module) -> int:
    """Replace every 3x3 nn.Conv2d that can be one, in place.

    Args:
        model: a network before compilation and before it is wrapped for several ranks.

    Returns:
        How many were replaced.
    """
    return replace_layers(model, _can_be_one, SmallMapConv2d)


def _can_be_one(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d:  # a subclass has a forward of its own
        return False
    shape = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and module.padding_mode == "zeros"
