"""Too little memory on the device: fewer images at a time, or a line that says what to type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from vitcli.errors import MemoryExhaustedError

if TYPE_CHECKING:
    from vitcli.processes import Processes
    from vitcli.training.state import Position


@dataclass
class Attempt:
    """One attempt at an update's gradients, as a `with`: too little memory makes it `failed`, unless it is `final`.

    Of several processes only the final attempt may exchange gradients: a process that fails in the midst of that
    leaves the others waiting.
    """

    again: bool
    final: bool
    forgiving: bool
    failed: bool = False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        self.failed = self.forgiving and error is not None and is_out_of_memory(error)
        return self.failed


class MicroBatch:
    """How many images go through the model at a time: `size`, halved whenever they do not fit into memory.

    The batch and the step stay as they are; `position`, and so a checkpoint, keeps the size. Processes agree on it by
    trying the first update before they exchange gradients. `rigid` training, whose parts are fixed or which shares a
    model among processes, ends instead. `tell` says to a person that the size has changed.
    """

    def __init__(self, size: int, position: Position, processes: Processes, rigid: bool, tell: Callable[[str], None]):
        self.size, self._tried = size, [size]
        self._position, self._processes, self._rigid, self._tell = position, processes, rigid, tell
        self._on_trial = processes.count > 1 and not rigid

    def attempts(self) -> Iterator[Attempt]:
        """Attempts at the gradients of one update; the last of them succeeds. Raises MemoryExhaustedError."""
        import torch

        alone, again = self._processes.count == 1 and not self._rigid, False
        while True:
            # What a CUDA graph records cannot be repeated in other sizes.
            recording = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
            forgiving = self._on_trial or (alone and not recording)
            attempt = Attempt(again, final=not self._on_trial, forgiving=forgiving)
            yield attempt
            failed = self._processes.largest(attempt.failed) if self._on_trial else attempt.failed
            if failed:
                self._halve()
            elif attempt.final:
                return
            else:
                self._on_trial = False
            again = True

    def _halve(self) -> None:
        import torch

        if self.size == 1:
            raise MemoryExhaustedError(
                f"not even one image at a time fits into memory (tried {', '.join(map(str, self._tried))})",
                "take a smaller model, data.res or a larger model.patch, or runtime.precision=bf16",
            )
        before, self.size = self.size, self.size // 2
        self._position.micro_batch = self.size
        self._tried.append(self.size)
        torch.cuda.empty_cache()
        self._tell(
            f"warning: {before} images at a time do not fit into memory, going on with {self.size}; the batch stays, "
            "dropout and stochastic depth draw anew"
        )

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Where no smaller size may be tried, a MemoryExhaustedError that says what to type."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryExhaustedError(
                f"{self.size} images at a time do not fit into memory: {str(error).splitlines()[0]}",
                f"--set runtime.micro_batch={max(1, self.size // 2)} gives the same training with less memory",
            ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had too little memory. torch has an error of its own for that on GPUs alone."""
    import torch

    words = ("can't allocate memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
