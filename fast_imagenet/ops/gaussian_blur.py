"""GaussianBlur: some images are blurred, by a random amount."""

import numpy as np

from .. import rng
from .color import gaussian_blur
from .kernel import kernel
from .operation import KeyedOperation


def draw_blur(seed, epoch, samples, sigma, p):
    """Radius of every image: float64 [b], 0 where nothing changes.

    Args: samples: int64 [b]. sigma: (low, high) of the radius, in pixels. p: probability.
    """
    chosen = rng.uniform_array(seed, epoch, samples, rng.STREAM_BLUR, 0) < p
    part = rng.uniform_array(seed, epoch, samples, rng.STREAM_BLUR, 1)
    return np.where(chosen, sigma[0] + (sigma[1] - sigma[0]) * part, 0.0)


@kernel
def apply_blur(first, step, images_bhwc, radii):
    """Change images first, first + step, ... of a batch. radii: of `draw_blur`."""
    for b in range(first, len(images_bhwc), step):
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

    def __init__(
        self, sigma: float | tuple[float, float] = (0.1, 2.0), p: float = 0.5, *, seed: int = 0
    ) -> None:
        super().__init__(seed)
        span: tuple = (sigma, sigma) if np.ndim(sigma) == 0 else tuple(np.asarray(sigma))
        if len(span) != 2 or not 0 < span[0] <= span[1] <= 1000:
            raise ValueError(
                f"sigma is {sigma}; give a radius above 0, or 0 < low <= high; 1000 at most"
            )
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; give a probability, 0 to 1")
        self.sigma, self.p = tuple(map(float, span)), float(p)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        samples = np.asarray(samples, np.int64)
        return (draw_blur(self.seed, self._epoch, samples, self.sigma, self.p),)

    apply = staticmethod(apply_blur)
