"""Class folders: the name of a folder is the class of the images in it."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from pydantic import Field

from vitcli import rng
from vitcli.data.sources import Dataset, Source, Split
from vitcli.errors import DataError
from vitcli.rng import Stream

HELD_OUT = ("val", "validation", "test")


class Folder(Source):
    """A folder with a folder for each class, or with such folders under train and val (or validation, or test).

    Classes are sorted by name, images by path. Hidden files and folders are passed over. A class folder may be a
    link to a folder elsewhere; links to folders inside it are not followed.
    """

    name: Literal["folder"] = "folder"
    path: str = Field(description="the folder")
    val: float | None = Field(None, gt=0, lt=1, description="share held out where there is no val folder")

    def open(self, split: Split) -> Dataset:
        """The images of a split. Labels follow the training classes, which val classes meet by name."""
        root, train, held_out = self._layout()
        if held_out and split == "val":
            return _collect(held_out, _classes(train) if train else None)
        if held_out and not train:
            raise DataError(f"{root!r} has no folder train", "make one, with a folder for each class in it")
        if held_out or (split == "train" and not self.val):
            return _collect(train or root, complete=True)
        if self.val:
            return _share(train or root, self.val, split)
        raise DataError(
            f"{root!r} has no folder {', '.join(HELD_OUT[:-1])} or {HELD_OUT[-1]}",
            "make one, or hold out a tenth of each class with data.source.val=0.1",
        )

    def open_for_scoring(self) -> Dataset:
        """What `vit eval --data` scores: the held-out images, or all images of a folder that has no split."""
        root, train, held_out = self._layout()
        return self.open("val") if train or held_out or self.val else _collect(root)

    def _layout(self) -> tuple[str, str | None, str | None]:
        """The folder, and its folders to train on and held out. A class may be called train: it holds no folders."""
        root = os.path.expanduser(self.path)
        found = {name: os.path.join(root, name) for name in _folders(root) if name in ("train", *HELD_OUT)}
        splits = {name: path for name, path in found.items() if _folders(path)}
        return root, splits.get("train"), next((splits[name] for name in HELD_OUT if name in splits), None)


def _collect(root: str, classes: list[str] | None = None, *, complete: bool = False) -> Dataset:
    """The images of all class folders, labelled by `classes` or else by the folders. `complete`: none may be empty."""
    from vitcli.data.images import EXTENSIONS
    from vitcli.data.sources._files import Files

    folders = _class_folders(root)
    classes = list(folders) if classes is None else classes
    if unknown := [label for label in folders if label not in set(classes)]:
        raise DataError(
            f"{len(unknown)} classes of {root!r} are not among the training classes, such as {unknown[0]!r}",
            "rename or remove these folders; class names meet as they are written",
        )
    names, labels = [], []
    for index, label in enumerate(classes):
        images = _images(root, folders[label]) if label in folders else []
        if complete and not images:
            raise DataError(
                f"the class folder {os.path.join(root, folders[label])!r} has no images",
                f"remove it, or fill it with files of {' '.join(sorted(EXTENSIONS))}",
            )
        names += images
        labels += [index] * len(images)
    if not names:
        raise DataError(f"no images in the class folders of {root!r}", f"files of {' '.join(sorted(EXTENSIONS))} count")
    return Files(root, names, labels, classes)


def _share(root: str, share: float, split: Split) -> Dataset:
    """Hold out a share of each class: at least one image, and never the last one. The choice depends on no seed."""
    from vitcli.data.sources._files import Files

    everything = _collect(root, complete=True)
    held_out = np.zeros(len(everything), dtype=bool)
    for label in range(len(everything.classes)):
        own = np.flatnonzero(everything.labels == label)
        count = min(max(1, round(share * len(own))), len(own) - 1)
        held_out[rng.generator(0, Stream.SPLIT, label).permutation(own)[:count]] = True
    chosen = np.flatnonzero(held_out == (split == "val"))
    if not len(chosen):
        raise DataError(f"each class of {root!r} has one image, so none can be held out", "add images, or a folder val")
    names = everything.identity.split(b"\0")
    return Files(root, [os.fsdecode(names[i]) for i in chosen], everything.labels[chosen], everything.classes)


def _classes(root: str) -> list[str]:
    return list(_class_folders(root))


def _class_folders(root: str) -> dict[str, str]:
    """Class name -> folder name, sorted. Names that differ only in how Unicode composes an accent are one."""
    folders: dict[str, str] = {}
    for folder in _folders(root):
        label = unicodedata.normalize("NFC", folder)
        if label in folders:
            raise DataError(f"two folders of {root!r} have the name {label!r}", "merge them into one")
        folders[label] = folder
    if not folders:
        raise DataError(f"{root!r} has no class folders", f"put the images of each class into {root}/CLASS/")
    return dict(sorted(folders.items()))


def _folders(root: str) -> list[str]:
    """Names of the folders in `root` that are not hidden, without links back to it or above it."""
    with _scan(root) as entries:
        folders = [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    return [entry.name for entry in folders if not (entry.is_symlink() and _contains(entry.path, root))]


def _contains(folder: str, other: str) -> bool:
    folder, other = os.path.realpath(folder), os.path.realpath(other)
    return os.path.commonpath([folder, other]) == folder


def _images(root: str, folder: str) -> list[str]:
    """Names relative to `root` of all image files in and below a class folder, sorted."""
    from vitcli.data.images import EXTENSIONS

    names, pending = [], [folder]
    while pending:
        place = pending.pop()
        with _scan(os.path.join(root, place)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{place}/{entry.name}")
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    names.append(f"{place}/{entry.name}")
    return sorted(names)


@contextmanager
def _scan(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
    try:
        with os.scandir(path) as entries:
            yield entries
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"the data folder {path!r} cannot be read: {reason}", "check data.source.path") from None
