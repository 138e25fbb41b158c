"""The built-in synthetic dataset: images of ten classes, five shapes x two textures.

An image shows one checked or striped shape at a random place, size, rotation and pair of colors
on a random background. Both textures cover half of the shape with each color, and nothing else
depends on the class, so that color alone does not help, texture alone reaches at most 20 %, and
shape alone at most 50 %. Image `index` depends on (seed, split, index) only.
"""

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fast_imagenet.sources.base import Source

SHAPES = ("cross", "disk", "square", "star", "triangle")
TEXTURES = ("checked", "striped")
CLASSES = [f"{texture}_{shape}" for texture in TEXTURES for shape in SHAPES]
SIDES = (64, 120)  # shortest and longest possible side, px
DEFAULT_SIZES = {"train": 4000, "val": 1000}
_SPLIT_KEY = {"train": 0, "val": 1}


class SyntheticSource(Source):
    """`size` synthetic images; every class has the same number of them, give or take one."""

    kind = "synthetic"
    makes_pixels = True

    def __init__(self, split: str, size: int, seed: int) -> None:
        labels = np.arange(size) % len(CLASSES)
        names = [name.replace("_", " ") for name in CLASSES]
        super().__init__(labels, CLASSES, names)
        self.split, self.seed = split, seed

    def name(self, index: int) -> str:
        return f"synthetic/{self.split}/{index}"

    def pixels(self, index: int) -> np.ndarray:
        """Image `index`: uint8 RGB [height, width, 3], both sides within SIDES."""
        return draw_image(int(self.labels[index]), (self.seed, _SPLIT_KEY[self.split], index))


def open_synthetic(
    path: Path, split: str, seed: int = 0, size: int = 0, **_: Any
) -> SyntheticSource:
    """Synthetic images; `path` is not used, `size` 0 means 4,000 for train and 1,000 for val."""
    return SyntheticSource(split, size or DEFAULT_SIZES[split], seed)


def draw_image(label: int, key: tuple[int, ...]) -> np.ndarray:
    """The image of class `label` for this key: uint8 RGB [height, width, 3].

    Args:
        label: index into CLASSES.
        key: non-negative integers; the same key gives the same image.
    """
    rng = np.random.default_rng(key)
    texture, shape = divmod(label, len(SHAPES))
    height, width = rng.integers(SIDES[0], SIDES[1] + 1, 2).tolist()
    short = min(height, width)
    radius = short * rng.uniform(0.32, 0.44)
    x_center = width / 2 + short * rng.uniform(-0.1, 0.1)
    y_center = height / 2 + short * rng.uniform(-0.1, 0.1)
    x_hw, y_hw = np.meshgrid(
        (np.arange(width, dtype=np.float32) - x_center) / radius,
        (np.arange(height, dtype=np.float32) - y_center) / radius,
    )
    colors = _colors(rng)
    distance_hw = _shape_distance(SHAPES[shape], *_rotate(x_hw, y_hw, rng.uniform(0, 2 * np.pi)))
    cover_hw = np.clip(0.5 - distance_hw * radius, 0, 1)  # one pixel of anti-aliasing
    turned = _rotate(x_hw, y_hw, rng.uniform(0, 2 * np.pi))
    mix_hw = _texture(TEXTURES[texture], *turned, rng.uniform(0.4, 0.55), rng.uniform(0, 1, 2))
    object_hwc = colors[0] + mix_hw[..., None] * (colors[1] - colors[0])
    ground_hwc = _background(rng, height, width, colors[2:])
    image_hwc = ground_hwc + cover_hw[..., None] * (object_hwc - ground_hwc)
    noise_hwc = rng.standard_normal(image_hwc.shape, np.float32) * np.float32(rng.uniform(2, 12))
    return np.clip(image_hwc + noise_hwc, 0, 255).astype(np.uint8)


def _rotate(x_hw: np.ndarray, y_hw: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x_hw - sin * y_hw, sin * x_hw + cos * y_hw


def _colors(rng: np.random.Generator) -> np.ndarray:
    """Two unlike colors of the shape, two of the background: float32 [4, 3] in 0..255."""
    for _ in range(20):
        colors = rng.uniform(0, 255, (4, 3)).astype(np.float32)
        apart = np.abs(colors[0] - colors[1]).sum()
        from_ground = np.abs(colors[:2, None] - colors[None, 2:]).sum(-1)
        if apart > 220 and from_ground.min() > 120:
            break
    return colors


def _shape_distance(shape: str, x_hw: np.ndarray, y_hw: np.ndarray) -> np.ndarray:
    """About the distance to the outline, negative inside, in radii; all areas are alike."""
    if shape == "disk":
        return np.hypot(x_hw, y_hw) - 0.8
    if shape == "square":
        return np.maximum(np.abs(x_hw), np.abs(y_hw)) - 0.72
    if shape == "cross":
        near, far = np.minimum(np.abs(x_hw), np.abs(y_hw)), np.maximum(np.abs(x_hw), np.abs(y_hw))
        return np.maximum(near - 0.32, far - 1.0)
    if shape == "triangle":
        return np.maximum(-y_hw, 0.5 * y_hw + np.float32(np.sqrt(0.75)) * np.abs(x_hw)) - 0.55
    return _star_distance(x_hw, y_hw)


def _star_distance(x_hw: np.ndarray, y_hw: np.ndarray) -> np.ndarray:
    """Five-pointed star: folded into one half of one point, it has one straight edge."""
    tip, notch, half = 1.1, 0.5, np.pi / 5
    angle_hw = np.abs((np.arctan2(y_hw, x_hw) + half) % (2 * half) - half)
    radius_hw = np.hypot(x_hw, y_hw)
    edge = np.array([notch * np.cos(half) - tip, notch * np.sin(half)])
    normal = np.array([edge[1], -edge[0]], np.float32) / np.float32(np.hypot(*edge))
    x_folded, y_folded = radius_hw * np.cos(angle_hw), radius_hw * np.sin(angle_hw)
    return normal[0] * (x_folded - tip) + normal[1] * y_folded


def _texture(
    texture: str, x_hw: np.ndarray, y_hw: np.ndarray, period: float, phase: np.ndarray
) -> np.ndarray:
    """Fraction of the second color, 0..1 [height, width]; `period` in radii, `phase` in periods."""
    wave = np.sin(2 * np.pi * (x_hw / np.float32(period) + np.float32(phase[0])))
    if texture == "checked":
        wave = wave * np.sin(2 * np.pi * (y_hw / np.float32(period) + np.float32(phase[1])))
    return np.clip(0.5 + 4 * wave, 0, 1)


def _background(
    rng: np.random.Generator, height: int, width: int, colors: np.ndarray
) -> np.ndarray:
    """A smooth mixture of two colors, float32 [height, width, 3]."""
    coarse = rng.uniform(0, 1, (4, 4)).astype(np.float32)
    mix_hw = np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    return colors[0] + mix_hw[..., None] * (colors[1] - colors[0])
