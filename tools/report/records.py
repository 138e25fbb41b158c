"""Runs as they lie in records/: read, checked, put into groups of seeds.

    records/NAME/GROUP/log.jsonl ...           one run
    records/NAME/GROUP/seed0/log.jsonl ...     several runs that differ in their seed
    records/NAME/GROUP/group.json              what the group is (GROUP_KEYS), optional
    records/NAME/study.yaml                    NAME is a comparison, not a row (studies.py)

NAME is the stem of a config where there is one. Between NAME and GROUP may be more folders.
records/README.md says the same to those who add to it.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fast_imagenet.engine.logger import LOG_KEYS, RunLogError, read_jsonl, redact_paths
from fast_imagenet.engine.schedules import is_evaluated
from tools.report.errors import RecordError
from tools.report.studies import FILE, Study, read_study

MAX_EPOCHS = 100_000  # of training.epochs; a log of more is damaged
GROUP_KEYS = {"label": str, "main": bool, "readme": bool, "data": str, "note": str}
GROUP_KEYS |= {"timed": bool, "unfinished": bool, "write": list}
TIMES = {"minutes", "images_per_second", "data_wait"}  # of `Run.numbers`: they need a quiet machine

# What may differ inside a group besides section `logging`: it does not change what is learnt.
FREE = {
    *("training.seed", "training.resume", "training.checkpoint_minutes", "validation.every"),
    *("data.num_workers", "data.timeout", "data.check_pages", "data.in_memory"),
    *("data.train_dataset", "data.val_dataset"),  # names; their sizes are compared
}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds.

    Attributes:
        mean: of the values.
        deviation: None for a single value.
        count: number of values.
    """

    mean: float
    deviation: float | None
    count: int

    def text(self, digits: int = 1) -> str:
        """'78.5 ± 0.3', without the second part for one value."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


def spread(values: list[float]) -> Spread:
    """Spread of one value or more."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.mean(values), deviation, len(values))  # exact: fmean turns 59.95 down


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A folder with log.jsonl and, where they are known, config.json and environment.json.

    Attributes:
        folder: where it was read.
        settings: of config.json, {} without it.
        environment: of environment.json, {} without it.
        log: the lines of log.jsonl, one an epoch, one at least.
    """

    folder: Path
    settings: dict
    environment: dict
    log: list[dict]

    def setting(self, name: str, default=None):
        """A setting by its name, 'training.epochs'."""
        section, _, key = name.partition(".")
        return self.settings.get(section, {}).get(key, default)

    def counting_settings(self) -> dict:
        """'section.key' -> value of all settings that decide what is learnt, but the seed."""
        return {key: value for key, value in _flat(self.settings).items() if _counts(key)}

    @property
    def seed(self) -> int:
        return self.setting("training.seed", 0)

    @property
    def averaged(self) -> bool:
        """Whether its final weights are the moving average."""
        return bool(self.setting("ema.decay", 0))

    @cached_property
    def numbers(self) -> dict[str, float]:
        """What a table shows of the last epoch; accuracies of the final weights, in percent.

        Keys: plain, plain_top5, configured, configured_top5, epochs, minutes (training and
        evaluation), images_per_second (median over the epochs), data_wait (percent of the time of
        training), images (thousands seen), memory_gb.
        """
        last, ema = self.log[-1], "ema_" if self.averaged else ""
        seconds = sum(line["seconds"] for line in self.log)
        waited = sum(line["seconds"] * line["data_wait_share"] for line in self.log)
        return {
            "plain": last[f"{ema}plain_top1"],
            "plain_top5": last[f"{ema}plain_top5"],
            "configured": last[f"{ema}top1"],
            "configured_top5": last[f"{ema}top5"],
            "epochs": last["epoch"],
            "minutes": last["total_seconds"] / 60,
            "images_per_second": statistics.median(x["images_per_second"] for x in self.log),
            "data_wait": 100 * waited / max(seconds, 1e-9),
            "images": last["epoch"] * self.images_per_epoch / 1000,
            "memory_gb": max(line["memory_gb"] for line in self.log),
        }

    @cached_property
    def images_per_epoch(self) -> int:
        """Training images of an epoch; the median: older versions logged fewer of a resumed one."""
        seen = [line["images_per_second"] * line["seconds"] for line in self.log]
        return round(statistics.median(seen))

    def protocol(self, view: str) -> str:
        """'64 px + flip' for view 'plain' or 'configured'; '' where the settings are unknown."""
        prefix = "plain_" if view == "plain" else ""
        side = self.setting(f"validation.{prefix}resolution")
        if side is None:
            return ""
        ratio = self.setting(f"validation.{prefix}crop_ratio", 0.875)
        crop = "" if abs(ratio - 0.875) < 1e-6 else f", crop {ratio:.4g}"
        flip = " + flip" if view == "configured" and self.setting("validation.lr_tta") else ""
        return f"{side} px{crop}{flip}"


def read_run(folder: str | Path) -> Run:
    """A run from its folder, or from its log.jsonl alone.

    Raises:
        RecordError: there is no log, or a file is damaged, or a line lacks a number.
    """
    folder = Path(folder)
    log = folder if folder.is_file() else folder / "log.jsonl"
    if not log.is_file():
        raise RecordError(f"{folder} holds no log.jsonl: name the folder of a run, or its log")
    try:
        lines = read_jsonl(log)
    except RunLogError as error:
        raise RecordError(str(error)) from error
    if not lines:
        raise RecordError(f"{log} is empty: the run has not finished an epoch")
    for number, line in enumerate(lines, 1):
        missing = [key for key in LOG_KEYS if not isinstance(line.get(key), (int, float))]
        if missing:
            raise RecordError(
                f"line {number} of {log} has no number for {', '.join(missing)}; a log of "
                f"train_imagenet.py has all of {', '.join(LOG_KEYS)}"
            )
        wild = [key for key in LOG_KEYS if not abs(line[key]) < 1e15]  # nor is NaN
        if wild or type(line["epoch"]) is not int or not 1 <= line["epoch"] <= MAX_EPOCHS:
            key = wild[0] if wild else "epoch"
            raise RecordError(f"line {number} of {log} has {key}={line[key]!r:.40}; restore it")
    return Run(log.parent, _read_settings(log.parent), _read(log.parent, "environment"), lines)


def _read(folder: Path, name: str) -> dict:
    return read_object(folder / f"{name}.json")


def _read_settings(folder: Path) -> dict:
    """config.json of a run: sections, and the numbers that are counted with.

    Raises:
        RecordError: it is not what train_imagenet.py writes.
    """
    settings = _read(folder, "config")
    for section, keys in settings.items():
        if not isinstance(keys, dict):
            raise RecordError(f"{folder}/config.json has {section}={keys!r:.40}; restore it")
    every = settings.get("validation", {}).get("every", 1)
    if type(every) is not int or every < 1:
        raise RecordError(f"{folder}/config.json has validation.every={every!r:.40}; restore it")
    for key in ("crop_ratio", "plain_crop_ratio"):
        ratio = settings.get("validation", {}).get(key, 1)
        if not isinstance(ratio, (int, float)):
            raise RecordError(
                f"{folder}/config.json has validation.{key}={ratio!r:.40}; restore it"
            )
    return settings


def read_object(path: Path) -> dict:
    """A JSON object, {} where there is no file.

    Raises:
        RecordError: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not JSON ({error}); restore it") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} is no JSON object; restore it")
    return content


def unfinished(run: Run) -> str:
    """Why the run is none whose last epoch is its result; '' when it is one."""
    epochs = [line["epoch"] for line in run.log]
    planned = run.setting("training.epochs")
    every = run.setting("validation.every", 1)
    due = {epoch for epoch in range(1, epochs[-1]) if is_evaluated(epoch - 1, epochs[-1], every)}
    if epochs != sorted(due | set(epochs)):
        return f"its log has the epochs {epochs[0]} to {epochs[-1]} with gaps or repeats"
    if planned is None:
        return "how many epochs it was to have is unknown: there is no config.json beside its log"
    if run.setting("training.max_steps", 0):
        return f"training.max_steps={run.setting('training.max_steps')} cut it short: a trial"
    if epochs[-1] != planned:
        return f"it has finished {epochs[-1]} of {planned} epochs"
    return ""


# ------------------------------------------------------------------------------------------------
# Groups of seeds
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        name: first folder below records/, the stem of a config.
        folder: of the group.
        runs: one at least, in the order of their seeds.
        about: content of group.json.
    """

    name: str
    folder: Path
    runs: tuple[Run, ...]
    about: dict

    @property
    def label(self) -> str:
        """What distinguishes the group."""
        return self.about.get("label", self.folder.name)

    @property
    def timed(self) -> bool:
        """Whether its times mean something."""
        return self.about.get("timed", True)

    def spread(self, key: str) -> Spread:
        """Of one of `Run.numbers` over the seeds."""
        return spread([run.numbers[key] for run in self.runs])

    def text(self, key: str, digits: int = 1) -> str:
        """Its spread in words; 'not timed' for a time that means nothing."""
        hidden = key in TIMES and not self.timed
        return "not timed" if hidden else self.spread(key).text(digits)

    @property
    def seeds(self) -> str:
        """'3 seeds', with the reason where a run is none that ended."""
        cut = [reason for run in self.runs if (reason := unfinished(run))]
        text = f"{len(self.runs)} seed{'s' * (len(self.runs) != 1)}"
        return f"{text}; {cut[0]}" if cut else text


@dataclass(frozen=True)
class Entry:
    """All groups of one name.

    Attributes:
        groups: the main one first, then by folder.
        study: what study.yaml says, None for a config's entry.
    """

    name: str
    groups: tuple[Group, ...]
    study: Study | None

    @property
    def main(self) -> Group:
        return self.groups[0]


def read_records(folder: str | Path) -> list[Entry]:
    """Every record, sorted by name.

    Raises:
        RecordError: a record is damaged, unfinished or contradicts its group.
    """
    folder = Path(folder)
    names = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [entry for path in names if (entry := read_entry(path))]


def read_entry(folder: Path) -> Entry | None:
    """The groups below one folder of records/; None without any run.

    Raises:
        RecordError: as `read_records`.
    """
    logs = folder.rglob("log.jsonl")
    whole = [
        p for p in logs if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]
    places = sorted({_group_folder(log.parent, folder) for log in whole})  # .seed0: a killed copy
    if not places:
        return None
    groups = [read_group(place, folder.name) for place in places]
    study = read_study(folder / FILE)
    if study and study.groups:
        groups.sort(key=lambda group: study.place(group.folder.name))
        return Entry(folder.name, tuple(groups), study)
    main = choose_main(groups, folder)
    return Entry(folder.name, (main, *(group for group in groups if group is not main)), study)


def _group_folder(run: Path, name_folder: Path) -> Path:
    """A folder called seed... belongs to the group that it lies in."""
    inside = run.name.startswith("seed") and run.parent != name_folder
    return run.parent if inside else run


def read_group(folder: Path, name: str) -> Group:
    """The group in a folder: its seeds, or the run that the folder itself is.

    Raises:
        RecordError: as `read_records`.
    """
    own = (folder / "log.jsonl").is_file()
    seeds = sorted(log.parent for log in folder.glob("seed*/log.jsonl"))
    if own and seeds:
        raise RecordError(f"{folder} is a run and holds others; put its files into seed0/")
    about = read_group_file(folder)
    runs = [read_run(path) for path in ([folder] if own else seeds)]
    runs = tuple(sorted(runs, key=lambda run: run.seed))
    for run in runs:
        if (reason := unfinished(run)) and not about.get("unfinished"):
            raise RecordError(
                f"{run.folder} is no finished run: {reason}; take it out, or write "
                f'"unfinished": true into group.json'
            )
    check_alike(runs)
    return Group(name, folder, runs, about)


def read_group_file(folder: Path) -> dict:
    """group.json of a group's folder; {} where there is none.

    Raises:
        RecordError: it is damaged, or a key is unknown or of another kind.
    """
    path = folder / "group.json"
    return _known(read_object(path), GROUP_KEYS, path)


def settings_that_differ(run: Run, planned: dict) -> list[str]:
    """'key=theirs, planned ours' for every setting that decides what is learnt, and the seed.

    Args:
        run: a record; a setting that it does not have is of another version.
        planned: nested settings, as train_imagenet.py reads them.
    """
    if not run.settings:
        return ["config.json is missing, its settings are unknown"]
    plan = Run(run.folder, redact_paths(planned), {}, run.log)
    ours = plan.counting_settings() | {"training.seed": plan.seed}
    theirs = run.counting_settings() | {"training.seed": run.seed}
    return [
        f"{key}={theirs[key]}, planned {value}"
        for key, value in ours.items()
        if theirs.get(key, value) != value
    ]


def check_alike(runs: tuple[Run, ...]) -> None:
    """Refuse runs whose mean would mean nothing.

    Raises:
        RecordError: a seed comes twice, or settings or the number of images differ.
    """
    first = runs[0]
    flat = first.counting_settings()
    for i, run in enumerate(runs[1:], 1):
        if run.seed in [other.seed for other in runs[:i]]:
            raise RecordError(f"{run.folder} has seed {run.seed}, as another run of its group")
        other = run.counting_settings()  # a setting that one lacks is of another version
        differ = [key for key, value in flat.items() if other.get(key, value) != value]
        if differ:
            raise RecordError(
                f"{run.folder} and {first.folder} differ in {', '.join(differ)}; runs of a group "
                f"differ in training.seed only: make another group"
            )
        sizes = run.images_per_epoch, first.images_per_epoch
        if abs(sizes[0] - sizes[1]) > 0.01 * sizes[1]:
            raise RecordError(
                f"{run.folder} saw {sizes[0]:,} images an epoch, {first.folder} {sizes[1]:,}: "
                f"they are not of one data set; make another group"
            )


def choose_main(groups: list[Group], folder: Path) -> Group:
    """The group that the README's row shows.

    Raises:
        RecordError: there are several and their group.json do not say which.
    """
    said = [group for group in groups if group.about.get("main")]
    silent = [group for group in groups if "main" not in group.about]
    candidates = said or silent
    if len(candidates) != 1:
        names = ", ".join(str(group.folder.relative_to(folder)) for group in groups)
        raise RecordError(
            f"{folder} has the groups {names}: write "
            f'"main": true into the group.json of one of them, and false or nothing of the others'
        )
    return candidates[0]


def _known(content: dict, kinds: dict[str, type], path: Path) -> dict:
    for key, value in content.items():
        if key not in kinds or not isinstance(value, kinds[key]):
            rule = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
            raise RecordError(f"{path}: {key}={value!r} is none of {rule}")
    return content


def _counts(key: str) -> bool:
    return key not in FREE and not key.startswith("logging.")


def _flat(settings: dict) -> dict:
    return {
        f"{section}.{key}": value
        for section, keys in settings.items()
        for key, value in keys.items()
    }
