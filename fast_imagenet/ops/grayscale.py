"""RandomGrayscale: some images lose their colour."""

import numpy as np

from .. import rng
from .color import to_grayscale
from .kernel import kernel
from .operation import KeyedOperation


def draw_grayscale(seed, epoch, samples, p):
    """Which images become grey: bool [b]. samples: int64 [b]. p: probability."""
    return rng.uniform_array(seed, epoch, samples, rng.STREAM_GRAYSCALE) < p


@kernel
def apply_grayscale(first, step, images_bhwc, chosen):
    """Change images first, first + step, ... of a batch where chosen[b]."""
    for b in range(first, len(images_bhwc), step):
        if chosen[b]:
            to_grayscale(images_bhwc[b])


class RandomGrayscale(KeyedOperation):
    """Grey images, in three equal channels, with probability p.

    Args: p: probability. seed: of this run; it decides every draw, with epoch and sample index.
    Shape: uint8 [b, height, width, 3], RGB, in place.
    Raises: ValueError for a p outside 0 to 1.
    Source: torchvision RandomGrayscale on PIL images (convert('L')).
    """

    def __init__(self, p: float = 0.1, *, seed: int = 0):
        super().__init__(seed)
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; give a probability, 0 to 1")
        self.p = float(p)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        return (draw_grayscale(self.seed, self._epoch, np.asarray(samples, np.int64), self.p),)

    apply = staticmethod(apply_grayscale)
