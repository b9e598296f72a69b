"""The stages of an export on stderr: a live list with times on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn


class Stages:
    """`begin(name)` ends the stage before. In a `with`, so that the terminal is left clean."""

    def __init__(self, console: Console):
        self.console = console
        self._list: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._begun = "", 0.0

    def __enter__(self) -> Stages:
        if self.console.is_terminal:
            seconds = TextColumn("{task.elapsed:6.1f} s", style="dim")
            stage = SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}")
            self._list = Progress(*stage, seconds, console=self.console)
            self._list.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._end()
        if self._list:
            self._list.stop()

    def begin(self, name: str) -> None:
        """A stage begins."""
        self._end()
        self._name, self._begun = name, time.monotonic()
        if self._list:
            self._task = self._list.add_task(name, total=1)

    def _end(self) -> None:
        if self._list and self._task is not None:
            self._list.update(self._task, completed=1)
            self._list.stop_task(self._task)
        elif self._name:
            self.console.print(f"{self._name}: {time.monotonic() - self._begun:.1f} s", highlight=False, markup=False)
