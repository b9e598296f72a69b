"""A table with a row for each image: CSV or Parquet, of paths or of the images' bytes."""

from __future__ import annotations

import glob
import os
from array import array
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from vitcli.data.index import LARGE, Index, block, kept
from vitcli.data.sources import Dataset, Source, Split, _csv, _parquet
from vitcli.data.sources._split import share
from vitcli.errors import DataError
from vitcli.schema import wrong


class Table(Source):
    """A row for each image. Labels are class names, a number like any other text.

    Only where Parquet brings Hugging Face's class names a number is a place among them. Classes are sorted, numbers
    by value; those of val meet them by name. Paths are relative to `root`, and stay below it.
    """

    name: Literal["table"] = "table"
    train: str = Field(description="a .csv or .parquet, or several: data/train-*.parquet")
    val: str | float | None = Field(None, description="the same, or the share held out")
    root: str | None = Field(None, description="the folder that paths start from; null: the table's")
    image: str = Field("image", description="the column of paths or bytes")
    label: str = Field("label", description="the column of labels")

    @model_validator(mode="after")
    def _check(self) -> Table:
        if isinstance(self.val, float) and not 0 < self.val < 1:
            raise wrong("val", f"{self.val:g} is no share: between 0 and 1")
        return self

    def open(self, split: Split) -> Dataset:
        """The images of a split. Labels follow the training classes, which val classes meet by name."""
        if split == "val" and self.val is None:
            raise DataError(
                f"the table {self.train!r} has no val", "hold out a tenth of each class: data.source.val=0.1"
            )
        train = self._read(self.train)
        classes = _classes(train)
        if isinstance(self.val, float):
            return share(self._dataset(train, classes), self.val, split, self.train)
        if split == "train":
            return self._dataset(train, classes)
        return self._dataset(self._read(str(self.val)), classes)

    def splits(self) -> tuple[Split, ...]:
        """train, and val if it is named."""
        return ("train",) if self.val is None else ("train", "val")

    def _read(self, pattern: str) -> Rows:
        files = self._files(pattern)
        tables = {file: _parquet.open_table(file) for file in files if file.endswith(".parquet")}
        for file in files:
            self._check_columns(file, _parquet.column_names(tables[file]) if file in tables else _csv.header(file))
        names = next((_parquet.class_names(table, self.label) for table in tables.values()), None)
        if tables and all(_parquet.holds_images(table, self.image) for table in tables.values()):
            codes, texts = _coded(self._labels(tables))
            counts = [table.metadata.num_rows for table in tables.values()]
            return Rows(files, Index({"codes": codes}, {"labels": texts, "rows": counts}), names, images=True)
        stamps = [[file, os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]
        index = kept(
            ["table", files, self._root(files[0]), self.image, self.label],
            worth=lambda index: len(index["codes"]) >= LARGE,
            current=lambda index: index.facts["stamps"] == stamps,
            build=lambda: self._build(files, tables, stamps),
        )
        return Rows(files, index, names, images=False)

    def _files(self, pattern: str) -> list[str]:
        path = os.path.abspath(os.path.expanduser(pattern))
        files = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]
        if not files:
            raise DataError(f"no table is called {pattern!r}", "check data.source")
        for file in files:
            if not file.endswith((".csv", ".parquet")):
                raise DataError(f"{file!r} is no table", "a table is called .csv or .parquet")
        return files

    def _check_columns(self, file: str, names: list[str]) -> None:
        for key, column in (("image", self.image), ("label", self.label)):
            if names.count(column) != 1:
                near = get_close_matches(column, names, n=1) or names[:1]
                many = "several columns" if column in names else "no column"
                hint = f"it has {', '.join(names[:10])}: --set data.source.{key}={near[0] if near else 'NAME'}"
                raise DataError(f"{file}: {many} {column!r}", hint)

    def _root(self, file: str) -> str:
        return os.path.abspath(os.path.expanduser(self.root)) if self.root else os.path.dirname(file)

    def _labels(self, tables: dict[str, Any]) -> Iterator[str]:
        for file, table in tables.items():
            for row, value in enumerate(_parquet.values(table, self.label)):
                yield _label(value, f"{file}[{row}]")

    def _cells(self, file: str, tables: dict[str, Any]) -> Iterator[Any]:
        """Path and label of each row."""
        if file not in tables:
            return _csv.cells(file, [self.image, self.label])
        columns = (_parquet.values(tables[file], column) for column in (self.image, self.label))
        return zip(*columns, strict=True)

    def _build(self, files: list[str], tables: dict[str, Any], stamps: list[Any]) -> Index:
        root, hashes, codes, counts = self._root(files[0]), array("q"), array("i"), []
        known: dict[str, int] = {}

        def names() -> Iterator[str]:
            for file in files:
                begin = len(codes)
                for row, (path, label) in enumerate(self._cells(file, tables)):
                    name = _below(root, path, f"{file}[{row}]")
                    hashes.append(hash(name))
                    codes.append(known.setdefault(_label(label, f"{file}[{row}]"), len(known)))
                    yield name
                counts.append(len(codes) - begin)

        arrays = block(names()) | {"codes": np.array(codes)}
        index = Index(arrays, {"labels": list(known), "rows": counts, "stamps": stamps})
        _check_twice(Rows(files, index, None, images=False), np.array(hashes))
        return index

    def _dataset(self, rows: Rows, classes: tuple[str, ...]) -> Dataset:
        from vitcli.data.sources._files import Files

        labels = _numbers(rows, classes)[rows.index["codes"]]
        if not len(labels):
            raise DataError(f"the table {rows.files[0]!r} has no rows")
        if rows.images:
            return _parquet.Parquet(rows.files, self.image, labels, classes)
        return Files(self._root(rows.files[0]), rows.index, classes, labels)


class Rows(NamedTuple):
    """What was read: the index has a code for each row's label, and names unless the tables hold the images."""

    files: list[str]
    index: Index
    names: tuple[str, ...] | None
    images: bool

    def where(self, row: int) -> str:
        """What to call a row of all: its file, and its number there."""
        for file, count in zip(self.files, self.index.facts["rows"], strict=True):
            if row < count:
                return f"{file}[{row}]"
            row -= count
        raise AssertionError(row)


def _below(root: str, path: Any, where: str) -> str:
    """The path from the root on."""
    if not isinstance(path, str) or not path:
        raise DataError(f"{where}: no path of an image")
    whole = os.path.normpath(os.path.join(root, path))
    if not whole.startswith(root.rstrip(os.sep) + os.sep):
        raise DataError(f"{where}: {path!r} is not below {root!r}", "name a folder above: --set data.source.root=/")
    return os.path.relpath(whole, root)


def _coded(labels: Iterator[str]) -> tuple[np.ndarray, list[str]]:
    """A number for each label, and the labels of the numbers."""
    known: dict[str, int] = {}
    codes = array("i", (known.setdefault(label, len(known)) for label in labels))
    return np.array(codes), list(known)


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        told = "no label" if value in (None, "") else f"the label {value!r} is neither text nor a whole number"
        raise DataError(f"{where}: {told}")
    text = str(value)
    if text.startswith("-") and text[1:].isdecimal():
        raise DataError(f"{where}: the label {text} is negative", "leave out images without a class")
    return text


def _classes(rows: Rows) -> tuple[str, ...]:
    if rows.names:
        return rows.names
    labels = rows.index.facts["labels"]
    numbers = all(label.isascii() and label.isdecimal() for label in labels)
    return tuple(sorted(labels, key=(lambda label: (int(label), label)) if numbers else None))


def _numbers(rows: Rows, classes: tuple[str, ...]) -> np.ndarray:
    """The class of each label."""
    names, known = rows.names, {name: number for number, name in enumerate(classes)}
    numbers = []
    for code, label in enumerate(rows.index.facts["labels"]):
        name = label
        if names and label.isascii() and label.isdecimal():
            name = names[int(label)] if int(label) < len(names) else None
        if name not in known:
            row = int(np.flatnonzero(rows.index["codes"] == code)[0])
            hint = f"the classes are {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
            raise DataError(f"{rows.where(row)}: the label {label!r} is none of the {len(classes)} classes", hint)
        numbers.append(known[name])
    return np.array(numbers, dtype=np.int64)


def _check_twice(rows: Rows, hashes: np.ndarray) -> None:
    """Refuse an image with two labels."""
    index, order = rows.index, np.argsort(hashes, kind="stable")
    for place in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
        first, second = sorted((int(order[place]), int(order[place + 1])))
        labels = [index.facts["labels"][int(index["codes"][row])] for row in (first, second)]
        if labels[0] != labels[1] and index.names(first) == index.names(second):
            told = f"{index.names(first)!r} is there twice, as {labels[0]!r} and {labels[1]!r}"
            raise DataError(f"{rows.where(second)}: {told}", "leave one of them")
