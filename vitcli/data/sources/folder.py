"""Class folders: the name of a folder is the class of the images in it."""

from __future__ import annotations

import os
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from pydantic import Field

from vitcli.data.index import LARGE, Index, block, kept
from vitcli.data.sources import Dataset, Source, Split
from vitcli.data.sources._split import share
from vitcli.errors import DataError
from vitcli.waiting import bar

HELD_OUT = ("val", "validation", "test")
RACY_NS = 2 * 10**9  # file systems tell the time of a change in steps of up to two seconds


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
            return share(_collect(train or root, complete=True), self.val, split, train or root)
        raise DataError(
            f"{root!r} has no folder {', '.join(HELD_OUT[:-1])} or {HELD_OUT[-1]}",
            "make one, or hold out a tenth of each class with data.source.val=0.1",
        )

    def splits(self) -> tuple[Split, ...]:
        """Those that have a folder, or a share."""
        _, train, held_out = self._layout()
        if held_out and not train:
            return ("val",)
        return ("train", "val") if held_out or self.val else ("train",)

    def open_for_scoring(self) -> Dataset:
        """The held-out images, or all images of a folder that has no split."""
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
    known = set(folders if classes is None else classes)
    if unknown := [label for label in folders if label not in known]:
        raise DataError(
            f"{len(unknown)} classes of {root!r} are not among the training classes, such as {unknown[0]!r}",
            "rename or remove these folders; class names meet as they are written",
        )
    index = _listing(root, folders)
    empty = np.setdiff1d(np.arange(len(folders)), index["labels"])
    if complete and len(empty):
        raise DataError(
            f"the class folder {os.path.join(root, list(folders.values())[empty[0]])!r} has no images",
            f"remove it, or fill it with files of {' '.join(sorted(EXTENSIONS))}",
        )
    if not len(index["labels"]):
        raise DataError(f"no images in the class folders of {root!r}", f"files of {' '.join(sorted(EXTENSIONS))} count")
    if classes is None:
        return Files(root, index, list(folders))
    place = {label: number for number, label in enumerate(classes)}
    return Files(root, index, classes, np.array([place[label] for label in folders])[index["labels"]])


def _listing(root: str, folders: dict[str, str]) -> Index:
    """The names and labels of all images, by class and then by name; a long one is kept until a folder changes."""
    absolute = os.path.abspath(root)
    return kept(
        ["folder", os.fsencode(absolute).hex()],
        worth=lambda index: len(index["labels"]) >= LARGE,
        current=lambda index: list(folders) == index.facts["classes"] and _unchanged(absolute, index),
        build=lambda: _list(root, folders),
    )


def _list(root: str, folders: dict[str, str]) -> Index:
    begin = time.time_ns()
    counts: list[int] = []
    visited: list[str] = []

    def names() -> Iterator[str]:
        with bar("listing class folders", len(folders)) as advance:
            for folder in folders.values():
                images, places = _images(root, folder)
                counts.append(len(images))
                visited.extend(places)
                yield from images
                advance(1)

    arrays = block(names())
    arrays["labels"] = np.repeat(np.arange(len(folders)), counts)
    arrays["changed"] = np.array([os.stat(os.path.join(root, place)).st_mtime_ns for place in visited])
    hexed = [os.fsencode(place).hex() for place in visited]
    return Index(arrays, {"classes": list(folders), "visited": hexed, "begin": begin})


def _unchanged(root: str, index: Index) -> bool:
    """Whether all folders are as they were listed. One that changed just before may have changed just after, too."""
    settled = index.facts["begin"] - RACY_NS
    for place, changed in zip(index.facts["visited"], index["changed"].tolist(), strict=True):
        try:
            now = os.stat(os.path.join(root, os.fsdecode(bytes.fromhex(place)))).st_mtime_ns
        except OSError:
            return False
        if now != changed or now > settled:
            return False
    return True


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


def _images(root: str, folder: str) -> tuple[list[str], list[str]]:
    """Names relative to `root` of all image files in and below a class folder, sorted; and of the folders looked at."""
    from vitcli.data.images import EXTENSIONS

    names, folders = [], [folder]
    for place in folders:
        with _scan(os.path.join(root, place)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{place}/{entry.name}")
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    names.append(f"{place}/{entry.name}")
    return sorted(names), folders


@contextmanager
def _scan(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
    try:
        with os.scandir(path) as entries:
            yield entries
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"the data folder {path!r} cannot be read: {reason}", "check data.source.path") from None
