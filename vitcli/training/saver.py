"""Writing beside training: the disk works in a thread while the next updates are computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

WAITING = 2  # what may be unwritten at a time: a best model and the checkpoint of the same step


class Saver:
    """Does what it is given one after another, in order. In a `with`, at the end of which all of it is done.

    After an error nothing more is done, so that no checkpoint speaks of a model that was not written. The error is
    raised by the next call, or by the end of the `with` unless another one is on its way.
    """

    def __enter__(self) -> Saver:
        self._failed = False
        self._thread = ThreadPoolExecutor(1, "saver")
        self._unwritten: list[Future[None]] = []
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        if not any(error):
            self.check()

    def begin(self, write: Callable[[], None]) -> None:
        """Do `write` soon; it must own what it writes. Waits while too much is unwritten."""
        self.check()
        if len(self._unwritten) == WAITING:
            self._unwritten.pop(0).result()
        self._unwritten.append(self._thread.submit(self._do, write))

    def check(self) -> None:
        """Raise the error of what has been done."""
        while self._unwritten and self._unwritten[0].done():
            self._unwritten.pop(0).result()

    def wait(self) -> None:
        """Until all of it is done, or raise its error."""
        while self._unwritten:
            self._unwritten.pop(0).result()

    def _do(self, write: Callable[[], None]) -> None:
        if self._failed:
            return
        self._failed = True
        write()
        self._failed = False
