"""Benchmarks run, their results hold what is promised, and the tables are those of the results."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from benchmarks import table
from tests import ops_data
from tests.conftest import ROOT
from tools.report.add import add_run

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
NEW_KEYS = {  # until the committed results have them
    "scale": ["samples", "data"],
    "thread_balance": ["slowest_vs_mean"],
}
GPU_KEYS = {
    "train_step_test_resnet_32": [
        "ours_fixed_vs_ffcv_imagenet",
        "ours_bf16_eager_vs_ffcv_imagenet",
        "ours_fp16_eager_vs_ffcv_imagenet",
        "loader_fed_vs_fixed",
        "milliseconds",
        "peak_bytes",
        "rates",
    ],
    "step_memory": ["configs"],
    "tests": ["passed", "failed", "skipped"],
}
STOCK_HAS = ["brightness", "contrast", "saturation", "erasing", "normalize to float32"]


def check_keys(results: dict, promised: dict) -> None:
    for name, keys in promised.items():
        missing = {*keys, "machine"} - set(results[name])
        assert not missing, name


# benchmarks/ is a folder of scripts: table.py has put it on the path
import contestants  # noqa: E402
import gpu  # noqa: E402
import loader_throughput  # noqa: E402

FAKES = """
import os, io
import numpy as np
from PIL import Image
from contestants import PerImage, draw_box

class Good(PerImage):
    def image(self, data):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        y, x, h, w = draw_box(self.rng, image.height, image.width)
        return np.asarray(image.resize((self.size, self.size), 2, self.box(x, y, x + w, y + h)))
    def box(self, *sides):
        return sides

class Float(Good):
    def image(self, data):
        return super().image(data).astype("float32")

class Whole(Good):
    def box(self, *sides):
        return None

class Broken(Good):
    def __init__(self, task):
        import no_such_library

class Dies(Good):
    def image(self, data):
        if len(self.files) == 2:  # not in the check
            os._exit(3)
        return super().image(data)
"""


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
    command += [f"--images={folder / 'images'}", f"--peers={sys.prefix}"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
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


def test_chart_is_that_of_the_results(committed):
    bars = json.loads(Image.open(table.CHART).text["Description"])
    shown = [[label, rate] for label, rate in table.chart_bars(committed[1]["loader_1_core"])]
    assert bars == shown, "run benchmarks/table.py"


def test_committed_results_hold_the_promised_keys(committed):
    check_keys(committed[1], KEYS)


def test_ratios_are_those_of_the_rates(committed):
    result = committed[1]["loader_1_core"]
    rates = {name: rate["median"] for name, rate in result["rates"].items()}
    for key in KEYS["loader_1_core"][:5]:
        ours, theirs = contestants.RATIOS[key]
        assert result[key] == pytest.approx(rates[ours] / rates[theirs], rel=1e-3), key


@pytest.mark.slow
def test_every_script_runs(smoke):
    check_keys(smoke, KEYS | NEW_KEYS)
    for recipe in smoke["thread_balance"]["slowest_vs_mean"].values():
        assert recipe["16 x 256"] >= 1
    times = smoke["op_kernels"]["milliseconds"]["32"]
    assert len(times) == 18 and all("ours" in who for who in times.values())
    assert all("ffcv" in times[name] for name in STOCK_HAS)
    check_contestants(smoke["loader_1_core"])


def check_contestants(result):
    """Measured with .venv as the peers' environment, which holds some of them."""
    left_out, installed = result["data"]["left_out"], set()
    for name, row in contestants.TABLE.items():
        measured = {f"{name}_{recipe}" in result["rates"] for recipe in row.recipes}
        reasons = {left_out.get(f"{name}_{recipe}", "") for recipe in row.recipes}
        assert measured in ({True}, {False})
        if measured == {True}:
            assert reasons == {""}
            installed.add(name)
        elif not row.variables:
            assert not row.home
            assert all(
                text.startswith(("ModuleNotFoundError: ", "ImportError: ")) for text in reasons
            )
    assert installed >= {"torchvision", "torchvision_tensors", "timm", "pillow", "ours", "ffcv"}
    # PIL itself must not be taken for it
    assert left_out["pillow_simd_plain_160"] == "ImportError: pillow-simd is not installed"
    assert result["rates"]["ours_plain_160"].keys() >= {"median", "min", "max", "rounds", "cpu"}
    assert result["hardest"] in result["rates"] and result["data"]["peer_versions"]["torch"]


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
    configs = {}
    for again in (False, True):
        done = subprocess.run(command, cwd=ROOT, timeout=240)
        assert done.returncode == 1
        printed = capfd.readouterr()
        assert re.search("bad  +failed: .*no_such", printed.out)
        assert printed.out.count("(measured before)") == (2 if again else 0)
        configs = json.loads((tmp_path / "out.json").read_text())["configs"]
    fits = {"fits": True, "held_bytes": None, "used_bytes": None}
    assert configs == {"one": fits, "same": fits}  # what failed is tried again


@pytest.mark.slow
def test_smoke_results_make_no_table(smoke, tmp_path):
    folder = tmp_path / "2030-01-01_machine"
    folder.mkdir()
    (folder / "loader_1_core.json").write_text(json.dumps(smoke["loader_1_core"]))
    with pytest.raises(ValueError, match="smoke run"):
        table.read_results(tmp_path)


def test_unreached_target_is_named(committed):
    results = copy.deepcopy(committed[1])
    results["loader_1_core"]["plain_160_vs_ffcv"] = 4.9
    results["loader_1_core"]["plain_224_vs_ffcv"] = 4.6
    results["decoder_memory"]["scratch_vs_ffcv"] = 0.06
    rows = "\n".join(table.target_rows(results))
    assert "4.90x | at least 5x: **not reached** |" in rows
    assert "4.60x | at least 4.5x: reached |" in rows
    assert "0.060x | at most 0.05x: **not reached** |" in rows


def test_make_bench_asks_for_photographs():
    for images in ("", "IMAGES=/nowhere"):
        command = ["make", "bench", *images.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "make bench IMAGES=/path/to/folder" in done.stderr
        assert f"IMAGES='{images.removeprefix('IMAGES=')}' is not a folder" in done.stderr


def test_crop_areas_are_read_from_the_ramp():
    ramp = Image.fromarray(contestants.ramp())
    height, width = contestants.RAMP
    boxes = [(0, 0, width, height), (100, 50, 300, 200), (7, 300, 90, 360)]
    crops = np.stack([np.asarray(ramp.resize((160, 160), 2, box)) for box in boxes])
    crops[1] = crops[1, :, ::-1]
    areas = [(x1 - x0) * (y1 - y0) / (height * width) for x0, y0, x1, y1 in boxes]
    assert contestants.crop_areas(crops.astype(float)) == pytest.approx(areas, rel=0.03)


def test_boxes_are_torchvisions():
    mean, deviation = contestants.expected_area()
    image = Image.fromarray(contestants.ramp())
    crops = [
        v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(160), [image]) for _ in range(2000)
    ]
    areas = [crop["height"] * crop["width"] / (375 * 500) for crop in crops]
    assert np.mean(areas) == pytest.approx(mean, abs=5 * deviation / 2000**0.5)
    assert np.std(areas) == pytest.approx(deviation, rel=0.1)
    boxes = [contestants.draw_box(np.random.default_rng(k), 30, 400) for k in range(50)]
    assert all(0 <= y <= y + h <= 30 and 0 <= x <= x + w <= 400 for y, x, h, w in boxes)


@pytest.mark.slow
def test_peers_that_fail_are_left_out_with_their_reason(tmp_path, monkeypatch):
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        Image.fromarray(ops_data.image(90, 120, seed=number)).save(images / f"{number}.png")
    rows = {name.lower(): contestants.Row(name, f"fakes:{name}", ("plain_160",))
            for name in ("Float", "Whole", "Broken", "Good")}  # fmt: skip
    alone = {"variables": {"ALONE": "1"}}
    rows["dies"] = contestants.Row("Dies", "fakes:Dies", ("plain_160",), **alone)
    numbers = {"limit": 9, "max_side": 500, "cores": 1, "rounds": 2}
    arguments = SimpleNamespace(
        images=str(images), peers=sys.prefix, smoke=True, clock="cpu", **numbers
    )
    rates, data = loader_throughput.measure(arguments, rows)
    assert list(rates) == ["good_plain_160"] and len(rates["good_plain_160"]["rounds"]) == 2
    assert loader_throughput.hardest_peer(rates, rows) == "good_plain_160"
    reasons = {name.removesuffix("_plain_160"): text for name, text in data["left_out"].items()}
    assert reasons.keys() == {"float", "whole", "broken", "dies"}
    assert reasons["float"] == "its output is float32 [64, 160, 160, 3]"
    assert re.fullmatch(r"its crops have 1\.0\d of the area, asked: 0\.\d\d", reasons["whole"])
    assert reasons["broken"] == "ModuleNotFoundError: No module named 'no_such_library'"
    assert reasons["dies"] == "its process ended with status 3"
    with pytest.raises(loader_throughput.PeerError, match=r"bin/python does not start \(No such"):
        loader_throughput.Process(str(tmp_path / "bin/python"), 1, {})
    rows["good"] = contestants.Row("Good", "fakes:Broken", ("plain_160",), home=True)
    with pytest.raises(SystemExit, match="good_plain_160: ModuleNotFoundError"):
        loader_throughput.measure(arguments, rows)


def test_a_package_that_does_not_install_is_left_out(tmp_path):
    for name in ("scripts/setup_bench.sh", "benchmarks/requirements.txt"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh
echo "$@" >>calls.txt
case "$*" in
  *"-m venv"*) mkdir -p .venv-bench/bin; cp "$0" .venv-bench/bin/python ;;
  *simplejpeg==*) echo "ERROR: no wheel"; exit 1 ;;
esac
""")
    python.chmod(0o755)
    command = ["bash", "scripts/setup_bench.sh"]
    options = dict(cwd=tmp_path, env=os.environ | {"PYTHON": str(python)}, check=True, timeout=60)
    subprocess.run(command, **options)
    assert (tmp_path / ".venv-bench/left_out.txt").read_text() == "simplejpeg: ERROR: no wheel\n"
    calls = (tmp_path / "calls.txt").read_text()
    assert "torch==2.14.1 torchvision==0.29.2" in calls and "timm==" in calls
    assert re.search(r"--target .venv-bench/pillow-simd pillow-simd==", calls)
    subprocess.run(command, **options)  # up to date: it asks for the version alone
    assert (tmp_path / "calls.txt").read_text() == f"{calls}--version\n"


def test_peers_are_measured_with_our_versions():
    lines = [
        (ROOT / name).read_text() for name in ("requirements.txt", "benchmarks/requirements.txt")
    ]
    ours, theirs = (dict(re.findall(r"([\w-]+)==(\S+)", text)) for text in lines)
    same = {"numpy", "torch", "torchvision", "timm"}
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


# ---- make gpu ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gpu_parts_leave_records(tiny_beton, tmp_path, capfd):
    folder = tmp_path / "records"
    words = ["--smoke", "--device=cpu", f"--data={tiny_beton}", f"--runs={tmp_path / 'runs'}"]
    command = [sys.executable, "benchmarks/gpu.py", *words, f"--records={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=550)
    place = next((folder / "gpu").iterdir())
    results = {path.stem: json.loads(path.read_text()) for path in place.glob("*.json")}
    check_keys(results, GPU_KEYS)
    assert {note["status"] for note in results["parts"]["parts"].values()} == {"done"}
    run = folder / "rn50_128px_5_epochs" / place.name / "seed0"
    assert add_run(run, tmp_path / "book").parts[-3] == "rn50_128px_5_epochs"  # by its own name
    page = "\n".join(table.gpu_section(results))
    assert "| timm/test_resnet | 32 |" in page and "| smoke | yes |" in page
    capfd.readouterr()
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    printed = capfd.readouterr().out
    assert "== " not in printed and "4 of 4 parts have records" in printed


def part(tmp_path, name, code, seconds=1.0):
    record = tmp_path / f"{name}.json"
    write = f"open({str(record)!r}, 'w').write('{{}}')"
    return gpu.Part(name, seconds, ["-c", code.replace("RECORD", write)], record)


def test_a_part_that_fails_or_takes_long_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SAVING", 0.2)
    parts = [
        part(tmp_path, "fails", "raise SystemExit(3)"),
        part(tmp_path, "works", "RECORD"),
        part(tmp_path, "too_long", "RECORD", seconds=1e9),
        part(tmp_path, "hangs", "import time; time.sleep(600)"),
    ]
    first = gpu.Session(tmp_path, minutes=0.05)
    assert first.run_all(parts) == ["fails"]
    assert [first.has(one) for one in parts] == [False, True, False, False]
    assert first.notes["hangs"]["status"] == gpu.CUT and "too_long" not in first.notes
    second = gpu.Session(tmp_path, minutes=0.05)
    order = sorted(parts, key=second.failed_before)
    assert [one.name for one in order] == ["works", "too_long", "fails", "hangs"]
    assert second.has(parts[1]) and second.expected(parts[3]) > first.notes["hangs"]["seconds"]
    parts[1].record.unlink()
    assert not second.has(parts[1])  # a record that somebody removed is made again


def test_a_part_that_resumes_starts_wherever_it_can_get_on(tmp_path):
    session = gpu.Session(tmp_path, minutes=5)
    longer = gpu.Part("longer", 1e9, [], tmp_path / "seed0")
    assert not session.starts(longer)
    assert session.starts(replace(longer, resumes=True))


def test_estimates_follow_what_earlier_parts_took(tmp_path):
    session, typical = gpu.Session(tmp_path, minutes=5), 30.0
    one = gpu.Part("one", typical, [], tmp_path / "one.json")
    assert session.expected(one) == typical
    session.notes["quick"] = dict(status=gpu.DONE, seconds=40.0, typical=20.0)
    session.notes["failed"] = dict(status="failed with status 1", seconds=1.0, typical=99.0)
    assert session.expected(one) == 2 * typical
    session.notes["one"] = dict(status=gpu.CUT, seconds=100.0, typical=typical)
    assert session.expected(one) == 1.2 * 100.0


def test_gpu_names_its_parts_where_there_is_no_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([f"--records={tmp_path}"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1 and "needs a CUDA GPU" in sentence
    for name in ("tests 1.0", "train_step_resnet18_224 ", "rn50_128px_200_epochs_seed2 "):
        assert name in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--device=cpu"], "give --smoke too"),
        (["--data=/nowhere"], "--data=/nowhere does not hold /nowhere/train.beton and "),
    ],
)
def test_gpu_refuses_wrong_arguments(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(words)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
