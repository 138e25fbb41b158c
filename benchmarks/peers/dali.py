"""DALI's CPU operators; its decoder leaves out what lies outside of the crop."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.auto_aug import rand_augment

from contestants import BATCH_SIZE, RATIO, SCALE, Contestant, Task


class Dali(Contestant):
    """image_random_crop, resize, flip. It computes each batch on request: a pipeline that works
    ahead would do so while the others are timed."""

    def __init__(self, task: Task, antialias: bool = True) -> None:
        self.encoded = [np.frombuffer(data, np.uint8) for data in task.files()]
        self.antialias, self.task = antialias, task
        define = pipeline_def(self.define, enable_conditionals=True)
        at_once = dict(exec_async=False, exec_pipelined=False, prefetch_queue_depth=1)
        one = dict(batch_size=BATCH_SIZE, num_threads=task.cores, device_id=None, seed=1)
        self.pipe = define(**one, **at_once)
        self.pipe.build()

    def define(self) -> Any:
        files, size = self.encoded, self.task.size
        data = fn.external_source(lambda sample: files[sample.idx_in_epoch % len(files)],
                                  batch=False)  # fmt: skip
        images = fn.decoders.image_random_crop(
            data,
            random_area=SCALE,
            random_aspect_ratio=RATIO,
            use_fast_idct=not self.antialias,
            device="cpu",
        )
        images = fn.resize(images, size=[size, size], antialias=self.antialias)
        flip = fn.random.coin_flip(dtype=types.BOOL)
        images = fn.flip(images, horizontal=fn.cast(flip, dtype=types.INT32))
        return strong(images, size) if self.task.strong else images

    def epoch(self, count: int) -> Iterator[Any]:
        for _ in range(0, count, BATCH_SIZE):
            yield self.pipe.run()[0].as_array()


def strong(images: Any, size: int) -> Any:
    """RandAugment, color jitter and erasing with DALI's operators."""
    images = rand_augment.rand_augment(images, n=2, m=9, shape=[size, size], fill_value=0)
    kinds = ("brightness", "contrast", "saturation")
    images = fn.color_twist(images, **{kind: fn.random.uniform(range=[0.6, 1.4]) for kind in kinds})
    area = fn.random.uniform(range=[0.02, 0.33])
    aspect = fn.random.uniform(range=[0.55, 1.8])
    shape = fn.stack((area**0.5) * aspect, (area**0.5) / aspect)
    anchor = fn.random.uniform(range=[0.0, 1.0], shape=[2]) * (1.0 - shape)
    if fn.random.coin_flip(probability=0.25, dtype=types.BOOL):
        images = fn.erase(images, anchor=anchor, shape=shape, normalized=True, fill_value=0)
    return images
