"""Tables, plots and pages from the records of runs.

python -m tools.report                    README.md, docs/results.md and docs/results_*.png
python -m tools.report --check            say what of it is not current
python -m tools.report add RUN_FOLDER     a finished run becomes a record, and so a row
python -m tools.report page RUN_FOLDER    one HTML file on a run: curves, settings, mistakes

Exit status: 0 done or all current, 1 not current or refused, 2 wrong arguments.
"""

import argparse
import sys
from pathlib import Path

from fast_imagenet.config import interpreter
from fast_imagenet.files import write_atomically
from fast_imagenet.terminal import ignore_broken_pipe
from tools.report.plots import draw, is_current, plot_data
from tools.report.records import RecordError, read_records
from tools.report.reported import read_reported
from tools.report.tables import Book, render_readme, render_results


def open_book(folder: Path) -> Book:
    """Everything in a folder of records; the tables lie beside it.

    Raises:
        RecordError: it is no such folder, or something in it is wrong.
    """
    if not (folder / "reported.yaml").is_file():
        raise RecordError(f"{folder} holds no reported.yaml: run this in the repository's folder")
    reported = read_reported(folder / "reported.yaml")
    return Book(
        folder.absolute().parent, folder.absolute(), read_records(folder.absolute()), reported
    )


def texts(book: Book) -> dict[str, str]:
    """Path below the root -> content as it should be."""
    readme = book.root / "README.md"
    current = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    return {"README.md": render_readme(current, book), "docs/results.md": render_results(book)}


def stale(book: Book) -> list[str]:
    """Files that do not show what the records say."""
    found = []
    for name, text in texts(book).items():
        path = book.root / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            found.append(name)
    plots = plot_data(book)
    return found + [n for n, series in plots.items() if not is_current(book.root / n, series)]


def build(book: Book) -> list[str]:
    """Write what is not current; its names."""
    names, content, plots = stale(book), texts(book), plot_data(book)
    for name in names:
        if not (name in content or plots[name]):  # nothing to show any more
            (book.root / name).unlink()
            continue
        data = content[name].encode() if name in content else draw(name, plots[name])
        write_atomically(book.root / name, lambda file, data=data: file.write(data))
    return names


def main(argv: list[str] | None = None) -> int:
    """Do as `argv` says; returns the exit status."""
    args = parse(argv)
    try:
        return {None: run_build, "add": run_add, "page": run_page}[args.command](args)
    except (ValueError, OSError) as error:  # RecordError is one: a sentence for the user
        print(f"report: {error}", file=sys.stderr)
        return 1


def run_build(args) -> int:
    """Renew or check."""
    book = open_book(args.folder)
    if not args.check:
        names = build(book)
        print(f"wrote {', '.join(names)}" if names else "all current")
        return 0
    if names := stale(book):
        for name in names:
            print(f"{name} is not what records/ says", file=sys.stderr)
        print(f"run {interpreter()} -m tools.report", file=sys.stderr)
    return 1 if names else 0


def run_add(args) -> int:
    """Copy a run into records/ and show its row."""
    from tools.report.add import add_run, show

    flags = {"label": args.label, "data": args.data, "main": args.main}
    about = {key: value for key, value in flags.items() if value}
    about |= {"unfinished": True} if args.unfinished else {}
    options = dict(name=args.name, group=args.group, config=args.config, about=about)
    place = add_run(args.run, args.folder, **options)
    print(f"{place}: added\n{show(open_book(args.folder), place)}")
    print(f"{interpreter()} -m tools.report writes it into README.md, docs/ and its plots")
    return 0


def run_page(args) -> int:
    """Write the page of a run."""
    from tools.report.page import write_page

    for sentence in write_page(args.run, args.out, args.val, args.weights, args.worst):
        print(sentence)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    folder = dict(type=Path, metavar="FOLDER", help="of the records (records)")
    parser.add_argument("--folder", default=Path("records"), **folder)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when stale")
    commands = parser.add_subparsers(dest="command", metavar="add|page")
    add = commands.add_parser("add", help="make a record of a run")
    add.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a log.jsonl")
    add.add_argument("--folder", default=argparse.SUPPRESS, **folder)
    add.add_argument("--name", help="row: stem of the config (that of logging.folder)")
    add.add_argument("--group", help="folder of the runs that differ in seed only (DATE_MACHINE)")
    add.add_argument("--label", help="what the group is, in a few words")
    add.add_argument("--data", help="data set, where the name is that of no shipped config")
    add.add_argument("--main", action="store_true", help="this group is the one in README.md")
    add.add_argument("--config", help="settings, for a log.jsonl alone: a YAML of a run")
    add.add_argument("--unfinished", action="store_true", help="take a run that was cut short")
    page = commands.add_parser("page", help="one HTML file on a run")
    page.add_argument("run", type=Path, metavar="RUN_FOLDER")
    page.add_argument("--out", type=Path, help="the file (page.html in the folder)")
    page.add_argument("--val", help="validation file, where it is not at the run's own path")
    page.add_argument("--weights", type=Path, help="weights (weights.safetensors of the folder)")
    page.add_argument("--worst", type=int, default=24, help="worst-classified images shown (24)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ignore_broken_pipe()
    sys.exit(main())
