"""Checkpoints of a run that are whole or absent.

A file is written beside its final name, read back, flushed to the disk and only then renamed, so
kill -9 or a full disk leaves the previous file as it was. Checkpoints hold tensors and plain values
only and are read with weights_only: opening one never runs code from it. torch.load does not look
at the checksums inside its own files, so that a flipped bit becomes a wrong weight;
`load_checkpoint` does.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fast_imagenet import machine
from fast_imagenet.data.augmentation import IMAGENET
from fast_imagenet.files import write_atomically

FORMAT = 2  # of a run's checkpoint; a change of it is a case in `migrate`


class CheckpointError(ValueError):
    """A file of weights cannot be read, written or used. The message is one sentence."""


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
            f"cannot write checkpoint {path} ({first_line(reason)}); the previous one is "
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
            f"{path} is cut off, damaged or not a checkpoint ({first_line(error)}); use another "
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
    if "optimizer" not in content or not isinstance(content.get("config"), dict):
        return content
    version = content.get("format", 1)
    if type(version) is not int or version not in (1, FORMAT):
        raise CheckpointError(
            f"{path} has format {version!r:.40}, and this version of the program reads 1 to "
            f"{FORMAT}; use the version that wrote it"
        )
    if version == 1:
        info: dict[str, Any] = {"mean": list(IMAGENET[0]), "std": list(IMAGENET[1])}
        blurred = entry_of(content["config"], "training", "use_blurpool")
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
        refuse_beyond_memory(path, path.stat().st_size)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            refuse_beyond_memory(path, sum(entry.file_size for entry in archive.infolist()))
            damaged = archive.testzip()
    except CheckpointError:
        raise
    except Exception as error:  # a decompressor has errors of its own
        raise CheckpointError(
            f"checkpoint {path} is cut off or damaged ({first_line(error)}); use another copy"
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


def first_line(error: BaseException) -> str:
    """The first line of its message, 160 characters at most; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:160] if lines else type(error).__name__


def refuse_beyond_memory(path: Path, size: int) -> None:
    """Refuse `size` bytes before they are read, where less memory is free.

    Raises:
        CheckpointError: names both sizes.
    """
    room = machine.available_memory()
    if size > room:
        raise CheckpointError(
            f"{path} holds {size / 1e9:,.1f} GB and {room / 1e9:,.1f} GB of memory are free: it is "
            f"not the weights of one network, or needs a larger machine"
        )


def entry_of(tree: Any, *keys: str) -> Any:
    """tree[key][key]...; None where a key is missing or its parent is not a dict."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
