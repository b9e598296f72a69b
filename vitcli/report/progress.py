"""Progress of training on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from vitcli.waiting import QUIET_SECONDS


class Progress:
    """Tells a person how a run is going, and keeps every line in the file `log`."""

    def __init__(self, console: Console, log: Path):
        self.console, self.file = console, log
        self._bar: Bar | None = None
        self._printed = 0.0

    @contextmanager
    def training(self, step: int, steps: int, batch: int) -> Iterator[None]:
        """Show the bar from `step` of `steps` on."""
        self.steps = steps
        if not self.console.is_terminal:
            self.note(f"training: step {step} of {steps}, {batch} images a step")
            yield
            return
        columns = (
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=self.console) as self._bar:
            self._task = self._bar.add_task("", total=steps, completed=step, values="")
            yield
        self._bar = None

    def note(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        with self.file.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def step(self, step: int) -> None:
        """An update is done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def log(
        self, step: int, *, loss: float, lr: float, images_per_second: float, waiting: float, **rest: float
    ) -> None:
        """New means are known."""
        values = [f"loss {loss:.4f}", f"lr {lr:.2e}", f"{images_per_second:,.0f} img/s", f"waiting {waiting:.0%}"]
        values += [f"{key} {value:.4f}" for key, value in rest.items()]
        if self._bar:
            self._bar.update(self._task, values="  ".join(values))
        elif time.monotonic() - self._printed > QUIET_SECONDS:
            self._printed = time.monotonic()
            self.note(f"step {step}/{self.steps}  " + "  ".join(values))

    def scored(self, step: int, loss: float, measure: str, value: float, best: bool) -> None:
        """An evaluation is done; its `measure` is top-1 or mAP."""
        self.note(f"step {step}/{self.steps}  val loss {loss:.4f}  {measure} {value:.2%}{'  (best)' if best else ''}")
