"""Join the parts that write_dataset.py --source.shards wrote into one ordinary file.

The parts hold consecutive pieces of one order, so that in turn they are the file that a single
conversion would have written, sample by sample. Their pages are copied as they are; only pointers
change.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.checksums import BlockSums, write_tables
from fast_imagenet.beton.disk_space import check_exact, fill_holes
from fast_imagenet.beton.encode import ConversionError, EncodeSettings
from fast_imagenet.beton.output_lock import check_held, claim, publish
from fast_imagenet.beton.reader import BetonFile, sidecar_path
from fast_imagenet.beton.verify import PageChecks, verify
from fast_imagenet.beton.writer import (
    CLIPPED_NOTE,
    MAX_LISTED,
    Totals,
    partial_file,
    summarise,
    write_summary,
)
from fast_imagenet.terminal import readable

_SAME = ("num_classes", "classes_sha256", "settings", "order_crc32", "block_bytes")


def merge(path: str | Path, parts: list[str | Path]) -> dict:
    """Write one file from all parts of a conversion; every page is checked, before and after.

    Args:
        path: the new file.
        parts: all parts, in any order, each with its summary beside it.

    Returns:
        The summary, as write_beton's; its seconds are the sum of the parts'.

    Raises:
        BetonError: a part is missing or damaged.
        ConversionError: the parts are not those of one conversion.
        FileExistsError: `path` exists.
        OSError: the disk refuses, because it is full or too small for the parts together.
    """
    path = Path(path)
    files = _in_order([BetonFile(part) for part in parts])
    path.parent.mkdir(parents=True, exist_ok=True)
    fix = "or choose another folder for OUT"
    with claim(path, overwrite=False), partial_file(path, fix) as partial:
        check_exact(path, sum(map(_bytes_of, files)))
        with open(partial, "wb", buffering=1 << 20) as out:
            sums = _write(out, files)
            fill_holes(out)
        totals = _totals(files)
        totals.blocks = sums.table()
        seconds = sum(file.sidecar["seconds"] for file in files)
        source, settings = _source(files), EncodeSettings(**files[0].stamp["settings"])
        summary = summarise(BetonFile(partial), source, settings, totals, seconds)
        summary["file"] = readable(path.name)
        write_summary(sidecar_path(partial), summary)
        findings, _ = verify(partial, full=True)
        if findings:
            raise OSError(f"{findings[0]} (the disk gave back other bytes than were written)")
        check_held(path)
        publish(partial, path, overwrite=False)
    return summary


def _bytes_of(file: BetonFile) -> int:
    """Bytes that a part adds to the merged file; what lies before its pages is mostly a hole."""
    rows = len(file) * (fmt.SAMPLE.itemsize + fmt.ALLOCATION.itemsize)
    return rows + file.data_end - file.stamp["first_block"] * file.stamp["block_bytes"]


def _in_order(files: list[BetonFile]) -> list[BetonFile]:
    """The parts by number.

    Raises:
        ConversionError: they are not all parts of one conversion, each once with its summary.
    """
    first = files[0]
    for file in files:
        if file.block_sums is None:
            raise ConversionError(
                f"{file.path} has no checksums beside it: copy {sidecar_path(file.path)}, too, or"
                " write the part again with write_dataset.py"
            )
        _check_summary(file)
        both = (*_SAME, *({"names_sha256"} & set(file.stamp) & set(first.stamp)))
        other = [key for key in both if file.stamp[key] != first.stamp[key]]
        if other or file.stamp["shard"][1] != first.stamp["shard"][1]:
            what = ", ".join(other) or "number of parts"
            raise ConversionError(
                f"{file.path} and {first.path} are not parts of one conversion ({what} differ):"
                " convert all parts from equal data with equal settings"
            )
    files = sorted(files, key=lambda file: file.stamp["shard"][0])
    numbers, count = [file.stamp["shard"][0] for file in files], first.stamp["shard"][1]
    if numbers != list(range(count)):
        missing = sorted(set(range(count)) - set(numbers))
        what = f"parts {missing} are missing" if missing else f"there are {len(numbers)} files"
        raise ConversionError(f"a conversion of {count} parts needs each once: {what}")
    return files


def _check_summary(file: BetonFile) -> None:
    """Read all that is wanted of a part's summary, before anything is written.

    Raises:
        ConversionError: it lacks something.
    """
    try:
        _totals([file])
        _source([file])
        good = len(file.sidecar["counts"]) == file.stamp["num_classes"]
        if not good or not math.isfinite(file.sidecar["seconds"]):
            raise ValueError("counts or seconds")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(
            f"{sidecar_path(file.path)} lacks what a summary has ({error}): copy it again, or write"
            " the part again with write_dataset.py"
        ) from error


# ------------------------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------------------------


@dataclass
class _Target:
    """The growing file: where the next page goes, and the sums so far."""

    out: BinaryIO
    position: int
    sums: BlockSums


def _write(out: BinaryIO, files: list[BetonFile]) -> BlockSums:
    """Write the whole file and sync it to the disk; returns the sums of its pages."""
    keys = ("written_by", *_SAME, "names_sha256", "shard")  # parts of before have no names_sha256
    stamp = {key: files[0].stamp[key] for key in keys if key in files[0].stamp}
    count, page_size = sum(map(len, files)), max(file.page_size for file in files)
    samples, allocations = np.zeros(count, fmt.SAMPLE), np.zeros(count, fmt.ALLOCATION)
    size = stamp.pop("block_bytes")
    start = fmt.align_up(fmt.METADATA_START + samples.nbytes, size)
    target, done = _Target(out, start, BlockSums(size)), 0
    for file in files:
        offsets = file.offsets + _copy_pages(target, file)
        rows = slice(done, done + len(file))
        images = samples["image"][rows]
        images["mode"] = np.equal(file.modes, fmt.MODE_NAMES[fmt.MODE_RAW])
        images["height"], images["width"], images["data_ptr"] = file.heights, file.widths, offsets
        samples["label"][rows] = file.labels
        allocations["ptr"][rows], allocations["size"][rows] = offsets, file.sizes
        done = rows.stop
    allocations["sample_id"] = np.arange(count)
    end = fmt.align_up(target.position, page_size)
    target.sums.add_zeros(end - target.position)
    stamp["shard"] = [0, 1]
    write_tables(out, samples, allocations, (page_size, start, end), target.sums, stamp)
    out.flush()
    os.fsync(out.fileno())
    return target.sums


def _copy_pages(target: _Target, file: BetonFile) -> int:
    """Append all data pages of `file`, checked; returns what to add to its pointers.

    Data may begin inside a page that has grown: its place in the page is kept.
    """
    size, page_size = file.stamp["block_bytes"], file.page_size
    start, checks = file.stamp["first_block"] * size, PageChecks(file)
    inside = start % page_size
    new_start = fmt.align_up(target.position - inside, page_size) + inside
    target.sums.add_zeros(new_start - target.position)
    target.out.seek(new_start)
    for position in range(start, file.data_end, size):
        checks.check(np.array([position // page_size]))
        block = memoryview(file.raw_bytes(position, size))
        target.out.write(block)
        target.sums.add(block)
    target.position = new_start + file.data_end - start
    return new_start - start


# ------------------------------------------------------------------------------------------------
# The summary
# ------------------------------------------------------------------------------------------------


def _source(files: list[BetonFile]) -> SimpleNamespace:
    """What `summarise` asks of a source, from the parts' summaries."""
    sides = [file.sidecar for file in files]
    notes = dict.fromkeys(note for side in sides for note in side["notes"])
    notes = [note for note in notes if not note.startswith(CLIPPED_NOTE)]  # summed up anew
    counts = np.sum([side["counts"] for side in sides], axis=0)
    if any(side["skipped"] for side in sides) and not counts.all():
        notes.append("warning: images were skipped, and some classes have none")
    return SimpleNamespace(
        classes=sides[0]["classes"],
        class_names=sides[0]["class_names"],
        kind=sides[0]["source"]["kind"],
        notes=notes,
    )


def _totals(files: list[BetonFile]) -> Totals:
    totals = Totals()
    for side in (file.sidecar for file in files):
        totals.source_bytes += side["source"]["read_bytes"]
        totals.skipped += [(skip["file"], skip["reason"]) for skip in side["skipped"]]
        for kind, found in side["odd"].items():
            totals.odd_counts[kind] += found["count"]
            names = totals.odd_names.setdefault(kind, [])
            names += found["files"][: MAX_LISTED - len(names)]
    return totals
