"""Predictions from a file of weights: the validation's own pixels, nothing assumed in silence."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import train_imagenet
from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.data.augmentation import IMAGENET
from fast_imagenet.engine.distributed import init_distributed
from fast_imagenet.engine.weights import save_weights
from fast_imagenet.models.factory import create_model
from fast_imagenet.models.networks import ImageNetwork
from tools import predict
from tools.network import open_network, read_image

ROOT = Path(__file__).resolve().parents[2]
WNIDS = [f"n0{number:07}" for number in range(7)] + ["n01440764", "n01443537", "n01484850"]
VIEW = {"resolution": 40, "crop_ratio": 0.8, "lr_tta": True}


def write_weights(folder, backend="ffcv", arch="timm/test_resnet", **info):
    """A file of ours whose run had other settings of the validation than the defaults."""
    torch.manual_seed(0)
    config = {"data": {"backend": backend, "resize": "auto"}, "validation": VIEW}
    about = {"arch": arch, "num_classes": 10, "classes": WNIDS, "weights": "raw", "config": config}
    about |= {"use_blurpool": False, "blur_max_pool": False}
    about |= {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    path = folder / "weights.safetensors"
    save_weights(path, create_model(arch, 10).state_dict(), about | info)
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 50).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_images_and_logits_are_those_of_the_validation(tmp_path, tiny_beton, backend):
    network = open_network(str(write_weights(tmp_path, backend)), [], "test")
    cfg, file = network.cfg, BetonFile(tiny_beton / "val.beton")
    cfg.data.val_dataset = str(file.path)
    _, loader = train_imagenet.build_loaders(cfg, init_distributed())
    evaluated = ImageNetwork(network.model).eval()
    ((images_bhwc, _),) = loader.batches(VIEW["resolution"], VIEW["crop_ratio"])
    with torch.no_grad():
        wanted = (evaluated(images_bhwc) + evaluated(images_bhwc.flip(2))) / 2
    images = [file.image(number) for number in range(len(file))]
    assert torch.equal(network._view(images), images_bhwc)
    assert torch.equal(network.logits(network.inputs(images)), wanted)
    loader.close()


@pytest.mark.parametrize("beside", [True, False])
def test_the_five_likeliest_classes_are_named(tmp_path, photo, capsys, beside):
    """Also without the JSON beside the weights: the file holds what it needs."""
    weights = write_weights(tmp_path)
    if not beside:
        weights.with_suffix(".json").unlink()
    predict.main([str(photo), "--weights", str(weights)])
    said = capsys.readouterr().out
    assert "40 px, crop ratio 0.8, area, averaged with the mirrored image" in said
    assert "defaults" not in said
    network = open_network(str(weights), [], "test")
    probabilities = network.logits(network.inputs([read_image(photo)]))[0].softmax(0)
    lines = [line.split(maxsplit=2) for line in said.splitlines()[-5:]]
    best = probabilities.topk(5)
    assert [float(line[0]) for line in lines] == [round(100 * p, 2) for p in best.values.tolist()]
    names = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"}
    wanted = [WNIDS[k] + f"  {names.get(WNIDS[k], '')}".rstrip() for k in best.indices.tolist()]
    assert [line[2] for line in lines] == wanted


def test_an_image_that_a_viewer_shows_otherwise_is_noted(tmp_path, photo, capsys):
    image, exif = Image.open(photo), Image.Exif()
    image.save(tmp_path / "sound.jpg")
    exif[0x112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    content = (tmp_path / "sound.jpg").read_bytes()
    (tmp_path / "hurt.jpg").write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    for name, note in (("sound", ""), ("turned", "EXIF orient"), ("hurt", "is damaged")):
        read_image(tmp_path / f"{name}.jpg")
        said = capsys.readouterr().out
        assert note in said and bool(said) == bool(note)


def test_what_a_file_does_not_say_is_printed(tmp_path, photo, capsys):
    torch.save(create_model("resnet18", 10).state_dict(), tmp_path / "foreign.pth")
    flags = ["--weights", str(tmp_path / "foreign.pth"), str(photo), "--model.arch=resnet18"]
    predict.main([*flags, "--validation.resolution=32", "--data.resize=bicubic"])
    said = capsys.readouterr().out
    assert "32 px, crop ratio 0.875, bicubic (validation.crop_ratio: defaults, the file" in said
    assert "does not name its classes: they are shown as numbers" in said
    assert "no BlurPool" in said and "mean and std of ImageNet (assumed" in said


def test_published_weights_bring_their_view(tmp_path, photo, capsys):
    name = Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name
    torch.save(create_model("resnet18", 1000).state_dict(), tmp_path / name)
    predict.main(["--weights", str(tmp_path / name), str(photo), "--model.arch=resnet18"])
    said = capsys.readouterr().out
    assert "224 px, crop ratio 0.875, bilinear" in said and "defaults" not in said
    assert "ImageNet's, sorted by wnid, are assumed" in said


def test_wrong_use_is_one_error(tmp_path, photo, capsys):
    torch.save(create_model("timm/test_resnet", 10).state_dict(), tmp_path / "bare.pth")
    bare = ["--weights", str(tmp_path / "bare.pth")]
    with pytest.raises(ValueError, match="does not say which network it is: add --model.arch=NAME"):
        predict.main([*bare, str(photo)])
    with pytest.raises(ValueError, match="has no head.weight, .*: check model.arch"):
        predict.main([*bare, str(photo), "--model.arch=timm/test_vit"])
    (tmp_path / "text.jpg").write_text("no image")
    weights = ["--weights", str(write_weights(tmp_path))]
    with pytest.raises(ValueError, match=r"text.jpg: .*; give an image"):
        predict.main([*weights, str(tmp_path / "text.jpg")])
    for flags, words in (
        ([*weights, "nowhere.jpg"], "nowhere.jpg is not a file"),
        ([*weights, str(photo), "--top=3"], "--top=3 is neither an argument nor a setting"),
        ([*weights, str(photo), "--data.resize=area", "--data.backend=torchvision"], "area needs"),
    ):
        with pytest.raises(SystemExit) as stop:
            predict.main(flags)
        assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_six_lines_of_torchvision_say_the_same(tmp_path, photo, monkeypatch, capsys):
    """The program in docs/evaluation.md, on a network without BlurPool."""
    norm = dict(zip(("mean", "std"), map(list, IMAGENET), strict=True))
    weights = write_weights(tmp_path, "torchvision", "resnet50", **norm)
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import torchvision,.*?)```", text, re.S)
    assert len(list(filter(None, program.split("\n")))) == 6
    for old, new in (("num_classes=1000", "num_classes=10"), ("photo.jpg", photo.name)):
        assert old in program
        program = program.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    (row,) = re.findall(r"indices=tensor\(\[\[(.*)\]\]", capsys.readouterr().out)
    predict.main([str(photo), "--weights", str(weights), "--validation.resolution=224",
                  "--validation.crop_ratio=0.875", "--validation.lr_tta=0"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [WNIDS.index(line.split()[2]) for line in lines] == [*map(int, row.split(","))]
