"""Tables in CSV (RFC 4180), UTF-8, with a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitcli.errors import DataError


def header(path: str) -> list[str]:
    """The names of the columns. Raises DataError."""
    with _rows(path) as rows:
        return next(rows, [])


def cells(path: str, columns: list[str]) -> Iterator[list[str]]:
    """The cells of these columns, row by row. Raises DataError for a row that lacks one."""
    with _rows(path) as rows:
        names = next(rows, [])
        places = [names.index(column) for column in columns]
        for row in rows:
            if not row:
                continue
            if len(row) != len(names):
                message = f"{path}:{rows.line_num}: {len(row)} cells, where the header has {len(names)}"
                raise DataError(message, 'put a cell with a comma into "quotes"')
            yield [row[place] for place in places]


@contextmanager
def _rows(path: str) -> Iterator[Any]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield csv.reader(file, strict=True)
    except OSError as error:
        raise DataError(f"the table {path!r} cannot be read: {error.strerror}", "check data.source") from None
    except csv.Error as error:
        raise DataError(f"the table {path!r} is no CSV: {error}", "write it as UTF-8, with a header") from None
