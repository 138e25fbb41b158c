"""FFCV operations that are fast, repeatable and equal to Pillow.

Each works alone in any FFCV pipeline: `from fast_imagenet.ops import CropDecode`. Draws are keyed
by (seed, epoch, sample index): the same for any number of workers, any rank count, after a resume.
Kernels are cached on disk beside the package (or in NUMBA_CACHE_DIR, or where neither can be
written in a private temporary folder), so a second start compiles nothing.
"""

import torch

_TORCH_THREADS = torch.get_num_threads()
import ffcv  # noqa: E402, F401  (leaves torch one thread)

torch.set_num_threads(_TORCH_THREADS)

from .auto_augment import AutoAugment  # noqa: E402
from .color_jitter import ColorJitter  # noqa: E402
from .crop_decode import CenterCropDecode, CropDecode, DecodeError  # noqa: E402
from .gaussian_blur import GaussianBlur  # noqa: E402
from .grayscale import RandomGrayscale  # noqa: E402
from .normalize import Normalize  # noqa: E402
from .precompiled import enable_precompiled  # noqa: E402
from .rand_augment import RandAugment  # noqa: E402
from .random_erasing import RandomErasing  # noqa: E402
from .solarize import RandomSolarize  # noqa: E402
from .three_augment import ThreeAugment  # noqa: E402
from .trivial_augment import TrivialAugmentWide  # noqa: E402

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
