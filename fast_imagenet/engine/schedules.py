"""Schedules: pure functions of progress, with no torch and no state.

`epoch` is a real number: 3.25 is a quarter through the fourth epoch. The learning rate and
`ema_decay_at` are evaluated at every optimizer step, `resolution_at` at the start of every epoch.
To add a schedule of the learning rate, write a function of (epoch, course) and put it into
SCHEDULES; parameters of its own are settings of section lr under the same name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Course:
    """What all schedules of the learning rate share.

    Attributes:
        epochs: length of the run.
        peak_lr: highest learning rate, already scaled by the batch.
        peak_epoch: end of the warm-up, 0 <= peak_epoch < epochs.
        final_lr: rate at the end.
        start: rate at the start of the warm-up, as a fraction of the peak.
    """

    epochs: float
    peak_lr: float
    peak_epoch: float = 0.0
    final_lr: float = 0.0
    start: float = 1e-4

    def warm_up(self, epoch: float) -> float:
        """Rate before peak_epoch, on a line."""
        return self.peak_lr * (self.start + (1 - self.start) * epoch / self.peak_epoch)

    def fraction(self, epoch: float, start: float) -> float:
        """How much of the way from `start` to the end of the run is behind, 0 to 1."""
        length = self.epochs - start
        return min(max((epoch - start) / length, 0.0), 1.0) if length > 0 else 0.0


def linear(epoch: float, course: Course) -> float:
    """Triangle of ffcv-imagenet."""
    if epoch < course.peak_epoch:
        return course.warm_up(epoch)
    fraction = course.fraction(epoch, course.peak_epoch)
    return course.peak_lr + fraction * (course.final_lr - course.peak_lr)


def step(epoch: float, course: Course, step_length: float = 30.0, step_ratio: float = 0.1) -> float:
    """A drop by `step_ratio` every `step_length` epochs, without warm-up."""
    # 0.3 / 0.1 is 2.9999999999999996: a drop must not wait for the step after its own
    return course.peak_lr * step_ratio ** math.floor(epoch / step_length * (1 + 1e-12))


def cosine(epoch: float, course: Course) -> float:
    """Half a cosine from the peak to final_lr."""
    return flat_cosine(epoch, course, flat_fraction=0.0)


def timm_cosine(epoch: float, course: Course) -> float:
    """Half a cosine over the run, whose start the warm-up replaces: timm's CosineLRScheduler."""
    if epoch < course.peak_epoch:
        return course.warm_up(epoch)
    return _half_cosine(course.peak_lr, course.final_lr, course.fraction(epoch, 0.0))


def flat_cosine(epoch: float, course: Course, flat_fraction: float = 0.72) -> float:
    """At the peak for that fraction of the run, then half a cosine: fit_flat_cos of fastai."""
    if epoch < course.peak_epoch:
        return course.warm_up(epoch)
    start = max(course.peak_epoch, flat_fraction * course.epochs)
    return _half_cosine(course.peak_lr, course.final_lr, course.fraction(epoch, start))


def onecycle(epoch: float, course: Course) -> float:
    """OneCycleLR of torch with its defaults: cosine, div_factor 25, final_div_factor 1e4."""
    first = course.peak_lr / 25
    if epoch < course.peak_epoch:
        return _half_cosine(first, course.peak_lr, epoch / course.peak_epoch)
    fraction = min((epoch - course.peak_epoch) / (course.epochs - course.peak_epoch), 1.0)
    return _half_cosine(course.peak_lr, first / 1e4, fraction)


def _half_cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": linear,
    "step": step,
    "cosine": cosine,
    "timm_cosine": timm_cosine,
    "onecycle": onecycle,
    "flat_cosine": flat_cosine,
}


def make_schedule(kind: str, course: Course, options: dict[str, Any]) -> Callable[[float], float]:
    """Epochs done -> learning rate, >= 0.

    Args:
        kind: one of SCHEDULES.
        course: shared by all.
        options: of all schedules; it takes its own.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"lr schedule {kind!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    own = inspect.signature(SCHEDULES[kind]).parameters.keys() & options.keys()
    return partial(SCHEDULES[kind], course=course, **{key: options[key] for key in own})


def lr_schedule(lr: SimpleNamespace, epochs: float, scale: float) -> Callable[[float], float]:
    """The schedule of section lr of the settings, for a batch of 256 * `scale` images."""
    course = Course(epochs, lr.lr * scale, lr.lr_peak_epoch, lr.min_lr * scale, lr.warmup_start)
    return make_schedule(lr.lr_schedule_type, course, vars(lr))


def resolution_at(
    epoch: int, *, min_res: int, max_res: int, start_ramp: int, end_ramp: int, step: int = 32
) -> int:
    """Training resolution in pixels for an epoch: min_res, a ramp, max_res.

    Args:
        epoch: epochs finished so far, >= 0.
        min_res: up to and including epoch `start_ramp`, pixels.
        max_res: from epoch `end_ramp` on, pixels.
        start_ramp: last epoch at `min_res`.
        end_ramp: first epoch at `max_res`.
        step: pixels that sizes between the two are a multiple of.

    Returns:
        min_res, max_res, or the multiple of `step` nearest to the straight line between them.

    Source: ffcv-imagenet, get_resolution.
    """
    if epoch >= end_ramp:
        return max_res
    if epoch <= start_ramp:
        return min_res
    fraction = (epoch - start_ramp) / (end_ramp - start_ramp)
    resolution = step * round((min_res + fraction * (max_res - min_res)) / step)
    low, high = sorted((min_res, max_res))
    return min(max(resolution, low), high)


def is_evaluated(epoch: int, last: int, every: int) -> bool:
    """Whether an evaluation follows an epoch: every `every`-th one, and the last.

    Args:
        epoch: from 0.
        last: the run's last epoch, from 0.
        every: epochs between evaluations, >= 1.
    """
    return epoch == last or (epoch + 1) % every == 0


def ema_decay_at(step: int, *, decay: float, warmup: bool = True, every: int = 1) -> float:
    """Decay of the EMA at an optimizer step; 1 where it stays as it is.

    Args:
        step: optimizer steps finished, >= 1 at the first update.
        decay: target per step, 0 <= decay < 1; 0 keeps the EMA equal to the raw weights.
        warmup: update n decays by (1 + n) / (10 + n) at most, so that early, bad weights are
            forgotten and a short run is not dominated by its start.
        every: steps between updates; each decays as the steps since the last would have.

    Source: the growth is TensorFlow's ExponentialMovingAverage(num_updates=...); updates at
        intervals: composer/algorithms/ema/ema.py of mosaicml/composer.
    """
    updates, left = divmod(step, every)
    if left:
        return 1.0
    return min(decay**every, (1 + updates) / (10 + updates)) if warmup else decay**every
