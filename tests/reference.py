"""Slow, obvious versions of what the package computes fast. Tests compare against these."""

import io
import math

import numpy as np
from PIL import Image

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


# ==== Order and flips =============================================================================


def repeated_augmentation(order, repeats, ranks, batch):
    """DeiT's RASampler: for each step, what each rank gets."""
    copies = [sample for sample in order for _ in range(repeats)]
    selected, each = len(order) // 256 * 256 // ranks, batch // ranks
    mine = [copies[rank::ranks][:selected] for rank in range(ranks)]
    return [[rank[s * each : (s + 1) * each] for rank in mine] for s in range(selected // each)]


def alternating_flip(seed, epoch, sample, copy=0):
    """A coin in the first epoch, then the other side every time; copies count as epochs."""
    coin = (hash_key(seed, 0, sample, 2, 0) >> 11) / 2**53 < 0.5
    return coin != ((epoch + copy) % 2 == 1)


# ==== Crop, decode, resize ========================================================================


def uniform(*key):
    """53 random bits of the key's hash as a number in [0, 1)."""
    return (hash_key(*key) >> 11) / 2**53


def random_resized_crop(seed, epoch, sample, height, width, scale, ratio):
    """torchvision's RandomResizedCrop.get_params with keyed numbers: (top, left, height, width)."""
    for trial in range(10):
        key = [(seed, epoch, sample, 1, 4 * trial + k) for k in range(4)]
        area = height * width * (scale[0] + uniform(*key[0]) * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + uniform(*key[1]) * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = ((hash_key(*key[2]) >> 32) * (height - h + 1)) >> 32
            left = ((hash_key(*key[3]) >> 32) * (width - w + 1)) >> 32
            return top, left, h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_resize(image_hwc, crop, size, method="bilinear"):
    """Cut the box out, then Pillow's resize (or the mean over areas), then the flip."""
    top, left, height, width, flip = crop
    if method == "area":
        box_hwc = image_hwc[top : top + height, left : left + width].astype(np.float64)
        rows, columns = area_weights(height, size[0]), area_weights(width, size[1])
        mean_hwc = np.einsum("yh,xw,hwc->yxc", rows, columns, box_hwc, optimize=True)
        result_hwc = np.floor(mean_hwc + 0.5).astype(np.uint8)
        return result_hwc[:, ::-1] if flip else result_hwc
    kernel = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[method]
    box_hwc = Image.fromarray(image_hwc[top : top + height, left : left + width])
    result_hwc = np.asarray(box_hwc.resize((size[1], size[0]), kernel))
    return result_hwc[:, ::-1] if flip else result_hwc


def area_weights(length, out):
    """[out, length]: shares of the source pixels in each output pixel; linear when enlarging."""
    scale, pixels = length / out, np.arange(length)
    weights = np.zeros((out, length))
    for x in range(out):
        left, right = x * scale, (x + 1) * scale
        if scale > 1:
            weights[x] = np.minimum(right, pixels + 1) - np.maximum(left, pixels)
        else:
            weights[x] = 1 - np.abs(pixels + 0.5 - (x + 0.5) * scale)
    weights = np.maximum(weights, 0)
    return weights / weights.sum(1, keepdims=True)


def decode_jpeg(data):
    """Full decode with Pillow: uint8 [height, width, 3], RGB."""
    return np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))
