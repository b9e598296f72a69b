"""Images in files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from vitcli.data.index import Index, block
from vitcli.data.sources import Dataset

if TYPE_CHECKING:
    from PIL import Image


class Files(Dataset):
    """Image files below `root`. `index` holds their relative names; `labels` are its own where none are given.

    Millions of names go to every loader process: an index on disk goes as its place.
    """

    def __init__(self, root: str, index: Index, classes: Sequence[str], labels: np.ndarray | None = None):
        self.root, self.classes = os.path.abspath(root), tuple(classes)  # loader processes may stand elsewhere
        self.index, self._given = index, labels
        self.labels = index["labels"] if labels is None else labels
        digest = hashlib.sha256(index["names"].data)
        digest.update(index["name_ends"].data)
        self.identity = digest.digest()

    @classmethod
    def of(cls, root: str, names: Iterable[str], labels: Iterable[int], classes: Sequence[str]) -> Files:
        """Files by their names relative to `root`."""
        found = np.fromiter(labels, dtype=np.int64)
        return cls(root, Index(block(names) | {"labels": found}, {}), classes)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "labels"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.labels = self.index["labels"] if self._given is None else self._given

    def unlabelled(self) -> Self:
        """Nor are labels left that were given."""
        copied = super().unlabelled()
        if self.multi_label:
            copied._given = copied.labels
        return copied

    def image(self, index: int) -> Image.Image:
        """The decoded file."""
        from vitcli.data.images import decode

        return decode(self.path(index))

    def read(self, index: int) -> bytes:
        """The file."""
        from vitcli.data.images import read

        return read(self.path(index))

    def path(self, index: int) -> str:
        """Where the file is."""
        return os.path.join(self.root, self.index.names(index))
