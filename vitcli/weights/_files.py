"""Tensors by name out of a file that nobody vouches for. What it holds decides how it is read, not what it is called.

No code of a file ever runs: arrays of objects are refused, and a PyTorch file is opened by torch's restricted reader
in a process of its own (`_pth.py`).
"""

import io
import json
import re
import struct
import time
import zipfile
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.weights import NAMES, Beside, _reader

HEADER_LIMIT = 4 << 20  # bytes of a list of tensors, in whatever form; a real one has some ten or hundred kB
JSON_LIMIT = 8 << 20  # bytes of a config.json
PATIENCE = 300, 10 << 20  # seconds for any PyTorch file, and bytes of it that a second must do in addition
SAVE = 'save them: torch.save(torch.jit.load(FILE, "cpu").state_dict(), NEW_FILE)'
KNOWN = "known are .npz, .safetensors, and torch.save(model.state_dict(), ...) without other objects"
AGAIN = "copy or download it again"
# What files often are that were to be weights, by how they begin.
OTHERS = {
    b"<": "it is a web page",
    b"version ": "it only points to a file in Git LFS",
}


def read_beside(path: Path) -> Beside:
    """The JSON files of a folder of transformers, timm or open_clip, for the folder itself or a file in it that bears
    its name, and the metadata of a .safetensors.

    Raises CheckpointError for one that is no JSON object.
    """
    file = _file_in(path) if path.is_dir() else path
    if file.name not in NAMES:
        return Beside(metadata=_metadata(file))
    config = "open_clip_config.json" if file.name.startswith("open_clip") else "config.json"
    preprocessor = _json(file.with_name("preprocessor_config.json"))
    return Beside(_json(file.with_name(config)), preprocessor, metadata=_metadata(file))


def _metadata(path: Path) -> dict[str, str]:
    """What a .safetensors says besides tensors; {} for any other file, and for one that `read_tensors` refuses."""
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > HEADER_LIMIT:
            return {}
        with safe_open(path, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of a few megabytes at most; {} where there is no file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{path.name} has {path.stat().st_size >> 20} MiB; a file like this has a few kB")
    try:
        loaded = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path.name} is damaged: {_line(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path.name} holds a {type(loaded).__name__}, not an object")
    return loaded


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an .npz, .safetensors or PyTorch file, without wrappers' prefixes; or of a folder with one.

    Raises CheckpointError.
    """
    file = _file_in(path) if path.is_dir() else path
    return _strip(_read_shards(file) if file.name.endswith(".index.json") else _read_file(file))


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the files beside an index, each of them where its `weight_map` says."""
    listed = _json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(f"{index.name} has no weight_map of files by tensor")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(listed.values())):
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise CheckpointError(f"{index.name} lists {ascii(shard)[:80]}, which is no file beside it")
        found = _read_file(index.parent / shard)
        if wrong := found.keys() ^ {name for name, file in listed.items() if file == shard}:
            raise CheckpointError(f"{ascii(shard)[:80]} and {index.name} differ over {ascii(min(wrong))[:80]}")
        tensors |= found
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError("it is a device or a pipe, not a file" if path.exists() else "no such file")
    if not path.stat().st_size:
        raise CheckpointError("the file is empty", AGAIN)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror}") from error
    if start.startswith(b"PK"):
        return _read_zip(path)
    if start[8:9] == b"{":
        return _read_safetensors(path, header=struct.unpack("<Q", start[:8])[0])
    if start.startswith(b"\x80"):  # torch's format before 1.6
        return _read_pytorch(path)
    what = next((what for begin, what in OTHERS.items() if start.startswith(begin)), "it begins like none of them")
    raise CheckpointError(f"neither an .npz, a .safetensors nor a PyTorch file: {what}", KNOWN)


def _file_in(folder: Path) -> Path:
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"the folder holds none of {', '.join(NAMES)}")


def _strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DataParallel and torch.compile put before all of them."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


class _Archive(io.BufferedReader):
    """A zip file without a directory of many megabytes, which Python's zipfile would read whole."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size and size > HEADER_LIMIT:
            raise zipfile.BadZipFile(f"a part of it claims {size} bytes")
        return super().read(size)


def _read_zip(path: Path) -> dict[str, Tensor]:
    """An archive with an array is an .npz, any other is torch's."""
    try:
        with _Archive(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises many kinds
        raise CheckpointError(
            "the file is damaged or cut off: it begins as a zip archive and does not end as one", AGAIN
        ) from error
    arrays = any(entry.filename.endswith(".npy") for entry in entries)
    if not arrays and any("/code/" in entry.filename for entry in entries):  # as OpenAI publishes CLIP
        raise CheckpointError("it is a program (TorchScript), and only tensors are read", SAVE)
    usual = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) if arrays else (zipfile.ZIP_STORED,)
    if any(entry.compress_type not in usual for entry in entries):
        raise CheckpointError(f"it is compressed in a way that {'numpy' if arrays else 'torch'} never does", KNOWN)
    return _read_npz(path) if arrays else _read_pytorch(path)


def _read_npz(path: Path) -> dict[str, Tensor]:
    tensors = {}
    with _Archive(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > _reader.limit(path):
            raise CheckpointError(f"the file would take {size >> 20} MiB in memory, far beyond its size")
        try:
            for entry in archive.infolist():
                with archive.open(entry) as part:
                    array = np.lib.format.read_array(part, allow_pickle=False)
                tensors[entry.filename.removesuffix(".npy")] = _tensor(array)
        except Exception as error:  # a damaged archive fails in zlib, zipfile, numpy or its header's parser
            raise CheckpointError(
                f"the .npz file is damaged or holds more than arrays: {_line(error)}", AGAIN
            ) from error
    return tensors


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # how numpy shows bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _read_safetensors(path: Path, header: int) -> dict[str, Tensor]:
    if header > min(HEADER_LIMIT, path.stat().st_size):
        raise CheckpointError(f"the .safetensors file is damaged: its header claims {header} bytes", AGAIN)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"the .safetensors file is damaged or cut off: {_line(error)}", AGAIN) from error


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    seconds = PATIENCE[0] + path.stat().st_size // PATIENCE[1]
    child = _reader.take(path)
    begin, clock = time.monotonic(), Timer(seconds, child.kill)
    with child:
        assert isinstance(child.stdout, io.BufferedReader)
        clock.start()
        try:
            return _receive(child.stdout)
        except EOFError as error:
            late = time.monotonic() - begin >= seconds
            reason = f"it takes more than {seconds} seconds to read" if late else "its reader ended too early"
            raise CheckpointError(f"not a file of weights: {reason}", KNOWN) from error
        finally:
            clock.cancel()
            child.kill()


def _receive(pipe: io.BufferedReader) -> dict[str, Tensor]:
    """What `_pth.py` sends. Raises CheckpointError with its reason not to, EOFError if it dies."""
    line = pipe.readline()
    if not line:
        raise EOFError
    contents = json.loads(line)
    if isinstance(contents, dict):
        raise CheckpointError(f"not a file of weights: {_line(contents['error'])}", KNOWN)
    tensors = {}
    for name, dtype, shape in contents:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        if pipe.readinto(content) < len(content):
            raise EOFError
        tensors[name] = tensor
    return tensors


def _line(error: object) -> str:
    """One printable line of what a library says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"[^ -~]", "?", lines[0])[:200]
