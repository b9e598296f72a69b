"""The labels of a table: codes as its rows are read, classes when all are known."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from vitcli.data.index import Index
from vitcli.errors import DataError


class Labels:
    """A code for each label of each row, and `known`, the codes of the labels.

    A row has one label; or where they are `several` any number, and `separator` stands between those of a text.
    """

    def __init__(self, several: bool, separator: str | None):
        self.several, self.separator = several, separator
        self.known: dict[str, int] = {}
        self._codes, self._ends = array("i"), array("q")

    def add(self, cell: Any, where: str) -> None:
        """The labels of the next row. Raises DataError that begins with `where`."""
        found = _labels(cell, self.separator, where) if self.several else [_label(cell, where)]
        self._codes.extend([self.known.setdefault(label, len(self.known)) for label in found])
        if self.several:
            self._ends.append(len(self._codes))

    def arrays(self) -> dict[str, np.ndarray]:
        """For an index: "codes", of all rows in turn, and where they are several "ends", where those of a row end."""
        ends = {"ends": np.array(self._ends, dtype=np.int64)} if self.several else {}
        return {"codes": np.array(self._codes)} | ends


class Rows(NamedTuple):
    """What was read of a table's `files`: the index has the arrays of `Labels`, and names unless the tables hold the
    `images`; its facts are the "labels" and the number of "rows" of each file. `names` are those that Hugging Face
    gives to labels that are numbers.
    """

    files: list[str]
    index: Index
    names: tuple[str, ...] | None
    images: bool

    @property
    def several(self) -> bool:
        """Whether a row may have several labels."""
        return "ends" in self.index.arrays

    def where(self, row: int) -> str:
        """What to call a row of all: its file, and its number there."""
        for file, count in zip(self.files, self.index.facts["rows"], strict=True):
            if row < count:
                return f"{file}[{row}]"
            row -= count
        raise AssertionError(row)

    def texts(self, row: int) -> list[str]:
        """The labels of a row, as they are written."""
        begin, end = row, row + 1
        if self.several:
            begin, end = (int(self.index["ends"][place]) if place >= 0 else 0 for place in (row - 1, row))
        return [self.index.facts["labels"][code] for code in self.index["codes"][begin:end].tolist()]

    def classes(self) -> tuple[str, ...]:
        """The names of Hugging Face, or the labels in their order."""
        if self.names:
            return self.names
        labels = self.index.facts["labels"]
        numbers = all(label.isascii() and label.isdecimal() for label in labels)
        return tuple(sorted(labels, key=(lambda label: (int(label), label)) if numbers else None))

    def labels(self, classes: tuple[str, ...]) -> np.ndarray:
        """A data set's labels. Raises DataError for one that is none of the classes."""
        flat = self._numbers(classes)[self.index["codes"]]
        if not self.several:
            return flat
        ends = self.index["ends"]
        found = np.zeros((len(ends), len(classes)), dtype=bool)
        found[np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0)), flat] = True
        return found

    def _numbers(self, classes: tuple[str, ...]) -> np.ndarray:
        """The class of each code."""
        names, known = self.names, {name: number for number, name in enumerate(classes)}
        numbers = []
        for code, label in enumerate(self.index.facts["labels"]):
            name = label
            if names and label.isascii() and label.isdecimal():
                name = names[int(label)] if int(label) < len(names) else None
            if name not in known:
                row = self._first(code)
                hint = f"the classes are {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
                raise DataError(f"{self.where(row)}: the label {label!r} is none of the {len(classes)} classes", hint)
            numbers.append(known[name])
        return np.array(numbers, dtype=np.int64)

    def _first(self, code: int) -> int:
        """The first row that has a label."""
        place = int(np.flatnonzero(self.index["codes"] == code)[0])
        return int(np.searchsorted(self.index["ends"], place, side="right")) if self.several else place


def _labels(cell: Any, separator: str | None, where: str) -> list[str]:
    """The labels in a cell, each once."""
    if cell is None:
        return []
    parts: Iterable[Any] = [cell]
    if isinstance(cell, list):
        parts = cell
    elif isinstance(cell, str):
        parts = filter(None, map(str.strip, cell.split(separator)))
    return list(dict.fromkeys(_label(part, where) for part in parts))


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        if value in (None, ""):
            hint = (
                "label it; or, if images may have several labels or none, say by data.source.separator what is between"
            )
            raise DataError(f"{where}: no label", hint)
        raise DataError(f"{where}: the label {value!r} is neither text nor a whole number")
    text = str(value)
    if text.startswith("-") and text[1:].isdecimal():
        raise DataError(f"{where}: the label {text} is negative", "leave out images without a class")
    return text
