"""What is printed: the hours, what they depend on, and what to change first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

from fast_imagenet.data.augmentation import Augment, stages_of
from fast_imagenet.engine.work import Work
from tools.plan.forecast import Costs, Forecast, Row, Storage, Times

GB = 1e9
UNSURE = 0.1  # of the total: a plan that is less sure than this reports a range
FULL = 0.92  # of a GPU's memory: what is above it leaves no room for fragments
NAMES = {
    "evaluation": "evaluation, {} times",
    "checkpoints": "checkpoints and log",
    "reading": "waiting for the disk",
    "start": "start-up",
    "end": "final weights, curves",
}


@dataclass(frozen=True)
class Memory:
    """What a step takes of the device, bytes and images."""

    peak: int
    capacity: int
    micro_batch: int  # images of a forward pass that fitted
    asked: int  # that the settings ask for


@dataclass(frozen=True)
class Machine:
    """Where it was measured."""

    device: str  # name
    is_gpu: bool
    cores: int  # usable
    workers: int
    ranks: int


class Advice(NamedTuple):
    """A setting to change."""

    setting: str  # section.key=value, or '' where none helps
    why: str


@dataclass(frozen=True)
class Plan:
    """All that was measured, and what follows."""

    cfg: SimpleNamespace
    augment: Augment
    forecast: Forecast
    times: list[Times]  # measured
    costs: Costs
    storage: Storage
    memory: Memory
    machine: Machine
    work: Work
    measuring_seconds: float  # of wall time
    measured_batch: int  # images of a step as it was measured
    ways: dict[str, float]  # seconds of a step, eager and compiled; {} = not compared

    @property
    def training(self) -> list[Row]:
        """The phases of the training."""
        return [row for row in self.forecast.rows if row.name == "training"]

    @property
    def longest(self) -> Row:
        """The phase with most seconds."""
        return max(self.training, key=lambda row: row.seconds)

    @property
    def bottleneck(self) -> str:
        """Which takes longer alone in the longest phase: 'loader' or 'step'."""
        times = self.longest.times
        return "loader" if times.loader > times.step else "step"

    @property
    def uncertainty(self) -> float | None:
        """Half the difference of the rounds, as a fraction; None where there was one round."""
        spreads = [time.spread for time in self.times if time.spread is not None]
        return max(spreads) / 2 if spreads else None

    def as_dict(self) -> dict:
        """JSON values; seconds and bytes."""
        derived = {
            "arch": self.cfg.model.arch,
            "forecast": self.forecast.as_dict(),
            "bottleneck": self.bottleneck,
            "storage": {**asdict(self.storage), "fits": self.storage.fits},
            "advice": [one._asdict() for one in advise(self)],
        }
        measured = asdict(replace(self, cfg=None, augment=None))
        return {key: value for key, value in measured.items() if value is not None} | derived


def advise(plan: Plan) -> list[Advice]:
    """What to change, the most urgent first; at least one entry."""
    rules = (_memory_advice, _order_advice, _loader_advice, _setting_advice)
    size, fraction = plan.longest.times.resolution, plan.longest.seconds / plan.forecast.seconds
    nothing = f"nothing stands out: training at {size} px is {fraction:.0%} of the run"
    return [advice for rule in rules for advice in rule(plan)] or [Advice("", nothing)]


def _memory_advice(plan: Plan) -> Iterator[Advice]:
    m = plan.memory
    if m.micro_batch < m.asked:
        why = f"{m.asked} images per forward pass do not fit {m.capacity / GB:.1f} GB of memory"
        yield Advice(f"training.micro_batch_size={m.micro_batch}", why)
    elif m.peak > FULL * m.capacity and m.asked % 2 == 0 and m.asked > 2:
        why = f"a step takes {m.peak / GB:.1f} of {m.capacity / GB:.1f} GB of memory"
        yield Advice(f"training.micro_batch_size={m.asked // 2}", why)


def _order_advice(plan: Plan) -> Iterator[Advice]:
    s = plan.storage
    data, room = f"the data ({_gb(s.bytes + s.val_bytes)})", f"{_gb(s.room)} of memory"
    if s.fits and not s.random_order:
        yield Advice("data.in_memory=true", f"{data} fits {room}: a fully random order is possible")
    elif not s.fits and s.random_order:
        backend = "" if plan.cfg.data.backend == "ffcv" else "data.backend=ffcv with "
        yield Advice(f"{backend}data.in_memory=false", f"{data} does not fit {room}")


def _loader_advice(plan: Plan) -> Iterator[Advice]:
    t, machine = plan.longest.times, plan.machine
    loading = (t.together - t.step) / t.together  # what the loader adds
    if loading < 0.15:
        return
    why = f"loading takes {loading:.0%} of a step at {t.resolution} px"
    cores = machine.cores // machine.ranks
    lighter = filter(None, (stage.lighter(plan.augment) for stage in stages_of(plan.augment)))
    if machine.is_gpu and machine.workers < cores:
        yield Advice(f"data.num_workers={cores}", f"{why}, and {cores} cores are available")
    elif plan.cfg.data.backend == "torchvision":
        yield Advice("data.backend=ffcv", why)
    elif setting := next(lighter, None):
        yield Advice(setting, f"{why}; it is lighter")
    else:
        why += ": smaller images decode faster, where yours are larger (write the file again)"
        yield Advice(f"write.max_side={max(192, 32 * round(1.5 * t.resolution / 32))}", why)


def _setting_advice(plan: Plan) -> Iterator[Advice]:
    training = plan.cfg.training
    way = "eager" if training.compile == "off" else "compiled"
    if plan.ways and min(plan.ways, key=plan.ways.__getitem__) != way:
        setting = "auto" if way == "eager" else "off"
        yield Advice(f"training.compile={setting}", f"a step is faster: {_ways_text(plan)}")
    if plan.machine.is_gpu and training.precision == "fp32":
        yield Advice("training.precision=auto", "fp32 takes two to four times as long on a GPU")


def duration(seconds: float) -> str:
    """'9.1 s', '12.3 min' or '34.2 h'."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _gb(count: float) -> str:
    return f"{count / GB:.2f} GB" if count < 10 * GB else f"{count / GB:.0f} GB"


def render(plan: Plan) -> str:
    """The page, ends in a newline."""
    s = plan.storage
    found = [("bottleneck", _bottleneck_text(plan)), ("data", _data_text(s))]
    found += [("disk", _disk_text(s)), ("batch", _memory_text(plan))]
    found += [("compile", _ways_text(plan))]
    advice = [f"{setting}: {why}" if setting else why for setting, why in advise(plan)]
    advice = [("then" if number else "change first", text) for number, text in enumerate(advice)]
    caution, found, advice = (
        [f"{name + ':':14}{text}" for name, text in part]
        for part in (_caution(plan), found, advice)
    )
    return "\n".join([*_head(plan), "", *_table(plan), *caution, "", *found, "", *advice]) + "\n"


def _head(plan: Plan) -> list[str]:
    m, training, work = plan.machine, plan.cfg.training, plan.work
    ranks = f", {m.ranks} ranks" if m.ranks > 1 else ""
    run = f"{plan.cfg.model.arch}, {training.epochs} epochs of {work.images:,} images"
    run += f", {training.batch_size} per step: as much as "
    run += f"{work.training:.1f} epochs of 160 px, evaluation adds {work.evaluation_fraction:.1%}"
    machine = f"{m.device}, {m.cores} cores, data.num_workers={m.workers}{ranks}; measured in "
    return [run, machine + duration(plan.measuring_seconds)]


def _table(plan: Plan) -> Iterator[str]:
    total, unsure = plan.forecast.seconds, plan.uncertainty
    yield f"{'':34}{'time':>10}{'fraction':>10}"
    for row in plan.forecast.rows:
        name, pace = NAMES.get(row.name, "").format(row.count), ""
        if row.times:
            last = (
                f"s {row.first} to {row.first + row.count - 1}"
                if row.count > 1
                else f" {row.first}"
            )
            name = f"training, {row.times.resolution} px, epoch{last}"
            pace = f"   {_pace(row.times, plan.cfg.training.batch_size)}"
        yield f"{name:34}{duration(row.seconds):>10}{row.seconds / total:>10.1%}{pace}"
    rounds = "one round" if unsure is None else f"rounds of measuring differed by ±{unsure:.0%}"
    yield f"{'total':34}{duration(total):>10}{'':13}{total / 3600:.2f} hours; {rounds}"


def _pace(t: Times, batch: int) -> str:
    rate, how = batch / t.together, "" if t.steps else ", interpolated"
    return f"{1000 * t.together:,.0f} ms per step, {rate:,.{0 if rate >= 10 else 2}f} images/s{how}"


def _caution(plan: Plan) -> Iterator[tuple[str, str]]:
    """What to think of a plan that is extrapolated, or whose rounds differ; else nothing."""
    unsure, total, batch = plan.uncertainty, plan.forecast.seconds, plan.cfg.training.batch_size
    if plan.measured_batch < batch:
        text = f"a step was measured on {plan.measured_batch} images, as {batch} take too long or "
        text += "too much memory here; large batches take less time per image"
        yield "extrapolated", text
    if unsure and unsure > UNSURE:
        low, high = duration(total * (1 - unsure)), duration(total * (1 + unsure))
        text = f"{low} to {high}: the machine was busy with something else, or throttled; measure "
        yield "not sure", f"{text}again when it is idle"


def _bottleneck_text(plan: Plan) -> str:
    t, other = plan.longest.times, "loader" if plan.bottleneck == "step" else "step"
    if not t.loader:
        return "not known: an epoch is one batch, and loading is the wait for it"
    ratio = max(t.step, t.loader) / min(t.step, t.loader)
    shared = "" if plan.machine.is_gpu else ", sharing the cores"
    return (
        f"the {plan.bottleneck}, {ratio:.1f} times the {other}'s time ({t.resolution} px: step "
        f"alone {1000 * t.step:,.0f} ms, loader alone {1000 * t.loader:,.0f} ms, together "
        f"{1000 * t.together:,.0f} ms{shared}: loading adds {max(0, t.together / t.step - 1):.0%} "
        f"to the step)"
    )


def _data_text(s: Storage) -> str:
    verdict, order = "does NOT fit", "quasi-random (data.in_memory=false)"
    if s.fits:
        verdict, order = "fits", "random (data.in_memory=true)"
    cached = "" if s.resident is None else f", {s.resident:.0%} of the training data is there now"
    return (
        f"{_gb(s.bytes)} and {_gb(s.val_bytes)} for validation: {verdict} into {_gb(s.room)} of "
        f"free memory{cached}; order to use: {order}"
    )


def _disk_text(s: Storage) -> str:
    if not s.sequential:
        return "not measured (a folder, too small a file, or one that is always cached)"
    return f"large reads {s.sequential / 1e6:,.0f} MB/s, images {s.scattered / 1e6:,.0f} MB/s"


def _ways_text(plan: Plan) -> str:
    if not plan.ways:
        where = "it does not fit" if plan.machine.is_gpu else "there is no GPU"
        where = where if plan.machine.ranks == 1 else "several ranks"
        return f"eager and compiled were not compared: {where}"
    parts = (f"{name} {1000 * seconds:,.1f} ms" for name, seconds in plan.ways.items())
    return f"{', '.join(parts)}, at {max(t.resolution for t in plan.times)} px"


def _memory_text(plan: Plan) -> str:
    m, where = plan.memory, "the GPU" if plan.machine.is_gpu else "memory (this process)"
    fits = f"fits, {m.peak / GB:.2f} of {m.capacity / GB:.1f} GB of {where} at the peak"
    if m.micro_batch < m.asked:
        fits = f"does NOT fit; {m.micro_batch} images per forward pass do"
    return f"{m.asked} images per forward pass: {fits}"
