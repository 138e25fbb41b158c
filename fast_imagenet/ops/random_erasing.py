"""RandomErasing: fill random boxes of an image, on normalized or on uint8 images.

    [CropDecode(...), Normalize(MEAN, STD), RandomErasing(0.25, mode="pixel"), ToTensor(), ...]

Boxes and noise are those of data/device_transforms.py, which erases on the device: the two give the
same images, within float rounding of the noise.

Axes: b batch, h height, w width, c channel (RGB).
"""

import numpy as np
from ffcv.pipeline.state import State

from .. import rng
from ..erasing import ERASING_AREA, ERASING_ASPECT, ERASING_MODES, check_erasing, draw_erasing
from .kernel import kernel
from .operation import KeyedOperation

# How a float32 is stored; numba has no half types on a CPU, so these are written as bits.
FLOAT32, FLOAT16, BFLOAT16 = range(3)
FORMATS = {np.dtype(name): form for form, name in enumerate(("f4", "f2", "u2"))}


@kernel
def half_bits(value, form):
    """The 16 bits of a finite float32 as FLOAT16 (below 65504) or BFLOAT16, ties to even."""
    bits = np.int64(np.float32(value).view(np.uint32))
    if form == BFLOAT16:
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    sign, size = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if size < 0x38800000:  # below 2**-14 float16 counts in steps of 2**-24
        return sign | np.int64(np.rint(abs(np.float64(value)) * 2.0**24))
    size -= 0x38000000  # the exponents' offsets: 127 and 15
    return sign | ((size + 0xFFF + ((size >> 13) & 1)) >> 13)


@kernel
def apply_erasing(first, end, images_bhwc, boxes, samples, mode, form, key, fill):
    """Fill the boxes of images first to end - 1 in place.

    Args:
        images_bhwc: [b, h, w, 3], float32, uint16 (bits of a half type) or, for mode 0, uint8.
        boxes: int64 [b, count, 4]: top, left, height, width.
        samples: int64 [b].
        mode: 0 fill [3] (of the images' type), 1 noise by box and channel, 2 by pixel and
            channel.
        form: FLOAT32, FLOAT16 or BFLOAT16. key: (seed, epoch), int64.
    """
    for b in range(first, end):
        for k in range(boxes.shape[1]):
            if boxes[b, k, 2] > 0:
                _erase_box(images_bhwc[b], boxes[b, k], k, samples[b], mode, form, key, fill)


@kernel
def _erase_box(image_hwc, box, k, sample, mode, form, key, fill):
    """Fill box number k of an image. Arguments as `apply_erasing`."""
    top, left = box[0], box[1]
    bottom, right = top + box[2], left + box[3]
    if mode == 2:
        _fill_noise(image_hwc, top, bottom, left, right, form, key, sample)
        return
    color = fill.copy()
    if mode == 1:
        for c in range(3):
            color[0, c] = _noise(key, sample, 3 * k + c, form)
    _fill_color(image_hwc, top, bottom, left, right, color)


@kernel
def _fill_color(image_hwc, top, bottom, left, right, color):
    red, green, blue = color[0, 0], color[0, 1], color[0, 2]
    for y in range(top, bottom):
        row = image_hwc[y]
        for x in range(left, right):
            row[x, 0] = red
            row[x, 1] = green
            row[x, 2] = blue


@kernel
def _fill_noise(image_hwc, top, bottom, left, right, form, key, sample):
    width = image_hwc.shape[1]
    for y in range(top, bottom):
        row = image_hwc[y]
        for x in range(left, right):
            counter = 3 * (y * width + x)
            row[x, 0] = _noise(key, sample, counter, form)
            row[x, 1] = _noise(key, sample, counter + 1, form)
            row[x, 2] = _noise(key, sample, counter + 2, form)


@kernel
def _noise(key, sample, counter, form):
    """A number of N(0, 1) as it is stored: its value, or its bits."""
    value = np.float32(rng.normal(key[0], key[1], sample, rng.STREAM_ERASING_NOISE, counter))
    return np.float64(value) if form == FLOAT32 else np.float64(half_bits(value, form))


class RandomErasing(KeyedOperation):
    """Random boxes lose their content, as timm's RandomErasing after normalization.

    Args:
        p: probability that an image is erased.
        mode: 'const', 'rand' (one normal number per box and channel) or 'pixel' (one per
            pixel and channel). The noise needs normalized images.
        count: most boxes per image; their number is uniform in 1..count.
        area: least and greatest fraction of the image that its boxes cover together.
        aspect: least and greatest height / width of a box.
        fill: for 'const' on uint8 images, three levels; the default is ImageNet's mean. In
            normalized images the mean is 0 and 0 is the fill.
        seed: of the run.
    Shape: [b, h, w, 3]; uint8, or what Normalize gives: float32, float16, bfloat16 as uint16.
    Raises: ValueError for settings out of range; noise on uint8 images.
    Source: Zhong et al., arXiv 1708.04896; timm RandomErasing (semantics).
    """

    dtypes = (np.dtype("u1"), *FORMATS)

    def __init__(
        self,
        p: float = 0.25,
        mode: str = "const",
        count: int = 1,
        *,
        area: tuple[float, float] = ERASING_AREA,
        aspect: tuple[float, float] = ERASING_ASPECT,
        fill: tuple[int, int, int] = (124, 116, 104),
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        check_erasing(p, mode, count)
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise ValueError(f"area is {area}; give 0 < low <= high <= 1")
        if len(aspect) != 2 or not 0 < aspect[0] <= aspect[1] < np.inf:
            raise ValueError(f"aspect is {aspect}; give 0 < low <= high")
        if len(fill) != 3 or not all(0 <= level <= 255 for level in fill):
            raise ValueError(f"fill is {fill}; give three levels, 0 to 255")
        self.p, self.mode, self.count = float(p), mode, int(count)
        self.area, self.aspect, self.fill = (area[0], area[1]), (aspect[0], aspect[1]), tuple(fill)

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        """(boxes int64 [b, count, 4], samples)."""
        fractions = (self.area, self.aspect)
        boxes = draw_erasing(*self.key(samples), size, self.p, self.count, *fractions)
        return boxes, samples

    def options(self, dtype: np.dtype) -> tuple:
        self._check(dtype)
        form, is_bytes = FORMATS.get(dtype, FLOAT32), dtype == np.uint8
        stored = np.dtype("u2") if form == FLOAT16 else dtype
        # 2-d: with a Loader in the process numba cannot write to uint8 arrays of one dimension
        fill = np.array([self.fill if is_bytes else (0, 0, 0)], stored)
        key = (np.int64(self.seed), np.int64(self._epoch))
        return ERASING_MODES.index(self.mode), form, key, fill

    apply = staticmethod(apply_erasing)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        if previous_state.jit_mode:
            self._check(previous_state.dtype)
        return super().declare_state_and_memory(previous_state)

    def _check(self, dtype: np.dtype) -> None:
        if np.dtype(dtype) == np.uint8 and self.mode != "const":
            raise ValueError(f"mode is {self.mode!r} on uint8 images; put Normalize before it")
