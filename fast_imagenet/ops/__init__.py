"""FFCV operations that are fast, repeatable and equal to Pillow.

Each works alone in any FFCV pipeline: `from fast_imagenet.ops import CropDecode`. Draws are keyed
by (seed, epoch, sample index): the same for any number of workers, any rank count, after a resume.
Kernels are cached on disk beside the package (or in NUMBA_CACHE_DIR), so a second start compiles
nothing.
"""

from .crop_decode import CenterCropDecode, CropDecode, DecodeError
from .precompiled import enable_precompiled

__all__ = ["CenterCropDecode", "CropDecode", "DecodeError", "enable_precompiled"]
