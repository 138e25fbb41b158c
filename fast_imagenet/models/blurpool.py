"""BlurPool: blur before strided convolutions, and after max pooling; weight names stay.

Source: Zhang, "Making Convolutional Networks Shift-Invariant Again" (arXiv 1904.11486), in the
"blur first" order and with the channel limit of ffcv-imagenet and Composer; max pooling as in
composer/algorithms/blurpool/blurpool_layers.py of mosaicml/composer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fast_imagenet.models.layers import replace_layers

# The stem reads 3 channels at full resolution: blurring there costs most and gains least.
MIN_CHANNELS = 16


class BlurPoolConv2d(nn.Conv2d):
    """A strided convolution that first blurs each channel with [1 2 1] x [1 2 1] / 16.

    Its parameters are those of nn.Conv2d under the same names, so that a checkpoint loads into the
    plain network and back. Input and output shapes are those of the convolution that it replaces.
    """

    blur: torch.Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        shape = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        settings: dict[str, Any] = {name: getattr(conv, name) for name in shape}
        # on no device: the weights of `conv` are taken over below, and none are drawn here
        settings |= {"bias": conv.bias is not None, "device": "meta"}
        super().__init__(conv.in_channels, conv.out_channels, **settings)
        self.weight, self.bias = conv.weight, conv.bias
        blur = _kernel(conv.weight.device).repeat(conv.in_channels, 1, 1, 1)
        self.register_buffer("blur", blur, persistent=False)
        # A 1x1 convolution reads only the pixels that its stride keeps: blur just those.
        self._blur_strided = conv.kernel_size == (1, 1) and conv.padding == (0, 0)

    def forward(self, images_bchw: torch.Tensor) -> torch.Tensor:
        """Blur, then convolve. Shape: (B, C, H, W) -> as nn.Conv2d; any float dtype."""
        blurred = _blur(images_bchw, self.blur, self.stride if self._blur_strided else (1, 1))
        if self._blur_strided:
            return F.conv2d(blurred, self.weight, self.bias, groups=self.groups)
        return self._conv_forward(blurred, self.weight, self.bias)


class BlurMaxPool2d(nn.MaxPool2d):
    """Max pooling whose windows move by one pixel, then a blur at the stride of the pooling.

    Sizes of the output are those of the pooling that it replaces, without its ceil_mode.
    """

    blur: torch.Tensor

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__(pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        self.register_buffer("blur", _kernel(torch.device("cpu")), persistent=False)

    def forward(self, images_bchw: torch.Tensor) -> torch.Tensor:
        """Shape: (B, C, H, W) -> as nn.MaxPool2d; any float dtype."""
        largest = F.max_pool2d(images_bchw, self.kernel_size, 1, self.padding, self.dilation)
        return _blur(largest, self.blur.expand(largest.shape[1], -1, -1, -1), self.stride)


def _kernel(device: torch.device) -> torch.Tensor:
    """[1 2 1] x [1 2 1] / 16, float32 (1, 1, 3, 3)."""
    line = torch.tensor([1.0, 2.0, 1.0], device=device) / 4
    return (line[:, None] * line)[None, None]


def _blur(images_bchw: torch.Tensor, kernel: torch.Tensor, stride: Any) -> torch.Tensor:
    """Each channel blurred, zeros outside. kernel: (C, 1, 3, 3)."""
    channels = images_bchw.shape[1]
    return F.conv2d(
        images_bchw, kernel.to(images_bchw.dtype), stride=stride, padding=1, groups=channels
    )


def apply_blurpool(model: nn.Module, max_pool: bool = False) -> int:
    """Replace every strided nn.Conv2d with at least 16 input channels, in place.

    Args:
        model: a network before compilation and before it is wrapped for several ranks.
        max_pool: replace strided nn.MaxPool2d too.

    Returns:
        How many layers were replaced; 0 for a network that has none.
    """
    count = replace_layers(model, _wants_blur, BlurPoolConv2d)
    return count + (replace_layers(model, _is_strided_pool, BlurMaxPool2d) if max_pool else 0)


def _wants_blur(module: nn.Module) -> bool:
    # type(...) is: a subclass has a forward of its own that must not be thrown away
    return (
        type(module) is nn.Conv2d and max(module.stride) > 1 and module.in_channels >= MIN_CHANNELS
    )


def _is_strided_pool(module: nn.Module) -> bool:
    stride = module.stride if type(module) is nn.MaxPool2d else 1
    return stride not in (1, (1, 1))
