"""Images in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vitcli.data.sources import Dataset

if TYPE_CHECKING:
    from PIL import Image


class Arrays(Dataset):
    """uint8 pixels (n, h, w) or (n, h, w, 3) with a label each; `name` is the data set's."""

    in_memory = True

    def __init__(self, name: str, pixels: np.ndarray, labels: Sequence[int] | np.ndarray, classes: Sequence[str]):
        import torch

        self.name, self.classes = name, tuple(classes)
        self.identity = name.encode()
        self.labels = np.asarray(labels, dtype=np.int64)
        self._pixels = torch.from_numpy(np.ascontiguousarray(pixels))  # a tensor: loader processes share it

    def image(self, index: int) -> Image.Image:
        """The image of some pixels, which need no decoding."""
        from PIL import Image

        return Image.fromarray(self._pixels[index].numpy()).convert("RGB")

    def path(self, index: int) -> str:
        """The data set and the index."""
        return f"{self.name}[{index}]"
