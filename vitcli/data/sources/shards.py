"""Tar shards in WebDataset's layout: `key.jpg` beside `key.cls`, or `key.json`; on disk or at any URL of fsspec."""

from __future__ import annotations

import glob
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from vitcli.data.index import LARGE, Index, block, kept
from vitcli.data.sources import Dataset, Source, Split
from vitcli.data.sources._packed import Packed
from vitcli.data.sources._remote import Cache, Shard, find, texts
from vitcli.data.sources._samples import Samples, listed, scan
from vitcli.data.sources._split import share
from vitcli.errors import DataError
from vitcli.schema import wrong
from vitcli.waiting import bar

CONTENTS = "index.json"  # what `vit data pack` says of all shards; the list of each is beside it, as NAME.json
MAX_CLASSES = 1_000_000
FILES = 1024  # small files asked for at a time


class Shards(Source):
    """Tars of images with their labels. They are read in place, and nothing of them is extracted or run.

    Numbers as labels are places in the list of class names, other labels are class names. An index of each shard is
    made from its headers and kept in the cache, for which those of a URL are all fetched once; what `vit data pack`
    wrote brings one.
    """

    name: Literal["shards"] = "shards"
    path: str = Field(description="the folder, or its URL: s3://, gs://, https:// and others of fsspec")
    train: str = Field("train-*.tar", description="names of the shards to train on: with * or {000..127}")
    val: str | float = Field("val-*.tar", description="of those held out, or the share")
    classes: str | None = Field(None, description="file of class names, a line each, for labels that are numbers")
    json_label: str = Field("label", description="the label's key in key.json, where there is no key.cls")
    class_tars: bool = Field(False, description="each tar is a class of its name, as ImageNet-21k is published")
    broken: Literal["error", "skip"] = Field("error", description="damaged shards: refuse them, or take what is whole")
    window: PositiveInt | None = Field(None, description="shards mixed at a time; null: all, or as the cache allows")
    cache_gb: float = Field(50.0, gt=0, description="what may be kept of shards from a URL")

    @model_validator(mode="after")
    def _check(self) -> Shards:
        if isinstance(self.val, float) and not 0 < self.val < 1:
            raise wrong("val", f"{self.val:g} is no share: between 0 and 1")
        return self

    def open(self, split: Split) -> Dataset:
        """The images of a split. Labels follow the training classes, which val classes meet by name."""
        if not isinstance(self.val, str):
            return share(self._open(self.train), self.val, split, self.path)
        if split == "train":
            return self._open(self.train)
        train = self._find(self.train)
        return self._open(self.val, self._classes(self._index(train)) if train else None)

    def splits(self) -> tuple[Split, ...]:
        """Those that have shards, or a share; where none has, train, which says so when it is opened."""
        held_out = not isinstance(self.val, str) or bool(self._find(self.val))
        found: dict[Split, bool] = {"train": bool(self._find(self.train)), "val": held_out}
        return tuple(split for split, there in found.items() if there) or ("train",)

    @property
    def remote(self) -> bool:
        """Whether the path is a URL."""
        return "://" in self.path

    def _open(self, pattern: str, classes: Classes | None = None) -> Packed:
        shards = self._find(pattern)
        if not shards:
            hint = _NAME_THEM if pattern == self.train else "hold out a tenth of each class: --set data.source.val=0.1"
            raise DataError(f"{self.path!r} has no shards {pattern!r}", hint)
        index = self._index(shards)
        lost = self._lost(shards, index)
        if not len(index["codes"]):
            raise DataError(f"the shards {pattern!r} of {self.path!r} hold no images with labels", _CLASS_TARS)
        classes = classes or self._classes(index)
        numbers = self._numbers(index, classes, shards)
        cache, window = None, self.window
        if self.remote:
            largest, limit = max(shard.size for shard in shards), int(self.cache_gb * 1e9)
            if limit < 2 * largest:
                raise DataError(
                    f"data.source.cache_gb={self.cache_gb:g} does not hold two shards of {largest / 1e9:.3g} GB",
                    f"--set data.source.cache_gb={2 * largest / 1e9 + 0.1:.1f}, or more",
                )
            cache, window = Cache(limit), window or limit // (2 * largest)
        return Packed(shards, index, classes.names, numbers, window, cache, lost, self._ignored(index))

    def _find(self, pattern: str) -> list[Shard]:
        """The shards of a pattern, sorted by name."""
        names = list(_spelt(pattern))
        if self.remote:
            return find(self.path, names[0] if len(names) == 1 else names)
        root = os.path.abspath(os.path.expanduser(self.path))
        if not os.path.isdir(root):
            raise DataError(f"the data folder {self.path!r} cannot be read: no such folder", "check data.source.path")
        if len(names) == 1:
            names = sorted(glob.glob(names[0], root_dir=root))
        try:
            found = [(name, os.stat(os.path.join(root, name))) for name in names]
        except OSError as error:
            raise DataError(f"{error.filename!r} cannot be read: {error.strerror}", "check data.source") from None
        return [Shard(os.path.join(root, name), facts.st_size, str(facts.st_mtime_ns)) for name, facts in found]

    def _index(self, shards: list[Shard]) -> Index:
        """Where each sample of the shards is; kept until a shard changes."""
        now = [list(shard) for shard in shards]
        return kept(
            ["shards", [shard.name for shard in shards], self.json_label, self.class_tars],
            worth=lambda index: self.remote or len(index["codes"]) >= LARGE,
            current=lambda index: index.facts["stamps"] == now,
            build=lambda: self._build(shards),
        )

    def _build(self, shards: list[Shard]) -> Index:
        codes: dict[str, int] = {}
        columns = {"shards": array("i"), "offsets": array("q"), "sizes": array("q"), "codes": array("i")}
        damage, lost, digests, ignored = [], [], [], Counter()

        def names() -> Iterator[str]:
            with bar("indexing shards", len(shards)) as advance:
                for number, samples in enumerate(self._samples(shards)):
                    columns["shards"].extend([number] * len(samples.names))
                    columns["offsets"].extend(samples.offsets)
                    columns["sizes"].extend(samples.sizes)
                    columns["codes"].extend([codes.setdefault(label, len(codes)) for label in samples.labels])
                    damage.append(list(samples.damage[0][:2]) if samples.damage else None)
                    lost.append(samples.lost)
                    digests.append(samples.digest)
                    ignored.update(samples.ignored)
                    yield from samples.names
                    advance(1)

        arrays = block(names()) | {name: np.array(column) for name, column in columns.items()}
        facts = {
            "stamps": [list(shard) for shard in shards],
            "labels": list(codes),
            "damage": damage,
            "lost": lost,
            "digests": digests,
            "ignored": dict(ignored),
        }
        return Index(arrays, facts)

    def _samples(self, shards: list[Shard]) -> Iterator[Samples]:
        """The samples of each shard, as its list says; without a list, as a look through it says."""
        cache = Cache(int(self.cache_gb * 1e9))
        for first in range(0, len(shards), FILES):
            part = shards[first : first + FILES]
            lists = {} if self.class_tars else self._texts([_list_of(shard) for shard in part])
            for shard in part:
                samples = listed(lists.get(_list_of(shard), b""), shard.size)
                if samples:
                    yield samples
                    continue
                try:
                    file = cache.open(shard) if self.remote else os.open(shard.name, os.O_RDONLY)
                except OSError as error:
                    raise DataError(f"{shard.name!r} cannot be read: {error.strerror}") from None
                try:
                    class_name = os.path.basename(shard.name).removesuffix(".tar") if self.class_tars else None
                    yield scan(file, shard.size, self.json_label, class_name)
                finally:
                    os.close(file)

    def _texts(self, places: list[str]) -> dict[str, bytes]:
        """The content of those of these small files that are there."""
        if self.remote:
            return texts(places)
        found = {}
        for place in filter(os.path.isfile, places):
            with open(place, "rb") as file:
                found[place] = file.read()
        return found

    def _lost(self, shards: list[Shard], index: Index) -> list[str]:
        """A line on each damaged shard. Raises DataError for the first unless they may be `broken`."""
        lines = []
        for shard, damage, count in zip(shards, index.facts["damage"], index.facts["lost"], strict=True):
            if damage is None and count == 0:
                continue
            offset, reason = damage or (0, "its list names samples that are not in it")
            many = "an unknown number of" if count is None else f"{count}"
            lines.append(f"{shard.name}: damaged at byte {offset}: {reason}; {many} samples lost")
            if self.broken == "error":
                raise DataError(lines[0], "fetch it again, or train on the rest: --set data.source.broken=skip")
        return lines

    def _ignored(self, index: Index) -> list[str]:
        if not index.facts["ignored"]:
            return []
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(index.facts["ignored"].items()))
        return [f"members of {self.path} that are passed over: {kinds}"]

    def _classes(self, index: Index) -> Classes:
        """The class names: of the file, else of `vit data pack`, else the labels themselves."""
        if self.class_tars:
            return Classes(tuple(sorted(index.facts["labels"])), numbered=False)
        if self.classes:
            try:
                with open(os.path.expanduser(self.classes), encoding="utf-8") as file:
                    return Classes(tuple(line for line in map(str.strip, file) if line), numbered=True)
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise DataError(f"the class names {self.classes!r} cannot be read: {reason}") from None
        contents = f"{os.path.expanduser(self.path)}/{CONTENTS}"
        if content := self._texts([contents]).get(contents):
            return Classes(_class_names(content, contents), numbered=True)
        labels = index.facts["labels"]
        if not labels or not all(map(_is_number, labels)):
            return Classes(tuple(sorted(labels)), numbered=False)
        most = max(map(int, labels))
        if most >= MAX_CLASSES:
            raise DataError(f"the shards of {self.path!r} have a label {most}", "labels count classes from 0")
        return Classes(tuple(map(str, range(most + 1))), numbered=True)

    def _numbers(self, index: Index, classes: Classes, shards: list[Shard]) -> np.ndarray:
        """The class of each label."""
        known = {name: number for number, name in enumerate(classes.names)}
        numbers = []
        for code, label in enumerate(index.facts["labels"]):
            number = int(label) if classes.numbered and _is_number(label) else known.get(label, -1)
            if not 0 <= number < len(classes.names):
                first = int(np.flatnonzero(index["codes"] == code)[0])
                where = f"{shards[int(index['shards'][first])].name}/{index.names(first)}"
                raise DataError(
                    f"{where}: its label {label!r} is none of the {len(classes.names)} classes",
                    "give all class names, a line each: --set data.source.classes=FILE",
                )
            numbers.append(number)
        return np.array(numbers, dtype=np.int64)


class Classes(NamedTuple):
    """Class names, and whether a label that is a number is a place among them."""

    names: tuple[str, ...]
    numbered: bool


_NAME_THEM = "name them: --set data.source.train='*.tar'"
_CLASS_TARS = "labels are key.cls or key.json beside key.jpg; tars of one class each: --set data.source.class_tars=true"


def _spelt(pattern: str) -> Iterator[str]:
    """The names that {000..127} and {a,b} stand for."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d{1,7})\.\.(\d{1,7})", found[1])
    if numbers:
        first, last = numbers.groups()
        choices = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    for choice in choices:
        yield from _spelt(pattern[: found.start()] + choice + pattern[found.end() :])


def _list_of(shard: Shard) -> str:
    return shard.name.removesuffix(".tar") + ".json"


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdecimal() and len(label) < 10


def _class_names(content: bytes, place: str) -> tuple[str, ...]:
    try:
        names = json.loads(content)["classes"]
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise DataError(f"{place} is damaged: it names no classes", "pack the shards again")
