"""Where else a run's numbers go, one file each: `track: [tensorboard]` in a recipe names the file.

To add a tracker, add a file with `PACKAGE`, the module that it needs, and `begin(run, mark, step, recipe)`, which
returns a `Tracker`: `run` is the run folder, `mark` a text of its own that stays when it is resumed, `step` where it
stands. Importing the file must not import that module.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from vitcli.errors import RecipeError
from vitcli.schema import folder

FOUND = folder(__name__)
TrackerName: Any = Literal[tuple(FOUND)]


class Tracker(Protocol):
    """Takes the numbers of metrics.jsonl while they are written."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, known after `step` updates."""

    def close(self) -> None:
        """The run ends."""


def require(names: Iterable[str]) -> None:
    """Raise RecipeError for a tracker whose package is not installed."""
    for name in names:
        if not find_spec(FOUND[name].PACKAGE):
            raise RecipeError(f"track: {name} is not installed", f'pip install "vitcli[{name}]"')


@contextmanager
def tracking(
    names: Iterable[str], run: Path, step: int, recipe: Mapping[str, Any], tell: Callable[[str], None]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives what is to be called with each line of metrics.jsonl of a run that stands at `step`.

    A tracker that fails later on gets no more lines, and `tell` says so to a person: training goes on.
    """
    trackers: dict[str, Tracker] = {}

    def attempt(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a tracker's package may raise
            trackers.pop(name)
            tell(f"warning: {name} takes no more of this run's numbers, which metrics.jsonl has: {error}")

    def log(row: Mapping[str, Any]) -> None:
        values = {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
        for name, tracker in list(trackers.items()) if values else ():
            attempt(name, partial(tracker.log, row["step"], values))

    try:
        for name in names:
            trackers[name] = FOUND[name].begin(run, _mark(run), step, recipe)
        yield log
    finally:
        for name, tracker in list(trackers.items()):
            attempt(name, tracker.close)


def _mark(run: Path) -> str:
    """What names this run in trackers' own stores, made when it is first asked for."""
    file = run / "track.txt"
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    return file.read_text()
