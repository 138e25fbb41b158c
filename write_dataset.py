"""Turn ImageNet, however it is kept, into train.beton and val.beton for train_imagenet.py.

    IMAGENET_DIR=/path/to/imagenet python write_dataset.py        data/train.beton, data/val.beton
    python write_dataset.py --source.kind=synthetic               drawn images: nothing needed
    python write_dataset.py --source.kind=parquet --source.path=FOLDER --source.split=val
    python write_dataset.py --help                                every setting, rule and default

Images become RGB exactly as torchvision reads them, are shrunk to --write.max_side and stored as
JPEG or raw pixels. The file is FFCV's own format, equal for any number of workers, and has its
final name only when it is complete. Its summary lies beside it: train.beton.json.

Large data, on many machines: --source.shards=16 --source.shard=0 to 15, each anywhere and at any
time, then python -m fast_imagenet.beton merge data/train.beton data/train.part-*.beton: the result
is that of a single conversion.

Exit status: 0 done, 1 an image or the disk failed, 2 wrong settings or data, 130 interrupted.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

try:
    from fastargs import Config, Param, Section
except ModuleNotFoundError as missing:
    sys.exit(
        f"{missing} for {sys.executable}: `make setup` installs what is needed into .venv; "
        f"then run .venv/bin/python write_dataset.py"
    )

from fast_imagenet.beton.output_lock import find_output_problem
from fast_imagenet.config import Bool, Int, Number, OneOf, Str, format_error, read_config
from fast_imagenet.processes import HANG_UP
from fast_imagenet.sources import KINDS, SPLITS
from fast_imagenet.sources.official import MD5_CHOICES
from fast_imagenet.terminal import ignore_broken_pipe, readable

# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Settings                                                                                       │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘

SETTINGS = Config()

# fmt: off
Section("source", "where the images come from", SETTINGS).params(
    kind=Param(OneOf(*KINDS), "how they are kept", default="image_folder"),
    path=Param(Str(), "their folder; empty: $IMAGENET_DIR", default=""),
    split=Param(OneOf(*SPLITS, "all"), "which part to write", default="all"),
    on_error=Param(OneOf("fail", "skip"), "a damaged image: stop, or list it", default="fail"),
    classes=Param(Str(), "parquet, webdataset: file of class names, one a line", default=""),
    md5=Param(OneOf(*MD5_CHOICES), "ilsvrc_tar: compare md5; all reads 155 GB", default="devkit"),
    imagenette_size=Param(OneOf("full", "320px", "160px"), "which download", default="320px"),
    synthetic_train=Param(Int(1), "images to draw for train", default=4000),
    synthetic_val=Param(Int(1), "images to draw for val", default=1000),
    holdout=Param(Number(0, 0.9), "val: this share of train, for choosing; 0 = off", default=0.0),
    shards=Param(Int(1, 9999), "parts to convert one by one and merge later", default=1),
    shard=Param(Int(0, 9998), "which part, from 0; one that is complete is kept", default=0),
)
Section("write", "what the files hold", SETTINGS).params(
    folder=Param(Str(empty=False), "gets train.beton and val.beton", default="data"),
    max_side=Param(Int(0, 65_500), "longest side in pixels; 0 = as it is", default=400),
    mode=Param(OneOf("jpg", "raw", "proportion", "smart"), "how to store them", default="jpg"),
    jpeg_share=Param(Number(0, 1), "proportion: share of JPEGs", default=0.5),
    smart_bytes=Param(Int(0), "smart: raw up to so many bytes of pixels", default=196_608),
    quality=Param(Int(1, 100), "of the JPEGs", default=90),
    workers=Param(Int(0, 1024), "processes; 0 = one for each core", default=0),
    limit=Param(Int(0), "images a split, evenly over the classes; 0 = all", default=0),
    seed=Param(Int(0), "of the order, of limit, and of drawn images", default=0),
    overwrite=Param(Bool(), "replace files that exist", default=False),
    check_space=Param(Bool(), "refuse when disk or /dev/shm look too small", default=True),
)
# fmt: on

NUMBERED = ("parquet", "webdataset")  # kinds whose labels are numbers without names
NEEDS_NO_PATH = {"synthetic": "", "imagenette": "data/imagenette"}  # kind -> default path
IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}


def read_settings(argv: list[str] | None = None) -> SimpleNamespace:
    """Settings from the command line; every problem is told at once, with exit status 2."""
    return read_config(
        SETTINGS,
        argv,
        check=find_problems,
        prog="write_dataset.py",
        description="Turn ImageNet, however it is kept, into train.beton and val.beton.",
    )


def find_problems(cfg: SimpleNamespace) -> list[str]:
    """What stands in the way of valid settings: a missing source, targets that cannot be."""
    problems = []
    path = source_path(cfg)
    if path is None:
        problems.append(
            "no ImageNet given: set the environment variable IMAGENET_DIR or --source.path to the"
            " folder that holds it, or draw images with --source.kind=synthetic"
        )
    elif cfg.source.kind not in NEEDS_NO_PATH and not path.is_dir():
        problems.append(f"the source folder {path} does not exist: give one with --source.path")
    if cfg.source.classes and cfg.source.kind not in NUMBERED:
        problems.append(
            f"--source.classes={cfg.source.classes} orders the classes of {' and '.join(NUMBERED)},"
            f" and those of {cfg.source.kind} are sorted by name: leave it out"
        )
    if cfg.source.shard >= cfg.source.shards:
        problems.append(
            f"--source.shard={cfg.source.shard} must be below --source.shards={cfg.source.shards}:"
            " parts are counted from 0"
        )
    return problems + find_folder_problems(cfg)


def find_folder_problems(cfg: SimpleNamespace) -> list[str]:
    """Why the files cannot be written into --write.folder."""
    folder = Path(os.path.abspath(cfg.write.folder))
    while not os.path.lexists(folder):  # write_beton makes what is missing
        folder = folder.parent
    if not os.path.isdir(folder):
        return [f"{folder} is no folder, so --write.folder={cfg.write.folder} cannot be used"]
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"{folder} cannot be written ({error.strerror or error})"
        return [f"{what}: choose another --write.folder"]
    targets = target_files(cfg).values()
    existing = [target for target in targets if os.path.lexists(target) and not target.is_dir()]
    problems = []
    if existing and not cfg.write.overwrite and cfg.source.shards == 1:
        names = " and ".join(map(str, existing))
        problems.append(f"{names} exist: choose --write.folder or allow --write.overwrite=true")
    found = [find_output_problem(target, overwrite=True) for target in targets]
    return problems + [problem for problem in found if problem]


def source_path(cfg: SimpleNamespace) -> Path | None:
    """Folder of the source; None when it is needed and not given."""
    if cfg.source.path:
        return Path(cfg.source.path)
    if cfg.source.kind in NEEDS_NO_PATH:
        return Path(NEEDS_NO_PATH[cfg.source.kind])
    return Path(os.environ["IMAGENET_DIR"]) if os.environ.get("IMAGENET_DIR") else None


def target_files(cfg: SimpleNamespace) -> dict[str, Path]:
    """The file to write for each chosen split."""
    splits = SPLITS if cfg.source.split == "all" else (cfg.source.split,)
    number, count = cfg.source.shard, cfg.source.shards
    part = f".part-{number:04}-of-{count:04}" if count > 1 else ""
    return {split: Path(cfg.write.folder) / f"{split}{part}.beton" for split in splits}


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Convert                                                                                        │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def open_sources(cfg: SimpleNamespace) -> dict:
    """A Source for each chosen split, both with the class list of train.

    Raises:
        SourceError: the data does not look as its kind says.
    """
    from fast_imagenet.sources import hold_out, use_classes

    splits = list(target_files(cfg))
    if cfg.source.holdout:
        train, val = hold_out(open_split(cfg, "train"), cfg.source.holdout, cfg.write.seed)
        return {split: {"train": train, "val": val}[split] for split in splits}
    sources = {split: open_split(cfg, split) for split in splits}
    if len(sources) == 2:
        use_classes(sources["val"], sources["train"])
    return sources


def open_split(cfg: SimpleNamespace, split: str):
    """All images of a split: a Source.

    Raises:
        SourceError: the data does not look as its kind says.
    """
    from fast_imagenet.sources import open_source

    sizes = {"train": cfg.source.synthetic_train, "val": cfg.source.synthetic_val}
    return open_source(
        cfg.source.kind,
        source_path(cfg),
        split,
        seed=cfg.write.seed,
        classes=cfg.source.classes,
        download=cfg.source.imagenette_size,
        size=sizes[split],
        # of many parts the first checks for all
        md5="devkit" if cfg.source.shard and cfg.source.md5 == "all" else cfg.source.md5,
    )


def encode_settings(cfg: SimpleNamespace):
    """How images are stored, as write_beton takes it."""
    from fast_imagenet.beton.encode import EncodeSettings

    write = cfg.write
    return EncodeSettings(
        mode=write.mode,
        jpeg_share=write.jpeg_share,
        smart_bytes=write.smart_bytes,
        quality=write.quality,
        max_side=write.max_side,
        seed=write.seed,
        skip_bad=cfg.source.on_error == "skip",
    )


def convert(cfg: SimpleNamespace, split: str, source, path: Path, later: int = 0) -> None:
    """Write one split behind a progress bar and print its summary; a complete part is kept.

    Args:
        later: images that go to the same folder after it.
    """
    from tqdm import tqdm

    from fast_imagenet.beton.writer import is_written, shard_of, write_beton

    write, settings = cfg.write, encode_settings(cfg)
    shard = number, shards = cfg.source.shard, cfg.source.shards
    if (
        shards > 1
        and not write.overwrite
        and is_written(path, source, settings, write.limit, shard)
    ):
        print(f"{path}: complete, kept", flush=True)
        return
    total = len(shard_of(range(images_of(cfg, source)), number, shards))
    often = 0.1 if sys.stderr.isatty() else 10  # a log file gets a line every 10 s
    with tqdm(total=total, desc=path.name, unit=" images", mininterval=often) as bar:
        written = 0

        def progress(samples: int, size: int) -> None:
            nonlocal written
            written += size
            bar.set_postfix_str(f"{written / 1e6:,.0f} MB", refresh=False)
            bar.update(samples)

        summary = write_beton(
            path,
            source,
            settings,
            limit=write.limit,
            workers=write.workers or len(os.sched_getaffinity(0)),
            overwrite=write.overwrite or shards > 1,  # without its summary a part is not complete
            progress=progress,
            shard=shard,
            check_space=write.check_space,
            later=later // shards,
            report=bar.write,
        )
    is_part = write.limit > 0 or shards > 1 or cfg.source.holdout > 0
    print("\n".join(map(readable, report(split, path, summary, is_part))), flush=True)


def images_of(cfg: SimpleNamespace, source) -> int:
    """Images of a split that all its parts together will hold."""
    return min(cfg.write.limit or len(source), len(source))


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Summary                                                                                        │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def report(split: str, path: Path, summary: dict, is_part: bool) -> list[str]:
    """Lines for the screen from the summary of one file."""
    megabytes, counts = summary["file_bytes"] / 1e6, summary["counts"]
    modes = ", ".join(f"{count:,} {mode}" for mode, count in summary["modes"].items())
    size = f"{summary['max_width']} x {summary['max_height']} px"
    odd = [f"{found['count']:,} {kind}" for kind, found in summary["odd"].items()]
    lines = [
        f"{path}: {summary['num_samples']:,} images of {summary['num_classes']:,} classes,"
        f" {megabytes:,.1f} MB in {summary['seconds']:.1f} s"
        f" ({summary['images_per_second']:,.0f} images/s)",
        f"  stored   {modes}; at most {size}; images {summary['image_bytes'] / 1e6:,.1f} MB",
        f"  classes  {min(counts):,} to {max(counts):,} images each{class_counts(summary)}",
        f"  odd      {', '.join(odd) or 'none'}",
        f"  skipped  {len(summary['skipped']):,}",
    ]
    lines += [f"    {skip['file']}: {skip['reason']}" for skip in summary["skipped"][:20]]
    expected = IMAGENET_COUNTS[split]
    if summary["num_classes"] == 1000 and not is_part and summary["num_samples"] != expected:
        lines.append(f"  note     all of ImageNet-1k has {expected:,} images in {split}")
    empty = [wnid for wnid, count in zip(summary["classes"], counts, strict=True) if not count]
    if empty:
        lines.append(
            f"  note     classes without images here: {len(empty):,}, {', '.join(empty[:5])}"
        )
    lines += [f"  note     {note}" for note in summary["notes"]]
    return [*lines, f"  more     {path}.json"]


def class_counts(summary: dict) -> str:
    """Counts by class, where they fit on the screen."""
    if len(summary["classes"]) > 20:
        return ""
    pairs = zip(summary["classes"], summary["counts"], strict=True)
    return ": " + ", ".join(f"{wnid} {count:,}" for wnid, count in pairs)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Main                                                                                           │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def main(argv: list[str] | None = None) -> int:
    """Convert as `argv` says; returns the exit status."""
    cfg = read_settings(argv)
    for number in (signal.SIGTERM, *HANG_UP):
        signal.signal(number, interrupt)
    from fast_imagenet.beton.encode import ConversionError
    from fast_imagenet.sources import SourceError

    try:
        sources = open_sources(cfg)
        later = sum(images_of(cfg, source) for source in sources.values())
        for split, path in target_files(cfg).items():
            later -= images_of(cfg, sources[split])
            convert(cfg, split, sources[split], path, later)
    except SourceError as error:
        return fail(str(error), 2)
    except (ConversionError, OSError) as error:
        return fail(format_error(error), 1)
    except KeyboardInterrupt:
        return fail("interrupted: the unfinished file was removed", 130)
    return 0


def interrupt(*_) -> None:
    """A signal ends the command as Ctrl-C does, so that the unfinished file is removed."""
    raise KeyboardInterrupt


def fail(message: str, status: int) -> int:
    """Print why the command ends and return its exit status."""
    print(readable(f"write_dataset.py: {message}"), file=sys.stderr)
    return status


if __name__ == "__main__":
    ignore_broken_pipe()
    sys.exit(main())
