"""Images in files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vitcli.data.sources import Dataset

if TYPE_CHECKING:
    from PIL import Image


class Files(Dataset):
    """Image files below `root`: relative names, and a label for each.

    The names are one block of bytes, since millions of them go to every loader process.
    """

    def __init__(self, root: str, names: Sequence[str], labels: Sequence[int] | np.ndarray, classes: Sequence[str]):
        self.root, self.classes = os.path.abspath(root), tuple(classes)  # loader processes may stand elsewhere
        self.labels = np.asarray(labels, dtype=np.int64)
        encoded = [os.fsencode(name) for name in names]
        self.identity = b"\0".join(encoded)
        self._ends = np.cumsum([len(name) + 1 for name in encoded], dtype=np.int64) - 1

    def image(self, index: int) -> Image.Image:
        """The decoded file."""
        from vitcli.data.images import decode

        return decode(self.path(index))

    def path(self, index: int) -> str:
        """The file."""
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.path.join(self.root, os.fsdecode(self.identity[start : int(self._ends[index])]))
