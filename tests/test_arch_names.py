"""Names of networks as read from the sources are those that the libraries themselves list."""

import subprocess
import sys

import timm
import torchvision
from timm.models import _registry

from fast_imagenet.arch_names import known_names, unknown_arch
from tests.conftest import ROOT


def test_every_name_of_the_libraries_is_known_and_no_other():
    torchvisions = set(torchvision.models.list_models(torchvision.models))
    timms = set(timm.list_models()) | set(_registry._deprecated_models)
    tagged = set(timm.list_models(pretrained=True))
    assert len(torchvisions) >= 80 and len(timms) >= 1000 and len(tagged) >= 1000
    assert known_names("torchvision") == torchvisions
    assert {name for name in known_names("timm") if "." not in name} >= timms
    assert all(timm.is_model(name) for name in known_names("timm"))
    assert [name for name in torchvisions | timms | tagged if unknown_arch(name)] == []
    assert [name for name in timms | tagged if unknown_arch(f"timm/{name}")] == []


def test_reading_them_imports_neither_library_and_takes_no_time():
    code = (
        "import sys, time; from fast_imagenet.arch_names import unknown_arch; t = time.time(); "
        "unknown_arch('resnet5O'); print(time.time() - t); "
        "assert not {'torch', 'timm', 'torchvision', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 2  # a tenth of a second, where nothing else runs


def test_a_library_that_is_missing_or_registers_otherwise_is_left_to_itself(monkeypatch):
    monkeypatch.setattr("fast_imagenet.arch_names.known_names", lambda library: frozenset())
    assert unknown_arch("anything") is None
