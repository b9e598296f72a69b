"""ONNX Runtime without its noise, and the reason when one of its providers does not load.

ONNX Runtime lists providers that cannot load, complains on both outputs and goes on with the CPU. So a provider is
tried in a child process, whose complaint is read.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from types import ModuleType
from typing import Literal

Provider = Literal["auto", "cuda", "tensorrt", "cpu"]

# What brings a library that a provider misses. torch 2.15 installs all of CUDA's but cuRAND.
PACKAGES = {
    "libcurand": "nvidia-curand~=10.0",
    "libnvinfer": "tensorrt-cu13>=10.14,<11",
    "libnvonnxparser": "tensorrt-cu13>=10.14,<11",
    "libcu": "onnxruntime-gpu[cuda,cudnn]",
    "libnv": "onnxruntime-gpu[cuda,cudnn]",
}
TRIAL = "import sys; from vitcli.onnx.providers import trial; trial(sys.argv[1])"


def runtime() -> ModuleType:
    """The module onnxruntime, silent, after the CUDA libraries that torch and NVIDIA's packages bring."""
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401  # its import loads most of CUDA, for ONNX Runtime too
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    return onnxruntime


def trial(provider: str) -> None:
    """Load a provider for a model of one node. Prints `loaded`, or leaves ONNX Runtime's complaint on stderr."""
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "trial", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnxruntime = runtime()
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[provider])
    if session.get_providers()[0] == provider:
        print("loaded")


def why_not(provider: str, timeout: float = 120.0) -> tuple[str, str] | None:
    """Why ONNX Runtime cannot use a provider, and what would bring it (may be empty); None if it can."""
    command = [sys.executable, "-c", TRIAL, provider]
    try:
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"did not load within {timeout:.0f} s", ""
    if child.stdout.splitlines()[-1:] == ["loaded"]:
        return None
    return explain(child.stdout + child.stderr, child.returncode)


def explain(noise: str, returncode: int = 0) -> tuple[str, str]:
    """ONNX Runtime's complaint as a reason and a remedy, one line each."""
    if missing := re.search(r"(lib[\w.+-]+): cannot open shared object file", noise):
        library = missing[1]
        if library.startswith("libcuda.so"):
            return f"{library} is missing: no NVIDIA driver", "install the NVIDIA driver"
        package = next((package for start, package in PACKAGES.items() if library.startswith(start)), None)
        return f"{library} is missing", f'pip install "{package}"' if package else ""
    if returncode < 0:
        return f"its process died of signal {-returncode}", ""
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", noise).splitlines() if line.strip(" *")]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["no reason given"])[-1][:200], ""
