"""Files cut short, with flipped bits, with headers and tables of noise: refused, never a crash."""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Timer

import numpy as np

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.reader import sidecar_path
from fast_imagenet.beton.verify import verify
from tests.torture.common import PATIENCE, ROOT, end, source_flags, start, succeed

SILENCE = 60  # seconds on one file that count as a hang


def damages(count: int, photos: Path | None, pictures: int = 100, seed: int = 0) -> dict:
    """Cut (one in four) or flip a bit of a real file `count` times; how many `verify` refuses."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        path = _write(Path(name), photos, pictures)
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
    structure alone decides, and what it accepts is read by the compiled loader. The files are
    opened in a process that is watched for crashes and silence. `starts` of them go through
    train_imagenet.py itself.
    """
    with tempfile.TemporaryDirectory() as name:
        path = _write(Path(name), photos, 24)
        total = {"files": 0, "refused": 0, "read_by_the_loader": 0, "refused_by_the_decoder": 0}
        crashes, begin, number = [], time.monotonic(), 0
        while number < count:
            command = [sys.executable, "-m", "tests.torture.files", str(path)]
            command += [str(seed), str(number), str(count)]
            seen, why = _watch(command)
            for key in total:
                total[key] += sum(line[key] for line in seen)
            number += len(seen)
            if why:
                crashes.append({"file": number, "why": why})
                number += 1
        seconds = time.monotonic() - begin
        ended = _starts(path, starts, seed + 1)
    return total | {
        "crashes_and_hangs": crashes,
        "seconds": round(seconds, 1),
        "trainer_starts": len(ended),
        "trainer_refused_in_a_sentence": ended.count("refused"),
        "trainer_trained": ended.count("trained"),
        "trainer_crashed": [what for what in ended if what not in ("refused", "trained")],
    }


def _write(folder: Path, photos: Path | None, pictures: int) -> Path:
    flags = [*source_flags(photos), "--source.split=train", f"--write.limit={pictures}"]
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
        lines, timer = [], Timer(SILENCE, process.kill)
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
        _alter(path, whole, generator, blank=number % 2 == 1)
        flags = ["--config=tests/smoke.yaml", "--model.arch=resnet18", "--training.epochs=1"]
        flags += [f"--data.{split}_dataset={path}" for split in ("train", "val")]
        process = start("train_imagenet.py", *flags, f"--logging.folder={folder}")
        try:
            said = end(process)
        except TimeoutError:
            said, process.returncode = "", "hang"
        if process.returncode == 0:
            found.append("trained")
        elif process.returncode in (1, 2) and "Traceback" not in said:
            found.append("refused")
        else:
            found.append(f"{process.returncode}: {said[-300:]}")
    path.write_bytes(whole)
    return found


def _alter(path: Path, whole: bytes, generator: np.random.Generator, blank: bool) -> None:
    """One or two fields of header, metadata or allocation table overwritten with a hard value."""
    data = bytearray(whole)
    samples = int(np.frombuffer(data, fmt.HEADER, 1)["num_samples"][0])
    parts = [(0, fmt.HEADER), (fmt.METADATA_START, fmt.SAMPLE)]
    parts.append((len(data) - samples * fmt.ALLOCATION.itemsize, fmt.ALLOCATION))
    if blank:
        data[fmt.HEADER.itemsize : fmt.METADATA_START] = _without_stamp(data)
    for _ in range(1 + generator.integers(4) // 3):
        start_at, kind = parts[generator.integers(3)]
        row = 0 if kind is fmt.HEADER else int(generator.integers(samples))
        name = kind.names[generator.integers(len(kind.names))]
        field, offset = kind.fields[name][0], kind.fields[name][1]
        place, width = start_at + row * kind.itemsize + offset, field.itemsize
        data[place : place + width] = _hard_value(data[place : place + width], generator)
    path.write_bytes(data)


def _without_stamp(data: bytearray) -> bytes:
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
    from fast_imagenet.loader import EvalLoader, TrainLoader

    whole = path.read_bytes()
    altered = path.with_name(f"fuzzed-{first}.beton")
    for number in range(first, end_at):
        blank = number % 2 == 1
        _alter(altered, whole, np.random.default_rng((seed, number)), blank)
        if not blank:
            shutil.copy(sidecar_path(path), sidecar_path(altered))
        else:
            sidecar_path(altered).unlink(missing_ok=True)
        line = {"files": 1, "refused": 0, "read_by_the_loader": 0, "refused_by_the_decoder": 0}
        try:
            train = TrainLoader(str(altered), global_batch=8, seed=0, num_workers=1)
            line["read_by_the_loader"] = 1
            list(train.epoch(0, 32))
            list(EvalLoader(str(altered), batch_size=8, num_workers=1).batches(32, 0.875))
        except (BetonError, ValueError):
            line["refused_by_the_decoder" if line["read_by_the_loader"] else "refused"] = 1
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    open_fuzzed(Path(sys.argv[1]), *map(int, sys.argv[2:]))
