"""Tables, plots and pages from the records of runs.

python -m tools.report                    README.md, docs/{results,choosing}.md and their plots
python -m tools.report --check            report which of them are not current
python -m tools.report add RUN_FOLDER     a finished run becomes a record, and so a row
python -m tools.report page RUN_FOLDER    one HTML file on a run: curves, settings, mistakes

Exit status: 0 done or all current, 1 not current or refused, 2 wrong arguments.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fast_imagenet.config import interpreter
from fast_imagenet.files import write_atomically
from fast_imagenet.program import run_program
from fast_imagenet.terminal import announce
from tools.report.add import add_run
from tools.report.plots import draw, is_current, plot_data
from tools.report.records import read_records
from tools.report.tables import (
    Book,
    render_choosing,
    render_readme,
    render_results,
    render_runs,
    renew,
)
from tools.report.yaml_files import RecordError, read_reported


def open_book(folder: Path) -> Book:
    """Everything in a folder of records, with README.md and docs/ beside it, or RecordError."""
    folder = folder.absolute()
    if not (folder / "reported.yaml").is_file():
        raise RecordError(f"{folder} holds no reported.yaml: run this in the repository's folder")
    reported, entries = read_reported(folder / "reported.yaml"), read_records(folder)
    rows = {entry.name: entry for entry in entries if entry.study is None}
    studies = {entry.name: entry for entry in entries if entry.study}
    return Book(folder.parent, folder, rows, studies, reported)


def stale(book: Book) -> dict[str, Callable[[], bytes] | None]:
    """Files that do not show the numbers of the records -> their content; None: to be removed."""
    readme = book.root / "README.md"
    current = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    texts = {"README.md": render_readme(current, book), "docs/results.md": render_results(book)}
    if (guide := book.root / "docs/fine_tuning.md").is_file():
        texts["docs/fine_tuning.md"] = renew(guide.read_text(encoding="utf-8"), book)
    texts |= {"docs/choosing.md": render_choosing(book)} if book.reported.cards else {}
    found: dict[str, Callable[[], bytes] | None] = {}
    for name, text in texts.items():
        path = book.root / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            found[name] = text.encode
    for name, series in plot_data(book).items():
        if not is_current(book.root / name, series):
            found[name] = partial(draw, name, series) if series else None
    return found


def build(book: Book) -> list[str]:
    """Write what is not current; its names."""
    found = stale(book)
    for name, content in found.items():
        if content is None:  # nothing to show any more
            (book.root / name).unlink()
            continue
        data = content()
        write_atomically(book.root / name, lambda file, data=data: file.write(data))
    return list(found)


def run_build(args: argparse.Namespace) -> int:
    """Write or check."""
    book = open_book(args.folder)
    if not args.check:
        names = build(book)
        print(f"wrote {', '.join(names)}" if names else "all current")
        return 0
    names = list(stale(book))
    for name in names:
        print(f"{name} does not match records/", file=sys.stderr)
    if names:
        print(f"run {interpreter()} -m tools.report", file=sys.stderr)
    return 1 if names else 0


def run_add(args: argparse.Namespace) -> int:
    """Copy a run into records/ and show its row."""
    flags = ("label", "data", "main", "unfinished")
    about = {key: getattr(args, key) for key in flags if getattr(args, key)}
    open_book(args.folder)  # a folder that holds no records is refused before anything is written
    place = add_run(args.run, args.folder, name=args.name, group=args.group, about=about)
    book, name = open_book(args.folder), place.parents[1].name
    print(f"{place}: added\n{render_runs(book, (book.rows | book.studies)[name])}")
    print(f"{interpreter()} -m tools.report writes it into README.md, docs/ and its plots")
    return 0


def run_page(args: argparse.Namespace) -> int:
    """Write the page of a run."""
    announce("importing PyTorch: about 5 s")
    from tools.report.page import write_page  # builds networks

    print("\n".join(write_page(args.run, args.out, args.val, args.weights, args.worst)))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.report", None, __doc__, formatter_class=form)
    parser.set_defaults(command=run_build)
    folder: dict[str, Any] = dict(type=Path, metavar="FOLDER", help="of the records (records)")
    parser.add_argument("--folder", default=Path("records"), **folder)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when stale")
    commands = parser.add_subparsers(metavar="add|page")
    add = commands.add_parser("add", help="make a record of a run")
    add.set_defaults(command=run_add)
    add.add_argument("run", type=Path, metavar="RUN_FOLDER")
    add.add_argument("--folder", default=argparse.SUPPRESS, **folder)
    add.add_argument("--name", help="row: stem of the config (that of logging.folder)")
    add.add_argument("--group", help="folder of the runs that differ in seed only (DATE_MACHINE)")
    add.add_argument("--label", help="what the group is, in a few words")
    add.add_argument("--data", help="dataset, where the name is not that of a shipped config")
    add.add_argument("--main", action="store_true", help="this group is the one in README.md")
    add.add_argument("--unfinished", action="store_true", help="take a run that was cut short")
    page = commands.add_parser("page", help="one HTML file on a run")
    page.set_defaults(command=run_page)
    page.add_argument("run", type=Path, metavar="RUN_FOLDER")
    page.add_argument("--out", type=Path, help="the file (page.html in the folder)")
    page.add_argument("--val", help="validation file, where it is not at the run's own path")
    page.add_argument("--weights", type=Path, help="weights (weights.safetensors of the folder)")
    page.add_argument("--worst", type=int, default=24, help="worst-classified images shown (24)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command of `argv`; returns the exit status."""
    args = parse(argv)
    return args.command(args)


if __name__ == "__main__":
    run_program("report", main)
