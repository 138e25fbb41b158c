"""Exported networks compute the same, or nothing is written."""

import json

import pytest
import timm
import torch

from fast_imagenet.engine.weights import load_weights
from fast_imagenet.models.factory import create_model
from tests.tools.test_predict import WNIDS, photo, write_weights  # noqa: F401  a fixture
from tools import export
from tools.network import open_network


def run(weights, to, *flags):
    export.main(["--weights", str(weights), "--to", to, *flags])
    return weights.with_name(f"weights{export.ENDS[to]}")


def inputs(weights, count=3):
    """Random images as the network takes them, and its logits."""
    network = open_network(str(weights), [], "test")
    images_bchw = torch.randn(count, 3, 40, 40)
    with torch.no_grad():
        return images_bchw, network.model(images_bchw)


def plain_network(weights, arch):
    model = create_model(arch, 10).eval()
    model.load_state_dict(load_weights(weights)[0])
    return model


@pytest.mark.slow
def test_pt2_keeps_blurpool(tmp_path, capsys):
    weights = write_weights(tmp_path, arch="resnet18", use_blurpool=True, blur_max_pool=True)
    out = run(weights, "pt2")
    said = capsys.readouterr().out
    assert "on 10 images of the built-in synthetic dataset logits differ by" in said
    extra = {export.ABOUT: ""}
    program = torch.export.load(out, extra_files=extra)
    about = json.loads(extra[export.ABOUT])
    assert (about["classes"], about["mean"], about["resolution"]) == (WNIDS, [0.5, 0.5, 0.5], 40)
    images_bchw, wanted_bk = inputs(weights)
    torch.testing.assert_close(program.module()(images_bchw), wanted_bk)
    with torch.no_grad():
        plain_bk = plain_network(weights, "resnet18")(images_bchw)
        assert (plain_bk - wanted_bk).abs().max() > 0.01  # BlurPool counts


@pytest.mark.slow
def test_onnx_takes_any_number_of_images(tmp_path):
    for name in export.ONNX:
        pytest.importorskip(name)
    import onnxruntime

    weights = write_weights(tmp_path, arch="resnet18", use_blurpool=True)
    session = onnxruntime.InferenceSession(str(run(weights, "onnx")))
    about = json.loads(session.get_modelmeta().custom_metadata_map[export.ABOUT])
    assert (about["classes"], about["interpolation"]) == (WNIDS, "area")
    for count in (1, 3):
        images_bchw, wanted_bk = inputs(weights, count)
        (logits_bk,) = session.run(None, {"images": images_bchw.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits_bk), wanted_bk, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["resnet18", "timm/test_resnet"])
def test_timm_opens_its_folder(tmp_path, photo, capsys, arch):  # noqa: F811
    """With equal logits, by both of its ways; and our tools read what it says of the view."""
    weights = write_weights(tmp_path, "torchvision", arch)
    out = run(weights, "timm", str(photo))
    assert "on 1 given images logits differ by 0.0e+00" in capsys.readouterr().out
    images_bchw = torch.randn(3, 3, 40, 40)
    name, file = arch.rpartition("/")[2], str(out / "model.safetensors")
    first = timm.create_model(name, num_classes=10, checkpoint_path=file).eval()
    second = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        wanted_bk = plain_network(weights, arch)(images_bchw)
        assert torch.equal(first(images_bchw), wanted_bk)
        assert torch.equal(second(images_bchw), wanted_bk)
    card = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert not any(card[key] for key in ("tag", "license", "origin_url", "paper_ids"))  # timm's
    view = timm.data.resolve_model_data_config(second)
    assert (view["input_size"], view["crop_pct"], view["interpolation"]) == (
        (3, 40, 40), 0.8, "bilinear")  # fmt: skip
    assert (*view["mean"], *view["std"]) == (0.5, 0.5, 0.5, 0.25, 0.25, 0.25)
    again = open_network(file, [], "test")
    assert again.classes == WNIDS
    assert (again.cfg.validation.resolution, again.cfg.validation.crop_ratio) == (40, 0.8)


def test_timm_cannot_hold_every_network(tmp_path):
    blurred = write_weights(tmp_path, arch="resnet18", use_blurpool=True)
    with pytest.raises(ValueError, match="BlurPool, which timm cannot build: .* use --to onnx"):
        run(blurred, "timm")
    other = write_weights(tmp_path, arch="mobilenet_v3_small")
    with pytest.raises(ValueError, match="timm"):
        run(other, "timm")
    assert not (tmp_path / "weights_timm").exists()


def test_of_a_result_that_differs_nothing_is_left(tmp_path, monkeypatch, capsys):
    weights = write_weights(tmp_path)
    before = sorted(tmp_path.iterdir())

    def write(network, images_bchw, path):
        path.write_text("wrong")
        return network.model(images_bchw) * 1.001

    monkeypatch.setitem(export.WRITERS, "pt2", write)
    with pytest.raises(ValueError, match=r"--to pt2: .* differ by 1.0e-03 .*nothing was written"):
        run(weights, "pt2")
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(SystemExit) as stop:
        run(weights, "pt2", f"--out={weights}")
    assert stop.value.code == 2 and "is there already" in capsys.readouterr().err
