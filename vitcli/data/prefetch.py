"""Where batches are made ready: on the device that trains, ahead of the update under way."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]
AHEAD = 2  # batches that wait on the device


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; on CUDA without waiting for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def fetched(tensor: Tensor) -> Callable[[], Tensor]:
    """A tensor on its way to the CPU, and what waits for it."""
    if not tensor.is_cuda:
        return tensor.cpu
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    arrived = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> Tensor:
        arrived.synchronize()
        return torch.from_numpy(there.numpy().copy())  # whoever keeps it does not keep pinned memory

    return wait


def ahead(
    batches: Generator[Batch, None, None], device: torch.device, count: int = AHEAD
) -> Generator[Batch, None, None]:
    """The batches on the device, as they come; for CUDA a thread asks for `count` before their turn, on its own stream.

    Close the iterator: that closes `batches` too.
    """
    if device.type != "cuda":
        with contextlib.closing(batches):
            for batch in batches:
                yield batch | {"images": put(batch["images"], device)}
        return
    made: queue.Queue[tuple[Batch | BaseException | None, torch.cuda.Event | None]] = queue.Queue(count)
    stop = threading.Event()
    thread = threading.Thread(target=_make, args=(batches, device, made, stop), daemon=True)
    thread.start()
    try:
        while True:
            batch, ready = made.get()
            if isinstance(batch, BaseException):
                raise batch
            if batch is None or ready is None:
                return
            stream = torch.cuda.current_stream(device)
            stream.wait_event(ready)
            for value in batch.values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(stream)
            yield batch
    finally:
        stop.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                made.get(timeout=0.05)


def _make(
    batches: Generator[Batch, None, None], device: torch.device, made: queue.Queue, stop: threading.Event
) -> None:
    """The thread: batches, then None, or an exception in their stead."""
    last = None
    try:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)), contextlib.closing(batches):
            for batch in batches:
                ready = torch.cuda.Event()
                ready.record()
                made.put((batch, ready))
                if stop.is_set():
                    break
    except BaseException as error:
        last = error
    made.put((last, None))
