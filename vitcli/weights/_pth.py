"""python -P _pth.py SOURCE TARGET BYTES: the tensors of a PyTorch file, written as safetensors.

Runs in a process of its own that may take BYTES of memory more than torch itself. Only torch's restricted reader
opens the file, and whatever it refuses stays refused. Of several sets of weights the averaged one (EMA) is taken.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def main(source: str, target: str, limit: int) -> None:
    """Convert one file, or end with one line on stderr."""
    _limit_memory(limit)
    try:
        tensors = state_dict(torch.load(source, map_location="cpu", weights_only=True))
        save_file(tensors, target)
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise is the file's fault
        sys.exit(_reason(str(error)) or type(error).__name__)


def _reason(error: str) -> str:
    """What torch says, without its advice to open the file unsafely."""
    if asked := re.search(r"GLOBAL (\S+)", error):
        return f"it asks for {asked[1]}, and only tensors are read"
    if "can't allocate memory" in error:
        return "it would take far more memory than a file of this size holds"
    return "torch cannot read it" if "weights_only" in error else error.strip().partition("\n")[0]


def state_dict(loaded: Any) -> dict[str, Tensor]:
    """The tensors by name, out of the usual wrappers; numbers and the like beside them are left."""
    for _ in range(3):  # deep enough for real files; a hostile one may hold itself
        if isinstance(loaded, dict):
            loaded = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
    if not isinstance(loaded, dict):
        raise TypeError(f"it holds a {type(loaded).__name__}, not tensors by name")
    tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise TypeError("it holds no tensors by name")
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def _limit_memory(more: int) -> None:
    """Allow `more` bytes of address space beyond what is taken now. Only Linux can tell and enforce it."""
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
