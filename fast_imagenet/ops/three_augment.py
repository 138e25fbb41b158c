"""ThreeAugment: every image is made grey, solarised or blurred. Exactly one of the three."""

import numpy as np

from .. import rng
from .color import gaussian_blur, solarize, to_grayscale
from .kernel import kernel
from .operation import KeyedOperation

GRAYSCALE, SOLARIZE, BLUR = range(3)
THRESHOLD = 128.0
RADIUS = (0.1, 2.0)


def draw_three(seed, epoch, samples):
    """What happens to every image, and the radius where it is a blur.

    Args: samples: int64 [b].
    Returns: kinds int64 [b] (GRAYSCALE, SOLARIZE or BLUR), radii float64 [b].
    """
    kinds = rng.integer_array(0, 3, seed, epoch, samples, rng.STREAM_POLICY, 0)
    part = rng.uniform_array(seed, epoch, samples, rng.STREAM_MAGNITUDE, 0)
    return kinds, RADIUS[0] + (RADIUS[1] - RADIUS[0]) * part


@kernel
def apply_three(first, step, images_bhwc, kinds, radii):
    """Change images first, first + step, ... of a batch. Choices: of `draw_three`."""
    for b in range(first, len(images_bhwc), step):
        if kinds[b] == GRAYSCALE:
            to_grayscale(images_bhwc[b])
        elif kinds[b] == SOLARIZE:
            solarize(images_bhwc[b], THRESHOLD)
        else:
            gaussian_blur(images_bhwc[b], radii[b])


class ThreeAugment(KeyedOperation):
    """Grey, solarised at 128, or blurred with a radius from 0.1 to 2: one of them, equally likely.

    DeiT III puts ColorJitter(0.3, 0.3, 0.3) after it.

    Args: seed: of this run; it decides every draw, with epoch and sample index.
    Shape: uint8 [b, height, width, 3], RGB, in place.
    Source: Touvron et al., "DeiT III", arXiv 2204.07118, 3-Augment.
    """

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        return draw_three(self.seed, self._epoch, np.asarray(samples, np.int64))

    apply = staticmethod(apply_three)
