"""Sums that stay on the device until they are read: reading one is a synchronisation."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F


class Score:
    """Cross-entropy, top-1 and top-5 over batches and ranks, every image counted once.

    Args:
        device: where the sums are kept.
    """

    KEYS = ("loss", "top1", "top5")

    def __init__(self, device: torch.device) -> None:
        # float64: 50,000 losses of about 1 keep their last digits
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._images = 0

    def add(self, logits_bk: torch.Tensor, labels_b: torch.Tensor) -> None:
        """Count one batch, without waiting for the device.

        Shapes: (B, K) float, (B,) int64; with K < 5, top-5 is top-K.
        """
        logits_bk = logits_bk.float()
        best = logits_bk.topk(min(5, logits_bk.shape[1]), dim=1).indices
        hit = best == labels_b[:, None]
        loss = F.cross_entropy(logits_bk, labels_b, reduction="sum")
        self._sums += torch.stack([loss.double(), hit[:, 0].sum(), hit.sum()])
        self._images += len(labels_b)

    def read(self) -> dict[str, float]:
        """Mean loss in nats, top-1 and top-5 in percent; sums the ranks when there are several.

        Raises:
            ValueError: nothing was added, on any rank.
        """
        sums = torch.cat([self._sums, self._sums.new_tensor([self._images])])
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, top1, top5, count = sums.tolist()
        if count == 0:
            raise ValueError("no image was evaluated: the validation set is empty")
        return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
