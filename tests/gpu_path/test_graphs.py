"""Graphs that a whole run compiles: each takes minutes on a GPU, so they are counted."""

import pytest
import torch
from torch._dynamo.utils import counters

import train_imagenet as recipe

# A run at 32 and 48 px; of 30 images to evaluate the last batch has 14, which are filled up.
RUN = ("--training.epochs=3", "--training.max_steps=0", "--training.compile=on")
RUN += ("--training.precision=bf16",)
RUN += ("--resolution.max_res=48", "--resolution.end_ramp=1", "--ema.decay=0.9")
RUN += ("--validation.resolution=48", "--validation.lr_tta=1")
RUN += ("--augment.mixup=0.2", "--augment.cutmix=1")  # other numbers at every step

SIDES = (32, 48)

BEFORE_THE_FIRST_STEP = [f"train 16 x {size} px" for size in SIDES]
BEFORE_THE_FIRST_STEP += [f"evaluate 16 x {size} px" for size in SIDES]


class Graphs(list):
    """A backend of torch.compile that runs a graph as it is and notes what it is for."""

    def __call__(self, graph, inputs):
        sizes = [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 4]
        images, side = next((x[0], x[2]) for x in sizes if x[2] in SIDES)
        mode = "train" if torch.is_grad_enabled() else "evaluate"
        self.append(f"{mode} {images} x {side} px")
        return graph.forward


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled, in order, with 'epoch' at the start of every one."""
    noted, compiler = Graphs(), torch.compile
    real_epoch = recipe.train_epoch

    def train_epoch(*args):
        noted.append("epoch")
        real_epoch(*args)

    monkeypatch.setattr(
        torch, "compile", lambda model, **options: compiler(model, **options | {"backend": noted})
    )
    monkeypatch.setattr(recipe, "train_epoch", train_epoch)
    torch._dynamo.reset()
    counters.clear()
    yield noted
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_run_compiles_each_graph_once(quick_run, graphs, one_thread):
    quick_run(*RUN)
    assert graphs == [*BEFORE_THE_FIRST_STEP, "epoch", "epoch", "epoch"]
    assert counters["graph_break"] == {}
    assert counters["frames"]["total"] == counters["frames"]["ok"]
