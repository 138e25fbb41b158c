"""The boxes of random erasing, drawn on the host: for the FFCV operation and for the device.

Plain numpy: neither torch nor FFCV is imported.
"""

from typing import Any

import numpy as np

from fast_imagenet import rng

ERASING_MODES = ("const", "rand", "pixel")
ERASING_AREA = (0.02, 1 / 3)  # fraction of the image, of all its boxes together
ERASING_ASPECT = (0.3, 1 / 0.3)  # height to width of a box
BOX_TRIES = 10


def check_erasing(p: float, mode: str, count: int) -> None:
    """Raises: ValueError: a probability outside 0 to 1, another mode, a count outside 1 to 1000."""
    if not 0 <= p <= 1:
        raise ValueError(f"random erasing has probability {p}; give 0 to 1")
    if mode not in ERASING_MODES:
        raise ValueError(f"random erasing has mode {mode!r}; use {', '.join(ERASING_MODES)}")
    if count != int(count) or not 1 <= count <= 1000:
        raise ValueError(f"random erasing has a count of {count}; give 1 to 1000 boxes")


def draw_erasing(
    seed: int,
    epoch: int,
    samples: np.ndarray,
    size: tuple[int, int],
    p: float,
    count: int = 1,
    area: tuple[float, float] = ERASING_AREA,
    aspect: tuple[float, float] = ERASING_ASPECT,
) -> np.ndarray:
    """The boxes to erase in each image.

    Args:
        seed, epoch, samples: key of the draws; samples int64 [b].
        size: (height, width) of the images.
        p: probability that an image loses anything, 0 to 1.
        count: most boxes per image; the number is uniform in 1..count.
        area: least and greatest fraction of the image that its boxes cover together.
        aspect: least and greatest height / width of a box, uniform in its logarithm.
    Returns: int64 [b, count, 4]: top, left, height, width; height 0 where there is no box. Boxes
        lie inside the image and are smaller than it in both directions.
    Source: Zhong et al., arXiv 1708.04896; timm RandomErasing (semantics, min_count 1).
    """
    samples = np.asarray(samples, np.int64)
    boxes = np.zeros((len(samples), count, 4), np.int64)
    erased = np.flatnonzero(rng.uniform_array(seed, epoch, samples, rng.STREAM_ERASING) < p)
    if len(erased):
        boxes[erased] = _draw_boxes(seed, epoch, samples[erased], size, count, area, aspect)
    return boxes


def _draw_boxes(
    seed: int,
    epoch: int,
    samples: np.ndarray,
    size: tuple[int, int],
    count: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> np.ndarray:
    """int64 [m, count, 4] for images that are erased; arguments as `draw_erasing`."""
    key = (seed, epoch, samples[:, None], rng.STREAM_ERASING)
    number = rng.integer_array(1, count + 1, *key, 1)  # [m, 1]
    tries = 2 + 4 * np.arange(count * BOX_TRIES).reshape(count, BOX_TRIES)  # first counter of each
    part, shape = (rng.uniform_array(*key[:2], key[2][:, None], key[3], tries + i) for i in (0, 1))
    pixels = (area[0] + part * (area[1] - area[0])) * (size[0] * size[1]) / number[:, :, None]
    log_low, log_high = np.log(aspect)
    ratio = np.exp(log_low + shape * (log_high - log_low))
    heights = np.rint(np.sqrt(pixels * ratio)).astype(np.int64)  # [m, count, tries]
    widths = np.rint(np.sqrt(pixels / ratio)).astype(np.int64)
    fits = (heights < size[0]) & (widths < size[1])
    chosen = fits.argmax(2)[:, :, None]
    h, w = (np.take_along_axis(sides, chosen, 2)[:, :, 0] for sides in (heights, widths))
    counter = 2 + 4 * (BOX_TRIES * np.arange(count) + chosen[:, :, 0])
    top = _integers(size[0] - h + 1, *key, counter + 2)
    left = _integers(size[1] - w + 1, *key, counter + 3)
    there = fits.any(2) & (np.arange(count) < number) & (h > 0) & (w > 0)
    return np.stack([top, left, h, w], 2) * there[:, :, None]


def _integers(spans: np.ndarray, *key: Any) -> np.ndarray:
    """rng.integer_array in [0, span) with a span for each; where it is below 1 there is no box."""
    top = rng.hash_array(*key) >> np.uint64(32)
    return ((top * np.maximum(spans, 1).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
