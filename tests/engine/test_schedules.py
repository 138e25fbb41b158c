"""Schedules against named cases, torch's own schedulers, and properties that hold everywhere."""

import math
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler

import train_imagenet
from fast_imagenet.engine.run_state import _why_no_longer
from fast_imagenet.engine.schedules import (
    SCHEDULES,
    Course,
    ema_decay_at,
    is_evaluated,
    lr_schedule,
    make_schedule,
    resolution_at,
)


def lr_at(epoch, *, kind, epochs, peak_lr, peak_epoch=0.0, final_lr=0.0, **options):
    return make_schedule(kind, Course(epochs, peak_lr, peak_epoch, final_lr), options)(epoch)


# name, settings, {epoch: rate}
LR_CASES = [
    (
        "triangle of the 16-epoch ResNet-50 (ffcv-imagenet)",
        dict(kind="linear", epochs=16, peak_lr=1.7, peak_epoch=2),
        {0: 1.7e-4, 1: (1.7e-4 + 1.7) / 2, 2: 1.7, 9: 0.85, 16: 0.0},
    ),
    (
        "triangle that ends above zero",
        dict(kind="linear", epochs=10, peak_lr=1.0, final_lr=0.2),
        {0: 1.0, 5: 0.6, 10: 0.2},
    ),
    (
        "steps of the PyTorch example",
        dict(kind="step", epochs=90, peak_lr=0.1, step_length=30, step_ratio=0.1),
        {0: 0.1, 29.99: 0.1, 30: 0.01, 60: 0.001, 90: 1e-4},
    ),
    (
        "cosine with five warm-up epochs",
        dict(kind="cosine", epochs=105, peak_lr=2.0, peak_epoch=5, final_lr=0.5),
        {0: 2e-4, 5: 2.0, 55: 1.25, 105: 0.5},
    ),
    (
        "cosine of the whole run, below its peak after the warm-up",
        dict(kind="timm_cosine", epochs=90, peak_lr=0.4, peak_epoch=15),
        {0: 4e-5, 15: 0.2 + 0.1 * 3**0.5, 30: 0.3, 45: 0.2, 90: 0.0},
    ),
    (
        "cosine without warm-up",
        dict(kind="cosine", epochs=90, peak_lr=0.4),
        {0: 0.4, 30: 0.3, 45: 0.2, 90: 0.0},
    ),
    (
        "flat, then cosine",
        dict(kind="flat_cosine", epochs=100, peak_lr=1.0, flat_fraction=0.72),
        {0: 1.0, 71.9: 1.0, 86: 0.5, 100: 0.0},
    ),
    (
        "flat, with a warm-up",
        dict(kind="flat_cosine", epochs=20, peak_lr=1.0, peak_epoch=4, flat_fraction=0.5),
        {2: (1e-4 + 1) / 2, 4: 1.0, 10: 1.0, 15: 0.5, 20: 0.0},
    ),
    (
        "flat to the very end",
        dict(kind="flat_cosine", epochs=20, peak_lr=1.0, flat_fraction=1.0),
        {0: 1.0, 20: 1.0},
    ),
    (
        "one cycle",
        dict(kind="onecycle", epochs=10, peak_lr=1.0, peak_epoch=3),
        {0: 0.04, 1.5: 0.52, 3: 1.0, 10: 4e-6},
    ),
]


@pytest.mark.parametrize("name, settings, rates", LR_CASES, ids=[case[0] for case in LR_CASES])
def test_lr_at_named_cases(name, settings, rates):
    for epoch, rate in rates.items():
        assert lr_at(epoch, **settings) == pytest.approx(rate, rel=1e-9, abs=1e-12), (name, epoch)


def test_every_schedule_has_a_case():
    assert {settings["kind"] for _, settings, _ in LR_CASES} == set(SCHEDULES)


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'cosin' is unknown.*flat_cosine"):
        lr_at(0, kind="cosin", epochs=1, peak_lr=1)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_lr_stays_between_zero_and_the_peak_and_reaches_it(kind):
    rates = [
        lr_at(e, kind=kind, epochs=30, peak_lr=0.7, peak_epoch=3, step_length=7)
        for e in np.linspace(0, 30, 301)
    ]
    reached = 0.7 if kind != "timm_cosine" else 0.35 * (1 + math.cos(math.pi / 10))
    assert min(rates) >= 0 and max(rates) == pytest.approx(reached)
    after_peak = rates[30:]
    assert all(a >= b - 1e-12 for a, b in pairwise(after_peak))


def test_linear_is_the_interpolation_of_ffcv_imagenet():
    epochs = np.linspace(0, 40, 401)
    expected = np.interp(epochs, [0, 2, 40], [1e-4 * 0.5, 0.5, 0])
    ours = [lr_at(e, kind="linear", epochs=40, peak_lr=0.5, peak_epoch=2) for e in epochs]
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_onecycle_equals_torch():
    steps, warm = 101, 30
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.8, total_steps=steps, pct_start=(warm + 1) / steps, cycle_momentum=False
    )
    for step in range(steps):
        ours = lr_at(step, kind="onecycle", epochs=steps - 1, peak_lr=0.8, peak_epoch=warm)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6), step
        optimizer.step()
        if step < steps - 1:
            scheduler.step()


@pytest.mark.parametrize("epochs", [100, 300])
def test_timm_cosine_equals_timm(epochs):
    """At the start of every epoch, where timm changes the rate: ResNet Strikes Back's settings."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-3)
    warm = dict(warmup_t=5, warmup_lr_init=1e-4)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, lr_min=1e-6, **warm)
    course = Course(epochs, 5e-3, 5, 1e-6, start=1e-4 / 5e-3)
    for epoch in range(epochs):
        scheduler.step(epoch)
        ours = make_schedule("timm_cosine", course, {})(epoch)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), epoch


def test_warm_up_starts_where_it_is_set():
    """timm's LinearLR from 1e-4 to 5e-3 at batch 2048 in five epochs."""
    lr = train_imagenet.defaults()["lr"] | {"lr_schedule_type": "cosine", "lr_peak_epoch": 5.0}
    lr |= {"lr": 5e-3 / 8, "min_lr": 1e-6 / 8, "warmup_start": 1e-4 / 5e-3}
    rate = lr_schedule(SimpleNamespace(**lr), epochs=300, scale=8)
    assert [rate(e) for e in (0, 2.5, 5, 300)] == pytest.approx([1e-4, 2.55e-3, 5e-3, 1e-6])


RESOLUTION_CASES = [
    ("ramp of rn50 16 epochs", (160, 192, 11, 13), {0: 160, 11: 160, 12: 192, 13: 192, 15: 192}),
    ("ramp of rn50 88 epochs", (160, 192, 65, 76), {65: 160, 70: 160, 71: 192, 76: 192}),
    ("long ramp", (128, 224, 0, 9), {0: 128, 1: 128, 2: 160, 5: 192, 8: 224, 9: 224}),
    ("constant", (64, 64, 0, 0), {0: 64, 1: 64, 100: 64}),
    ("constant, not a multiple of 32", (176, 176, 0, 0), {0: 176, 50: 176}),
    ("jump", (128, 160, 5, 5), {4: 128, 5: 160}),
    ("ends that are no multiples of 32", (88, 176, 2, 8), {2: 88, 3: 96, 7: 160, 8: 176}),
]


@pytest.mark.parametrize(
    "name, ramp, sides", RESOLUTION_CASES, ids=[case[0] for case in RESOLUTION_CASES]
)
def test_resolution_at_named_cases(name, ramp, sides):
    keys = dict(zip(("min_res", "max_res", "start_ramp", "end_ramp"), ramp, strict=True))
    for epoch, side in sides.items():
        assert resolution_at(epoch, **keys) == side, (name, epoch)


def test_resolution_between_the_ends_is_a_multiple_of_32():
    ramp = dict(min_res=128, max_res=224, start_ramp=3, end_ramp=50)
    sides = [resolution_at(epoch, **ramp) for epoch in range(60)]
    assert sides == sorted(sides) and {side % 32 for side in sides} == {0}


def test_a_ramp_in_steps_of_four_pixels():
    ramp = dict(min_res=88, max_res=176, start_ramp=13, end_ramp=26, step=4)
    sides = [resolution_at(epoch, **ramp) for epoch in range(32)]
    assert sides[14:26] == [96, 100, 108, 116, 120, 128, 136, 144, 148, 156, 164, 168]
    assert set(sides[:14]) == {88} and set(sides[26:]) == {176}


def test_an_ema_of_every_fourth_step_decays_as_four_steps():
    """MosaicML's half-life of 100 steps, updated every 20: its smoothing is 2 ** -(20 / 100)."""
    decays = [
        ema_decay_at(step, decay=0.5 ** (1 / 100), warmup=False, every=20) for step in range(1, 61)
    ]
    assert {n for n, decay in enumerate(decays, 1) if decay != 1} == {20, 40, 60}
    assert decays[19] == decays[59] == pytest.approx(2**-0.2)
    assert ema_decay_at(40, decay=0.999, every=20) == pytest.approx(3 / 12)  # the second update
    # torchvision's 0.99998 at batch 1024 for 600 epochs, every 32 steps
    per_update = 1 - 2e-5 * 1024 * 32 / 600
    found = ema_decay_at(320_000, decay=per_update ** (1 / 32), every=32)
    assert found == pytest.approx(per_update)


def test_ema_decay_grows_to_its_target():
    decays = [ema_decay_at(step, decay=0.999) for step in range(1, 20_000)]
    assert decays == sorted(decays) and decays[-1] == 0.999
    assert decays[0] == pytest.approx(2 / 11)
    assert ema_decay_at(1, decay=0.999, warmup=False) == 0.999
    assert ema_decay_at(5, decay=0.0) == 0.0


def test_lr_never_is_nan_at_the_edges():
    for kind in SCHEDULES:
        assert math.isfinite(lr_at(0, kind=kind, epochs=1, peak_lr=1, peak_epoch=0))
        assert math.isfinite(lr_at(1, kind=kind, epochs=1, peak_lr=1, peak_epoch=0))


@pytest.mark.parametrize("length", [0.1, 0.3, 0.7, 1 / 3, 2.4, 30])
def test_a_drop_comes_with_its_own_step(length):
    """The first step at or after k * step_length is the first at the lower rate, in floats too."""
    steps, exact = 1000, Fraction(length).limit_denominator(1000)
    for step in range(steps * 12):
        drops = Fraction(step, steps) // exact
        rate = lr_at(step / steps, kind="step", epochs=12, peak_lr=1, step_length=length)
        assert rate == pytest.approx(0.1**drops), step


def test_the_last_epoch_is_always_evaluated():
    due = [[epoch + 1 for epoch in range(7) if is_evaluated(epoch, 6, n)] for n in (1, 3, 7, 50)]
    assert due == [[1, 2, 3, 4, 5, 6, 7], [3, 6, 7], [7], [7]]


@pytest.mark.parametrize("flat_fraction, allowed", [(0.7, True), (0.665, False)])
def test_a_run_is_made_longer_only_where_no_decay_has_begun(flat_fraction, allowed):
    """Of 3 epochs 2 are done: the decay begins at 2.1, or at 1.995, just before their end."""
    lr = train_imagenet.defaults()["lr"]
    lr |= {"lr_schedule_type": "flat_cosine", "lr_peak_epoch": 1, "flat_fraction": flat_fraction}
    saved = {"config": {"training": {"epochs": 3}}, "epoch": 2, "step": 0}
    config = {"training": {"epochs": 4}, "lr": lr}
    assert (_why_no_longer("training.epochs: 3, not 4", saved, config) == "") == allowed
