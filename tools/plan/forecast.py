"""From measured seconds to those of a run: arithmetic alone, no torch and no clock.

A run is start-up, then for every epoch: a wait for the first batch, `steps` times the step as it
was measured WITH the loader running, an evaluation where one is due, a checkpoint; then an end.

Step and loader overlap: on a GPU a step takes about the longer of the two, on a CPU, where they
share the cores, up to their sum. Neither is assumed: what is extrapolated is `together`, measured
on the tail of a real epoch that starts as a resumed run would. Such a tail conserves work (what the
loader does ahead at its start it saves at its end), so a few steps stand for an epoch. `step` and
`loader` only show which of the two to improve.

Reading is waited for where it takes longer than training meanwhile: in the first epoch what is not
in memory, in every other one what does not fit. All times are seconds, all sizes bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import groupby

import numpy as np

from fast_imagenet.engine.work import evaluated_sets


@dataclass(frozen=True)
class Times:
    """What was measured at one training resolution, seconds."""

    resolution: int  # pixels
    step: float  # on a batch that is there already
    loader: float  # a batch, while nothing else runs
    together: float  # a step fed by the loader
    first_batch: float  # from the start of an epoch to its first batch
    start: float  # once per run: trying and compiling the network, slower first steps
    # of `together` over the rounds: (longest - shortest) / mean; None = there was one
    spread: float | None = None
    steps: int = 0  # that `together` was measured on; 0 = interpolated


@dataclass(frozen=True)
class Costs:
    """What does not depend on the training resolution, seconds."""

    start: float  # imports, files, network, the log's first line
    evaluation: float  # of one set of weights, standard and config eval
    evaluation_start: float  # what the first evaluation takes longer
    weights: int  # sets in the last evaluation: 2 with an EMA
    save: float  # last.pt
    save_best: float  # last.pt and best.pt
    log: float  # a line, and the losses of an epoch
    finish: float  # final weights and curves


@dataclass(frozen=True)
class Storage:
    """The training data on the disk and in memory."""

    bytes: int  # of the training data
    val_bytes: int
    room: int  # memory that the page cache can have beside the run
    resident: float | None  # fraction of the training data in the page cache; None = unknown
    sequential: float | None  # bytes/s of large reads from the disk; None = unknown
    scattered: float | None  # bytes/s of single images, by all workers
    random_order: bool  # samples are read all over the data, not window by window
    checked: bool  # whole pages are read and checked when they are first needed

    @property
    def fits(self) -> bool:
        """Whether training and validation data stay in memory."""
        return self.bytes + self.val_bytes <= self.room

    @property
    def missing(self) -> float:
        """Bytes of an epoch that have left memory by the time they are needed."""
        if self.fits:
            return 0.0
        kept = max(0.0, self.room / (self.bytes + self.val_bytes))
        # window by window each byte has been driven out before its next turn
        return self.bytes * (1 - kept) if self.random_order else float(self.bytes)


@dataclass(frozen=True)
class Row:
    """A part of the run; of the training: consecutive epochs at one resolution."""

    name: str  # training, evaluation, checkpoints, reading, start, end
    seconds: float
    count: int = 1  # epochs, evaluations, checkpoints
    first: int = 0  # epoch of the training, from 1
    steps: int = 0  # of the training
    times: Times | None = None


@dataclass(frozen=True)
class Forecast:
    """A run, part by part in seconds."""

    rows: list[Row]

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(row.seconds for row in self.rows)

    def of(self, name: str) -> float:
        """Seconds of all rows of a name."""
        return sum(row.seconds for row in self.rows if row.name == name)

    def as_dict(self) -> dict:
        """JSON values."""
        rows = [{**asdict(row), "hours": row.seconds / 3600} for row in self.rows]
        return {"seconds": self.seconds, "hours": self.seconds / 3600, "rows": rows}


def steps_of_epochs(epochs: int, steps: int, max_steps: int = 0) -> list[int]:
    """Optimizer steps of every epoch: `steps` per whole epoch, `max_steps` in all; 0 = no limit."""
    total = min(epochs * steps, max_steps or epochs * steps)
    return [min(steps, total - first) for first in range(0, total, steps)]


def choose_resolutions(resolutions: list[int], most: int) -> list[int]:
    """At most `most` of them, largest and smallest included, evenly spread; ascending."""
    distinct = sorted(set(resolutions))
    if len(distinct) <= most:
        return distinct
    last = len(distinct) - 1
    return [distinct[round(i * last / (most - 1))] for i in range(most)]


def times_at(measured: list[Times], resolution: int) -> Times:
    """Measured at this resolution, or interpolated in the number of pixels between neighbors."""
    for one in measured:
        if one.resolution == resolution:
            return one
    by_size = sorted(measured, key=lambda one: one.resolution)
    pixels = [one.resolution**2 for one in by_size]
    values = {
        f.name: float(np.interp(resolution**2, pixels, [getattr(one, f.name) for one in by_size]))
        for f in fields(Times)
        if f.type == "float"
    }
    return Times(resolution=resolution, **values)


def predict(
    resolutions: list[int],
    steps: list[int],
    whole: int,
    measured: list[Times],
    costs: Costs,
    storage: Storage,
    checkpoint_minutes: float,
    every: int = 1,
) -> Forecast:
    """What a run will take; each whole epoch counts as the best so far, as most are.

    Args:
        resolutions, steps: of every epoch; pixels, optimizer steps.
        whole: steps of an epoch that is not cut short by training.max_steps.
        measured: some resolutions, the smallest and the largest among them.
        checkpoint_minutes: between checkpoints inside an epoch; 0 = none.
        every: epochs between evaluations.
    """
    times = [times_at(measured, resolution) for resolution in resolutions]
    epochs = [t.first_batch + n * t.together for t, n in zip(times, steps, strict=True)]
    rows, first = [], 0
    for _, group in groupby(resolutions):
        last = first + len(list(group))
        part = (sum(epochs[first:last]), last - first, first + 1, sum(steps[first:last]))
        rows.append(Row("training", *part, times[first]))
        first = last
    evaluated = evaluated_sets(len(epochs), every, averaged=False)
    inside = [int(e // (60 * checkpoint_minutes)) if checkpoint_minutes else 0 for e in epochs]
    best = steps.count(whole)
    other = evaluated + sum(inside)  # an epoch is saved before its evaluation, too
    saving = best * costs.save_best + other * costs.save + len(epochs) * costs.log
    start = costs.start + costs.evaluation_start + sum(t.start for t in set(times))
    evaluations = evaluated_sets(len(epochs), every, averaged=costs.weights > 1)
    rows.append(Row("evaluation", evaluations * costs.evaluation, evaluations))
    rows.append(Row("checkpoints", saving, best + other))
    rows.append(Row("reading", reading_seconds(storage, epochs)))
    return Forecast([*rows, Row("start", start), Row("end", costs.finish)])


def reading_seconds(storage: Storage, epochs: list[float]) -> float:
    """Seconds that training waits for the disk, in all epochs.

    Args:
        storage: the training data; an unknown rate counts as endless.
        epochs: seconds of every epoch while all data is in memory.
    """
    order_rate = storage.scattered if storage.random_order else storage.sequential
    first_rate = storage.sequential if storage.checked else order_rate
    absent = storage.bytes * (1 - (1.0 if storage.resident is None else storage.resident))
    first = absent / first_rate if first_rate else 0.0
    later = storage.missing / order_rate if order_rate else 0.0
    needed = [max(first, later), *(later for _ in epochs[1:])]
    return sum(max(0.0, read - epoch) for read, epoch in zip(needed, epochs, strict=True))
