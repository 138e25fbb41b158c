"""What happens to a training batch on the device: normalize, erase boxes, mix images.

Plain torch, no FFCV: any loader that gives uint8 batches can use it, on a CPU or a GPU. The host
draws every choice from keyed numbers, the device carries it out and nobody waits for it: boxes of
erasing go by (seed, epoch, sample), Mixup and CutMix by (seed, step or forward pass). Images are
mixed with their neighbors in the batch, so that one rank, two ranks and micro-batches of even size
mix the same.

    transforms = BatchTransforms(augment, MEAN, STD, num_classes=1000, label_smoothing=0.1, seed=0)
    images_bchw, targets = transforms(images_bhwc, labels_b, samples_b, epoch, step)

Arrays: images_bhwc uint8 in 0..255; images_bchw float, normalized, channels last in memory;
labels_b int64; samples_b numpy int64, index of each image in the dataset.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fast_imagenet import rng
from fast_imagenet.data.augmentation import MIX_ALPHAS, Augment
from fast_imagenet.erasing import check_erasing, draw_erasing

# ==== All of it, in one call ======================================================================


class BatchTransforms:
    """Normalize, erase and mix a batch as the settings say.

    Args:
        augment: its fields erasing, erasing_mode, erasing_count, mixup and cutmix are used.
        mean, std: three numbers each, of pixels in 0..1.
        num_classes, label_smoothing: of soft targets; the fraction given to all classes, 0 to 1.
        seed: of the run. dtype: of the images that come out.
        as_tensor: whether `inputs` has the mixing as a tensor, as a compiled network needs it.
    Raises: ValueError: a setting is out of range.
    """

    def __init__(
        self,
        augment: Augment,
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int,
        label_smoothing: float,
        seed: int,
        dtype: torch.dtype = torch.float32,
        as_tensor: bool = False,
    ) -> None:
        check_erasing(augment.erasing, augment.erasing_mode, augment.erasing_count)
        low, high = MIX_ALPHAS
        if not all(alpha == 0 or low <= alpha <= high for alpha in (augment.mixup, augment.cutmix)):
            raise ValueError(
                f"mixup is {augment.mixup}, cutmix {augment.cutmix}; give an alpha from {low:g} to "
                f"{high:g}, or 0 for off"
            )
        self.augment, self.mean, self.std = augment, mean, std
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.seed, self.dtype, self.as_tensor = seed, dtype, as_tensor
        self.mixes = augment.mixup > 0 or augment.cutmix > 0

    def __call__(
        self,
        images_bhwc: torch.Tensor,
        labels_b: torch.Tensor,
        samples_b: np.ndarray | None,
        epoch: int,
        step: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch, or a part of it: a part of even size is mixed as it is within the whole.

        As `inputs`, with all of it done.
        Returns: (images_bchw [b, 3, h, w], targets).
        """
        (images, mixing), targets = self.inputs(images_bhwc, labels_b, samples_b, epoch, step)
        if images.dtype == torch.uint8:
            images = normalize_and_mix(images, self.mean, self.std, mixing)
        return images.to(self.dtype), targets

    def inputs(
        self,
        images_bhwc: torch.Tensor,
        labels_b: torch.Tensor,
        samples_b: np.ndarray | None,
        epoch: int,
        step: int,
    ) -> tuple[tuple[torch.Tensor, Any], torch.Tensor]:
        """What an ImageNetwork (models/networks.py) is called with for a batch, and its targets.

        Args:
            images_bhwc: uint8 [b, h, w, 3] on any device; not changed. b may be odd: the last
                image then meets itself and stays as it is.
            labels_b: int64 [b], on the same device.
            samples_b: numpy int64 [b]; None is enough when nothing is erased.
            epoch, step: of the run, >= 0; or for step another key of the mixing, see `mix_keys`.
        Returns: ((images, mixing), targets): images_bhwc and what is left to do with them, or
            images_bchw that are ready, and None; labels_b, or, where the settings mix, float32
            [b, num_classes], smoothed.
        Raises: ValueError: images are to be erased and samples_b is None.
        """
        a, size = self.augment, (images_bhwc.shape[1], images_bhwc.shape[2])
        mixing, targets = None, labels_b
        if self.mixes:
            mixing = draw_mix(self.seed, step, size, a.mixup, a.cutmix)
            targets = mix_targets(labels_b, mixing, self.num_classes, self.label_smoothing)
        if a.erasing:
            if samples_b is None:
                raise ValueError("random erasing needs samples_b, the index of each image")
            images_bchw = normalize(images_bhwc, self.mean, self.std)
            key = (self.seed, epoch, samples_b)
            boxes = draw_erasing(*key, size, a.erasing, a.erasing_count)
            return (mix(erase(images_bchw, boxes, a.erasing_mode, *key), mixing), None), targets
        if mixing is not None and self.as_tensor:
            return (images_bhwc, mixing.tensor(size, images_bhwc.device)), targets
        return (images_bhwc, mixing), targets


# ==== Normalize ===================================================================================


def normalize(
    images_bhwc: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Zero mean and unit deviation, one multiply-add per value.

    Args: images_bhwc: uint8 [b, h, w, 3]. mean, std: three numbers each, of pixels in 0..1.
    Returns: images_bchw [b, 3, h, w] of `dtype`, channels last: (x / 255 - mean) / std within
        1e-6 for float32.
    """
    return normalize_and_mix(images_bhwc, mean, std, None).to(dtype)


def normalize_and_mix(
    images_bhwc: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    mixing: "Mixing | None",
) -> torch.Tensor:
    """`normalize` to float32 and `mix` in fewer passes: Mixup happens on the levels."""
    b, height, width, _ = images_bhwc.shape
    # Python's floats: torch.compile cannot look up a key with numpy's
    key = tuple(map(float, mean)), tuple(map(float, std)), width, images_bhwc.device
    scale, shift = _scale_and_shift(*key)
    # long rows: torch is slow on rows of three; every later pass works in place on this one copy
    images = images_bhwc.reshape(b, height, 3 * width).to(torch.float32, copy=True)
    blends = mixing is not None and mixing.box is None
    if blends:
        mix(images, mixing)
    torch.addcmul(shift, images, scale, out=images)
    images_bchw = images.view(b, height, width, 3).permute(0, 3, 1, 2)
    return images_bchw if blends else mix(images_bchw, mixing)


def normalize_in_graph(
    images_bhwc: torch.Tensor,
    scale_c: torch.Tensor,
    shift_c: torch.Tensor,
    mixing: torch.Tensor | None,
) -> torch.Tensor:
    """`normalize_and_mix` for torch.compile, which makes one kernel of it, for any mixing.

    Args: scale_c, shift_c: float32 [3]: level * scale + shift is the normalized value. mixing: of
        `Mixing.tensor`.
    """
    images = images_bhwc.float()
    if mixing is not None:
        weight, top, bottom, left, right = mixing.unbind()
        rows, columns = (torch.arange(n, device=images.device) for n in images.shape[1:3])
        inside_hw1 = ((rows >= top) & (rows < bottom))[:, None, None]
        inside_hw1 = inside_hw1 & ((columns >= left) & (columns < right))[:, None]
        images = images.lerp(neighbors(images), torch.where(inside_hw1, weight, 0.0))
    return (images * scale_c + shift_c).permute(0, 3, 1, 2)


_CONSTANTS: dict[
    tuple, tuple[torch.Tensor, ...]
] = {}  # made once per resolution: a step must not wait for a copy from the host


def _scale_and_shift(
    mean: tuple, std: tuple, width: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """float32 [3 * width] each: level * scale + shift is the normalized value."""
    key = (mean, std, width, device)
    if key not in _CONSTANTS:
        scale = [1 / (255 * s) for s in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        both = torch.tensor([scale, shift], dtype=torch.float32, device=device)
        _CONSTANTS[key] = both.repeat(1, width).unbind()
    return _CONSTANTS[key]


# ==== Random erasing ==============================================================================


def erase(
    images_bchw: torch.Tensor,
    boxes: np.ndarray,
    mode: str,
    seed: int,
    epoch: int,
    samples: np.ndarray,
) -> torch.Tensor:
    """Fill boxes of normalized images, in place.

    Args: images_bchw: float [b, 3, h, w], channels last. boxes: of `draw_erasing`. mode: 'const'
        (0, the mean color), 'rand' (N(0, 1), one number per box and channel) or 'pixel' (N(0, 1),
        one per pixel and channel). seed, epoch, samples: key of the noise.
    Returns: images_bchw. Where two boxes overlap, the later one is seen.
    """
    device, (height, width) = images_bchw.device, images_bchw.shape[2:]
    pixels_nc = images_bchw.permute(0, 2, 3, 1).view(-1, 3)
    for k in range(boxes.shape[1]):  # within one round every pixel is written once
        b, place, lengths = _lines(boxes[:, k], width)
        if not len(b):
            continue
        total = int(lengths.sum())  # known here: the device need not be asked
        line = torch.repeat_interleave(_send(lengths, device), output_size=total)
        within = torch.arange(total, device=device)
        index = _send(place + b * (height * width), device)[line] + within
        if mode == "const":
            pixels_nc.index_fill_(0, index, 0.0)
            continue
        erased, of_line = np.unique(b, return_inverse=True)
        key = (seed, epoch, np.asarray(samples, np.int64)[erased, None], rng.STREAM_ERASING_NOISE)
        if mode == "rand":
            color = rng.normal_array(*key, 3 * k + np.arange(3))
            values = _send(color[of_line], device)[line]
        else:
            prefix = _send(rng.prefix_array(*key).view(np.int64)[of_line], device)[line]
            counter = 3 * (_send(place, device)[line] + within)
            values = normal_noise(prefix, counter[:, None] + torch.arange(3, device=device))
        pixels_nc.index_copy_(0, index, values.to(pixels_nc.dtype))
    return images_bchw


def _lines(boxes: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of pixels of boxes int64 [b, 4], one after the other in one sequence of pixels.

    Returns: int64 each: image of every line; row * width + column of its first pixel, less the
        number of pixels in the lines before it; number of its pixels.
    """
    heights = boxes[:, 2]
    b = np.repeat(np.arange(len(boxes)), heights)
    row = np.arange(len(b)) - np.repeat(np.cumsum(heights) - heights, heights)
    lengths = boxes[b, 3]
    before = np.cumsum(lengths) - lengths
    return b, (boxes[b, 0] + row) * width + boxes[b, 1] - before, lengths


def _send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A small array on the device; from pinned memory, since any other copy waits for the GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def normal_noise(prefix: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """`rng.normal` on the device.

    Args: prefix: rng.prefix_array as int64. counter: int64, broadcast with it.
    Returns: float64 from N(0, 1), equal to rng.normal within 1e-12.
    """
    first = rng.mix_int64((prefix ^ counter) + rng.GAMMA_INT64)
    second = rng.mix_int64(first + rng.GAMMA_INT64)
    radius = torch.sqrt(-2.0 * torch.log(1.0 - rng.shift_int64(first, 11).double() * 2.0**-53))
    return radius * torch.cos(2.0 * np.pi * (rng.shift_int64(second, 11).double() * 2.0**-53))


# ==== Mixup and CutMix ============================================================================


class Mixing(NamedTuple):
    """How the images of a batch are mixed with their neighbors.

    lam: fraction of an image's own label, 0 to 1. box: (top, bottom, left, right) that comes from
    the other image (CutMix), ends excluded; None: all pixels are blended (Mixup).
    """

    lam: float
    box: tuple[int, int, int, int] | None

    def tensor(self, size: tuple[int, int], device: torch.device) -> torch.Tensor:
        """float32 [5] on the device: weight of the other image in a box, and the box.

        A graph that has been compiled for numbers would be compiled again for others.
        """
        whole = (0, size[0], 0, size[1])
        values = (1 - self.lam, *whole) if self.box is None else (1.0, *self.box)
        return _send(np.array(values, np.float32), device)


def mix_keys(by: str, rank: int, world_size: int) -> Callable[[int, int, int], int]:
    """(step, forward pass of this rank in it, their number) -> what keys the mixing besides seed.

    Args: by: 'step', or 'pass': the number of the forward pass among those of all ranks and steps,
        the same for any number of ranks with one size of the passes.
    """
    if by == "step":
        return lambda step, part, parts: step
    return lambda step, part, parts: (step * world_size + rank) * parts + part


def draw_mix(seed: int, step: int, size: tuple[int, int], mixup: float, cutmix: float) -> Mixing:
    """The mixing of a step: the same on every rank, for every micro-batch and after a resume.

    Args: seed, step: the key, >= 0. size: (height, width). mixup, cutmix: alpha of the Beta
        distribution of lam; with both above 0 each is taken in half of the steps. One must be.
    Returns: a Mixing; CutMix's lam is the fraction of pixels that stay.
    Source: Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899; timm Mixup, mode 'batch'
        (the draws too are timm's, from a generator of their own in place of numpy's global one).
        The boxes differ in one thing: of an odd height or width timm drops a pixel, as it takes
        half of it, rounded down, on both sides of the center; here nothing is dropped. At 64 px
        and alpha 1 the mean lam is 0.687, timm's 0.692.
    """
    # A generator whose numbers numpy has promised not to change; 20 us once a step.
    generator = np.random.RandomState(np.random.SeedSequence([seed, step]).generate_state(4))
    generator.rand()  # timm asks whether to mix at all
    cuts = generator.rand() < 0.5 if mixup > 0 and cutmix > 0 else cutmix > 0
    alpha = cutmix if cuts else mixup
    lam = float(generator.beta(alpha, alpha))
    if not cuts or lam == 1:
        return Mixing(lam, None)
    (height, width), side = size, np.sqrt(1 - lam)
    cut_h, cut_w = int(height * side), int(width * side)
    y, x = int(generator.randint(0, height)), int(generator.randint(0, width))
    top, bottom = max(0, y - cut_h // 2), min(height, y + (cut_h + 1) // 2)
    left, right = max(0, x - cut_w // 2), min(width, x + (cut_w + 1) // 2)
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return Mixing(lam, (top, bottom, left, right))


def neighbors(batch: torch.Tensor) -> torch.Tensor:
    """A copy with the first and the second exchanged, the third and the fourth, and so on.

    The reverse order, which timm mixes with, depends on how a batch is cut into ranks.
    """
    even = len(batch) // 2 * 2
    swapped = batch[:even].unflatten(0, (even // 2, 2)).flip(1).flatten(0, 1)
    return swapped if even == len(batch) else torch.cat([swapped, batch[even:]])


def mix(images_bchw: torch.Tensor, mixing: Mixing | None) -> torch.Tensor:
    """Mix float [b, 3, h, w] with `neighbors`, in place; None leaves it. Returns images_bchw."""
    if mixing is None:
        return images_bchw
    if mixing.box is None:
        if mixing.lam < 1:
            images_bchw.lerp_(neighbors(images_bchw), 1 - mixing.lam)
        return images_bchw
    top, bottom, left, right = mixing.box
    part = images_bchw[:, :, top:bottom, left:right]
    part.copy_(neighbors(part))
    return images_bchw


def mix_targets(
    labels_b: torch.Tensor, mixing: Mixing, num_classes: int, label_smoothing: float
) -> torch.Tensor:
    """Soft targets float32 [b, num_classes] of int64 labels_b: rows sum to 1."""
    off = label_smoothing / num_classes
    targets = torch.full((len(labels_b), num_classes), off, device=labels_b.device)
    targets.scatter_(1, labels_b[:, None], 1 - label_smoothing + off)
    return targets.lerp_(neighbors(targets), 1 - mixing.lam)
