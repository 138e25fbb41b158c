"""Weights of any maker are evaluated as the network that they were trained as."""

import argparse
import json

import pytest
import safetensors.torch
import timm
import torch
import torchvision

import train_imagenet
from fast_imagenet.data.torch_loader import TorchEvalLoader
from fast_imagenet.engine.checkpoint import load_checkpoint, save_checkpoint
from fast_imagenet.engine.weights import load_weights
from fast_imagenet.models.blurpool import apply_blurpool

EVAL = ["--data.backend=torchvision", "--training.eval_only=1"]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

pytestmark = pytest.mark.usefixtures("one_thread")


def network(arch, classes=10, blurpool=False):
    torch.manual_seed(1)
    make = torchvision.models.get_model if arch == "resnet18" else timm.create_model
    model = make(arch.removeprefix("timm/"), num_classes=classes)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    if blurpool:
        apply_blurpool(model)
    return model.eval()


def plain_logits(model, tiny_beton, norm):
    """What plain torch code gives for the validation images of 32 px."""
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in norm)
    loader, logits = TorchEvalLoader(tiny_beton / "val.beton", batch_size=16, num_workers=1), []
    for images_bhwc, _ in loader.batches(32, 0.875):
        images_bchw = images_bhwc.permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            logits.append(model((images_bchw - mean) / std))
    loader.close()
    return torch.cat(logits)


@pytest.fixture
def evaluated(quick_run, monkeypatch, capsys):
    """evaluated(*flags, config=None) -> (logits of the validation images, what was printed)."""

    def run(*flags, config=None):
        seen, add = [], train_imagenet.Score.add
        monkeypatch.setattr(
            train_imagenet.Score, "add", lambda s, x, y: (seen.append(x.clone()), add(s, x, y))
        )
        arch = [] if config else ["--model.arch=resnet18"]
        quick_run(*EVAL, "--validation.lr_tta=0", *arch, *flags, config=config)
        monkeypatch.setattr(train_imagenet.Score, "add", add)
        logits = torch.cat(seen[::2])  # each batch is scored under both protocols
        return logits, capsys.readouterr().out

    return run


def save_as(kind, path, arch, model):
    """A file of weights as its makers write it; the flags for it beyond its name."""
    state = model.state_dict()
    args = argparse.Namespace(model=arch.removeprefix("timm/"), mean=None, std=None)
    if kind == "safetensors beside timm's config.json":
        safetensors.torch.save_file(state, path.with_suffix(".safetensors"))
        card = {"pretrained_cfg": {"mean": HALF[0], "std": HALF[1]}}
        path.with_name("config.json").write_text(json.dumps(card))
        return path.with_suffix(".safetensors")
    content = {
        "bare": state,
        "timm's script": {"state_dict": state, "arch": args.model, "args": args},
        "timm's script with a mean": {
            "state_dict": state,
            "args": argparse.Namespace(model="x", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]),
        },
        "torch's example": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }[kind]
    torch.save(content, path)
    return path


OTHERS = [
    ("bare", "resnet18", IMAGENET),
    ("torch's example", "resnet18", IMAGENET),
    ("bare", "timm/test_resnet", IMAGENET),  # not the ten classes of timm's own weights
    ("bare", "timm/test_resnet.r160_in1k", HALF),
    ("timm's script", "timm/test_resnet", HALF),
    ("timm's script with a mean", "timm/test_resnet", ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
    ("safetensors beside timm's config.json", "timm/test_resnet", HALF),
]


@pytest.mark.parametrize("kind, arch, norm", OTHERS)
def test_weights_of_another_maker_are_evaluated_as_plain_torch_does(
    evaluated, tiny_beton, tmp_path, kind, arch, norm
):
    """With the command of README: its config is the recipe of a training with BlurPool."""
    model = network(arch)
    path = save_as(kind, tmp_path / "weights.pth", arch, model)
    flags = [f"--model.checkpoint={path}", f"--model.arch={arch}"]
    logits, said = evaluated(*flags, config="rn18_16_epochs.yaml")
    expected = plain_logits(model, tiny_beton, norm)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    line = next(line for line in said.splitlines() if "does not say how it was trained" in line)
    assert "no BlurPool (--training.use_blurpool=true" in line and "order of the data" in line
    assert ("of ImageNet" in line) == (norm == IMAGENET)


def test_blurpool_goes_into_weights_of_another_maker_when_asked(evaluated, tiny_beton, tmp_path):
    torch.save(network("resnet18").state_dict(), tmp_path / "w.pth")
    logits, said = evaluated(f"--model.checkpoint={tmp_path}/w.pth", "--training.use_blurpool=true")
    expected = plain_logits(network("resnet18", blurpool=True), tiny_beton, IMAGENET)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert "BlurPool, as training.use_blurpool asks for" in said


def test_blur_filters_in_a_file_are_blurpool(evaluated, tiny_beton, tmp_path):
    """As ffcv-imagenet names them."""
    model = network("resnet18", blurpool=True)
    state = model.state_dict()
    for name, layer in model.named_modules():
        if type(layer).__name__ == "BlurPoolConv2d":
            state[f"{name}.conv.weight"] = state.pop(f"{name}.weight")
            state[f"{name}.blur_filter"] = layer.blur
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pt")
    logits, said = evaluated(f"--model.checkpoint={tmp_path}/w.pt")
    expected = plain_logits(model, tiny_beton, IMAGENET)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert "BlurPool (its tensors have the filters)" in said


def test_a_normalization_that_is_asked_for(evaluated, tiny_beton, tmp_path):
    torch.save(network("resnet18").state_dict(), tmp_path / "w.pth")
    logits, _ = evaluated(f"--model.checkpoint={tmp_path}/w.pth", "--model.normalization=inception")
    expected = plain_logits(network("resnet18"), tiny_beton, HALF)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights.safetensors", "last.pt", "without its JSON"])
@pytest.mark.parametrize("blurpool", [True, False])
def test_our_own_file_says_what_it_is(quick_run, evaluated, tiny_beton, blurpool, name):
    flags = [f"--training.use_blurpool={blurpool}", "--training.max_steps=2", "--ema.decay=0"]
    folder = quick_run("--data.backend=torchvision", "--model.arch=resnet18", *flags)
    path = folder / ("weights.safetensors" if "JSON" in name else name)
    if "JSON" in name:
        (folder / "weights.json").unlink()
    logits, said = evaluated(
        f"--model.checkpoint={path}",
        f"--training.use_blurpool={not blurpool}",
    )
    model = network("resnet18", blurpool=blurpool)
    model.load_state_dict(load_weights(path)[0])
    torch.testing.assert_close(
        logits, plain_logits(model, tiny_beton, IMAGENET), rtol=1e-3, atol=1e-3
    )
    assert f"was trained with use_blurpool={blurpool}, and is evaluated so" in said
    other = f"--model.checkpoint={path}", "--model.arch=timm/resnet18d"
    with pytest.raises(ValueError, match="is a resnet18, not model.arch=timm/resnet18d: set"):
        quick_run(*EVAL, *other)


def test_our_own_file_says_that_max_pooling_is_blurred(quick_run, evaluated, tiny_beton):
    flags = ["--data.backend=torchvision", "--model.arch=resnet18", "--training.max_steps=2"]
    folder = quick_run(*flags, "--training.blur_max_pool=true", "--training.use_blurpool=true")
    for name in ("weights.safetensors", "last.pt"):
        logits, said = evaluated(f"--model.checkpoint={folder}/{name}")
        model = network("resnet18")
        apply_blurpool(model, max_pool=True)
        model.load_state_dict(load_weights(folder / name)[0])
        expected = plain_logits(model, tiny_beton, IMAGENET)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert "was trained with blur_max_pool=True, and is evaluated so" in said


def test_weights_that_say_nothing_of_blurpool_are_trained_without(quick_run, tmp_path, capsys):
    torch.save(network("timm/test_resnet").state_dict(), tmp_path / "w.pth")
    flags = ["--data.backend=torchvision", "--model.arch=timm/test_resnet"]
    flags.append(f"--model.checkpoint={tmp_path}/w.pth")
    flags.append("--model.normalization=clip")
    folder = quick_run(*flags, "--training.max_steps=1", folder=tmp_path / "run")
    assert "does not say how it was trained: no BlurPool" in capsys.readouterr().out
    info = load_weights(folder / "weights.safetensors")[1]
    assert info["use_blurpool"] is info["config"]["training"]["use_blurpool"] is False
    assert info["mean"] == pytest.approx([0.481, 0.458, 0.408], abs=1e-3)
    state = load_checkpoint(folder / "last.pt")
    del state["format"], state["info"]["mean"]  # of an earlier version: ImageNet's
    save_checkpoint(folder / "last.pt", state)
    with pytest.raises(ValueError, match="other settings .mean and std of the images: "):
        quick_run(*flags, "--training.resume=auto", folder=folder)


def test_the_weights_that_chose_best_are_those_evaluated(quick_run, capsys):
    flags = ["--data.backend=torchvision", "--model.arch=timm/test_resnet", "--lr.lr=1"]
    more = ["--training.epochs=2", "--lr.lr_peak_epoch=1", "--training.max_steps=0"]
    folder = quick_run(*flags, *more, "--ema.decay=0.98")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    best = max(log, key=lambda line: line["ema_top1"])
    for file in ("best.pt", "last.pt"):
        line = best if file == "best.pt" else log[-1]
        for ema, words, key in (("true", "EMA", "ema_top1"), ("false", "raw", "top1")):
            if key not in line:  # raw weights are evaluated at the end
                continue
            quick_run(
                *flags, *EVAL, f"--model.checkpoint={folder}/{file}", f"--model.use_ema={ema}"
            )
            *_, config, said = capsys.readouterr().out.strip().splitlines()
            assert f"{words} weights of {folder}/{file}" in said
            assert config.split()[:5] == ["config", "eval", "32", "px", f"{line[key]:.2f}"]


def test_timms_config_names_network_and_classes(evaluated, tmp_path):
    """Other networks can have equal tensors, and other classes an equal number."""
    arch = "timm/test_resnet"
    path = save_as(OTHERS[-1][0], tmp_path / "w.pth", arch, network(arch))
    labels = [f"class {number}" for number in range(9, -1, -1)]
    card = {"mean": HALF[0], "std": HALF[1]}
    config = {"architecture": "test_resnet_b", "label_names": labels, "pretrained_cfg": card}
    path.with_name("config.json").write_text(json.dumps(config))
    _, said = evaluated(f"--model.checkpoint={path}", f"--model.arch={arch}")
    assert "model.arch=timm/test_resnet, although the file says test_resnet_b" in said
    assert (
        "(taken on trust; its metadata says class 9, class 8, class 7, class 6, class 5, ...)"
        in said
    )


def test_the_normalization_of_a_new_network_is_kept(quick_run):
    arch = "--model.arch=timm/test_resnet"
    few = ["--data.backend=torchvision", arch, "--training.max_steps=1"]
    folder = quick_run(*few, "--model.normalization=inception")
    path = folder / "weights.safetensors"
    assert load_weights(path)[1]["mean"] == [0.5, 0.5, 0.5]
    own = [*EVAL, arch, f"--model.checkpoint={path}"]
    quick_run(*own, "--model.normalization=inception")
    with pytest.raises(ValueError, match=r"std \(0.5, .* leave out model.normalization=imagenet"):
        quick_run(*own, "--model.normalization=imagenet")


def test_a_new_head_has_the_normalization_of_the_body(quick_run, tmp_path):
    """Whose weights they are is told by the classes of the file, not by those of the data."""
    for classes, norm in ((1000, HALF), (7, IMAGENET)):
        path, folder = tmp_path / f"{classes}.pth", tmp_path / f"run{classes}"
        torch.save(network("timm/test_resnet", classes).state_dict(), path)
        flags = ["--data.backend=torchvision", f"--model.checkpoint={path}", "--model.new_head=1"]
        quick_run("--model.arch=timm/test_resnet", *flags, folder=folder)
        info = load_weights(folder / "weights.safetensors")[1]
        assert (tuple(info["mean"]), tuple(info["std"])) == norm


def test_which_of_two_networks_in_a_dict_was_evaluated_is_not_guessed(evaluated, tmp_path):
    state = network("resnet18").state_dict()
    both = {f"{part}.{key}": value for part in ("model", "ema") for key, value in state.items()}
    torch.save({"state_dict": both}, tmp_path / "both.pt")
    _, said = evaluated(f"--model.checkpoint={tmp_path}/both.pt")
    assert "tensors ema.*" in said and "; weights of " in said


def test_timms_config_with_the_classes_in_another_order_is_refused(evaluated, tiny_beton, tmp_path):
    """Names of the data's own kind: in another order every answer would mean another class."""
    arch = "timm/test_resnet"
    path = save_as(OTHERS[-1][0], tmp_path / "w.pth", arch, network(arch))
    classes = TorchEvalLoader(tiny_beton / "val.beton", batch_size=16).classes
    card = {"architecture": "test_resnet", "pretrained_cfg": {"mean": HALF[0], "std": HALF[1]}}
    for order in (1, -1):
        config = card | {"label_names": classes[::order]}
        path.with_name("config.json").write_text(json.dumps(config))
        if order == 1:
            evaluated(f"--model.checkpoint={path}", f"--model.arch={arch}")
            continue
        with pytest.raises(ValueError, match="trained on other classes than .* class 0 is"):
            evaluated(f"--model.checkpoint={path}", f"--model.arch={arch}")


@pytest.mark.parametrize("std", [[0, 0, 0], [1, 1], "1", [0.2, -0.2, 0.2], [float("nan")] * 3])
def test_mean_and_std_that_cannot_be_are_refused(evaluated, tmp_path, std):
    arch = "timm/test_resnet"
    path = save_as(OTHERS[-1][0], tmp_path / "w.pth", arch, network(arch))
    config = {"architecture": "test_resnet", "pretrained_cfg": {"mean": HALF[0], "std": std}}
    path.with_name("config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="says mean=.* give three finite numbers each, std above"):
        evaluated(f"--model.checkpoint={path}", f"--model.arch={arch}")
