"""Write docs/performance.md and the table in README.md from the committed result files.

    python benchmarks/table.py

The newest folder of benchmarks/results/ is shown, and the newest GPU result. Nothing is measured
here; tests/test_benchmarks.py fails when the tables are older than the results.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- performance: written by benchmarks/table.py -->", "<!-- end of performance -->"
WHO = {"ours": "ours", "ffcv": "FFCV", "pillow": "Pillow", "torchvision": "torchvision"}
Lines = list[str]


class Target(NamedTuple):
    """One row of the table of targets; the last three have defaults of a ratio of rates."""

    what: str
    file: str  # stem of the result file
    key: str  # of the number that is held against the target
    rates: tuple[str, ...]  # (ours, peer) in "rates", where the key is their ratio
    hold: float  # to be reached: at least, or at most
    aim: float | None = None
    at_least: bool = True
    unit: str = "images/s"  # of the rates


LOADER = "loader_1_core"
TARGETS = [
    Target("crop, flip, 160 px, against stock FFCV", LOADER, "plain_160_vs_ffcv",
           ("ours_plain_160", "ffcv_plain_160"), 2.5, 3.0),
    Target("crop, flip, 224 px, against stock FFCV", LOADER, "plain_224_vs_ffcv",
           ("ours_plain_224", "ffcv_plain_224"), 2.2, 2.6),
    Target("strong augmentation, 160 px, against torchvision", LOADER, "strong_160_vs_torchvision",
           ("ours_strong_160", "torchvision_strong_160"), 6.0, 8.0),
    Target("strong augmentation, 160 px, against stock FFCV's crop and flip", LOADER,
           "strong_160_vs_ffcv_plain", ("ours_strong_160", "ffcv_plain_160"), 1.5),
    Target("raw samples, 160 px, against stock FFCV", LOADER, "raw_160_vs_ffcv",
           ("ours_raw_160", "ffcv_raw_160"), 1.5),
    Target("writing, against stock FFCV", "writer", "writer_vs_ffcv", ("ours", "ffcv"), 2.0),
    Target("bytes of the written images, against stock FFCV", "writer", "writer_bytes_vs_ffcv",
           (), 1.0, at_least=False),
    Target("memory of the decoder, 500 px, batch 1024, against stock FFCV", "decoder_memory",
           "scratch_vs_ffcv", (), 0.05, at_least=False),
    Target("seconds to the first batch, not the first process", "startup", "ours_compile_seconds",
           (), 3.0, at_least=False, unit="s"),
    Target("one training step, against ffcv-imagenet's", "train_step", "step_vs_ffcv_imagenet",
           ("ours_fixed", "ffcv_imagenet_fixed"), 1.25),
    Target("training from the loader, against a fixed batch", "train_step", "loader_fed_vs_fixed",
           ("ours_loader", "ours_fixed"), 0.97),
]  # fmt: skip


def read_results(folder: Path = RESULTS) -> tuple[Path, dict]:
    """(newest folder of CPU results, file stem -> result); a GPU result may come from another.

    Raises: SystemExit without results, ValueError for those of a smoke run.
    """
    folders = sorted(path.parent for path in folder.glob("*/loader_1_core.json"))
    if not folders:
        raise SystemExit(f"{folder}: no results; run make bench IMAGES=folder")
    files = [*sorted(folder.glob("*/train_step.json"))[-1:], *sorted(folders[-1].glob("*.json"))]
    results = {path.stem: json.loads(path.read_text()) for path in files}
    for name, result in results.items():
        if result["machine"].get("smoke"):
            raise ValueError(f"{name}.json is of a smoke run, whose rates mean nothing; remove it")
    return folders[-1], results


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    digits = 3 if value < 1 else 2 if value < 10 else 1
    return f"{value:.{digits}f}" if value >= 0.001 else f"{value:.5f}"


def markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Lines:
    """A table."""
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def verdict(target: Target, value: float) -> str:
    """The target, and whether it is reached."""
    sign, unit = "at least" if target.at_least else "at most", "s" if target.unit == "s" else "x"
    text = f"{sign} {target.hold:g}{unit}" + (f", aim {target.aim:g}x" if target.aim else "")
    if value != target.hold and (value > target.hold) != target.at_least:
        return f"{text}: **not reached**"
    missed = target.aim is not None and value < target.aim
    return f"{text}: reached{', the aim is not' * missed}"


def target_rows(results: dict) -> Lines:
    """Table of targets in Markdown: those that a result file answers."""
    there = [target for target in TARGETS if target.key in results.get(target.file, {})]
    rows = (target_row(target, results[target.file]) for target in there)
    return markdown(["what", "ours", "peer", "ratio", "target"], rows)


def target_row(target: Target, result: dict) -> Lines:
    """Cells of one row."""
    value, who = result[target.key], ("ours", "ffcv")
    ratio = value
    if target.rates:
        medians = [result["rates"][name]["median"] for name in target.rates]
        cells = [f"{number(median)} {target.unit}" for median in medians]
    elif target.file == "startup":
        cells = [f"{number(result[f'{name}_compile_seconds'])} s" for name in who]
        ratio = value / result["ffcv_compile_seconds"]
    elif target.file == "decoder_memory":
        cells = [f"{number(result['scratch_bytes'][name] / 2**20)} MiB" for name in who]
    else:
        cells = [f"{result['image_bytes'][name] / 2**20:.2f} MiB" for name in who]
    return [target.what, *cells, f"{number(ratio)}x", verdict(target, value)]


def machine_line(result: dict) -> str:
    """One sentence on where and when a result was measured."""
    machine = result["machine"]
    versions = machine["versions"] | {"OpenCV": machine["opencv"], "Python": machine["python"]}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    clock = result.get("data", {}).get("clock")
    timed = f" {'Processor' if clock == 'cpu' else 'Wall'} time." if clock else ""
    return (
        f"{gpu}{machine['processor']}, {machine['cores_used']} of {machine['cores_of_machine']} "
        f"cores, {machine['memory_gib']} GiB; load before {machine['load_before'][0]}; "
        f"{machine['date']}, commit {machine['commit']}; {listed}.{timed}"
    )


def elsewhere_line(results: dict) -> str:
    """What was measured at another commit than the loader, with it and its date; '' for nothing."""
    machines = {name: result["machine"] for name, result in sorted(results.items())}
    others = [
        f"{name}.json at commit {machine['commit']}, {machine['date']}"
        for name, machine in machines.items()
        if machine["commit"] != machines[LOADER]["commit"]
    ]
    return f" Of other commits: {'; '.join(others)}." if others else ""


# ==== Sections of the page: title -> lines ========================================================


def loader_section(one: dict, several: dict | None) -> Lines:
    """Images per second of every library, on one core and on all."""
    data, more, rows = one["data"], several["rates"] if several else {}, []
    for name in dict.fromkeys([*one["rates"], *more]):
        rate, cells = more.get(name), rate_cells(one["rates"].get(name))
        if several:
            cells += [number(rate["median"]), number(rate["per_core"])] if rate else ["", ""]
        rows.append([name.replace("_", " "), *cells])
    heads = ["pipeline", "one core", "spread"]
    heads += [f"{several['data']['cores']} cores", "per core"] if several else []
    count = data.get("images") or data["pictures"]  # as it was called until 2026-11
    missing = [f"{name} ({reason})" for name, reason in data["left_out"].items()]
    return [
        f"{count} photographs of at most {data['max_side']} px "
        f"({data['mean_pixels']:,} pixels on average), JPEG quality {data['quality']}. *plain*: "
        "crop and flip; *strong*: also RandAugment (2 operations, magnitude 9), ColorJitter "
        "0.4/0.4/0.4, RandomErasing 0.25. Images per second, medians.",
        "",
        *markdown(heads, rows),
        "",
        machine_line(one),
        *(["", f"More cores: {machine_line(several)}"] if several else []),
        *(["", f"Left out: {', '.join(missing)}."] if missing else []),
    ]


def rate_cells(rate: dict | None) -> Lines:
    if not rate:
        return ["", ""]
    return [number(rate["median"]), f"{number(rate['min'])} to {number(rate['max'])}"]


def operation_section(result: dict) -> Lines:
    """Milliseconds of every operation, the fastest in bold."""
    text = "Milliseconds per image on one core, medians; the fastest in bold. The column Pillow is "
    lines = [f"{text}torchvision or timm on PIL images where Pillow has no such function."]
    for size, operations in result["milliseconds"].items():
        rows = []
        for name, times in operations.items():
            best = min(time["median"] for time in times.values())
            rows.append([name, *(milliseconds(times.get(who), best) for who in WHO)])
        lines += ["", *markdown([f"{size} px", *WHO.values()], rows)]
    return [*lines, "", machine_line(result)]


def milliseconds(time: dict | None, best: float) -> str:
    if not time:
        return ""
    return f"**{time['median']:.3f}**" if time["median"] == best else f"{time['median']:.3f}"


def startup_section(result: dict) -> Lines:
    """Seconds to the first batch."""
    seconds = result["seconds_to_first_batch"]
    listed = [f"{name.replace('_', ' ')} {s['median']:.2f} s" for name, s in seconds.items()]
    count = result["data"].get("samples")
    file = f" of a file of {count:,} samples" if count else ""
    text = (
        f"From building a loader{file} to its first batch, without imports, with kernels that an "
    )
    return [f"{text}earlier process has compiled: {', '.join(listed)}.", "", machine_line(result)]


def memory_section(result: dict) -> Lines:
    """Bytes in addition to the batches."""
    data, sizes = result["data"], result["scratch_bytes"].items()
    size = {name: f"{number(count / 2**20)} MiB" for name, count in sizes}
    text = f"In addition to the batches ({size['batches']}), for {data['side']} px images in "
    text += f"batches of {data['batch_size']} on {data['cores']} core{'s' * (data['cores'] != 1)}: "
    return [f"{text}ours {size['ours']}, stock FFCV {size['ffcv']}."]


def writer_section(result: dict) -> Lines:
    """Images per second of both writers, and the size of what they write."""
    rows = []
    for who, rate in result["rates"].items():
        start, size = result["rates_with_start"][who], result["image_bytes"][who]
        rows.append([WHO[who], number(rate["median"]), number(start["median"]), f"{size:,}"])
    table = markdown(["writer", "images/s", "with start-up", "bytes"], rows)
    return [*table, "", machine_line(result)]


def step_section(result: dict) -> Lines:
    """Images per second of whole training steps."""
    rows = ([name.replace("_", " "), *rate_cells(rate)] for name, rate in result["rates"].items())
    return [*markdown(["", "images/s", "spread"], rows), "", machine_line(result)]


SECTIONS = {
    "Operations": ("op_kernels", operation_section),
    "Start-up": ("startup", startup_section),
    "Memory": ("decoder_memory", memory_section),
    "Writing": ("writer", writer_section),
    "Training step": ("train_step", step_section),
}


def render_page(folder: Path, results: dict) -> str:
    """docs/performance.md."""
    text = f"Written by `benchmarks/table.py` from benchmarks/results/{folder.name}; how it is "
    text += "measured, and what differs between the libraries: benchmarks/README.md. On your "
    text += "machine: `make bench IMAGES=folder`."
    lines = ["# Performance", "", text, "", "## Against the targets", "", *target_rows(results)]
    lines += ["", "## Loading", ""]
    lines += loader_section(results[LOADER], results.get("loader_all_cores"))
    for title, (name, section) in SECTIONS.items():
        lines += ["", f"## {title}", "", *section(results[name])] if name in results else []
    return "\n".join(lines) + "\n"


def render_readme(text: str, results: dict) -> str:
    """README.md with its table renewed."""
    head, rest = text.split(BEGIN)
    measured = machine_line(results[LOADER]) + elsewhere_line(results)
    lines = [*target_rows(results), "", measured]
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    folder, results = read_results()
    PAGE.write_text(render_page(folder, results))
    README.write_text(render_readme(README.read_text(), results))
    print(f"wrote {PAGE.relative_to(ROOT)} and the table in README.md from {folder.name}")


if __name__ == "__main__":
    main()
