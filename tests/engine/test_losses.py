"""Losses against slow versions."""

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from fast_imagenet.data.device_transforms import Mixing, mix_targets
from fast_imagenet.engine.losses import build_loss


def test_losses_against_slow_versions():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    smoothing = 0.1
    soft = F.one_hot(labels, 4) * (1 - smoothing) + smoothing / 4
    ce = build_loss("ce", 4, smoothing)
    slow_ce = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ce(logits, labels), slow_ce)
    torch.testing.assert_close(ce(logits, soft), slow_ce)  # soft targets are smoothed already
    bce = build_loss("bce", 4, smoothing)
    p = logits.sigmoid()
    slow_bce = -(soft * p.log() + (1 - soft) * (1 - p).log()).sum(1).mean()
    loose = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}  # targets are float32
    torch.testing.assert_close(bce(logits, labels), slow_bce, **loose)
    torch.testing.assert_close(bce(logits, soft), slow_bce, **loose)
    mean = build_loss("bce_mean", 4, smoothing)
    torch.testing.assert_close(mean(logits, labels), slow_bce / 4, **loose)


@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["bce", "bce_mean"])
def test_binary_losses_equal_those_of_timm(kind, threshold):
    torch.manual_seed(1)
    smoothing = 0.0 if threshold else 0.1
    timms = BinaryCrossEntropy(smoothing, threshold or None, sum_classes=kind == "bce")
    ours = build_loss(kind, 5, smoothing, threshold)
    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    mixed = mix_targets(labels, Mixing(0.85, None), 5, smoothing)  # 0.15 is below the threshold
    halves = mix_targets(labels, Mixing(0.5, None), 5, smoothing)
    for targets in (labels, mixed, halves):
        torch.testing.assert_close(ours(logits, targets), timms(logits, targets))
