"""Random changes to training images by torchvision and timm, for samples.py.

The same settings as the operations of fast_imagenet/ops, the same order and distributions, other
random numbers. On a CPU the images are Pillow's, which the operations equal; on a GPU they are
tensors, where torchvision differs by a level here and there, in hue by up to 12. Blur is
torchvision's, a true Gaussian; the operations have Pillow's.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2

from fast_imagenet.data.augmentation import Augment, stages_of

TOP_MAGNITUDE = 30  # torchvision's strongest bin
BLUR = {"kernel_size": 13, "sigma": (0.1, 2.0)}  # 13 px reach three deviations
TIMM_FILL = (124, 116, 104)  # mean color of ImageNet, outside the image
_STREAM = 1  # the crop's key is (seed, epoch, index); this number makes another one


class KeyedTransforms:
    """Everything between flip and normalization, drawn by (seed, epoch, index).

    Args:
        augment: policy, color, grayscale, solarize and blur of it are used.
        seed: of the run, >= 0.
        transforms: 'cpu' or 'gpu', where it will run.
    Raises:
        ValueError: a setting is out of range, or its policy cannot run on a GPU.
    """

    def __init__(self, augment: Augment, seed: int, transforms: str) -> None:
        self.seed, self.on_pillow = seed, transforms == "cpu"
        self.stages = build_stages(augment, transforms)

    def __call__(self, image_hwc: torch.Tensor, epoch: int, index: int) -> torch.Tensor:
        """One uint8 image (h, w, 3), contiguous, to another; the process's generators stay."""
        if not self.stages:
            return image_hwc
        image: Any = image_hwc.permute(2, 0, 1)
        if self.on_pillow:
            image = Image.fromarray(image_hwc.numpy())
        with keyed_generator([self.seed, epoch, index, _STREAM]):
            for stage in self.stages:
                image = stage(image)
        if self.on_pillow:
            return torch.from_numpy(np.array(image))  # a copy: Pillow's own memory is read-only
        return image.permute(1, 2, 0).contiguous()


def build_stages(augment: Augment, transforms: str) -> list[Callable]:
    """Callables from image to image, in the order of STAGES; without those not asked for.

    Raises:
        ValueError: a stage that torchvision cannot do, a setting out of range, or a policy that
            cannot run on a GPU.
    """
    stages, twins = [], sys.modules[__name__]
    for stage in stages_of(augment):
        if stage.transform is None:
            raise ValueError(
                f"data.backend=torchvision cannot do the augmentation {stage.name!r}: it has no "
                f"torchvision transform in fast_imagenet/data/augmentation.py; use "
                f"data.backend=ffcv, or turn it off"
            )
        stages.append(stage.transform(twins, augment, transforms))
    return stages


def blur() -> v2.GaussianBlur:
    """Of the stage blur and of the policy three_augment."""
    return v2.GaussianBlur(**BLUR)


def three_augment() -> v2.RandomChoice:
    """The policy three_augment."""
    return v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(128, 1.0), blur()])


def trivial_augment_bilinear() -> v2.TrivialAugmentWide:
    """The policy of that name."""
    return v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)


class RandAugment(v2.RandAugment):
    """torchvision's RandAugment, also with a noisy or fractional magnitude.

    Args:
        num_ops: operations per image.
        magnitude: 0 to 30; between two bins to a hundredth.
        mstd: standard deviation of the magnitude, drawn for each operation; above 100 it is uniform
            from 0 to `magnitude`.
        where: 'cpu' or 'gpu'; it runs on both.
    Raises:
        ValueError: the magnitude is out of range.
    """

    def __init__(self, num_ops: int, magnitude: float, mstd: float, where: str = "cpu") -> None:
        if not 0 <= magnitude <= TOP_MAGNITUDE:
            raise ValueError(
                f"augment.policy_magnitude={magnitude:g}; torchvision's RandAugment takes 0 to "
                f"{TOP_MAGNITUDE}"
            )
        # bins of a hundredth only where needed: a table of another length is rounded differently
        self.parts = 1 if mstd == 0 and magnitude == int(magnitude) else 100
        super().__init__(num_ops=1, num_magnitude_bins=self.parts * TOP_MAGNITUDE + 1)
        self.count, self.mean, self.mstd = num_ops, magnitude, mstd

    def forward(self, image: Any) -> Any:
        for _ in range(self.count):  # one at a time: each has a magnitude of its own
            self.magnitude = round(self.parts * self._draw())
            image = super().forward(image)
        return image

    def _draw(self) -> float:
        if self.mstd == 0:
            return self.mean
        if self.mstd > 100:
            return self.mean * float(torch.rand(()))
        drawn = self.mean + self.mstd * float(torch.randn(()))
        return min(max(drawn, 0.0), float(TOP_MAGNITUDE))


class LiteRandAugment(RandAugment):
    """RandAugment without Color and Sharpness, which are neither tables of levels nor affine."""

    _AUGMENTATION_SPACE = {  # noqa: RUF012
        name: entry
        for name, entry in v2.RandAugment._AUGMENTATION_SPACE.items()
        if name not in ("Color", "Sharpness")
    }


class TimmRandAugment:
    """timm's rand-m{magnitude}-n{num_ops}-mstd{mstd}-inc1, bilinear, on Pillow images.

    Args: as RandAugment; the magnitude is a whole number from 0 to 10.
    Raises:
        ValueError: it is not, or it shall run on a GPU.
    """

    def __init__(self, num_ops: int, magnitude: float, mstd: float, where: str = "cpu") -> None:
        if where == "gpu":
            raise ValueError(
                "augment.policy=rand_augment_timm changes Pillow images and so cannot run with "
                "data.transforms=gpu; use data.transforms=cpu, or augment.policy=rand_augment"
            )
        from timm.data.auto_augment import rand_augment_transform

        if magnitude != int(magnitude) or not 0 <= magnitude <= 10:
            raise ValueError(
                f"augment.policy_magnitude={magnitude:g}; timm's RandAugment takes a whole number "
                f"from 0 to 10"
            )
        hparams = {"img_mean": TIMM_FILL, "interpolation": Image.Resampling.BILINEAR}
        name = f"rand-m{int(magnitude)}-n{num_ops}-mstd{mstd:f}-inc1"
        self.transform = rand_augment_transform(name, hparams)
        for operation in self.transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize

    def __call__(self, image: Image.Image) -> Image.Image:
        """Another image; decided by torch's generator, though timm draws from two others."""
        seeds = torch.randint(2**32, (2,)).tolist()
        states = np.random.get_state(), random.getstate()
        np.random.seed(seeds[0])
        random.seed(seeds[1])
        try:
            return self.transform(image)
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest bits. None is black: the full magnitude asks for it, Pillow 13 refuses."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else image.point(lambda level: 0)


@contextmanager
def keyed_generator(key: list[int]) -> Iterator[None]:
    """torch's generator as the key sets it; afterwards as it was."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    state = torch.get_rng_state()
    # not torch.manual_seed: it also queues a call for every GPU, 0.4 ms and never freed
    torch.default_generator.manual_seed(int(seed))
    try:
        yield
    finally:
        torch.set_rng_state(state)
