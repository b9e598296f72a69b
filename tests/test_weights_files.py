"""Files that nobody vouches for: what a container may hold, and the one line with which the others are refused."""

import io
import json
import os
import pickle  # noqa: TID251 - to write what must not be read
import re
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path

import flax_files
import numpy as np
import pytest
import torch
from command import Vit
from safetensors.torch import save_file
from torch import nn

from vitcli.errors import CheckpointError
from vitcli.model import ViTConfig
from vitcli.weights import _pth, load

CONFIG = ViTConfig(width=48, depth=2, mlp_dim=96, heads=3, patch=8, activation="gelu", posemb_resize="bicubic")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A small model's weights in timm's layout, which is ours."""
    torch.manual_seed(0)
    model = CONFIG.build(10, (32, 32))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.file"


def refusal(path: Path) -> str:
    """The message and the hint with which a file is refused: one line each, the first says which file."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for line in (message, caught.value.hint):
        assert len(line) < 500
        assert line.isprintable()
    return message.removeprefix(f"{path}: ")


def assert_holds(path: Path, state: dict[str, torch.Tensor]) -> None:
    loaded = load(path).state
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name].float()) for name in state)


# Containers


def test_safetensors(path, state):
    save_file(state, path)
    assert_holds(path, state)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pytorch_in_every_precision(path, state, old, dtype):
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    assert_holds(path, state)


def test_loading_does_not_load_torchs_compiler(path, state):
    """To build on the meta device torch imports it for a second, and keeps 150 MB: where initial weights are drawn."""
    save_file(state, path)
    code = "import sys; from pathlib import Path; from vitcli import checkpoint; checkpoint.load(Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"{code}; sys.exit('torch._dynamo' in sys.modules)", str(path)]
    assert subprocess.run(command).returncode == 0


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_pytorch(path, state, old):
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    assert_holds(path, state)
    torch.save({"model": Payload(path.with_name("ran"))}, path, _use_new_zipfile_serialization=not old)
    assert "only plain tensors are read" in refusal(path)
    assert not path.with_name("ran").exists()


def test_pytorch_tensors_of_every_kind(path, state):
    """Parameters, views into one storage, transposed tensors, and those of other types beside the model."""
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    pieces = flat.split([tensor.numel() for tensor in state.values()])
    views = {name: piece.view_as(state[name]) for name, piece in zip(state, pieces, strict=True)}
    views["head.weight"] = nn.Parameter(state["head.weight"])
    views["norm.weight"] = nn.Parameter(state["norm.weight"])
    views["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].t().contiguous().t()
    torch.save({"epoch": 3, "model": views, "optimizer": {"steps": torch.tensor(7), "empty": torch.zeros(0)}}, path)
    assert_holds(path, state)


def test_averaged_weights_are_taken_out_of_a_training_checkpoint(path, state):
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in wrapped.items()}
    torch.save({"model": zeros, "model_ema": wrapped, "epoch": 7, "optimizer": {"lr": 0.1}}, path)
    assert_holds(path, state)


def test_settings_beside_the_model_are_passed_over(path, state):
    torch.save({"model": state, "args": Namespace(lr=0.1, data=Namespace(name="imagenet"))}, path)
    assert_holds(path, state)
    torch.save({"model": state, "args": Namespace(lr=Payload(path.with_name("ran")))}, path)
    assert "only plain tensors are read" in refusal(path)
    assert not path.with_name("ran").exists()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_training_leaves_beside_the_model(path, state, protocol, old):
    beside = {
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0, 1]}]},
        "scheduler": {"milestones": Counter([30, 30, 60]), "last": -1, "rates": (0.1, 1e-5, None, True)},
        "random": torch.get_rng_state(),
        "types": [torch.Size([1, 2]), torch.device("cpu"), torch.float32, np.float64(0.5), 1j, bytearray(b"a")],
        "large": 1 << 80,
        "text": "é" * 300,
        "scores": defaultdict(list, {"top1": [0.5]}),
    }
    content = {"model": OrderedDict(state), **beside}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not old)
    assert_holds(path, state)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(path, save):
    arrays = flax_files.arrays()
    with path.open("wb") as file:
        save(file, **arrays)
    assert torch.equal(load(path).state["head.bias"], torch.from_numpy(arrays["head/bias"]))


# PyTorch files that want more than to be read


class Payload:
    """Makes a file if it is unpickled by anything but a restricted reader."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("place", ["model", "optimizer", "key", "beside"])
def test_code_in_a_pytorch_file_is_not_run(path, state, old, place):
    marker = path.with_name("ran")
    payload = Payload(marker)
    content = {
        "model": {"model": {**state, "payload": payload}},
        "optimizer": {"model": state, "optimizer": {"state": {0: {"exp_avg": [payload]}}}},
        "key": {"model": state, payload: 1},
        "beside": OrderedDict(state, _metadata=payload),
    }[place]
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    assert "only plain tensors are read" in refusal(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # an ordinary reader does run it
    assert marker.exists()


@pytest.mark.parametrize("name", ["data.pkl", "{}/payload.pkl", "{}/data.pkl"])
def test_second_pickle_in_the_archive(path, state, name):
    marker = path.with_name("ran")
    torch.save(state, path)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr(name.format(archive.namelist()[0].partition("/")[0]), pickle.dumps(Payload(marker), 2))
    with suppress(CheckpointError):
        load(path)
    assert not marker.exists()


def test_program_is_refused(path):
    with warnings.catch_warnings(action="ignore"):  # torch warns that these will go away
        torch.jit.script(nn.Linear(2, 2)).save(path)
    assert "TorchScript" in refusal(path)


def old_format(pickled: bytes) -> bytes:
    """A file of torch's old format whose tensors are listed by this pickle."""
    start = (_pth.MAGIC, _pth.PROTOCOL, {"little_endian": True})
    return b"".join(pickle.dumps(value, 2) for value in start) + pickled + pickle.dumps([], 2)


def test_pytorch_file_that_an_ordinary_reader_never_ends(path):
    """A tuple of a pair of a pair ... as a key takes 2^60 steps to hash: {nested: 1}."""
    nested: tuple = ()
    for _ in range(60):
        nested = (nested, nested)
    pickled = pickle.dumps(nested, 2)
    path.write_bytes(old_format(pickled[:2] + b"}" + pickled[2:-1] + b"K\x01s."))
    begin = time.thread_time()
    assert "it holds no tensors by name" in refusal(path)
    assert time.thread_time() - begin < 5


LOAD = """
import re, sys
from pathlib import Path
from vitcli.errors import CheckpointError
from vitcli.weights import _files, load

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
try:
    load(Path(sys.argv[1]))
except CheckpointError:
    print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak of memory")
@pytest.mark.parametrize("opcodes", [b"}", b"]", b"(", b"}\x94", b"]\x94("], ids=ascii)
def test_pickle_of_opcodes_that_take_most_memory(path, opcodes):
    """As many as are read at all: each byte becomes an object. (303 MiB and 5 s were seen.)"""
    path.write_bytes(old_format(b"\x80\x02" + opcodes * (_pth.PICKLE_LIMIT // len(opcodes)) + b"."))
    ended = subprocess.run([sys.executable, "-c", LOAD, path], capture_output=True, text=True, timeout=300)
    assert 50 << 10 < int(ended.stdout) < 400 << 10  # kilobytes


def test_small_pytorch_file_cannot_take_all_memory(path, state):
    torch.save({"pos_embed": torch.zeros(1).expand(1 << 33)}, path)
    assert "far more memory" in refusal(path)
    torch.save({**state, **{f"x{i}": torch.zeros(1).expand(1 << 24) for i in range(100)}}, path)
    assert "far more memory" in refusal(path)


@pytest.mark.parametrize("claimed", [1 << 40, (1 << 62) + 1, -1])
def test_old_pytorch_file_that_lies_about_its_size(path, claimed):
    torch.save({"a": torch.arange(1000.0)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    count = struct.pack("<q", 1000)
    assert content.count(count) == 1
    path.write_bytes(content.replace(count, struct.pack("<q", claimed)))
    refusal(path)


def test_pytorch_file_whose_tensor_is_larger_than_its_record(path):
    torch.save({"a": torch.arange(5.0)}, path)
    longer = repack(path, lambda name, content: content.replace(b"K\x05", b"J\x00\x00\x00\x10"))
    assert longer
    refusal(path)


def repack(path: Path, change, compression: int = zipfile.ZIP_STORED) -> bool:
    """Write an archive anew with changed contents; whether any has changed."""
    with zipfile.ZipFile(path) as archive:
        old = {name: archive.read(name) for name in archive.namelist()}
    new = {name: change(name, content) for name, content in old.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in new.items():
            archive.writestr(name, content)
    return old != new


def test_pytorch_file_that_was_compressed(path, state):
    torch.save(state, path)
    repack(path, lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert "compressed in a way that torch never does" in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds no tensors by name"),
        ({"epoch": 7}, "it holds no tensors by name"),
        (torch.zeros(3), "it holds no tensors by name"),
        ({"a": torch.eye(3).to_sparse()}, "it asks for torch._utils._rebuild_sparse_tensor, and only plain tensors"),
        ({f"{i:0900}": torch.zeros(0) for i in range(5000)}, "it takes 4913256 bytes to list its tensors"),
    ],
    ids=["list", "no tensors", "a tensor", "sparse", "many"],
)
def test_pytorch_files_of_other_things(path, content, message):
    torch.save(content, path)
    assert message in refusal(path)


def test_pytorch_file_that_holds_itself(path):
    content: dict = {}
    content["model"] = content
    torch.save(content, path)
    assert "it holds no tensors by name" in refusal(path)


# .npz files


def array(shape: str = "(4,)", descr: str = "'<f4'", content: bytes = bytes(16)) -> bytes:
    """An .npy file with a header that may lie."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def test_npz_of_objects(path):
    marker = path.with_name("ran")
    with path.open("wb") as file:
        np.savez(file, cls=np.array([Payload(marker)], dtype=object))
    assert "damaged or holds more than arrays" in refusal(path)
    assert not marker.exists()


def test_npz_that_unpacks_to_a_thousand_times_its_size(path):
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("cls.npy", "w") as part:
        for _ in range(300):
            part.write(zeros)
    assert path.stat().st_size < 300 << 10 << 1
    assert refusal(path) == "the file would take 300 MiB in memory, far beyond its size"


def test_npz_that_claims_to_unpack_to_less_than_it_does(path):
    """The claim holds: no more is unpacked."""
    content = array(content=bytes(1 << 20))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cls.npy", content)
        archive.infolist()[0].file_size = 1000
        archive.infolist()[0].CRC = zlib.crc32(content[:1000])
    refusal(path)


def test_npz_of_overlapping_entries(path):
    """Ten thousand names for one place."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.npy", array(shape="(262144,)", content=bytes(1 << 20)))
        first = archive.infolist()[0]
        for i in range(10_000):
            again = zipfile.ZipInfo(f"{i}.npy")
            again.header_offset, again.CRC = first.header_offset, first.CRC
            again.file_size = again.compress_size = first.file_size
            archive.filelist.append(again)
    assert "would take 10001 MiB in memory" in refusal(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_npz_compressed_as_numpy_never_does(path, method):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("cls.npy", array())
    assert "compressed in a way that numpy never does" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        array(shape=f"({1 << 60},)"),
        array(shape=f"({1 << 62}, 4)"),
        array(shape="(" + "9" * 5000 + ",)"),
        array(shape="(-4,)"),
        array(shape="(" * 4000),
        array(shape="(" + "-" * 9000 + "1,)"),
        array(descr="'|O'"),
        array(descr="'|S0'", shape=f"({1 << 60},)"),
        array(descr="[('a', '<f4')]"),
        array(descr="'<f4'.__class__"),
        array(descr="'<M8[s]'"),
        array(descr="'<U4'"),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFFF0) + bytes(100),
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"",
    ],
    ids=lambda content: ascii(content[8:70]),
)
def test_npz_with_a_lying_header(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", content)
    assert "damaged or holds more than arrays" in refusal(path)


def test_archive_with_a_huge_directory(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", array())
        archive.infolist()[0].comment = bytes(60_000)
        archive.filelist.extend(archive.filelist * 100)
    begin = time.thread_time()
    assert "damaged" in refusal(path)
    assert time.thread_time() - begin < 1


def test_damaged_array(path):
    with path.open("wb") as file:
        np.savez(file, **flax_files.arrays())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(path)


# .safetensors files


def safetensors(header: object, content: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 10**9, 100 << 20, (4 << 20) + 1, 300])
def test_safetensors_header_that_claims_too_much(path, length):
    path.write_bytes(struct.pack("<Q", length) + b"{" + bytes(200))
    assert f"claims {length} bytes" in refusal(path)


def test_safetensors_header_of_100_megabytes(path):
    path.write_bytes(safetensors(b'{"a":1' + b" " * (100 << 20) + b"}"))
    begin = time.thread_time()
    assert "claims 104857607 bytes" in refusal(path)
    assert time.thread_time() - begin < 1


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([2], 0, 8), "b": entry([2], 0, 8)},
        {"a": entry([1], 4, 8)},
        {"a": entry([2], 0, 8), "b": entry([1], 12, 16)},
        {"a": entry([1 << 62], 0, 8)},
        {"a": entry([1 << 62, 1 << 62], 0, 8)},
        {"a": entry([-2], 0, 8)},
        {"a": entry([2], 8, 0)},
        {"a": entry([2], 0, 1 << 62)},
        {"a": entry([2], 0, 8, "F3")},
        {"a": {"dtype": "F32"}},
        {"a": 1},
        {"__metadata__": {"a": {}}},
        b"{" * 100_000,
        b'{"a":' * 100_000,
        b'{"\xff": 1}',
        b"{}x",
    ],
    ids=lambda header: ascii(header)[:40],
)
def test_safetensors_with_a_lying_header(path, header):
    path.write_bytes(safetensors(header))
    assert "damaged or cut off" in refusal(path)


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "I8", "I64", "U16", "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"])
def test_safetensors_of_other_types(path, state, dtype):
    size = {"I64": 64, "C64": 64, "U16": 16, "F4": 4}.get(dtype, 8)
    save_file({name: tensor for name, tensor in state.items() if name != "norm.bias"}, path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    header["norm.bias"] = entry([48], end, end + 48 * size // 8, dtype)
    path.write_bytes(safetensors(header, content[8 + length :] + bytes(48 * size // 8)))
    if dtype.startswith("F8"):
        assert load(path).state["norm.bias"].abs().max() < 1e-38
    else:
        assert re.search("norm.bias|damaged", refusal(path))


def test_names_cannot_colour_the_terminal(path, state):
    save_file({**state, "\x1b[31mred\n": torch.zeros(1)}, path)
    assert refusal(path) == r"unexpected in a timm file: \x1b[31mred\n"


# JSON files beside the weights


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "config.json is damaged"),
        (b'{"a":' * 100_000, "config.json is damaged"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "config.json is damaged"),
        (b"[1]", "config.json holds a list, not an object"),
        (b"\xff\xfe\xfd", "config.json is damaged"),
        (b"", "config.json is damaged"),
        (b"{" + b" " * (9 << 20) + b"}", "config.json has 9 MiB; a file like this has a few kB"),
    ],
    ids=["lists", "objects", "digits", "list", "bytes", "empty", "large"],
)
def test_config_that_is_none(tmp_path, state, content, message):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({"weight_map": {"norm.bias": "../model.safetensors"}}, "which is no file beside it"),
        ({"weight_map": {"norm.bias": "/dev/zero"}}, "which is no file beside it"),
        ({"weight_map": {"norm.bias": "\x1b[31mred"}}, r"lists '\x1b[31mred'"),
        ({"weight_map": {"norm.bias": "pipe"}}, "which is no file beside it"),
        ({"weight_map": {"norm.bias": 7}}, "has no weight_map of files by tensor"),
        ({"weight_map": []}, "has no weight_map of files by tensor"),
        ({}, "has no weight_map of files by tensor"),
    ],
    ids=str,
)
def test_index_that_is_none(tmp_path, shards, message):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert message in refusal(tmp_path)


# What is no file of weights at all


def test_no_file(path):
    assert refusal(path) == "no such file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>", "neither an .npz, a .safetensors nor a PyTorch file: it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "a PyTorch file: it only points to a file in Git LFS"),
        (b"\x89HDF\r\n\x1a\n", "a PyTorch file: it begins like none of them"),
        (b"\x00" * 100, "a PyTorch file: it begins like none of them"),
        (b"P", "a PyTorch file: it begins like none of them"),
        (b"PK", "the file is damaged or cut off"),
        (b"PK\x05\x06" + bytes(18), "not a file of weights"),
        (b"\x80", "not a file of weights"),
        (b"\x80\x02.", "not a file of weights"),
        (b"\x80\x02}q\x00.", "not a file of weights"),
    ],
    ids=ascii,
)
def test_other_files(path, content, message):
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.98, 0.9999])
@pytest.mark.parametrize("kind", ["npz", "safetensors", "zip", "old"])
def test_truncated_files(path, state, kind, keep):
    if kind == "npz":
        with path.open("wb") as file:
            np.savez(file, **flax_files.arrays())
    elif kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    message = refusal(path)
    assert "damaged" in message or "not a file of weights" in message


@pytest.mark.parametrize("made", ["fifo", "socket", "folder", "loop", "broken link"])
def test_what_is_no_file(tmp_path, made):
    path = tmp_path / "model.pth"
    if made == "fifo":
        os.mkfifo(path)
    elif made == "folder":
        path.mkdir()
    elif made == "loop":
        path.symlink_to(path)
    elif made == "broken link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path = Path("/dev/zero")
    refusal(path)


def test_file_that_may_not_be_read(path, monkeypatch):
    def forbid(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path.write_bytes(b"PK")
    monkeypatch.setattr(Path, "open", forbid)
    assert refusal(path) == "it cannot be read: Permission denied"


def test_link_to_a_file(tmp_path, state):
    save_file(state, tmp_path / "blob")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    assert_holds(tmp_path / "model.safetensors", state)


@pytest.mark.parametrize("made", ["device", "fifo", "folder", "empty", "damaged"])
def test_command_refuses_in_one_line(tmp_path, capsys, monkeypatch, made):
    path = tmp_path / "model.pth"
    if made == "device":
        path = Path("/dev/zero")
    elif made == "fifo":
        os.mkfifo(path)
    elif made == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"" if made == "empty" else b"PK\x03\x04")
    image = io.BytesIO()
    (tmp_path / "image.png").write_bytes(image.getvalue())
    said = Vit(capsys, monkeypatch)("predict", "--ckpt", path, tmp_path / "image.png")
    assert said.code == 4
    assert said.out == ""
    error, *hint = said.err.splitlines()
    assert error.startswith(f"error: {path}")
    assert len(hint) <= 1
