"""FFCV's loader with our operations, and with its own."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.compiler import Compiler
from ffcv.reader import Reader
from ffcv.transforms import RandomHorizontalFlip, ToTensor

from contestants import BATCH_SIZE, RAW, Contestant, Task
from fast_imagenet import native, ops


class FFCVLoader(Contestant):
    """One loader; its operations are compiled when it is built, and in the first round."""

    untimed = 5  # FFCV's buffers: the batches before all are touched

    def __init__(self, task: Task, operations: list[Any], file: str) -> None:
        Compiler.set_enabled(not task.smoke)
        path = str(task.folder / f"{'raw' if task.recipe == RAW else file}.beton")
        self.samples = int(Reader(path).num_samples)
        self.batch_size = min(BATCH_SIZE, self.samples)
        self.loader = Loader(
            path,
            batch_size=self.batch_size,
            num_workers=task.cores,
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            pipelines={"image": [*operations, ToTensor()], "label": None},
        )

    def epoch(self, count: int) -> Iterator[Any]:
        order = np.resize(np.arange(self.samples), count + self.untimed * self.batch_size)
        self.loader.first_traversal_order = self.loader.traversal_order.indices = order
        for (images,) in self.loader:
            yield images


class Stock(FFCVLoader):
    """FFCV's own decoder and flip, on a file of its own writer."""

    def __init__(self, task: Task) -> None:
        crop = RandomResizedCropRGBImageDecoder((task.size, task.size))
        super().__init__(task, [crop, RandomHorizontalFlip()], "stock")


class Ours(FFCVLoader):
    """Our operations, on a file of our writer or of FFCV's."""

    def __init__(self, task: Task, file: str = "ours", mode: str = "lite", **options: Any) -> None:
        then = []
        if task.strong:
            color = (ops.RandAugment(2, 9, mode=mode), ops.ColorJitter(0.4, 0.4, 0.4))
            then = [*color, ops.RandomErasing(0.25, mode="const")]
        self.path = native.IN_USE
        options = {"method": "area", **options}  # as training does, and stock FFCV
        super().__init__(task, [ops.CropDecode(task.size, then=then, **options)], file)
