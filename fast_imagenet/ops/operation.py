"""KeyedOperation: what every operation of this package that changes images in place shares.

An operation is three things: `draw`, all its choices for a batch, from keyed random numbers;
`apply`, a kernel that carries them out; and this class, which hands both to FFCV.
"""

import dataclasses
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from .precompiled import enable_precompiled, run_threads


def whole_seed(seed: int) -> int:
    """The seed modulo 2**64 as a signed number, which kernels take.

    Raises: ValueError: not a whole number.
    """
    try:
        low = operator.index(seed) & 0xFFFF_FFFF_FFFF_FFFF
    except TypeError:
        raise ValueError(f"seed is {seed!r}; give a whole number") from None
    return low - (1 << 64) if low >> 63 else low


def check_probability(p: float, name: str = "p") -> float:
    """Raises: ValueError: not from 0 to 1."""
    if not 0 <= p <= 1:
        raise ValueError(f"{name} is {p}; give a probability, 0 to 1")
    return float(p)


def check_count(value: float, least: int, name: str) -> int:
    """Raises: ValueError: not a whole number from `least` to 1000."""
    if not least <= value <= 1000 or value != int(value):
        raise ValueError(f"{name} is {value}; give a whole number of at least {least}, to 1000")
    return int(value)


def check_batch(images_bhwc: np.ndarray, count: int, dtypes: Sequence[np.dtype], name: str) -> None:
    """Refuse what a kernel would read beside: kernels check nothing.

    Args: count: of sample indices. dtypes: that the operation takes. name: of the operation.
    Raises: ValueError naming what was given and what is wanted.
    """
    given = getattr(images_bhwc, "shape", None)
    if given is None or len(given) != 4 or given[3] != 3 or 0 in given[1:]:
        raise ValueError(f"{name} was given images of shape {given}; give [b, h, w, 3]")
    if np.dtype(images_bhwc.dtype) not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} was given {images_bhwc.dtype} images; it takes {wanted}")
    if not images_bhwc.flags.c_contiguous:
        raise ValueError(f"{name} was given a view; give np.ascontiguousarray(images)")
    if count != len(images_bhwc):
        raise ValueError(f"{name} was given {len(images_bhwc)} images and {count} indices")


def check_place(state: State, dtypes: Sequence[np.dtype], name: str) -> None:
    """Refuse a place in a pipeline. Args: state: FFCV's, before the operation; as `check_batch`.

    Raises: ValueError: behind ToTensor, or the images there have another shape or type.
    """
    if not state.jit_mode:
        raise ValueError(f"{name} comes after ToTensor or a torch module; put it before")
    if len(state.shape) != 3 or state.shape[2] != 3 or np.dtype(state.dtype) not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{name} was given {np.dtype(state.dtype)} {state.shape}; it takes {wanted} "
            f"[height, width, 3], as CropDecode gives them"
        )


class EpochCounter:
    """The epoch that keys an operation's draws: set by the caller, else counted by FFCV's calls."""

    _epoch, _epoch_is_set = 0, False

    def set_epoch(self, epoch: int) -> None:
        """Key the next epoch's draws. Without it every epoch the loader starts counts as one more
        (draws stay repeatable from a fresh start, but a resumed run begins at 0 again)."""
        self._epoch, self._epoch_is_set = int(epoch), True

    def count_epoch(self) -> None:
        """FFCV asks for memory once when it builds the pipeline and once per epoch."""
        if not self._epoch_is_set:
            self._epoch += 1


class KeyedOperation(EpochCounter, Operation):
    """Base of the operations between the decoder and ToTensor; images are changed in place.

    Args: seed: of the run; with epoch and sample index it decides every draw.

    A subclass gives
        draw(samples, size) -> tuple of arrays, one entry of each per sample (all choices of a
            batch; samples: int64 [b], contiguous; size: (height, width)), and
        apply(first, end, images_bhwc, *choices, *options): the kernel, for images first to
            end - 1; float16 images reach it as their bits (uint16).
    Each image is changed by its own pixels and choices alone: `CropDecode(then=...)` may change it
    while others are still being decoded.
    """

    dtypes: tuple[np.dtype, ...] = (np.dtype("u1"),)  # of the images it takes
    apply: Callable[..., None]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "apply") and "step" in inspect.signature(cls.apply).parameters:
            raise TypeError(
                f"{cls.__name__}.apply takes a step; kernels take (first, end, ...) now, for "
                f"images first to end - 1"
            )

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        enable_precompiled()
        self.seed = whole_seed(seed)

    def key(self, samples: np.ndarray) -> tuple[int, int, np.ndarray]:
        """What every draw of a batch begins with."""
        return self.seed, self._epoch, samples

    def draw(self, samples: np.ndarray, size: tuple[int, int]) -> tuple:
        """All choices of a batch, as `apply` takes them.

        Args: samples: int64 [b], indices of the images. size: (height, width) in pixels.
        """
        raise NotImplementedError

    def options(self, dtype: np.dtype) -> tuple:
        """What the kernel takes behind the choices, for images of a type."""
        return ()

    def prepare(self, images_bhwc: np.ndarray, samples: np.ndarray) -> Callable[[int, int], None]:
        """Draw a batch's choices; the function returned changes images first to end - 1.

        Their pixels are not read before. Arguments and errors as `transform`.
        """
        samples = np.ascontiguousarray(samples, np.int64)
        check_batch(images_bhwc, len(samples), self.dtypes, type(self).__name__)
        options = self.options(images_bhwc.dtype)
        height, width = images_bhwc.shape[1:3]
        choices = self.draw(samples, (height, width))
        is_half = images_bhwc.dtype == np.float16  # numba has none on a CPU
        images = images_bhwc.view(np.uint16) if is_half else images_bhwc
        return lambda first, end: self.apply(first, end, images, *choices, *options)

    def transform(self, images_bhwc: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Change a batch in place, outside FFCV as well.

        Args: images_bhwc: [b, h, w, 3], contiguous. samples: int64 [b], index of each image.
        Returns: images_bhwc.
        Raises: ValueError: another shape or type, a view, or another number of indices.
        """
        change = self.prepare(images_bhwc, samples)
        run_threads(lambda _, first, end: change(first, end), len(images_bhwc))
        return images_bhwc

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        check_place(previous_state, self.dtypes, type(self).__name__)
        self.count_epoch()
        return dataclasses.replace(previous_state, jit_mode=True), None

    def generate_code(self) -> Callable:
        def change(images_bhwc: np.ndarray, _: Any, batch_indices: np.ndarray) -> np.ndarray:
            return self.transform(images_bhwc, batch_indices)

        change.precompiled = change.with_indices = True  # type: ignore[attr-defined]
        return change
