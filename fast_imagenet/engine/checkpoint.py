"""Checkpoints that are whole or absent, and weights anyone can load.

A file is written beside its final name, read back, flushed to the disk and only then renamed, so
kill -9 or a full disk leaves the previous file as it was. Checkpoints hold tensors and plain values
only and are read with weights_only: opening one never runs code from it. torch.load does not look
at the checksums inside its own files, so that a flipped bit becomes a wrong weight;
`load_checkpoint` does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from fast_imagenet import machine
from fast_imagenet.files import write_atomically, write_json
from fast_imagenet.models.layers import plain_model

# Where the weights are in a checkpoint: ours and torchvision's reference scripts say model, timm
# says state_dict. A file with none of these is taken to be a state dict itself.
RAW_KEYS = ("model", "state_dict")
EMA_KEYS = ("ema", "model_ema", "state_dict_ema")
EMBEDDED = ("arch", "num_classes", "classes", "use_blurpool", "mean", "std", "weights")
LONGEST_HEADER = 100_000_000  # bytes, of the safetensors library


FORMAT = 2  # of a run's checkpoint; a change of it is a case in `migrate`


class CheckpointError(ValueError):
    """A file of weights cannot be read, written or used. The message is one sentence."""


# ---- Checkpoints of a run ----


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write a checkpoint atomically, from whatever device, to be loaded anywhere.

    Args:
        path: final name, usually *.pt.
        state: dict (keys str or int), list, tuple, str, int, float, bool, None and tensors, nested.
    Raises:
        TypeError: anything else is inside; the message names where.
        CheckpointError: the file cannot be written; the previous checkpoint is untouched.
    """
    plain = _to_plain(state, "state")
    try:
        write_atomically(path, lambda file: torch.save(plain, file), _check_archive)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as an error of its zip writer, with the reason behind it
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise CheckpointError(
            f"cannot write checkpoint {path} ({_first_line(reason)}); the previous one is "
            f"untouched, make room or choose another logging.folder"
        ) from error


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict:
    """Read a checkpoint; its checksums are verified and no code in it is ever run.

    Args:
        path: file written by `save_checkpoint` or by torch.save.
        map_location: device of the returned tensors.
    Raises:
        CheckpointError: the file is missing, cut off, damaged, not a checkpoint, or holds
            objects other than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; check the name")
    _check_archive(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from error
    except Exception as error:  # what the parts of a damaged file raise has no end
        raise CheckpointError(
            f"{path} is cut off, damaged or not a checkpoint ({_first_line(error)}); use another "
            f"copy"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dict; save a state_dict instead"
        )
    return content


def load_run_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read the checkpoint of a run, whatever version wrote it, in the layout of FORMAT.

    Raises:
        CheckpointError: as load_checkpoint, or a newer version wrote it.
    """
    return migrate(load_checkpoint(path), path)


def migrate(content: dict[Any, Any], path: str | Path) -> dict[Any, Any]:
    """A run's checkpoint in the layout of FORMAT; anything else is returned as it is.

    Format 1 had no key `format`, and the first versions of it neither `waited` nor, in `info`, what
    the weights need.

    Raises:
        CheckpointError: a newer version wrote it.
    """
    from fast_imagenet.models.origin import IMAGENET  # which imports this module

    if "optimizer" not in content or not isinstance(content.get("config"), dict):
        return content
    version = content.get("format", 1)
    if version not in (1, FORMAT):
        raise CheckpointError(
            f"{path} has format {version!r:.40}, and this version of the program reads 1 to "
            f"{FORMAT}; use the version that wrote it"
        )
    if version == 1:
        info: dict[str, Any] = {"mean": list(IMAGENET[0]), "std": list(IMAGENET[1])}
        blurred = _entry(content["config"], "training", "use_blurpool")
        info |= {"use_blurpool": blurred} if isinstance(blurred, bool) else {}
        info |= content["info"] if isinstance(content.get("info"), dict) else {}
        content = {"waited": 0.0, **content, "info": info, "format": FORMAT}
    return content


def _to_plain(value: Any, where: str) -> Any:
    """A copy made of builtin containers and CPU tensors that own no more than they show."""
    # Exact types: numpy.float64 is a float and an IntEnum is an int, but neither is pickled as one.
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where} has the key {key!r}; keys must be str or int")
        return {key: _to_plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if type(value) in (torch.Tensor, nn.Parameter):
        tensor = value.detach().cpu()
        # A view drags its whole storage into the file.
        owns_all = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if owns_all else tensor.clone()
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds "
        f"only dict, list, tuple, tensor, str, int, float, bool and None: convert it first"
    )


def _check_archive(path: Path) -> None:
    """Compare every CRC in a torch zip file, about 1 GB/s; other files are left to torch.load.

    Raises:
        CheckpointError: it is damaged, or holds more than fits into memory.
    """
    with open(path, "rb") as file:
        is_torch_zip = file.read(2) == b"PK"
    if not is_torch_zip:
        _refuse_beyond_memory(path, path.stat().st_size)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_beyond_memory(path, sum(entry.file_size for entry in archive.infolist()))
            damaged = archive.testzip()
    except CheckpointError:
        raise
    except Exception as error:  # a decompressor has errors of its own
        raise CheckpointError(
            f"checkpoint {path} is cut off or damaged ({_first_line(error)}); use another copy"
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f"checkpoint {path} is damaged (wrong checksum in {damaged}); use another copy"
        )


def _refusal(path: Path, error: Exception) -> str:
    """What a refused pickle would do, in one sentence: torch's own message fills a screen."""
    text, what = str(error), "it is damaged or holds more than tensors and plain values"
    if "GLOBAL" in text:
        name = text[text.index("GLOBAL") + len("GLOBAL") :].split()[0].strip(",.")
        what = f"loading it would run code ({name}); only tensors and plain values are accepted"
    return f"{path} is refused: {what}; use another copy, or convert it to safetensors if trusted"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:160] if lines else type(error).__name__


# ---- Final weights: safetensors and a JSON of what made them ----


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
    kept = json.dumps({key: info[key] for key in EMBEDDED if key in info}, allow_nan=False)
    content = _with_info(safetensors.torch.save(tensors, metadata={"format": "pt"}), kept)
    info = {**info, "sha256": hashlib.sha256(content).hexdigest()}
    json.dumps(info, allow_nan=False)  # what JSON does not know stops us before the first file
    try:
        write_atomically(path, lambda file: file.write(content))
        write_json(path.with_suffix(".json"), info)
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({error.strerror}); make room") from error


def _with_info(content: bytes, info: str) -> bytes:
    """A safetensors file with `info` in its metadata; the library orders two keys at random."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"]["info"] = info
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def load_weights(path: str | Path, ema: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """Read the weights of a network, whoever wrote them.

    Accepts our checkpoints and safetensors, torchvision's and timm's state dicts, the checkpoints
    of their training scripts, and safetensors of other origin. Prefixes that wrappers leave in the
    names (module., _orig_mod.) are removed.

    Args:
        path: *.safetensors, or any file torch.save wrote.
        ema: take the EMA where the file has one, the raw weights otherwise.
    Returns:
        (state dict on the CPU, info). info is the JSON beside a .safetensors file or the entry
        `info` of one of our checkpoints; of other files what they say about the network. Its key
        `ema` is which weights were taken: True, False, or None where the file has one kind.
    Raises:
        CheckpointError: the file cannot be read, or holds no weights.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    # timm's and torchvision's training scripts store their command line; a Namespace is inert.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = load_run_checkpoint(path)
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
    decay = _entry(content.get("config"), "ema", "decay")  # at 0 ours has the raw weights twice
    info |= {"blur_filters": True} if blurred else {}
    return state, {**info, "ema": (found in EMA_KEYS and decay != 0) if found else None}


def _entry(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _info_of(content: dict) -> dict:
    """What a checkpoint says about its network: ours, and those of timm's and torch's scripts."""
    if isinstance(content.get("info"), dict):
        return dict(content["info"])
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    info = {"arch": content.get("arch") or args.get("model")}
    if "mean" in args:  # an option of timm's; not given, it is that of the architecture
        info |= {"timm_script": True, "mean": args["mean"], "std": args.get("std")}
    return {key: value for key, value in info.items() if value is not None}


def strip_blur_filters(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
    """The plain network's names for BlurPool layers of ffcv-imagenet and Composer.

    Those hold the convolution as a part `conv`, beside a buffer `blur_filter`.

    Returns:
        (state dict, whether it had such layers).
    """
    layers = [n.removesuffix("blur_filter") for n in state if n.endswith(".blur_filter")]
    inner = {f"{layer}conv.": layer for layer in layers}

    def plain(name: str) -> str:
        start = next((part for part in inner if name.startswith(part)), None)
        return inner[start] + name.removeprefix(start) if start else name

    kept = {name: value for name, value in state.items() if not name.endswith(".blur_filter")}
    return ({plain(n): value for n, value in kept.items()} if layers else state), bool(layers)


def _load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    if not path.is_file():
        raise CheckpointError(f"weights {path} do not exist; check the name")
    written = _check_header(path)
    content = path.read_bytes()
    try:
        state = safetensors.torch.load(content)
    except Exception as error:  # some headers fail inside torch only
        raise CheckpointError(
            f"{path} is cut off, damaged or not safetensors ({_first_line(error)}); use another "
            f"copy"
        ) from error
    info = written | _read_info(path.with_suffix(".json"))
    digest = hashlib.sha256(content).hexdigest()
    if info.get("sha256", digest) != digest:
        raise CheckpointError(
            f"{path} is not the file that {path.with_suffix('.json').name} describes (sha256 "
            f"differs): one of them is damaged or from another run, use another copy of the pair"
        )
    state, blurred = strip_blur_filters(strip_prefixes(state))
    info |= {"blur_filters": True} if blurred else {}
    kinds = {"moving average": True, "raw": False}
    return state, {"ema": kinds.get(str(info.get("weights"))), **info}


def _check_header(path: Path) -> dict:
    """Look at the header of a safetensors file before memory is taken for the rest of it.

    Returns:
        What the file, or timm's config.json beside it, says about the network.
    Raises:
        CheckpointError: the file is not as long as its header says, or longer than the memory.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 0 < length <= min(size - 8, LONGEST_HEADER) else b""
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        whole = -1
    if whole != size:
        raise CheckpointError(
            f"{path} is cut off, damaged or not safetensors (its header does not describe a file "
            f"of {size:,} bytes); use another copy"
        )
    _refuse_beyond_memory(path, size)
    written = None
    with suppress(ValueError, TypeError, RecursionError):
        written = json.loads(_entry(header, "__metadata__", "info") or "{}")
    if isinstance(written, dict) and written:
        return written
    return _read_card(path.with_name("config.json"))


def _read_card(path: Path) -> dict:
    """What timm's config.json says about the network; {} of another config.json."""
    config = _read_info(path)
    card = config.get("pretrained_cfg")
    if not isinstance(card, dict):
        return {}
    labels = config.get("label_names") or card.get("label_names")
    info = {"arch": config.get("architecture"), "label_names": labels}
    if card.get("mean") and card.get("std"):
        info |= {"mean": card["mean"], "std": card["std"]}
    return {key: value for key, value in info.items() if value}


def _refuse_beyond_memory(path: Path, size: int) -> None:
    room = machine.available_memory()
    if size > room:
        raise CheckpointError(
            f"{path} holds {size / 1e9:,.1f} GB and {room / 1e9:,.1f} GB of memory are free: it is "
            f"not the weights of one network, or needs a larger machine"
        )


def _read_info(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); restore or delete it") from error
    return info if isinstance(info, dict) else {}


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
