"""The resize of PIL, and torch's without antialias, as tables of whole numbers: a GPU gets the same levels by them.

They are those of Pillow's Resample.c, and of torch's for uint8 on a CPU, in the order of their steps.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vitcli.data import Preprocessing
from vitcli.data.preprocess import central_crop

BITS = 22  # of PIL's weights: 2 ** BITS is 1
MOST = 2**15  # below which torch's stay, with as many bits as that allows
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # pixels to each side that count, where an image is not made smaller


class Part(NamedTuple):
    """Where `kernels.resize` finds an image: its pixels, in bytes, and its tables, in int32 from the same beginning,
    whose entries have some weights of some bits."""

    pixels: int
    height: int
    width: int
    rows: int
    row_taps: int
    row_bits: int
    columns: int
    column_taps: int
    column_bits: int


class Side(NamedTuple):
    """One side of an image that is resized and cropped, which needs the pixels from `begin` to `end`.

    `table` int32 (n, 1 + taps) has for each pixel to be the first that counts, from `begin` on, and all weights, of
    which 2 ** bits is 1.
    """

    begin: int
    end: int
    table: np.ndarray
    bits: int

    @property
    def length(self) -> int:
        """Pixels that are needed."""
        return self.end - self.begin


def is_known(p: Preprocessing) -> bool:
    """Whether `sides` has tables for some images."""
    return p.interpolation == "bilinear" or (p.interpolation == "bicubic" and p.antialias)


def sides(size: tuple[int, int], p: Preprocessing) -> tuple[Side, Side] | None:
    """Rows and columns of an image (height, width); None where it is not resized by columns and then rows."""
    resized, place = central_crop(size, p)
    if not is_known(p) or (p.antialias and _rows_first(size, resized)):
        return None
    support = SUPPORT[p.interpolation] if p.antialias else None
    rows, columns = (_side(*lengths, support) for lengths in zip(size, resized, place, p.res, strict=True))
    return rows, columns


def rows_needed(size: tuple[int, int], p: Preprocessing) -> int:
    """How many rows of an image (height, width) count, from the top."""
    found = sides(size, p)
    return found[0].end if found else size[0]


def unchanged(res: tuple[int, int]) -> tuple[Side, Side]:
    """Of an image that has its size already."""
    rows, columns = (_side(length, length, 0, length, None) for length in res)
    return rows, columns


@lru_cache(2**10)
def _side(length: int, resized: int, first: int, count: int, support: float | None) -> Side:
    """`count` pixels from the `first` of those that `length` become: by PIL's rules, or torch's without antialias."""
    starts, weights, bits = _torchs(length, resized) if support is None else _pils(length, resized, support)
    ends = np.minimum(starts + weights.shape[1], length)
    weights = np.trunc(weights * 2**bits + np.copysign(0.5, weights))
    here = slice(first, first + count)
    starts, weights = starts[here], weights[here]
    table = np.column_stack([starts - starts[0], weights]).astype(np.int32)
    return Side(int(starts[0]), int(ends[here].max()), table, bits)


Weights = tuple[
    np.ndarray, np.ndarray, int
]  # for each pixel where they start, (n,), and what they are, (n, taps); bits


def _pils(length: int, resized: int, support: float) -> Weights:
    scale = length / resized
    apart = max(scale, 1.0)
    centres = (np.arange(resized) + 0.5) * scale
    starts = np.maximum((centres - support * apart + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + support * apart + 0.5).astype(np.int64), length)
    taps = starts[:, None] + np.arange((ends - starts).max())
    away = np.abs((taps - centres[:, None] + 0.5) * (1 / apart))
    weights = np.where(taps < ends[:, None], _hat(away) if support == SUPPORT["bilinear"] else _cubic(away), 0)
    return starts, weights / weights.cumsum(1)[:, -1:], BITS


def _torchs(length: int, resized: int) -> Weights:
    places = np.maximum((np.arange(resized) + 0.5) * (length / resized) - 0.5, 0)
    starts = np.minimum(places.astype(np.int64), length - 1)
    share = np.minimum(places - starts, 1)
    weights = np.column_stack([1 - share, share])
    bits = next(bits for bits in range(BITS) if int(weights.max() * 2 ** (bits + 1) + 0.5) >= MOST)
    weights[starts == length - 1] = 1, 0
    return starts, weights, bits


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
