"""Where host and device wait for each other: nowhere in a step, once in an evaluation.

A host that waits once a step launches no work ahead: on a GPU that costs more than any kernel.
"""

import pytest
import torch

import train_imagenet as recipe
from fast_imagenet.engine.distributed import Distributed
from fast_imagenet.engine.run import StepMonitor, StepRecorder
from fast_imagenet.engine.signals import SignalWatch
from tests.gpu_path.fake_gpu import (
    GPU,
    Crossings,
    batch,
    build_state,
    fake_gpu,
    gradients_by_hand,
    settings,
)

# The host waits here and nowhere else; a longer list is a slower trainer.
FIRST_STEP = {("_scale_and_shift", "_to_copy"): 1}  # once a resolution
EVALUATION = {("Score.read", "_to_copy"): 2}  # of two evaluations, each: sums read

MIXED = ("--augment.mixup=0.2", "--augment.cutmix=1.0")
ERASED = ("--augment.erasing=0.9", "--augment.erasing_count=2")
STEPS = {
    "bf16": (),
    "fp32": ("--training.precision=fp32",),
    "fp16, gradients clipped": ("--training.precision=fp16", "--training.clip_grad=1"),
    "average": ("--ema.decay=0.99",),
    "mixed": MIXED,
    "mixed, binary loss": (*MIXED, "--training.loss=bce"),
    "erased": ERASED,
    "erased by noise": (*ERASED, "--augment.erasing_mode=rand"),
    "erased by noisy pixels": (*ERASED, "--augment.erasing_mode=pixel"),
    "micro-batches": ("--training.micro_batch_size=2", *MIXED, *ERASED),
    "lamb": ("--training.optimizer=lamb", "--training.clip_grad=1"),
}


@pytest.mark.parametrize("flags", STEPS.values(), ids=STEPS)
def test_a_step_waits_for_nothing(flags):
    first, later = Crossings(), Crossings()
    with fake_gpu():
        state = build_state(settings(*flags))
        with gradients_by_hand(state.model):
            with first:
                recipe.train_step(state, batch(), 0)
            with later:  # Mixup and CutMix take turns
                recipe.train_epoch(state, [batch()] * 2, StepRecorder(first_step=1))
    assert later.waits == {}
    assert first.waits.items() <= FIRST_STEP.items()
    # pixels of erased boxes; how to mix
    assert bool(later.flows) == bool({"--augment.erasing=0.9", "--augment.mixup=0.2"} & {*flags})


def test_an_evaluation_waits_when_it_is_read():
    cfg, crossings = settings("--validation.lr_tta=1", "--ema.decay=0.9"), Crossings()

    def batches(resolution, crop_ratio):
        return [batch(count, resolution)[:2] for count in (4, 4, 3)]

    with fake_gpu():
        state = build_state(cfg)
        with crossings:
            recipe.evaluate(state.eval_model, batches, cfg, state.autocast, GPU)
            first = dict(crossings.waits)
            with state.ema.applied():
                recipe.evaluate(state.eval_model, batches, cfg, state.autocast, GPU)
    again = {place: crossings.waits[place] - count for place, count in first.items()}
    assert {place: count for place, count in again.items() if count} == EVALUATION
    assert set(first) <= {*EVALUATION, *FIRST_STEP}


def test_losses_are_read_once_in_many_steps():
    crossings, alone = Crossings(), Distributed(0, 1, 1, GPU)
    with fake_gpu(), crossings:
        monitor = StepMonitor(SignalWatch(), alone, minutes=0, save=lambda _: None)
        losses = []
        for step in range(1, 150):
            losses.append(torch.zeros((), device=GPU))
            monitor(step, losses)
    assert crossings.waits == {("mean_losses", "_to_copy"): 2}


def test_the_backward_pass_reads_nothing():
    """On the meta device, where reading a value fails."""
    cfg = settings("--training.precision=fp32", *MIXED)
    with torch.device("meta"):
        model = recipe.build_model(cfg, 10, torch.device("meta"))
        images_bchw = torch.empty(4, 3, 64, 64)
        loss = recipe.build_loss("ce", 10, 0.1)(model(images_bchw), torch.empty(4, 10))
    crossings = Crossings()
    with crossings:
        loss.backward()
    assert crossings.waits == {}
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_whoever_waits_is_named():
    crossings = Crossings()
    with fake_gpu(), crossings:
        device_b = torch.zeros(3, device=GPU)
        float(device_b.sum())
        device_b.new_tensor([3])
        device_b[torch.tensor([True, False, True])] = 1  # a mask from the host
        torch.zeros(3).to(GPU, non_blocking=True)  # from memory that is not pinned
        torch.zeros(3).pin_memory().to(GPU, non_blocking=True)
        device_b * torch.tensor(2.0)  # a number is an argument
    names = {"_local_scalar_dense": 1, "_to_copy": 2, "index_put_": 1}
    assert crossings.waits == {("a test", name): count for name, count in names.items()}
    assert crossings.flows == {("a test", "_to_copy"): 1}
