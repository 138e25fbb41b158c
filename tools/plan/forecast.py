"""From measured seconds to the seconds of a run: arithmetic alone, no torch and no clock.

The model. A run is start-up, then for every epoch: a wait for the first batch, `steps` times the
step as it was measured WITH the loader running, an evaluation where one is due, a checkpoint; then
an end.

Step and loader overlap. On a GPU they use different hardware, and a step takes about the longer of
the two; on a CPU they share the cores, and it takes up to their sum. Neither is assumed: what is
extrapolated is `together`, measured on the tail of a real epoch that starts as a resumed run would.
Such a tail conserves work (what the loader does ahead at its start it saves at its end), so a few
steps stand for an epoch; it is never taken to be shorter than the loader alone. `step` and `loader`
alone only tell which of the two to mend.

Sides that were not measured are interpolated, linearly in the number of pixels.

Reading is waited for where it takes longer than training meanwhile: in the first epoch what is not
in memory, in every other one what does not fit. All times are seconds, all sizes bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import groupby

from fast_imagenet.engine.schedules import is_evaluated


@dataclass(frozen=True)
class SideTimes:
    """What was measured at one training side, seconds."""

    side: int  # pixels
    step: float  # on a batch that is there already
    loader: float  # a batch, while nothing else runs
    together: float  # a step fed by the loader
    first_batch: float  # from the start of an epoch to its first batch
    start: float  # once a run: trying and compiling the network, slower first steps
    # of `together` over the rounds: (longest - shortest) / mean; None = there was one
    spread: float | None = None
    steps: int = 0  # that `together` was measured on; 0 = interpolated


@dataclass(frozen=True)
class Costs:
    """What does not depend on the training side, seconds."""

    start: float  # imports, files, network, the log's first line
    evaluation: float  # of one set of weights under both protocols
    evaluation_start: float  # what the first evaluation takes longer
    weights: int  # sets that an evaluation takes: 2 with a moving average
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
    resident: float | None  # share of the training data in the page cache; None = not told
    sequential: float | None  # bytes/s of large reads from the disk; None = not told
    scattered: float | None  # bytes/s of single images, by all workers
    cold: bool  # these rates are the disk's, not the page cache's
    random_order: bool  # images are asked for all over the data, not window by window
    checked: bool  # whole pages are read and checked when they are first needed
    check: float  # seconds of checking all pages once

    @property
    def fits(self) -> bool:
        """Whether training and validation data stay in memory."""
        return self.bytes + self.val_bytes <= self.room

    @property
    def missing(self) -> float:
        """Bytes of an epoch that are not in memory any more when they are asked for."""
        if self.fits:
            return 0.0
        kept = max(0.0, self.room / (self.bytes + self.val_bytes))
        # window by window each byte has been driven out before its next turn
        return self.bytes * (1 - kept) if self.random_order else float(self.bytes)


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs at one side."""

    first: int  # epoch, from 1
    last: int
    side: int  # pixels
    steps: int  # of all of them


@dataclass(frozen=True)
class Row:
    """A part of the run."""

    name: str  # training, evaluation, checkpoints, reading, start, end
    seconds: float
    count: int = 1  # epochs, evaluations, checkpoints
    phase: Phase | None = None
    times: SideTimes | None = None


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
        """Plain values."""
        rows = [{**asdict(row), "hours": row.seconds / 3600} for row in self.rows]
        return {"seconds": self.seconds, "hours": self.seconds / 3600, "rows": rows}


def steps_of_epochs(epochs: int, steps: int, max_steps: int = 0) -> list[int]:
    """Optimizer steps of every epoch that a run trains.

    Args:
        epochs: training.epochs, >= 1.
        steps: of a whole epoch, >= 1.
        max_steps: training.max_steps; 0 = no limit.
    """
    total = min(epochs * steps, max_steps or epochs * steps)
    return [min(steps, total - first) for first in range(0, total, steps)]


def phases_of(sides: list[int], steps: list[int]) -> list[Phase]:
    """Consecutive epochs of equal side.

    Args:
        sides: of every epoch, pixels.
        steps: of every epoch.
    """
    phases, first = [], 0
    for side, group in groupby(sides):
        last = first + len(list(group))
        phases.append(Phase(first + 1, last, side, sum(steps[first:last])))
        first = last
    return phases


def choose_sides(sides: list[int], most: int) -> list[int]:
    """At most `most` of the sides, largest and smallest among them, evenly spread; ascending."""
    distinct = sorted(set(sides))
    if len(distinct) <= most:
        return distinct
    last = len(distinct) - 1
    return [distinct[round(i * last / (most - 1))] for i in range(most)]


def times_at(measured: list[SideTimes], side: int) -> SideTimes:
    """Measured at this side, or interpolated in the number of pixels between its neighbours.

    Args:
        measured: at least one, at different sides; `side` is not outside them.
    """
    below = max((t for t in measured if t.side <= side), key=lambda t: t.side)
    above = min((t for t in measured if t.side >= side), key=lambda t: t.side)
    if below.side == above.side:
        return below
    share = (side**2 - below.side**2) / (above.side**2 - below.side**2)
    values = {
        f.name: (1 - share) * getattr(below, f.name) + share * getattr(above, f.name)
        for f in fields(SideTimes)
        if f.type == "float"
    }
    return SideTimes(side=side, **values)


def predict(
    sides: list[int],
    steps: list[int],
    whole: int,
    measured: list[SideTimes],
    costs: Costs,
    storage: Storage,
    checkpoint_minutes: float,
    every: int = 1,
) -> Forecast:
    """What a run will take.

    Args:
        sides, steps: of every epoch; pixels, optimizer steps.
        whole: steps of an epoch that is not cut short by training.max_steps.
        measured: sides that were measured.
        costs: seconds of all else.
        storage: the training data.
        checkpoint_minutes: between checkpoints inside an epoch; 0 = none.
        every: epochs between evaluations.
    """
    times = {side: times_at(measured, side) for side in set(sides)}
    epochs = [
        times[side].first_batch + count * times[side].together
        for side, count in zip(sides, steps, strict=True)
    ]
    rows = [
        Row("training", sum(epochs[p.first - 1 : p.last]), p.last - p.first + 1, p, times[p.side])
        for p in phases_of(sides, steps)
    ]
    last = len(epochs) - 1
    evaluated = sum(is_evaluated(epoch, last, every) for epoch in range(len(epochs)))
    evaluations = evaluated * costs.weights
    inside = [int(e // (60 * checkpoint_minutes)) if checkpoint_minutes else 0 for e in epochs]
    ends = sum(count == whole for count in steps)
    count = evaluated + ends + sum(inside)  # an epoch is saved before its evaluation, too
    saves = saving_seconds(costs, ends, count)
    sides_start = sum(one.start for one in times.values())
    rows += [
        Row("evaluation", evaluations * costs.evaluation, evaluations),
        Row("checkpoints", saves + len(epochs) * costs.log, count),
        Row("reading", reading_seconds(storage, epochs)),
        Row("start", costs.start + sides_start + costs.evaluation_start),
        Row("end", costs.finish),
    ]
    return Forecast(rows)


def saving_seconds(costs: Costs, whole: int, saves: int) -> float:
    """Seconds of all checkpoints; each whole epoch is counted as the best so far.

    Of a run that learns, most are.

    Args:
        costs: seconds of one.
        whole: epochs that are not cut short.
        saves: checkpoints of the run.
    """
    return whole * costs.save_best + (saves - whole) * costs.save


def reading_seconds(storage: Storage, epochs: list[float]) -> float:
    """Seconds that training waits for the disk, and for the pages' sums, in all epochs.

    Args:
        storage: the training data; a rate that is not known counts as endless.
        epochs: seconds of every epoch while all data is in memory.
    """
    order_rate = storage.scattered if storage.random_order else storage.sequential
    first_rate = storage.sequential if storage.checked else order_rate
    absent = storage.bytes * (1 - (1.0 if storage.resident is None else storage.resident))
    first = absent / first_rate if first_rate else 0.0
    later = storage.missing / order_rate if order_rate else 0.0
    waits = [max(0.0, max(first, later) - epochs[0]) + storage.check]
    return sum(waits + [max(0.0, later - epoch) for epoch in epochs[1:]])
