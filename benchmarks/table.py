"""Write docs/performance.md and the table in README.md from the committed result files.

    python benchmarks/table.py

The newest folder of benchmarks/results/ is shown, and the newest GPU result. Nothing is measured
here; tests/test_benchmarks.py fails when the tables are older than the results.
"""

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- performance: written by benchmarks/table.py -->", "<!-- end of performance -->"
WHO = {"ours": "ours", "ffcv": "FFCV", "pillow": "Pillow", "torchvision": "torchvision"}


class Target(NamedTuple):
    """One row of the table of targets."""

    what: str
    file: str  # stem of the result file
    key: str  # of the number that is held against the target
    hold: float  # to be reached: at least (sign 1), at most (sign -1)
    aim: float | None
    sign: int
    rates: tuple  # (ours, peer) in "rates", where the key is their ratio
    unit: str  # of the rates


TARGETS = [
    Target("crop, flip, 160 px, against stock FFCV", "loader_1_core", "plain_160_vs_ffcv",
           2.5, 3.0, 1, ("ours_plain_160", "ffcv_plain_160"), "images/s"),
    Target("crop, flip, 224 px, against stock FFCV", "loader_1_core", "plain_224_vs_ffcv",
           2.2, 2.6, 1, ("ours_plain_224", "ffcv_plain_224"), "images/s"),
    Target("strong augmentation, 160 px, against torchvision", "loader_1_core",
           "strong_160_vs_torchvision", 6.0, 8.0, 1,
           ("ours_strong_160", "torchvision_strong_160"), "images/s"),
    Target("strong augmentation, 160 px, against stock FFCV's crop and flip", "loader_1_core",
           "strong_160_vs_ffcv_plain", 1.5, None, 1,
           ("ours_strong_160", "ffcv_plain_160"), "images/s"),
    Target("raw samples, 160 px, against stock FFCV", "loader_1_core", "raw_160_vs_ffcv",
           1.5, None, 1, ("ours_raw_160", "ffcv_raw_160"), "images/s"),
    Target("writing, against stock FFCV", "writer", "writer_vs_ffcv",
           2.0, None, 1, ("ours", "ffcv"), "images/s"),
    Target("bytes of the written images, against stock FFCV", "writer", "writer_bytes_vs_ffcv",
           1.0, None, -1, (), ""),
    Target("memory of the decoder, 500 px, batch 1024, against stock FFCV", "decoder_memory",
           "scratch_vs_ffcv", 0.05, None, -1, (), ""),
    Target("seconds to the first batch, not the first process", "startup",
           "ours_compile_seconds", 3.0, None, -1, (), "s"),
    Target("one training step, against ffcv-imagenet's", "train_step", "step_vs_ffcv_imagenet",
           1.25, None, 1, ("ours_fixed", "ffcv_imagenet_fixed"), "images/s"),
    Target("training from the loader, against a fixed batch", "train_step", "loader_fed_vs_fixed",
           0.97, None, 1, ("ours_loader", "ours_fixed"), "images/s"),
]  # fmt: skip


# ==== Results =====================================================================================


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


def verdict(target: Target, value: float) -> str:
    """The target, and whether it is reached."""
    sign = "at least" if target.sign > 0 else "at most"
    text = f"{sign} {target.hold:g}{target.unit if target.unit == 's' else 'x'}"
    aim = f", aim {target.aim:g}x" if target.aim else ""
    if target.sign * value < target.sign * target.hold:
        return f"{text}{aim}: **not reached**"
    if target.aim and value < target.aim:
        return f"{text}{aim}: reached, the aim not"
    return f"{text}{aim}: reached"


def target_rows(results: dict) -> list[str]:
    """Table of targets in Markdown: those that a result file answers."""
    lines = ["| what | ours | peer | ratio | target |", "|---|---|---|---|---|"]
    for target in TARGETS:
        result = results.get(target.file, {})
        if target.key not in result:
            continue
        value = result[target.key]
        if target.rates:
            medians = [result["rates"][name]["median"] for name in target.rates]
            cells = [f"{number(median)} {target.unit}" for median in medians]
        elif target.file == "startup":
            cells = [f"{number(result[f'{who}_compile_seconds'])} s" for who in ("ours", "ffcv")]
        elif target.file == "decoder_memory":
            sizes = result["scratch_bytes"]
            cells = [f"{number(sizes[who] / 2**20)} MiB" for who in ("ours", "ffcv")]
        else:
            cells = [f"{result['image_bytes'][who] / 2**20:.2f} MiB" for who in ("ours", "ffcv")]
        ratio = value / result["ffcv_compile_seconds"] if target.file == "startup" else value
        row = [target.what, *cells, f"{number(ratio)}x", verdict(target, value)]
        lines.append(f"| {' | '.join(row)} |")
    return lines


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
    loader = results["loader_1_core"]["machine"]["commit"]
    told = [
        f"{name}.json at commit {result['machine']['commit']}, {result['machine']['date']}"
        for name, result in sorted(results.items())
        if result["machine"]["commit"] != loader
    ]
    return f" Of other commits: {'; '.join(told)}." if told else ""


# ==== Sections of the page ========================================================================


def loader_section(results: dict) -> list[str]:
    """Images per second of every contestant, on one core and on all."""
    one, several = results["loader_1_core"], results.get("loader_all_cores")
    data = one["data"]
    cores = several and several["data"]["cores"]
    heads = ["pipeline", "one core", "spread", *([f"{cores} cores", "a core"] if several else [])]
    lines = [
        "## Loading",
        "",
        f"{data['pictures']} photographs of at most {data['max_side']} px "
        f"({data['mean_pixels']:,} pixels on average), JPEG quality {data['quality']}. *plain*: "
        "crop and flip; *strong*: also RandAugment (2 operations, magnitude 9), ColorJitter "
        "0.4/0.4/0.4, RandomErasing 0.25. Images per second, medians.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    names = dict.fromkeys([*one["rates"], *(several["rates"] if several else [])])
    for name in names:
        cells = [name.replace("_", " "), *rate_cells(one["rates"].get(name))]
        if several:
            rate = several["rates"].get(name)
            cells += [number(rate["median"]), number(rate["per_core"])] if rate else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [f"{name} ({reason})" for name, reason in data["left_out"].items()]
    lines += ["", machine_line(one)]
    if several:
        lines += ["", f"More cores: {machine_line(several)}"]
    return [*lines, "", f"Left out: {', '.join(missing)}.", ""] if missing else [*lines, ""]


def rate_cells(rate: dict | None) -> list[str]:
    if not rate:
        return ["", ""]
    return [number(rate["median"]), f"{number(rate['min'])} to {number(rate['max'])}"]


def operation_section(result: dict) -> list[str]:
    """Milliseconds of every operation, the fastest in bold."""
    lines = [
        "## Operations",
        "",
        "Milliseconds an image on one core, medians; the fastest in bold. The column Pillow is "
        "torchvision or timm on PIL images where Pillow has no such function.",
    ]
    for side, operations in result["milliseconds"].items():
        heads = [f"{side} px", *WHO.values()]
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name, times in operations.items():
            best = min(value["median"] for value in times.values())
            cells = [_milliseconds(times.get(who), best) for who in WHO]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", machine_line(result), ""]


def _milliseconds(value: dict | None, best: float) -> str:
    if not value:
        return ""
    text = f"{value['median']:.3f}"
    return f"**{text}**" if value["median"] == best else text


def other_sections(results: dict) -> list[str]:
    """Start-up and memory, where measured."""
    lines = []
    if startup := results.get("startup"):
        seconds = startup["seconds_to_first_batch"]
        listed = [f"{name.replace('_', ' ')} {s['median']:.2f} s" for name, s in seconds.items()]
        lines += [
            "## Starting up",
            "",
            "From building a loader to its first batch, imports left out, in a process that is not "
            f"the first: {', '.join(listed)}.",
            "",
            machine_line(startup),
            "",
        ]
    if memory := results.get("decoder_memory"):
        sizes = memory["scratch_bytes"].items()
        size, data = {name: f"{number(n / 2**20)} MiB" for name, n in sizes}, memory["data"]
        lines += [
            "## Memory",
            "",
            f"Beside the batches ({size['batches']}), for {data['side']} px images in batches of "
            f"{data['batch_size']} on {data['cores']} core: ours {size['ours']}, stock FFCV "
            f"{size['ffcv']}.",
            "",
        ]
    return lines


def writer_section(writer: dict) -> list[str]:
    """Images per second of both writers, and the size of what they write."""
    lines = ["## Writing", "", "| writer | images/s | with starting up | bytes |"]
    lines.append("|---|---|---|---|")
    for who, rate in writer["rates"].items():
        start = writer["rates_with_start"][who]["median"]
        size = f"{writer['image_bytes'][who]:,}"
        lines.append(f"| {WHO[who]} | {number(rate['median'])} | {number(start)} | {size} |")
    return [*lines, "", machine_line(writer), ""]


def step_section(step: dict) -> list[str]:
    """Images per second of whole training steps."""
    lines = ["## Training step", "", "| | images/s | spread |", "|---|---|---|"]
    for name, rate in step["rates"].items():
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(rate_cells(rate))} |")
    return [*lines, "", machine_line(step), ""]


def render_page(folder: Path, results: dict) -> str:
    """docs/performance.md."""
    lines = [
        "# Performance",
        "",
        f"Written by `benchmarks/table.py` from benchmarks/results/{folder.name}; how it is "
        "measured, and what differs between the contestants, stands in benchmarks/README.md. "
        "Again on your machine: `make bench IMAGES=folder`.",
        "",
        "## Against the targets",
        "",
        *target_rows(results),
        "",
        *loader_section(results),
        *(operation_section(results["op_kernels"]) if "op_kernels" in results else []),
        *other_sections(results),
        *(writer_section(results["writer"]) if "writer" in results else []),
        *(step_section(results["train_step"]) if "train_step" in results else []),
    ]
    return "\n".join(lines).rstrip() + "\n"


def render_readme(text: str, results: dict) -> str:
    """README.md with its table renewed."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    measured = machine_line(results["loader_1_core"]) + elsewhere_line(results)
    lines = [*target_rows(results), "", measured]
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}"


def main() -> None:
    folder, results = read_results()
    PAGE.write_text(render_page(folder, results))
    README.write_text(render_readme(README.read_text(), results))
    print(f"wrote {PAGE.relative_to(ROOT)} and the table in README.md from {folder.name}")


if __name__ == "__main__":
    main()
