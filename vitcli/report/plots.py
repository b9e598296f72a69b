"""Pictures of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from vitcli import storage
from vitcli.history import MEASURES, measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitcli.history import Row


def draw_results(metrics: Path, picture: Path, title: str) -> None:
    """Draw metrics.jsonl: training and validation loss, top-1 or mAP, and the learning rate over the steps."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    key = measure(rows)
    figure, (loss, score, lr) = _figure([key])
    loss.plot(*_curve(rows, "loss"), color="#9aa5b1", label="training")
    loss.plot(*_curve(rows, "val_loss"), color="#1f6feb", marker=".", label="validation")
    loss.legend(frameon=False)
    steps, scores = _curve(rows, key, 100)
    score.plot(steps, scores, color="#1f6feb", marker=".")
    if scores:
        best = max(range(len(scores)), key=scores.__getitem__)
        place = (steps[best], scores[best])
        score.annotate(f"{scores[best]:.2f}%", place, (0, -16), textcoords="offset points", ha="center", va="top")
    lr.plot(*_curve(rows, "lr"), color="#d97706")
    figure.suptitle(title)
    storage.write_file(picture, drawn(figure))


def draw_comparison(logs: dict[str, list[Row]], picture: Path) -> None:
    """Draw the same of several runs, by name, each in its own colour: training loss thin, validation thick."""
    keys = {name: measure(rows) for name, rows in logs.items()}
    figure, (loss, score, lr) = _figure(keys.values())
    for number, (name, rows) in enumerate(logs.items()):
        loss.plot(*_curve(rows, "loss"), color=f"C{number}", linewidth=0.7)
        loss.plot(*_curve(rows, "val_loss"), color=f"C{number}", marker=".")
        score.plot(*_curve(rows, keys[name], 100), color=f"C{number}", marker=".", label=name.replace("$", r"\$"))
        lr.plot(*_curve(rows, "lr"), color=f"C{number}")
    score.legend(frameon=False)
    storage.write_file(picture, drawn(figure))


def _figure(keys: Iterable[str]) -> tuple[Figure, list[Axes]]:
    """Axes for the loss, what the runs are chosen by, and the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    places = list(figure.subplots(1, 3))
    measures = " and ".join(dict.fromkeys(MEASURES[key] for key in keys if key)) or "score"
    for axes, title in zip(places, ("loss", f"validation {measures} (%)", "learning rate"), strict=True):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, places


def _curve(rows: list[Row], key: str, scale: float = 1) -> tuple[list[float], list[float]]:
    found = [(row["step"], scale * row[key]) for row in rows if key in row]
    return [x for x, _ in found], [y for _, y in found]


def drawn(figure: Figure, form: str = "png") -> bytes:
    """A figure as a file; `form` is png, svg or pdf."""
    buffer = BytesIO()
    figure.savefig(buffer, format=form, dpi=110)
    return buffer.getvalue()
