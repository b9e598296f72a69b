"""Speed, measured so that a sceptic believes it: all contenders in one process, in short blocks that alternate.

A machine that slows down, or another program that takes a part of it, then meets each of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vitcli.errors import MemoryExhaustedError
from vitcli.training.micro_batch import is_out_of_memory

if TYPE_CHECKING:
    import torch

WARM_UP = 3  # calls before anything is measured: compilation, choice of kernels, first allocations
RECORDING = 2  # calls whose memory counts, but not their time: one of them may be recorded as a CUDA graph


@dataclass(frozen=True)
class Contender:
    """What is measured. `prepare(batch)` sets everything up and gives the call that handles one batch.

    `settings` says in a few words how it computes. `before` calls precede each block without counting: they use up what
    loader processes made ready while others had their turn.
    """

    name: str
    settings: str
    prepare: Callable[[int], Callable[[], object]]
    before: int = 0


@dataclass
class Result:
    """How fast a contender is, at its best batch: images a second of each block, in their order.

    `memory` is the peak in bytes of what it alone holds on a GPU. `tried` has the images a second at each batch, None
    where the memory was too small. Without a block, `failed` says why.
    """

    name: str
    settings: str
    batch: int = 0
    blocks: list[float] = field(default_factory=list)
    memory: int | None = None
    tried: dict[int, float | None] = field(default_factory=dict)
    failed: str = ""

    @property
    def median(self) -> float:
        """Images a second of the middle block."""
        return statistics.median(self.blocks)


@dataclass(frozen=True)
class Bench:
    """A measurement with what it depends on.

    `flops` are those of one image in this task, counted as published; `ceiling` is what this device's matrix products
    reach in a second, in the precision of the first contender. Both are None where nothing is computed or known.
    """

    task: str
    model: str
    flops: float | None
    ceiling: float | None
    machine: dict[str, str]
    command: str
    results: list[Result]

    def flops_per_second(self, result: Result) -> float | None:
        """What a result comes to."""
        return result.median * self.flops if self.flops else None

    def share(self, result: Result) -> float | None:
        """Of the ceiling."""
        reached = self.flops_per_second(result)
        return reached / self.ceiling if reached and self.ceiling else None


@dataclass(frozen=True)
class _Ready:
    """A contender that is set up at one batch, with the calls that fill a block."""

    batch: int
    call: Callable[[], object]
    before: int
    calls: int
    speed: float
    memory: int | None


def measure(
    contenders: Sequence[Contender],
    batches: Sequence[int],
    device: torch.device,
    *,
    blocks: int,
    seconds: float,
    on_stage: Callable[[str], None],
) -> list[Result]:
    """Each contender's best of `batches`, then `blocks` rounds in which each of them runs for about `seconds`.

    `on_stage` is told what begins. Raises MemoryExhaustedError where nothing fits; what else a contender raises is
    its result, but for the first's, which is raised.
    """
    entered = []
    for contender in contenders:
        result = Result(contender.name, contender.settings)
        try:
            best = _at_best(contender, batches, device, seconds, on_stage, result.tried)
        except Exception as error:
            if contender is contenders[0]:
                raise
            best, result.failed = None, (str(error) or type(error).__name__).splitlines()[0]
        else:
            result.failed = "" if best else "out of memory"
        entered.append((result, best))
    running = [(result, best) for result, best in entered if best]
    if not running:
        shown = ", ".join(map(str, batches))
        raise MemoryExhaustedError(f"out of memory with a batch of {shown}", f"--batch {max(1, min(batches) // 2)}")
    for index in range(blocks):
        on_stage(f"block {index + 1} of {blocks}: {', '.join(result.name for result, _ in running)}")
        for result, best in running:
            result.batch, result.memory = best.batch, best.memory
            if best.before:
                time.sleep(seconds)  # loader processes of the one before go on until they have made enough ready
            _seconds(best.call, best.before, device)
            result.blocks.append(best.batch * best.calls / _seconds(best.call, best.calls, device))
    return [result for result, _ in entered]


def _at_best(
    contender: Contender,
    batches: Sequence[int],
    device: torch.device,
    seconds: float,
    on_stage: Callable[[str], None],
    tried: dict[int, float | None],
) -> _Ready | None:
    """A contender at the fastest of the batches that fit, or None; `tried` is filled in."""
    best = None
    for batch in batches:
        on_stage(f"{contender.name}, batch {batch}: set up and warm up")
        try:
            ready = _ready(contender, batch, device, seconds)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tried[batch] = None
            continue
        tried[batch] = ready.speed
        best = max(best or ready, ready, key=lambda one: one.speed)
    return best


def _ready(contender: Contender, batch: int, device: torch.device, seconds: float) -> _Ready:
    """Set up, warm up, and time one block."""
    before = _allocated(device)
    call = contender.prepare(batch)
    _seconds(call, WARM_UP, device)
    if before is not None:
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    _seconds(call, RECORDING, device)
    some = max(1, contender.before)
    calls = max(1, round(seconds * some / _seconds(call, some, device)))
    speed = batch * calls / _seconds(call, calls, device)
    return _Ready(batch, call, contender.before, calls, speed, _peak(device, before))


def _seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Time of some calls, until the device has done them."""
    import torch

    begin = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def _allocated(device: torch.device) -> int | None:
    """Bytes that tensors hold on a GPU now, once what nobody uses is gone."""
    if device.type != "cuda":
        return None
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, before: int | None) -> int | None:
    """The largest number of bytes since the last reset, beyond what others held `before`."""
    import torch

    return None if before is None else torch.cuda.max_memory_allocated(device) - before
