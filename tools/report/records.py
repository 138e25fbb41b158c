"""Records of runs: read, checked, put into groups of seeds. records/README.md shows the folders.

A record that is damaged, unfinished or contradicts its group is refused: a ValueError.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fast_imagenet.engine.json_lines import read_jsonl, read_object
from fast_imagenet.engine.schedules import is_evaluated, resolution_at
from fast_imagenet.engine.work import UNIT
from fast_imagenet.environment import redact_paths
from tools.report.yaml_files import STUDY, RecordError, Study, check_keys, read_study

MAX_EPOCHS = 100_000  # of training.epochs; a log of more is damaged
GROUP_KEYS = {"label": str, "main": bool, "readme": bool, "data": str, "note": str}
GROUP_KEYS |= {"superseded": str, "timed": bool, "unfinished": bool, "write": list}
TIMES = {"minutes", "images_per_second", "data_wait"}  # of `Run.numbers`: on an idle machine only

# A log may have more keys, and all others may be missing: records of every version stay readable.
REQUIRED = ("epoch", "seconds", "images_per_second")  # and top-1 of the final weights

# What may differ inside a group besides section `logging`: it does not change what is learned.
FREE = {
    *("training.seed", "training.resume", "training.checkpoint_minutes", "validation.every"),
    *("data.num_workers", "data.timeout", "data.check_pages", "data.in_memory"),
    *("data.train_dataset", "data.val_dataset"),  # names; their sizes are compared
}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over `count` seeds; one seed has no deviation."""

    mean: float
    deviation: float | None
    count: int

    def text(self, digits: int = 1) -> str:
        """'78.5 ± 0.3', without the second part for one value."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:,.{digits}f}"
        return f"{self.mean:,.{digits}f}{deviation}"


def spread(values: list[float]) -> Spread:
    """Spread of one value or more."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.mean(values), deviation, len(values))  # exact: fmean turns 59.95 down


def flat(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Nested settings as 'section.key' -> value."""
    return {f"{name}.{k}": value for name, keys in settings.items() for k, value in keys.items()}


@dataclass(frozen=True)
class Run:
    """A folder with log.jsonl and, where they are known, config.json and environment.json."""

    folder: Path
    settings: dict[str, dict[str, Any]]  # {} where unknown, as the next
    environment: dict[str, Any]
    log: list[dict[str, Any]]  # a line per evaluated epoch, at least one

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by its name, 'training.epochs'."""
        section, _, key = name.partition(".")
        return self.settings.get(section, {}).get(key, default)

    @property
    def counting_settings(self) -> dict[str, Any]:
        """'section.key' -> value of all settings that decide what is learned, without the seed."""
        every = flat(self.settings).items()
        return {k: v for k, v in every if k not in FREE and not k.startswith("logging.")}

    @property
    def seed(self) -> int:
        return self.setting("training.seed", 0)

    @property
    def ema(self) -> str:
        """Prefix of the log keys of its final weights: 'ema_' where they are the EMA, else ''."""
        return "ema_" if self.setting("ema.decay", 0) else ""

    def column(self, key: str) -> list[float]:
        """The values of a log key; empty where a line does not have it."""
        return [line[key] for line in self.log] if all(key in line for line in self.log) else []

    @cached_property
    def numbers(self) -> dict[str, float]:
        """What a table shows of the last epoch, as far as it was logged; accuracies in percent.

        images: thousands seen; pixels: the same, in epochs of 160 px; images_per_second: median
        over the epochs; minutes: training and evaluation; data_wait: percent of training time.
        """
        last, seconds, waits = self.log[-1], self.column("seconds"), self.column("data_wait_share")
        keys = {"standard": "plain_top1", "standard_top5": "plain_top5"}
        keys |= {"config": "top1", "config_top5": "top5"}
        found = {name: last.get(self.ema + key) for name, key in keys.items()}
        found |= {"epochs": last["epoch"], "images": last["epoch"] * self.images_per_epoch / 1000}
        if sizes := self.settings.get("resolution"):
            seen = [resolution_at(epoch, **sizes) for epoch in range(last["epoch"])]
            found["pixels"] = sum((size / UNIT) ** 2 for size in seen)
        found["images_per_second"] = statistics.median(self.column("images_per_second"))
        found["memory_gb"] = max(self.column("memory_gb"), default=None)
        if "total_seconds" in last:
            found["minutes"] = last["total_seconds"] / 60
        if waits:
            waited = sum(a * b for a, b in zip(seconds, waits, strict=True))
            found["data_wait"] = 100 * waited / max(sum(seconds), 1e-9)
        return {name: value for name, value in found.items() if value is not None}

    @cached_property
    def images_per_epoch(self) -> int:
        """Training images of an epoch; the median: older versions logged fewer of a resumed one."""
        return round(statistics.median(x["images_per_second"] * x["seconds"] for x in self.log))

    def protocol(self, evaluation: str) -> str:
        """'64 px + flip' of 'standard' or 'config' eval."""
        prefix = "plain_" if evaluation == "standard" else ""
        resolution = self.setting(f"validation.{prefix}resolution")
        ratio = self.setting(f"validation.{prefix}crop_ratio", 0.875)
        crop = "" if abs(ratio - 0.875) < 1e-6 else f", crop {ratio:.4g}"
        flip = " + flip" if evaluation == "config" and self.setting("validation.lr_tta") else ""
        return f"{resolution} px{crop}{flip}" if resolution else "unknown resolution"

    def unfinished(self) -> str:
        """Why its last epoch is not its result; '' when it is."""
        epochs = [line["epoch"] for line in self.log]
        last, every = epochs[-1], self.setting("validation.every", 1)
        planned, max_steps = self.setting("training.epochs"), self.setting("training.max_steps")
        due = {epoch for epoch in range(1, last) if is_evaluated(epoch - 1, last, every)}
        if epochs != sorted(due | set(epochs)):
            return f"its log has the epochs {epochs[0]} to {last} with gaps or repeats"
        if planned is None:
            return "how many epochs were planned is unknown: there is no config.json beside its log"
        if max_steps:
            return f"training.max_steps={max_steps} cut it short: a smoke run"
        return f"it has finished {last} of {planned} epochs" if last != planned else ""


def read_run(folder: Path) -> Run:
    """A run, finished or not, from its folder."""
    log = folder / "log.jsonl"
    if not log.is_file():
        raise RecordError(f"{folder} holds no log.jsonl: name the folder of a run")
    if not (lines := read_jsonl(log)):
        raise RecordError(f"{log} is empty: the run has not finished an epoch")
    run = Run(folder, _read_settings(folder), read_object(folder / "environment.json"), lines)
    required = dict.fromkeys([*REQUIRED, f"{run.ema}plain_top1", f"{run.ema}top1"])
    for number, line in enumerate(lines, 1):
        _check_line(line, required, f"line {number} of {log}")
    return run


def _check_line(line: dict[str, Any], required: dict[str, None], where: str) -> None:
    missing = [key for key in required if not isinstance(line.get(key), (int, float))]
    if missing:
        raise RecordError(f"{where} has no number for {', '.join(missing)}; restore it")
    wild = [key for key, value in line.items() if not isinstance(value, str)
            and not (isinstance(value, (int, float)) and abs(value) < 1e15)]  # fmt: skip  # NaN too
    if wild or type(line["epoch"]) is not int or not 1 <= line["epoch"] <= MAX_EPOCHS:
        key = wild[0] if wild else "epoch"
        raise RecordError(f"{where} has {key}={line[key]!r:.40}; restore it")


def _read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """config.json of a run, its paths removed: sections, and valid numbers for our arithmetic."""
    settings = read_object(folder / "config.json")
    wrong = {name: keys for name, keys in settings.items() if not isinstance(keys, dict)}
    validation = {} if wrong else settings.get("validation", {})
    if type(every := validation.get("every", 1)) is not int or every < 1:
        wrong["validation.every"] = every
    for key in ("crop_ratio", "plain_crop_ratio"):
        if not isinstance(ratio := validation.get(key, 1), (int, float)):
            wrong[f"validation.{key}"] = ratio
    for key, value in wrong.items():
        raise RecordError(f"{folder}/config.json has {key}={value!r:.40}; restore it")
    return redact_paths(settings)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only, in the order of their seeds."""

    name: str  # first folder below records/, the stem of a config
    folder: Path
    runs: tuple[Run, ...]
    about: dict[str, Any]  # content of group.json

    @property
    def label(self) -> str:
        """What distinguishes the group."""
        return self.about.get("label", self.folder.name)

    @property
    def timed(self) -> bool:
        """Whether its times mean something."""
        return self.about.get("timed", True)

    def logged(self, key: str) -> bool:
        """Whether all seeds have one of `Run.numbers`."""
        return all(key in run.numbers for run in self.runs)

    def spread(self, key: str) -> Spread:
        """Of one of `Run.numbers` over the seeds, all of which logged it."""
        return spread([run.numbers[key] for run in self.runs])

    def only(self, run: Run) -> Group:
        """One run of the group."""
        return replace(self, runs=(run,))

    def text(self, key: str, digits: int = 1) -> str:
        """Its spread in words, or why there is none to show."""
        if key in TIMES and not self.timed:
            return "not timed"
        return self.spread(key).text(digits) if self.logged(key) else "not logged"

    @property
    def seeds(self) -> str:
        """'3 seeds', with the reason where a run is unfinished."""
        reasons = [reason for run in self.runs if (reason := run.unfinished())]
        return "; ".join([f"{len(self.runs)} seed{'s' * (len(self.runs) != 1)}", *reasons[:1]])


@dataclass(frozen=True)
class Entry:
    """All groups of one folder of records/, the main one first; `study`: None for a config."""

    name: str
    groups: tuple[Group, ...]
    study: Study | None


def read_records(folder: Path) -> list[Entry]:
    """Every record, sorted by name."""
    names = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [entry for path in names if (entry := read_entry(path))]


def read_entry(folder: Path) -> Entry | None:
    """The groups below one folder of records/; None without any run."""
    runs = [log.parent for log in folder.rglob("log.jsonl")
            if "/." not in f"/{log.relative_to(folder)}"]  # fmt: skip  # .seed0: a killed copy
    seeds = {run for run in runs if run.name.startswith("seed") and run.parent != folder}
    places = sorted({run.parent if run in seeds else run for run in runs})
    if not places:
        return None
    groups = [read_group(place, folder.name) for place in places]
    study = read_study(folder / STUDY)
    if study and study.groups:
        groups.sort(key=lambda group: study.place(group.folder.name))
    else:
        groups.insert(0, groups.pop(groups.index(choose_main(groups, folder))))
    return Entry(folder.name, tuple(groups), study)


def read_group(folder: Path, name: str) -> Group:
    """The group in a folder: its seeds, or the run that the folder itself is."""
    own = (folder / "log.jsonl").is_file()
    seeds = sorted(log.parent for log in folder.glob("seed*/log.jsonl"))
    if own and seeds:
        raise RecordError(f"{folder} is a run and holds others; put its files into seed0/")
    about = read_group_file(folder)
    runs = sorted(map(read_run, [folder] if own else seeds), key=lambda run: run.seed)
    for run in runs:
        if (reason := run.unfinished()) and not about.get("unfinished"):
            raise RecordError(
                f"{run.folder} is not a finished run: {reason}; remove it, or write "
                f'"unfinished": true into group.json'
            )
    check_alike(runs)
    return Group(name, folder, tuple(runs), about)


def read_group_file(folder: Path) -> dict[str, Any]:
    """group.json of a group's folder; {} where there is none."""
    path = folder / "group.json"
    return check_keys(read_object(path), GROUP_KEYS, (), path)


def settings_that_differ(run: Run, planned: dict[str, Any]) -> list[str]:
    """'key=theirs, planned ours' of settings that decide what is learned and that both have."""
    if not run.settings:
        return ["config.json is missing, its settings are unknown"]
    plan = replace(run, settings=redact_paths(planned))
    ours = plan.counting_settings | {"training.seed": plan.seed}
    theirs = run.counting_settings | {"training.seed": run.seed}
    return [f"{key}={theirs[key]}, planned {value}" for key, value in ours.items()
            if theirs.get(key, value) != value]  # fmt: skip


def check_alike(runs: list[Run]) -> None:
    """Refuse runs whose mean would mean nothing: of one seed, or of other settings or images."""
    first, settings, images = runs[0], runs[0].counting_settings, runs[0].images_per_epoch
    for i, run in enumerate(runs[1:], 1):
        if run.seed in [other.seed for other in runs[:i]]:
            raise RecordError(f"{run.folder} has seed {run.seed}, as another run of its group")
        other = run.counting_settings  # a setting that one does not have is of another version
        if differ := [key for key, value in settings.items() if other.get(key, value) != value]:
            raise RecordError(
                f"{run.folder} and {first.folder} differ in {', '.join(differ)}; runs of a group "
                f"differ in training.seed only: make another group"
            )
        if abs(run.images_per_epoch - images) > 0.01 * images:
            raise RecordError(
                f"{run.folder} saw {run.images_per_epoch:,} images per epoch, {first.folder} "
                f"{images:,}: they are of different datasets; make another group"
            )


def choose_main(groups: list[Group], folder: Path) -> Group:
    """The group that README's row shows; RecordError when several group.json do not say which."""
    marked = [group for group in groups if group.about.get("main")]
    candidates = marked or [group for group in groups if "main" not in group.about]
    if len(candidates) != 1:
        names = ", ".join(str(group.folder.relative_to(folder)) for group in groups)
        raise RecordError(
            f'{folder} has the groups {names}: write "main": true into the group.json of one of '
            f"them, and false or nothing into the others"
        )
    return candidates[0]


def group_file_with(folder: Path, run: Run, about: dict[str, Any]) -> dict[str, Any]:
    """Content of the group's group.json with one more run, which is known to fit in then."""
    entry = read_entry(folder.parent) if folder.parent.is_dir() else None
    groups, study = (list(entry.groups), entry.study) if entry else ([], None)
    if old := next((one for one in groups if one.folder == folder), None):
        check_alike([*old.runs, run])
        about = old.about | about
        groups.remove(old)
    elif groups and study is None:  # a second group is not in README.md unless it says so
        about = {"main": False} | about
    if not (study and study.groups):  # a plan has its own order
        choose_main([*groups, Group(folder.parent.name, folder, (run,), about)], folder.parent)
    return about
