"""What this machine offers: `vit doctor`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from vitcli import __version__, cpu, kernels
from vitcli.data.parallel import cores
from vitcli.onnx import providers, tensorrt_library

PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "pillow", "safetensors")


class Finding(NamedTuple):
    """One line. `ok` is False where something that could work here does not; `value` then says what to do."""

    section: str
    item: str
    value: str
    ok: bool = True


def inspect() -> list[Finding]:
    """Look at everything. It needs some seconds, since torch is imported and each ONNX provider tried."""
    return [*_system(), *_packages(), *_torch(), *_providers(), *_tensorrt()]


def _system() -> Iterator[Finding]:
    yield Finding("system", "vitcli", __version__)
    yield Finding("system", "Python", platform.python_version())
    yield Finding("system", "OS", platform.platform())
    yield Finding("system", "CPU", cpu_name())
    yield Finding("system", "CPU bf16", ", ".join(cpu.bf16_instructions()) or "no instructions for it: slow")
    yield Finding("system", "memory", _memory())


def cpu_name() -> str:
    """The processor, and how many of its cores this process may use."""
    return f"{cpu.name()}, {cores()} usable cores"


def _memory() -> str:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return "unknown"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return _gib(total) + (f", {_gib(int(free[1]) * 1024)} available" if free else "")


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _packages() -> Iterator[Finding]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    either = [name for name in ("onnxruntime-gpu", "onnxruntime") if found[name]] or ["onnxruntime"]
    for name in PACKAGES:
        if found[name]:
            yield Finding("packages", name, found[name])
        elif not name.startswith("onnxruntime") or name in either:
            yield Finding("packages", name, f"missing: pip install {name}", ok=False)
    if len(either) == 2:
        value = "beside onnxruntime-gpu it overwrites its files: pip uninstall onnxruntime"
        yield Finding("packages", "onnxruntime", value, ok=False)


def _torch() -> Iterator[Finding]:
    if not find_spec("torch"):
        yield Finding("torch", "devices", "torch is missing, so nothing can be computed", ok=False)
        return
    import torch

    yield Finding("torch", "CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    driver = _driver()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            name = torch.cuda.get_device_name(index)
            yield Finding("torch", f"cuda:{index}", f"{name}, {_gib(free)} of {_gib(total)} free, {bf16}")
        yield Finding("torch", "CUDA", f"{torch.version.cuda}, driver {driver or 'unknown'}")
        reason = kernels.why_not(torch.device("cuda"))
        hint = "give it a C compiler and Python's headers, or set runtime.compile=false"
        yield Finding("torch", "Triton", f"builds no kernels: {reason}; {hint}" if reason else "builds", ok=not reason)
    elif driver:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Finding("torch", "CUDA", f"driver {driver} is there, but this torch ({built}) sees no device", ok=False)
    else:
        yield Finding("torch", "CUDA", "no NVIDIA driver here")
    yield from _nccl()
    yield Finding("torch", "MPS", "available" if torch.backends.mps.is_available() else "not here")


def _nccl() -> Iterator[Finding]:
    """What several GPUs talk through, and the settings that the environment gives it."""
    import torch
    import torch.cuda.nccl

    if not hasattr(torch._C, "_nccl_version"):  # where torch is built without it
        yield Finding("torch", "NCCL", "not built in")
        return
    yield Finding("torch", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    for name in sorted(os.environ):
        if name.startswith(("NCCL_", "TORCH_NCCL_")):
            yield Finding("torch", name, os.environ[name])


def _driver() -> str:
    """NVIDIA's driver version, as nvidia-smi says it; "" without one."""
    command = shutil.which("nvidia-smi")
    if not command:
        return ""
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        child = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return child.stdout.split("\n")[0].strip() if child.returncode == 0 else ""


def _providers() -> Iterator[Finding]:
    if not find_spec("onnxruntime"):
        yield Finding("onnxruntime", "providers", "onnxruntime is missing, so no .onnx can be run", ok=False)
        return
    named = providers.runtime().get_available_providers()
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(providers.why_not, named))
    for provider, answer in zip(named, answers, strict=True):
        item = provider.removesuffix("ExecutionProvider")
        if answer is None:
            yield Finding("onnxruntime", item, "loads")
        else:
            reason, remedy = answer
            # TensorRT is used where it is asked for by name, and nothing asks for other hardware's providers.
            needed = provider == "CPUExecutionProvider" or (provider == "CUDAExecutionProvider" and bool(_driver()))
            value = f"does not load: {reason}" + (f"; {remedy}" if remedy else "")
            yield Finding("onnxruntime", item, value, ok=not needed)


def _tensorrt() -> Iterator[Finding]:
    """What `vit export --tensorrt` finds."""
    for name in tensorrt_library.MODULES:
        if name not in tensorrt_library.installed():
            yield Finding("tensorrt", name, "not installed")
            continue
        try:
            library = tensorrt_library.load(name)
        except (ImportError, OSError) as error:
            yield Finding("tensorrt", name, f"does not load: {error}", ok=False)
            continue
        reason = tensorrt_library.why_not(library) if find_spec("torch") else "torch is missing"
        able = "builds engines, and runs none here" if name == "TensorRT-RTX" else "builds and runs none here"
        yield Finding("tensorrt", name, f"{library.version}, {f'{able}: {reason}' if reason else 'usable'}")
