"""What a file of weights says about its network, and what has to be assumed where it says nothing.

A network is more than its state dict: BlurPool has the names of the convolution that it replaces,
and mean and std of the images and the order of the classes have no names at all. Our own files
record them. Of another maker's they are read beside the weights, taken from the library's metadata
or assumed, and `Origin.line` reports which.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
import torchvision
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg
from torch import nn

from fast_imagenet.data.augmentation import IMAGENET, RESIZES, Triple
from fast_imagenet.data.class_lists import class_list, difference, same_names
from fast_imagenet.engine.checkpoint import first_line
from fast_imagenet.engine.weights import load_weights, read_card, view_of
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

    def report(self, more: str = "") -> None:
        """Print the line, and `more`, on one rank."""
        if os.environ.get("RANK", "0") == "0":
            print(*(f"{line}\n" for line in (self.line, more) if line), sep="", end="", flush=True)


@dataclass(frozen=True)
class Card:
    """What a library says of weights of its own.

    Attributes:
        norm: mean and std of the images.
        classes: how many; 0 = unknown.
        source: the library and its name of them.
        view: the settings of the evaluation that they were published with.
        weights: torchvision's, None of timm's.
    """

    norm: Norm = IMAGENET
    classes: int = 0
    source: str = "timm"
    view: dict[str, Any] = field(default_factory=dict)
    weights: Any = None


def weights_of(cfg: SimpleNamespace) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights that the settings name, and what is known of them; as load_weights.

    Of a file also `sizes`: first dimensions of its tensors, of which one is the number of classes.

    Raises:
        ValueError: those of a library are not in its cache and cannot be fetched.
    """
    if not cfg.model.pretrained:
        state, said = load_weights(cfg.model.checkpoint, ema=cfg.model.use_ema)
        return state, said | {"sizes": {len(v) for v in state.values() if v.dim()}}
    card, name = library_card(cfg.model.arch), _name(cfg.model.arch)
    try:
        if card.weights:
            state = card.weights.get_state_dict(progress=False, check_hash=True)
        else:
            state = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of the network, of two caches, or there are no weights
        raise ValueError(
            f"model.pretrained=true: weights of {card.source} are not in its cache and cannot be "
            f"fetched ({first_line(error)}); start once with a connection, or give a file as "
            f"model.checkpoint"
        ) from error
    info: dict[str, Any] = {"library": card.source}
    if card.classes == 1000:  # of ImageNet, in the order of its identifiers
        info["label_names"] = ImageNetInfo("imagenet-1k").label_names()
    return state, info


def bring_view(cfg: SimpleNamespace) -> dict[str, Any]:
    """Evaluate known weights as they were published, where the settings do not say how.

    Known are those of model.pretrained, a file that has a library's name of it, one beside timm's
    config.json and, for an evaluation, one of ours. Changes the settings that were not given, and
    prints them and the others.

    Returns:
        Those that are known: section.key -> value.
    """
    if not (cfg.model.checkpoint or cfg.model.pretrained):
        return {}
    evaluated = cfg.model.checkpoint if cfg.training.eval_only else ""
    if evaluated:  # these are of the training that a config describes
        cfg.model.pretrained = cfg.model.new_head = False
    card = library_card(cfg.model.arch, Path(cfg.model.checkpoint).name)
    known = cfg.model.pretrained or (card.weights and cfg.model.checkpoint)
    view, source = card.view if known else {}, card.source
    if cfg.model.checkpoint and not known:
        view, source = _timm_view(read_card(cfg.model.checkpoint)), "config.json"
    if evaluated and not view:
        view, source = view_of(load_weights(evaluated)[1]), evaluated
        if view.pop("data.backend", "") != cfg.data.backend:  # has other filters
            view.pop("data.resize", None)
    ours = {key: _setting(cfg, key) for key in view}
    changed = {key: view[key] for key in view if key not in _places(cfg) and ours[key] != view[key]}
    kept = [f"{key}={ours[key]} instead of {view[key]}" for key in view
            if key not in changed and ours[key] != view[key]]  # fmt: skip
    for key, value in changed.items():
        section, name = key.split(".")
        setattr(getattr(cfg, section), name, value)
    parts = [f"{key}={value}" for key, value in changed.items()]
    parts += [f"kept as given: {', '.join(kept)}"] if kept else []
    line = f"{source} says how its weights are evaluated: {'; '.join(parts)}" if parts else ""
    Origin(False, line=line).report()
    return view


def new_origin(cfg: SimpleNamespace) -> Origin:
    """Origin of a network with fresh weights: as the settings say."""
    norm = NORMALIZATIONS.get(cfg.model.normalization, IMAGENET)
    options = cfg.training
    return Origin(options.use_blurpool, *norm, blur_max_pool=options.blur_max_pool)


def origin_of(info: dict[str, Any], cfg: SimpleNamespace) -> Origin:
    """Origin of the weights that the settings name; sets training.use_blurpool to what they have.

    Args:
        info: as `weights_of` returns it.
        cfg: settings, with the place that each was given at (`read_config`).

    Raises:
        ValueError: the file is another network's, or its BlurPool is not the one asked for; or its
            mean and std are invalid.
    """
    kinds: dict[Any, str] = {True: "EMA weights", False: "raw weights"}
    weights = kinds.get(info.get("ema"), "weights")
    own = isinstance(info.get("use_blurpool"), bool)
    origin = (_own if own else _foreign)(info, cfg, weights)
    options = cfg.training
    options.use_blurpool, options.blur_max_pool = origin.blurpool, origin.blur_max_pool
    return origin


def _foreign(info: dict[str, Any], cfg: SimpleNamespace, weights: str) -> Origin:
    blurpool, blur_words = _foreign_blurpool(info, cfg)
    (mean, std), norm_words = _foreign_normalization(info, cfg)
    parts = [blur_words, norm_words]
    if cfg.data.val_dataset and not cfg.model.new_head:
        parts.append(_order_words(info.get("label_names")))
    arch = info.get("arch")
    if isinstance(arch, str) and _bare(arch) != _bare(cfg.model.arch):
        parts.insert(0, f"model.arch={cfg.model.arch}, although the file says {arch}")
    if info.get("ema"):
        parts.insert(0, "its EMA weights are taken (model.use_ema)")
    start = info.get("library") or f"{cfg.model.checkpoint} does not say how it was trained"
    asked = blurpool and cfg.training.blur_max_pool and not info.get("blur_filters")
    pools = bool(info.get("pool_filters") or asked)
    return Origin(blurpool, mean, std, weights, f"{start}: {'; '.join(parts)}", pools)


def input_norm(model: nn.Module) -> Norm:
    """Mean and std of the images that a network takes; ImageNet's unless its weights need others.

    Args:
        model: as `build_model` made it, plain or wrapped.
    """
    return getattr(plain_model(model), "input_norm", IMAGENET)


def check_classes(cfg: SimpleNamespace, dataset: str, loader: Any) -> None:
    """Refuse weights that were trained on other classes than the data has, or in another order.

    Args:
        cfg: settings; a new head, or no weights, passes.
        dataset: file of the data.
        loader: of the data.
    Raises:
        ValueError: with the first class that differs.
    """
    if cfg.model.new_head or not (cfg.model.checkpoint or cfg.model.pretrained):
        return
    info, checkpoint = weights_of(cfg)[1], cfg.model.checkpoint or "model.pretrained"
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
            f"and data of one class list, or set model.new_head=true to draw a new head"
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
        if not cfg.training.eval_only and f"training.{key}" in _places(cfg):
            raise ValueError(f"{name} was trained with {key}={value}; set training.{key}={value}")
        done = "evaluated" if cfg.training.eval_only else "trained"
        lines.append(f"{name} was trained with {key}={value}, and is {done} so")
    if info.get("ema") and not cfg.training.eval_only:  # an evaluation's last line says it
        lines.append(f"{name}: its EMA weights are taken (model.use_ema)")
    if cfg.data.val_dataset and not info.get("classes") and not cfg.model.new_head:
        lines.append(f"{name} has no class list: its order is taken on trust")
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
    place = _places(cfg).get("training.use_blurpool")
    if info.get("blur_filters"):
        return True, "BlurPool (its tensors have the filters)"
    # a config is the recipe of a training: evaluated, its BlurPool is not that of these weights
    if cfg.training.use_blurpool and (
        place == "command line" or (place and not cfg.training.eval_only)
    ):
        return True, "BlurPool, as training.use_blurpool asks for"
    hint = " (--training.use_blurpool=true puts it in)" if place != "command line" else ""
    return False, f"no BlurPool{hint}"


def _foreign_normalization(info: dict[str, Any], cfg: SimpleNamespace) -> tuple[Norm, str]:
    """(mean, std) of a network of another maker, and where they are from."""
    if cfg.model.normalization != "auto":
        norm = NORMALIZATIONS[cfg.model.normalization]
        return norm, f"mean and std {_words(norm)}, as model.normalization asks for"
    if found := _norm_of(info, cfg.model.checkpoint):
        return found, f"mean and std {_words(found)}, which are in the file or beside it"
    card = library_card(cfg.model.arch, Path(cfg.model.checkpoint).name)
    norm, source, tagged = card.norm, card.source, "." in _name(cfg.model.arch)
    known = cfg.model.pretrained or tagged or info.get("timm_script")
    if known or card.classes in info["sizes"]:  # of the file: the data may get a new head
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
    """What is assumed of the classes; `labels` are those of its metadata, if it has any."""
    found = ""
    if isinstance(labels, list) and labels:
        more = ", ..." if len(labels) > 5 else ""
        found = f"; its metadata says {readable(', '.join(map(str, labels[:5])))}{more}"
    return f"classes in the order of the data (taken on trust{found})"


def library_card(arch: str, file: str = "") -> Card:
    """What a library says of its own weights of a network: of the newest, or the default ones.

    Args:
        arch: as create_model takes it.
        file: name of a file; of torchvision's one, that is it. `weights` is None where a file is
            named that is not torchvision's.
    """
    library, name = arch.rpartition("/")[0], _name(arch)
    if library != "timm" and name in torchvision.models.list_models(torchvision.models):
        kinds = torchvision.models.get_model_weights(name)
        named = next((one for one in kinds if Path(one.url).name == file), None)
        weights = named or kinds.DEFAULT
        # these two turn ImageNet's numbers into 0.5 themselves, where torchvision loads the weights
        turned = name in ("googlenet", "inception_v3")
        view = weights.transforms()
        norm = NORMALIZATIONS["inception"] if turned else _pair(view.mean, view.std)
        size, kind = view.crop_size[0], view.interpolation.value
        how = _view(size, size / view.resize_size[0], kind)
        source = f"torchvision's {name}, {weights.name}"
        classes = len(weights.meta["categories"])
        return Card(norm or IMAGENET, classes, source, how, named if file else weights)
    card = get_pretrained_cfg(name, allow_unregistered=True)
    norm = _pair(card.mean, card.std) if card else None
    if not card or not norm:
        return Card(source=f"timm's {name}")
    tag = f".{card.tag}" if card.tag and "." not in name else ""
    how = _timm_view(vars(card))
    return Card(norm, card.num_classes or 0, f"timm's {name}{tag}", how)


def _timm_view(card: dict[str, Any]) -> dict[str, Any]:
    """As timm's validate.py takes it from a pretrained_cfg; {} where that has no sizes."""
    size = card.get("test_input_size") or card.get("input_size")
    ratio = card.get("test_crop_pct") or card.get("crop_pct")
    if not isinstance(size, (list, tuple)) or not isinstance(ratio, (int, float)):
        return {}
    return _view(size[-1], ratio, card.get("interpolation"))


def _view(size: int, crop_ratio: float, interpolation: Any) -> dict[str, Any]:
    view = {"validation.resolution": size, "validation.crop_ratio": round(crop_ratio, 4)}
    if interpolation in RESIZES:
        view["data.resize"] = interpolation
    return view


def _setting(cfg: SimpleNamespace, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(cfg, section), name)


def _places(cfg: SimpleNamespace) -> dict[str, str]:
    """Where each given setting was given."""
    return getattr(cfg, "_places", {})


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
