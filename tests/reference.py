"""Slow, obvious versions of what the package computes fast. Tests compare against these."""

import numpy as np


# ==== Keyed random numbers ========================================================================


def hash_key(seed, epoch, sample, stream, counter):
    """splitmix64's finaliser once per key word, in Python's unbounded integers."""
    mask = 2**64 - 1
    word = 0
    for part in (seed, epoch, sample, stream, counter):
        word = ((word ^ (part & mask)) + 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        word = word ^ (word >> 31)
    return word


# ── training: blur, top-k ─────────────────────────────────────────────────────────────────────────


def blur_image(image_hw: np.ndarray) -> np.ndarray:
    """[1 2 1] x [1 2 1] / 16 around every pixel; zeros outside. (H, W) -> (H, W) float64."""
    height, width = image_hw.shape
    weights = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        out[y, x] += weights[dy + 1, dx + 1] * image_hw[y + dy, x + dx]
    return out


def top_k_hits(logits_bk, labels_b, k: int) -> list[bool]:
    """Whether each label is among the k largest logits of its row."""
    return [
        int(label) in sorted(range(len(row)), key=lambda c: -row[c])[:k]
        for row, label in zip(logits_bk.tolist(), labels_b.tolist(), strict=True)
    ]
