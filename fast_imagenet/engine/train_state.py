"""What a training step uses, ready made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fast_imagenet.engine.ema import WeightAverage

Batch = tuple[torch.Tensor, torch.Tensor, np.ndarray]  # images_bhwc, labels_b, samples_b
# (resolution in pixels, crop / shorter side) -> batches of images_bhwc, labels_b
EvalBatches = Callable[[int, float], Iterable[tuple[torch.Tensor, torch.Tensor]]]
Autocast = Callable[[], AbstractContextManager[Any]]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits_bk, targets -> mean
# images_bhwc, labels_b, samples_b, epoch, key of the mixing -> arguments of train_model, targets
Prepare = Callable[
    [torch.Tensor, torch.Tensor, np.ndarray, int, int], tuple[tuple[Any, ...], torch.Tensor]
]


class Networks(NamedTuple):
    """One network: raw, which takes images_bchw; as called in training and in evaluation, where it
    takes images_bhwc uint8 and may be distributed and compiled."""

    model: nn.Module
    train_model: Any  # an nn.Module
    eval_model: Any


@dataclass
class TrainState:
    """What a training step uses, and changes."""

    model: nn.Module  # as of Networks, as the two below
    train_model: Any
    eval_model: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: WeightAverage
    loss: Loss
    prepare: Prepare  # erase, draw how to mix
    autocast: Autocast
    lr_at_epoch: Callable[[float], float]  # epochs as a real number -> learning rate
    decay_at_step: Callable[[int], float]  # steps finished -> decay of the EMA
    seed_at_step: Callable[[int], int]  # of torch's generator
    steps_per_epoch: int
    micro_batch: int  # images per forward pass
    clip_grad: float  # largest gradient norm, 0 = off
    # step, forward pass of the rank in it, their number -> key of the mixing
    draw_at: Callable[[int, int, int], int] = lambda step, part, parts: step
    draws: bool = True  # whether the network draws from torch's generator
