"""Tables in Parquet, read with pyarrow; images in them, a row group at a time. Layout of Hugging Face's image sets."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitcli.data.sources import Dataset
from vitcli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

KEPT_BYTES = 256 * 2**20  # of row groups that a process keeps: an order mixes as many as that holds
MOST_GROUPS = 64


def open_table(path: str) -> Any:
    """pyarrow's ParquetFile. Raises DataError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow", 'pip install "vitcli[parquet]"') from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"the table {path!r} cannot be read: {error}", "check data.source") from None


def column_names(table: Any) -> list[str]:
    """The names of the columns."""
    return list(table.schema_arrow.names)


def holds_images(table: Any, column: str) -> bool:
    """Whether a column holds the bytes of images, and not their paths."""
    import pyarrow

    kind = table.schema_arrow.field(column).type
    return pyarrow.types.is_struct(kind) or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def holds_lists(table: Any, column: str) -> bool:
    """Whether a cell of a column is a list."""
    from pyarrow import types

    kind = table.schema_arrow.field(column).type
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def values(table: Any, column: str) -> Iterator[Any]:
    """A column's values as Python's, a row group in memory at a time."""
    for group in range(table.num_row_groups):
        yield from table.read_row_group(group, columns=[column], use_threads=False).column(0).to_pylist()


def class_names(table: Any, column: str) -> tuple[str, ...] | None:
    """The names that Hugging Face's metadata gives to the numbers of a label column."""
    try:
        described = json.loads((table.schema_arrow.metadata or {})[b"huggingface"])
        feature = described["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # one deeper in a list
        names = feature["names"]
    except (KeyError, IndexError, ValueError, TypeError, AttributeError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


class Parquet(Dataset):
    """The images in a column of some files. `labels` has an entry for each row of all files."""

    def __init__(self, files: Sequence[str], column: str, labels: np.ndarray, classes: Sequence[str]):
        self.files, self.column = tuple(map(os.path.abspath, files)), column
        self.labels, self.classes = labels, tuple(classes)
        self.groups, rows, sizes, digest = [], [], [], hashlib.sha256()
        for number, file in enumerate(self.files):
            facts = open_table(file).metadata
            self.groups += [(number, group) for group in range(facts.num_row_groups)]
            rows += [facts.row_group(group).num_rows for group in range(facts.num_row_groups)]
            sizes += [facts.row_group(group).total_byte_size for group in range(facts.num_row_groups)]
            digest.update(os.path.basename(file).encode() + b"\0%d\0" % facts.num_rows)
        self.ends = np.cumsum(rows, dtype=np.int64)
        mean = sum(sizes) // max(1, len(sizes))
        self.window = max(1, min(MOST_GROUPS, KEPT_BYTES // max(1, mean)))
        self.identity = digest.digest()
        if mean > KEPT_BYTES:
            size = f"{mean / 2**20:,.0f} MiB"
            self.notes = (f"{files[0]}: row groups of {size}, which each process reads whole: vit data pack is faster",)
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": OrderedDict()}

    def image(self, index: int) -> Image.Image:
        """The decoded cell."""
        from vitcli.data.images import decode

        return decode(self.read(index), self.path(index))

    def read(self, index: int) -> bytes:
        """The bytes of the cell."""
        from vitcli.data.images import BadImage

        group, row = self._place(index)
        try:
            content = self._group(group)[row].as_py()
        except DataError as error:
            raise BadImage(self.path(index), str(error)) from None
        if isinstance(content, dict):
            content = content.get("bytes")
        if not content:
            raise BadImage(self.path(index), "no bytes of an image")
        return content

    def path(self, index: int) -> str:
        """The file, and the row counted from 0."""
        group, row = self._place(index)
        number, _ = self.groups[group]
        first = next(place for place, (file, _) in enumerate(self.groups) if file == number)
        return f"{self.files[number]}[{row + self._start(group) - self._start(first)}]"

    def order(self, rng: np.random.Generator, chosen: np.ndarray) -> np.ndarray:
        """The row groups in random order, and the images of `window` neighbouring ones mixed, sliding over them."""
        groups = np.searchsorted(self.ends, chosen, side="right")
        places = rng.permutation(len(self.groups))[groups]
        return chosen[np.argsort(places + self.window * rng.random(len(chosen)), kind="stable")]

    def _start(self, group: int) -> int:
        return int(self.ends[group - 1]) if group else 0

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self.ends, index, side="right"))
        return group, index - self._start(group)

    def _group(self, group: int) -> Any:
        """The image column of a row group; those used last are kept."""
        import pyarrow

        if group not in self._kept:
            number, place = self.groups[group]
            try:
                table = open_table(self.files[number]).read_row_group(place, columns=[self.column], use_threads=False)
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"row group {place} cannot be read: {error}") from None
            self._kept[group] = table.column(self.column)
            while len(self._kept) > self.window + 1:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]
