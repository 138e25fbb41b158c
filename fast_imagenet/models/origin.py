"""What a file of weights says about its network, and what has to be assumed where it says nothing.

A network is more than its state dict: BlurPool has the names of the convolution that it replaces,
and mean and std of the images and the order of the classes have no names at all. Our own files
record them. Of another maker's they are read beside the weights, taken from the library's metadata
or assumed, and `Origin.line` reports which.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torchvision
from timm.models import get_pretrained_cfg
from torch import nn

from fast_imagenet.data.augmentation import IMAGENET, Triple
from fast_imagenet.data.class_lists import class_list, difference, same_names
from fast_imagenet.engine.weights import load_weights
from fast_imagenet.models.layers import plain_model
from fast_imagenet.terminal import readable

Norm = tuple[Triple, Triple]  # mean and std, for pixels in 0..1

NORMALIZATIONS: dict[str, Norm] = {
    "imagenet": IMAGENET,
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class Origin:
    """How a network is to be built and fed for its weights.

    Attributes:
        blurpool, blur_max_pool: whether it has BlurPool, and whether at max pooling too.
        mean, std: of its images.
        weights: which of the file's: 'EMA weights', 'raw weights', or 'weights'.
        line: what was assumed or decided, for the user; '' for nothing.
    """

    blurpool: bool
    mean: Triple = IMAGENET[0]
    std: Triple = IMAGENET[1]
    weights: str = "weights"
    line: str = ""
    blur_max_pool: bool = False

    def report(self) -> None:
        """Print the line, on one rank."""
        if self.line and os.environ.get("RANK", "0") == "0":
            print(self.line, flush=True)


def new_origin(cfg: SimpleNamespace) -> Origin:
    """Origin of a network with fresh weights: as the settings say."""
    norm = NORMALIZATIONS.get(cfg.model.normalization, IMAGENET)
    options = cfg.training
    return Origin(options.use_blurpool, *norm, blur_max_pool=options.blur_max_pool)


def origin_of(info: dict[str, Any], cfg: SimpleNamespace, num_classes: int) -> Origin:
    """Origin of the file `cfg.model.checkpoint`.

    Args:
        info: as `load_weights` returns it.
        cfg: settings, with the place that each was given at (`read_config`).
        num_classes: of the data.

    Raises:
        ValueError: the file is another network's, or its BlurPool is not the settings'; or the
            settings must say whether a network to train has it; or its mean and std are invalid.
    """
    kinds: dict[Any, str] = {True: "EMA weights", False: "raw weights"}
    weights = kinds.get(info.get("ema"), "weights")
    if isinstance(info.get("use_blurpool"), bool):
        return _own(info, cfg, weights)
    blurpool, blur_words = _foreign_blurpool(info, cfg)
    (mean, std), norm_words = _foreign_normalization(info, cfg, num_classes)
    parts = [blur_words, norm_words, _order_words(info.get("label_names"))]
    arch = info.get("arch")
    if isinstance(arch, str) and _bare(arch) != _bare(cfg.model.arch):
        parts.insert(0, f"model.arch={cfg.model.arch}, although the file says {arch}")
    line = f"{cfg.model.checkpoint} does not say how it was trained: {'; '.join(parts)}"
    pools = blurpool and cfg.training.blur_max_pool and not info.get("blur_filters")
    return Origin(blurpool, mean, std, weights, line, pools)


def input_norm(model: nn.Module) -> Norm:
    """Mean and std of the images that a network takes; ImageNet's unless its weights need others.

    Args:
        model: as `build_model` made it, plain or wrapped.
    """
    return getattr(plain_model(model), "input_norm", IMAGENET)


def check_classes(checkpoint: str, dataset: str, loader: Any) -> None:
    """Refuse weights that were trained on other classes than the data has, or in another order.

    Args:
        checkpoint: file; '' passes.
        dataset: file of the data.
        loader: of the data.
    Raises:
        ValueError: with the first class that differs.
    """
    info = load_weights(checkpoint)[1] if checkpoint else {}
    classes, others = info.get("classes"), info.get("label_names")  # ours, timm's
    if classes is None and loader.classes and same_names(others, loader.classes):
        classes = others  # names of the same kind as the data's: their order counts
    if not isinstance(classes, list):
        return
    if wrong := [name for name in classes if not isinstance(name, str)]:
        raise ValueError(f"{checkpoint} names a class {wrong[0]!r:.80}, not text; use another copy")
    if fault := difference(class_list(classes), loader):
        raise ValueError(
            f"{checkpoint} was trained on other classes than {dataset} has: {fault}; give weights "
            f"and data of one class list"
        )


def _own(info: dict[str, Any], cfg: SimpleNamespace, weights: str) -> Origin:
    name, lines = cfg.model.checkpoint, []
    blurred = {key: info.get(key) is True for key in ("use_blurpool", "blur_max_pool")}
    arch = info.get("arch")
    if isinstance(arch, str) and _bare(arch) != _bare(cfg.model.arch):
        raise ValueError(f"{name} is a {arch}, not model.arch={cfg.model.arch}: set that to {arch}")
    for key, value in blurred.items():
        if value == getattr(cfg.training, key):
            continue
        if not cfg.training.eval_only:
            raise ValueError(f"{name} was trained with {key}={value}; set training.{key}={value}")
        lines.append(f"{name} was trained with {key}={value}, and is evaluated so")
    norm = _norm_of(info, name) or IMAGENET
    asked = NORMALIZATIONS.get(cfg.model.normalization, norm)
    if asked != norm:
        raise ValueError(
            f"{name} was trained with mean and std {_words(norm)}, not with {_words(asked)}: leave "
            f"out model.normalization={cfg.model.normalization}"
        )
    blurpool, pools = blurred.values()
    return Origin(blurpool, *norm, weights, "; ".join(lines), pools)


def _foreign_blurpool(info: dict[str, Any], cfg: SimpleNamespace) -> tuple[bool, str]:
    """Whether a network of another maker has BlurPool, and why."""
    place = getattr(cfg, "_places", {}).get("training.use_blurpool")
    if info.get("blur_filters"):
        return True, "BlurPool (its tensors have the filters)"
    if not cfg.training.eval_only and place is None:
        raise ValueError(
            f"{cfg.model.checkpoint} does not say whether its network has BlurPool: set "
            f"training.use_blurpool=false to train it as it is, or true to put BlurPool in"
        )
    # a config is the recipe of a training: what it says of BlurPool is not of these weights
    if cfg.training.use_blurpool and (place == "command line" or not cfg.training.eval_only):
        return True, "BlurPool, as training.use_blurpool asks for"
    hint = " (--training.use_blurpool=true puts it in)" if place != "command line" else ""
    return False, f"no BlurPool{hint}"


def _foreign_normalization(
    info: dict[str, Any], cfg: SimpleNamespace, num_classes: int
) -> tuple[Norm, str]:
    """(mean, std) of a network of another maker, and where they are from."""
    if cfg.model.normalization != "auto":
        norm = NORMALIZATIONS[cfg.model.normalization]
        return norm, f"mean and std {_words(norm)}, as model.normalization asks for"
    if found := _norm_of(info, cfg.model.checkpoint):
        return found, f"mean and std {_words(found)}, which are in the file or beside it"
    norm, classes, source = _metadata(cfg.model.arch)
    tagged = "." in _name(cfg.model.arch)
    if classes == num_classes or tagged or info.get("timm_script"):
        return norm, f"mean and std {_words(norm)}, from {source}"
    other = f"; {source} says {_words(norm)}" if norm != IMAGENET else ""
    return IMAGENET, f"mean and std of ImageNet (assumed{other}; model.normalization names others)"


def _norm_of(info: dict[str, Any], name: str) -> Norm | None:
    """(mean, std) of a file that says them, or None.

    Raises:
        ValueError: they cannot be a mean and a std.
    """
    said = info.get("mean"), info.get("std")
    if said == (None, None):
        return None
    norm = _pair(*said)
    if not norm or min(norm[1]) <= 0:
        raise ValueError(
            f"{name} says mean={said[0]!r:.60} and std={said[1]!r:.60}: give three finite numbers "
            f"each, std above 0, in the file or beside it"
        )
    return norm


def _order_words(labels: Any) -> str:
    """What is assumed of the classes; `labels` are those of timm's config.json, if it has any."""
    found = ""
    if isinstance(labels, list) and labels:
        more = ", ..." if len(labels) > 5 else ""
        found = f"; config.json says {readable(', '.join(map(str, labels[:5])))}{more}"
    return f"classes in the order of the data (assumed{found})"


def _metadata(arch: str) -> tuple[Norm, int, str]:
    """(mean, std), number of classes and name of what a library says of its own weights."""
    library, name = arch.rpartition("/")[0], _name(arch)
    if library != "timm" and name in torchvision.models.list_models(torchvision.models):
        weights = list(torchvision.models.get_model_weights(name))
        if not weights:
            return IMAGENET, 0, "torchvision"
        # these two turn ImageNet's numbers into 0.5 themselves, where torchvision loads the weights
        turned = name in ("googlenet", "inception_v3")
        view = weights[-1].transforms()
        norm = NORMALIZATIONS["inception"] if turned else _pair(view.mean, view.std)
        return norm or IMAGENET, len(weights[-1].meta["categories"]), f"torchvision's {name}"
    card = get_pretrained_cfg(name, allow_unregistered=True)
    norm = _pair(card.mean, card.std) if card else None
    if not card or not norm:
        return IMAGENET, 0, "timm"
    tag = f".{card.tag}" if card.tag and "." not in name else ""
    return norm, card.num_classes or 0, f"timm's {name}{tag}"


def _name(arch: str) -> str:
    return arch.rpartition("/")[2]


def _bare(arch: str) -> str:
    return _name(arch).partition(".")[0]


def _words(norm: Norm) -> str:
    """'of ImageNet', or the numbers."""
    if norm == IMAGENET:
        return "of ImageNet"
    return " and ".join(str(tuple(round(x, 4) for x in part)) for part in norm)


def _pair(mean: Any, std: Any) -> Norm | None:
    """Three finite numbers each; None for anything else."""
    one, two = _triple(mean), _triple(std)
    return (one, two) if one and two else None


def _triple(value: Any) -> Triple | None:
    """Three finite numbers as a tuple; None for anything else."""
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return None
    numbers = all(type(x) in (int, float) and abs(x) < 1e6 for x in value)
    return (float(value[0]), float(value[1]), float(value[2])) if numbers else None
