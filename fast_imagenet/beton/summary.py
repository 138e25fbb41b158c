"""The summary of a data file, `<file>.json`: what it holds, where from, and what was unusual."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.checksums import table_to_text
from fast_imagenet.beton.encode import Chunk, EncodeSettings
from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.sources.base import Source
from fast_imagenet.sources.decode import REPAIRED, SCALED
from fast_imagenet.terminal import plural, readable

MAX_LISTED = 100  # names listed for each kind of unusual file
VERSION = 1
NOTES = {  # kind of unusual file: how a sentence about it begins
    SCALED: "16-bit gray images were scaled to 8 bits (value / 257)",
    REPAIRED: "warning: damaged JPEGs were repaired by libjpeg and stored as it shows them, with"
    " parts that may be gray or shifted",
}


class Totals:
    """What the chunks report besides images.

    Attributes:
        source_bytes: bytes read from the source.
        unusual: kind -> {'count': number of files, 'files': the first MAX_LISTED names}.
        skipped: {'file', 'reason'} of every image left out.
        blocks: crc32 of every block of the data pages, uint32; set at the end.
    """

    def __init__(self) -> None:
        self.source_bytes = 0
        self.unusual: dict[str, dict[str, Any]] = {}
        self.skipped: list[dict[str, str]] = []
        self.blocks = np.zeros(0, np.uint32)

    def add(self, chunk: Chunk) -> None:
        """Add what one chunk reports."""
        self.source_bytes += chunk.source_bytes
        for name, reason in chunk.skipped:
            self.skipped.append({"file": readable(name), "reason": readable(reason)})
        for kind, name in chunk.unusual:
            self.add_unusual(kind, 1, [readable(name)])

    def add_unusual(self, kind: str, count: int, names: Sequence[str]) -> None:
        """Add `count` files of one kind, of which the first have these names."""
        found = self.unusual.setdefault(kind, {"count": 0, "files": []})
        found["count"] += count
        found["files"] += names[: MAX_LISTED - len(found["files"])]


def summarize(
    file: BetonFile, source: Source, settings: EncodeSettings, totals: Totals, seconds: float
) -> dict[str, Any]:
    """The summary of a written file, as it lies in the sidecar.

    Returns:
        sidecar_version, file (its name), format; num_samples, num_classes, classes, class_names
        (list or None), counts (samples per class, in the order of classes); source ({kind,
        read_bytes}); settings (EncodeSettings as a dictionary); file_bytes, image_bytes, page_size;
        modes ({'jpg': n, 'raw': n}); max_height, max_width (pixels); odd (unusual files: {kind:
        {count, files}}); skipped (list of {file, reason}); labels_crc32; blocks_crc32 (see
        checksums.py); seconds, images_per_second.
    """
    return {
        "sidecar_version": VERSION,
        "file": file.path.name,
        "format": f"FFCV {fmt.FORMAT_VERSION}",
        **facts(file),
        "classes": source.classes,
        "class_names": source.class_names,
        "source": {"kind": source.kind, "read_bytes": totals.source_bytes},
        "settings": asdict(settings),
        "odd": dict(sorted(totals.unusual.items())),
        "notes": [*source.notes, *_changed(totals)],
        "skipped": totals.skipped,
        "blocks_crc32": table_to_text(totals.blocks),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(file) / max(seconds, 1e-9), 1),
    }


def facts(file: BetonFile) -> dict[str, Any]:
    """What any file says of itself, summary or not: keys as in `summarize`; classes may be None."""
    modes = np.bincount(file.images["mode"], minlength=len(fmt.MODE_NAMES)).tolist()
    return {
        "num_samples": len(file),
        "num_classes": file.num_classes,
        "classes": file.classes,
        "counts": np.bincount(file.labels, minlength=file.num_classes).tolist(),
        "file_bytes": file.path.stat().st_size,
        "image_bytes": int(file.sizes.sum()),
        "page_size": file.page_size,
        "modes": dict(zip(fmt.MODE_NAMES, modes, strict=True)),
        "max_height": int(file.images["height"].max()),
        "max_width": int(file.images["width"].max()),
        "labels_crc32": file.labels_crc32,
    }


def info(file: BetonFile) -> dict[str, Any]:
    """All that is known of a file: the keys of `summarize`, as far as there are, and `checksums`:
    of pages, of tables, or none."""
    kept = {**facts(file), **file.sidecar}
    kept["checksums"] = "tables" if file.header_json else "none"
    if kept.pop("blocks_crc32", None) and file.block_checksums is not None:
        kept["checksums"] = "pages and tables"
    return {"settings": file.header_json.get("settings", {}), **kept}


def _changed(totals: Totals) -> list[str]:
    """Notes about images whose pixels are not as a user may think."""
    found = {kind: totals.unusual[kind] for kind in NOTES if kind in totals.unusual}
    return [
        f"{NOTES[kind]}: {of['count']:,}, the first is {of['files'][0]}"
        for kind, of in found.items()
    ]


def describe(path: Path, summary: dict[str, Any], expected: int = 0) -> list[str]:
    """Lines for the screen from the summary of one file.

    Args:
        expected: images that it has, if it is all of a split of ImageNet-1k; 0 = it is not.
    """
    counts = summary["counts"]
    classes = summary["classes"] or list(map(str, range(len(counts))))
    images = f"{plural(summary['num_samples'], 'image')} of {plural(len(classes), 'class')}"
    modes = ", ".join(f"{count:,} {mode}" for mode, count in summary["modes"].items())
    size = f"{summary['max_width']} x {summary['max_height']} px"
    unusual = [f"{found['count']:,} {kind}" for kind, found in summary.get("odd", {}).items()]
    skipped = summary.get("skipped", [])
    each = [f"{name} {count:,}" for name, count in zip(classes, counts, strict=True)]
    each_class = f": {', '.join(each)}" if len(each) <= 20 else ""  # where they fit on the screen
    on_disk, rest = path.stat().st_blocks * 512, ""
    if on_disk < summary["file_bytes"]:  # gaps between pages take no room
        rest = f" ({on_disk / 1e6:,.1f} MB on the disk)"
    if "seconds" in summary:
        rest += f" in {summary['seconds']:.1f} s ({summary['images_per_second']:,.0f} images/s)"
    lines = [
        f"{path}: {images}, {summary['file_bytes'] / 1e6:,.1f} MB{rest}",
        f"  stored   {modes}; at most {size}; images {summary['image_bytes'] / 1e6:,.1f} MB",
        f"  classes  {min(counts):,} to {max(counts):,} images each{each_class}",
    ]
    if "odd" in summary:  # else there is no summary that would know
        lines += [f"  unusual  {', '.join(unusual) or 'none'}", f"  skipped  {len(skipped):,}"]
    lines += [f"    {skip['file']}: {skip['reason']}" for skip in skipped[:20]]
    if len(classes) == 1000 and summary["num_samples"] != (expected or summary["num_samples"]):
        lines.append(f"  note     this split of ImageNet-1k has {expected:,} images in all")
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        names = ", ".join(empty[:5])
        lines.append(f"  note     classes without images here: {len(empty):,}, {names}")
    return lines + [f"  note     {note}" for note in summary.get("notes", [])]


def all_skipped(source: Source, indices: np.ndarray, counts: list[int]) -> list[str]:
    """A warning for the notes when every image of a class was left out."""
    wanted = np.bincount(source.labels[indices], minlength=len(counts))
    gone = [source.classes[label] for label in np.flatnonzero((wanted > 0) & (np.equal(counts, 0)))]
    if not gone:
        return []
    listed = ", ".join(gone[:5]) + (", ..." if len(gone) > 5 else "")
    return [f"warning: all images of {plural(len(gone), 'class')} were skipped: {listed}"]


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write `summary` as JSON and sync it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
