"""Batches of images, decoded here or in other processes, and the same to the bit however many there are.

The order and all chance follow from (seed, epoch, index), and the place in the data from the step alone: a run can
start at any step at once, and there is no state to save. Loader processes decode and crop; on a GPU the resize is its
own, and all that keeps an image's size is done to whole batches, on any device. Small sets are kept there, and need no
loading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import tee

import numpy as np
import torch
from torch import Tensor

from vitcli import kernels, rng
from vitcli.data import DataConfig, Preprocessing, resampling
from vitcli.data.augment import augment, crop, window
from vitcli.data.handover import Decoded, Deferred, Handover, Ready
from vitcli.data.images import BadImage, Box
from vitcli.data.parallel import expect_loaders, loaders
from vitcli.data.prefetch import AHEAD, Batch, ahead, put
from vitcli.data.preprocess import prepare
from vitcli.data.resident import at_once, kept_batches, kept_images
from vitcli.data.sampling import Positions, epoch_order, turns
from vitcli.data.sources import Dataset
from vitcli.data.workers import Loaded, Sample, load
from vitcli.errors import DataError
from vitcli.rng import Stream

TRIES = 100  # how often a replacement for one broken image is sought
SMALL = 64  # pixels of a side, up to which images that are in memory are loaded by this process
CPU = torch.device("cpu")


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of class names, labels and the images' relative names: equal for the same data set elsewhere."""
    digest = hashlib.sha256(json.dumps(dataset.classes).encode())
    digest.update((dataset.labels if dataset.multi_label else dataset.labels.astype("<i8")).tobytes())
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
    device: torch.device = CPU,
) -> Generator[Batch, None, None]:
    """The batches of the updates `start` to `steps`: "images" uint8 (b, 3, h, w), augmented, and "labels", those of the
    data set: int64 (b,) or bool (b, classes).

    They are made on the `device`, on CUDA ahead of their turn; for devices without float64 on the CPU. `places` are
    those of the batch to load, in their order, where other processes load the rest; `neighbours` of them share this
    machine's cores. A batch in which broken images were replaced has "bad" too: what is wrong with the image of an
    index. One for which loader processes had to be replaced has "killed", their number. Raises DataError for a broken
    image that may not be replaced or for which no whole one is found, or if too many loader processes are killed.
    """
    places = range(batch) if places is None else places
    count = len(places) * (steps - start)
    workers = loaders(data.workers, _is_easy(dataset, data.res), count, neighbours)
    order = _order(data, dataset, batch, seed, range(start, steps), list(places))
    workplace = device if device.type == "cuda" else CPU  # augmentation wants float64, which MPS has not
    kept = kept_images(data, dataset, workplace, count, workers)
    if kept is not None:
        together = at_once(data, len(places))  # all wait at once, so that the next are made meanwhile
        return ahead(kept_batches(data, dataset, seed, order, len(places), kept), device, max(AHEAD, together))
    if workers:
        expect_loaders()  # it imports torch while the caller builds a model
    return ahead(_loaded_batches(data, dataset, seed, order, workers, workplace), device)


def eval_batches(
    preprocessing: Preprocessing,
    dataset: Dataset,
    *,
    batch: int,
    workers: int | None = None,
    share: Sequence[int] | None = None,
    neighbours: int = 1,
    device: torch.device = CPU,
) -> Generator[Batch, None, None]:
    """Every image once, or those of `share`, in order: "images" uint8 (b, 3, h, w), and "labels" int64 (b,) or bool
    (b, classes).

    The images are on the `device`, on CUDA ahead of their turn; the labels stay on the CPU. The last batch may be
    smaller. Broken images are left out, never replaced: a batch that lacks some has "bad" too, as in training.
    """
    share = range(len(dataset)) if share is None else share
    workers = loaders(workers, _is_easy(dataset, preprocessing.res), len(share), neighbours)
    if workers:
        expect_loaders()
    return ahead(_scored_batches(preprocessing, dataset, batch, share, workers, device), device)


def _scored_batches(
    preprocessing: Preprocessing, dataset: Dataset, batch: int, share: Sequence[int], workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Prepared by the processes that load them; on a GPU, where there are others, resized there to the same levels."""
    handover = _handover(preprocessing, workers, device)
    made = _decoded if isinstance(handover, Deferred) else _prepared
    sample = partial(_eval_sample, partial(made, preprocessing), dataset.unlabelled())
    places = (list(share[i : i + batch]) for i in range(0, len(share), batch))
    with closing(load(sample, handover, places, workers)) as loaded:
        for part in loaded:
            found = _labelled(part, dataset)
            yield found | {"images": put(found["images"], device)}


def _loaded_batches(
    data: DataConfig, dataset: Dataset, seed: int, order: Iterator[Positions], workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Decoded, cropped and augmented: on a GPU what can be of whole batches, else by the loader processes, too."""
    on_gpu, how = device.type == "cuda", data.augment
    handover: Handover = Ready(data.res, pinned=on_gpu)
    if how.crop == "inception_crop":
        stretched = Preprocessing(res=data.res, resize=None, interpolation=how.interpolation, antialias=how.antialias)
        handover = _handover(stretched, workers, device)
    sample = partial(_training_sample, data, dataset.unlabelled(), seed, isinstance(handover, Ready))
    finish = partial(_augmented, data, seed)
    positions, asked = tee(list(zip(turn.tolist(), index.tolist(), strict=True)) for turn, index in order)
    with closing(load(sample, handover, asked, workers, None if on_gpu else finish)) as loaded:
        for expected, part in zip(positions, loaded, strict=True):
            found = _labelled(part, dataset)
            if len(found["labels"]) < len(expected):
                raise _unreadable(found["bad"], data)
            if on_gpu:
                images, labels = put(found["images"], device), put(found["labels"], device)
                found |= {"images": finish(images, expected), "labels": labels}
            yield found


def _handover(p: Preprocessing, workers: int, device: torch.device) -> Handover:
    """A GPU resizes by itself what other processes decode, where it can."""
    if workers and resampling.is_known(p) and kernels.why_not(device) is None:
        return Deferred(p, device)
    return Ready(p.res, pinned=device.type == "cuda")


def _augmented(data: DataConfig, seed: int, images: Tensor, positions: list[tuple[int, int]]) -> Tensor:
    """Images (b, 3, h, w) of (turn, index) each."""
    turn, indices = np.array(positions, dtype=np.int64).T
    return augment(images, data, rng.Generators(seed, Stream.PIXELS, turn, indices))


def _unreadable(bad: dict[int, str], data: DataConfig) -> DataError:
    """The error that says why a batch has too few images."""
    first = next(iter(bad.values()))
    if data.bad_images:
        return DataError(f"{TRIES} images in a row cannot be read, the first {first}", "mend or remove them")
    return DataError(first, "mend or remove it, or have up to 1 % of the images replaced: --set data.bad_images=0.01")


def _order(
    data: DataConfig, dataset: Dataset, batch: int, seed: int, steps: range, places: Sequence[int]
) -> Iterator[Positions]:
    """Turns and indices of the images of each batch. An epoch goes without its last partial batch."""
    epoch = -1
    order = turn = np.empty(0, dtype=np.int64)
    for step in steps:
        now, place = divmod(step, len(dataset) // batch)
        if now != epoch:
            chance = rng.generator(seed, Stream.SHUFFLE, now)
            epoch, order = now, epoch_order(dataset, data.sampling, data.repeat_threshold, chance)
            turn = epoch + (turns(order, data.sampling) << 32)
        here = slice(place * batch, (place + 1) * batch)
        yield turn[here][places], order[here][places]


def _training_sample(data: DataConfig, dataset: Dataset, seed: int, ready: bool, position: tuple[int, int]) -> Sample:
    """The image of (turn, index), or of another index if that one is broken and may be replaced: cropped, or if not
    `ready` what is to be."""
    turn, index = position
    others = rng.generator(seed, Stream.REPLACE, turn, index)
    bad = []
    for _ in range(TRIES if data.bad_images else 1):
        chance = rng.generator(seed, Stream.CROP, *position)
        try:
            image = dataset.pixels(index, window(data, chance))
        except BadImage as error:
            bad.append((index, error.path, error.reason))
            index = int(others.integers(len(dataset)))
        else:
            return Decoded(crop(image, data, chance) if ready else image), index, bad
    return None, index, bad


def _eval_sample(made: Callable[[Dataset, int], Decoded], dataset: Dataset, index: int) -> Sample:
    try:
        return made(dataset, index), index, []
    except BadImage as error:
        return None, index, [(index, error.path, error.reason)]


def _decoded(preprocessing: Preprocessing, dataset: Dataset, index: int) -> Decoded:
    """Down to the last row that counts."""
    below = 0

    def upper(height: int, width: int) -> Box:
        nonlocal below
        rows = resampling.rows_needed((height, width), preprocessing)
        below = height - rows
        return 0, 0, width, rows

    return Decoded(dataset.pixels(index, upper), below)


def _prepared(preprocessing: Preprocessing, dataset: Dataset, index: int) -> Decoded:
    return Decoded(prepare(dataset.image(index), preprocessing))


def _labelled(part: Loaded, dataset: Dataset) -> Batch:
    """With the labels of its images, what was broken by index, and how many processes were killed."""
    found: Batch = {"images": part.images, "labels": torch.from_numpy(dataset.labels[part.indices])}
    if part.bad:
        found["bad"] = {index: str(BadImage(path, reason)) for index, path, reason in part.bad}
    if part.killed:
        found["killed"] = part.killed
    return found


def _is_easy(dataset: Dataset, res: tuple[int, int]) -> bool:
    return dataset.in_memory and max(res) <= SMALL
