"""A network for other programs: ONNX, the file of torch.export, or a folder that timm opens.

    python -m tools.export --weights runs/NAME/weights.safetensors --to onnx
    python -m tools.export --weights runs/NAME/weights.safetensors --to timm --out my_resnet50

All three take float32 images [b, 3, r, r], normalized, and give logits [b, K]. Mean, std, size and
classes are written with them. What was written is read back, run on images and compared with the
network that it came from: on the given images, else on ten of the built-in synthetic dataset.
Nothing is left of a result that differs.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from fast_imagenet.engine.weights import refuse_misfit
from fast_imagenet.models.origin import input_norm
from fast_imagenet.models.small_maps import SmallMapConv2d
from fast_imagenet.program import run_program
from fast_imagenet.sources import open_source
from tools.arguments import parse
from tools.network import FileNetwork, open_network, read_image, resize_filter

TOLERANCE = 1e-4  # largest difference of logits, as a fraction of the largest logit
ENDS = {"onnx": ".onnx", "pt2": ".pt2", "timm": "_timm"}
ONNX = ("onnx", "onnxscript", "onnxruntime")
ABOUT = "fast_imagenet"  # key of what is written with the network


def main(argv: list[str] | None = None) -> None:
    """Export, compare, and give the result its name."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.export", None, __doc__, formatter_class=form)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="to compare on")
    parser.add_argument("--to", required=True, choices=ENDS, help="the format")
    parser.add_argument("--out", type=Path, help="file, of timm folder (beside the weights)")
    args = parse(parser, argv)
    weights = Path(args.weights)
    out = args.out or weights.with_name(weights.stem + ENDS[args.to])
    if out.exists() or not out.absolute().parent.is_dir():
        what = "is there already" if out.exists() else "is in no folder that exists"
        parser.error(f"--out={out} {what}: choose another name")
    if args.to == "onnx" and (missing := [name for name in ONNX if not find_spec(name)]):
        parser.error(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    network = open_network(args.weights, args.flags, "-m tools.export")
    for module in network.model.modules():
        if type(module) is SmallMapConv2d:  # chooses by size, and a graph would keep the choice
            module.__class__ = nn.Conv2d
    network.model.to(memory_format=torch.contiguous_format)
    export(network, args.to, out, args.images)


@torch.no_grad()
def export(network: FileNetwork, to: str, out: Path, paths: list[str]) -> None:
    """Write one of WRITERS, and give it its name where its logits are those of the network.

    Raises:
        ValueError: they are not, or the format cannot hold the network.
    """
    synthetic = open_source("synthetic", "", "val", size=10)
    images = [read_image(path) for path in paths] or [*map(synthetic.pixels, range(10))]
    images_bchw = network.inputs(images).contiguous()
    wanted_bk = network.model(images_bchw)
    with TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as folder:
        place = Path(folder) / out.name
        found_bk = WRITERS[to](network, images_bchw, place)
        difference = float((found_bk - wanted_bk).abs().max() / wanted_bk.abs().max())
        where = "given images" if paths else "images of the built-in synthetic dataset"
        compared = f"on {len(images)} {where} logits differ by {difference:.1e} of the largest"
        if not difference <= TOLERANCE:
            raise ValueError(f"--to {to}: {compared}, more than {TOLERANCE:g}; nothing was written")
        os.replace(place, out)
    print(f"{out}: {compared} ({TOLERANCE:g} is allowed)")


def write_onnx(network: FileNetwork, images_bchw: torch.Tensor, path: Path) -> torch.Tensor:
    """Write ONNX; the logits that onnxruntime computes from it."""
    import onnxruntime

    how: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "verbose": False}
    program = torch.onnx.export(network.model, dynamo=True, **_example(images_bchw), **how)
    program.model.metadata_props[ABOUT] = json.dumps(_about(network))
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits_bk,) = session.run(["logits"], {"images": images_bchw.numpy()})
    return torch.from_numpy(logits_bk)


def write_pt2(network: FileNetwork, images_bchw: torch.Tensor, path: Path) -> torch.Tensor:
    """Write the file of torch.export; the logits of what torch.export.load makes of it."""
    program = torch.export.export(network.model, **_example(images_bchw))
    torch.export.save(program, path, extra_files={ABOUT: json.dumps(_about(network))})
    return torch.export.load(path).module()(images_bchw)


def write_timm(network: FileNetwork, images_bchw: torch.Tensor, path: Path) -> torch.Tensor:
    """Write model.safetensors and config.json; the logits of timm's network with these weights.

    Raises:
        ValueError: timm has no such network.
    """
    name, about = network.cfg.model.arch.rpartition("/")[2], _about(network)
    if network.model.origin.blurpool:
        raise ValueError(
            "--to timm: the network has BlurPool, which timm cannot build: it blurs before each "
            "strided convolution, timm's aa_layer after it; use --to onnx or --to pt2"
        )
    if not timm.is_model(name):
        raise ValueError(f"--to timm: timm has no {name}; use --to onnx or --to pt2")
    options = {"num_classes": len(network.classes)}
    model, state = timm.create_model(name, **options), network.model.state_dict()
    refuse_misfit(model.state_dict(), state, f"--to timm: the weights, in timm's {name},")
    model.load_state_dict(state)
    card = options | {"input_size": tuple(images_bchw.shape[1:]), "crop_mode": "center"}
    card |= dict.fromkeys(("tag", "license", "origin_url", "paper_ids"))  # of timm's own weights
    card |= {"crop_pct": about["crop_ratio"], "test_input_size": None, "test_crop_pct": None}
    card |= {key: about[key] for key in ("mean", "std", "interpolation")}
    if card["interpolation"] == "area":
        print("note: timm has no area filter, config.json says bilinear")
        card["interpolation"] = "bilinear"
    config = {"pretrained_cfg": card, "label_names": network.classes}
    save_for_hf(model, str(path), model_config=config, safe_serialization=True)
    made = timm.create_model(name, checkpoint_path=str(path / "model.safetensors"), **options)
    return made.eval()(images_bchw)


WRITERS = {"onnx": write_onnx, "pt2": write_pt2, "timm": write_timm}


def _example(images_bchw: torch.Tensor) -> dict[str, Any]:
    """Arguments of an exporter: two images, of which there may be any number."""
    sizes = ({0: torch.export.Dim("batch")},)
    return {"args": (torch.zeros(2, *images_bchw.shape[1:]),), "dynamic_shapes": sizes}


def _about(network: FileNetwork) -> dict[str, Any]:
    """What the network needs, and what its outputs mean."""
    (mean, std), view = input_norm(network.model), network.cfg.validation
    about: dict[str, Any] = {"arch": network.cfg.model.arch, "classes": network.classes}
    about |= {"mean": mean, "std": std, "resolution": view.resolution}
    return about | {"crop_ratio": view.crop_ratio, "interpolation": resize_filter(network.cfg)}


if __name__ == "__main__":
    run_program("export", main)
