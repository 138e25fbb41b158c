"""How much a run computes, from its settings alone: no torch, no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from fast_imagenet.engine.schedules import is_evaluated, resolution_at

IMAGENET_IMAGES = (1_281_167, 50_000)  # for training, for validation
UNIT = 160  # pixels


def by_area(resolution: int, is_step: bool) -> float:
    """Cost of an image, up to a constant: its pixels; a forward pass is a third of a step.

    FLOPs of the shipped networks are at most 3 % above it for multiples of 32 px, at most 12 %
    elsewhere: strides round such maps up.
    """
    return resolution**2 * (1 if is_step else 1 / 3)


@dataclass(frozen=True)
class Work:
    """Of a run. The unit is an epoch at 160 px: a step's work for every training image.

    Attributes:
        training: epochs of 160 px; by area, the pixels that the network is trained on.
        evaluation: of all evaluations, in the same unit.
        images: of an epoch.
    """

    training: float
    evaluation: float
    images: int

    @property
    def evaluation_fraction(self) -> float:
        """Evaluation as a fraction of the training."""
        return self.evaluation / self.training

    def hours(self, images_per_second: float) -> float:
        """Of training and evaluation, from the rate of training at 160 px; no start, no wait."""
        return (self.training + self.evaluation) * self.images / images_per_second / 3600


def evaluated_sets(epochs: int, every: int, averaged: bool) -> int:
    """How often a run evaluates a set of weights; with an EMA the raw ones at the end only.

    Args:
        epochs: of the run.
        every: epochs between evaluations; the last has one.
        averaged: whether there is an EMA.
    """
    evaluated = sum(is_evaluated(epoch, epochs - 1, every) for epoch in range(epochs))
    return evaluated + averaged


def work_of(
    cfg: SimpleNamespace,
    images: tuple[int, int] = IMAGENET_IMAGES,
    cost: Callable[[int, bool], float] = by_area,
) -> Work:
    """What a run of these settings computes, not cut short by training.max_steps.

    Args:
        cfg: sections training, resolution, validation and ema are used.
        images: for training, for validation.
        cost: (resolution in pixels, whether it is a step) -> cost of an image, in any unit; a
            step is a forward and backward pass, else it is a forward pass.
    """
    v, epochs, (train_images, val_images) = cfg.validation, cfg.training.epochs, images
    sizes = [resolution_at(epoch, **vars(cfg.resolution)) for epoch in range(epochs)]
    standard, config = (v.plain_resolution, v.plain_crop_ratio), (v.resolution, v.crop_ratio)
    passes = [view[0] for view in {standard, config}] + [v.resolution] * v.lr_tta
    sets = evaluated_sets(epochs, v.every, bool(cfg.ema.decay))
    evaluation = sets * sum(cost(size, False) for size in passes) * val_images / train_images
    unit = cost(UNIT, True)
    return Work(sum(cost(size, True) for size in sizes) / unit, evaluation / unit, train_images)
