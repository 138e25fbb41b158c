"""RandomGrayscale: some images lose their color."""

import numpy as np

from .. import rng
from .color import to_grayscale
from .kernel import kernel
from .operation import KeyedOperation, check_probability


@kernel
def apply_grayscale(first, end, images_bhwc, chosen):
    """Change images first to end - 1 of a batch where chosen, bool [b]."""
    for b in range(first, end):
        if chosen[b]:
            to_grayscale(images_bhwc[b])


class RandomGrayscale(KeyedOperation):
    """Gray images, in three equal channels, with probability p.

    Args: p: probability. seed: of this run; it decides every draw, with epoch and sample index.
    Shape: uint8 [b, height, width, 3], RGB, in place.
    Raises: ValueError for a p outside 0 to 1.
    Source: torchvision RandomGrayscale on PIL images (convert('L')).
    """

    apply = staticmethod(apply_grayscale)

    def __init__(self, p: float = 0.1, *, seed: int = 0) -> None:
        super().__init__(seed)
        self.p = check_probability(p)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        return (rng.uniform_array(*self.key(samples), rng.STREAM_GRAYSCALE) < self.p,)
