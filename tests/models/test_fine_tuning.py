"""Training from weights of any maker: what is taken, what is held, and the rates."""

import argparse
import datetime
import json
import random
import re

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from timm.optim import param_groups_layer_decay
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

import train_imagenet
from fast_imagenet.engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fast_imagenet.engine.distributed import Distributed
from fast_imagenet.engine.weights import load_weights, save_weights
from fast_imagenet.models.fine_tuning import freeze, head_of, lr_scales, take_weights
from fast_imagenet.models.origin import bring_view

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = ["--data.backend=torchvision", "--model.arch=resnet18"]
EVAL = [*TRAIN, "--training.eval_only=1"]


def network(classes=10, arch="resnet18", seed=1):
    torch.manual_seed(seed)
    model = timm.create_model(arch.removeprefix("timm/"), num_classes=classes)
    if arch == "resnet18":
        model = torchvision.models.resnet18(num_classes=classes)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model.eval()


def settings(**changes):
    values = {"new_head": False, "use_ema": True} | changes
    return argparse.Namespace(**values)


# ── Checkpoints of other trainers ─────────────────────────────────────────────────────────────────


def composer(raw, ema=None, blurred=False):
    """As Composer saves a ComposerClassifier, with its generators and its clock."""
    state, average = ({f"module.{k}": v for k, v in x.items()} for x in (raw, ema or {}))
    if blurred:
        state["module.maxpool.filt2d"] = torch.ones(64, 1, 3, 3)
        for name in [n for n in state if "downsample.0" in n]:
            state[name.replace(".weight", ".conv.weight")] = state.pop(name)
            state[name.replace("weight", "blur_filter")] = torch.ones(64, 1, 3, 3)
    entry = {"repr": "EMA()", "ema_started": True, "ema_weights_active": True}
    entry |= {"ema_model": average, "training_model": state}
    generators = {"python": random.getstate(), "numpy": np.random.get_state()}
    generators["torch"] = torch.get_rng_state()
    content = {
        "model": average if ema else state,
        "timestamp": {"total_wct": datetime.timedelta(1)},
    }
    content["algorithms"] = [("LabelSmoothing", {"repr": ""}), ("EMA", entry)][: 2 if ema else 1]
    return {"state": content, "rng": [generators]}


def lightning(raw, ema=None, part="model."):
    state, average = ({f"{part}{k}": v for k, v in x.items()} for x in (raw, ema or {}))
    extra = {"pytorch-lightning_version": "2.6.0", "hyper_parameters": {"lr": 0.1}, "loops": {}}
    if not ema:
        return {"state_dict": state | {"loss.weight": torch.ones(10)}} | extra
    return {"state_dict": average, "current_model_state": state} | extra


def in_one_dict(raw, ema):
    """An EMA kept as a second network of a LightningModule."""
    both = {f"model.{k}": v for k, v in raw.items()}
    return {"state_dict": both | {f"ema_model.module.{k}": v for k, v in ema.items()}}


def torchvision_script(raw, ema):
    average = {f"module.{k}": v for k, v in ema.items()} | {"n_averaged": torch.tensor(3)}
    args = argparse.Namespace(model="resnet18", lr=0.1)
    return {"model": raw, "model_ema": average, "epoch": 3, "args": args}


MAKERS = [composer, lightning, in_one_dict, torchvision_script]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("use_ema", [True, False])
def test_the_ema_of_a_trainers_checkpoint_is_taken_where_there_is_one(tmp_path, make, use_ema):
    raw, ema = network(seed=1).state_dict(), network(seed=2).state_dict()
    torch.save(make(raw, ema), tmp_path / "w.pt")
    state, info = load_weights(tmp_path / "w.pt", ema=use_ema)
    model = network(seed=3)
    words = take_weights(model, state, settings(use_ema=use_ema), 10, "w.pt")
    expected = ema if use_ema else raw
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    assert info["ema"] is use_ema or ("ema" in words) is use_ema


@pytest.mark.parametrize("make", [composer, lightning])
def test_a_trainers_checkpoint_without_an_ema(tmp_path, make):
    raw = network().state_dict()
    torch.save(make(raw), tmp_path / "w.pt")
    state, _ = load_weights(tmp_path / "w.pt", ema=True)
    model = network(seed=3)
    words = take_weights(model, state, settings(), 10, "w.pt")
    assert all(torch.equal(v, raw[k]) for k, v in model.state_dict().items())
    assert ("not the 1 others" in words) == (make is lightning)


def test_composers_blurpool_is_recognized(tmp_path):
    torch.save(composer(network().state_dict(), blurred=True), tmp_path / "w.pt")
    state, info = load_weights(tmp_path / "w.pt", ema=True)
    assert state.keys() == network().state_dict().keys()
    cfg = train_imagenet_settings(f"--model.checkpoint={tmp_path}/w.pt")
    model = train_imagenet.build_model(cfg, 10, torch.device("cpu"))
    assert info["blur_filters"] and type(model.maxpool).__name__ == "BlurMaxPool2d"
    assert cfg.training.use_blurpool and cfg.training.blur_max_pool  # as the run's files will say


def test_several_networks_in_a_file_are_named():
    state = {
        f"{n}.{k}": v for n in ("student", "teacher") for k, v in network().state_dict().items()
    }
    with pytest.raises(CheckpointError, match=r"several networks \(student., teacher.\)"):
        take_weights(network(), state, settings(), 10, "w.pt")


# ── A new head ────────────────────────────────────────────────────────────────────────────────────


def train_imagenet_settings(*flags):
    cfg = train_imagenet.read_config(train_imagenet.SETTINGS, [*flags], prog="t", description="")
    cfg.model.arch = "resnet18" if cfg.model.arch == "resnet50" else cfg.model.arch
    return cfg


@pytest.mark.parametrize("classes", [7, 10])
def test_a_new_head_keeps_the_body(quick_run, tmp_path, capsys, classes):
    old = network(classes).state_dict()
    torch.save(old, tmp_path / "w.pth")
    flags = [*TRAIN, f"--model.checkpoint={tmp_path}/w.pth", "--lr.lr=0"]
    if classes == 7:
        with pytest.raises(ValueError, match="has 7 classes, and the data has 10: set model.new_"):
            quick_run(*flags)
    folder = quick_run(*flags, "--model.new_head=1")
    said = capsys.readouterr().out
    assert f"tensors taken, not fc.weight ({classes}, 512), fc.bias ({classes},); new fc" in said
    new = load_weights(folder / "weights.safetensors")[0]
    parameters = [name for name, _ in network().named_parameters() if not name.startswith("fc.")]
    assert all(torch.equal(new[name], old[name]) for name in parameters)
    assert new["fc.weight"].shape == (10, 512)
    assert not torch.equal(new["fc.weight"][:7], old["fc.weight"][:7])


def test_weights_of_other_classes_train_with_a_new_head(quick_run, tmp_path):
    folder = quick_run(*TRAIN)
    info = json.loads((folder / "weights.json").read_text())
    info["classes"] = info["classes"][::-1]
    (folder / "weights.json").write_text(json.dumps(info))
    flags = [*TRAIN, f"--model.checkpoint={folder}/weights.safetensors"]
    with pytest.raises(ValueError, match="other classes than .* or set model.new_head=true"):
        quick_run(*flags, folder=tmp_path / "other")
    quick_run(*flags, "--model.new_head=1", folder=tmp_path / "other")


# ── Frozen parameters, rates ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("compile", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_a_frozen_backbone_stays_as_it_is(quick_run, tmp_path, compile):
    old = network().state_dict()
    torch.save(old, tmp_path / "w.pth")
    flags = [*TRAIN, f"--model.checkpoint={tmp_path}/w.pth", "--training.freeze=backbone"]
    few = ["--training.max_steps=3", f"--training.compile={compile}", "--ema.decay=0.5"]
    folder = quick_run(*flags, *few, "--training.weight_decay=0.1")
    new = load_checkpoint(folder / "last.pt")
    for part in ("model", "ema"):
        changed = {name for name, value in new[part].items() if not torch.equal(value, old[name])}
        assert changed == {"fc.weight", "fc.bias"}


def test_patterns_freeze_what_they_name():
    model = network()
    freeze(model, "conv1.*, bn1.*,layer1.*", 10)
    trained = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4", "fc"}
    model.train()
    assert not model.bn1.training and not model.layer1[0].bn1.training
    assert model.layer2[0].bn1.training and model.layer1.training
    with pytest.raises(ValueError, match="no parameter is called layer9.*; they are conv1.weight"):
        freeze(network(), "bn1.*,layer9.*", 10)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(network(), "*", 10)


def rates(model, *flags):
    cfg = train_imagenet_settings(*flags)
    options = cfg.training
    scales = lr_scales(model, cfg.lr, 10)
    optimizer = train_imagenet.build_optimizer(options, model, scales)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(one)]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for one in group["params"]
    }


def test_head_and_layers_have_their_rates():
    found = rates(network(), "--lr.head_multiplier=10")
    assert found["fc.weight"] == (10, 1e-4) and found["fc.bias"] == (10, 0)
    assert {scale for name, (scale, _) in found.items() if "fc" not in name} == {1}
    with pytest.raises(ValueError, match="lr.layer_decay=0.5 needs a network of timm"):
        rates(network(), "--lr.layer_decay=0.5")


@pytest.mark.parametrize("arch", ["test_vit", "resnet18d"])
def test_layer_decay_is_timms(arch):
    model = timm.create_model(arch, num_classes=10)
    found = rates(model, "--lr.layer_decay=0.5", "--lr.head_multiplier=3")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head = head_of(model, 10)
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        for one in group["params"]:
            name = names[id(one)]
            expected = group["lr_scale"] * (3 if name.startswith(head) else 1)
            assert found[name][0] == pytest.approx(expected), name


def test_a_step_moves_each_group_by_its_rate():
    flags = ["--lr.head_multiplier=4", "--lr.lr=1", "--training.momentum=0", "--lr.lr_peak_epoch=0"]
    cfg = train_imagenet_settings(*flags, "--training.weight_decay=0")
    model = network().train()
    networks = train_imagenet.wrap_model(model, cfg, Distributed(0, 1, 1, torch.device("cpu")))
    state = train_imagenet.build_state(
        cfg, networks, 10, 5, Distributed(0, 1, 1, torch.device("cpu"))
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda g, name=name: gradients.__setitem__(name, g.clone()))
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    _, lr = train_imagenet.train_step(state, (images, torch.arange(4), np.arange(4)), 0)
    for name, parameter in model.named_parameters():
        factor = 4 if name.startswith("fc.") else 1
        torch.testing.assert_close(parameter, before[name] - factor * lr * gradients[name])


def test_resuming_with_frozen_parts_and_rates_is_exact(quick_run, tmp_path):
    arch = "--model.arch=timm/test_resnet"
    torch.save(network(arch="timm/test_resnet").state_dict(), tmp_path / "w.pth")
    flags = ["--data.backend=torchvision", arch, f"--model.checkpoint={tmp_path}/w.pth"]
    flags += ["--model.new_head=1", "--training.freeze=conv1.*,bn1.*", "--ema.decay=0.9"]
    flags += ["--lr.layer_decay=0.7", "--lr.head_multiplier=5", "--training.resume=auto"]
    whole = quick_run(*flags, "--training.max_steps=7", folder=tmp_path / "whole")
    for steps in (3, 7):
        parts = quick_run(*flags, f"--training.max_steps={steps}", folder=tmp_path / "parts")
    one, two = (load_checkpoint(folder / "last.pt") for folder in (whole, parts))
    for part in ("model", "ema"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    two["optimizer"]["param_groups"][-1]["lr_scale"] = 9
    save_checkpoint(parts / "last.pt", two)
    with pytest.raises(ValueError, match="its optimizer has .*'lr_scale': 9"):
        quick_run(*flags, "--training.max_steps=9", folder=parts)


# ── The libraries' own weights, and how they are evaluated ────────────────────────────────────────


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Both libraries' caches in a new folder, and no connection; cached(arch) puts weights in."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def no_connection(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_connection)

    def put(arch):
        state = network(1000, arch).state_dict()
        if arch == "resnet18":
            path = tmp_path / "torch/hub/checkpoints/resnet18-f37072fd.pth"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path)
            return state
        folder = tmp_path / "hf/models--timm--test_resnet.r160_in1k"
        for name in ("refs", "snapshots/1"):
            (folder / name).mkdir(parents=True)
        (folder / "refs/main").write_text("1")
        safetensors.torch.save_file(state, folder / "snapshots/1/model.safetensors")
        return state

    return put


@pytest.mark.parametrize("arch, size", [("resnet18", 224), ("timm/test_resnet", 160)])
def test_the_librarys_own_weights(cached, quick_run, tmp_path, capsys, arch, size):
    flags = ["--data.backend=torchvision", f"--model.arch={arch}", "--model.pretrained=1"]
    source = "torchvision's resnet18, IMAGENET1K_V1"
    source = source if arch == "resnet18" else "timm's test_resnet.r160_in1k"
    with pytest.raises(ValueError, match=f"model.pretrained=true: weights of {source} are not in"):
        quick_run(*flags, "--model.new_head=1")
    assert not (tmp_path / "run").exists()
    state = cached(arch)
    with pytest.raises(ValueError, match="model.pretrained has 1000 classes, and the data has 10:"):
        quick_run(*flags)
    capsys.readouterr()
    folder = quick_run(*flags, "--model.new_head=1", "--training.max_steps=1", "--lr.lr=0")
    said = capsys.readouterr().out
    assert f"{source}: no BlurPool" in said and "new fc.weight, fc.bias for 10 classes" in said
    assert f"validation.resolution=32 instead of {size}" in said
    new, info = load_weights(folder / "weights.safetensors")
    assert all(torch.equal(new[n], state[n]) for n, p in network(10, arch).named_parameters()
               if "fc" not in n)  # fmt: skip
    assert info["use_blurpool"] is False
    assert info["mean"] == [0.485, 0.456, 0.406] if arch == "resnet18" else [0.5, 0.5, 0.5]


@pytest.mark.parametrize("arch, file, view", [
    ("resnet50", "resnet50-11ad3fa6.pth", (224, 0.9655, "bilinear")),
    ("resnet50", "resnet50-0676ba61.pth", (224, 0.875, "bilinear")),
    ("resnet50", "", (224, 0.9655, "bilinear")),
    ("resnet50", "mine.pth", (224, 0.875, "auto")),
    ("timm/test_resnet", "", (160, 0.95, "bilinear")),
    ("timm/resnet50", "", (288, 1.0, "bicubic")),
    ("timm/x", "model.safetensors", (48, 0.9, "bicubic")),
])  # fmt: skip
def test_known_weights_are_evaluated_as_they_were_published(tmp_path, capsys, arch, file, view):
    card = {"input_size": [3, 48, 48], "crop_pct": 0.9, "interpolation": "bicubic"}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": card}))
    pretrained = "" if file else "--model.pretrained=true"
    weights = f"--model.checkpoint={tmp_path / file}" if file else "--training.epochs=9"
    given = [f"--model.arch={arch}", weights, pretrained or "--training.epochs=9"]
    cfg = train_imagenet.read_config(train_imagenet.SETTINGS, given, prog="t", description="")
    bring_view(cfg)
    assert (cfg.validation.resolution, cfg.validation.crop_ratio, cfg.data.resize) == view
    given += ["--validation.resolution=64", "--data.resize=auto", "--validation.crop_ratio=0.5"]
    cfg = train_imagenet.read_config(train_imagenet.SETTINGS, given, prog="t", description="")
    bring_view(cfg)
    assert (cfg.validation.resolution, cfg.data.resize) == (64, "auto")
    said = capsys.readouterr().out.splitlines()[-1:]
    assert said == [] or f"validation.resolution=64 instead of {view[0]}" in said[0]
    assert bool(said) == (file != "mine.pth")


def test_a_file_of_ours_is_evaluated_as_in_its_run(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    view = {"validation.resolution": 48, "validation.lr_tta": False}
    view |= {"validation.plain_resolution": 56, "validation.plain_crop_ratio": 0.5}
    view |= {"data.backend": "ffcv", "data.resize": "area"}  # a filter that torchvision has not
    save_weights(path, network().state_dict(), {"arch": "resnet18", "view": view})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "{model: {pretrained: true, new_head: true, arch: resnet18}, validation: {lr_tta: true}}"
    )
    (tmp_path / "val").mkdir()
    given = [
        f"--config={recipe}",
        f"--model.checkpoint={path}",
        f"--data.val_dataset={tmp_path}/val",
    ]
    given += [f"--data.train_dataset={tmp_path}/val", "--data.backend=torchvision"]
    given += ["--training.use_blurpool=false", "--training.eval_only=true"]
    cfg = train_imagenet.read_settings(given)
    bring_view(cfg)
    assert (cfg.validation.resolution, cfg.validation.lr_tta) == (48, True)
    assert (cfg.validation.plain_resolution, cfg.validation.plain_crop_ratio) == (56, 0.5)
    assert (cfg.data.backend, cfg.data.resize) == ("torchvision", "auto")
    assert not cfg.model.pretrained and not cfg.model.new_head
    assert "validation.lr_tta=True instead of False" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # a flag is meant
        train_imagenet.read_settings([*given, "--model.new_head=true"])
    assert "model.new_head" in capsys.readouterr().err


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder val/ of ten classes: 40 images of 64 x 80 and 90 x 64 px, of structure and noise."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(40):
        height, width = ((64, 80), (90, 64))[number % 2]
        coarse = rng.integers(256, size=(4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        place = folder / "val" / f"class{number % 10}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place)
    return folder / "val"


def fitted(arch, images, preset):
    """A network of 10 classes whose answers on `images` differ: its head is fitted to them."""
    model = network(10, arch)
    data = torchvision.datasets.ImageFolder(images, preset)
    inputs = torch.stack([image for image, _ in data])
    with torch.no_grad():
        logits = model(inputs)
        model.fc.weight.mul_(1 / logits.std())
        model.fc.bias.copy_(-model(inputs).mean(0))
        return model, model(inputs), torch.tensor(data.targets)


@pytest.mark.parametrize("maker", ["torchvision", "timm"])
@pytest.mark.parametrize("backend", ["torchvision"])
def test_an_evaluation_is_that_of_plain_torch_code(images, tmp_path, monkeypatch, capsys, maker,
                                                   backend):  # fmt: skip
    """Decoding, resizing and cropping included: no image is answered differently."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if maker == "torchvision":
        arch, path = "resnet18", tmp_path / "w.pth"
        kind = InterpolationMode.BILINEAR
        preset = ImageClassification(crop_size=56, resize_size=64, mean=mean, std=std,
                                     interpolation=kind)  # fmt: skip
        model, expected, labels = fitted(arch, images, preset)
        torch.save(model.state_dict(), path)
        flags = ["--validation.resolution=56"]
    else:
        arch, path = "timm/test_resnet", tmp_path / "model.safetensors"
        card = {"input_size": (3, 48, 48), "crop_pct": 0.75, "interpolation": "bicubic"}
        card |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        config = timm.data.resolve_data_config(pretrained_cfg=card)
        model, expected, labels = fitted(arch, images, timm.data.create_transform(**config))
        safetensors.torch.save_file(model.state_dict(), path)
        path.with_name("config.json").write_text(json.dumps({"pretrained_cfg": card}))
        flags = []
    seen, add = [], train_imagenet.Score.add
    monkeypatch.setattr(
        train_imagenet.Score, "add", lambda s, x, y: (seen.append(x.clone()), add(s, x, y))
    )
    flags += ["--training.eval_only=1", f"--model.arch={arch}", f"--model.checkpoint={path}"]
    flags += [f"--data.val_dataset={images}", f"--data.backend={backend}", "--data.num_workers=1"]
    train_imagenet.main(train_imagenet.read_settings([*flags, "--validation.batch_size=64"]))
    logits = seen[-1]
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    assert len(expected.argmax(1).unique()) > 3
    top1 = 100 * (expected.argmax(1) == labels).float().mean()
    assert re.search(rf"config eval .* {top1:.2f} %", capsys.readouterr().out)
