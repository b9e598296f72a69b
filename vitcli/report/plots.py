"""Pictures of a run."""

from __future__ import annotations

import json
from pathlib import Path

from vitcli import storage


def draw_results(metrics: Path, picture: Path, title: str) -> None:
    """Draw metrics.jsonl: training and validation loss, top-1 and the learning rate over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from io import BytesIO

    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []

    def curve(key: str) -> tuple[list[float], list[float]]:
        found = [(row["step"], row[key]) for row in rows if key in row]
        return [x for x, _ in found], [y for _, y in found]

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, top1, lr = figure.subplots(1, 3)
    loss.plot(*curve("loss"), color="#9aa5b1", label="training")
    loss.plot(*curve("val_loss"), color="#1f6feb", marker=".", label="validation")
    loss.set_title("loss")
    loss.legend(frameon=False)
    steps, scores = curve("val_top1")
    top1.plot(steps, [100 * score for score in scores], color="#1f6feb", marker=".")
    if scores:
        best = max(range(len(scores)), key=scores.__getitem__)
        place = (steps[best], 100 * scores[best])
        top1.annotate(f"{scores[best]:.2%}", place, (0, -16), textcoords="offset points", ha="center", va="top")
    top1.set_title("validation top-1 (%)")
    lr.plot(*curve("lr"), color="#d97706")
    lr.set_title("learning rate")
    for axes in (loss, top1, lr):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    storage.write_file(picture, buffer.getvalue())
