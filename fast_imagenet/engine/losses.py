"""The loss of a training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fast_imagenet.engine.train_state import Loss


def build_loss(kind: str, num_classes: int, smoothing: float, threshold: float = 0.0) -> Loss:
    """(logits_bk, labels_b or soft targets_bk) -> mean loss; soft targets are smoothed already.

    Args:
        kind: 'ce' (cross-entropy), 'bce' (binary for each class, summed over the classes) or
            'bce_mean' (their mean, as timm's).
        num_classes: k.
        smoothing: probability that labels give to all classes, 0 to 1.
        threshold: of the binary losses: targets above it count as 1, the others as 0; 0 = off.

    Source: timm/loss/binary_cross_entropy.py of huggingface/pytorch-image-models.
    """

    def loss(logits_bk: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if kind == "ce":
            hard = targets.ndim == 1
            return F.cross_entropy(logits_bk, targets, label_smoothing=smoothing if hard else 0.0)
        if targets.ndim == 1:
            targets = F.one_hot(targets, num_classes) * (1 - smoothing) + smoothing / num_classes
        if threshold:
            targets = targets > threshold
        total = F.binary_cross_entropy_with_logits(logits_bk, targets.float(), reduction="sum")
        # summed over the classes: their mean would shrink the gradients with their number
        return total / (targets.numel() if kind == "bce_mean" else len(targets))

    return loss
