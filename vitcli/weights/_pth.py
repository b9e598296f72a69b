"""python -P _pth.py SOURCE BYTES: the tensors of a PyTorch file, on stdout.

First a line of JSON, [[name, dtype, shape], ...] or {"error": reason}; then the tensors' bytes in that order. What is
sent is let go, so that the two processes never hold two sets of weights.

Runs in a process of its own that may take BYTES of address space more than torch itself. Only torch's restricted
reader opens the file, and whatever it refuses stays refused. Of several sets of weights the averaged one (EMA) is
taken.
"""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

WRAPPERS = ("state_dict_ema", "model_ema", "target_encoder", "teacher", "state_dict", "model", "encoder", "student")
LIST_LIMIT = 4 << 20  # bytes of the line of JSON; a real one has some ten kB
PART = 128 << 20  # bytes to read of one mapping of the file


class NotWeightsError(Exception):
    """The file is torch's, and holds something else."""


def main(source: str, limit: int, out: BinaryIO) -> None:
    """Send one file that may need `limit` bytes of memory, or the reason why not."""
    with Path(source).open("rb") as file:
        mapped = file.read(2) == b"PK"  # torch's format before 1.6 cannot be
    try:
        tensors = read(source, mapped)
        contents = _list(tensors, limit)
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise is the file's fault
        out.write(json.dumps({"error": _reason(error)}).encode() + b"\n")
        return
    out.write(contents)
    done = 0
    for name in list(tensors):
        if mapped and done > PART:  # a new mapping, as only a closed one gives back the pages that were read
            tensors.clear()
            tensors, done = read(source, mapped), 0
        done += tensors[name].nbytes
        out.write(_bytes(tensors.pop(name)))


def read(source: str, mapped: bool) -> dict[str, Tensor]:
    """The tensors; of a mapped file, what nobody asks for is never read."""
    with torch.serialization.safe_globals([Namespace]):  # a plain record of settings, beside many models in training
        return state_dict(torch.load(source, map_location="cpu", weights_only=True, mmap=mapped))


def state_dict(loaded: Any) -> dict[str, Tensor]:
    """The tensors by name, out of the usual wrappers; numbers and the like beside them are left."""
    for _ in range(3):  # deep enough for real files; a hostile one may hold itself
        if isinstance(loaded, dict):
            loaded = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
    if not isinstance(loaded, dict):
        raise NotWeightsError(f"it holds a {type(loaded).__name__}, not tensors by name")
    tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise NotWeightsError("it holds no tensors by name")
    return tensors


def _list(tensors: dict[str, Tensor], limit: int) -> bytes:
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized:
            raise NotWeightsError(f"{ascii(name)[:80]} is sparse or quantized; only plain tensors are read")
    if sum(value.nbytes for value in tensors.values()) > limit:
        raise MemoryError
    contents = json.dumps([(name, str(value.dtype)[len("torch.") :], value.shape) for name, value in tensors.items()])
    if len(contents) > LIST_LIMIT:
        raise NotWeightsError(f"it holds {len(tensors)} tensors; a model has some hundreds")
    return contents.encode() + b"\n"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _reason(error: Exception) -> str:
    """What torch says where it says something, without its advice to open the file unsafely."""
    said = str(error).strip()
    if asked := re.search(r"GLOBAL (\S+)", said):
        return f"it asks for {asked[1][:100]}, and only tensors are read"
    if isinstance(error, MemoryError) or "allocate memory" in said:
        return "it would take far more memory than a file of its size holds"
    if isinstance(error, NotWeightsError):
        return said
    told = isinstance(error, RuntimeError) and "weights_only" not in said
    return f"torch cannot read it: {said.splitlines()[0][:160]}" if told and said else "torch cannot read it"


def limit_memory(more: int) -> None:
    """Allow `more` bytes of address space beyond what is taken now. Only Linux can tell and enforce it."""
    torch.set_num_threads(1)  # each further one would need address space
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    limit_memory(int(sys.argv[2]))
    main(sys.argv[1], int(sys.argv[2]), sys.stdout.buffer)
