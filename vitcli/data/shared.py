"""Memory that a process shares with those that it starts."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any

import torch
from torch import Tensor


class Shared:
    """A `tensor` of uint8 that a process, as it is started, gets by pickle: there it is the tensor alone.

    On Linux memory is taken up as it is written, and none of /dev/shm, which is small in containers.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.shape, self._file = shape, None
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("vitcli")
            os.ftruncate(self._file, math.prod(shape))
            self.tensor = _mapped(self._file, shape)
        else:
            self.tensor = torch.empty(shape, dtype=torch.uint8).share_memory_()

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        if self._file is None:
            return _same, (self.tensor,)
        return _received, (reduction.DupFd(self._file), self.shape)

    def close(self) -> None:
        """No more processes are started; whoever has the tensor keeps it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _mapped(file: int, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, math.prod(shape)), dtype=torch.uint8).view(shape)


def _received(handle: Any, shape: tuple[int, ...]) -> Tensor:
    file = handle.detach()
    try:
        return _mapped(file, shape)
    finally:
        os.close(file)


def _same(tensor: Tensor) -> Tensor:
    return tensor
