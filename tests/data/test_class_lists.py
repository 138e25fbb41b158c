"""Two files, or a file and weights, are compared by whatever each says of its classes."""

import json
import shutil
import sys
import zlib

import numpy as np
import pytest

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.encode import EncodeSettings
from fast_imagenet.beton.reader import BetonError, BetonFile, sidecar_path
from fast_imagenet.beton.verify import verify
from fast_imagenet.beton.writer import write_beton
from fast_imagenet.data import class_lists
from fast_imagenet.sources import SourceError, open_source
from fast_imagenet.sources.classes import WnidVotes, name_classes

HEADER_JSON_START = fmt.HEADER.itemsize + fmt.FIELD.fields["arguments"][1]


def write(path, change=lambda source: None):
    source = open_source("synthetic", "", "val", size=20)
    change(source)
    write_beton(path, source, EncodeSettings(mode="raw", max_side=40))
    return path


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """A val file whose classes 3 and 4 have changed places, without its summary."""

    def swap(source):
        source.classes[3], source.classes[4] = source.classes[4], source.classes[3]

    path = write(tmp_path_factory.mktemp("swapped") / "val.beton", swap)
    sidecar_path(path).unlink()
    return path


@pytest.fixture
def bare(tmp_path):
    """A file and its summary as of a program without checksums."""
    path = write(tmp_path / "train.beton")
    with open(path, "r+b") as file:
        file.seek(HEADER_JSON_START)
        file.write(bytes(1024))
    return path


def edit(path, **changes):
    about = json.loads(sidecar_path(path).read_text())
    sidecar_path(path).write_text(json.dumps(about | changes))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_a_part_that_was_never_merged_is_reported(quick_run, tmp_path, backend, capsys):
    part = tmp_path / "val.part-0001-of-0002.beton"
    source = open_source("synthetic", "", "val", size=20)
    write_beton(part, source, EncodeSettings(mode="raw", max_side=40), shard=(1, 2))
    flags = ["--model.arch=timm/test_resnet", "--training.max_steps=1"]
    quick_run(*flags, f"--data.backend={backend}", f"--data.val_dataset={part}")
    printed = capsys.readouterr().out
    assert f"note: {part}: one of the 2 parts of a dataset; `python -m fast_imagenet.b" in printed


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_other_classes_are_refused_without_a_summary(quick_run, tmp_path, swapped, backend):
    flags = [f"--data.backend={backend}", f"--data.val_dataset={swapped}"]
    with pytest.raises(ValueError, match=r"have different classes \(the checksums"):
        quick_run(*flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_weights_are_not_evaluated_on_other_classes_without_a_summary(quick_run, swapped):
    folder = quick_run()
    weights = f"--model.checkpoint={folder}/weights.safetensors"
    flags = ["--training.eval_only=true", weights, f"--data.val_dataset={swapped}"]
    with pytest.raises(ValueError, match="was trained on other classes than"):
        quick_run(*flags)
    about = json.loads((folder / "weights.json").read_text())
    about["classes"][2] = 5
    (folder / "weights.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="names a class 5, not text"):
        quick_run(*flags)


def test_the_header_counts_the_classes_where_the_summary_is_missing(tmp_path):
    def add(source):
        source.classes.append("never seen")
        source.class_names = None

    path = write(tmp_path / "val.beton", add)
    with_summary = BetonFile(path)
    sidecar_path(path).unlink()
    alone = BetonFile(path)
    assert alone.num_classes == with_summary.num_classes == 11
    assert alone.class_digest == with_summary.class_digest is not None
    early = {"written_by": "x", "num_classes": 11, "classes_sha256": alone.class_digest}
    for note, words in ((early, None), (early | {"num_classes": 3}, "its header has 3 classes")):
        with open(path, "r+b") as file:
            file.seek(HEADER_JSON_START)
            file.write(json.dumps(note).encode().ljust(1024, b"\0"))
        if words:
            with pytest.raises(BetonError, match=words):
                BetonFile(path)
        else:
            assert (BetonFile(path).num_classes, BetonFile(path).class_digest) == (
                11,
                alone.class_digest,
            )


CLASSES = [f"class {number}" for number in range(10)]
FAULTS = {
    "NaN": (dict(classes=[*CLASSES[:9], float("nan")]), "names a class nan, which is not text"),
    "number": (dict(classes=[*CLASSES[:9], 7]), "names a class 7, which is not text"),
    "nested": (dict(classes=[*CLASSES[:9], ["a"]]), "which is not text"),
    "none": (dict(classes=[*CLASSES[:9], None]), "names a class None, which is not text"),
    "twice": (dict(classes=[*CLASSES[:9], "class 0"]), "names the class 'class 0' twice"),
    "names few": (dict(class_names=["a"]), "does not have one readable name for each class"),
    "names text": (dict(class_names="abcdefghij"), "does not have one readable name"),
    "names number": (dict(class_names=[*CLASSES[:9], 1]), "names a class 1, which is not text"),
    "many": (dict(classes=[str(n) for n in range(1_048_577)]), "has 1,048,577 classes, and 1,000,"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_summary_of_a_file_without_checksums_holds_a_name_for_each_class(bare, name):
    assert not BetonFile(bare).header_json and verify(bare)[0] == []
    changes, words = FAULTS[name]
    edit(bare, **changes)
    with pytest.raises(BetonError, match=words) as caught:
        BetonFile(bare)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_readable_names_are_covered_by_the_checksums(tmp_path):
    def name(source):
        source.class_names = [f"name of {one}" for one in source.classes]

    path = write(tmp_path / "train.beton", name)
    names = BetonFile(path).sidecar["class_names"]
    edit(path, class_names=[names[1], names[0], *names[2:]])
    with pytest.raises(BetonError, match="names other classes than"):
        BetonFile(path)
    edit(path, class_names=None)
    with pytest.raises(BetonError, match="names other classes than"):
        BetonFile(path)


@pytest.mark.parametrize("label", [1_000_000, 2**31, 2**62])
def test_a_label_beyond_the_limit_is_one_sentence_everywhere(bare, label):
    """The same limit, in the same words, for files and for sources."""
    file = BetonFile(bare)
    position = fmt.METADATA_START + fmt.SAMPLE.fields["label"][1]
    with open(bare, "r+b") as stream:
        stream.seek(position)
        stream.write(np.int64(label).tobytes())
    labels = file.labels.copy()
    labels[0] = label
    edit(bare, labels_crc32=zlib.crc32(labels.tobytes()))
    words = f"has the label {label}, and 1,000,000 classes are allowed: labels must count"
    with pytest.raises(BetonError, match=words):
        BetonFile(bare)
    shutil.move(sidecar_path(bare), f"{bare}.gone")
    with pytest.raises(BetonError, match=words):
        BetonFile(bare)
    with pytest.raises(SourceError, match=words):
        name_classes(np.array([0, label]), WnidVotes(), None, "data")


@pytest.mark.parametrize(
    ("identifier", "name"),
    [("n01484850", "great white shark"), ("n99999999", "n99999999"), ("tench", "tench"), ("", "")],
)
def test_a_wnid_has_the_first_of_its_names(identifier, name):
    assert class_lists.class_name(identifier) == name


def test_without_timm_a_wnid_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data", None)
    class_lists._wordnet.cache_clear()
    assert class_lists.class_name("n01484850") == "n01484850"
