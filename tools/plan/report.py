"""What is printed: the hours, what they depend on, and what to change first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

from tools.plan.forecast import (
    Costs,
    Forecast,
    Row,
    SideTimes,
    Storage,
    reading_seconds,
)

GB = 1e9
UNSURE = 0.1  # of the total: a plan that is less sure than this says so
FULL = 0.92  # of a GPU's memory: what is above it leaves no room for fragments
HEAVY_POLICIES = ("rand_augment", "rand_augment_timm", "auto_augment", "trivial_augment")


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
    quota: float | None  # cores' worth of time that a container gives; None = all
    workers: int
    ranks: int


@dataclass(frozen=True)
class Plan:
    """All that was measured, and what follows."""

    cfg: SimpleNamespace
    forecast: Forecast
    times: list[SideTimes]  # measured
    costs: Costs
    storage: Storage
    memory: Memory
    machine: Machine
    images: int  # of an epoch
    seconds: float  # of wall time that measuring took
    measured: int = 0  # images of a step as it was measured; 0 = as the run's

    @property
    def longest(self) -> Row:
        """The phase with most seconds."""
        phases = [row for row in self.forecast.rows if row.name == "training"]
        return max(phases, key=lambda row: row.seconds)

    @property
    def loader_bound(self) -> bool:
        """Whether the loader alone takes longer than the step alone, in the longest phase."""
        return self.longest.times.loader > self.longest.times.step


@dataclass(frozen=True)
class Advice:
    """A setting to change."""

    setting: str  # section.key=value, or '' where none helps
    why: str


# ------------------------------------------------------------------------------------------------
# Advice
# ------------------------------------------------------------------------------------------------


def advise(plan: Plan) -> list[Advice]:
    """What to change, the most urgent first; at least one entry."""
    found = [*_memory(plan), *_order(plan), *_loader(plan), *_step(plan), *_evaluation(plan)]
    return found or [_nothing(plan)]


def _memory(plan: Plan):
    m = plan.memory
    if m.micro_batch < m.asked:
        yield Advice(
            f"training.micro_batch_size={m.micro_batch}",
            f"{m.asked} images in a forward pass do not fit {m.capacity / GB:.1f} GB of memory",
        )
    elif m.peak > FULL * m.capacity and m.asked % 2 == 0 and m.asked > 2:
        yield Advice(
            f"training.micro_batch_size={m.asked // 2}",
            f"a step takes {m.peak / GB:.1f} of {m.capacity / GB:.1f} GB of memory",
        )


def _order(plan: Plan):
    s, epochs = plan.storage, _epoch_seconds(plan.forecast)
    if s.fits and not s.random_order:
        yield Advice(
            "data.in_memory=true",
            f"the data ({_gb(s.bytes + s.val_bytes)}) fits {_gb(s.room)} of memory: the order can "
            f"be random over all of it",
        )
    if s.fits or not s.random_order:
        return
    words = f"the data ({_gb(s.bytes + s.val_bytes)}) does not fit {_gb(s.room)} of memory"
    if plan.cfg.data.backend != "ffcv":
        yield Advice("data.backend=ffcv with data.in_memory=false", words)
        return
    saved = reading_seconds(s, epochs) - reading_seconds(replace(s, random_order=False), epochs)
    gain = f"; saves about {duration(saved)}" if saved > 1 else ""
    yield Advice("data.in_memory=false", words + gain)


def _epoch_seconds(forecast: Forecast) -> list[float]:
    phases = [row for row in forecast.rows if row.name == "training"]
    return [row.seconds / row.count for row in phases for _ in range(row.count)]


def _loader(plan: Plan):
    t, machine, data = plan.longest.times, plan.machine, plan.cfg.data
    loading = t.together - t.step  # what the loader adds
    if machine.quota is not None and plan.machine.workers > machine.quota:
        workers = max(1, int(machine.quota))
        why = f"the container gives {machine.quota:g} cores of time: more workers are throttled"
        yield Advice(f"data.num_workers={workers}", why)
    if loading < 0.15 * t.together:
        return
    why = f"loading takes {loading / t.together:.0%} of a step at {t.side} px"
    share = machine.cores // machine.ranks
    if machine.is_gpu and machine.workers < share:
        yield Advice(f"data.num_workers={share}", f"{why}, and {share} cores are there")
    elif data.backend == "torchvision":
        yield Advice("data.backend=ffcv", why)
    elif plan.cfg.augment.policy in HEAVY_POLICIES:
        yield Advice("augment.policy=rand_augment_lite", f"{why}; it is the lighter policy")
    else:
        side = max(192, 32 * round(1.5 * t.side / 32))
        yield Advice(
            f"write.max_side={side}",
            f"{why}: smaller images decode faster, where yours are larger (write the file again)",
        )


def _step(plan: Plan):
    training = plan.cfg.training
    if plan.machine.is_gpu and training.compile == "off":
        yield Advice("training.compile=auto", "the network is not compiled")
    if plan.machine.is_gpu and training.precision == "fp32":
        yield Advice("training.precision=auto", "fp32 takes two to four times as long on a GPU")


def _evaluation(plan: Plan):
    share = plan.forecast.of("evaluation") / plan.forecast.seconds
    v = plan.cfg.validation
    same = (v.resolution, v.crop_ratio) == (v.plain_resolution, v.plain_crop_ratio)
    if share > 0.15 and not same:
        yield Advice(
            f"validation.resolution={v.plain_resolution} with "
            f"validation.crop_ratio={v.plain_crop_ratio:g}",
            f"evaluation is {share:.0%} of the run, and the two protocols would share one pass",
        )


def _nothing(plan: Plan) -> Advice:
    """No fault was found: the way to fewer hours is a smaller task."""
    epochs, row = len(_epoch_seconds(plan.forecast)), plan.longest
    side = row.times.side
    small = 32 * round(0.75 * side / 32)
    share = row.seconds / plan.forecast.seconds
    if row.count < epochs or epochs < 5 or small >= side or small < 64:
        return Advice("", f"nothing stands out: training at {side} px takes {share:.0%} of the run")
    start, end = int(0.4 * epochs), int(0.85 * epochs)
    saved = row.seconds * (1 - (small / side) ** 2) * (start + end) / 2 / epochs
    return Advice(
        f"resolution.min_res={small} with resolution.start_ramp={start} and "
        f"resolution.end_ramp={end}",
        f"nothing is amiss; growing images would save about {duration(saved)} (by the number of "
        f"pixels), for a slightly different accuracy",
    )


# ------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """'9.1 s', '12.3 min' or '34.2 h'."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _gb(count: float) -> str:
    return f"{count / GB:.2f} GB" if count < 10 * GB else f"{count / GB:.0f} GB"


def render(plan: Plan) -> str:
    """The page, ends in a newline."""
    advice = advise(plan)
    lines = [*_head(plan), "", *_table(plan), *_caution(plan), ""]
    lines += [_bottleneck(plan), _data_line(plan), _disk_line(plan), _memory_line(plan), ""]
    for number, one in enumerate(advice):
        name = "change first" if not number else "then"
        lines.append(f"{name + ':':14}{one.setting + ': ' if one.setting else ''}{one.why}")
    return "\n".join(lines) + "\n"


def _head(plan: Plan) -> list[str]:
    m, training = plan.machine, plan.cfg.training
    ranks = f", {m.ranks} ranks" if m.ranks > 1 else ""
    return [
        f"{plan.cfg.model.arch}, {training.epochs} epochs of {plan.images:,} images, "
        f"{training.batch_size} a step",
        f"{m.device}, {m.cores} cores, data.num_workers={m.workers}{ranks}; measured in "
        f"{duration(plan.seconds)}{', processor time' * (plan.cfg.clock == 'cpu')}",
    ]


NAMES = {
    "evaluation": "evaluation, {} times",
    "checkpoints": "checkpoints and log",
    "reading": "waiting for the disk",
    "start": "start-up",
    "end": "final weights, curves",
}


def _table(plan: Plan) -> list[str]:
    total = plan.forecast.seconds
    lines = [f"{'':34}{'time':>10}{'share':>8}"]
    for row in plan.forecast.rows:
        name = _phase_name(row) if row.phase else NAMES[row.name].format(row.count)
        line = f"{name:34}{duration(row.seconds):>10}{row.seconds / total:>8.1%}"
        lines.append(line + (f"   {_pace(row, plan)}" if row.phase else ""))
    unsure = _unsure(plan)
    rounds = "one round" if unsure is None else f"rounds of measuring differed by ±{unsure:.0%}"
    return [*lines, f"{'total':34}{duration(total):>10}{'':11}{total / 3600:.2f} hours; {rounds}"]


def _unsure(plan: Plan) -> float | None:
    """Half the difference of the rounds, as a share; None where there was one round."""
    spreads = [time.spread for time in plan.times if time.spread is not None]
    return max(spreads) / 2 if spreads else None


def _caution(plan: Plan) -> list[str]:
    """What to think of a plan that is extrapolated, or whose rounds differ; else nothing."""
    unsure, total, batch = _unsure(plan), plan.forecast.seconds, plan.cfg.training.batch_size
    lines = []
    if 0 < plan.measured < batch:
        lines.append(
            f"{'extrapolated:':14}a step was measured on {plan.measured} images, as {batch} take "
            f"too long or too much memory here; large batches take less time an image"
        )
    if not unsure or unsure <= UNSURE:
        return lines
    least, most = duration(total * (1 - unsure)), duration(total * (1 + unsure))
    remedy = "measure again when it is at rest"
    if plan.cfg.clock == "wall":
        remedy += ", or with --clock=cpu, which counts this process's own time"
    return [
        *lines,
        f"{'not sure:':14}{least} to {most}, for the machine was busy with something else, or "
        f"throttled: {remedy}",
    ]


def _phase_name(row: Row) -> str:
    epochs = f"{row.phase.first} to {row.phase.last}" if row.count > 1 else f"{row.phase.first}"
    return f"training, {row.phase.side} px, epoch{'s' * (row.count > 1)} {epochs}"


def _pace(row: Row, plan: Plan) -> str:
    t = row.times
    rate = plan.cfg.training.batch_size / t.together
    digits = 0 if rate >= 10 else 2
    how = "" if t.steps else ", interpolated"
    return f"{1000 * t.together:,.0f} ms a step, {rate:,.{digits}f} images/s{how}"


def _bottleneck(plan: Plan) -> str:
    t = plan.longest.times
    times = f"step alone {1000 * t.step:,.0f} ms, loader alone {1000 * t.loader:,.0f} ms"
    if not t.loader:
        return f"{'bottleneck:':14}not known: an epoch is one batch, and loading is the wait for it"
    slow, fast = max(t.step, t.loader), min(t.step, t.loader)
    name, other = ("loader", "step") if plan.loader_bound else ("step", "loader")
    text = f"the {name}, {slow / fast:.1f} times the {other}'s time ({t.side} px: {times}"
    together = f"together {1000 * t.together:,.0f} ms"
    added = max(0.0, t.together / t.step - 1)
    shared = "" if plan.machine.is_gpu else ", sharing the cores"
    return f"{'bottleneck:':14}{text}, {together}{shared}: loading adds {added:.0%} to the step)"


def _data_line(plan: Plan) -> str:
    s = plan.storage
    verdict = "fits" if s.fits else "does NOT fit"
    order = "random (data.in_memory=true)" if s.fits else "quasi-random (data.in_memory=false)"
    there = "" if s.resident is None else f", {s.resident:.0%} of the training data is there now"
    return (
        f"{'data:':14}{_gb(s.bytes)} and {_gb(s.val_bytes)} for validation: {verdict} into "
        f"{_gb(s.room)} of free memory{there}; order to use: {order}"
    )


def _disk_line(plan: Plan) -> str:
    s = plan.storage
    if not s.sequential:
        return f"{'disk:':14}not measured (a folder, or too small a file)"
    rates = f"large reads {s.sequential / 1e6:,.0f} MB/s, images {s.scattered / 1e6:,.0f} MB/s"
    if not s.cold:
        return f"{'disk:':14}unknown: the pages stayed in memory ({rates} from there)"
    return f"{'disk:':14}{rates}"


def _memory_line(plan: Plan) -> str:
    m = plan.memory
    where = "the GPU" if plan.machine.is_gpu else "memory (this process)"
    fits = f"fits, {m.peak / GB:.2f} of {m.capacity / GB:.1f} GB of {where} at the peak"
    if m.micro_batch < m.asked:
        fits = f"does NOT fit; {m.micro_batch} images a forward pass do"
    return f"{'batch:':14}{m.asked} images a forward pass: {fits}"


def as_dict(plan: Plan) -> dict:
    """Plain values, for --json; seconds and bytes."""
    return {
        "arch": plan.cfg.model.arch,
        "forecast": plan.forecast.as_dict(),
        "bottleneck": "loader" if plan.loader_bound else "step",
        "times": [asdict(one) for one in plan.times],
        "costs": asdict(plan.costs),
        "storage": {**asdict(plan.storage), "fits": plan.storage.fits},
        "memory": asdict(plan.memory),
        "machine": asdict(plan.machine),
        "advice": [asdict(one) for one in advise(plan)],
        "images": plan.images,
        "clock": plan.cfg.clock,
        "measuring_seconds": plan.seconds,
        "measured_batch": plan.measured or plan.cfg.training.batch_size,
    }
