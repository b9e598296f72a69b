"""Signals: training ends after the update under way, with a checkpoint."""

from __future__ import annotations

import signal


class Stopped(Exception):  # noqa: N818 (not an error)
    """Raised inside an evaluation when a signal has come."""


class Stop:
    """Remembers SIGINT and SIGTERM instead of obeying at once. `signal` is the first that came."""

    signal: int | None = None

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: object) -> None:
        self.signal = self.signal or number

    def check(self, *_: object) -> None:
        """Raise Stopped if a signal has come."""
        if self.signal:
            raise Stopped
