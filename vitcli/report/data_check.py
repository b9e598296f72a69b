"""What `vit data check` shows: lines for a person, and the sizes of the classes as a picture."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vitcli import storage
from vitcli.report.plots import drawn
from vitcli.report.tables import printable

if TYPE_CHECKING:
    from vitcli.data.check import Check

SHOWN = 5  # findings of a kind; JSON has more
NAMED = 60  # classes that a picture can name


def lines(check: Check) -> Iterator[str]:
    """A summary, with the first findings of each kind."""
    for split, count in check.images.items():
        sizes = sorted(check.classes[split].values())
        bare = f", {check.unlabelled[split]:,} without a label" if split in check.unlabelled else ""
        yield f"{split}\t{count:,} images, {len(sizes):,} classes of {sizes[0]:,} to {sizes[-1]:,}{bare}"
    for name, counts in (("modes", check.modes), ("formats", check.formats)):
        yield f"{name}\t{', '.join(f'{kind} {count:,}' for kind, count in counts.items())}"
    if check.sizes:
        yield f"sizes\t{', '.join(f'{name} {width}x{height}' for name, (width, height) in check.sizes.items())}"
    for note in check.notes:
        yield f"note\t{printable(note)}"
    if check.damaged:
        yield f"damaged shards\t{len(check.damaged):,}"
        yield from (f"\t{printable(line)}" for line in check.damaged[:SHOWN])
    findings = {
        "unreadable": check.unreadable,
        "odd": check.odd,
        "same bytes": [" = ".join(group) for group in check.duplicates],
        "near duplicates": [" ~ ".join(group) for group in check.near_duplicates],
        "held out and trained on": [f"{held} and {trained} ({kind})" for held, trained, kind in check.leaks],
        "same bytes, several classes": [" = ".join(group) for group in check.conflicts],
    }
    counts = ("unreadable", "odd", "duplicates", "near_duplicates", "leaks", "conflicts")
    for (name, found), count in zip(findings.items(), (check.counts[key] for key in counts), strict=True):
        yield f"{name}\t{count:,}"
        yield from (f"\t{printable(line)}" for line in found[:SHOWN])
        if count > SHOWN:
            yield f"\tand {count - SHOWN:,} more: --json"
    yield f"speed\t{check.images_per_second:,} images/s"


def draw(check: Check, picture: Path) -> None:
    """A bar for each class, the largest first; with many classes a curve."""
    from matplotlib.figure import Figure

    splits = list(check.classes)
    figure = Figure(figsize=(10, 3.6 * len(splits)), layout="constrained")
    for axes, split in zip(figure.subplots(len(splits), squeeze=False)[:, 0], splits, strict=True):
        ranked = sorted(check.classes[split].items(), key=lambda item: -item[1])
        heights = [count for _, count in ranked]
        axes.set_title(f"{split}: {check.images[split]:,} images of {len(heights):,} classes")
        if len(ranked) <= NAMED:
            axes.bar(range(len(heights)), heights, color="#1f6feb")
            names = [name if len(name) <= 24 else f"{name[:23]}…" for name in map(printable, dict(ranked))]
            axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        else:
            axes.fill_between(range(len(heights)), heights, color="#1f6feb", step="mid")
            axes.set_xlabel("classes, the largest first")
        axes.set_ylabel("images")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    with warnings.catch_warnings(action="ignore"):  # letters of class names that the font lacks
        storage.write_file(picture, drawn(figure))
