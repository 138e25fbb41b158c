"""A network from a file of weights alone, and images as its validation sees them; for tools.

Arrays: rgb_hwc uint8 [height, width, 3]; images_bhwc uint8 [b, r, r, 3], what the validation's
decoder gives; images_bchw float32, normalized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import train_imagenet as script
from fast_imagenet.config import read_config
from fast_imagenet.data.device_transforms import normalize_and_mix
from fast_imagenet.data.ffcv_loader import resize_method
from fast_imagenet.data.samples import INTERPOLATION, center_crop, crop_and_resize
from fast_imagenet.engine.weights import load_weights, plain_names, read_card, view_of
from fast_imagenet.models.factory import create_model
from fast_imagenet.models.fine_tuning import head_of
from fast_imagenet.models.origin import bring_view, input_norm
from fast_imagenet.ops import CenterCropDecode
from fast_imagenet.sources.base import ImageError
from fast_imagenet.sources.decode import REPAIRED, decode_rgb
from fast_imagenet.validation import validate
from tools.report.yaml_files import flags_of

VIEW = ("validation.resolution", "validation.crop_ratio", "data.resize")
NOTES = {
    "exif_orientation": "is taken as stored: its EXIF orientation is not applied, as in training",
    REPAIRED: "is damaged: a part of it is guessed",
}


@dataclass(frozen=True)
class FileNetwork:
    """A network as its file describes it.

    Attributes:
        cfg: settings that an evaluation of the file has.
        model: in eval mode, on the CPU; `input_norm` has its mean and std.
        classes: identifiers in the order of the labels.
    """

    cfg: SimpleNamespace
    model: Any
    classes: list[str]

    def inputs(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """images_bchw of rgb_hwc of any sizes, as the config eval makes them."""
        return normalize_and_mix(self._view(images), *input_norm(self.model), None)

    def _view(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        size, ratio = self.cfg.validation.resolution, self.cfg.validation.crop_ratio
        if self.cfg.data.backend == "torchvision":
            boxes = [center_crop(*image.shape[:2], 0, ratio) for image in images]
            chw = [torch.tensor(image).permute(2, 0, 1) for image in images]
            how = size, self.cfg.data.resize
            return torch.stack([crop_and_resize(*x, *how) for x in zip(chw, boxes, strict=True)])
        decoder = CenterCropDecode(size, ratio, method=resize_method(self.cfg.data.resize))
        beyond = np.zeros(64, np.uint8)  # the decoder looks a little beyond the end
        pixels = [np.concatenate([image.ravel(), beyond]) for image in images]
        pairs = zip(pixels, images, strict=True)
        samples = np.array([(p.ctypes.data, x.size, 1, *x.shape[:2]) for p, x in pairs], np.int64)
        crops = decoder.draw(np.arange(len(images)), *samples[:, 3:].T, decoder.output_size)
        images_bhwc = np.empty((len(images), size, size, 3), np.uint8)
        decoder.apply(samples, crops, images_bhwc)
        return torch.from_numpy(images_bhwc)

    @torch.no_grad()
    def logits(self, images_bchw: torch.Tensor) -> torch.Tensor:
        """Logits [b, K], averaged with those of the mirrored images where the config eval is."""
        logits_bk = self.model(images_bchw)
        if not self.cfg.validation.lr_tta:
            return logits_bk
        return (logits_bk + self.model(images_bchw.flip(3))) / 2


def open_network(weights: str, flags: list[str], prog: str) -> FileNetwork:
    """The network of a file; prints what the file does not say.

    Args:
        weights: any file that model.checkpoint takes.
        flags: settings, --section.key=value; they win over what the file says.
        prog: the tool, for messages.

    Raises:
        ValueError: the file is damaged, or does not say which network it is and the flags neither.
    """
    state, info = load_weights(weights)
    said = {"training.eval_only": True, "model.checkpoint": weights, "data.val_dataset": ""}
    said |= view_of(info)
    blurred = ("use_blurpool", "blur_max_pool")
    said |= {f"training.{key}": info[key] for key in blurred if isinstance(info.get(key), bool)}
    if isinstance(arch := info.get("arch"), str):
        of_timm = "/" not in arch and (info.get("timm_script") or read_card(weights))
        said["model.arch"] = f"timm/{arch}" if of_timm else arch
    elif not any(flag.startswith("--model.arch=") for flag in flags):
        raise ValueError(f"{weights} does not say which network it is: add --model.arch=NAME")
    words = [*flags_of(said), *flags]
    cfg = read_config(script.SETTINGS, words, check=_problems, prog=prog, description="")
    known = bring_view(cfg)
    count = _count_classes(cfg, state)
    model = script.build_model(cfg, count, torch.device("cpu")).eval()
    print(f"{model.origin.weights} of {weights}: {cfg.model.arch}, {count:,} classes")
    unsaid = ", ".join(key for key in VIEW if key not in known and key not in cfg._places)
    print(_view_words(cfg) + f" ({unsaid}: defaults, the file does not say)" * bool(unsaid))
    return FileNetwork(cfg, model, _classes(info, count, weights))


def read_image(path: str | Path) -> np.ndarray:
    """rgb_hwc of a file; prints what makes it another image than a viewer shows.

    Raises:
        ValueError: it is not an image, with its name.
    """
    try:
        rgb_hwc, kinds = decode_rgb(Path(path).read_bytes(), str(path))
    except ImageError as error:
        raise ValueError(f"{path}: {error}; give an image") from error
    print(*(f"note: {path} {NOTES[kind]}\n" for kind in kinds if kind in NOTES), sep="", end="")
    return rgb_hwc


def resize_filter(cfg: SimpleNamespace) -> str:
    """Name of the filter that data.resize stands for."""
    if cfg.data.backend == "torchvision":
        return INTERPOLATION[cfg.data.resize].value
    return resize_method(cfg.data.resize)


def _problems(cfg: SimpleNamespace) -> list[str]:
    return [problem for problem in validate(cfg) if not problem.startswith("data.val_dataset")]


def _view_words(cfg: SimpleNamespace) -> str:
    v = cfg.validation
    flip = ", averaged with the mirrored image" if v.lr_tta else ""
    return f"images: {v.resolution} px, crop ratio {v.crop_ratio:g}, {resize_filter(cfg)}{flip}"


def _count_classes(cfg: SimpleNamespace, state: dict[str, torch.Tensor]) -> int:
    """Outputs of the classifying layer in the file."""
    model = create_model(cfg.model.arch, 1000)
    state, _ = plain_names(state, model.state_dict(), cfg.model.use_ema)
    name = f"{head_of(model, 1000)}weight"
    if name not in state:
        what = f"{cfg.model.checkpoint} has no {name}, which the classes of {cfg.model.arch} have"
        raise ValueError(f"{what}: check model.arch")
    return len(state[name])


def _classes(info: dict[str, Any], count: int, weights: str) -> list[str]:
    """Identifiers of the classes: the file's, else ImageNet's if they are 1,000, else numbers."""
    found = info.get("classes") or info.get("label_names")
    if isinstance(found, list) and len(found) == count:
        return list(map(str, found))
    if count != 1000:
        print(f"{weights} does not name its classes: they are shown as numbers")
        return list(map(str, range(count)))
    print(f"{weights} does not name its classes: ImageNet's, sorted by wnid, are assumed")
    from timm.data import ImageNetInfo

    return ImageNetInfo().label_names()
