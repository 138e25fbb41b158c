"""What the loaders of both backends share: facts about the data, and which samples a step gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fast_imagenet.beton.checksums import class_digest
from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.beton.verify import PageChecks
from fast_imagenet.data.sampler import epoch_order, rank_batches, repeated_order
from fast_imagenet.sources import Source


class DatasetLoader:
    """Base of all loaders.

    Attributes:
        num_samples, num_classes: counts.
        classes: class identifiers in the order of the labels; None for a .beton without its JSON.
        class_digest: their checksum; None where it is unknown.
        note: what a user should know about the file; may be empty.
    """

    def __init__(self, source: BetonFile | Source) -> None:
        self._source, self.num_samples = source, len(source)
        self.classes: list[str] | None = source.classes
        if isinstance(source, BetonFile):
            self.num_classes, self.note = source.num_classes, source.note
            self.class_digest: str | None = source.class_digest
        else:
            self.num_classes, self.note = len(source.classes), ""
            self.class_digest = class_digest(source.classes)

    @property
    def content(self) -> str | None:
        """Checksum of the data; of an image folder, of its names, labels and file sizes.

        Asked for by runs that can be resumed alone: a folder looks up the size of every file.
        """
        return self._source.content  # type: ignore[union-attr]  # of folders only

    def close(self) -> None:
        """End worker processes, where there are any; a later epoch starts new ones."""


class BaseTrainLoader(DatasetLoader):
    """Base of the loaders for training: the order of samples, by (seed, epoch) alone.

    Args:
        source: of the samples.
        path: for messages.
        global_batch: images per optimizer step over all ranks; must divide by `world_size`.
        seed: of the order, >= 0.
        rank, world_size: which slice of every global batch this process gets.
        repeats: how often an epoch has each sample that it has, >= 1; one epoch is as long.
    Raises:
        ValueError: fewer images than one batch, or the batch does not divide.
    """

    def __init__(
        self,
        source: BetonFile | Source,
        path: str | Path,
        global_batch: int,
        seed: int,
        rank: int,
        world_size: int,
        repeats: int = 1,
    ) -> None:
        super().__init__(source)
        self._repeats = repeats
        self._seed, self._slice = seed, (global_batch, rank, world_size)
        if rank_batches(np.arange(self.num_samples), *self._slice).size == 0:
            raise ValueError(
                f"{path} holds {self.num_samples} images, fewer than one batch of {global_batch}; "
                f"lower training.batch_size"
            )

    def __len__(self) -> int:
        """Optimizer steps of an epoch; the last, incomplete batch is left out."""
        return self.num_samples // self._slice[0]

    def epoch(self, epoch: int, resolution: int, start_step: int = 0) -> Iterator:
        """Batches of one epoch: (images_bhwc uint8 [b, r, r, 3], labels_b int64 [b], samples_b),
        the keys of the samples, int64 [b] (rng.py): their places in the file unless repeated.

        Args:
            epoch: chooses order and draws together with the seed, >= 0.
            resolution: side r in pixels.
            start_step: steps to leave out at the beginning.
        """
        raise NotImplementedError

    def order(self, epoch: int) -> np.ndarray:
        """All samples in the order of an epoch, int64 [num_samples]."""
        return epoch_order(self.num_samples, self._seed, epoch)

    def step_samples(self, epoch: int, start_step: int) -> np.ndarray:
        """Keys of this rank's samples in each step from `start_step` on, int64 [steps, b]."""
        order = self.order(epoch)
        if self._repeats > 1:
            order = repeated_order(order, self._repeats, self._slice[0])
        return rank_batches(order, *self._slice)[start_step:]


def page_checks(source: BetonFile | Source, wanted: bool) -> Callable[[np.ndarray], None] | None:
    """What checks the pages of samples of a .beton as they are first read; None: nothing can."""
    checks = PageChecks(source) if wanted and isinstance(source, BetonFile) else None
    return checks.check_samples if checks and checks.why_not is None else None
