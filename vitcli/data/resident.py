"""Small sets, which stay where they are needed: no file is read twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from vitcli import rng
from vitcli.data import DataConfig
from vitcli.data.augment import augment, before_crop, random_crops
from vitcli.data.handover import Decoded, Ready
from vitcli.data.images import BadImage
from vitcli.data.prefetch import Batch, put
from vitcli.data.sampling import Positions
from vitcli.data.sources import Dataset
from vitcli.data.workers import Sample, load
from vitcli.rng import Stream

CHUNK = 1024  # images that are taken to the device at a time
AT_ONCE = 2**24  # bytes of images that are augmented together
KEPT_BYTES = 2**31  # of a set that is kept on a CUDA device unless the recipe says otherwise
OTHER_SIZE = "its size is not that of the first image,"


class Kept:
    """The batches of `make`, the same each time: made once if they are `small`, and then kept."""

    def __init__(self, make: Callable[[], Generator[Batch, None, None]], small: bool):
        self._make, self._small = make, small
        self._batches: list[Batch] | None = None

    def __call__(self) -> Iterator[Batch]:
        """All batches, from the first."""
        if self._batches is not None:
            yield from self._batches
            return
        batches: list[Batch] = []
        with closing(self._make()) as made:
            for batch in made:
                if self._small:
                    batches.append(batch)
                yield batch
        if self._small:
            self._batches = batches


def is_small(images: int, res: Sequence[int]) -> bool:
    """Whether so many images are kept on a CUDA device unasked."""
    return images * 3 * math.prod(res) <= KEPT_BYTES


def kept_images(data: DataConfig, dataset: Dataset, device: torch.device, count: int, workers: int) -> Tensor | None:
    """All images (n, 3, h, w), as they are before chance comes in, on the device; None if they are not kept there.

    Raises DataError where the recipe wants them kept and they differ in size; broken ones are left to be met in turn.
    """
    if data.augment.crop == "inception_crop" or not (device.type == "cuda" if data.keep is None else data.keep):
        return None
    first, *_ = _whole_sample(data, dataset, None, 0)
    if first is None:
        return None
    shape = first.pixels.shape
    _, height, width = shape
    if data.keep is None and (count <= len(dataset) or not is_small(len(dataset), (height, width))):
        return None
    images = torch.empty((len(dataset), 3, height, width), dtype=torch.uint8, device=device)
    chunks = [list(range(i, min(i + CHUNK, len(dataset)))) for i in range(0, len(dataset), CHUNK)]
    with closing(load(partial(_whole_sample, data, dataset, shape), Ready((height, width)), chunks, workers)) as loaded:
        for chunk, part in zip(chunks, loaded, strict=True):
            if part.bad:
                _, path, reason = part.bad[0]
                if data.keep and reason.startswith(OTHER_SIZE):
                    hint = "give all one size with data.augment.resize=[HEIGHT, WIDTH], or leave out data.keep"
                    raise BadImage(path, reason, hint)
                return None
            images[chunk[0] : chunk[-1] + 1] = put(part.images, device)
    return images


def kept_batches(
    data: DataConfig, dataset: Dataset, seed: int, order: Iterator[Positions], batch: int, images: Tensor
) -> Generator[Batch, None, None]:
    """The same from images (n, 3, h, w) that are on the device already, `at_once` batches together."""
    labels = put(torch.from_numpy(dataset.labels), images.device)
    for turn, indices in _together(order, at_once(data, batch)):
        here = put(torch.from_numpy(indices), images.device)
        chosen = images[here]
        if data.augment.crop == "random_crop":
            chance = rng.Generators(seed, Stream.CROP, turn, indices).random(2)
            chosen = random_crops(chosen, data.res, data.augment.pad, chance)
        chance = rng.Generators(seed, Stream.PIXELS, turn, indices)
        for some, own in zip(augment(chosen, data, chance).split(batch), labels[here].split(batch), strict=True):
            yield {"images": some, "labels": own}


def at_once(data: DataConfig, batch: int) -> int:
    """Batches that are made together: small ones cost a GPU less than it costs to ask for them."""
    return max(1, AT_ONCE // (batch * 3 * math.prod(data.res)))


def _together(order: Iterator[Positions], count: int) -> Iterator[Positions]:
    """`count` batches that follow one another, as one."""
    while several := list(islice(order, count)):
        turn, indices = zip(*several, strict=True)
        yield np.concatenate(turn), np.concatenate(indices)


def _whole_sample(data: DataConfig, dataset: Dataset, shape: torch.Size | None, index: int) -> Sample:
    """An image before chance comes in. One of another `shape` is as useless as a broken one."""
    try:
        image = before_crop(dataset.pixels(index), data)
    except BadImage as error:
        return None, index, [(index, error.path, error.reason)]
    if shape is not None and image.shape != shape:
        sizes = f"{shape[2]}x{shape[1]}: {image.shape[2]}x{image.shape[1]}"
        return None, index, [(index, dataset.path(index), f"{OTHER_SIZE} {sizes}")]
    return Decoded(image), index, []
