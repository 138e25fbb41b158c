"""Write docs/performance.md, its chart and two numbers of README.md from the committed results.

    python benchmarks/table.py

The newest folder of benchmarks/results/ is shown, and the newest GPU result. Nothing is measured
here; tests/test_benchmarks.py fails when the tables are older than the results.
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from contestants import PLAIN, RATIOS, RAW, STRONG, TABLE  # noqa: E402
from fast_imagenet.engine.plots import BLUE, GRAY, decorate  # noqa: E402

RESULTS, GPU = ROOT / "benchmarks" / "results", ROOT / "records" / "gpu"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
CHART = PAGE.with_suffix(".png")
BEGIN, END = "<!-- performance: written by benchmarks/table.py -->", "<!-- end of performance -->"
WHO = {"ours": "ours", "ffcv": "FFCV", "pillow": "Pillow", "torchvision": "torchvision"}
STEP_COLUMNS = ("ffcv_imagenet_fixed", "ours_fp16_eager", "ours_bf16_eager", "ours_fixed")
STEP_RATIOS = ("ours_fixed_vs_ffcv_imagenet", "loader_fed_vs_fixed")
CLOCKS = {"wall": "wall time", "cpu": "processor time"}
Lines = list[str]


class Target(NamedTuple):
    """One row of the table of targets; {hardest} stands for the fastest peer."""

    what: str
    file: str  # stem of the result file
    key: str  # of the number that is held against the target; / leads into an object
    hold: float | None = None  # to be reached: at least, or at most
    at_least: bool = True
    unit: str = "images/s"  # of the rates


LOADER, STEP = "loader_1_core", "train_step_resnet50_160"
PLAIN_160, PLAIN_224 = PLAIN
PAIRS = RATIOS | {
    "writer_vs_ffcv": ("ours", "ffcv"),
    "ours_fixed_vs_ffcv_imagenet": ("ours_fixed", "ffcv_imagenet_fixed"),
    "loader_fed_vs_fixed": ("ours_loader", "ours_fixed"),
}
TARGETS = [
    Target("crop, flip, 160 px, against the fastest peer ({hardest})", LOADER,
           "plain_160_vs_hardest"),
    Target("crop, flip, 160 px, against TensorFlow with torchvision's crops", LOADER,
           "plain_160_vs_tensorflow", 2.8),
    Target("crop, flip, 160 px, against stock FFCV", LOADER, "plain_160_vs_ffcv", 5.0),
    Target("the same with AVX2 alone", LOADER, "avx2_160_vs_ffcv", 4.0),
    Target("crop, flip, 224 px, against stock FFCV", LOADER, "plain_224_vs_ffcv", 4.5),
    Target("stock FFCV's file, 160 px, against stock FFCV", LOADER, "stock_file_160_vs_ffcv", 2.0),
    Target("strong augmentation, 160 px, against torchvision on PIL", LOADER,
           "strong_160_vs_torchvision", 8.0),
    Target("strong augmentation, 160 px, against stock FFCV's crop and flip", LOADER,
           "strong_160_vs_ffcv_plain", 1.5),
    Target("raw samples, 160 px, against stock FFCV", LOADER, "raw_160_vs_ffcv", 1.5),
    Target("slowest of 16 threads, 160 px, batch 256, against the mean of all (simulated)",
           "thread_balance", "slowest_vs_mean/plain/16 x 256", 1.07, at_least=False),
    Target("writing, against stock FFCV", "writer", "writer_vs_ffcv", 2.0),
    Target("bytes of the written images, against stock FFCV", "writer", "writer_bytes_vs_ffcv",
           1.0, at_least=False),
    Target("memory of the decoder, 500 px, batch 1024, against stock FFCV", "decoder_memory",
           "scratch_vs_ffcv", 0.05, at_least=False),
    Target("seconds to the first batch, not the first process", "startup", "ours_compile_seconds",
           0.8, at_least=False, unit="s"),
    Target("one training step of ResNet-50, 160 px, against ffcv-imagenet's", STEP,
           "ours_fixed_vs_ffcv_imagenet", 1.25),
    Target("ResNet-50 from the loader, 160 px, against a fixed batch", STEP,
           "loader_fed_vs_fixed", 0.97),
]  # fmt: skip


def read_results(folder: Path = RESULTS, gpu: Path = GPU) -> tuple[Path, dict]:
    """(newest folder of CPU results, file stem -> result); those of a GPU are benchmarks/gpu.py's.

    Raises: SystemExit without results, ValueError for those of a smoke run.
    """
    folders = sorted(path.parent for path in folder.glob("*/loader_1_core.json"))
    if not folders:
        raise SystemExit(f"{folder}: no results; run make bench IMAGES=folder")
    on_gpu = sorted(path.parent for path in gpu.glob("*/parts.json"))[-1:]
    files = [path for place in (*on_gpu, folders[-1]) for path in sorted(place.glob("*.json"))
             if path.name != "parts.json"]  # fmt: skip
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
    if target.hold is None:
        return ""
    sign, unit = "at least" if target.at_least else "at most", "s" if target.unit == "s" else "x"
    missed = value != target.hold and (value > target.hold) != target.at_least
    return f"{sign} {target.hold:g}{unit}: {'**not reached**' if missed else 'reached'}"


def target_rows(results: dict) -> Lines:
    """Table of targets in Markdown: those that a result file answers."""
    there = [target for target in TARGETS if value_of(target, results) is not None]
    rows = (target_row(target, results) for target in there)
    return markdown(["what", "ours", "peer", "ratio", "target"], rows)


def value_of(target: Target, results: dict) -> float | None:
    """The number of a row; None where it was not measured."""
    found: Any = results.get(target.file)
    for key in target.key.split("/"):
        found = (found or {}).get(key)
    return found


def target_row(target: Target, results: dict) -> Lines:
    """Cells of one row."""
    result, value, who = results[target.file], value_of(target, results), ("ours", "ffcv")
    ratio, hardest = value, result.get("hardest") or ""
    if target.key in PAIRS:
        names = [name.format(hardest=hardest) for name in PAIRS[target.key]]
        medians = [result["rates"][name]["median"] for name in names]
        cells = [f"{number(median)} {target.unit}" for median in medians]
    elif target.file == "startup":
        cells = [f"{number(result[f'{name}_compile_seconds'])} s" for name in who]
        ratio = value / result["ffcv_compile_seconds"]
    elif target.file == "thread_balance":
        cells = ["", ""]
    elif target.file == "decoder_memory":
        cells = [f"{number(result['scratch_bytes'][name] / 2**20)} MiB" for name in who]
    else:
        cells = [f"{result['image_bytes'][name] / 2**20:.2f} MiB" for name in who]
    what = target.what.format(hardest=label_of(hardest)[0])
    return [what, *cells, f"{number(ratio)}x", verdict(target, value)]


def machine_line(result: dict) -> str:
    """One sentence on where and when a result was measured."""
    machine = result["machine"]
    versions = machine["versions"] | {"OpenCV": machine["opencv"], "Python": machine["python"]}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    clock = result.get("data", {}).get("clock")
    timed = f" {CLOCKS[clock].capitalize()}." if clock else ""
    return (
        f"{gpu}{machine['processor']}, {machine['cores_used']} of {machine['cores_of_machine']} "
        f"cores, {machine['memory_gib']} GiB; load before {machine['load_before'][0]}; "
        f"{machine['date']}, commit {machine['commit']}; {listed}.{timed}"
    )


# ==== Sections of the page: title -> lines ========================================================


RECIPES = {PLAIN_160: "160 px", PLAIN_224: "224 px", STRONG: "strong 160", RAW: "raw 160"}


def label_of(contestant: str) -> tuple[str, str]:
    """(loader for a reader, recipe) of a contestant."""
    for recipe in RECIPES:
        name = contestant.removesuffix(f"_{recipe}")
        if name in TABLE and name != contestant:
            return TABLE[name].label, recipe
    # as contestants were called until 2026-12
    return contestant.replace("_", " "), STRONG if "strong" in contestant else PLAIN_160


def loader_table(result: dict) -> Lines:
    """A row of rates per loader, the fastest first."""
    clock, rows = result["data"]["clock"], {}
    other = "cpu" if clock == "wall" else "wall"
    for name, rate in result["rates"].items():
        label, recipe = label_of(name)
        rows.setdefault(label, {})[recipe] = rate
    cells = []
    for label, rates in sorted(rows.items(), key=lambda row: -best_rate(row[1])):
        plain = rates.get(PLAIN_160, {})
        by_other = [number(plain[other]["median"]) if other in plain else ""]
        medians = [number(rates[key]["median"]) if key in rates else "" for key in RECIPES]
        cells.append([label, medians[0], rate_cells(plain)[1], *by_other, *medians[1:]])
    first, *rest = RECIPES.values()
    return markdown(["loader", first, "spread", f"{first}, {CLOCKS[other]}", *rest], cells)


def best_rate(rates: dict[str, dict]) -> float:
    return rates.get(PLAIN_160, next(iter(rates.values())))["median"]


def loader_section(one: dict, several: dict | None) -> Lines:
    """Images per second of every loader, on one core and, of ours and stock FFCV's, on all."""
    data = one["data"]
    count = data.get("images") or data["pictures"]  # as it was called until 2026-11
    lines = [
        f"{count} photographs of at most {data['max_side']} px "
        f"({data['mean_pixels']:,} pixels on average), JPEG quality {data['quality']}. Columns in "
        "px: crop and flip; *strong*: also RandAugment (2 operations, magnitude 9), ColorJitter "
        f"0.4/0.4/0.4, RandomErasing 0.25. Images per second of {CLOCKS[data['clock']]}, medians.",
        "",
        f"![Images per second and core, 160 px]({CHART.name})",
        "",
        *loader_table(one),
        "",
        machine_line(one),
    ]
    peers = [f"{name} {version}" for name, version in data.get("peer_versions", {}).items()]
    lines += ["", f"Peers in .venv-bench: {', '.join(peers)}."] if peers else []
    path = data.get("paths", {}).get(f"ours_{PLAIN_160}")
    lines += ["", f"Code path of *ours*: {path}."] if path else []
    if several:
        lines += ["", f"On {several['data']['cores']} cores together:", "", *loader_table(several)]
        lines += ["", machine_line(several)]
    reasons: dict[str, Lines] = {}
    for name, reason in data["left_out"].items():
        reasons.setdefault(reason, []).append(name.replace("_", " "))
    missing = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
    missing += data.get("not_installed", [])
    return [*lines, *(["", f"Left out: {'; '.join(missing)}."] if missing else [])]


def chart_bars(result: dict) -> list[tuple[str, float]]:
    """(loader, images per second) of all, crop and flip at 160 px, the fastest first."""
    named = ((label_of(name), rate["median"]) for name, rate in result["rates"].items())
    bars = [(label, rate) for (label, recipe), rate in named if recipe == PLAIN_160]
    return sorted(bars, key=lambda bar: -bar[1])


def fastest_of_each(bars: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """One bar for each library; ours as it is by default."""
    best: dict[str, tuple[str, float]] = {}
    for label, rate in bars:
        library = re.split(", | on ", label)[0]
        if label == library or library not in best:
            best[library] = (label, rate)
    return sorted(best.values(), key=lambda bar: -bar[1])


def chart_label(result: dict) -> str:
    """What a bar is as long as."""
    return f"images per second of {CLOCKS[result['data']['clock']]}, one core"


def draw_bars(axes: Any, bars: list[tuple[str, float]], label: str) -> None:
    """Rates of loaders, ours dark and in bold."""
    labels, rates = zip(*bars, strict=True)
    ours = [label.startswith("ours") for label in labels]
    shown = axes.barh(range(len(bars)), rates, color=[BLUE if one else GRAY for one in ours])
    decorate(axes, "loading, crop and flip, 160 px", label)
    axes.bar_label(shown, map(number, rates), padding=3)
    axes.set_yticks(range(len(bars)), labels)
    for text, one in zip(axes.get_yticklabels(), ours, strict=True):
        text.set_fontweight("bold" if one else "normal")
    axes.grid(False, axis="y")
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)


def draw_chart(result: dict, path: Path) -> None:
    """Write the bars as PNG; its text `Description` holds them as JSON."""
    from matplotlib.figure import Figure

    bars = chart_bars(result)
    figure = Figure(figsize=(8, 0.28 * len(bars) + 1.2), layout="constrained")
    draw_bars(figure.subplots(), bars, chart_label(result))
    figure.savefig(path, dpi=110, metadata={"Description": json.dumps(bars)})


def rate_cells(rate: dict | None) -> Lines:
    if not rate:
        return ["", ""]
    return [number(rate["median"]), f"{number(rate['min'])} to {number(rate['max'])}"]


def operation_section(result: dict) -> Lines:
    """Milliseconds of every operation, the fastest in bold."""
    lines = ["Milliseconds per image on one core, medians; the fastest in bold."]
    found = [times for size in result["milliseconds"].values() for times in size.values()]
    everyone = [who for who in WHO if any(who in times for times in found)]
    if "pillow" in everyone:  # until 2026-12
        lines[0] += " The column Pillow is torchvision or timm on PIL images where Pillow has no "
        lines[0] += "such function."
    for size, operations in result["milliseconds"].items():
        rows = []
        for name, times in operations.items():
            cells = {who: f"{time['median']:.3f}" for who, time in times.items()}
            best = min(times, key=lambda who: times[who]["median"])
            cells[best] = f"**{cells[best]}**"
            rows.append([name, *(cells.get(who, "") for who in everyone)])
        lines += ["", *markdown([f"{size} px", *map(WHO.get, everyone)], rows)]
    return [*lines, "", machine_line(result)]


def startup_section(result: dict) -> Lines:
    """Seconds to the first batch."""
    seconds, count = result["seconds_to_first_batch"], result["data"].get("samples")
    listed = [f"{name.replace('_', ' ')} {s['median']:.2f} s" for name, s in seconds.items()]
    text = f"From building a loader{f' of a file of {count:,} samples' if count else ''} to its "
    text += "first batch, without imports, with kernels that an earlier process has compiled: "
    return [f"{text}{', '.join(listed)}.", "", machine_line(result)]


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


def gpu_section(results: dict) -> Lines:
    """Training steps, memory and tests on a GPU, as far as there are records."""
    tables = [step_table(results), memory_table(results.get("step_memory"))]
    found = [line for table in tables for line in table]
    if not found:
        return ["Not measured here: `make gpu` measures a machine that has one."]
    if tests := results.get("tests"):
        counts = (f"{tests[one]} {one}" for one in ("passed", "failed", "skipped"))
        found += ["", f"Tests marked gpu: {', '.join(counts)}."]
    return found


def step_table(results: dict) -> Lines:
    """A row for each network and resolution."""
    steps = [result for name, result in results.items() if name.startswith("train_step_")]
    if not steps:
        return []
    steps.sort(key=lambda step: (step["data"]["arch"], step["data"]["side"]))
    heads = ["network", "px", *(name.replace("_", " ") for name in STEP_COLUMNS), "ratio", "fed"]
    rows = []
    for step in steps:
        data, rates = step["data"], step["rates"]
        cells = [number(rates[name]["median"]) for name in STEP_COLUMNS]
        ratios = [f"{step[key]:.2f}x" if key in step else "" for key in STEP_RATIOS]
        rows.append([data["arch"], str(data["side"]), *cells, *ratios])
    size = steps[0]["data"]["batch_size"]
    text = f"Images per second of a step, batch {size}, medians; the peer is ffcv-imagenet's "
    text += "step. *Ratio*: ours fixed (bf16, compiled) / the peer's; *fed*: ours from the "
    text += "loader / on a fixed batch."
    return [text, "", *markdown(heads, rows), "", machine_line(steps[0])]


def memory_table(result: dict | None) -> Lines:
    """A row for each config."""
    if not result:
        return []
    rows = []
    for name, found in sorted(result["configs"].items()):
        held = found.get("held_bytes") or 0
        rows.append([name, "yes" if found["fits"] else "**no**", f"{held / 1e9:.2f}"])
    cap = f"{result['data']['cap_bytes'] / 1e9:g} GB"
    text = f"Largest step and evaluation of a config, with the process limited to {cap}:"
    return ["", text, "", *markdown(["config", "fits", "GB held"], rows)]


SECTIONS = {
    "Operations": ("op_kernels", operation_section),
    "Start-up": ("startup", startup_section),
    "Memory": ("decoder_memory", memory_section),
    "Writing": ("writer", writer_section),
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
    lines += ["", "## Training on a GPU", "", *gpu_section(results)]
    return "\n".join(lines) + "\n"


def render_readme(text: str, results: dict) -> str:
    """README.md with its two numbers on speed renewed."""
    loader, startup = results[LOADER], results["startup"]
    machine, rate = loader["machine"], loader["rates"]["ours_plain_160"]["median"]
    first, stock = (number(startup[f"{who}_compile_seconds"]) for who in ("ours", "ffcv"))
    lines = [
        f"- **{number(rate)} images/s** decoded, cropped to 160 px and flipped on one core "
        f"({machine['processor']}, {machine['date']}): "
        f"{number(loader['plain_160_vs_hardest'])}x the fastest other loader "
        f"({label_of(loader['hardest'])[0]}), {number(loader['plain_160_vs_ffcv'])}x FFCV.",
        f"- **{first} s** from a file of {startup['data']['samples'] / 1e6:g} million samples to "
        f"its first batch (same core; FFCV {stock} s).",
    ]
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}"


def main() -> None:
    folder, results = read_results()
    PAGE.write_text(render_page(folder, results))
    draw_chart(results[LOADER], CHART)
    README.write_text(render_readme(README.read_text(), results))
    print(f"wrote docs/{PAGE.name}, its chart and README.md from {folder.name}")


if __name__ == "__main__":
    main()
