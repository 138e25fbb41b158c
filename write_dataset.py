"""Convert ImageNet, from whatever source, to train.beton and val.beton for train_imagenet.py.

    python write_dataset.py --source.path=/path/to/imagenet       data/train.beton, data/val.beton
    python write_dataset.py --source.kind=synthetic               synthetic images: no data needed
    python write_dataset.py --source.path=FOLDER --source.split=val --source.kind=parquet
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
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

try:
    from fastargs import Config, Param, Section
except ModuleNotFoundError as missing:
    sys.exit(
        f"{missing} for {sys.executable}: `make setup` installs what is needed into .venv; "
        f"then run .venv/bin/python write_dataset.py"
    )

from fast_imagenet.beton.output_lock import find_folder_problem, find_output_problem
from fast_imagenet.config import Bool, Int, Number, OneOf, Str, format_error, read_config
from fast_imagenet.program import FAILED, WRONG_SETTINGS, run_program
from fast_imagenet.sources import (
    KINDS,
    SPLITS,
    Source,
    SourceError,
    hold_out,
    open_source,
    recognize,
    use_classes,
)
from fast_imagenet.sources.image_folder import CLASS_ORDERS
from fast_imagenet.sources.official import MD5_CHOICES
from fast_imagenet.terminal import announce, readable

# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Settings                                                                                       │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘

SETTINGS = Config()

# fmt: off
Section("source", "where the images come from", SETTINGS).params(
    kind=Param(OneOf("auto", *KINDS), "layout; auto: recognized from the files", default="auto"),
    path=Param(Str(), "its folder; empty: $IMAGENET_DIR, the only variable read", default=""),
    split=Param(OneOf(*SPLITS, "all"), "which split to write", default="all"),
    on_error=Param(OneOf("fail", "skip"), "a damaged image: stop, or skip it", default="fail"),
    classes=Param(Str(), "parquet, webdataset: file of class names, one per line", default=""),
    class_order=Param(OneOf(*CLASS_ORDERS), "folders of classes: order of names", default="text"),
    md5=Param(OneOf(*MD5_CHOICES), "ilsvrc_tar: compare md5; all reads 155 GB", default="devkit"),
    imagenette_size=Param(OneOf("full", "320px", "160px"), "which download", default="320px"),
    synthetic_train=Param(Int(1), "number of synthetic images in train", default=4000),
    synthetic_val=Param(Int(1), "number of synthetic images in val", default=1000),
    holdout=Param(Number(0, 0.9), "val: this fraction of train instead; 0 = off", default=0.0),
    shards=Param(Int(1, 9999), "parts to convert one by one and merge later", default=1),
    shard=Param(Int(0, 9998), "which part, from 0; a complete one is kept", default=0),
)
Section("write", "what the files hold", SETTINGS).params(
    folder=Param(Str(empty=False), "gets train.beton and val.beton", default="data"),
    max_side=Param(Int(0, 65_500), "longest side in pixels; 0 = unchanged", default=400),
    mode=Param(OneOf("jpg", "raw", "proportion", "smart"), "how to store images", default="jpg"),
    jpeg_share=Param(Number(0, 1), "proportion: fraction of JPEGs", default=0.5),
    smart_bytes=Param(Int(0), "smart: raw up to this many bytes of pixels", default=196_608),
    quality=Param(Int(1, 100), "of the JPEGs", default=90),
    workers=Param(Int(0, 1024), "processes; 0 = one per core", default=0),
    limit=Param(Int(0), "images per split, evenly over the classes; 0 = all", default=0),
    seed=Param(Int(0), "of the order, of limit, and of synthetic images", default=0),
    overwrite=Param(Bool(), "replace existing files", default=False),
    check_space=Param(Bool(), "refuse when disk or /dev/shm look too small", default=True),
)
# fmt: on

DEFAULT_PATHS = {"synthetic": "", "imagenette": "data/imagenette"}  # kinds that need no path
IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}


def read_settings(argv: list[str] | None = None) -> SimpleNamespace:
    """Settings from the command line; all problems are reported at once, with exit status 2."""
    return read_config(
        SETTINGS,
        argv,
        check=find_problems,
        prog="write_dataset.py",
        description="Convert ImageNet, from whatever source, to train.beton and val.beton.",
    )


def find_problems(cfg: SimpleNamespace) -> list[str]:
    """Why valid settings cannot work together: no source, outputs that cannot be written."""
    problems, path = [], source_path(cfg)
    if path is None:
        problems.append(
            "no ImageNet given: set the environment variable IMAGENET_DIR or --source.path to the"
            " folder that holds it, or use synthetic images with --source.kind=synthetic"
        )
    elif cfg.source.kind not in DEFAULT_PATHS and not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        problems.append(f"the source folder {path} {what}: give one with --source.path")
    if cfg.source.shard >= cfg.source.shards:
        problems.append(
            f"--source.shard={cfg.source.shard} must be below --source.shards={cfg.source.shards}:"
            " parts are counted from 0"
        )
    return problems + find_output_problems(cfg)


def find_output_problems(cfg: SimpleNamespace) -> list[str]:
    """Why the files cannot be written into --write.folder."""
    problems, outputs = [], output_files(cfg).values()
    if problem := find_folder_problem(Path(cfg.write.folder)):
        return [f"{problem}: choose another --write.folder"]
    existing = [path for path in outputs if os.path.lexists(path) and not path.is_dir()]
    if existing and not cfg.write.overwrite and cfg.source.shards == 1:
        names = " and ".join(map(str, existing))
        problems.append(f"would replace {names}: choose --write.folder or --write.overwrite=true")
    found = [find_output_problem(path, overwrite=True) for path in outputs]
    return problems + [problem for problem in found if problem]


def source_path(cfg: SimpleNamespace) -> Path | None:
    """Folder of the source; None when it is needed and not given."""
    if cfg.source.path:
        return Path(cfg.source.path)
    if cfg.source.kind in DEFAULT_PATHS:
        return Path(DEFAULT_PATHS[cfg.source.kind])
    return Path(os.environ["IMAGENET_DIR"]) if os.environ.get("IMAGENET_DIR") else None


def output_files(cfg: SimpleNamespace) -> dict[str, Path]:
    """The file to write for each chosen split."""
    splits = SPLITS if cfg.source.split == "all" else (cfg.source.split,)
    number, count = cfg.source.shard, cfg.source.shards
    part = f".part-{number:04}-of-{count:04}" if count > 1 else ""
    return {split: Path(cfg.write.folder) / f"{split}{part}.beton" for split in splits}


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Convert                                                                                        │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def open_sources(cfg: SimpleNamespace) -> dict[str, Source]:
    """A Source for each chosen split, both with the class list of train."""
    splits = list(output_files(cfg))
    if cfg.source.holdout:
        train, val = hold_out(open_split(cfg, "train"), cfg.source.holdout, cfg.write.seed)
        return {split: {"train": train, "val": val}[split] for split in splits}
    sources = {split: open_split(cfg, split) for split in splits}
    if len(sources) == 2:
        use_classes(sources["val"], sources["train"])
    return sources


def open_split(cfg: SimpleNamespace, split: str) -> Source:
    """All images of a split; a SourceError where the data does not look as its kind says."""
    sizes = {"train": cfg.source.synthetic_train, "val": cfg.source.synthetic_val}
    return open_source(
        cfg.source.kind,
        source_path(cfg) or "",
        split,
        seed=cfg.write.seed,
        classes=cfg.source.classes,
        class_order=cfg.source.class_order,
        download=cfg.source.imagenette_size,
        size=sizes[split],
        # of many parts the first checks for all
        md5="devkit" if cfg.source.shard and cfg.source.md5 == "all" else cfg.source.md5,
    )


def storage(cfg: SimpleNamespace) -> dict[str, Any]:
    """How images are stored: the arguments of EncodeSettings."""
    keys = ("mode", "jpeg_share", "smart_bytes", "quality", "max_side", "seed")
    chosen = {key: getattr(cfg.write, key) for key in keys}
    return chosen | {"skip_bad": cfg.source.on_error == "skip"}


def convert(cfg: SimpleNamespace, split: str, source: Source, path: Path, later: int = 0) -> None:
    """Write one split and print its summary; `later` images follow in the same folder."""
    from tqdm import tqdm

    from fast_imagenet.beton.summary import describe
    from fast_imagenet.beton.writer import EncodeSettings, is_written, shard_slice, write_beton

    write, settings = cfg.write, EncodeSettings(**storage(cfg))
    shard = number, shards = cfg.source.shard, cfg.source.shards
    keep = shards > 1 and not write.overwrite
    if keep and is_written(path, source, settings, write.limit, shard):
        print(f"{path}: complete, kept", flush=True)
        return
    images = range(images_of(cfg, source))
    total = len(images[shard_slice(len(images), number, shards)])
    interval = 0.1 if sys.stderr.isatty() else 10  # a log file gets a line every 10 s
    with tqdm(total=total, desc=path.name, unit=" images", mininterval=interval) as bar:

        def progress(samples: int, written: int) -> None:
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
    is_all = not (write.limit or cfg.source.holdout) and shards == 1
    lines = describe(path, summary, IMAGENET_COUNTS[split] if is_all else 0)
    print("\n".join(map(readable, [*lines, f"  more     {path}.json"])), flush=True)


def images_of(cfg: SimpleNamespace, source: Source) -> int:
    """Images of a split that all its parts together will hold."""
    return min(cfg.write.limit or len(source), len(source))


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Main                                                                                           │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def main(argv: list[str] | None = None) -> int:
    """Convert with the settings in `argv`; returns the exit status."""
    cfg = read_settings(argv)
    from fast_imagenet.beton.encode import ConversionError

    try:
        if cfg.source.kind == "auto":
            cfg.source.kind, why = recognize(source_path(cfg) or Path())
            print(readable(f"source.kind=auto: {cfg.source.kind}, as it holds {why}"), flush=True)
        if cfg.source.kind != "synthetic":
            announce("listing the images: about 10 s per million, longer on a slow disk")
        sources = open_sources(cfg)
        later = sum(images_of(cfg, source) for source in sources.values())
        for split, path in output_files(cfg).items():
            later -= images_of(cfg, sources[split])
            convert(cfg, split, sources[split], path, later)
    except SourceError as error:
        return fail(str(error), WRONG_SETTINGS)
    except (ConversionError, OSError) as error:
        return fail(format_error(error), FAILED)
    return 0


def fail(message: str, status: int) -> int:
    """Print why the command ends and return its exit status."""
    print(readable(f"write_dataset.py: {message}"), file=sys.stderr)
    return status


if __name__ == "__main__":
    ended = "interrupted: the unfinished file was removed"
    run_program("write_dataset.py", main, interrupted=ended)
