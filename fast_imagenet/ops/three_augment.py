"""ThreeAugment: every image is made gray, solarized or blurred. Exactly one of the three."""

import numpy as np

from .. import rng
from .color import gaussian_blur, solarize, to_grayscale
from .kernel import kernel
from .operation import KeyedOperation

GRAYSCALE, SOLARIZE, BLUR = range(3)
THRESHOLD = 128.0
RADIUS = (0.1, 2.0)


@kernel
def apply_three(first, end, images_bhwc, kinds, radii):
    """Change images first to end - 1 of a batch.

    Args: kinds: int64 [b], GRAYSCALE, SOLARIZE or BLUR. radii: float64 [b], of the blur.
    """
    for b in range(first, end):
        if kinds[b] == GRAYSCALE:
            to_grayscale(images_bhwc[b])
        elif kinds[b] == SOLARIZE:
            solarize(images_bhwc[b], THRESHOLD)
        else:
            gaussian_blur(images_bhwc[b], radii[b])


class ThreeAugment(KeyedOperation):
    """Gray, solarized at 128, or blurred with a radius from 0.1 to 2: one of them, equally likely.

    DeiT III puts ColorJitter(0.3, 0.3, 0.3) after it.

    Args: seed: of this run; it decides every draw, with epoch and sample index.
    Shape: uint8 [b, height, width, 3], RGB, in place.
    Source: Touvron et al., "DeiT III", arXiv 2204.07118, 3-Augment.
    """

    apply = staticmethod(apply_three)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        kinds = rng.integer_array(0, 3, *self.key(samples), rng.STREAM_POLICY)
        part = rng.uniform_array(*self.key(samples), rng.STREAM_MAGNITUDE)
        return kinds, RADIUS[0] + (RADIUS[1] - RADIUS[0]) * part
