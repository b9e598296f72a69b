"""What `vit runs` prints: the runs at a glance, and their curves side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from vitcli.report.tables import printable, to_json

if TYPE_CHECKING:
    from vitcli.history import Past, Row

BARS, COLUMNS = "▁▂▃▄▅▆▇█", 40
UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def lines(runs: Iterable[Past]) -> Iterator[str]:
    """A line each: folder, step, best top-1 or mAP, state, size, age, with tabs between."""
    return ("\t".join(_cells(run)) for run in runs)


def table(runs: Iterable[Past]) -> Table:
    """The runs, a row each."""
    table = Table("run", "step", "best top-1", "", "size", "changed", box=None, pad_edge=False)
    for run in runs:
        table.add_row(*map(Text, _cells(run)))
    return table


def json(runs: Iterable[Past]) -> str:
    """The runs as one JSON object; `size` in bytes, `changed` in seconds since 1970."""
    return to_json({"runs": [run._asdict() | {"path": str(run.path)} for run in runs]})


def comparison(logs: dict[str, list[Row]], recipes: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Each curve of each run on one scale, with its best and last value; then the keys in which the recipes differ."""
    width = max(map(len, logs))
    end = max((row["step"] for rows in logs.values() for row in rows), default=0)
    for key, best in (("loss", min), ("val_loss", min), ("val_top1", max), ("val_map", max)):
        curves = {name: [(row["step"], row[key]) for row in rows if key in row] for name, rows in logs.items()}
        values = [value for curve in curves.values() for _, value in curve]
        if values:
            yield f"{key} from {min(values):.4g} to {max(values):.4g}, steps 0 to {end:,}"
        for name, curve in curves.items():
            if curve:
                bars = _bars(curve, end, min(values), max(values))
                told = f"best {best(value for _, value in curve):.4f}  last {curve[-1][1]:.4f}"
                yield f"  {printable(name):<{width}}  {bars}  {told}"
    for key in sorted({key for recipe in recipes.values() for key in recipe}):
        found = [printable(str(recipe.get(key))) for recipe in recipes.values()]
        if len(set(found)) > 1:
            yield f"{key}: {' | '.join(found)}"


def _cells(run: Past) -> tuple[str, ...]:
    age = max(0.0, time.time() - run.changed)
    unit, seconds = next((unit, seconds) for unit, seconds in UNITS if age >= seconds or seconds == 1)
    return (
        printable(str(run.path)),
        f"{run.step:,}/{'?' if run.steps is None else f'{run.steps:,}'}",
        "-" if run.best is None else f"{run.best:.2%}{' mAP' if run.measure == 'mAP' else ''}",
        run.state,
        f"{run.size / 1e6:,.1f} MB",
        f"{age / seconds:.0f} {unit} ago",
    )


def _bars(curve: list[tuple[int, float]], end: int, low: float, high: float) -> str:
    """A curve over the steps 0 to `end`: in each column the mean of its values, or the one before where it has none."""
    columns: list[list[float]] = [[] for _ in range(COLUMNS)]
    for step, value in curve:
        columns[step * (COLUMNS - 1) // max(1, end)].append(value)
    while not columns[-1]:
        columns.pop()
    bars = ""
    for values in columns:
        share = (sum(values) / len(values) - low) / (high - low or 1.0) if values else 0.0
        bars += BARS[round(7 * share)] if values else bars[-1:] or " "
    return bars.ljust(COLUMNS)
