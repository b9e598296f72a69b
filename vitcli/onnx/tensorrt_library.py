"""NVIDIA's TensorRT or TensorRT-RTX: which is installed, and whether its engines can run here.

TensorRT builds an engine on the GPU that is to run it. TensorRT-RTX builds without one, for all GPUs that it knows.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

MODULES = {"TensorRT": "tensorrt", "TensorRT-RTX": "tensorrt_rtx_bindings"}
INSTALL = 'pip install "vitcli[tensorrt]" brings TensorRT-RTX; TensorRT itself comes from NVIDIA'


class Library(NamedTuple):
    """A library that loads. `complaints` are the errors that it has logged."""

    name: str
    version: str
    module: ModuleType
    logger: Any
    complaints: list[str]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def installed() -> list[str]:
    """The names of the libraries that are installed, the one to prefer first; they need not load."""
    return [name for name, module in MODULES.items() if find_spec(module)]


@cache
def load(name: str) -> Library:
    """An installed library. Raises ImportError or OSError where it does not load."""
    module = importlib.import_module(MODULES[name])
    complaints: list[str] = []
    wrong = (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR)

    class Logger(module.ILogger):
        """TensorRT keeps the first logger of a process for good."""

        def log(self, severity: Any, message: str) -> None:
            if severity in wrong:
                complaints.append(message)

    return Library(name, module.__version__, module, Logger(), complaints)


def why_not(library: Library) -> str | None:
    """Why engines of a library cannot run here; None if they can."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if library.name == "TensorRT":
        return None
    major, minor = torch.cuda.get_device_capability()
    known = [name.removeprefix("SM") for name in library.module.ComputeCapability.__members__ if name.startswith("SM")]
    usual = [number for number in known if number != "75"]  # an engine for Turing must be built for it alone
    if f"{major}{minor}" in usual:
        return None
    shown = ", ".join(f"{number[:-1]}.{number[-1]}" for number in usual)
    return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and {library.name} runs on {shown}"
