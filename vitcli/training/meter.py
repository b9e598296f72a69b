"""What training counts between two lines of its log: means, speed, waiting, and what went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vitcli.processes import Processes
    from vitcli.training.state import Position
    from vitcli.training.update import Done


class Meter:
    """Means of the objective's scalars, speed and waiting since the last line of the log.

    Nothing here waits for the device but `read` and `settle`. The sums are kept in `position`, and so in a
    checkpoint, with the number of updates that were skipped because their gradient was not finite, and the images that
    were unreadable. They are those of all `processes`, which call `settle` and `unreadable` together.
    """

    def __init__(self, position: Position, processes: Processes):
        self._position, self._processes = position, processes
        self._sums: dict[str, Any] = dict(position.sums) if processes.first else {}
        self._finite: list[tuple[int, Tensor]] = []
        self._unreadable: dict[int, str] = {}
        self._restart()

    def _restart(self) -> None:
        self._begin, self._waited, self._seen = time.monotonic(), 0.0, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training's: an evaluation, a checkpoint."""
        begin = time.monotonic()
        yield
        self._begin += time.monotonic() - begin

    def wait(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self._waited += seconds

    def add(self, step: int, images: int, update: Done) -> None:
        """An update from some images is done, or was skipped, and then counts nothing."""
        self._seen += images
        losses, norm, finite = update
        done = {"images": images} | {name: value * images for name, value in (losses | {"grad_norm": norm}).items()}
        _add(self._sums, {name: (finite * value).where(finite, 0.0) for name, value in done.items()})
        self._finite.append((step, finite))

    def replaced(self, images: dict[int, str]) -> None:
        """Others came in place of these: what is wrong with the image of an index."""
        self._unreadable |= images

    def unreadable(self) -> list[str]:
        """What is wrong with each image that was replaced for the first time; `position` then knows it."""
        found = {index: wrong for part in self._processes.all(self._unreadable) for index, wrong in part.items()}
        new = sorted(found.keys() - set(self._position.bad_images))
        self._position.bad_images = sorted([*self._position.bad_images, *new])
        self._unreadable = {}
        return [found[index] for index in new]

    def settle(self) -> list[int]:
        """Bring `position` up to date; the updates that were skipped since the last time."""
        import torch

        skipped = []
        steps, flags = zip(*self._finite, strict=True) if self._finite else ((), ())
        for step, finite in zip(steps, torch.stack(flags).tolist() if flags else (), strict=True):
            self._position.skipped_in_a_row = 0 if finite else self._position.skipped_in_a_row + 1
            skipped += [] if finite else [step]
        self._finite = []
        self._position.skipped += len(skipped)
        own = {name: float(value) for name, value in self._sums.items()}
        self._position.sums = {}
        for sums in self._processes.all(own):
            _add(self._position.sums, sums)
        return skipped

    def read(self) -> dict[str, float]:
        """The means, images per second and the share of time spent waiting; then start afresh. `settle` first."""
        seconds, sums = time.monotonic() - self._begin, dict(self._position.sums)
        images = sums.pop("images", 0.0)
        means = {name: value / images for name, value in sums.items()} if images else {}
        seen = self._seen * self._processes.count
        speed = {"images_per_second": round(seen / seconds, 1), "waiting": round(self._waited / seconds, 3)}
        self._sums, self._position.sums = {}, {}
        self._restart()
        return means | speed


def _add(sums: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value
