"""Checkpoints: whole or absent, never executed, and weights that load into the plain network."""

import argparse
import errno
import json
import math
import os
import pickle
import resource
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from fast_imagenet.engine import checkpoint
from fast_imagenet.engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fast_imagenet.engine.weights import load_into, load_weights, save_weights, strip_prefixes


def small_network(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, classes))
    )


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def small_state():
    network = small_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, betas=(0.8, 0.9))
    network.fc(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {
        "model": network.state_dict(),
        "ema": {name: tensor + 1 for name, tensor in network.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "best": 71.5,
        "classes": ["n01", "n02"],
        "scaler": None,
        "done": False,
    }


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    state = small_state()
    save_checkpoint(tmp_path / "sub" / "last.pt", state)
    back = load_checkpoint(tmp_path / "sub" / "last.pt")
    assert same(back["model"], state["model"])
    assert same(back["ema"], state["ema"])
    assert back["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    moments = [s["optimizer"]["state"] for s in (back, state)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[1])
    rest = ("epoch", "best", "classes", "scaler", "done")
    assert [back[k] for k in rest] == [state[k] for k in rest]
    assert os.listdir(tmp_path / "sub") == ["last.pt"]


def test_tensors_become_their_own_plain_copies(tmp_path):
    big = torch.zeros(1000, 1000)
    save_checkpoint(tmp_path / "a.pt", {"view": big[0], "parameter": nn.Parameter(torch.ones(2))})
    back = load_checkpoint(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 20_000  # not the 4 MB behind the view
    assert type(back["parameter"]) is torch.Tensor
    assert not back["parameter"].requires_grad


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        ({"a": {"b": [1, np.float64(2)]}}, r"state\['a'\]\['b'\]\[1\] is a numpy.float64"),
        ({"args": argparse.Namespace(x=1)}, r"state\['args'\] is a argparse.Namespace"),
        ({"a": {1.5: 0}}, r"state\['a'\] has the key 1.5"),
        ({"size": torch.Size([1])}, r"state\['size'\] is a torch.Size"),
        ({"f": [len]}, r"state\['f'\]\[0\] is a builtins.builtin_function"),
    ],
)
def test_other_objects_are_refused_by_name(tmp_path, bad, where):
    with pytest.raises(TypeError, match=where):
        save_checkpoint(tmp_path / "a.pt", bad)
    assert os.listdir(tmp_path) == []


class Payload:
    """Unpickling it makes a folder: stands for anything an attacker might run."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("load", [load_checkpoint, load_weights])
def test_malicious_pickle_is_refused_and_does_nothing(tmp_path, load, zipped):
    trap = tmp_path / "trap"
    torch.save(
        {"model": Payload(str(trap))}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(CheckpointError, match=r"a.pt is refused: loading it would run code.*mkdir"):
        load(tmp_path / "a.pt")
    assert not trap.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the trap is a real one
    assert trap.exists()


def test_raw_pickle_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Payload(str(tmp_path / "trap")), 2))
    with pytest.raises(CheckpointError, match=r"a.pt"):
        load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "trap").exists()


def test_every_truncation_is_one_clear_sentence(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"w": torch.arange(100.0), "epoch": 1})
    whole = (tmp_path / "a.pt").read_bytes()
    for size in range(0, len(whole), 37):
        (tmp_path / "b.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"b.pt is (cut off|damaged)") as caught:
            load_checkpoint(tmp_path / "b.pt")
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path):
    weights = torch.arange(1000.0)
    save_checkpoint(tmp_path / "a.pt", {"w": weights})
    content = bytearray((tmp_path / "a.pt").read_bytes())
    at = content.index(weights.numpy().tobytes()) + 2000
    content[at] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    assert not torch.equal(torch.load(tmp_path / "a.pt")["w"], weights)  # torch itself is silent
    with pytest.raises(CheckpointError, match="wrong checksum"):
        load_checkpoint(tmp_path / "a.pt")


def test_missing_file_and_wrong_content(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.pt does not exist"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"none.safetensors do not exist"):
        load_weights(tmp_path / "none.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pt")
    save_checkpoint(tmp_path / "log.pt", {"epoch": 3})
    with pytest.raises(CheckpointError, match=r"holds no weights.*found epoch"):
        load_weights(tmp_path / "log.pt")
    (tmp_path / "a.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match="cut off, damaged or not safetensors"):
        load_weights(tmp_path / "a.safetensors")


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "broken", ["files.os.fsync", "files.os.replace", "engine.checkpoint.torch.save"]
)
def test_a_failing_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, broken):
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1})
    monkeypatch.setattr(f"fast_imagenet.{broken}", disk_full)
    with pytest.raises(CheckpointError, match=r"No space left.*previous one is untouched"):
        save_checkpoint(tmp_path / "last.pt", {"epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "last.pt") == {"epoch": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_disk_that_is_full_in_the_middle_of_a_write(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*previous one is untouched"):
            save_checkpoint(tmp_path / "last.pt", {"epoch": 2, "w": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(tmp_path / "last.pt") == {"epoch": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_the_new_file_is_complete_and_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """Order of the calls that make kill -9 and a power cut harmless: file, name, folder."""
    calls = []
    real = {"fsync": os.fsync, "replace": os.replace, "checked": checkpoint._check_archive}
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real["fsync"](fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), real["replace"](*a))[1])
    monkeypatch.setattr(
        checkpoint, "_check_archive", lambda p: (calls.append("read back"), real["checked"](p))[1]
    )
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1})
    assert calls == ["fsync", "read back", "replace", "fsync"]


def test_what_a_killed_save_left_is_overwritten(tmp_path):
    (tmp_path / ".last.pt.tmp").write_bytes(b"half a checkpoint")
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1})
    assert os.listdir(tmp_path) == ["last.pt"]


# ------------------------------------------------------------------------------------------------
# Weights
# ------------------------------------------------------------------------------------------------


def test_weights_and_their_json(tmp_path):
    state = small_network().state_dict()
    info = {"arch": "small", "classes": ["a", "b", "c"], "plain_top1": 70.1}
    save_weights(tmp_path / "weights.safetensors", state, info)
    assert sorted(os.listdir(tmp_path)) == ["weights.json", "weights.safetensors"]
    back, back_info = load_weights(tmp_path / "weights.safetensors")
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert len(back) == len(state)
    assert info.items() <= back_info.items()
    assert info.items() <= json.loads((tmp_path / "weights.json").read_text()).items()


def test_weights_load_into_plain_torchvision_without_this_package(tmp_path):
    network = torchvision.models.resnet18(num_classes=3).to(memory_format=torch.channels_last)
    wrapped = {f"module._orig_mod.{name}": t for name, t in network.state_dict().items()}
    save_weights(tmp_path / "weights.safetensors", wrapped, {})
    plain = torchvision.models.resnet18(num_classes=3)
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"))
    assert same(plain.state_dict(), network.state_dict())


def test_weights_that_share_memory(tmp_path):
    tied = torch.ones(2, 2)
    save_weights(tmp_path / "w.safetensors", {"a": tied, "b": tied.t(), "c": tied}, {})
    assert sorted(load_weights(tmp_path / "w.safetensors")[0]) == ["a", "b", "c"]


def test_bad_info_or_name_writes_nothing(tmp_path):
    for info in ({"top1": float("nan")}, {"config": object()}):
        with pytest.raises((TypeError, ValueError)):
            save_weights(tmp_path / "w.safetensors", {"a": torch.ones(1)}, info)
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        save_weights(tmp_path / "w.pt", {"a": torch.ones(1)}, {})
    assert os.listdir(tmp_path) == []


def test_weights_with_the_json_of_another_file(tmp_path):
    save_weights(tmp_path / "w.safetensors", {"a": torch.ones(1)}, {"arch": "x"})
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"not the file that w.json describes"):
        load_weights(tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text("{")
    with pytest.raises(ValueError, match=r"w.json is damaged"):
        load_weights(tmp_path / "w.safetensors")
    (tmp_path / "w.json").unlink()
    assert load_weights(tmp_path / "w.safetensors")[0] == {"a": torch.zeros(1)}


def test_raw_or_average_from_our_checkpoint(tmp_path):
    state = small_state() | {"info": {"arch": "small"}}
    save_checkpoint(tmp_path / "last.pt", state)
    raw, raw_info = load_weights(tmp_path / "last.pt")
    average, average_info = load_weights(tmp_path / "last.pt", ema=True)
    assert same(raw, state["model"])
    assert raw_info == {"arch": "small", "ema": False}
    assert same(average, state["ema"])
    assert average_info == {"arch": "small", "ema": True}
    save_checkpoint(tmp_path / "last.pt", state | {"ema": None})
    without, info = load_weights(tmp_path / "last.pt", ema=True)
    assert same(without, state["model"])
    assert info["ema"] is False


def foreign_files():
    state = small_network().state_dict()
    average = {f"module.{name}": t for name, t in state.items()} | {"n_averaged": torch.tensor(3)}
    prefixed = {f"module.{name}": t for name, t in state.items()}
    args = argparse.Namespace(lr=0.1, model="small")
    decoy = {"no": torch.ones(1)}
    return {
        "torchvision.pth": (state, False),
        "torchvision_script.pth": ({"model": state, "args": args, "epoch": 1}, False),
        "torchvision_script_ema.pth": ({"model": decoy, "model_ema": average}, True),
        "timm.pth.tar": ({"state_dict": prefixed, "arch": "small", "args": args}, False),
        "timm_ema.pth.tar": ({"state_dict": decoy, "state_dict_ema": state}, True),
        "compiled.pt": ({f"_orig_mod.module.{name}": t for name, t in state.items()}, False),
    }


@pytest.mark.parametrize("name", foreign_files())
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_others(tmp_path, name, zipped):
    content, ema = foreign_files()[name]
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    state, _ = load_weights(tmp_path / name, ema=ema)
    network = small_network()
    nn.init.zeros_(network.fc.weight)
    load_into(network, state)
    assert same(network.state_dict(), small_network().state_dict())


def test_safetensors_of_others(tmp_path):
    state = small_network().state_dict()
    safetensors.torch.save_file(state, tmp_path / "timm.safetensors")
    network = small_network()
    nn.init.zeros_(network.fc.weight)
    load_into(network, load_weights(tmp_path / "timm.safetensors")[0])
    assert same(network.state_dict(), state)


def test_a_part_called_module_keeps_its_name():
    state = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert strip_prefixes(state) == state
    assert list(strip_prefixes({"layer1._orig_mod.0.weight": torch.ones(1)})) == ["layer1.0.weight"]


def test_load_into_names_what_does_not_fit():
    network = small_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = small_network(classes=5).state_dict()
    state["extra.a"] = torch.ones(1)
    del state["conv.bias"]
    state["conv.weight"] = state["conv.weight"] + 1
    with pytest.raises(CheckpointError) as caught:
        load_into(network, state)
    message = str(caught.value)
    assert "1 missing (conv.bias)" in message
    assert "1 unexpected (extra.a)" in message
    assert "fc.weight (5, 4) in the file, (3, 4) in the model" in message
    assert "\n" not in message
    assert same(network.state_dict(), before)
    with pytest.raises(CheckpointError, match=r"8 unexpected \(n0; n1; n2; and 5 more\)"):
        load_into(network, before | {f"n{i}": torch.ones(1) for i in range(8)})


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w * math.nan,
        lambda w: w / 0,
        lambda w: w.to(torch.int8),
        lambda w: w.to(torch.complex64),
        lambda w: w.to_sparse(),
        lambda w: w.to("meta"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(change):
    network = small_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"1 tensors that are not ordinary.*\(conv.weight\)"):
        load_into(network, before | {"conv.weight": change(before["conv.weight"])})
    assert same(network.state_dict(), before)
    load_into(network, {name: tensor.to(torch.float16) for name, tensor in before.items()})


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_damaged_compressed_archive_is_one_sentence(tmp_path, method):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x/data.pkl", bytes(range(256)) * 40)
    data = bytearray(path.read_bytes())
    for place in range(45, 90):
        data[place] ^= 0x5A
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="is cut off|is damaged"):
            load_checkpoint(path)


def test_every_cut_of_the_old_format_is_one_sentence(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(small_network().state_dict(), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for end in range(0, len(data) - 1, 7):
        path.write_bytes(data[:end])
        with pytest.raises(
            CheckpointError, match="cut off, damaged or not a checkpoint|refused|holds"
        ):
            load_checkpoint(path)


def test_load_into_a_compiled_network_and_from_before_batch_counters():
    network = small_network()
    state = {k: v + 1 for k, v in network.state_dict().items() if "num_batches" not in k}
    load_into(torch.compile(network), state)
    assert torch.equal(network.conv.weight, state["conv.weight"])


def sparse_file(path, header, size):
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(size)
    return path


@pytest.mark.parametrize("kind", ["whole", "longer than its header", "header of zeros", "torch"])
def test_a_file_beyond_the_memory_is_one_sentence(tmp_path, kind):
    """1 TB that takes no room on the disk: nothing of it is read."""
    size = 2**40
    name = "w.pt" if kind == "torch" else "w.safetensors"
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"w": entry}).encode() if kind == "whole" else b"{}"
    if kind in ("header of zeros", "torch"):
        header = b""
    path = sparse_file(tmp_path / name, header, size + (8 + len(header)) * (kind == "whole"))
    with pytest.raises(CheckpointError, match="GB of memory are free") as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)


def test_an_archive_that_unpacks_beyond_the_memory_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(50_000_000))
    monkeypatch.setattr(checkpoint.machine, "available_memory", lambda: 10_000_000)
    with pytest.raises(CheckpointError, match=r"0.1 GB and 0.0 GB of memory are free"):
        load_weights(path)
