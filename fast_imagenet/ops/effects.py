"""Gray, solarized or blurred images: each with a probability of its own, or one of the three."""

from typing import Any

import numpy as np

from .. import rng
from .color import gaussian_blur, solarize, to_grayscale
from .kernel import kernel
from .operation import KeyedOperation, check_probability

GRAYSCALE, SOLARIZE, BLUR = range(3)
NOTHING = -1
THREE_THRESHOLD, THREE_RADIUS = 128.0, (0.1, 2.0)  # of ThreeAugment


@kernel
def apply_effects(first, end, images_bhwc, kinds, amounts):
    """Change images first to end - 1 of a batch.

    Args: kinds: int64 [b], GRAYSCALE, SOLARIZE, BLUR or NOTHING. amounts: float64 [b], threshold
        of SOLARIZE, radius of BLUR.
    """
    for b in range(first, end):
        if kinds[b] == GRAYSCALE:
            to_grayscale(images_bhwc[b])
        elif kinds[b] == SOLARIZE:
            solarize(images_bhwc[b], amounts[b])
        elif kinds[b] == BLUR:
            gaussian_blur(images_bhwc[b], amounts[b])


class _Effect(KeyedOperation):
    """One of the effects, with probability p; a subclass says which and how strong it is."""

    apply = staticmethod(apply_effects)
    kind: int
    stream: int

    def __init__(self, p: float, seed: int) -> None:
        super().__init__(seed)
        self.p = check_probability(p)

    def amounts(self, samples: np.ndarray) -> np.ndarray:
        """Of every sample, float64 [b]."""
        return np.zeros(len(samples))

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        chosen = rng.uniform_array(*self.key(samples), self.stream) < self.p
        return np.where(chosen, self.kind, NOTHING), self.amounts(samples)


class RandomGrayscale(_Effect):
    """Gray images, in three equal channels, with probability p.

    Args: p: probability. seed: of this run; it decides every draw, with epoch and sample index.
    Shape: uint8 [b, height, width, 3], RGB, in place.
    Raises: ValueError for a p outside 0 to 1.
    Source: torchvision RandomGrayscale on PIL images (convert('L')).
    """

    kind, stream = GRAYSCALE, rng.STREAM_GRAYSCALE

    def __init__(self, p: float = 0.1, *, seed: int = 0) -> None:
        super().__init__(p, seed)


class RandomSolarize(_Effect):
    """Invert the values at or above a threshold, with probability p.

    Args: threshold: 0 (all values) to 256 (none), not necessarily whole. p, seed: as
        RandomGrayscale.
    Shape: uint8 [b, height, width, 3], RGB, in place.
    Raises: ValueError for settings out of range.
    Source: Pillow's ImageOps.solarize; torchvision RandomSolarize.
    """

    kind, stream = SOLARIZE, rng.STREAM_SOLARIZE

    def __init__(self, threshold: float = 128, p: float = 0.5, *, seed: int = 0) -> None:
        super().__init__(p, seed)
        if not 0 <= threshold <= 256:
            raise ValueError(f"threshold is {threshold}; give a value from 0 to 256")
        self.threshold = float(threshold)

    def amounts(self, samples: np.ndarray) -> np.ndarray:
        return np.full(len(samples), self.threshold)


class GaussianBlur(_Effect):
    """Pillow's Gaussian blur (three box passes), with probability p and a random radius.

    Args: sigma: (low, high) of the radius in pixels, drawn uniformly; or one number. p, seed: as
        RandomGrayscale.
    Shape: uint8 [b, height, width, 3], RGB, in place.
    Raises: ValueError for settings out of range.
    Source: Pillow's ImageFilter.GaussianBlur. torchvision's GaussianBlur, a true Gaussian, differs
        by about one level on average.
    """

    kind, stream = BLUR, rng.STREAM_BLUR

    def __init__(
        self, sigma: float | tuple[float, float] = (0.1, 2.0), p: float = 0.5, *, seed: int = 0
    ) -> None:
        super().__init__(p, seed)
        radii: Any = (sigma, sigma) if np.ndim(sigma) == 0 else sigma
        if len(radii) != 2 or not 0 < radii[0] <= radii[1] <= 1000:
            raise ValueError(
                f"sigma is {tuple(radii)}; give a radius above 0, or 0 < low <= high; 1000 at most"
            )
        self.sigma = float(radii[0]), float(radii[1])

    def amounts(self, samples: np.ndarray) -> np.ndarray:
        low, high = self.sigma
        return low + (high - low) * rng.uniform_array(*self.key(samples), self.stream, 1)


class ThreeAugment(KeyedOperation):
    """Gray, solarized at 128, or blurred with a radius from 0.1 to 2: one of them, equally likely.

    DeiT III puts ColorJitter(0.3, 0.3, 0.3) after it.

    Args: seed: of this run; it decides every draw, with epoch and sample index.
    Shape: uint8 [b, height, width, 3], RGB, in place.
    Source: Touvron et al., "DeiT III", arXiv 2204.07118, 3-Augment.
    """

    apply = staticmethod(apply_effects)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        kinds = rng.integer_array(0, 3, *self.key(samples), rng.STREAM_POLICY)
        part = rng.uniform_array(*self.key(samples), rng.STREAM_MAGNITUDE)
        low, high = THREE_RADIUS
        return kinds, np.where(kinds == SOLARIZE, THREE_THRESHOLD, low + (high - low) * part)
