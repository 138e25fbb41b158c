"""Files cut short, with flipped bits, with headers and tables of noise: refused, never a crash."""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer

import numpy as np

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.reader import sidecar_path
from fast_imagenet.beton.verify import verify
from tests.torture.common import PATIENCE, ROOT, end, source_flags, start_trainer, succeed

SILENCE = 60  # seconds on one file that count as a hang
SMALL = "--model.arch=timm/test_resnet"
LINE = (
    *("files", "refused", "read_by_the_loader", "refused_by_the_decoder"),
    *("stamped_and_accepted", "refused_after_compiled_code"),  # both must stay 0
)


def damages(count: int, photos: Path | None, images: int = 100, seed: int = 0) -> dict:
    """Cut (one in four) or flip a bit of a real file `count` times; how many `verify` refuses."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        path = _write(Path(name), photos, images)
        whole = path.read_bytes()
        missed = []
        for number in range(count):
            place, bit = draw.randrange(len(whole)), draw.randrange(8)
            if number % 4 == 0:
                with open(path, "r+b") as file:
                    file.truncate(place)
            else:
                _put(path, place, bytes([whole[place] ^ 1 << bit]))
            if not verify(path, full=True)[0]:
                missed.append([number, place, bit])
            _put(path, place, whole[place:] if number % 4 == 0 else whole[place : place + 1])
        assert path.read_bytes() == whole
    return {
        "bytes_of_the_file": len(whole),
        "damages": count,
        "refused": count - len(missed),
        "missed": missed,
    }


def fuzzed_tables(count: int, starts: int, photos: Path | None, seed: int = 0) -> dict:
    """`count` files with altered header, metadata or table, opened as the trainer opens them.

    In every second one the checksums are blanked out, as in a file that FFCV wrote: there the
    structure alone decides, and what it accepts is read by the compiled loader; of the others none
    may be accepted. Two processes open them, watched for crashes and silence. `starts` of them go
    through train_imagenet.py itself.
    """
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        # small images: what is altered are the tables, not they
        path = _write(Path(name), photos, 24, "--write.max_side=96")
        begin, middle = time.monotonic(), count // 2
        spans = [(0, middle), (middle, count)]
        parts = list(pool.map(lambda span: _open_all(path, seed, *span), spans))
        seconds = time.monotonic() - begin
        ended = _starts(path, starts, seed + 1)
    seen = [line for part in parts for line in part[0]]
    return {
        **{key: sum(line[key] for line in seen) for key in LINE},
        "crashes_and_hangs": [crash for part in parts for crash in part[1]],
        "seconds": round(seconds, 1),
        "trainer_starts": len(ended),
        "trainer_refused_in_a_sentence": ended.count("refused"),
        "trainer_trained": ended.count("trained"),
        "trainer_crashed": [what for what in ended if what not in ("refused", "trained")],
    }


def _open_all(path: Path, seed: int, number: int, end_at: int) -> tuple[list[dict], list[dict]]:
    """Lines of the watched process for these numbers, and its crashes; it is started again."""
    lines, crashes = [], []
    while number < end_at:
        command = [sys.executable, "-m", "tests.torture.files", str(path)]
        seen, why = _watch([*command, str(seed), str(number), str(end_at)])
        lines += seen
        number += len(seen)
        if why:
            crashes.append({"file": number, "why": why})
            number += 1
    return lines, crashes


def _write(folder: Path, photos: Path | None, images: int, *more: str) -> Path:
    flags = [*more, *source_flags(photos), "--source.split=train", f"--write.limit={images}"]
    succeed("write_dataset.py", *flags, f"--write.folder={folder}")
    return folder / "train.beton"


def _put(path: Path, place: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(data)


def _watch(command: list[str]) -> tuple[list[dict], str]:
    """The lines of a process, and why it ended before its time: '' when it did not."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        lines, timer = [], Timer(PATIENCE, process.kill)  # imports come first
        timer.start()
        for line in process.stdout:
            timer.cancel()
            timer = Timer(SILENCE, process.kill)
            timer.start()
            lines.append(json.loads(line))
        timer.cancel()
        said = process.stderr.read()
        status = process.wait(PATIENCE)
    return lines, f"status {status}: {said[-500:]}" if status else ""


def _starts(path: Path, count: int, seed: int) -> list[str]:
    """What becomes of train_imagenet.py on `count` fuzzed files."""
    found = []
    folder = path.parent / "run"
    whole, generator = path.read_bytes(), np.random.default_rng(seed)
    for number in range(count):
        edits = _edits(whole, generator, blank=number % 2 == 1)
        _apply(path, edits)
        flags = ["--config=tests/smoke.yaml", SMALL, "--training.epochs=1"]
        flags += [f"--data.{split}_dataset={path}" for split in ("train", "val")]
        process = start_trainer(*flags, f"--logging.folder={folder}", cold=number == 0)
        try:
            said, status = end(process), process.returncode
        except TimeoutError:
            said, status = "", "hang"
        if status == 0:
            found.append("trained")
        elif status in (1, 2) and "Traceback" not in said:
            found.append("refused")
        else:
            found.append(f"{status}: {said[-300:]}")
        _apply(path, _back(whole, edits))
    return found


def _edits(whole: bytes, generator: np.random.Generator, blank: bool) -> list[tuple[int, bytes]]:
    """One or two fields of header, metadata or allocation table overwritten with a hard value.

    Returns: what to write where.
    """
    samples = int(np.frombuffer(whole, fmt.HEADER, 1)["num_samples"][0])
    parts = [(0, fmt.HEADER), (fmt.METADATA_START, fmt.SAMPLE)]
    parts.append((len(whole) - samples * fmt.ALLOCATION.itemsize, fmt.ALLOCATION))
    edits = [(fmt.HEADER.itemsize, _without_stamp(whole))] if blank else []
    for _ in range(1 + generator.integers(4) // 3):
        start_at, kind = parts[generator.integers(3)]
        row = 0 if kind is fmt.HEADER else int(generator.integers(samples))
        name = kind.names[generator.integers(len(kind.names))]
        field, offset = kind.fields[name][0], kind.fields[name][1]
        place, width = start_at + row * kind.itemsize + offset, field.itemsize
        edits.append((place, _hard_value(whole[place : place + width], generator)))
    return edits


def _apply(path: Path, edits: list[tuple[int, bytes]]) -> None:
    for place, data in edits:
        _put(path, place, data)


def _back(whole: bytes, edits: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The edits that take others back."""
    return [(place, whole[place : place + len(data)]) for place, data in edits]


def _changes(whole: bytes, edits: list[tuple[int, bytes]]) -> bool:
    """Whether any byte becomes another one: a step of 0 or a second edit may leave all as it is."""
    altered = {}
    for place, data in edits:
        altered |= {place + number: byte for number, byte in enumerate(data)}
    return any(whole[place] != byte for place, byte in altered.items())


def _without_stamp(data: bytes) -> bytes:
    """Field descriptors with empty arguments: what stock FFCV leaves there."""
    size = fmt.METADATA_START - fmt.HEADER.itemsize
    fields = np.frombuffer(data, fmt.FIELD, 2, fmt.HEADER.itemsize).copy()
    fields["arguments"] = 0
    return fields.tobytes().ljust(size, b"\0")[:size]


def _hard_value(old: bytes, generator: np.random.Generator) -> bytes:
    """Noise, all zeros, all ones, one bit flipped, or a small step up or down."""
    number, width = int.from_bytes(old, "little"), len(old)
    ways = (
        lambda: int.from_bytes(generator.bytes(width), "little"),
        lambda: 0,
        lambda: -1,
        lambda: number ^ 1 << int(generator.integers(8 * width)),
        lambda: number + int(generator.integers(-3, 4)),
        lambda: int(generator.integers(70_000)),
    )
    value = ways[generator.integers(len(ways))]()
    return (value % (1 << 8 * width)).to_bytes(width, "little")


def open_fuzzed(path: Path, seed: int, first: int, end_at: int) -> None:
    """Open fuzzed files as the trainer does, one line of JSON a file; in a process of its own."""
    from fast_imagenet.beton.reader import BetonError
    from fast_imagenet.data import ffcv_loader as loader

    whole, reads = path.read_bytes(), loader.Loader
    altered = path.with_name(f"fuzzed-{first}.beton")
    shutil.copy(path, altered)
    compiled = []  # whether FFCV's loader, which compiles, was reached
    loader.Loader = lambda *args, **options: (compiled.append(1), reads(*args, **options))[1]
    for number in range(first, end_at):
        stamped, line = number % 2 == 0, dict.fromkeys(LINE, 0) | {"files": 1}
        edits = _edits(whole, np.random.default_rng((seed, number)), blank=not stamped)
        _apply(altered, edits)
        if stamped:
            shutil.copy(sidecar_path(path), sidecar_path(altered))
        else:
            sidecar_path(altered).unlink(missing_ok=True)
        compiled.clear()
        try:
            train = loader.TrainLoader(str(altered), global_batch=8, seed=0, num_workers=1)
            line["stamped_and_accepted"] = int(stamped and _changes(whole, edits))
            line["read_by_the_loader"] = 1
            list(train.epoch(0, 32))
            val = loader.EvalLoader(str(altered), batch_size=8, num_workers=1)
            list(val.batches(32, 0.875))
        except (BetonError, ValueError):
            late = line["read_by_the_loader"]
            line["refused_by_the_decoder" if late else "refused"] = 1
            line["refused_after_compiled_code"] = int(bool(compiled) and not late)
        print(json.dumps(line), flush=True)
        _apply(altered, _back(whole, edits))


if __name__ == "__main__":
    open_fuzzed(Path(sys.argv[1]), *map(int, sys.argv[2:]))
