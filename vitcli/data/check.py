"""What is wrong with a data set, or may be: `vit data check`. Every image is read and decoded."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

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

    `damaged` are shards that are not whole, `unreadable` images with the reason. `odd` ones are usable, but of a rare
    mode, shape or a wrong suffix. Images of one group of `duplicates` have the same bytes, of `near_duplicates` nearly
    the same look. `leaks` are held-out images that are trained on: (held out, trained on, "same bytes" or "near").
    `conflicts` are groups of the same bytes under different classes. `counts` are all there are, where lists are cut.
    """

    images: dict[str, int]
    classes: dict[str, dict[str, int]]
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


class Task(NamedTuple):
    """Images of a split to look at, which have the numbers from `first` on among all."""

    split: Split
    images: range
    first: int


class Seen(NamedTuple):
    """What a process saw of a task's images: arrays with an entry for each, zeros for those unreadable."""

    first: int
    readable: np.ndarray
    digests: np.ndarray  # (n, 2) uint64: the first half of SHA-256
    hashes: np.ndarray
    hashed: np.ndarray
    sizes: np.ndarray  # (n, 2): width, height
    kinds: Counter[tuple[str, str]]  # mode, format
    unreadable: list[str]
    odd: list[str]


def check(source: Source, *, jobs: int) -> Check:
    """Look at every image of every split. Raises DataError where the source cannot be opened."""
    begin = time.monotonic()
    datasets: dict[Split, Dataset] = {split: source.open(split) for split in source.splits()}
    starts = dict(zip(datasets, np.cumsum([0, *map(len, datasets.values())]).tolist(), strict=False))
    total = sum(map(len, datasets.values()))
    tasks = [
        Task(split, range(i, min(i + AT_A_TIME, len(dataset))), starts[split] + i)
        for split, dataset in datasets.items()
        for i in range(0, len(dataset), AT_A_TIME)
    ]
    readable, hashed = np.zeros(total, dtype=bool), np.zeros(total, dtype=bool)
    digests, hashes = np.zeros((total, 2), dtype=np.uint64), np.zeros(total, dtype=np.uint64)
    sizes = np.zeros((total, 2), dtype=np.int32)
    kinds: Counter[tuple[str, str]] = Counter()
    unreadable: dict[int, list[str]] = {}
    odd: dict[int, list[str]] = {}
    with bar("checking images", total) as advance:
        for seen in each(partial(_look, datasets), tasks, jobs):
            here = slice(seen.first, seen.first + len(seen.readable))
            readable[here], hashed[here], digests[here] = seen.readable, seen.hashed, seen.digests
            hashes[here], sizes[here] = seen.hashes, seen.sizes
            kinds += seen.kinds
            unreadable[seen.first], odd[seen.first] = seen.unreadable, seen.odd
            advance(len(seen.readable))

    def path(number: int) -> str:
        dataset, index = _at(datasets, number)
        return dataset.path(index)

    def paths(groups: list[list[int]]) -> list[list[str]]:
        return [[path(number) for number in group] for group in groups[:LISTED]]

    damaged = [line for dataset in datasets.values() for line in dataset.damage()]
    labels = np.concatenate([dataset.labels for dataset in datasets.values()])
    same, one = _same(digests, readable)
    pairs = _near(hashes, hashed & one)
    with bar("comparing images", len(pairs)) as advance:
        alike = []
        for pair in each(partial(_look_alike, datasets), pairs, jobs):
            alike += [pair] if pair else []
            advance(1)
    near = duplicates.groups(alike)
    train = len(datasets["train"]) if "train" in datasets else 0
    leaks = [(group, "same bytes") for group in same] + [(group, "near") for group in near]
    leaked = [(held, group[0], kind) for group, kind in leaks for held in group if group[0] < train <= held]
    conflicts = [group for group in same if len(set(labels[group].tolist())) > 1]
    lines = {
        name: [line for first in sorted(told) for line in told[first]]
        for name, told in (("unreadable", unreadable), ("odd", odd))
    }
    found = {**lines, "duplicates": same, "near_duplicates": near, "leaks": leaked, "conflicts": conflicts}
    seconds = time.monotonic() - begin
    return Check(
        images={split: len(dataset) for split, dataset in datasets.items()},
        classes={split: _counts(dataset) for split, dataset in datasets.items()},
        damaged=damaged,
        unreadable=lines["unreadable"][:LISTED],
        odd=lines["odd"][:LISTED],
        modes=_sums(kinds, 0),
        formats=_sums(kinds, 1),
        sizes=_spread(sizes[readable]),
        duplicates=paths(same),
        near_duplicates=paths(near),
        leaks=[(path(held), path(trained), kind) for held, trained, kind in leaked[:LISTED]],
        conflicts=paths(conflicts),
        counts={name: len(values) for name, values in found.items()},
        notes=[note for dataset in datasets.values() for note in dataset.notes],
        seconds=round(seconds, 2),
        images_per_second=round(total / seconds, 1),
    )


def _look(datasets: dict[Split, Dataset], task: Task) -> Seen:
    dataset, count = datasets[task.split], len(task.images)
    seen = Seen(
        first=task.first,
        readable=np.zeros(count, dtype=bool),
        digests=np.zeros((count, 2), dtype=np.uint64),
        hashes=np.zeros(count, dtype=np.uint64),
        hashed=np.zeros(count, dtype=bool),
        sizes=np.zeros((count, 2), dtype=np.int32),
        kinds=Counter(),
        unreadable=[],
        odd=[],
    )
    for place, index in enumerate(task.images):
        name = dataset.path(index)
        try:
            content = dataset.read(index)
            image = dataset.image(index) if content is None else decode(content, name)
        except BadImage as error:
            seen.unreadable.append(str(error))
            continue
        mode, kind = (image.mode, "pixels") if content is None else _header(content)
        digest = hashlib.sha256(image.tobytes() if content is None else content).digest()[:16]
        hashed = duplicates.difference_hash(image)
        seen.readable[place], seen.hashed[place] = True, hashed is not None
        seen.digests[place], seen.sizes[place] = np.frombuffer(digest, dtype=np.uint64), image.size
        seen.hashes[place] = hashed or 0
        seen.kinds[mode, kind] += 1
        seen.odd.extend(f"{name}: {reason}" for reason in _odd(name, mode, kind, image.size))
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


def _same(digests: np.ndarray, readable: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """Groups of images with the same bytes; and which images are the first of theirs."""
    numbers = np.flatnonzero(readable)
    order = numbers[np.lexsort((numbers, digests[numbers, 1], digests[numbers, 0]))]
    new = np.r_[True, (digests[order[1:]] != digests[order[:-1]]).any(1)] if len(order) else np.empty(0, dtype=bool)
    one = np.zeros(len(readable), dtype=bool)
    one[order[new]] = True
    parts = np.split(order, np.flatnonzero(new)[1:]) if len(order) else []
    return sorted(part.tolist() for part in parts if len(part) > 1), one


def _near(hashes: np.ndarray, chosen: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of the chosen images, none of the same bytes, whose hashes are near."""
    numbers = np.flatnonzero(chosen)
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
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes)).tolist()
    return dict(zip(dataset.classes, counts, strict=True))


def _sums(kinds: Counter[tuple[str, str]], part: int) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for kind, count in kinds.items():
        sums[kind[part]] += count
    return dict(sums.most_common())


def _spread(sizes: np.ndarray) -> dict[str, Any]:
    """Smallest, middle and largest width and height."""
    if not len(sizes):
        return {}
    rows = {"smallest": sizes.min(0), "median": np.median(sizes, axis=0).astype(int), "largest": sizes.max(0)}
    return {name: row.tolist() for name, row in rows.items()}
