"""Images that look alike, by a hash of 64 bits that keeps when an image is scaled, recompressed or slightly changed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
from PIL import Image

DISTANCE = 3  # bits in which the hashes of near duplicates differ at most
FLAT = 8  # grey levels: an image with less contrast in its 9x8 version is like any other of its kind, and has no hash
ALIKE = 0.97  # correlation of the pixels of 16x16 versions
MOST = 256  # neighbours that are compared where many hashes share a part

_WIDTHS = (13, 13, 13, 13, 12)  # of 5 parts 2 are equal if 3 bits differ


def difference_hash(image: Image.Image) -> int | None:
    """Of an RGB image: whether grey falls from each to its right neighbour in 8 rows of 9; None if it is flat."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    if grey.max() - grey.min() < FLAT:
        return None
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def look_alike(image: Image.Image, other: Image.Image) -> bool:
    """Whether two RGB images of near hashes, which few bits of a plain background may be, look alike in colour too."""
    small = [
        np.asarray(each.resize((16, 16), Image.Resampling.BOX), dtype=np.float64).ravel() for each in (image, other)
    ]
    return bool(np.asarray(np.corrcoef(small))[0, 1] >= ALIKE)


def near_pairs(hashes: np.ndarray) -> np.ndarray:
    """All pairs (i, j) of uint64 hashes, each there once, that differ in at most DISTANCE bits: (pairs, 2), i < j.

    Hashes that near, split into five parts, have two parts in common: for each two parts the hashes are sorted by
    them, and neighbours compared (Manku et al., Detecting Near-Duplicates for Web Crawling, 2007).
    """
    shifts = np.cumsum((0, *_WIDTHS[:-1]))
    masks = [((1 << width) - 1) << int(shift) for width, shift in zip(_WIDTHS, shifts, strict=True)]
    found = [np.empty((0, 2), dtype=np.int64)]
    for first, second in combinations(masks, 2):
        keys = hashes & np.uint64(first | second)
        order = np.argsort(keys, kind="stable")
        keys, sorted_hashes = keys[order], hashes[order]
        for lag in range(1, min(MOST, len(keys) - 1) + 1):
            alike = np.flatnonzero(keys[lag:] == keys[:-lag])
            if not len(alike):
                break
            near = alike[np.bitwise_count(sorted_hashes[alike] ^ sorted_hashes[alike + lag]) <= DISTANCE]
            found.append(np.sort(np.stack([order[near], order[near + lag]], axis=1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def groups(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """What is connected by pairs, each group sorted, in the order of their first members."""
    leader: dict[int, int] = {}

    def find(member: int) -> int:
        root = member
        while leader.setdefault(root, root) != root:
            root = leader[root]
        while leader[member] != root:
            leader[member], member = root, leader[member]
        return root

    for a, b in pairs:
        first, second = sorted((find(a), find(b)))
        leader[second] = first
    found: dict[int, list[int]] = {}
    for member in sorted(leader):
        found.setdefault(find(member), []).append(member)
    return list(found.values())
