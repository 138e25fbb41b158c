"""What training.eval_only reports: a table, and every class in a JSON file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from fast_imagenet.data.class_lists import class_name
from fast_imagenet.engine.metrics import Score
from fast_imagenet.files import write_json

Scores = dict[str, dict[str, float]]  # as read by Score: 'standard' and 'config'


def views_of(validation: SimpleNamespace) -> dict[str, dict[str, Any]]:
    """What differs between the evaluations 'standard' and 'config'."""
    v = validation
    standard = {"resolution": v.plain_resolution, "crop_ratio": v.plain_crop_ratio, "flip": False}
    config = {"resolution": v.resolution, "crop_ratio": v.crop_ratio, "flip": v.lr_tta}
    return {"standard": standard, "config": config}


def view_title(name: str, view: dict[str, Any]) -> str:
    """'config eval 224 px + flip', of an item of `views_of`."""
    return f"{name} eval {view['resolution']} px" + " + flip" * view["flip"]


class ClassScore(Score):
    """A Score that counts the hits of every class besides.

    Args:
        device: where the sums are kept.
        num_classes: how many there are.
    """

    def __init__(self, device: torch.device, num_classes: int) -> None:
        super().__init__(device)
        self._counts_3k = torch.zeros(3, num_classes, dtype=torch.int64, device=device)

    def add(self, logits_bk: torch.Tensor, labels_b: torch.Tensor) -> None:
        super().add(logits_bk, labels_b)
        best_bk = logits_bk.float().topk(min(5, logits_bk.shape[1]), dim=1).indices
        hits_bk = best_bk == labels_b[:, None]
        counted_b3 = torch.stack([torch.ones_like(labels_b), hits_bk[:, 0], hits_bk.any(1)], 1)
        self._counts_3k.index_add_(1, labels_b, counted_b3.T)

    def read_classes(self) -> list[dict[str, float | None]]:
        """Images, top-1 and top-5 in percent of each class, over all ranks; None of no images."""
        if dist.is_initialized():
            dist.all_reduce(self._counts_3k)
        return [
            {"images": n, "top1": 100 * a / n if n else None, "top5": 100 * b / n if n else None}
            for n, a, b in self._counts_3k.T.tolist()
        ]


def evaluation_table(cfg: SimpleNamespace, scores: Scores) -> str:
    """Top-1, top-5 and loss of both evaluations, a line each."""
    titles = {name: view_title(name, view) for name, view in views_of(cfg.validation).items()}
    width = max(map(len, titles.values()))
    lines = [f"{'':{width}}    top-1     top-5     loss"]
    for name, title in titles.items():
        loss, top1, top5 = (scores[name][key] for key in ("loss", "top1", "top5"))
        lines.append(f"{title:{width}}  {top1:6.2f} %  {top5:6.2f} %  {loss:7.4f}")
    return "\n".join(lines)


def report_evaluation(
    cfg: SimpleNamespace, scores: Scores, counts: dict[str, Any], loader: Any, weights: str
) -> None:
    """Print the table and what was evaluated, and write logging.eval_json where it is set.

    Args:
        cfg: settings.
        scores: of both evaluations.
        counts: `read_classes` of both.
        loader: of the validation data.
        weights: which of the file's.
    """
    images, checkpoint = loader.num_samples, cfg.model.checkpoint or "model.pretrained"
    print(evaluation_table(cfg, scores))
    print(f"{cfg.model.arch}; {images} images; {weights} of {checkpoint}")
    if not cfg.logging.eval_json:
        return
    names = loader.classes or [str(number) for number in range(loader.num_classes)]
    content = {"arch": cfg.model.arch, "checkpoint": checkpoint, "weights": weights}
    content |= {"dataset": cfg.data.val_dataset, "images": images}
    content |= {name: view | scores[name] for name, view in views_of(cfg.validation).items()}
    content["classes"] = [
        {"class": name, "name": class_name(name)} | {view: rows[k] for view, rows in counts.items()}
        for k, name in enumerate(names)
    ]
    write_json(cfg.logging.eval_json, content)
    print(f"every class: {cfg.logging.eval_json}")
