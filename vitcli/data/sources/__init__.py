"""Where images come from, one file each: `source.name` in a recipe is the file's name.

To add a source, add a file with one subclass of `Source` whose `name` is the file's. Importing it must not import
torch; `open` may. Loader processes get a copy of the data set by pickle: keep it small.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vitcli.schema import Schema, one_of

if TYPE_CHECKING:
    from PIL import Image

Split = Literal["train", "val"]


class Dataset(ABC):
    """Labelled images in a fixed order.

    `classes` are names, in the order of the labels; `labels` is int64 of shape (n,). `identity` tells the images
    apart from those of another set, wherever they lie: their relative paths, or the name of the set.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    identity: bytes
    in_memory: bool = False  # True: an image costs so little that loader processes do not pay

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The image, upright and RGB. Raises BadImage with file and reason."""

    @abstractmethod
    def path(self, index: int) -> str:
        """What to call the image in a message: its file, or the source and index."""


class Source(Schema):
    """A recipe's `data.source`."""

    def open(self, split: Split) -> Dataset:
        """The images of a split. Raises DataError where there are none."""
        raise NotImplementedError


AnySource: Any = one_of(__name__, Source)
