"""Batches of images, decoded here or in other processes, and the same to the bit however many there are.

The order and all chance follow from (seed, epoch, index), and the place in the data from the step alone: a run can
start at any step at once, and there is no state to save.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from vitcli import rng
from vitcli.data import DataConfig, Preprocessing
from vitcli.data.augment import augment
from vitcli.data.images import BadImage
from vitcli.data.preprocess import prepare
from vitcli.data.sources import Dataset
from vitcli.errors import DataError
from vitcli.rng import Stream

CHUNK = 256  # images that a process loads at a time: a larger batch comes in parts
TRIES = 100  # readable replacements are sought so often for one broken image

Batch = dict[str, Any]


def epoch_steps(dataset: Dataset, batch: int) -> int:
    """Updates in an epoch, without the last partial batch. Raises DataError if there is not one."""
    if batch > len(dataset):
        raise DataError(f"a batch of {batch} is more than the {len(dataset)} training images", f"--set batch={len(dataset)}")
    return len(dataset) // batch


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of class names, labels and the images' relative names: equal for the same data set elsewhere."""
    digest = hashlib.sha256(json.dumps(dataset.classes).encode())
    digest.update(dataset.labels.astype("<i8").tobytes())
    digest.update(dataset.identity)
    return digest.hexdigest()


def train_batches(
    data: DataConfig, dataset: Dataset, *, batch: int, seed: int, start: int, steps: int
) -> Iterator[Batch]:
    """The batches of the updates `start` to `steps`: "images" uint8 (b, 3, h, w), augmented, and "labels" int64 (b,).

    A batch in which broken images were replaced has "bad" too, a list of BadImage. Raises BadImage where none may be
    replaced, DataError beyond the share that may, if `batch` is too large, or if a loader process is killed.
    """
    epoch_steps(dataset, batch)
    workers = _workers(data.workers, dataset, data.res, batch, steps - start)
    if workers:
        _start_server()  # it imports torch while the caller builds a model
    return _train_batches(data, dataset, batch, seed, start, steps, workers)


def eval_batches(
    preprocessing: Preprocessing, dataset: Dataset, *, batch: int, workers: int | None = None
) -> Iterator[Batch]:
    """Every image once, in order: "images" uint8 (b, 3, h, w) and "labels" int64 (b,); the last batch may be smaller.

    Broken images are left out, never replaced; a batch that lacks some has "bad" too, a list of BadImage.
    """
    steps = -(-len(dataset) // batch)
    positions = (list(range(i, min(i + batch, len(dataset)))) for i in range(0, len(dataset), batch))
    workers = _workers(workers, dataset, preprocessing.res, batch, steps)
    with closing(_load(_Eval(preprocessing, dataset), positions, workers)) as parts:
        for part in parts:
            yield _join([part], [BadImage(path, reason) for _, path, reason in part["bad"]])


def _train_batches(
    data: DataConfig, dataset: Dataset, batch: int, seed: int, start: int, steps: int, workers: int
) -> Iterator[Batch]:
    broken: dict[int, BadImage] = {}
    positions = _order(len(dataset), batch, seed, start, steps)
    with closing(_load(_Train(data, dataset, seed), positions, workers)) as loaded:
        for _ in range(start, steps):
            parts = [next(loaded) for _ in range(0, batch, CHUNK)]
            bad = {i: BadImage(path, reason) for part in parts for i, path, reason in part["bad"]}
            broken |= bad
            complete = sum(len(part["labels"]) for part in parts) == batch
            if len(broken) > data.bad_images * len(dataset) or not complete:
                raise _too_many(list(broken.values()), data.bad_images, len(dataset))
            yield _join(parts, list(bad.values()))


def _too_many(broken: list[BadImage], share: float, images: int) -> DataError:
    if not share:
        hint = "mend or remove it, or have up to 1 % of the images replaced: --set data.bad_images=0.01"
        return BadImage(broken[0].path, broken[0].reason, hint)
    return DataError(
        f"{len(broken)} of {images} images so far cannot be read, more than data.bad_images={share:g} allows; "
        f"the first: {'; '.join(map(str, broken[:3]))}",
        "mend or remove them",
    )


def _order(images: int, batch: int, seed: int, start: int, steps: int) -> Iterator[list[tuple[int, int]]]:
    """(epoch, index) of the images of each part of each batch. An epoch is a permutation without its partial batch."""
    epoch, order = -1, np.empty(0, dtype=np.int64)
    for step in range(start, steps):
        now, place = divmod(step, images // batch)
        if now != epoch:
            epoch, order = now, rng.generator(seed, Stream.SHUFFLE, now).permutation(images)
        chosen = [(epoch, index) for index in order[place * batch : (place + 1) * batch].tolist()]
        yield from (chosen[i : i + CHUNK] for i in range(0, batch, CHUNK))


class _Train:
    """Augmented images at (epoch, index)."""

    def __init__(self, data: DataConfig, dataset: Dataset, seed: int):
        self.data, self.dataset, self.seed = data, dataset, seed

    def __getitems__(self, positions: list[tuple[int, int]]) -> Batch:
        images, labels, bad = [], [], []
        for epoch, index in positions:
            others = rng.generator(self.seed, Stream.REPLACE, epoch, index)
            for _ in range(TRIES if self.data.bad_images else 1):
                try:
                    image = self.dataset.image(index)
                except BadImage as error:
                    bad.append((index, error.path, error.reason))
                    index = int(others.integers(len(self.dataset)))  # noqa: PLW2901
                else:
                    images.append(augment(image, self.data, chance))
                    labels.append(self.dataset.labels[index])
                    break
        return _stack(images, labels, bad, self.data.res)


class _Eval:
    """Prepared images at an index."""

    def __init__(self, preprocessing: Preprocessing, dataset: Dataset):
        self.preprocessing, self.dataset = preprocessing, dataset

    def __getitems__(self, positions: list[int]) -> Batch:
        images, labels, bad = [], [], []
        for index in positions:
            try:
                images.append(prepare(self.dataset.image(index), self.preprocessing))
                labels.append(self.dataset.labels[index])
            except BadImage as error:
                bad.append((index, error.path, error.reason))
        return _stack(images, labels, bad, self.preprocessing.res)
