"""The operations of op_kernels.py: name -> who -> maker of a function that runs one batch.

A maker gets images_bhwc, uint8 [b, h, w, 3]. To be imported when the process is pinned to its core.
"""

from collections.abc import Callable
from typing import Any

import ffcv.transforms as ffcv_ops
import numpy as np
import torch
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from fast_imagenet import ops
from fast_imagenet.data.device_transforms import Mixing, normalize_and_mix

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Run = Callable[[np.ndarray], Any]
Maker = Callable[[np.ndarray], Run]
Makers = dict[str, Maker]


# ==== Makers ======================================================================================


def ours(operation: Operation) -> Maker:
    """An operation of this package: changes the batch in place, or fills its own."""

    def make(images_bhwc: np.ndarray) -> Run:
        samples = np.arange(len(images_bhwc))
        return lambda batch: operation.transform(batch, samples)

    return make


def stock(*operations: Operation) -> Maker:
    """FFCV operations one after the other, compiled as its loader compiles them."""

    def make(images_bhwc: np.ndarray) -> Run:
        place = dict(jit_mode=True, device=torch.device("cpu"), dtype=np.dtype("u1"))
        state, stages = State(**place, shape=images_bhwc.shape[1:]), []
        indices = np.arange(len(images_bhwc))
        for operation in operations:
            state, query = operation.declare_state_and_memory(state)
            memory = query and np.empty((len(images_bhwc), *query.shape), query.dtype)
            source = operation.generate_code()
            more = (memory, indices) if getattr(source, "with_indices", False) else (memory,)
            stages.append((Compiler.compile(source), more))

        def run(batch: np.ndarray) -> np.ndarray:
            for code, more in stages:
                batch = code(batch, *more)
            return batch

        return run

    return make


def row(mine: Maker, *peers: Operation) -> Makers:
    """Ours, and what stock FFCV has for it."""
    return {"ours": mine, **({"ffcv": stock(*peers)} if peers else {})}


# ==== Operations ==================================================================================


def image_operations() -> dict[str, Makers]:
    """Colors and the automatic policies."""

    def jitter(*peers: Operation, **strength: float) -> Makers:
        return row(ours(ops.ColorJitter(**strength)), *peers)

    kinds = (ffcv_ops.RandomBrightness, ffcv_ops.RandomContrast, ffcv_ops.RandomSaturation)
    three = [kind(0.4, 1) for kind in kinds]
    alone = {
        "grayscale": ops.RandomGrayscale(1.0),
        "solarize": ops.RandomSolarize(128, 1.0),
        "Gaussian blur": ops.GaussianBlur((0.1, 2.0), 1.0),
        "RandAugment lite": ops.RandAugment(2, 9, mode="lite"),
        "RandAugment full": ops.RandAugment(2, 9, mode="full"),
        "RandAugment timm": ops.RandAugment(2, 9, mode="timm"),
        "TrivialAugmentWide": ops.TrivialAugmentWide(),
        "AutoAugment": ops.AutoAugment(),
        "ThreeAugment": ops.ThreeAugment(),
    }
    return {
        "brightness": jitter(three[0], brightness=0.4),
        "contrast": jitter(three[1], contrast=0.4),
        "saturation": jitter(three[2], saturation=0.4),
        "hue": jitter(hue=0.1),
        "ColorJitter 0.4/0.4/0.4": jitter(*three, brightness=0.4, contrast=0.4, saturation=0.4),
        **{name: row(ours(operation)) for name, operation in alone.items()},
    }


def batch_operations(size: int) -> dict[str, Makers]:
    """Erasing, normalizing and mixing; size: of the images in pixels."""
    table = np.array(MEAN) * 255, np.array(STD) * 255

    def normalize(dtype: str) -> Makers:
        # ours is compiled into FFCV's pipeline
        mine = stock(ops.Normalize(MEAN, STD, dtype))
        return row(mine, ffcv_ops.NormalizeImage(*table, np.dtype(dtype)))

    def mixup(images_bhwc: np.ndarray) -> Run:
        mixing = Mixing(lam=0.7, box=None)
        return lambda batch: normalize_and_mix(torch.from_numpy(batch), MEAN, STD, mixing)

    peers = ffcv_ops.ImageMixup(0.2, True), ffcv_ops.NormalizeImage(*table, np.dtype("float32"))
    return {
        "erasing": row(ours(ops.RandomErasing(1.0, "const")), ffcv_ops.Cutout(size // 3)),
        "normalize to float32": normalize("float32"),
        "normalize to float16": normalize("float16"),
        "mixup and normalize to float32": row(mixup, *peers),
    }
