"""The loaders that are measured: one row each. To add one: a class in peers/, a row of TABLE here.

Read by both interpreters, ours and that of .venv-bench: nothing but numpy is imported here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BATCH_SIZE = 64
SCALE, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # torchvision's RandomResizedCrop
RAMP = (375, 500)  # height, width of the image that crop areas are read from
PLAIN, STRONG, RAW = ("plain_160", "plain_224"), "strong_160", "raw_160"
BOTH = (*PLAIN, STRONG)


@dataclass(frozen=True)
class Row:
    """One loader; `{name}_{recipe}` is a contestant of the measurement."""

    label: str  # for the tables: the library, and how it is called
    place: str  # module:class
    recipes: Sequence[str] = PLAIN
    options: dict[str, Any] = field(default_factory=dict)  # of the class
    variables: dict[str, str] = field(default_factory=dict)  # environment of its process
    own_crops: bool = False  # its crop areas have another distribution than torchvision's
    home: bool = False  # runs in our environment, and failing ends the measurement


class Task(NamedTuple):
    """What a contestant has to load."""

    folder: Path  # of *.jpg, and the same images as ours.beton, stock.beton and raw.beton
    recipe: str
    cores: int
    smoke: bool  # FFCV's operations are not compiled

    @property
    def size(self) -> int:
        """Of the output, pixels."""
        return int(self.recipe.rpartition("_")[2])

    @property
    def strong(self) -> bool:
        return self.recipe == STRONG

    def files(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self.folder.glob("*.jpg"))]


FFCV, OURS = "peers.ffcv_loaders", dict(place="peers.ffcv_loaders:Ours", home=True)
PLAIN_160 = PLAIN[:1]
TENSORFLOW, DALI = "peers.tensorflow_data:TensorFlow", "peers.dali:Dali"
SIMD = {"PYTHONPATH": "{venv}/pillow-simd"}
TABLE = {
    "ours": Row("ours", recipes=(*BOTH, RAW), **OURS),
    "ours_avx2": Row("ours, AVX2", variables={"FAST_IMAGENET_NATIVE": "avx2"}, **OURS),
    "ours_portable": Row("ours, portable C", variables={"FAST_IMAGENET_NATIVE": "plain"}, **OURS),
    "ours_full": Row("ours, all fourteen operations", recipes=[STRONG], options={"mode": "full"},
                     **OURS),
    "ours_exact": Row("ours, decoded at full size", recipes=PLAIN_160,
                      options={"reduced_decode": False}, **OURS),
    "ours_bilinear": Row("ours, bilinear", options={"method": "bilinear"}, **OURS),
    "ours_bicubic": Row("ours, bicubic", recipes=PLAIN_160, options={"method": "bicubic"}, **OURS),
    "ours_on_stock": Row("ours on stock FFCV's file", options={"file": "stock"}, **OURS),
    "ffcv": Row("stock FFCV", f"{FFCV}:Stock", (*PLAIN, RAW), home=True),
    "tensorflow": Row("TensorFlow, torchvision's crops", TENSORFLOW),
    "tensorflow_own": Row("TensorFlow, its own crops", TENSORFLOW, PLAIN, {"own_crops": True},
                          own_crops=True),
    "tensorflow_antialiased": Row("TensorFlow, torchvision's crops, antialiased", TENSORFLOW, PLAIN,
                                  {"antialias": True}),
    "tensorflow_own_antialiased": Row("TensorFlow, its own crops, antialiased", TENSORFLOW, PLAIN,
                                      {"own_crops": True, "antialias": True}, own_crops=True),
    "dali": Row("DALI, antialiased", DALI, BOTH),
    "dali_aliased": Row("DALI, fast transform", DALI, PLAIN, {"antialias": False}),
    "nvimagecodec": Row("nvImageCodec, OpenCV", "peers.opencv:NvImageCodec"),
    "simplejpeg": Row("simplejpeg, OpenCV", "peers.opencv:SimpleJpeg"),
    "albumentations": Row("AlbumentationsX, OpenCV", "peers.opencv:Albumentations"),
    "kornia": Row("kornia-rs", "peers.opencv:Kornia"),
    "torchvision_tensors": Row("torchvision on tensors", "peers.pil:Tensors", BOTH),
    "torchcodec": Row("torchcodec, torchvision", "peers.pil:TorchCodec"),
    "torchvision": Row("torchvision on PIL", "peers.pil:Torchvision", BOTH),
    "timm": Row("timm on PIL", "peers.pil:Timm", BOTH),
    "pillow": Row("Pillow, draft, box", "peers.pil:Draft"),
    "pillow_simd": Row("pillow-simd, draft, box", "peers.pil:Draft", PLAIN, {"simd": True}, SIMD),
}  # fmt: skip
RATIOS = {  # key of the result -> (ours, theirs)
    "plain_160_vs_hardest": ("ours_plain_160", "{hardest}"),
    "plain_160_vs_ffcv": ("ours_plain_160", "ffcv_plain_160"),
    "plain_224_vs_ffcv": ("ours_plain_224", "ffcv_plain_224"),
    "avx2_160_vs_ffcv": ("ours_avx2_plain_160", "ffcv_plain_160"),
    "avx2_224_vs_ffcv": ("ours_avx2_plain_224", "ffcv_plain_224"),
    "portable_160_vs_ffcv": ("ours_portable_plain_160", "ffcv_plain_160"),
    "stock_file_160_vs_ffcv": ("ours_on_stock_plain_160", "ffcv_plain_160"),
    "stock_file_224_vs_ffcv": ("ours_on_stock_plain_224", "ffcv_plain_224"),
    "raw_160_vs_ffcv": ("ours_raw_160", "ffcv_raw_160"),
    "plain_160_vs_tensorflow": ("ours_plain_160", "tensorflow_plain_160"),
    "plain_224_vs_tensorflow": ("ours_plain_224", "tensorflow_plain_224"),
    "strong_160_vs_torchvision": ("ours_strong_160", "torchvision_strong_160"),
    "strong_160_vs_ffcv_plain": ("ours_strong_160", "ffcv_plain_160"),
}


def draw_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of torchvision's RandomResizedCrop; for peers that have none."""
    for area, log_ratio, y, x in rng.random((TRIES, 4)).tolist():
        target = height * width * (SCALE[0] + area * (SCALE[1] - SCALE[0]))
        low, high = map(math.log, RATIO)
        aspect = math.exp(low + log_ratio * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


class Contestant:
    """Batches of uint8 images; rounds leave out the first `untimed` batches."""

    untimed = 0
    path = ""  # of our native library, the code path in use

    def epoch(self, count: int) -> Iterator[Any]:
        """Batches, [b, h, w, 3] or [b, 3, h, w], of `count` images or more after the untimed."""
        raise NotImplementedError


class PerImage(Contestant):
    """A peer whose user writes a function of one image; batches are stacked as a worker would."""

    stack: Callable[[list], Any] = staticmethod(np.stack)

    def __init__(self, task: Task) -> None:
        self.task, self.size, self.files = task, task.size, task.files()
        self.rng = np.random.default_rng(0)

    def image(self, data: Any) -> Any:
        """One element of `files` to a uint8 array."""
        raise NotImplementedError

    def epoch(self, count: int) -> Iterator[Any]:
        for first in range(0, count, BATCH_SIZE):
            places = range(first, min(count, first + BATCH_SIZE))
            yield self.stack([self.image(self.files[k % len(self.files)]) for k in places])


def ramp() -> np.ndarray:
    """An image whose red is its column and whose green is its row, scaled to 0..255."""
    rows, columns = (np.linspace(0, 255, length) for length in RAMP)
    channels = np.broadcast_arrays(columns, rows[:, None], 128)
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def crop_areas(images_bhwc: np.ndarray) -> np.ndarray:
    """Fraction of the ramp that each output shows: its slopes give the height and width."""
    size = images_bhwc.shape[1]
    places = np.arange(size) - (size - 1) / 2
    slopes = [
        (images_bhwc[..., channel].mean(axis=axis) @ places) / (places @ places)
        for channel, axis in ((0, 1), (1, 2))
    ]
    return np.abs(slopes[0] * slopes[1]) * (size / 255) ** 2


@cache
def expected_area(draws: int = 20_000) -> tuple[float, float]:
    """Mean and standard deviation of the fraction that torchvision's crops of the ramp show."""
    rng = np.random.default_rng(1)
    boxes = np.array([draw_box(rng, *RAMP) for _ in range(draws)])
    fractions = boxes[:, 2] * boxes[:, 3] / math.prod(RAMP)
    return float(fractions.mean()), float(fractions.std())
