"""What is wrong with a data set, or may be: `vit data check`. Every image is read and decoded."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from vitcli.data import duplicates
from vitcli.data.images import FORMATS, BadImage, decode
from vitcli.data.parallel import each
from vitcli.data.sources import Dataset, Source, Split
from vitcli.waiting import bar

AT_A_TIME = 64  # images that a process looks at
USUAL_MODES = ("RGB", "L")
SMALL, LONG = 32, 4.0  # sides in pixels, and longer to shorter side, from which on an image is odd
LISTED = 10_000  # of each kind of finding; all are counted

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}


@dataclass(frozen=True)
class Check:
    """What was found. Paths are as messages name them.

    Where an image may be of several classes, `unlabelled` counts those of none in each split; else it is empty.
    `damaged` are shards that are not whole, `unreadable` images with the reason. `odd` ones are usable, but of a rare
    mode, shape or a wrong suffix. Images of one group of `duplicates` have the same bytes, of `near_duplicates` nearly
    the same look. `leaks` are held-out images that are trained on: (held out, trained on, "same bytes" or "near").
    `conflicts` are groups of the same bytes under different classes. `counts` are all there are, where lists are cut.
    """

    images: dict[str, int]
    classes: dict[str, dict[str, int]]
    unlabelled: dict[str, int]
    damaged: list[str]
    unreadable: list[str]
    odd: list[str]
    modes: dict[str, int]
    formats: dict[str, int]
    sizes: dict[str, list[int]]
    duplicates: list[list[str]]
    near_duplicates: list[list[str]]
    leaks: list[tuple[str, str, str]]
    conflicts: list[list[str]]
    counts: dict[str, int]
    notes: list[str]
    seconds: float
    images_per_second: float

    @property
    def sound(self) -> bool:
        """Whether every image can be used, and none is both trained on and held out, or of two classes."""
        same = any(kind == "same bytes" for *_, kind in self.leaks)
        return not (self.damaged or self.unreadable or self.conflicts or same)


class Seen:
    """What was seen of the `count` images from number `first` on: an entry for each, zero if unreadable."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count
        self.readable = np.zeros(count, dtype=bool)
        self.digests = np.zeros((count, 2), dtype=np.uint64)  # the first half of SHA-256
        self.hashes, self.hashed = np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=bool)
        self.sizes = np.zeros((count, 2), dtype=np.int32)  # width, height
        self.modes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.unreadable: list[tuple[int, str]] = []
        self.odd: list[tuple[int, str]] = []

    def take(self, part: Seen) -> None:
        """What was seen of some of the images."""
        here = slice(part.first - self.first, part.first - self.first + part.count)
        self.readable[here], self.digests[here], self.sizes[here] = part.readable, part.digests, part.sizes
        self.hashes[here], self.hashed[here] = part.hashes, part.hashed
        self.modes += part.modes
        self.formats += part.formats
        self.unreadable += part.unreadable
        self.odd += part.odd


def check(source: Source, *, jobs: int) -> Check:
    """Look at every image of every split. Raises DataError where the source cannot be opened."""
    begin = time.monotonic()
    datasets: dict[Split, Dataset] = {split: source.open(split) for split in source.splits()}
    labels = np.concatenate([dataset.labels for dataset in datasets.values()])
    seen = Seen(0, len(labels))
    tasks = [range(first, min(first + AT_A_TIME, len(labels))) for first in range(0, len(labels), AT_A_TIME)]
    with bar("checking images", len(labels)) as advance:
        for part in each(partial(_look, datasets), tasks, jobs):
            seen.take(part)
            advance(part.count)

    same, one = _same(seen)
    pairs = _near(seen, one)
    alike = []
    with bar("comparing images", len(pairs)) as advance:
        for pair in each(partial(_look_alike, datasets), pairs, jobs):
            alike += [pair] if pair else []
            advance(1)
    near = duplicates.groups(alike)
    train = len(datasets["train"]) if "train" in datasets else 0
    leaks = [
        (held, group[0], kind)
        for kind, found in (("same bytes", same), ("near", near))
        for group in found
        for held in group
        if group[0] < train <= held
    ]
    conflicts = [group for group in same if len(np.unique(labels[group], axis=0)) > 1]
    overlapping = [(split, dataset) for split, dataset in datasets.items() if dataset.multi_label]

    def path(number: int) -> str:
        dataset, index = _at(datasets, number)
        return dataset.path(index)

    def paths(groups: list[list[int]]) -> list[list[str]]:
        return [[path(number) for number in group] for group in groups[:LISTED]]

    counts = {"unreadable": seen.unreadable, "odd": seen.odd, "duplicates": same, "near_duplicates": near}
    damaged = [line for dataset in datasets.values() for line in dataset.damage()]
    seconds = time.monotonic() - begin
    return Check(
        images={split: len(dataset) for split, dataset in datasets.items()},
        classes={split: _counts(dataset) for split, dataset in datasets.items()},
        unlabelled={split: int((~dataset.labels.any(1)).sum()) for split, dataset in overlapping},
        damaged=damaged,
        unreadable=[line for _, line in sorted(seen.unreadable)[:LISTED]],
        odd=[line for _, line in sorted(seen.odd)[:LISTED]],
        modes=dict(seen.modes.most_common()),
        formats=dict(seen.formats.most_common()),
        sizes=_spread(seen.sizes[seen.readable]),
        duplicates=paths(same),
        near_duplicates=paths(near),
        leaks=[(path(held), path(trained), kind) for held, trained, kind in leaks[:LISTED]],
        conflicts=paths(conflicts),
        counts={name: len(found) for name, found in (counts | {"leaks": leaks, "conflicts": conflicts}).items()},
        notes=[note for dataset in datasets.values() for note in dataset.notes],
        seconds=round(seconds, 2),
        images_per_second=round(len(labels) / seconds, 1),
    )


def _look(datasets: dict[Split, Dataset], numbers: range) -> Seen:
    seen = Seen(numbers[0], len(numbers))
    for place, number in enumerate(numbers):
        dataset, index = _at(datasets, number)
        name = dataset.path(index)
        try:
            content = dataset.read(index)
            image = dataset.image(index) if content is None else decode(content, name)
        except BadImage as error:
            seen.unreadable.append((number, str(error)))
            continue
        mode, kind = (image.mode, "pixels") if content is None else _header(content)
        digest = hashlib.sha256(image.tobytes() if content is None else content).digest()[:16]
        hashed = duplicates.difference_hash(image)
        seen.readable[place], seen.hashed[place] = True, hashed is not None
        seen.digests[place], seen.sizes[place] = np.frombuffer(digest, dtype=np.uint64), image.size
        seen.hashes[place] = hashed or 0
        seen.modes[mode] += 1
        seen.formats[kind] += 1
        seen.odd += [(number, f"{name}: {reason}") for reason in _odd(name, mode, kind, image.size)]
    return seen


def _header(content: bytes) -> tuple[str, str]:
    """The mode that the image is stored in, and its format."""
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        return image.mode, image.format or ""


def _odd(name: str, mode: str, kind: str, size: tuple[int, int]) -> list[str]:
    reasons = []
    suffix = os.path.splitext(name)[1].lower()
    if suffix and kind in _SUFFIXES and suffix not in _SUFFIXES[kind]:
        reasons.append(f"a {kind} under the suffix {suffix}")
    if mode not in USUAL_MODES:
        reasons.append(f"mode {mode}")
    if min(size) < SMALL:
        reasons.append(f"only {size[0]}x{size[1]} pixels")
    if max(size) > LONG * min(size):
        reasons.append(f"longer than {LONG:g}:1: {size[0]}x{size[1]}")
    return reasons


def _same(seen: Seen) -> tuple[list[list[int]], np.ndarray]:
    """Groups of images with the same bytes; and which images are the first of theirs."""
    numbers, digests = np.flatnonzero(seen.readable), seen.digests
    order = numbers[np.lexsort((numbers, digests[numbers, 1], digests[numbers, 0]))]
    new = np.r_[True, (digests[order[1:]] != digests[order[:-1]]).any(1)][: len(order)]
    one = np.zeros(seen.count, dtype=bool)
    one[order[new]] = True
    parts = np.split(order, np.flatnonzero(new)[1:])
    return sorted(part.tolist() for part in parts if len(part) > 1), one


def _near(seen: Seen, one: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of images, none of the same bytes, whose hashes are near."""
    numbers, hashes = np.flatnonzero(seen.hashed & one), seen.hashes
    order = numbers[np.argsort(hashes[numbers], kind="stable")]
    values, first = np.unique(hashes[order], return_index=True)
    equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    pairs = np.concatenate([np.stack([order[equal], order[equal + 1]], 1), order[first[duplicates.near_pairs(values)]]])
    return [(a, b) for a, b in pairs.tolist()]


def _look_alike(datasets: dict[Split, Dataset], pair: tuple[int, int]) -> tuple[int, int] | None:
    (dataset, index), (other, place) = (_at(datasets, number) for number in pair)
    return pair if duplicates.look_alike(dataset.image(index), other.image(place)) else None


def _at(datasets: dict[Split, Dataset], number: int) -> tuple[Dataset, int]:
    """The data set of an image by its number among all, and its place there."""
    for dataset in datasets.values():
        if number < len(dataset):
            return dataset, number
        number -= len(dataset)
    raise AssertionError(number)


def _counts(dataset: Dataset) -> dict[str, int]:
    return dict(zip(dataset.classes, dataset.counts.tolist(), strict=True))


def _spread(sizes: np.ndarray) -> dict[str, Any]:
    """Smallest, middle and largest width and height."""
    if not len(sizes):
        return {}
    rows = {"smallest": sizes.min(0), "median": np.median(sizes, axis=0).astype(int), "largest": sizes.max(0)}
    return {name: row.tolist() for name, row in rows.items()}
