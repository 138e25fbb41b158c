"""Files of stock FFCV in other layouts: read alike by both backends and verify, or refused."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.reader import BetonError, BetonFile
from fast_imagenet.beton.verify import verify
from tests.conftest import ROOT, SMOKE

COUNT = 24
# name -> fields in the order of the file, of a stock writer; the value of each for sample i
LAYOUTS = {
    "extra_int": "image=I, label=L, index=N",
    "label_first": "label=L, image=I",
    "other_names_label_first": "target=L, img=I",
    "text_between": "caption=B, label=L, about=J, image=I",
    "array_first": "box=A, image=I, label=L",
    "everything": "f=F, b=B, label=L, j=J, a=A, t=T, image=I, n=N",
    "second_image": "image=I, mask=M, label=L",
    "empty_bytes": "nothing=E, image=I, label=L, none=E",
    "long_name": "image=I, a_name_of_16_chr=F, label=L",
}
REFUSED = {  # and the error
    "two_images": ("left=I, right=M, label=L", "'left' (RGB image), 'right' (RGB image)"),
    "two_numbers": ("image=I, a=L, b=N", "an integer must be named 'label'"),
    "float_label": ("image=I, label=F, index=N", "'label' (float)"),
    "no_label": ("image=I, caption=B", "'caption' (bytes): an integer must be named 'label'"),
    "no_image": ("image=A, label=L", "'image' (array)"),
    "custom": ("image=I, label=L, own=C", "'own' of a custom type"),
}
WRITE = """
    import json, sys, warnings
    import numpy as np, torch
    from ffcv.fields import (BytesField, FloatField, IntField, JSONField, NDArrayField,
                             RGBImageField, TorchTensorField)
    from ffcv.writer import DatasetWriter

    class Custom(IntField):
        pass

    pixels = lambda i: np.full((30 + i % 3, 40, 3), 10 * i % 250, np.uint8)
    KINDS = {
        "I": (RGBImageField("jpg"), pixels), "M": (RGBImageField("raw"), lambda i: 255 - pixels(i)),
        "L": (IntField(), lambda i: i % 4), "N": (IntField(), lambda i: 10**12 + i),
        "F": (FloatField(), lambda i: i / 7), "J": (JSONField(), lambda i: {"number": int(i)}),
        "B": (BytesField(), lambda i: np.full(1 + i, i, np.uint8)),
        "E": (BytesField(), lambda i: np.zeros(0, np.uint8)),
        "A": (NDArrayField(np.dtype("f4"), (4,)), lambda i: np.full(4, i, "f4")),
        "T": (TorchTensorField(torch.int64, (2, 3)), lambda i: torch.full((2, 3), i)),
        "C": (Custom(), lambda i: i),
    }

    class Samples:
        def __init__(self, kinds):
            self.kinds = kinds
        def __len__(self):
            return int(sys.argv[2])
        def __getitem__(self, i):
            return tuple(KINDS[kind][1](i) for kind in self.kinds)

    for name, layout in json.loads(sys.argv[3]).items():
        pairs = [part.split("=") for part in layout.split(", ")]
        fields = {field: KINDS[kind][0] for field, kind in pairs}
        writer = DatasetWriter(f"{sys.argv[1]}/{name}.beton", fields, num_workers=1)
        writer.from_indexed_dataset(Samples([kind for _, kind in pairs]))
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Folder of one file for each layout."""
    folder = tmp_path_factory.mktemp("layouts")
    layouts = LAYOUTS | {name: layout for name, (layout, _) in REFUSED.items()}
    words = ["-c", textwrap.dedent(WRITE), str(folder), str(COUNT), json.dumps(layouts)]
    options = dict(cwd=ROOT, capture_output=True, text=True, timeout=300)
    done = subprocess.run([sys.executable, *words], **options)
    assert done.returncode == 0, done.stderr
    return folder


def gray(index: int) -> int:
    return 10 * index % 250


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_backends_read_the_right_image_with_its_label(stock, name):
    from fast_imagenet.data.ffcv_loader import EvalLoader, TrainLoader
    from fast_imagenet.data.torch_loader import TorchEvalLoader

    path = stock / f"{name}.beton"
    findings, notes, _ = verify(path, full=True)
    assert findings == []
    assert any("are read from field" in note for note in notes) == (name != "label_first")
    file = BetonFile(path)
    assert file.labels.tolist() == [i % 4 for i in range(COUNT)]
    for index in (0, 7, COUNT - 1):
        assert abs(int(file.image(index)[5, 5, 0]) - gray(index)) <= 2
    loaders = [EvalLoader(path, batch_size=10, num_workers=1, in_memory=m) for m in (True, False)]
    for loader in (*loaders, TorchEvalLoader(path, batch_size=10)):
        labels, means = [], []
        for images_bhwc, labels_b in loader.batches(16, 1.0):
            labels += labels_b.tolist()
            means += images_bhwc.float().mean((1, 2, 3)).tolist()
        assert labels == [i % 4 for i in range(COUNT)]
        np.testing.assert_allclose(means, [gray(i) for i in range(COUNT)], atol=2)
    train = TrainLoader(path, global_batch=8, seed=1, num_workers=1)
    for images_bhwc, labels_b, samples_b in train.epoch(0, 16):
        assert labels_b.tolist() == (samples_b % 4).tolist()
        grays = [gray(int(sample)) for sample in samples_b]
        means = images_bhwc.float().mean((1, 2, 3)).tolist()
        np.testing.assert_allclose(means, grays, atol=2)


@pytest.mark.parametrize("name", REFUSED)
def test_the_rest_is_refused_as_what_it_is(stock, name, capsys):
    path = stock / f"{name}.beton"
    (finding,), notes, _ = verify(path)
    assert REFUSED[name][1] in finding and str(path) in finding and notes == []
    assert "write it again with one image and one label" in finding
    assert "damaged" not in finding and "copy it" not in finding


def test_training_says_which_fields_and_refuses_before_the_folder(stock, tmp_path):
    def train(name, backend):
        flags = [f"--config={SMOKE}", "--model.arch=timm/test_resnet", f"--data.backend={backend}"]
        flags += [f"--data.{split}_dataset={stock}/{name}.beton" for split in ("train", "val")]
        flags += [f"--logging.folder={tmp_path}/run", "--training.epochs=3"]
        words = [sys.executable, "train_imagenet.py", *flags]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    for backend in ("ffcv", "torchvision"):
        done = train("two_numbers", backend)
        assert done.returncode == 1 and "an integer must be named 'label'" in done.stderr
        assert len(done.stderr.splitlines()) == 2  # the first says that PyTorch is imported
        assert not (tmp_path / "run").exists()
    done = train("other_names_label_first", "ffcv")
    assert done.returncode == 0, done.stderr
    assert "images are read from field 'img', labels from field 'target'" in done.stdout
    assert "no class list with" in done.stdout


def test_an_array_without_a_description_is_no_traceback(stock, tmp_path):
    data = bytearray((stock / "array_first.beton").read_bytes())
    start = fmt.HEADER.itemsize + fmt.FIELD.fields["arguments"][1]
    for junk in (b"\xff" * 1024, bytes(1024), b"\1" * 256 + (4).to_bytes(8, "little") + b"null"):
        data[start : start + len(junk)] = junk
        (tmp_path / "copy.beton").write_bytes(data)
        with pytest.raises(BetonError, match="'box', an array of a type"):
            BetonFile(tmp_path / "copy.beton")
