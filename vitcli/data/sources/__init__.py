"""Where images come from, one file each: `source.name` in a recipe is the file's name.

To add a source, add a file with one subclass of `Source` whose `name` is the file's. Importing it must not import
torch; `open` may. Loader processes get a copy of the data set by pickle: keep it small.
"""

from __future__ import annotations

import glob
import os
import re
from abc import ABC, abstractmethod
from copy import copy
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import TypeAdapter

from vitcli.errors import RecipeError
from vitcli.schema import Schema, one_of

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vitcli.data.images import Window

Split = Literal["train", "val"]


class Dataset(ABC):
    """Labelled images in a fixed order.

    `classes` are names, in the order of the labels; `labels` is int64 (n,), or bool (n, classes) where an image may be
    of several classes, or of none. `identity` tells the images apart from those of another set, wherever they lie: from
    their relative paths, or the name of the set. `notes` are what a person should know of it.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    identity: bytes
    notes: tuple[str, ...] = ()
    in_memory: bool = False  # True: an image costs so little that loader processes do not pay

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether an image may be of several classes."""
        return self.labels.ndim == 2

    @property
    def counts(self) -> np.ndarray:
        """The images of each class: int64 (classes,)."""
        if self.multi_label:
            return np.count_nonzero(self.labels, axis=0)
        return np.bincount(self.labels, minlength=len(self.classes))

    def unlabelled(self) -> Self:
        """For loader processes: where an image has several labels, which may weigh more than all the rest, without."""
        if not self.multi_label:
            return self
        copied = copy(self)
        copied.labels = self.labels[:, :0].copy()
        return copied

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The image, upright and RGB. Raises BadImage with file and reason."""

    def pixels(self, index: int, window: Window | None = None) -> Tensor:
        """The image as uint8 (3, h, w), or what of it lies in a window, by the shortest way. Raises BadImage."""
        from vitcli.data.images import cut, decode_pixels, whole
        from vitcli.data.preprocess import pixels

        window = window or whole
        data = self.read(index)
        if data is not None:
            return decode_pixels(data, self.path(index), window)
        image = pixels(self.image(index))
        return cut(image, window(*image.shape[1:]))

    def read(self, index: int) -> bytes | None:
        """The file before it is decoded, or None where there is none. Raises BadImage."""
        return None

    @abstractmethod
    def path(self, index: int) -> str:
        """What to call the image in a message: its file, or the source and index."""

    def damage(self) -> list[str]:
        """What is wrong with the files that hold the images, each read whole."""
        return []

    def order(self, rng: np.random.Generator, chosen: np.ndarray) -> np.ndarray:
        """The `chosen` images in random order: any, unless those that are near one another are cheaper to read."""
        return rng.permutation(chosen)


class Source(Schema):
    """A recipe's `data.source`."""

    def open(self, split: Split) -> Dataset:
        """The images of a split. Raises DataError where there are none."""
        raise NotImplementedError

    def splits(self) -> tuple[Split, ...]:
        """The splits that there are."""
        return ("train", "val")

    def open_for_scoring(self) -> Dataset:
        """What `vit eval --data` scores: the held-out images, or all images where none are held out."""
        return self.open("val" if "val" in self.splits() else "train")


AnySource: Any = one_of(__name__, Source)


def described(path: str, separator: str | None = None) -> dict[str, Any]:
    """The source that a path on the command line means, as a recipe spells it.

    A folder is one of shards where it holds tars, of Hugging Face's Parquet where it holds that, else one of class
    folders; a .csv or .parquet is a table. Raises RecipeError for a `separator` that is not a table's.
    """
    tree = _described(path)
    if separator is None:
        return tree
    if tree["name"] != "table" or not separator:
        raise RecipeError("--separator is what stands between the labels of a table", "as --data t.csv --separator ';'")
    return tree | {"separator": separator}


def _described(path: str) -> dict[str, Any]:
    if "://" in path:
        return {"name": "shards", "path": path}
    if path == "digits" and not os.path.exists(path):
        return {"name": "digits"}
    if path.lower().endswith((".csv", ".parquet")):
        return {"name": "table", "train": path}
    root = os.path.expanduser(path)
    for place in ("", "data/"):
        if glob.glob(f"{place}train*.parquet", root_dir=root):
            held_out = [f"{place}{name}*.parquet" for name in ("val", "test")]
            val = next((os.path.join(path, name) for name in held_out if glob.glob(name, root_dir=root)), None)
            return {"name": "table", "train": os.path.join(path, f"{place}train*.parquet"), "val": val}
    tars = glob.glob("*.tar", root_dir=root)
    if not tars:
        return {"name": "folder", "path": path}
    if any(fnmatch(name, "train-*.tar") or fnmatch(name, "val-*.tar") for name in tars):
        return {"name": "shards", "path": path}
    wnids = all(re.fullmatch(r"n\d{8}\.tar", name) for name in tars)
    return {"name": "shards", "path": path, "train": "*.tar", "class_tars": wnids}


def parsed(tree: dict[str, Any]) -> Source:
    """The source that a recipe spells."""
    return TypeAdapter(AnySource).validate_python(tree)
