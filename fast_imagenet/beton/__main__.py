"""Look at, check and join data files.

python -m fast_imagenet.beton info FILE...         what it holds, its settings and checksums
python -m fast_imagenet.beton verify FILE...       structure, header and tables: under a second
python -m fast_imagenet.beton verify FILE --full   every byte, at the speed of the disk
python -m fast_imagenet.beton merge OUT PART...    parts of one conversion into one file

With --json, info and verify print one JSON object per file.

Exit status: 0 all is well, 1 a file is refused, 2 wrong arguments.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from fast_imagenet.beton.reader import BetonError, BetonFile
from fast_imagenet.beton.verify import verify
from fast_imagenet.config import format_error
from fast_imagenet.terminal import announce, ignore_broken_pipe, readable


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fast_imagenet.beton", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="info|verify|merge")
    for name, what in (("info", "what data files hold"), ("verify", "check data files")):
        one = commands.add_parser(name, help=what)
        one.add_argument("files", nargs="+", metavar="FILE")
        one.add_argument("--json", action="store_true", help="one JSON object per file")
    one.add_argument("--full", action="store_true", help="read and check every byte")
    two = commands.add_parser("merge", help="join the parts of one conversion")
    two.add_argument("out", metavar="OUT", help="the new file; never replaced")
    two.add_argument("parts", nargs="+", metavar="PART", help="all parts, in any order")
    args = parser.parse_args(argv)
    if args.command == "merge":
        return _merge(args.out, args.parts)
    if args.command == "info":
        return max(_info(path, args.json) for path in args.files)
    return max(_verify(path, args.full, args.json) for path in args.files)


def _info(path: str, as_json: bool) -> int:
    from fast_imagenet.beton.summary import describe, info

    try:
        found = info(BetonFile(path))
    except (BetonError, OSError) as error:
        print(readable(format_error(error)), file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(found))
        return 0
    found.pop("seconds", None)  # of the conversion
    kind = found.get("source", {}).get("kind", "not known")
    settings = ", ".join(f"{key}={value}" for key, value in found["settings"].items())
    lines = describe(Path(path), found)
    lines += [f"  source   {kind}; {settings or 'settings not known'}"]
    lines += [
        f"  checks   checksums of {found['checksums']}; pages of {found['page_size']:,} bytes"
    ]
    print("\n".join(map(readable, lines)))
    return 0


def _verify(path: str, full: bool, as_json: bool) -> int:
    if full:
        _announce_reading("checking", [path], times=1)
    findings, notes, checked = verify(path, full)
    if as_json:
        lists = {"findings": findings, "notes": notes, "checked": checked}
        print(json.dumps({"file": path, **lists}))
        return 1 if findings else 0
    for sentence in findings:
        print(readable(sentence), file=sys.stderr)
    for sentence in notes:
        print(readable(f"note: {sentence}"))
    if not findings:
        more = "" if full else " (--full checks the images, too)"
        print(f"{readable(path)}: no fault found in {', '.join(checked)}{more}")
    return 1 if findings else 0


def _announce_reading(what: str, paths: list[str], times: int) -> None:
    """What takes more than 3 s on a disk that reads and writes 0.5 GB/s."""
    gigabytes = times * sum(os.path.getsize(path) for path in paths if os.path.isfile(path)) / 1e9
    if gigabytes > 1.5:
        announce(f"{what}: about {gigabytes / 0.5:.0f} s where the disk has 0.5 GB/s")


def _merge(out: str, parts: list[str]) -> int:
    from fast_imagenet.beton.encode import ConversionError
    from fast_imagenet.beton.merge import merge

    _announce_reading("joining", parts, times=3)  # copied, and read again
    try:
        summary = merge(out, list(map(Path, parts)))
    except (BetonError, ConversionError, OSError) as error:
        print(readable(f"merge: {format_error(error)}"), file=sys.stderr)
        return 1
    images = f"{summary['num_samples']:,} images from {len(parts)} parts"
    size = f"{summary['file_bytes'] / 1e6:,.1f} MB"
    print(f"{readable(out)}: {images}, {size}, every byte checked")
    return 0


if __name__ == "__main__":
    ignore_broken_pipe()
    sys.exit(main())
