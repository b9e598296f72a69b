"""A table with a row for each image: CSV or Parquet, of paths or of the images' bytes."""

from __future__ import annotations

import glob
import os
from array import array
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from vitcli.data.index import LARGE, Index, block, kept
from vitcli.data.sources import Dataset, Source, Split, _csv, _parquet
from vitcli.data.sources._labels import Labels, Rows
from vitcli.data.sources._split import share
from vitcli.errors import DataError
from vitcli.schema import wrong


class Table(Source):
    """A row for each image. Labels are class names, a number like any other text.

    Only where Parquet brings Hugging Face's class names a number is a place among them. Classes are sorted, numbers
    by value; those of val meet them by name. With a `separator`, and where Parquet holds lists, an image may have
    several labels, or none. Paths are relative to `root`, and stay below it.
    """

    name: Literal["table"] = "table"
    train: str = Field(description="a .csv or .parquet, or several: data/train-*.parquet")
    val: str | float | None = Field(None, description="the same, or the share held out")
    root: str | None = Field(None, description="the folder that paths start from; null: the table's")
    image: str = Field("image", description="the column of paths or bytes")
    label: str = Field("label", description="the column of labels")
    separator: str | None = Field(None, description="what stands between the labels of an image, as |; null: one label")

    @model_validator(mode="after")
    def _check(self) -> Table:
        if isinstance(self.val, float) and not 0 < self.val < 1:
            raise wrong("val", f"{self.val:g} is no share: between 0 and 1")
        if self.separator == "":
            raise wrong("separator", 'is empty; in YAML | and , need quotes: "|"')
        return self

    def open(self, split: Split) -> Dataset:
        """The images of a split. Labels follow the training classes, which val classes meet by name."""
        if split == "val" and self.val is None:
            raise DataError(
                f"the table {self.train!r} has no val", "hold out a tenth of each class: data.source.val=0.1"
            )
        train = self._read(self.train)
        classes = train.classes()
        if isinstance(self.val, float):
            return share(self._dataset(train, classes), self.val, split, self.train)
        if split == "train":
            return self._dataset(train, classes)
        held_out = self._read(str(self.val))
        if held_out.several != train.several:
            told = [f"{'lists of labels' if rows.several else 'one label'} a row" for rows in (held_out, train)]
            raise DataError(f"{held_out.files[0]} has {told[0]}, the training table {told[1]}", "give both the same")
        return self._dataset(held_out, classes)

    def splits(self) -> tuple[Split, ...]:
        """train, and val if it is named."""
        return ("train",) if self.val is None else ("train", "val")

    def _read(self, pattern: str) -> Rows:
        files = self._files(pattern)
        tables = {file: _parquet.open_table(file) for file in files if file.endswith(".parquet")}
        for file in files:
            self._check_columns(file, _parquet.column_names(tables[file]) if file in tables else _csv.header(file))
        names = next((_parquet.class_names(table, self.label) for table in tables.values()), None)
        labels = Labels(self._several(files, tables), self.separator)
        if tables and all(_parquet.holds_images(table, self.image) for table in tables.values()):
            for file, table in tables.items():
                for row, cell in enumerate(_parquet.values(table, self.label)):
                    labels.add(cell, f"{file}[{row}]")
            facts = {"labels": list(labels.known), "rows": [table.metadata.num_rows for table in tables.values()]}
            return Rows(files, Index(labels.arrays(), facts), names, images=True)
        stamps = [[file, os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]
        index = kept(
            ["table", files, self._root(files[0]), self.image, self.label, self.separator],
            worth=lambda index: sum(index.facts["rows"]) >= LARGE,
            current=lambda index: index.facts["stamps"] == stamps,
            build=lambda: self._build(files, tables, labels, stamps),
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

    def _several(self, files: list[str], tables: dict[str, Any]) -> bool:
        """Whether a row may have several labels."""
        lists = [file for file, table in tables.items() if _parquet.holds_lists(table, self.label)]
        if lists and self.separator is not None:
            message = f"{lists[0]}: the column {self.label!r} holds lists, which data.source.separator is not for"
            raise DataError(message, "leave it out")
        if lists and len(lists) < len(files):
            other = next(file for file in files if file not in lists)
            message = f"{other}: the column {self.label!r} holds one label a row, and lists of them in {lists[0]}"
            raise DataError(message, "give all files the same")
        return bool(lists) or self.separator is not None

    def _cells(self, file: str, tables: dict[str, Any]) -> Iterator[Any]:
        """Path and label, or labels, of each row."""
        if file not in tables:
            return _csv.cells(file, [self.image, self.label])
        columns = (_parquet.values(tables[file], column) for column in (self.image, self.label))
        return zip(*columns, strict=True)

    def _build(self, files: list[str], tables: dict[str, Any], labels: Labels, stamps: list[Any]) -> Index:
        root, hashes, counts = self._root(files[0]), array("q"), []

        def names() -> Iterator[str]:
            for file in files:
                begin = len(hashes)
                for row, (path, cell) in enumerate(self._cells(file, tables)):
                    name = _below(root, path, f"{file}[{row}]")
                    hashes.append(hash(name))
                    labels.add(cell, f"{file}[{row}]")
                    yield name
                counts.append(len(hashes) - begin)

        arrays = block(names()) | labels.arrays()
        index = Index(arrays, {"labels": list(labels.known), "rows": counts, "stamps": stamps})
        _check_twice(Rows(files, index, None, images=False), np.array(hashes))
        return index

    def _dataset(self, rows: Rows, classes: tuple[str, ...]) -> Dataset:
        from vitcli.data.sources._files import Files

        if not sum(rows.index.facts["rows"]):
            raise DataError(f"the table {rows.files[0]!r} has no rows")
        if not rows.index.facts["labels"]:
            raise DataError(f"the table {rows.files[0]!r} has no label in any row", "is it the right column?")
        labels = rows.labels(classes)
        if rows.images:
            return _parquet.Parquet(rows.files, self.image, labels, classes)
        return Files(self._root(rows.files[0]), rows.index, classes, labels)


def _below(root: str, path: Any, where: str) -> str:
    """The path from the root on."""
    if not isinstance(path, str) or not path:
        raise DataError(f"{where}: no path of an image")
    whole = os.path.normpath(os.path.join(root, path))
    if not whole.startswith(root.rstrip(os.sep) + os.sep):
        raise DataError(f"{where}: {path!r} is not below {root!r}", "name a folder above: --set data.source.root=/")
    return os.path.relpath(whole, root)


def _check_twice(rows: Rows, hashes: np.ndarray) -> None:
    """Refuse an image that two rows label otherwise."""
    order = np.argsort(hashes, kind="stable")
    for place in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
        first, second = sorted((int(order[place]), int(order[place + 1])))
        texts = rows.texts(first), rows.texts(second)
        if set(texts[0]) != set(texts[1]) and rows.index.names(first) == rows.index.names(second):
            shown = " and ".join(", ".join(map(repr, labels)) or "none" for labels in texts)
            message = f"{rows.where(second)}: {rows.index.names(first)!r} is there twice, as {shown}"
            hint = "leave one of them, or write all its labels into one cell, between them data.source.separator"
            raise DataError(message, hint)
