"""Batches of images, decoded here or in other processes, and the same to the bit however many there are.

The order and all chance follow from (seed, epoch, index), and the place in the data from the step alone: a run can
start at any step at once, and there is no state to save.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitcli import rng
from vitcli.data import DataConfig, Preprocessing
from vitcli.data.augment import augment
from vitcli.data.images import BadImage
from vitcli.data.preprocess import prepare
from vitcli.data.sampling import epoch_order, turns
from vitcli.data.sources import Dataset
from vitcli.data.workers import Part, Sample, load, start_server
from vitcli.errors import DataError
from vitcli.rng import Stream

CHUNK = 256  # images that a process loads at a time: a larger batch comes in parts
TRIES = 100  # how often a replacement for one broken image is sought
FEW, SMALL = 1000, 64  # fewer images, or small ones in memory without RandAugment, are loaded by this process
MOST_WORKERS = 16  # beyond, handing over costs more than another process brings

Batch = dict[str, Any]


def epoch_steps(dataset: Dataset, batch: int) -> int:
    """Updates in an epoch, without the last partial batch. Raises DataError if there is not one."""
    if batch > len(dataset):
        message = f"a batch of {batch} is more than the {len(dataset)} training images"
        raise DataError(message, f"take at most --set batch={len(dataset)}")
    return len(dataset) // batch


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of class names, labels and the images' relative names: equal for the same data set elsewhere."""
    digest = hashlib.sha256(json.dumps(dataset.classes).encode())
    digest.update(dataset.labels.astype("<i8").tobytes())
    digest.update(dataset.identity)
    return digest.hexdigest()


def train_batches(
    data: DataConfig,
    dataset: Dataset,
    *,
    batch: int,
    seed: int,
    start: int,
    steps: int,
    places: Sequence[int] | None = None,
    neighbours: int = 1,
) -> Iterator[Batch]:
    """The batches of the updates `start` to `steps`: "images" uint8 (b, 3, h, w), augmented, and "labels" int64 (b,).

    `places` are those of the batch to load, in their order, where other processes load the rest; `neighbours` of
    them share this machine. A batch in which broken images were replaced has "bad" too, a list of BadImage. Raises
    BadImage where none may be replaced, and DataError beyond the share that may, if `batch` is too large, or if a
    loader process is killed.
    """
    epoch_steps(dataset, batch)
    places = range(batch) if places is None else places
    easy = _is_easy(dataset, data.res) and not data.augment.randaugment
    workers = _workers(data.workers, easy, len(places) * (steps - start), neighbours)
    if workers:
        start_server()  # it imports torch while the caller builds a model
    order = _order(data, dataset, batch, seed, range(start, steps), places)
    return _train_batches(data, dataset, seed, order, steps - start, len(places), workers)


def eval_batches(
    preprocessing: Preprocessing,
    dataset: Dataset,
    *,
    batch: int,
    workers: int | None = None,
    share: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every image once, or those of `share`, in order: "images" uint8 (b, 3, h, w) and "labels" int64 (b,).

    The last batch may be smaller. Broken images are left out, never replaced: a batch that lacks some has "bad" too,
    a list of BadImage.
    """
    sample = partial(_eval_sample, preprocessing, dataset)
    share = range(len(dataset)) if share is None else share
    positions = (list(share[i : i + batch]) for i in range(0, len(share), batch))
    workers = _workers(workers, _is_easy(dataset, preprocessing.res), len(share))
    with closing(load(sample, preprocessing.res, positions, workers)) as parts:
        for part in parts:
            yield _join([part])


def _train_batches(
    data: DataConfig,
    dataset: Dataset,
    seed: int,
    order: Iterator[list[tuple[int, int]]],
    steps: int,
    batch: int,
    workers: int,
) -> Iterator[Batch]:
    sample = partial(_training_sample, data, dataset, seed)
    broken: dict[int, BadImage] = {}
    with closing(load(sample, data.res, order, workers)) as loaded:
        for _ in range(steps):
            parts = [next(loaded) for _ in range(0, batch, CHUNK)]
            broken |= {index: BadImage(path, reason) for part in parts for index, path, reason in part["bad"]}
            complete = sum(len(part["labels"]) for part in parts) == batch
            if not complete or len(broken) > data.bad_images * len(dataset):
                raise _too_many(list(broken.values()), data.bad_images, len(dataset))
            yield _join(parts)


def _too_many(broken: list[BadImage], share: float, images: int) -> DataError:
    if not share:
        hint = "mend or remove it, or have up to 1 % of the images replaced: --set data.bad_images=0.01"
        return BadImage(broken[0].path, broken[0].reason, hint)
    return DataError(
        f"{len(broken)} of {images} images so far cannot be read, more than data.bad_images={share:g} allows; "
        f"the first: {'; '.join(map(str, broken[:3]))}",
        "mend or remove them",
    )


def _order(
    data: DataConfig, dataset: Dataset, batch: int, seed: int, steps: range, places: Sequence[int]
) -> Iterator[list[tuple[int, int]]]:
    """(turn, index) of the images of each part of each batch. An epoch goes without its last partial batch.

    The turn is the epoch, and above its 32 bits how often the epoch has shown the image before.
    """
    epoch = -1
    order = turn = np.empty(0, dtype=np.int64)
    for step in steps:
        now, place = divmod(step, len(dataset) // batch)
        if now != epoch:
            chance = rng.generator(seed, Stream.SHUFFLE, now)
            epoch, order = now, epoch_order(dataset, data.sampling, data.repeat_threshold, chance)
            turn = epoch + (turns(order, data.sampling) << 32)
        here = slice(place * batch, (place + 1) * batch)
        whole = list(zip(turn[here].tolist(), order[here].tolist(), strict=True))
        chosen = [whole[place] for place in places]
        yield from (chosen[i : i + CHUNK] for i in range(0, len(chosen), CHUNK))


def _training_sample(data: DataConfig, dataset: Dataset, seed: int, position: tuple[int, int]) -> Sample:
    """The augmented image of (turn, index), or of another index if that one is broken and may be replaced."""
    turn, index = position
    others = rng.generator(seed, Stream.REPLACE, turn, index)
    chance = rng.generator(seed, Stream.AUGMENT, turn, index)
    bad = []
    for _ in range(TRIES if data.bad_images else 1):
        try:
            image = dataset.image(index)
        except BadImage as error:
            bad.append((index, error.path, error.reason))
            index = int(others.integers(len(dataset)))
        else:
            return augment(image, data, chance), int(dataset.labels[index]), bad
    return None, 0, bad


def _eval_sample(preprocessing: Preprocessing, dataset: Dataset, index: int) -> Sample:
    try:
        return prepare(dataset.image(index), preprocessing), int(dataset.labels[index]), []
    except BadImage as error:
        return None, 0, [(index, error.path, error.reason)]


def _join(parts: list[Part]) -> Batch:
    images, labels = [part["images"] for part in parts], [part["labels"] for part in parts]
    batch: Batch = {"images": _cat(images), "labels": _cat(labels)}
    bad = [BadImage(path, reason) for part in parts for _, path, reason in part["bad"]]
    return batch | {"bad": bad} if bad else batch


def _cat(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _is_easy(dataset: Dataset, res: tuple[int, int]) -> bool:
    return dataset.in_memory and max(res) <= SMALL


def _workers(wanted: int | None, easy: bool, images: int, neighbours: int = 1) -> int:
    """Loader processes: as wanted; else none where they do not pay, and otherwise this process's cores but one."""
    if wanted is not None:
        return wanted
    if images < FEW or easy:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(0, cores // neighbours - 1), MOST_WORKERS)
