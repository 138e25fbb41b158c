"""Weights anyone can load: safetensors with a JSON of what made them; files of other programs."""

from __future__ import annotations

import argparse
import hashlib
import json
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from fast_imagenet.engine.checkpoint import (
    CheckpointError,
    entry_of,
    first_line,
    load_run_checkpoint,
    refuse_beyond_memory,
)
from fast_imagenet.engine.json_lines import read_object
from fast_imagenet.files import write_atomically, write_json
from fast_imagenet.models.layers import plain_model

# Where the weights are in a checkpoint: ours and torchvision's reference scripts say model, timm
# says state_dict. A file with none of these is taken to be a state dict itself.
RAW_KEYS = ("model", "state_dict")
EMA_KEYS = ("ema", "model_ema", "state_dict_ema")
# Of timm's and torchvision's training scripts: their command line. Of Composer: states of
# generators, as numpy's arrays, and seconds.
INERT: list[Any] = [argparse.Namespace, timedelta, np.ndarray, np.dtype, np.dtypes.UInt32DType]
_MADE: Any = np.zeros(0).__reduce__()[0]  # what pickle makes an array with
INERT += [(_MADE, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
EMBEDDED: tuple[str, ...] = ("arch", "num_classes", "classes", "mean", "std", "weights")
EMBEDDED += ("use_blurpool", "blur_max_pool")
# Settings of how the weights were evaluated
VIEW = (
    *("data.backend", "data.resize", "validation.resolution", "validation.crop_ratio"),
    *("validation.plain_resolution", "validation.plain_crop_ratio", "validation.lr_tta"),
)


def save_weights(path: str | Path, model_state: dict[str, torch.Tensor], info: dict) -> None:
    """Write weights.safetensors and, beside it, weights.json.

    Args:
        path: *.safetensors; the JSON takes the same stem.
        model_state: state dict of the plain network; wrappers' prefixes are removed.
        info: what made the weights (arch, classes, config, top-1 ...), JSON values only. The
            JSON also gets `sha256` of the weights, by which a pair that does not belong together
            is noticed.
    Raises:
        ValueError, TypeError: the name does not end in .safetensors, or info is not JSON.
        CheckpointError: the files cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are written as safetensors: {path} must end in .safetensors")
    tensors = {
        # clone: safetensors refuses tensors that share memory
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in strip_prefixes(model_state).items()
    }
    # in the file, too: the JSON beside it may not be copied with it
    kept = {key: info[key] for key in EMBEDDED if key in info}
    kept |= {"view": view_of(info)}
    # one key: the library orders two at random
    content = safetensors.torch.save(tensors, metadata={"info": json.dumps(kept, allow_nan=False)})
    info = {**info, "sha256": hashlib.sha256(content).hexdigest()}
    json.dumps(info, allow_nan=False)  # what JSON does not know stops us before the first file
    try:
        write_atomically(path, lambda file: file.write(content))
        write_json(path.with_suffix(".json"), info)
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({error.strerror}); make room") from error


def view_of(info: dict[str, Any]) -> dict[str, Any]:
    """Settings that our weights were evaluated with, section.key -> value; {} where not known."""
    if isinstance(view := info.get("view"), dict):
        return {key: view[key] for key in VIEW if key in view}
    found = {key: entry_of(info.get("config"), *key.split(".")) for key in VIEW}
    return {key: value for key, value in found.items() if value is not None}


def load_weights(path: str | Path, ema: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """Read the weights of a network, whoever wrote them.

    Accepts our checkpoints and safetensors, torchvision's and timm's state dicts, the checkpoints
    of their training scripts, of Lightning and Composer, and safetensors of other origin. Prefixes
    that wrappers leave in the names (module., _orig_mod.) are removed.

    Args:
        path: *.safetensors, or any file torch.save wrote.
        ema: take the EMA where the file has one, the raw weights otherwise.
    Returns:
        (state dict on the CPU, info). info is the JSON beside a .safetensors file or the entry
        `info` of one of our checkpoints; of other files what they say about the network. Its key
        `ema` is which weights were taken: True, False, or None where the file has one kind.
    Raises:
        CheckpointError: the file cannot be read, or holds no weights.
        RunLogError: the JSON beside it is damaged.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    with torch.serialization.safe_globals(INERT):
        content = _under_our_keys(load_run_checkpoint(path))
    names = (EMA_KEYS + RAW_KEYS) if ema else RAW_KEYS
    found = next((name for name in names if isinstance(content.get(name), dict)), None)
    state = content[found] if found else content
    is_weights = all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
    if not state or not is_weights:
        raise CheckpointError(
            f"{path} holds no weights: expected a state dict, or one under any of "
            f"{', '.join(RAW_KEYS + EMA_KEYS)}, found {', '.join(map(str, list(content)[:5]))}"
        )
    state, info = strip_prefixes(state), _info_of(content) if found else {}
    state, blurred = strip_blur_filters(state)
    decay = entry_of(content.get("config"), "ema", "decay")  # at 0 ours has the raw weights twice
    info |= blurred
    known = found and not any("ema" in name for name in state)  # else plain_names chooses
    return state, {**info, "ema": (found in EMA_KEYS and decay != 0) if known else None}


def _under_our_keys(content: dict[Any, Any]) -> dict[Any, Any]:
    """Composer's checkpoints and Lightning's with an average, as `model` and `ema`; or as it is."""
    state = content.get("state")
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # Composer
        pairs = state.get("algorithms")
        pairs = [one for one in pairs if len(one) == 2] if isinstance(pairs, list) else []
        average: Any = next((entry for name, entry in pairs if name == "EMA"), None)
        if isinstance(average, dict) and average.get("ema_started"):  # else they are fresh weights
            return {"model": average.get("training_model"), "ema": average.get("ema_model")}
        return {"model": state["model"]}
    if isinstance(raw := content.get("current_model_state"), dict):  # Lightning's WeightAveraging
        return {"model": raw, "ema": content.get("state_dict")}
    return content


def _info_of(content: dict) -> dict:
    """What a checkpoint says about its network: ours, and those of timm's and torch's scripts."""
    if isinstance(content.get("info"), dict):
        view = view_of(content)
        return content["info"] | ({"view": view} if view else {})
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    info = {"arch": content.get("arch") or args.get("model")}
    if "mean" in args:  # an option of timm's; not given, it is that of the architecture
        info |= {"timm_script": True, "mean": args["mean"], "std": args.get("std")}
    return {key: value for key, value in info.items() if value is not None}


def strip_blur_filters(
    state: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, bool]]:
    """The plain network's names for BlurPool layers of ffcv-imagenet and Composer.

    Those hold the convolution as a part `conv`, beside a buffer `blur_filter`; Composer's max
    pooling has a buffer `filt2d`.

    Returns:
        (state dict, what it had: blur_filters, pool_filters).
    """
    ends = {"blur_filter": "blur_filters", "filt2d": "pool_filters"}
    kinds = {name: ends[end] for name in state if (end := name.rpartition(".")[2]) in ends}
    layers = [n.removesuffix("blur_filter") for n, kind in kinds.items() if kind == "blur_filters"]
    inner = {f"{layer}conv.": layer for layer in layers}

    def plain(name: str) -> str:
        start = next((part for part in inner if name.startswith(part)), None)
        return inner[start] + name.removeprefix(start) if start else name

    kept = {plain(name): value for name, value in state.items() if name not in kinds}
    return kept, dict.fromkeys(kinds.values(), True)


def plain_names(
    state: dict[str, torch.Tensor], wanted: dict[str, Any], ema: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The part of a trainer's state dict that is the network, under the network's own names.

    Lightning and others save a network as a part of their own: 'model.conv1.weight', beside
    another part, of its EMA, and the state of losses and metrics.

    Args:
        state: as load_weights returns it.
        wanted: the network's own state dict.
        ema: whether to take the part whose name has 'ema' in it, where there is one.
    Returns:
        (state dict, in words which part it is).
    Raises:
        CheckpointError: several parts may be the network.
    """
    first, half = next(iter(wanted), ""), len(wanted) / 2
    parts = [name.removesuffix(first) for name in state if name.endswith(f".{first}")]
    # a name may be the end of another one's, as conv1.weight is in a ResNet
    parts = [part for part in parts if sum(part + name in state for name in wanted) > half]
    if first in state or not parts:
        return state, []
    chosen = [part for part in parts if ("ema" in part) == ema] if len(parts) > 1 else parts
    if len(chosen) != 1:
        raise CheckpointError(
            f"the weights have several networks ({', '.join(parts)}), and which one is meant is "
            f"unknown; save the state_dict of one"
        )
    part = chosen[0]
    found = {n.removeprefix(part): value for n, value in state.items() if n.startswith(part)}
    left = len(state) - len(found)
    return found, [f"tensors {part}*" + (f", not the {left} others" if left else "")]


def _load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    if not path.is_file():
        raise CheckpointError(f"weights {path} do not exist; check the name")
    refuse_beyond_memory(path, path.stat().st_size)
    content = path.read_bytes()
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = safetensors.torch.load(content)
    except Exception as error:  # some headers fail inside torch only
        raise CheckpointError(
            f"{path} is cut off, damaged or not safetensors ({first_line(error)}); use another copy"
        ) from error
    info = _read_metadata(metadata) or _info_of_card(path)
    info |= read_object(path.with_suffix(".json"))
    digest = hashlib.sha256(content).hexdigest()
    if info.get("sha256", digest) != digest:
        raise CheckpointError(
            f"{path} is not the file that {path.with_suffix('.json').name} describes (sha256 "
            f"differs): one of them is damaged or from another run, use another copy of the pair"
        )
    state, blurred = strip_blur_filters(strip_prefixes(state))
    info |= blurred
    kinds = {"moving average": True, "raw": False}
    return state, {"ema": kinds.get(str(info.get("weights"))), **info}


def _read_metadata(metadata: dict[str, str]) -> dict:
    """What `save_weights` wrote into a file about its network; {} of another program's."""
    with suppress(ValueError, RecursionError):
        written = json.loads(metadata.get("info", "{}"))
        return written if isinstance(written, dict) else {}
    return {}


def read_card(path: str | Path) -> dict[str, Any]:
    """The pretrained_cfg of timm's config.json beside a file of weights; {} without one."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return {}
    card = read_object(path.with_name("config.json")).get("pretrained_cfg")
    return card if isinstance(card, dict) else {}


def _info_of_card(path: Path) -> dict:
    """What timm's config.json beside a file says about its network; {} without one."""
    config, card = read_object(path.with_name("config.json")), read_card(path)
    if not card:
        return {}
    labels = config.get("label_names") or card.get("label_names")
    info = {"arch": config.get("architecture"), "label_names": labels}
    if card.get("mean") and card.get("std"):
        info |= {"mean": card["mean"], "std": card["std"]}
    return {key: value for key, value in info.items() if value}


def strip_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict under the plain network's names: without what wrappers add to them."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    state.pop("n_averaged", None)  # a counter of torch.optim.swa_utils.AveragedModel
    # Only where all names have it: a network may call one of its parts "module".
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def load_into(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy weights into a network; every name and shape must match.

    Args:
        model: the network, plain or wrapped by torch.compile or DistributedDataParallel.
        state: as `load_weights` returns it.
    Raises:
        CheckpointError: one sentence with the first few names that are missing, unexpected or of
            another shape; the network is unchanged.
    """
    model = plain_model(model)
    refuse_misfit(model.state_dict(), state)
    model.load_state_dict(state)


def refuse_misfit(wanted: dict, state: dict, what: str = "the weights") -> None:
    """Every tensor of a network must be in `state`, of its shape and finite, and no other.

    Args:
        wanted: the network's own state dict.
        state: from a file.
        what: words for `state`.
    Raises:
        CheckpointError: as `load_into`.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"{what} are a {type(state).__name__}, not a state dict")
    common = [name for name in wanted if name in state]
    if unfit := [name for name in common if not _can_hold(wanted[name], state[name])]:
        raise CheckpointError(
            f"{what} have {len(unfit)} tensors that are not ordinary ones of finite numbers "
            f"({_first_few(unfit)}); use another copy, or save a plain state_dict"
        )
    # Files older than 2018 have no such counter, and load_state_dict manages without it.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in wanted]
    misshaped = [
        f"{name} {tuple(state[name].shape)} in the file, {tuple(wanted[name].shape)} in the model"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    problems = [f"{len(names)} {k} ({_first_few(names)})" for k, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            f"{what} do not fit the model, of {len(wanted)} tensors: {', '.join(problems)}; "
            f"check model.arch and the number of classes"
        )


def _can_hold(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether `found` may become the values of `wanted`, if its shape is right."""
    if not isinstance(found, torch.Tensor):
        return False
    special = found.layout is not torch.strided or found.is_nested or found.is_meta
    if special or found.is_quantized or found.is_complex():
        return False
    if not wanted.is_floating_point():
        return True
    return found.is_floating_point() and bool(found.isfinite().all())


def _first_few(names: list[str], count: int = 3) -> str:
    rest = len(names) - count
    return "; ".join(names[:count]) + (f"; and {rest} more" if rest > 0 else "")
