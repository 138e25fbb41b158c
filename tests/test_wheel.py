"""The package as others get it: a wheel, installed elsewhere, in a program of stock FFCV."""

import email
import fcntl
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fast_imagenet import native, ops, rng
from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.data.augmentation import Augment
from fast_imagenet.data.device_transforms import BatchTransforms
from fast_imagenet.data.ffcv_loader import image_operations
from tests import ops_data
from tests.conftest import ROOT
from tools.preview import Stored

DOCS = (ROOT / "docs/operations.md").read_text()
(PROGRAM,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
(STOP,) = (code for code in re.findall(r"```py\n(.*?)```", DOCS, re.S) if "excepthook" in code)
SHIPPED = (".py", ".typed")
SEED, SIDE, BATCH, COUNT = 7, 64, 16, 37  # of PROGRAM, and of its file: the last batch is partial
AUGMENT = Augment(
    crop_area=(0.25, 1.0),
    policy="rand_augment_lite",
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    erasing=0.25,
)
# What follows PROGRAM in the same process: its last epoch again, kept.
KEEP = """
import sys
import numpy as np
import fast_imagenet
last = images_bchw.clone()
loader.next_epoch = EPOCHS - 1
batches = [(images.clone(), labels.clone()) for images, labels in loader]
images, labels = (np.concatenate([batch[k].numpy() for batch in batches]) for k in (0, 1))
np.savez("seen.npz", images=images, labels=labels, last=last.numpy())
loaded = {"train_imagenet", "fast_imagenet.data.ffcv_loader"} & sys.modules.keys()
print(fast_imagenet.__file__, loaded)
"""


def call(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the working tree, built without a network from a source archive of a copy."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    for name in ("fast_imagenet", "tests", "benchmarks", "scripts"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.toml"), ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    call([sys.executable, "-c", code], cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    call([*command, "--no-build-isolation", "--wheel-dir", str(folder), str(archive)])
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, pytestconfig):
    """(interpreter, environment) of a virtual environment with the wheel and its dependencies.

    It sees neither the repository nor an editable install of it. The place and the times of the
    files stay the same between test runs, so that only kernels whose source has changed are
    compiled anew: all of them take a minute.
    """
    caches = pytestconfig.cache.mkdir("wheel")
    with open(caches / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the end: two test runs share the place
        shutil.rmtree(caches / "venv", ignore_errors=True)
        call([sys.executable, "-m", "venv", "--without-pip", str(caches / "venv")])
        (site,) = (caches / "venv").glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        call([*command, "--target", str(site), str(wheel)])
        for path in site.glob("fast_imagenet/**/*.py"):
            shutil.copystat(ROOT / path.relative_to(site), path)
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(caches / "kernels")}
        environment.pop("PYTHONPATH", None)
        yield str(caches / "venv/bin/python"), environment


EVERY_MODULE = """
import importlib, pkgutil, sys
import fast_imagenet
for module in pkgutil.walk_packages(fast_imagenet.__path__, "fast_imagenet."):
    if module.name.startswith("fast_imagenet.native._"):
        continue  # the C library: no module
    loaded = importlib.import_module(module.name)
    assert loaded.__file__.startswith(sys.prefix), loaded.__file__
    print(module.name)
assert not {"tools", "train_imagenet", "write_dataset"} & sys.modules.keys()
"""


@pytest.mark.slow
def test_every_module_of_it_can_be_imported(installed, tmp_path):
    python, environment = installed
    printed = call([python, "-c", EVERY_MODULE], cwd=tmp_path, env=environment)
    files = (ROOT / "fast_imagenet").rglob("*.py")
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    names = {name.removesuffix(".__init__") for name in names} - {"fast_imagenet"}
    assert sorted(printed.split()) == sorted(names)


WITHOUT_EXTRAS = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
import fast_imagenet.beton.reader, fast_imagenet.beton.writer
import fast_imagenet.data.augmentation, fast_imagenet.data.device_transforms
import fast_imagenet.data.ffcv_loader
import fast_imagenet.ops, fast_imagenet.sources
"""


@pytest.mark.slow
def test_operations_files_and_loader_need_no_extra(installed, tmp_path):
    """Nothing of the extras is imported that FFCV does not install by itself."""
    python, environment = installed
    lines = chain.from_iterable(project()["optional-dependencies"].values())
    packages = {canonicalize_name(Requirement(line).name) for line in lines}
    packages -= {canonicalize_name(Requirement(line).name) for line in metadata.requires("ffcv")}
    refused = {
        name
        for name, providers in metadata.packages_distributions().items()
        if packages & set(map(canonicalize_name, providers)) and name != "fast_imagenet"
    }
    assert {"timm", "pyarrow", "matplotlib", "torchvision", "safetensors", "yaml"} <= refused
    code = WITHOUT_EXTRAS.format(refused=refused)
    call([python, "-c", code], cwd=tmp_path, env=environment)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if name.startswith("fast_imagenet/")}
    libraries = {name for name in package if name.endswith(".so")}
    paths = native.PATHS if platform.machine() == "x86_64" else ("plain",)
    folder, suffix = "fast_imagenet/native", sysconfig.get_config_var("EXT_SUFFIX")
    assert libraries == {f"{folder}/_{path}{suffix}" for path in paths}
    package -= libraries
    sources = [p for p in (ROOT / "fast_imagenet").rglob("*") if p.suffix in SHIPPED]
    assert package == {path.relative_to(ROOT).as_posix() for path in sources}
    assert {name.split("/")[0].partition("-")[2] for name in names - package - libraries} == {
        f"{project()['version']}.dist-info"
    }


def test_its_library_opens_where_no_package_is_installed(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from fast_imagenet import native"
    code += "; print(native.IN_USE, native.FOLDER)"
    path, folder = call([sys.executable, "-I", "-S", "-c", code], cwd="/").split()
    assert (path, Path(folder).parents[1]) == (native.IN_USE, tmp_path)


def test_its_metadata_is_that_of_the_project(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    written = email.message_from_bytes(archive.read(name))
    stated = project()
    assert [written[key] for key in ("Name", "Version", "Summary", "License-Expression")] == [
        stated[key] for key in ("name", "version", "description", "license")
    ]
    assert written["Requires-Python"] == stated["requires-python"]
    always = [need for need in written.get_all("Requires-Dist") if "extra ==" not in need]
    assert sorted(always) == sorted(stated["dependencies"])
    assert sorted(written.get_all("Provides-Extra")) == sorted(stated["optional-dependencies"])
    assert written.get_payload().startswith("# fast-imagenet")
    assert any(entry.endswith("licenses/LICENSE") for entry in archive.namelist())


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.slow
def test_the_program_of_the_docs_runs_on_it(installed, tmp_path):
    """Stock FFCV's file and Loader, another folder, a new process; images equal the recipe's."""
    images = [ops_data.image(50 + 7 * k, 120 - 2 * k, seed=k) for k in range(COUNT)]
    path = ops_data.write_file(tmp_path / "train.beton", images, markers=False)
    (tmp_path / "program.py").write_text(PROGRAM + KEEP)
    python, environment = installed
    file, loaded = call([python, "program.py"], cwd=tmp_path, env=environment).split()
    assert file.startswith(str(Path(python).parents[1])) and loaded == "set()"
    seen = np.load(tmp_path / "seen.npz")
    assert sorted(seen["labels"].tolist()) == list(range(COUNT))
    assert seen["images"].shape == (COUNT, 3, SIDE, SIDE) and seen["images"].dtype == np.float32
    np.testing.assert_array_equal(seen["last"], seen["images"][-(COUNT % BATCH) :])
    np.testing.assert_allclose(seen["images"], expected(path, seen["labels"]), atol=1e-6)


def expected(path, samples_b):
    """The same images by the parts of the recipe, in this process, without FFCV."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    decoder, *changes = image_operations(AUGMENT, SIDE, SEED)
    for operation in (decoder, *changes):
        operation.set_epoch(1)
    images_bhwc = Stored(BetonFile(path), samples_b).decode(decoder)
    for operation in changes:
        operation.transform(images_bhwc, samples_b)
    on_device = BatchTransforms(AUGMENT, mean, std, COUNT, 0.0, SEED)
    labels_b = torch.from_numpy(samples_b)
    return on_device(torch.from_numpy(images_bhwc), labels_b, samples_b, 1, 0)[0].numpy()


def test_the_docs_name_every_operation_with_its_arguments():
    stated = dict(re.findall(r"^- `(\w+)\((.*)\)`$", DOCS, re.M))
    public = {name: getattr(ops, name) for name in ops.__all__}
    known = {name: x for name, x in public.items() if isinstance(x, type)}
    del known["DecodeError"]
    assert stated.keys() == known.keys()
    for name, arguments in stated.items():
        scope = {}
        exec(f"def stated({arguments}): pass", scope)
        given, real = (inspect.signature(f).parameters for f in (scope["stated"], known[name]))
        assert [(x.name, x.kind, x.default) for x in given.values()] == [
            (x.name, x.kind, x.default) for x in real.values()
        ], name


def test_the_docs_list_every_stream():
    stated = re.findall(r"^\| `(STREAM_\w+)` \| (\d+) \|", DOCS, re.M)
    real = {name: str(number) for name, number in vars(rng).items() if name.startswith("STREAM_")}
    assert dict(stated) == real and len(stated) == len(set(real.values()))


@pytest.mark.slow
def test_an_epoch_left_early_ends_the_program_in_order(tmp_path):
    """The loader's thread still decodes while Python ends: no decoder may be freed under it."""
    images = [ops_data.image(400, 500, seed=k) for k in range(16)]
    # the first of many batches is all that is taken
    ops_data.write_file(tmp_path / "train.beton", [images[k % 16] for k in range(1600)])
    text = PROGRAM.replace("        pass  # float32", "        break  # float32")
    assert text.count("break") == 1
    (tmp_path / "program.py").write_text(text)
    folders = {**os.environ, "PYTHONPATH": str(ROOT)}
    call([sys.executable, "program.py"], cwd=tmp_path, env=folders)


@pytest.mark.slow
def test_a_damaged_image_ends_the_program_as_the_docs_say(tmp_path):
    """And stock operations stand between ours; the label goes through FFCV's default."""
    images = [ops_data.image(40, 50, seed=k) for k in range(6)]
    path = ops_data.write_file(tmp_path / "train.beton", images)
    (tmp_path / "program.py").write_text(f"""{STOP}
from ffcv.loader import Loader
from ffcv.transforms import RandomHorizontalFlip, ToTensor
from fast_imagenet.ops import CropDecode, RandomGrayscale
mixed = [CropDecode(16, flip=0), RandomHorizontalFlip(1.0), RandomGrayscale(1.0), ToTensor()]
loader = Loader("train.beton", batch_size=3, num_workers=1, pipelines={{"image": mixed}})
for images, labels in loader:
    print(images.shape, bool((images[..., 0] == images[..., 1]).all()), labels.flatten().tolist())
""")
    command, folders = [sys.executable, "program.py"], {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = call(command, cwd=tmp_path, env=folders).splitlines()
    assert printed == [
        f"torch.Size([3, 16, 16, 3]) True {labels}" for labels in ([0, 1, 2], [3, 4, 5])
    ]
    file = BetonFile(path)
    data, start = bytearray((tmp_path / "train.beton").read_bytes()), int(file.offsets[4])
    data[start : start + 2] = b"no"
    (tmp_path / "train.beton").write_bytes(data)
    done = subprocess.run(
        command, cwd=tmp_path, env=folders, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert re.search(r"DecodeError: .*train.beton: sample 4: ", done.stderr)
