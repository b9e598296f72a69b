"""A share of a data set that is held out, and a data set without it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Self

import numpy as np

from vitcli import rng
from vitcli.data.sources import Dataset, Split
from vitcli.errors import DataError
from vitcli.rng import Stream

if TYPE_CHECKING:
    from PIL import Image


class Subset(Dataset):
    """Some images of another data set, in its order."""

    def __init__(self, whole: Dataset, chosen: np.ndarray):
        self.whole, self.chosen = whole, chosen
        self.classes, self.notes, self.in_memory = whole.classes, whole.notes, whole.in_memory
        self.labels = whole.labels[chosen]
        self.identity = hashlib.sha256(whole.identity + chosen.tobytes()).digest()

    def unlabelled(self) -> Self:
        """Nor are those of the whole set left."""
        copied = super().unlabelled()
        if self.multi_label:
            copied.whole = self.whole.unlabelled()
        return copied

    def image(self, index: int) -> Image.Image:
        """The image."""
        return self.whole.image(int(self.chosen[index]))

    def read(self, index: int) -> bytes | None:
        """The file."""
        return self.whole.read(int(self.chosen[index]))

    def path(self, index: int) -> str:
        """What the whole set calls it."""
        return self.whole.path(int(self.chosen[index]))

    def damage(self) -> list[str]:
        """Of the whole set's files."""
        return self.whole.damage()

    def order(self, rng: np.random.Generator, chosen: np.ndarray) -> np.ndarray:
        """As the whole set has it."""
        return np.searchsorted(self.chosen, self.whole.order(rng, self.chosen[chosen]))


def share(whole: Dataset, held_out: float, split: Split, name: str) -> Dataset:
    """Hold out a share of each class: at least one image, and never the last one. The choice depends on no seed.

    Where an image may be of several classes, it is a share of all images. Raises DataError if none can be held out of
    `name`.
    """
    val = np.zeros(len(whole), dtype=bool)
    for number, own in enumerate(_groups(whole)):
        count = min(max(1, round(held_out * len(own))), len(own) - 1)
        if count > 0:
            val[rng.generator(0, Stream.SPLIT, number).permutation(own)[:count]] = True
    chosen = np.flatnonzero(val == (split == "val"))
    if not len(chosen):
        few = f"{name!r}" if whole.multi_label else f"each class of {name!r}"
        raise DataError(f"{few} has one image, so none can be held out", "add images, or a val split")
    return Subset(whole, chosen)


def _groups(whole: Dataset) -> list[np.ndarray]:
    """The images of each class, or all together where classes overlap."""
    if whole.multi_label:
        return [np.arange(len(whole))]
    return np.split(np.argsort(whole.labels, kind="stable"), np.cumsum(whole.counts)[:-1])
