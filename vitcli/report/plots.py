"""Pictures of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcli import storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vitcli.history import Row


def draw_results(metrics: Path, picture: Path, title: str) -> None:
    """Draw metrics.jsonl: training and validation loss, top-1 and the learning rate over the steps."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    figure, (loss, top1, lr) = _figure()
    loss.plot(*_curve(rows, "loss"), color="#9aa5b1", label="training")
    loss.plot(*_curve(rows, "val_loss"), color="#1f6feb", marker=".", label="validation")
    loss.legend(frameon=False)
    steps, scores = _curve(rows, "val_top1", 100)
    top1.plot(steps, scores, color="#1f6feb", marker=".")
    if scores:
        best = max(range(len(scores)), key=scores.__getitem__)
        place = (steps[best], scores[best])
        top1.annotate(f"{scores[best]:.2f}%", place, (0, -16), textcoords="offset points", ha="center", va="top")
    lr.plot(*_curve(rows, "lr"), color="#d97706")
    figure.suptitle(title)
    _save(figure, picture)


def draw_comparison(logs: dict[str, list[Row]], picture: Path) -> None:
    """Draw the same of several runs, by name, each in its own colour: training loss thin, validation thick."""
    figure, (loss, top1, lr) = _figure()
    for number, (name, rows) in enumerate(logs.items()):
        loss.plot(*_curve(rows, "loss"), color=f"C{number}", linewidth=0.7)
        loss.plot(*_curve(rows, "val_loss"), color=f"C{number}", marker=".")
        top1.plot(*_curve(rows, "val_top1", 100), color=f"C{number}", marker=".", label=name.replace("$", r"\$"))
        lr.plot(*_curve(rows, "lr"), color=f"C{number}")
    top1.legend(frameon=False)
    _save(figure, picture)


def _figure() -> tuple[Any, list[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    places = list(figure.subplots(1, 3))
    for axes, title in zip(places, ("loss", "validation top-1 (%)", "learning rate"), strict=True):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, places


def _curve(rows: list[Row], key: str, scale: float = 1) -> tuple[list[float], list[float]]:
    found = [(row["step"], scale * row[key]) for row in rows if key in row]
    return [x for x, _ in found], [y for _, y in found]


def _save(figure: Any, picture: Path) -> None:
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    storage.write_file(picture, buffer.getvalue())
