"""FFCV operations that are fast, repeatable and equal to Pillow.

Each works alone in any FFCV pipeline: `from fast_imagenet.ops import CropDecode`. Draws are keyed
by (seed, epoch, sample index): the same for any number of workers, any rank count, after a resume.
Kernels are cached on disk beside the package (or in NUMBA_CACHE_DIR, or where neither can be
written in a private temporary folder), so a second start compiles nothing.
"""

# ruff: noqa: E402
import torch

_TORCH_THREADS = torch.get_num_threads()
import ffcv  # noqa: F401  (leaves torch one thread)

torch.set_num_threads(_TORCH_THREADS)

from .auto_augment import AutoAugment
from .color_jitter import ColorJitter
from .crop_decode import CenterCropDecode, CropDecode, DecodeError
from .effects import GaussianBlur, RandomGrayscale, RandomSolarize, ThreeAugment
from .normalize import Normalize
from .precompiled import enable_precompiled
from .rand_augment import RandAugment, TrivialAugmentWide
from .random_erasing import RandomErasing

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
