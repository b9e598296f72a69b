"""Where training runs: device, precision, threads. What follows for a model's parts, fast_paths.py knows."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, PositiveInt, model_validator

from vitcli import cpu, kernels
from vitcli.errors import RecipeError
from vitcli.malloc import keep_freed
from vitcli.processes import ALONE, Processes
from vitcli.schema import Schema, wrong

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Module = TypeVar("Module", bound=nn.Module)

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16"]
Shard = Literal["ddp", "fsdp"]


class RuntimeConfig(Schema):
    """How to compute. Nothing here changes what is computed, beyond rounding."""

    device: Device = "auto"
    precision: Literal["auto", Precision] = Field("auto", description="auto: bf16 where the hardware has it")
    attention: Literal["auto", "sdpa", "explicit", "packed"] = Field(
        "auto", description="explicit is faster on CPUs in bf16; packed, our kernels, on Hopper"
    )
    residual: Literal["auto", Precision] = Field(
        "auto", description="the tokens between blocks, as precision; norms and losses stay in fp32"
    )
    compile: bool | None = Field(None, description="torch.compile the blocks; null: on cuda")
    checkpoint: bool = Field(
        False, description="keep each block's input only, and compute the rest again for gradients"
    )
    micro_batch: PositiveInt | None = Field(None, description="images in memory at a time; null: the whole batch")
    threads: PositiveInt | None = Field(None, description="CPU threads; null: the physical cores")
    shard: Shard = Field("ddp", description="several processes: each with the model, or with a part")
    exact: PositiveInt | None = Field(
        None, description="compute each batch in so many parts, to the same bits in any number of processes; or null"
    )
    timeout: float = Field(600.0, gt=0, description="seconds after which a process that does not answer ends the run")

    @model_validator(mode="after")
    def _check(self) -> RuntimeConfig:
        if self.exact and (self.micro_batch or self.shard == "fsdp"):
            raise wrong("exact", "goes without micro_batch and shard: fsdp")
        return self


@dataclass(frozen=True)
class Runtime:
    """A RuntimeConfig with every choice made; `alone` if no other process trains the same model."""

    device: torch.device
    precision: str
    residual: str
    attention: str
    compile: bool
    threads: int
    checkpoint: bool = False
    alone: bool = True

    def prepare(self, module: Module) -> Module:
        """Move a module to the device and set how it computes; its parameters keep their names."""
        from vitcli.fast_paths import put_in_place

        put_in_place(module.to(self.device), self)
        return module

    def frozen(self, module: Module) -> Module:
        """A module that will not be trained any more: weights that matrix products alone read stay in `precision`.

        So they are not converted at each call, which for one image on a GPU takes as long as a third of the model.
        """
        import torch
        from torch import nn

        if self.precision == "bf16":
            for part in module.modules():
                if type(part) in (nn.Linear, nn.Conv2d):  # others may compute with their weights before
                    part.to(torch.bfloat16)
        return module

    def recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as one CUDA graph, where that is how this runtime computes; else itself."""
        from vitcli.cuda_graph import Recorded

        records = self.compile and self.alone and not self.checkpoint and self.device.type == "cuda"
        return Recorded(function, self.device) if records else function

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Matrix products in `precision`; weights, norms and losses stay in fp32."""
        import torch

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def matmul_speed(self) -> float:
        """Floating-point operations a second of a large matrix product, measured for a moment."""
        import torch

        side = 8192 if self.device.type == "cuda" else 1024
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        matrix = torch.randn(side, side, device=self.device, dtype=dtype)
        return 2 * side**3 / _seconds(matrix, matrix)

    def settings(self) -> str:
        """How it computes, in a few words."""
        between = f" ({self.residual} between blocks)" if self.residual != self.precision else ""
        return f"{self.precision}{between}, {self.attention} attention{', compiled' * self.compile}"

    def describe(self) -> dict[str, Any]:
        """What the numbers of a run depend on besides its recipe; a resumed run is compared with it."""
        import torch

        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "precision": self.precision,
            "residual": self.residual,
            "attention": self.attention,
            "compile": self.compile,
            "threads": self.threads,
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
        }


def start(config: RuntimeConfig, earlier: dict[str, Any] | None = None, processes: Processes = ALONE) -> Runtime:
    """Make every choice that the recipe left open; those of a run that is resumed are taken from `earlier`.

    Several processes make the choices of the first, share a machine's cores, and take a GPU each.

    Raises RecipeError if the asked device is not there.
    """
    import torch

    threads = config.threads or max(1, cpu.physical_cores() // processes.neighbours)
    torch.set_num_threads(threads)
    keep_freed()
    device = _device(config.device)
    if device.type == "cuda" and processes.count > 1:
        device = torch.device("cuda", torch.cuda.current_device())
    chosen = {
        "precision": config.precision if config.precision != "auto" else _precision(device),
        "attention": config.attention,
        "compile": config.compile if config.compile is not None else device.type == "cuda",
    }
    if chosen["attention"] == "auto":
        chosen["attention"] = _attention(device, chosen["precision"])
    elif chosen["attention"] == "packed" and (device.type != "cuda" or chosen["precision"] != "bf16"):
        raise RecipeError("runtime.attention: packed is for CUDA in bf16", "--set runtime.attention=auto")
    chosen["residual"] = config.residual if config.residual != "auto" else chosen["precision"]
    chosen |= {key: earlier[key] for key in chosen if earlier and key in earlier}
    if chosen["attention"] == "packed" and device.type != "cuda":  # a run that began elsewhere
        chosen["attention"] = "sdpa"
    chosen = processes.all(chosen)[0]
    alone = processes.count == 1
    return Runtime(device=device, threads=threads, checkpoint=config.checkpoint, alone=alone, **chosen)


def seed(value: int) -> None:
    """Seed torch's own generators, on every device: dropout, stochastic depth and first weights."""
    import torch

    torch.manual_seed(value)


def _device(name: str) -> torch.device:
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[name]:
        known = ", ".join(kind for kind, found in there.items() if found)
        raise RecipeError(
            f"runtime.device: {name} is not available here", f"available: {known}; `vit doctor` says more"
        )
    return torch.device(name)


def _precision(device: torch.device) -> str:
    """bf16 where the device has instructions for it. A race of both would end now so and now so on a busy machine."""
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if device.type == "cpu" and cpu.bf16_instructions() else "fp32"


def _attention(device: torch.device, precision: str) -> str:
    """The fastest that was measured, of those that can be built here."""
    import torch

    if precision != "bf16" or device.type == "mps":
        return "sdpa"
    if device.type == "cpu":
        return "explicit"
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return "packed" if hopper and kernels.why_not(device) is None else "sdpa"


def _seconds(left: Tensor, right: Tensor) -> float:
    """Time of a matrix product: the best of a few."""
    import torch

    times = []
    for _ in range(6):
        begin = time.perf_counter()
        product = left @ right
        if product.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
