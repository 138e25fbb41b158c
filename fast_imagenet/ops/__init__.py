"""FFCV operations that are fast, repeatable and equal to Pillow.

Each works alone in any FFCV pipeline: `from fast_imagenet.ops import CropDecode`. Draws are keyed
by (seed, epoch, sample index): the same for any number of workers, any rank count, after a resume.
Kernels are cached on disk beside the package (or in NUMBA_CACHE_DIR), so a second start compiles
nothing.
"""

from .auto_augment import AutoAugment
from .color_jitter import ColorJitter
from .crop_decode import CenterCropDecode, CropDecode, DecodeError
from .gaussian_blur import GaussianBlur
from .grayscale import RandomGrayscale
from .normalize import Normalize
from .precompiled import enable_precompiled
from .rand_augment import RandAugment
from .random_erasing import RandomErasing
from .solarize import RandomSolarize
from .three_augment import ThreeAugment
from .trivial_augment import TrivialAugmentWide

__all__ = [
    "AutoAugment",
    "CenterCropDecode",
    "ColorJitter",
    "CropDecode",
    "DecodeError",
    "GaussianBlur",
    "Normalize",
    "RandAugment",
    "RandomErasing",
    "RandomGrayscale",
    "RandomSolarize",
    "ThreeAugment",
    "TrivialAugmentWide",
    "enable_precompiled",
]
