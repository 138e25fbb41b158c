"""What a run computes, by hand: pixels, passes of its evaluations, hours."""

from types import SimpleNamespace

import pytest

from fast_imagenet.engine.work import evaluated_sets, work_of

IMAGES = (1000, 300)


def settings(decay=0.0, **validation) -> SimpleNamespace:
    v = dict(every=2, resolution=160, crop_ratio=1.0, lr_tta=False)
    v |= dict(plain_resolution=160, plain_crop_ratio=1.0) | validation
    return SimpleNamespace(
        training=SimpleNamespace(epochs=5),
        resolution=SimpleNamespace(min_res=80, max_res=320, start_ramp=1, end_ramp=2),
        validation=SimpleNamespace(**v),
        ema=SimpleNamespace(decay=decay),
    )


def test_pixels_are_counted_in_epochs_of_160():
    assert work_of(settings()).training == 2 * 0.25 + 3 * 4


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 3 * 1),  # both evaluations are one pass, after epochs 2, 4 and 5
        (dict(every=1), 5),
        (dict(every=9), 1),
        (dict(crop_ratio=0.875), 3 * 2),  # another crop: a pass of its own
        (dict(resolution=320), 3 * (1 + 4)),
        (dict(resolution=320, lr_tta=True), 3 * (1 + 4 + 4)),
        (dict(lr_tta=True), 3 * 2),  # the mirrored images of the one view
        (dict(decay=0.9), 3 + 1),  # of the raw weights at the end
    ],
)
def test_a_pass_over_the_validation_set_is_a_third_of_a_step(changes, passes):
    work = work_of(settings(**changes), IMAGES)
    assert work.evaluation == pytest.approx(passes / 3 * 0.3)
    assert work.evaluation_fraction == pytest.approx(passes / 10 / 12.5)


def test_hours_are_of_training_and_evaluation():
    assert work_of(settings(), IMAGES).hours(2.0) == pytest.approx((12.5 + 0.3) * 1000 / 2 / 3600)


def test_any_cost_of_an_image_can_be_given():
    """In units of a step at 160 px: here 10, while a forward pass costs 1 at any size."""
    work = work_of(settings(), IMAGES, cost=lambda _, is_step: 10 if is_step else 1)
    assert (work.training, work.evaluation) == (5, pytest.approx(3 * 0.3 / 10))


def test_each_set_of_weights_is_evaluated():
    assert [evaluated_sets(7, every, averaged=False) for every in (1, 3, 7, 50)] == [7, 3, 1, 1]
    assert evaluated_sets(7, 3, averaged=True) == 4
