"""How a module is called in training, and how several processes bring their gradients together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from vitcli.errors import RecipeError
from vitcli.processes import Processes
from vitcli.runtime import Shard

if TYPE_CHECKING:
    import torch

    from vitcli.objectives._module import ObjectiveModule


class Engine:
    """A module in training; the processes' gradients become their mean.

    `ddp` keeps the whole model in each process, `fsdp` a part of it. `exact` is the number of parts that a batch is
    cut into, whatever process computes them: their gradients are added in a fixed tree, so that any number of
    processes comes to the same bits.
    """

    def __init__(
        self, module: ObjectiveModule, processes: Processes, shard: Shard, exact: int | None, device: torch.device
    ):
        self.module = module
        self.forward: Callable[..., Any] = module
        self._processes = processes
        self._exact = exact is not None
        self._sums: list[tuple[int, list[torch.Tensor]]] = []
        several = processes.count > 1 and not self._exact
        self._sharded = several and shard == "fsdp"
        self._replicated = several and shard == "ddp"
        if self._sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (processes.count,))
            # Not the module itself: its model is also called alone, and may be before the module is.
            for part in [*module.model.blocks, *module.children()]:
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
        if self._replicated:
            from torch.nn.parallel import DistributedDataParallel

            ids = [device] if device.type == "cuda" else None
            replicated = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
            # Buffers are constants here, and a process that repeats an update would send them alone.
            replicated.broadcast_buffers = False
            self.forward = replicated

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Forward and backward of one part of the batch; after the `last` the processes exchange gradients."""
        if self._sharded:
            for child in self.module.children():
                child.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
        waiting = self._replicated and not last
        with self.forward.no_sync() if waiting else nullcontext():  # pyright: ignore[reportFunctionMemberAccess]
            yield
        if self._exact:
            self._add()
            if last:
                self._exchange()

    def _add(self) -> None:
        """Take a part's gradients, and add every two sums of equally many parts."""
        level, sums = 0, [_take(p) for p in self._trained()]
        while self._sums and self._sums[-1][0] == level:
            _, before = self._sums.pop()
            level, sums = level + 1, [a + b for a, b in zip(before, sums, strict=True)]
        self._sums.append((level, sums))

    def _exchange(self) -> None:
        """Add the processes' sums, each two neighbours first, and hand the mean to the optimiser."""
        import torch
        import torch.distributed as dist

        ((_, sums),) = self._sums
        self._sums = []
        if self._processes.count > 1:
            flat = torch.cat([tensor.flatten() for tensor in sums])
            found = [torch.empty_like(flat) for _ in range(self._processes.count)]
            dist.all_gather(found, flat)
            while len(found) > 1:
                found = [a + b for a, b in zip(found[::2], found[1::2], strict=True)]
            sums = [p.view_as(s) for p, s in zip(found[0].split([s.numel() for s in sums]), sums, strict=True)]
        for parameter, tensor in zip(self._trained(), sums, strict=True):
            parameter.grad = tensor / self._processes.count

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def exact_size(parts: int, batch: int, processes: Processes) -> int:
    """Images in each of the `parts` of a batch. Raises RecipeError if the batch or the processes do not fit."""
    if parts & (parts - 1):
        raise RecipeError(f"runtime.exact: {parts} is not a power of two", "8 goes with 1, 2, 4 and 8 processes")
    if batch % parts:
        raise RecipeError(
            f"batch {batch} cannot be cut into runtime.exact={parts} equal parts",
            f"--set batch={-(-batch // parts) * parts}",
        )
    if parts % processes.count:
        raise RecipeError(
            f"runtime.exact={parts} parts cannot be shared equally by {processes.count} processes",
            "start 1, 2, 4, … processes, at most as many as there are parts",
        )
    return batch // parts


def _take(parameter: torch.nn.Parameter) -> torch.Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None, "a parameter that is not trained"
    return gradient
