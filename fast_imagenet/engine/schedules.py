"""Schedules: pure functions of progress, with no settings object, no torch and no state.

`epoch` is a real number: 3.25 is a quarter through the fourth epoch. The trainer evaluates `lr_at`
and `ema_decay_at` at every optimizer step and `resolution_at` at the start of every epoch. The
cases that pin them down are in tests/engine/test_schedules.py.
"""

from __future__ import annotations

import math

SCHEDULES = ("linear", "step", "cosine", "onecycle", "flat_cosine")


def resolution_at(epoch: int, *, min_res: int, max_res: int, start_ramp: int, end_ramp: int) -> int:
    """Training side in pixels for a whole epoch: min_res, then a ramp in steps of 32, then max_res.

    Args:
        epoch: epochs finished so far, >= 0.
        min_res: side up to and including epoch `start_ramp`, pixels.
        max_res: side from epoch `end_ramp` on, pixels.
        start_ramp: last epoch at `min_res`.
        end_ramp: first epoch at `max_res`.

    Returns:
        min_res, max_res, or the multiple of 32 nearest to the straight line between them.

    Source: ffcv-imagenet, get_resolution.
    """
    if epoch >= end_ramp:
        return max_res
    if epoch <= start_ramp:
        return min_res
    share = (epoch - start_ramp) / (end_ramp - start_ramp)
    side = 32 * round((min_res + share * (max_res - min_res)) / 32)
    low, high = sorted((min_res, max_res))
    return min(max(side, low), high)


def lr_at(
    epoch: float,
    *,
    kind: str,
    epochs: float,
    peak_lr: float,
    peak_epoch: float = 0.0,
    final_lr: float = 0.0,
    step_length: float = 30.0,
    step_ratio: float = 0.1,
    flat_fraction: float = 0.72,
) -> float:
    """Learning rate at a moment of the run.

    Args:
        epoch: progress in epochs, 0 <= epoch <= epochs.
        kind: one of SCHEDULES.
        epochs: length of the run, epochs.
        peak_lr: highest learning rate, already scaled by the batch.
        peak_epoch: end of the warm-up, epochs, 0 <= peak_epoch < epochs; `step` has no warm-up.
        final_lr: rate at the end of `linear`, `cosine` and `flat_cosine`.
        step_length: epochs between the drops of `step`.
        step_ratio: factor of each drop of `step`.
        flat_fraction: share of the run after which `flat_cosine` begins to fall.

    Returns:
        The rate, >= 0.

    Raises:
        ValueError: `kind` is unknown.

    Sources: `linear` ffcv-imagenet (triangle from 1e-4 of the peak); `onecycle` torch OneCycleLR
    with its defaults (cosine, div_factor 25, final_div_factor 1e4); `flat_cosine` fastai
    fit_flat_cos.
    """
    if kind == "step":
        # 0.3 / 0.1 is 2.9999999999999996: a drop must not wait for the step after its own
        return peak_lr * step_ratio ** math.floor(epoch / step_length * (1 + 1e-12))
    if kind == "onecycle":
        return _one_cycle(epoch, epochs, peak_lr, peak_epoch)
    if kind not in SCHEDULES:
        raise ValueError(f"lr schedule {kind!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if epoch < peak_epoch:
        return peak_lr * (1e-4 + (1 - 1e-4) * epoch / peak_epoch)
    start = max(peak_epoch, flat_fraction * epochs) if kind == "flat_cosine" else peak_epoch
    length = epochs - start
    share = min(max((epoch - start) / length, 0.0), 1.0) if length > 0 else 0.0
    if kind == "linear":
        return peak_lr + share * (final_lr - peak_lr)
    return _half_cosine(peak_lr, final_lr, share)


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _one_cycle(epoch: float, epochs: float, peak_lr: float, peak_epoch: float) -> float:
    first = peak_lr / 25
    if epoch < peak_epoch:
        return _half_cosine(first, peak_lr, epoch / peak_epoch)
    return _half_cosine(
        peak_lr, first / 1e4, min((epoch - peak_epoch) / (epochs - peak_epoch), 1.0)
    )


def is_evaluated(epoch: int, last: int, every: int) -> bool:
    """Whether an evaluation follows an epoch: every `every`-th one, and the last.

    Args:
        epoch: from 0.
        last: the run's last epoch, from 0.
        every: epochs between evaluations, >= 1.
    """
    return epoch == last or (epoch + 1) % every == 0


def ema_decay_at(step: int, *, decay: float, warmup: bool = True) -> float:
    """Decay of the weight average at an optimizer step.

    Args:
        step: optimizer steps finished, >= 1 at the first update.
        decay: target, 0 <= decay < 1; 0 keeps the average equal to the raw weights.
        warmup: grow as (1 + step) / (10 + step) up to `decay`, so that early, bad weights are
            forgotten and a short run is not dominated by its start.

    Source: the growth is TensorFlow's ExponentialMovingAverage(num_updates=...).
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
