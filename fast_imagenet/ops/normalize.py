"""Normalize: uint8 images to float32, float16 or bfloat16 on the CPU, one look-up per value.

    [CropDecode(...), Normalize(MEAN, STD), RandomErasing(0.25), ToTensor(), ToTorchImage()]

Where a GPU trains, leave the images uint8 and let it normalize: a quarter of the bytes cross the
bus, and Mixup is fused with it (fast_imagenet/data/device_transforms.py).

Axes: b batch, h height, w width, c channel (RGB).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from .kernel import kernel
from .operation import check_batch, check_place
from .precompiled import enable_precompiled, run_threads

# numpy has no bfloat16: its 16 bits travel as uint16.
UINT8 = (np.dtype("u1"),)  # what it takes
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def normalize_table(mean: Sequence[float], std: Sequence[float], dtype: str) -> np.ndarray:
    """The normalized value of every level, [3, 256], calculated by torch in float32 and rounded.

    Args: mean, std: three numbers each, of pixels in 0..1. dtype: a key of TYPES.
    """
    levels = torch.arange(256, dtype=torch.uint8) / 255
    shift, scale = (torch.tensor(values, dtype=torch.float32)[:, None] for values in (mean, std))
    table = ((levels - shift) / scale).to(getattr(torch, dtype))
    bits = table if dtype == "float32" else table.view(torch.int16)
    return bits.numpy().view(TYPES[dtype])


@kernel
def apply_normalize(first, end, images_bhwc, table, out_bhwc):
    """Images first to end - 1: uint8 images_bhwc through table [3, 256] to out_bhwc.

    Both arrays [b, h, w, 3]; table and out_bhwc of one type (float16 and bfloat16 as uint16).
    """
    red, green, blue = table[0], table[1], table[2]
    for b in range(first, end):
        for y in range(images_bhwc.shape[1]):
            source, out = images_bhwc[b, y], out_bhwc[b, y]
            for x in range(images_bhwc.shape[2]):
                out[x, 0] = red[source[x, 0]]
                out[x, 1] = green[source[x, 1]]
                out[x, 2] = blue[source[x, 2]]


class Normalize(Operation):
    """(x / 255 - mean) / std, to the last bit what torch gives in float32, rounded to the type.

    Args:
        mean, std: three numbers each, of pixels in 0..1; std above 0.
        dtype: 'float32', 'float16' or 'bfloat16', or torch's or numpy's type of that name. numpy
            has no bfloat16: put ffcv.transforms.View(torch.bfloat16) behind ToTensor.
    Shape: uint8 [b, h, w, 3] to `dtype` [b, h, w, 3] (bfloat16: its bits, as uint16).
    Raises: ValueError for settings out of range.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: Any = "float32") -> None:
        super().__init__()
        enable_precompiled()
        name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
        self.dtype = name.removeprefix("torch.")
        if self.dtype not in TYPES:
            raise ValueError(f"dtype is {dtype}; give {', '.join(TYPES)}")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        finite = np.isfinite([*self.mean, *self.std]).all()
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or min(self.std) <= 0:
            raise ValueError(
                f"mean is {mean}, std {std}; give three numbers each, of pixels in 0..1, and std "
                f"above 0"
            )
        self._table = normalize_table(self.mean, self.std, self.dtype)

    def transform(self, images_bhwc: np.ndarray, out_bhwc: np.ndarray | None = None) -> np.ndarray:
        """Normalize a batch, outside FFCV as well.

        Args: images_bhwc: uint8 [b, h, w, 3]. out_bhwc: where to, contiguous; None: a new array.
        Returns: out_bhwc.
        """
        check_batch(images_bhwc, len(images_bhwc), UINT8, "Normalize")
        if out_bhwc is None:
            out_bhwc = np.empty(images_bhwc.shape, TYPES[self.dtype])
        table, out = self._table, out_bhwc
        if self.dtype == "float16":  # numba has no float16 on a CPU: copy the bits
            table, out = table.view(np.uint16), out.view(np.uint16)

        def work(_: int, first: int, end: int) -> None:
            apply_normalize(first, end, images_bhwc, table, out)

        run_threads(work, len(images_bhwc))
        return out_bhwc

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        check_place(previous_state, UINT8, "Normalize")
        dtype = np.dtype(TYPES[self.dtype])
        state = dataclasses.replace(previous_state, dtype=dtype)
        return state, AllocationQuery(state.shape, dtype)

    def generate_code(self) -> Callable:
        def normalize(images_bhwc, out_bhwc):
            return self.transform(images_bhwc, out_bhwc[: len(images_bhwc)])

        normalize.precompiled = True  # type: ignore[attr-defined]
        return normalize
