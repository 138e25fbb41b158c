"""GaussianBlur: some images are blurred, by a random amount."""

from typing import Any

import numpy as np

from .. import rng
from .color import gaussian_blur
from .kernel import kernel
from .operation import KeyedOperation, check_probability


@kernel
def apply_blur(first, end, images_bhwc, radii):
    """Change images first to end - 1 of a batch. radii: float64 [b], 0 for no blur."""
    for b in range(first, end):
        if radii[b] > 0:
            gaussian_blur(images_bhwc[b], radii[b])


class GaussianBlur(KeyedOperation):
    """Pillow's Gaussian blur (three box passes), with probability p and a random radius.

    Args:
        sigma: (low, high) of the radius in pixels, drawn uniformly; or one number.
        p: probability.
        seed: of this run; with the epoch and the sample index it decides every draw.
    Shape: uint8 [b, height, width, 3], RGB, in place.
    Raises: ValueError for settings out of range.
    Source: Pillow's ImageFilter.GaussianBlur. torchvision's GaussianBlur, a true Gaussian, differs
        by about one level on average.
    """

    apply = staticmethod(apply_blur)

    def __init__(
        self, sigma: float | tuple[float, float] = (0.1, 2.0), p: float = 0.5, *, seed: int = 0
    ) -> None:
        super().__init__(seed)
        radii: Any = (sigma, sigma) if np.ndim(sigma) == 0 else sigma
        if len(radii) != 2 or not 0 < radii[0] <= radii[1] <= 1000:
            raise ValueError(
                f"sigma is {tuple(radii)}; give a radius above 0, or 0 < low <= high; 1000 at most"
            )
        self.sigma, self.p = (float(radii[0]), float(radii[1])), check_probability(p)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        key, (low, high) = self.key(samples), self.sigma
        chosen = rng.uniform_array(*key, rng.STREAM_BLUR, 0) < self.p
        part = rng.uniform_array(*key, rng.STREAM_BLUR, 1)
        return (np.where(chosen, low + (high - low) * part, 0.0),)
