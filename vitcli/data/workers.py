"""Samples made in other processes, in order.

The processes are forked from a server that imports torch once and knows neither the caller's device nor its threads
(`forkserver`): a fork of the caller itself would copy both in an undefined state. They leave SIGINT and SIGTERM to
the caller, which decides when to stop, and die with it.
"""

from __future__ import annotations

import atexit
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from vitcli.data.parallel import METHOD, follow_parent, start_server_with, uninterrupted
from vitcli.errors import DataError, UserError
from vitcli.malloc import keep_freed

HUNG = 600.0  # seconds after which a process that hands over nothing is given up

CHUNK = 256  # images that a process loads at a time: a larger batch comes in parts

# The image uint8 (3, h, w) or None, its index in the data set, and what was broken: index, path, reason.
Sample = tuple[Tensor | None, int, list[tuple[int, str, str]]]


class Part(TypedDict):
    """Samples as a batch; those without an image are only in `bad`."""

    images: Tensor
    indices: Tensor
    bad: list[tuple[int, str, str]]


def load(
    sample: Callable[[Any], Sample], res: Sequence[int], positions: Iterable[list[Any]], workers: int
) -> Generator[Part, None, None]:
    """`sample` of each position, in parts as `positions` gives them; in this process if `workers` is 0.

    `sample` goes to other processes by pickle. Raises DataError if one of them is killed. Close the iterator.
    """
    source = _Source(sample, res)
    if not workers:
        yield from _whole(map(source.__getitems__, positions))
        return
    start_server()
    with warnings.catch_warnings(action="ignore"):  # torch's opinion of the number of workers
        loader = DataLoader(
            source,  # pyright: ignore[reportArgumentType] (a map-style data set needs no more than __getitems__)
            batch_sampler=positions,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_settle,
            multiprocessing_context=METHOD,
            generator=torch.Generator(),  # else it draws from the global one
        )
        with uninterrupted():
            iterator = iter(loader)
    close = partial(_close, iterator)
    atexit.register(close)  # before multiprocessing's own, which would wait for the workers
    try:
        yield from _whole(_parts(iterator))
    finally:
        atexit.unregister(close)
        close()


def start_server() -> None:
    """Begin to start the process that the workers are forked from; it takes as long as importing torch."""
    start_server_with(["vitcli.data.loader"])


class _Source:
    """What a worker holds, as torch's data sets look."""

    def __init__(self, sample: Callable[[Any], Sample], res: Sequence[int]):
        self.sample, self.res = sample, res

    def __getitems__(self, positions: list[Any]) -> Part | UserError:
        try:
            samples = [self.sample(position) for position in positions]
        except UserError as error:  # torch would hand over its traceback as text
            return error
        made = [(image, index) for image, index, _ in samples if image is not None]
        images = torch.empty((len(made), 3, *self.res), dtype=torch.uint8)
        for to, (image, _) in zip(images, made, strict=True):
            to.copy_(image)
        if get_worker_info():
            images.share_memory_()  # here, where a failure reaches the caller; torch would do it in a thread
        indices = torch.tensor([index for _, index in made], dtype=torch.int64)
        return Part(images=images, indices=indices, bad=[bad for *_, found in samples for bad in found])


def _whole(parts: Iterable[Part | UserError]) -> Iterator[Part]:
    """The parts up to the first mistake, which is raised."""
    for part in parts:
        if isinstance(part, UserError):
            raise part
        yield part


def _parts(iterator: Any) -> Iterator[Part | UserError]:
    waited = threading.Event()
    try:
        while True:
            with _patience(iterator, waited):
                part = next(iterator, None)
            if part is None:
                return
            yield part
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        if "No space left on device" in str(error):
            raise DataError(
                "the loader processes need more shared memory than /dev/shm has",
                "enlarge it (docker run --shm-size=8g), or load in one process: --set data.workers=0",
            ) from error
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
            raise
        if waited.is_set():
            raise DataError(
                f"the loader processes gave nothing for {HUNG:g} seconds", "does the disk with the images still answer?"
            ) from error
        # Whoever dies while it hands over a part is noticed by the broken connection first.
        raise DataError(
            "a loader process was killed, perhaps for want of memory", "take fewer: --set data.workers=2, or 0"
        ) from error


@contextmanager
def _patience(iterator: Any, waited: threading.Event) -> Iterator[None]:
    """Kill the workers if this takes too long: one that hangs has what this process waits for, without end."""

    def give_up() -> None:
        waited.set()
        for process in iterator._workers:
            process.kill()

    watch = threading.Timer(HUNG, give_up)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _settle(worker: int) -> None:
    """The first act of a worker."""
    keep_freed()
    follow_parent()


def _close(iterator: Any) -> None:
    """End the workers. torch asks them to, then sends SIGTERM, which they ignore; a hung one must be killed."""
    iterator._shutdown_workers()
    for process in iterator._workers:
        if process.is_alive():
            process.kill()
            process.join()


def _as_it_is(part: Any) -> Any:
    return part
