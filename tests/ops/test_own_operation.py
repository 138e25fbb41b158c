"""The operation of docs/operations.md, section "Write your own operation", is run as it stands."""

import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from fast_imagenet.data.augmentation import Augment, Stage
from fast_imagenet.data.torch_augmentation import v2
from fast_imagenet.ops.operation import KeyedOperation
from tests.conftest import ROOT

SECTION = (ROOT / "docs/operations.md").read_text().split("## Write your own operation")[1]
OPERATION, ROW, TEST = re.findall(r"```py\n(.*?)```", SECTION.split("## Errors")[0], re.S)


def test_the_operation_of_the_docs_equals_pillow(tmp_path, monkeypatch):
    (tmp_path / "own_posterize.py").write_text(OPERATION)
    monkeypatch.syspath_prepend(tmp_path)
    from own_posterize import RandomPosterize

    names = {"np": np, "Image": Image, "ImageOps": ImageOps, "RandomPosterize": RandomPosterize}
    exec(TEST, names)
    operation = RandomPosterize(0.5, seed=3)
    (masks,) = operation.draw(np.arange(2000), (8, 8))
    assert abs((masks == 0xF0).mean() - 0.5) < 0.05
    assert (masks[::2] == operation.draw(np.arange(0, 2000, 2), (8, 8))[0]).all()


def test_a_kernel_with_a_step_is_refused():
    """It would change a part of the images only."""
    with pytest.raises(TypeError, match=r"Old.apply takes a step; kernels take \(first, end"):
        type("Old", (KeyedOperation,), {"apply": staticmethod(lambda first, step, images: None)})


def test_the_row_of_the_docs_is_a_stage():
    names = {"Stage": Stage}
    function, row = ROW.split("\n\n\n")
    exec(f"{function}\n\n\nrow = {row}", names)
    settings = Augment()
    object.__setattr__(settings, "posterize", 0.25)
    assert names["row"].caption(settings) == ("Posterize", "25% of images, 4 bits")
    twins = type("twins", (), {"v2": v2})
    assert names["row"].transform(twins, settings, "cpu").p == 0.25
