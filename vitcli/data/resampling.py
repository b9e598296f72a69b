"""PIL's bilinear and bicubic resize as tables of whole numbers, from which a GPU gets PIL's very levels.

They are those of Pillow's Resample.c, in its order of steps.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vitcli.data import Preprocessing
from vitcli.data.preprocess import central_crop

BITS = 22  # of a weight: 2 ** BITS is 1
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # pixels to each side that count, where an image is not made smaller


class Part(NamedTuple):
    """Where `kernels.resize` finds an image: its pixels, in bytes, and its tables, in int32 from the same beginning."""

    pixels: int
    height: int
    width: int
    rows: int
    row_taps: int
    columns: int
    column_taps: int


class Side(NamedTuple):
    """One side of an image that is resized and cropped, which needs the pixels from `begin` to `end`.

    `table` int32 (n, 1 + taps) has for each pixel to be the first that counts, from `begin` on, and all weights.
    """

    begin: int
    end: int
    table: np.ndarray


def is_known(p: Preprocessing) -> bool:
    """Whether `sides` has tables for some images."""
    return p.antialias and p.interpolation in SUPPORT


def sides(size: tuple[int, int], p: Preprocessing) -> tuple[Side, Side] | None:
    """Rows and columns of an image (height, width); None where columns first, then rows is not what PIL does."""
    resized, place = central_crop(size, p)
    if not is_known(p) or _rows_first(size, resized):
        return None
    rows, columns = (_side(*lengths, p.interpolation) for lengths in zip(size, resized, place, p.res, strict=True))
    return rows, columns


def unchanged(res: tuple[int, int]) -> tuple[Side, Side]:
    """Of an image that has its size already."""
    rows, columns = (_side(length, length, 0, length, "bilinear") for length in res)
    return rows, columns


@lru_cache(2**10)
def _side(length: int, resized: int, first: int, count: int, interpolation: str) -> Side:
    """`count` pixels from the `first` of those that `length` become."""
    scale = length / resized
    apart = max(scale, 1.0)
    reach = SUPPORT[interpolation] * apart
    centres = (np.arange(first, first + count) + 0.5) * scale
    starts = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + reach + 0.5).astype(np.int64), length)
    taps = starts[:, None] + np.arange((ends - starts).max())
    away = np.abs((taps - centres[:, None] + 0.5) * (1 / apart))
    weights = np.where(taps < ends[:, None], _hat(away) if interpolation == "bilinear" else _cubic(away), 0)
    weights /= weights.cumsum(1)[:, -1:]
    weights = np.trunc(weights * 2**BITS + np.copysign(0.5, weights))
    table = np.column_stack([starts - starts[0], weights]).astype(np.int32)
    return Side(int(starts[0]), int(ends[-1]), table)


def _hat(away: np.ndarray) -> np.ndarray:
    return np.maximum(1 - away, 0)


def _cubic(away: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic convolution of a distance in pixels."""
    near = ((a + 2) * away - (a + 3)) * away * away + 1
    far = (((away - 5) * away + 8) * away - 4) * a
    return np.where(away < 1, near, np.where(away < 2, far, 0))


def _rows_first(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Whether Pillow begins with the rows, as since 13 where they shrink by more than twice as many as the columns."""
    fewer_rows, fewer_columns = (before - after for before, after in zip(size, resized, strict=True))
    return fewer_rows > max(2 * fewer_columns, 0)
