"""Batches of samples made in other processes: in order, but each part by whoever is free.

So a process that the machine slows down holds up no other. The images are written where the caller reads them, in
memory that both share. The processes are forked from a server that imports torch and torchvision once and knows
neither the caller's device nor its threads (`forkserver`): a fork of the caller itself would copy both in an undefined
state. They leave SIGINT and SIGTERM to the caller, which decides when to stop, and die with it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitcli.data.handover import CHUNK, Decoded, Handover
from vitcli.data.images import hush_decoders
from vitcli.data.parallel import METHOD, expect_loaders, follow_parent, uninterrupted
from vitcli.data.shared import Shared
from vitcli.errors import DataError, UserError
from vitcli.malloc import keep_freed

HUNG = 600.0  # seconds after which processes that hand over nothing are given up
SPARE = 3  # processes that may be killed before it is given up

ASKED = 3  # chunks that each is asked for, so that it never waits for the next
LEAD = 8  # chunks of each that may be ahead of the batch that is due

Bad = list[tuple[int, str, str]]  # index, path, reason
Sample = tuple[Decoded | None, int, Bad]  # an image or None, its index, and what was broken
Finish = Callable[[Tensor, list[Any]], Tensor]  # images (b, 3, h, w) of some positions, none missing, to the same shape
NONE = -1  # the index of no image
Written = tuple[list[int], Bad]  # indices of images, and what was broken
Write = Callable[[Tensor, list[Any]], Written]  # into so many places, what is at so many positions


class Loaded(NamedTuple):
    """Samples as a batch: images uint8 (b, 3, h, w) and their indices. Those without an image are only in `bad`.

    `killed` processes were replaced by others meanwhile.
    """

    images: Tensor
    indices: np.ndarray
    bad: Bad
    killed: int = 0


class KilledError(DataError):
    """A process is no more."""


def load(
    sample: Callable[[Any], Sample],
    handover: Handover,
    batches: Iterable[list[Any]],
    workers: int,
    finish: Finish | None = None,
) -> Generator[Loaded, None, None]:
    """`sample` of each position of each batch, then `finish` of several.

    They go to other processes by pickle; if `workers` is 0, all is done in this one and images, which must be `Ready`,
    are given straight to their places, as `finish` needs them, too. A process that is killed is replaced by another,
    which does its work anew. Raises KilledError when they are too many. Close the iterator.
    """
    empty = (_Batch(positions, handover) for positions in batches)
    write = partial(_write, sample, handover, finish)
    if workers:
        yield from _by_others(write, handover, empty, workers)
        return
    for batch in empty:
        batch.parts[0] = write(batch.images, batch.positions)
        yield batch.whole()


class _Batch:
    """A batch whose chunks come in any order. `parts` tells by the place of its first image what came of each."""

    def __init__(self, positions: list[Any], handover: Handover):
        self.positions, self.handover = positions, handover
        self.parts: dict[int, Written | Exception] = {}

    @cached_property
    def images(self) -> Tensor:
        """The places, which take up memory from the first image on."""
        return self.handover.empty(len(self.positions))

    def is_whole(self) -> bool:
        return len(self.parts) * CHUNK >= len(self.positions)

    def whole(self) -> Loaded:
        """Raises the first mistake."""
        indices, bad = [], []
        for _, part in sorted(self.parts.items()):
            if isinstance(part, Exception):
                raise part
            indices += part[0]
            bad += part[1]
        found = np.array(indices, dtype=np.int64)
        there = found != NONE
        images = self.images if there.all() else self.images[torch.from_numpy(there)]
        return Loaded(images, found[there], bad)


def _write(
    sample: Callable[[Any], Sample], handover: Handover, finish: Finish | None, room: Tensor, positions: list[Any]
) -> Written:
    """Give the images of some positions."""
    indices, bad = [], []
    for number, position in enumerate(positions):
        image, index, found = sample(position)
        bad += found
        indices.append(NONE if image is None else index)
        handover.give(room, number, image)
    if finish and NONE not in indices:
        images = room[: len(positions)]
        images.copy_(finish(images, positions))
    return indices, bad


def _by_others(
    write: Write, handover: Handover, batches: Iterator[_Batch], workers: int
) -> Generator[Loaded, None, None]:
    due: deque[_Batch] = deque()
    chunks = _chunks(batches, due)
    ahead = 0  # images that were asked for and not given out
    killed = told = 0
    with _started(write, handover, workers) as crew:
        free = deque(crew * ASKED)
        while True:
            while free and ahead < LEAD * CHUNK * workers + (len(due[0].positions) if due else 0):
                chunk = next(chunks, None)
                if chunk is None:
                    break
                ahead += free.popleft().ask(*chunk)
            if not due:
                return
            if due[0].is_whole():
                batch = due.popleft()
                ahead -= len(batch.positions)
                yield batch.whole()._replace(killed=killed - told)
                told = killed
                continue
            links: dict[Any, _Worker] = {worker.link: worker for worker in crew}
            ready = wait(links, HUNG)
            if not ready:
                raise DataError(
                    f"the loader processes gave nothing for {HUNG:g} seconds",
                    "does the disk with the images still answer?",
                )
            for worker in (links[link] for link in ready):
                try:
                    worker.take()
                except KilledError:
                    killed += 1
                    if killed > SPARE:
                        raise
                    worker.again()
                else:
                    free.append(worker)


def _chunks(batches: Iterator[_Batch], due: deque[_Batch]) -> Iterator[tuple[_Batch, int]]:
    """The chunks of each batch, by the place of the first image. A batch is `due` from its first chunk on."""
    for batch in batches:
        due.append(batch)
        yield from ((batch, first) for first in range(0, len(batch.positions), CHUNK))


class _Worker:
    """A process and the memory shared with it, in which it has a place for each chunk that it is asked for."""

    def __init__(self, write: Write, handover: Handover):
        self.write, self.handover = write, handover
        self.start()

    def start(self) -> None:
        room = Shared((ASKED, *self.handover.room))
        self.asked: deque[tuple[int, _Batch, int]] = deque()
        self.place = 0
        self.link, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context(METHOD).Process(
            target=_serve, args=(self.write, room, theirs), daemon=True
        )
        with _unless_killed():
            process.start()
        self.process = process
        theirs.close()
        self.room = room.tensor
        room.close()

    def ask(self, batch: _Batch, first: int) -> int:
        """For the images from `first` on; how many they are."""
        positions = batch.positions[first : first + CHUNK]
        self.asked.append((self.place, batch, first))
        with suppress(OSError):  # it is gone, as `take` finds
            self.link.send((self.place, positions))
        self.place = (self.place + 1) % ASKED
        return len(positions)

    def take(self) -> None:
        """The next of the chunks that were asked for to where it belongs."""
        with _unless_killed():
            made = self.link.recv()
        place, batch, first = self.asked.popleft()
        if not isinstance(made, Exception):
            self.handover.take(self.room[place], batch.images[first : first + CHUNK])
        batch.parts[first] = made

    def again(self) -> None:
        """Another process, asked for the same."""
        asked = self.asked
        self.end()
        self.start()
        for _, batch, first in asked:
            self.ask(batch, first)

    def end(self) -> None:
        self.process.kill()  # it holds nothing that another waits for
        self.process.join()
        self.link.close()


@contextmanager
def _started(write: Write, handover: Handover, count: int) -> Iterator[list[_Worker]]:
    """So many processes."""
    expect_loaders()
    crew: list[_Worker] = []

    def end() -> None:
        while crew:
            crew.pop().end()

    atexit.register(end)  # before multiprocessing's own, which would wait for them
    try:
        with uninterrupted():
            crew.extend(_Worker(write, handover) for _ in range(count))
        yield crew
    finally:
        atexit.unregister(end)
        end()


def _serve(write: Write, room: Tensor, link: Connection) -> None:
    """A process's life."""
    follow_parent()
    keep_freed()
    hush_decoders()
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):  # the caller is gone
        while True:
            place, positions = link.recv()
            try:
                made = write(room[place], positions)
            except UserError as error:
                made = error
            except Exception:  # of a class that may not travel
                made = RuntimeError(f"in a loader process:\n{traceback.format_exc()}")
            link.send(made)


@contextmanager
def _unless_killed() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise KilledError(
            "loader processes were killed, perhaps for want of memory", "take fewer: --set data.workers=2, or 0"
        ) from error
