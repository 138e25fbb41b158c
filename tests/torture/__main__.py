"""Kill, cut, flip and fill, and count what held: `make torture`, or python -m tests.torture.

Every number that the project promises about faults comes from here. All parts take less than 20
minutes on two cores. The result goes to records/torture/<date>.json; exit status 1 when a promise
was broken. FAST_IMAGENET_PHOTOS=folder with imagenette/ lets it work on photographs; without it
they are synthetic.
"""

import argparse
import atexit
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import describe_machine
from tests.fuzz import PROMISES
from tests.torture import files, images, ranks, training, writer
from tests.torture.common import ROOT, kill_what_runs


def _went_on(result: dict) -> bool:
    """Whether a run of two nodes survived the loss of one."""
    return (
        result.get("others_ended_after_seconds") is not None
        and result["others_ended_after_seconds"] < 60
        and result["status"] == [0, 0]
        and result["epochs"][0] == result["epochs"][1]
        and result["losses"][0] == result["losses"][1]
    )


# part -> (function of (share of the full numbers, photos), the promise about its result)
PARTS = {
    "writer_kills": (
        lambda share, photos: writer.writer_kills(round(30 * share), photos),
        lambda r: not any(
            r[key]
            for key in ("damaged_files_under_the_final_name", "leaked_processes",
                        "leaked_segments", "leftovers_after_the_next_run")
        ),
    ),
    "worker_faults": (
        lambda share, photos: writer.worker_faults(),
        lambda r: r["ended_within_10_s_and_left_nothing"] == r["tried"] > 0,
    ),
    "damages": (
        lambda share, photos: files.damages(round(1000 * share), photos),
        lambda r: r["refused"] == r["damages"],
    ),
    "fuzzed_tables": (
        lambda share, photos: files.fuzzed_tables(round(10_000 * share), round(10 * share), photos),
        lambda r: not any(
            r[key]
            for key in ("crashes_and_hangs", "trainer_crashed", "stamped_and_accepted",
                        "refused_after_compiled_code")
        ),
    ),
    "damaged_images": (
        lambda share, photos: images.damaged(round(100_000 * share)),
        lambda r: r["files"] and not any(r[promise] for promise in PROMISES) and not r["crashes"],
    ),
    "training_kills": (
        lambda share, photos: training.training_kills(round(20 * share), photos),
        lambda r: r["ended_bit_identical"] == r["moments"],
    ),
    "training_signals": (
        lambda share, photos: training.training_signals(round(10 * share), photos),
        lambda r: r["ended_within_25_s"] == r["ended_bit_identical_after_resume"] == r["moments"],
    ),
    "lost_rank": (
        lambda share, photos: ranks.lost_rank(),
        lambda r: r["trained_before"] and r["all_ended"] and r["seconds"] < 60 and r["status"] != 0,
    ),
    "lost_node": (lambda share, photos: ranks.lost_node(1), _went_on),
    "lost_host": (lambda share, photos: ranks.lost_node(0), _went_on),  # of the rendezvous
    "loader_errors": (
        lambda share, photos: training.loader_errors(max(1, round(10 * share))),
        lambda r: r["surfaced_within_2_s"] == r["with_its_traceback"] == r["times"],
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the parts one after the other; 0 when every promise held."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--share", type=float, default=1.0, help="of the full numbers (1.0)")
    parser.add_argument("--json", help="where the result goes (records/torture/<date>.json)")
    args = parser.parse_args(argv)
    photos = os.environ.get("FAST_IMAGENET_PHOTOS")
    photos = Path(photos) if photos and Path(photos).is_dir() else None
    usable = sorted(os.sched_getaffinity(0))
    result = {
        "machine": describe_machine(usable),
        "images": "photographs of Imagenette" if photos else "synthetic",
        "share_of_the_full_numbers": args.share,
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    atexit.register(kill_what_runs)
    sys.warnoptions.append("ignore:resource_tracker")  # of locks that killed trainers have left
    path = Path(args.json or ROOT / f"records/torture/{time.strftime('%Y-%m-%d')}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        result[name] = _run(name, args.share, photos)
        path.write_text(without_paths(json.dumps(result, indent=1)) + "\n")  # part by part
    held = [result[name]["held"] for name in args.only]
    print(f"{sum(held)} of {len(held)} promises held; {path}")
    return 0 if all(held) else 1


def without_paths(text: str) -> str:
    """The text without this machine's folders: a record speaks of no machine's paths."""
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/tmp\w+/", "", text)
    return text.replace(f"{ROOT}/", "")


def _run(name: str, share: float, photos: Path | None) -> dict:
    function, promise = PARTS[name]
    begin = time.monotonic()
    found = function(share, photos)
    part = {"held": bool(promise(found)), "took_seconds": round(time.monotonic() - begin, 1)}
    shown = {key: value for key, value in found.items() if not isinstance(value, (dict, list))}
    print(f"{name}: {'held' if part['held'] else 'BROKEN'} in {part['took_seconds']} s", flush=True)
    print("".join(f"    {key} {value}\n" for key, value in shown.items()), end="", flush=True)
    return part | found


if __name__ == "__main__":
    sys.exit(main())
