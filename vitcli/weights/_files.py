"""Tensors by name out of a file that nobody vouches for. What it holds decides how it is read, not what it is called.

No code of a file ever runs: arrays of objects are refused, and a PyTorch file is opened by torch's restricted reader
in a process of its own (`_pth.py`).
"""

import json
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.weights import NAMES, Beside

HEADER_LIMIT = 16 << 20  # bytes of a safetensors header; a real one has some hundred kB
EXPANSION_LIMIT = 4, 1 << 30  # a file may take this times its size, and this many bytes more, in memory
JSON_LIMIT = 8 << 20  # bytes of a config.json
KNOWN = "known are .npz, .safetensors, and torch.save(model.state_dict(), ...) without other objects"


def read_beside(path: Path) -> Beside:
    """The JSON files of a folder of transformers or timm, for the folder itself or a file in it that bears its name.

    Raises CheckpointError for one that is no JSON object.
    """
    folder = path if path.is_dir() else path.parent if path.name in NAMES else None
    if folder is None:
        return Beside()
    return Beside(_json(folder / "config.json"), _json(folder / "preprocessor_config.json"))


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of a few megabytes at most; {} where there is no file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{path.name} has {path.stat().st_size >> 20} MiB; a file like this has a few kB")
    try:
        loaded = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path.name} is damaged: {_line(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path.name} holds a {type(loaded).__name__}, not an object")
    return loaded


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an .npz, .safetensors or PyTorch file, without wrappers' prefixes; or of a folder with one.

    Raises CheckpointError.
    """
    if path.is_dir():
        return read_tensors(_file_in(path))
    if not path.is_file():
        raise CheckpointError("no such file")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK"):
        tensors = _read_npz(path) if _holds_arrays(path) else _read_pytorch(path)
    elif start[8:9] == b"{":
        tensors = _read_safetensors(path, header=struct.unpack("<Q", start[:8])[0])
    elif start.startswith(b"\x80"):  # torch's format before 1.6
        tensors = _read_pytorch(path)
    else:
        raise CheckpointError("neither an .npz, a .safetensors nor a PyTorch file", KNOWN)
    return _strip(tensors)


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


def _holds_arrays(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError("the file is damaged: it starts as a zip archive and is none") from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    factor, more = EXPANSION_LIMIT
    if size > factor * path.stat().st_size + more:
        raise CheckpointError(f"the file would take {size >> 30} GiB in memory, far beyond its size")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _tensor(arrays[name]) for name in arrays.files}
    except Exception as error:  # a damaged archive fails in zlib, zipfile, numpy or its header's parser
        raise CheckpointError(f"the .npz file is damaged or holds more than arrays: {_line(error)}") from error


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # how numpy shows bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _read_safetensors(path: Path, header: int) -> dict[str, Tensor]:
    if header > min(HEADER_LIMIT, path.stat().st_size):
        raise CheckpointError(f"the header claims {header} bytes; a file like this has at most {HEADER_LIMIT}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"the .safetensors file is damaged: {_line(error)}") from error


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    with TemporaryDirectory(prefix="vitcli-") as folder:
        target = Path(folder, "tensors.safetensors")
        factor, more = EXPANSION_LIMIT
        limit = factor * path.stat().st_size + more
        # -P keeps this folder, whose files have names of packages, off the child's module path.
        command = [sys.executable, "-P", str(Path(__file__).with_name("_pth.py")), str(path), str(target), str(limit)]
        child = subprocess.run(  # noqa: S603 - our own reader, no shell
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        if child.returncode:
            said = child.stderr.strip().splitlines()
            reason = _line(said[-1]) if said else f"its reader ended with {child.returncode}"
            raise CheckpointError(f"not a file of weights: {reason}", KNOWN)
        return load(target.read_bytes())


def _line(error: object) -> str:
    """One printable line of what a library says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"[^ -~]", "?", lines[0])[:200]
