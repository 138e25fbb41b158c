"""Scores against slow, obvious versions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast_imagenet.engine.evaluation import ClassScore
from fast_imagenet.engine.metrics import Score, metric_keys
from tests.reference import top_k_hits


@pytest.mark.parametrize("classes", [3, 10])
def test_score_against_a_loop(classes):
    torch.manual_seed(classes)
    logits, labels = torch.randn(57, classes), torch.randint(classes, (57,))
    score = Score(torch.device("cpu"))
    for part in (slice(0, 20), slice(20, 57)):  # batches of different sizes
        score.add(logits[part], labels[part])
    result = score.read()
    assert result["top1"] == pytest.approx(100 * np.mean(top_k_hits(logits, labels, 1)))
    assert result["top5"] == pytest.approx(100 * np.mean(top_k_hits(logits, labels, 5)))
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


class Crossings(TorchDispatchMode):
    """Collects the operations between host and device: each of them waits for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        values = tree_leaves((args, kwargs, result))
        devices = {value.device.type for value in values if isinstance(value, torch.Tensor)}
        if len(devices) > 1 or "_local_scalar" in str(operation):
            self.found.append(str(operation))
        return result


def test_counting_a_batch_does_not_wait_for_the_device():
    with FakeTensorMode():
        score = ClassScore(torch.device("cuda", 0), 10)
        logits_bk = torch.empty(8, 10, device="cuda")
        labels_b = torch.zeros(8, dtype=torch.int64, device="cuda")
        with Crossings() as crossings:
            score.add(logits_bk, labels_b)
            assert crossings.found == []
            logits_bk.new_tensor(8)  # what is looked for is found
        assert crossings.found


def test_hits_of_every_class_against_a_loop():
    torch.manual_seed(0)
    logits, labels = torch.randn(57, 8), torch.randint(7, (57,))  # class 7 has no images
    score = ClassScore(torch.device("cpu"), 8)
    for part in (slice(0, 20), slice(20, 57)):
        score.add(logits[part], labels[part])
    *rows, without = score.read_classes()
    assert without == {"images": 0, "top1": None, "top5": None}
    for k, row in enumerate(rows):
        of_class = logits[labels == k], labels[labels == k]
        assert row["images"] == len(of_class[1])
        assert row["top1"] == pytest.approx(100 * np.mean(top_k_hits(*of_class, 1)))
        assert row["top5"] == pytest.approx(100 * np.mean(top_k_hits(*of_class, 5)))


def test_score_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="validation set is empty"):
        Score(torch.device("cpu")).read()


def test_the_keys_of_the_first_records_stay():
    """A new metric says since which version of the record it is there."""
    views = [f"{ema}{view}" for ema in ("", "ema_") for view in ("", "plain_")]
    keys = {f"{view}{name}" for view in views for name in ("top1", "top5")}
    keys |= {"val_loss", "val_loss_ema"}
    assert set(metric_keys(1)) == keys
