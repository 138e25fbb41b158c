"""Metrics: sums over images that stay on the device until they are read, which waits for it.

To add one, write a class with `add` and `read` and put it into METRICS, with `since` one above
RECORD_VERSION. The keys of the log follow; records of older versions stay readable.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F


class Metric:
    """A number per evaluation, from a sum over all images.

    Attributes:
        name: of the number.
        since: version of the record that first held it.
    """

    name: str
    since = 1

    def __init__(self, device: torch.device) -> None:
        # float64: 50,000 losses of about 1 keep their last digits
        self.sum = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits_bk: torch.Tensor, labels_b: torch.Tensor) -> None:
        """Count one batch without waiting for the device: float (B, K), int64 (B,)."""
        raise NotImplementedError

    @staticmethod
    def read(total: float, images: int) -> float:
        """The number, from the sum over all ranks."""
        return total / images

    @classmethod
    def log_keys(cls) -> dict[str, tuple[str, bool]]:
        """Keys of the log -> (which evaluation, whether of the EMA weights)."""
        views, weights = {"plain_": "standard", "": "config"}, {"": False, "ema_": True}
        return {f"{w}{v}{cls.name}": (views[v], weights[w]) for w in weights for v in views}


class CrossEntropy(Metric):
    """Mean loss in nats; the log has that of the standard eval only."""

    name = "loss"

    def add(self, logits_bk: torch.Tensor, labels_b: torch.Tensor) -> None:
        self.sum += F.cross_entropy(logits_bk, labels_b, reduction="sum").double()

    @classmethod
    def log_keys(cls) -> dict[str, tuple[str, bool]]:
        return {"val_loss": ("standard", False), "val_loss_ema": ("standard", True)}


class Top1(Metric):
    """Images whose class is among the k highest logits, in percent; with K < k, top-K."""

    name, k = "top1", 1

    def add(self, logits_bk: torch.Tensor, labels_b: torch.Tensor) -> None:
        # the best five for any k: equal logits are ranked the same for all
        best_bk = logits_bk.topk(min(5, logits_bk.shape[1]), dim=1).indices[:, : self.k]
        self.sum += (best_bk == labels_b[:, None]).sum()

    @staticmethod
    def read(total: float, images: int) -> float:
        return 100 * total / images


class Top5(Top1):
    """As Top1, for five."""

    name, k = "top5", 5


METRICS: list[type[Metric]] = [CrossEntropy, Top1, Top5]
RAW_AT_THE_END = 2  # version from which on, with an EMA, raw weights are evaluated at the end only
RECORD_VERSION = max(RAW_AT_THE_END, *(metric.since for metric in METRICS))


def metric_keys(version: int | None = None) -> list[str]:
    """Keys of the log that metrics fill, in a record of a version; None: of the newest."""
    metrics = [metric for metric in METRICS if version is None or metric.since <= version]
    return [key for metric in metrics for key in metric.log_keys()]


def raw_keys() -> list[str]:
    """Those of `metric_keys` that are of the raw weights."""
    pairs = [pair for metric in METRICS for pair in metric.log_keys().items()]
    return [key for key, (_, of_ema) in pairs if not of_ema]


class Score:
    """All metrics over the batches and ranks of one evaluation, every image counted once.

    Args:
        device: where the sums are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self._metrics = [metric(device) for metric in METRICS]
        self._images = 0

    def add(self, logits_bk: torch.Tensor, labels_b: torch.Tensor) -> None:
        """Count one batch without waiting for the device: any float (B, K), int64 (B,)."""
        for metric in self._metrics:
            metric.add(logits_bk.float(), labels_b)
        self._images += len(labels_b)

    def read(self) -> dict[str, float]:
        """Name of a metric -> number; sums the ranks when there are several.

        Raises:
            ValueError: nothing was added, on any rank.
        """
        sums = torch.stack([metric.sum for metric in self._metrics])
        sums = F.pad(sums, (0, 1), value=self._images)
        if dist.is_initialized():
            dist.all_reduce(sums)
        *totals, count = sums.tolist()
        if count == 0:
            raise ValueError("no image was evaluated: the validation set is empty")
        pairs = zip(self._metrics, totals, strict=True)
        return {metric.name: metric.read(total, count) for metric, total in pairs}


def evaluation_record(
    raw: dict[str, dict[str, float]] | None, ema: dict[str, dict[str, float]]
) -> dict[str, float]:
    """The log's evaluation keys, from the scores in both evaluations; None: not evaluated."""
    return {
        key: scores[view][metric.name]
        for metric in METRICS
        for key, (view, of_ema) in metric.log_keys().items()
        if (scores := ema if of_ema else raw) is not None
    }
