"""Join the parts that write_dataset.py --source.shards wrote into one ordinary file.

The parts hold consecutive pieces of one order, so that in turn they are the file that a single
conversion would have written, sample by sample. Their pages are copied as they are; only pointers
change.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.checksums import BlockChecksums, write_tables
from fast_imagenet.beton.disk_space import check_exact, fill_holes
from fast_imagenet.beton.encode import ConversionError, EncodeSettings
from fast_imagenet.beton.output_lock import output_file
from fast_imagenet.beton.reader import BetonFile, sidecar_path
from fast_imagenet.beton.summary import NOTES, Totals, summarize, write_summary
from fast_imagenet.beton.verify import PageChecks, verify
from fast_imagenet.terminal import readable

_SAME = ("num_classes", "classes_sha256", "settings", "order_crc32", "block_bytes")


def merge(path: str | Path, parts: Sequence[str | Path]) -> dict[str, Any]:
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
    with output_file(path, overwrite=False, fix="or choose another folder for OUT") as (partial, _):
        check_exact(path, sum(map(_bytes_of, files)))
        totals = _totals(files)
        with open(partial, "wb", buffering=1 << 20) as out:
            totals.blocks = _write(out, files)
            fill_holes(out)
        seconds = sum(file.sidecar["seconds"] for file in files)
        source, settings = _source(files), EncodeSettings(**files[0].header_json["settings"])
        summary = summarize(BetonFile(partial), source, settings, totals, seconds)
        summary["file"] = readable(path.name)
        write_summary(sidecar_path(partial), summary)
        findings = verify(partial, full=True).findings
        if findings:
            raise OSError(f"{findings[0]} (the disk gave back other bytes than were written)")
    return summary


def _bytes_of(file: BetonFile) -> int:
    """Bytes that a part adds to the merged file; what lies before its pages is mostly a hole."""
    return len(file) * fmt.ROW_BYTES + file.data_end - file.first_block * file.block_bytes


def _in_order(files: list[BetonFile]) -> list[BetonFile]:
    """The parts by number: all of one conversion, each once with its summary."""
    first = files[0]
    for file in files:
        if file.block_checksums is None:
            raise ConversionError(
                f"{file.path} has no checksums beside it: copy {sidecar_path(file.path)}, too, or"
                " write the part again with write_dataset.py"
            )
        _check_summary(file)
        _check_same(file, first)
    numbers, count = [file.header_json["shard"][0] for file in files], first.header_json["shard"][1]
    if sorted(numbers) != list(range(count)):
        missing = sorted(set(range(count)) - set(numbers))
        what = f"parts {missing} are missing" if missing else f"there are {len(numbers)} files"
        raise ConversionError(f"a conversion of {count} parts needs each once: {what}")
    return sorted(files, key=lambda file: file.header_json["shard"][0])


def _check_same(file: BetonFile, first: BetonFile) -> None:
    """Refuse a part of another conversion than the first."""
    one, other = file.header_json, first.header_json
    keys = (*_SAME, *({"names_sha256"} & one.keys() & other.keys()))
    different = [key for key in keys if one[key] != other[key]]
    if different or one["shard"][1] != other["shard"][1]:
        what = ", ".join(different) or "number of parts"
        raise ConversionError(
            f"{file.path} and {first.path} are not parts of one conversion ({what} differ):"
            " convert all parts from equal data with equal settings"
        )


def _check_summary(file: BetonFile) -> None:
    """Refuse a part whose summary is incomplete, before anything is written."""
    try:
        _totals([file])
        _source([file])
        good = len(file.sidecar["counts"]) == file.header_json["num_classes"]
        if not good or not math.isfinite(file.sidecar["seconds"]):
            raise ValueError("counts or seconds")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(
            f"{sidecar_path(file.path)} is incomplete ({error}): copy it again, or write the part"
            " again with write_dataset.py"
        ) from error


def _write(out: BinaryIO, files: list[BetonFile]) -> np.ndarray:
    """Write the whole file and sync it to the disk; returns the checksums of its blocks."""
    first = files[0].header_json
    keys = ("written_by", *_SAME, "names_sha256")  # early parts have no names_sha256
    about = {key: first[key] for key in keys if key in first and key != "block_bytes"}
    about["shard"] = [0, 1]
    count, page_size = sum(map(len, files)), max(file.page_size for file in files)
    samples, allocations = np.zeros(count, fmt.SAMPLE), np.zeros(count, fmt.ALLOCATION)
    checksums = BlockChecksums(files[0].block_bytes)
    start = position = fmt.align_up(fmt.METADATA_START + samples.nbytes, checksums.block_bytes)
    done = 0
    for file in files:
        moved, position = _copy_pages(out, position, checksums, file)
        rows = slice(done, done + len(file))
        images = samples["image"][rows]
        images[:] = file.images
        images["data_ptr"] = allocations["ptr"][rows] = file.offsets + moved
        samples["label"][rows], allocations["size"][rows] = file.labels, file.sizes
        done = rows.stop
    allocations["sample_id"] = np.arange(count)
    end = fmt.align_up(position, page_size)
    checksums.add_zeros(end - position)
    write_tables(out, samples, [allocations], (page_size, start, end), checksums, about)
    out.flush()
    os.fsync(out.fileno())
    return checksums.table()


def _copy_pages(
    out: BinaryIO, position: int, checksums: BlockChecksums, file: BetonFile
) -> tuple[int, int]:
    """Append all data pages of `file`, checked, from byte `position` on.

    Data may begin inside a page that has grown: its place in the page is kept. Returns what to add
    to the pointers of `file`, and the first byte after the pages.
    """
    size, page_size = file.block_bytes, file.page_size
    start, checks = file.first_block * size, PageChecks(file)
    inside = start % page_size
    new_start = fmt.align_up(position - inside, page_size) + inside
    checksums.add_zeros(new_start - position)
    out.seek(new_start)
    for block in range(start, file.data_end, size):
        checks.check(np.array([block // page_size]))
        stored = file.data[block : block + size].data
        out.write(stored)
        checksums.add(stored)
    return new_start - start, new_start + file.data_end - start


def _source(files: list[BetonFile]) -> Any:
    """What `summarize` asks of a source, from the parts' summaries."""
    parts = [file.sidecar for file in files]
    notes = dict.fromkeys(note for part in parts for note in part["notes"])
    kept = [note for note in notes if not note.startswith(tuple(NOTES.values()))]  # counted anew
    counts = np.sum([part["counts"] for part in parts], axis=0)
    if any(part["skipped"] for part in parts) and not counts.all():
        kept.append("warning: images were skipped, and some classes have none")
    return SimpleNamespace(
        classes=parts[0]["classes"],
        class_names=parts[0]["class_names"],
        kind=parts[0]["source"]["kind"],
        notes=kept,
    )


def _totals(files: list[BetonFile]) -> Totals:
    totals = Totals()
    for part in (file.sidecar for file in files):
        totals.source_bytes += part["source"]["read_bytes"]
        totals.skipped += [{key: one[key] for key in ("file", "reason")} for one in part["skipped"]]
        for kind, found in part["odd"].items():
            totals.add_unusual(kind, found["count"], found["files"])
    return totals
