"""Benchmarks run, their results hold what is promised, and the tables are those of the results."""

import copy
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from benchmarks import table
from tests import ops_data
from tests.conftest import ROOT

KEYS = {
    "loader_1_core": [
        "plain_160_vs_ffcv",
        "plain_224_vs_ffcv",
        "strong_160_vs_torchvision",
        "strong_160_vs_ffcv_plain",
        "raw_160_vs_ffcv",
        "rates",
        "data",
    ],
    "op_kernels": ["milliseconds"],
    "decoder_memory": ["scratch_vs_ffcv", "scratch_bytes"],
    "startup": ["ours_compile_seconds", "ffcv_compile_seconds"],
    "writer": ["writer_vs_ffcv", "writer_bytes_vs_ffcv", "rates"],
}
NEW_KEYS = {"scale": ["samples", "data"]}  # until the committed results have them
GPU_KEYS = {"train_step": ["step_vs_ffcv_imagenet", "loader_fed_vs_fixed", "rates"]}
STOCK_HAS = ["brightness", "contrast", "saturation", "translate", "erasing", "normalize to float32"]


def check_keys(results: dict, promised: dict) -> None:
    for name, keys in promised.items():
        missing = {*keys, "machine"} - set(results[name])
        assert not missing, name


@pytest.fixture(scope="module")
def committed():
    return table.read_results()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Every script at tiny size, in one process: file stem -> result."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "images" / "deep").mkdir(parents=True)
    for number, size in enumerate([(96, 120), (130, 70), (64, 64)]):
        image = Image.fromarray(ops_data.image(*size, seed=number))
        image.save(folder / "images" / "deep" / f"{number}.png")
    command = [sys.executable, "benchmarks/run_all.py", "--smoke", f"--out={folder / 'out'}"]
    command.append(f"--images={folder / 'images'}")
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    files = (folder / "out").glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in files}


def test_tables_are_those_of_the_results(committed):
    folder, results = committed
    renew = "run benchmarks/table.py"
    assert table.PAGE.read_text() == table.render_page(folder, results), renew
    readme = table.README.read_text()
    assert readme == table.render_readme(readme, results), renew


def test_committed_results_hold_the_promised_keys(committed):
    check_keys(committed[1], KEYS)


def test_ratios_are_those_of_the_rates(committed):
    result = committed[1]["loader_1_core"]
    rates = {name: rate["median"] for name, rate in result["rates"].items()}
    for key in KEYS["loader_1_core"][:5]:
        (row,) = [target for target in table.TARGETS if target.key == key]
        ours, theirs = row.rates
        assert result[key] == pytest.approx(rates[ours] / rates[theirs], rel=1e-3), key


@pytest.mark.slow
def test_every_script_runs(smoke):
    check_keys(smoke, KEYS | NEW_KEYS | GPU_KEYS)
    times = smoke["op_kernels"]["milliseconds"]["32"]
    assert len(times) == 20 and all("ours" in who for who in times.values())
    assert all("ffcv" in times[name] for name in STOCK_HAS)
    contestants = set(smoke["loader_1_core"]["rates"])
    left_out = smoke["loader_1_core"]["data"]["left_out"]
    for peer in ("torchvision", "timm", "albumentations", "dali"):
        there = {f"{peer}_plain_160", f"{peer}_strong_160"} <= contestants
        assert there != (peer in left_out)


@pytest.mark.slow
def test_step_memory_tries_each_case_once(tmp_path, capfd):
    text = "model: {arch: timm/test_resnet}\nresolution: {min_res: 32, max_res: 32}\n"
    text += "validation: {resolution: 32, plain_resolution: 32, batch_size: 4}\n"
    names = {"one": "{batch_size: 4}", "same": "{batch_size: 4, epochs: 9}", "bad": "{}"}
    for name, training in names.items():
        (tmp_path / f"{name}.yaml").write_text(f"{text}training: {training}\n")
    (tmp_path / "bad.yaml").write_text(text.replace("test_resnet", "no_such") + "training: {}\n")
    command = [sys.executable, "benchmarks/step_memory.py", "--device=cpu", "--lanes=2", "--json"]
    command += [str(tmp_path / "out.json"), "--config"]
    command += [str(tmp_path / f"{name}.yaml") for name in names]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    configs = json.loads((tmp_path / "out.json").read_text())["configs"]
    assert (
        configs["one"] == configs["same"] == {"fits": True, "held_bytes": None, "used_bytes": None}
    )
    assert not configs["bad"]["fits"] and "no_such" in configs["bad"]["error"]
    assert "bad                          does not fit, " in capfd.readouterr().out


@pytest.mark.slow
def test_smoke_results_make_no_table(smoke, tmp_path):
    folder = tmp_path / "2030-01-01_machine"
    folder.mkdir()
    (folder / "loader_1_core.json").write_text(json.dumps(smoke["loader_1_core"]))
    with pytest.raises(ValueError, match="smoke run"):
        table.read_results(tmp_path)


def test_unreached_target_is_named(committed):
    results = copy.deepcopy(committed[1])
    results["loader_1_core"]["plain_160_vs_ffcv"] = 2.4
    results["loader_1_core"]["plain_224_vs_ffcv"] = 2.3
    results["decoder_memory"]["scratch_vs_ffcv"] = 0.06
    rows = "\n".join(table.target_rows(results))
    assert "2.40x | at least 2.5x, aim 3x: **not reached** |" in rows
    assert "2.30x | at least 2.2x, aim 2.6x: reached, the aim is not |" in rows
    assert "0.060x | at most 0.05x: **not reached** |" in rows


def test_make_bench_asks_for_photographs():
    for images in ("", "IMAGES=/nowhere"):
        command = ["make", "bench", *images.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "make bench IMAGES=/path/to/folder" in done.stderr
        assert f"IMAGES='{images.removeprefix('IMAGES=')}' is not a folder" in done.stderr
