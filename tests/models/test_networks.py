"""Networks as the loops call them, against the raw network and the batch's own transforms."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from fast_imagenet.data.augmentation import IMAGENET, Augment
from fast_imagenet.data.device_transforms import BatchTransforms
from fast_imagenet.engine.distributed import Distributed
from fast_imagenet.models.factory import try_network
from fast_imagenet.models.networks import (
    FixedBatch,
    ImageNetwork,
    build_networks,
    compile_network,
    distribute,
)

ALONE = Distributed(0, 1, 1, torch.device("cpu"))


def made_images(count=6, size=12):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


class Graphs:
    """A backend of torch.compile that keeps the graphs."""

    def __init__(self):
        self.found = []

    def __call__(self, graph, inputs):
        self.found.append(graph)
        return graph.forward


@pytest.mark.parametrize("settings", [{}, {"mixup": 0.2}, {"cutmix": 1.0},
                                      {"mixup": 0.2, "cutmix": 1.0}])  # fmt: skip
def test_a_compiled_network_normalizes_and_mixes_in_one_graph(settings):
    torch._dynamo.reset()
    graphs, network = Graphs(), ImageNetwork(nn.Conv2d(3, 4, 3))
    compiled = torch.compile(network, backend=graphs, dynamic=False)
    eager, in_graph = (BatchTransforms(Augment(**settings), *IMAGENET, 10, 0.1, 0, as_tensor=c)
                       for c in (False, True))  # fmt: skip
    labels, samples = torch.arange(6), np.arange(6)
    for step in range(8):
        ready, targets = eager(made_images(), labels, samples, 0, step)
        inputs, same = in_graph.inputs(made_images(), labels, samples, 0, step)
        assert inputs[0].dtype == torch.uint8 and torch.equal(targets, same)
        torch.testing.assert_close(compiled(*inputs), network.model(ready))
        torch.testing.assert_close(network(*inputs), network.model(ready))
        inputs, _ = eager.inputs(made_images(), labels, samples, 0, step)
        assert torch.equal(network(*inputs), network.model(ready))
    assert len(graphs.found) == 1


def test_erased_images_are_ready():
    transforms = BatchTransforms(Augment(erasing=1.0, mixup=0.2), *IMAGENET, 10, 0.1, 0)
    arguments = (made_images(), torch.arange(6), np.arange(6), 0, 0)
    (images_bchw, mixing), _ = transforms.inputs(*arguments)
    assert mixing is None and torch.equal(images_bchw, transforms(*arguments)[0])
    network = ImageNetwork(nn.Conv2d(3, 4, 3))
    assert torch.equal(network(images_bchw), network.model(images_bchw))


def test_batches_of_batch_norm_are_counted_as_by_torch():
    torch.manual_seed(0)
    plain, model = resnet18(num_classes=5), resnet18(num_classes=5)
    model.load_state_dict(plain.state_dict())
    network, images = ImageNetwork(model), torch.randn(4, 3, 32, 32)
    for training in (True, True, False, True):
        plain.train(training), network.train(training)
        assert torch.equal(plain(images), network(images))
    state = model.state_dict()
    assert list(state) == list(plain.state_dict()) and state["bn1.num_batches_tracked"] == 3
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    for value in plain.state_dict().values():  # an older checkpoint is resumed from
        value.zero_()
    model.load_state_dict(plain.state_dict())
    network.train()(images)
    assert model.state_dict()["layer4.1.bn2.num_batches_tracked"] == 1


def test_a_smaller_batch_is_filled_and_its_logits_are_the_same():
    torch._dynamo.reset()
    graphs, network = Graphs(), ImageNetwork(resnet18(num_classes=5)).eval()
    fixed = FixedBatch(torch.compile(network, backend=graphs, dynamic=False))
    with torch.no_grad():
        for count in (6, 6, 1, 5):
            logits = fixed(made_images(count, 32))
            torch.testing.assert_close(logits, network(made_images(count, 32)))
    assert len(graphs.found) == 1


def test_gradients_in_bf16_need_several_ranks():
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="gradients=bf16 is for several ranks.*torchrun, or use"):
        build_networks(model, ALONE, "off", "bf16")
    assert build_networks(model, ALONE, "auto").train_model.model is model
    assert torch.backends.cudnn.benchmark


def test_gradients_of_a_group_are_views_and_cross_as_asked(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        images, gradients = torch.randn(2, 3, 8, 8), {}
        for kind in ("fp32", "bf16"):
            torch.manual_seed(0)
            wrapped = distribute(nn.Conv2d(3, 4, 3), torch.device("cpu"), kind)
            wrapped(images).square().sum().backward()
            gradients[kind] = wrapped.module.weight.grad
        assert gradients["fp32"]._is_view()
        assert torch.equal(gradients["bf16"], gradients["fp32"].bfloat16().float())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("chosen", "home"), [("own", ""), ("", ""), ("", "/proc/none")])
def test_compiled_code_is_kept_where_a_reboot_leaves_it(tmp_path, monkeypatch, chosen, home):
    monkeypatch.setenv("XDG_CACHE_HOME", home or str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", chosen)
    if not chosen:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_network(nn.Identity())
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if home:  # torch's own, or none yet
        assert "fast_imagenet" not in folder
    else:
        assert folder == os.path.abspath(chosen or tmp_path / "fast_imagenet/inductor")


def test_a_network_that_shapes_do_not_tell_about_is_seeded():
    """What comes after a branch on the images' values cannot be tried; it may draw."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, images_bchw):
            scale = 2 if images_bchw.max() > 1 else 1
            return F.dropout(self.last(scale * images_bchw.mean((2, 3))))

    assert try_network(Branching(), [8], 2)
    assert not try_network(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), [8], 2)
