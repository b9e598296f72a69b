"""Score a model on labelled images."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from vitcli.data import imagenet
from vitcli.data.images import BadImage
from vitcli.data.loader import eval_batches
from vitcli.data.prefetch import Batch
from vitcli.data.preprocess import pixels
from vitcli.data.sources import Dataset
from vitcli.errors import DataError, NumericsError
from vitcli.inference import Predictor, TorchPredictor
from vitcli.processes import ALONE, Processes
from vitcli.scores import MultiLabelScores, MultiLabelTally, OneLabelScores, OneLabelTally, Tally


def score(
    predictor: Predictor,
    dataset: Dataset,
    *,
    batch: int,
    workers: int | None = None,
    allow_bad: bool = False,
    on_batch: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
    batches: Iterator[Batch] | None = None,
) -> OneLabelScores | MultiLabelScores:
    """Score every image once; classes meet by name. It does not matter how large a `batch` is, nor how many
    `processes` share the images.

    `batches` are those of `eval_batches` with this process's `share_of` the images, where the caller keeps them.
    `on_batch` is told how many more images are there. Raises DataError for a class that the model does not know, and
    for an unreadable image unless `allow_bad`; NumericsError where the model does not answer with numbers.
    """
    columns = torch.tensor(imagenet.match(dataset.classes, predictor.classes))
    seen = columns[torch.from_numpy(np.flatnonzero(dataset.counts))].unique()
    tally = _tally(predictor, dataset, columns, seen)
    share, double = share_of(len(dataset), processes)
    waiting, bad, done = 0.0, {}, 0
    begin = asked = time.monotonic()
    if batches is not None:
        loaded = batches
    elif predictor.whole:
        loaded = _one_by_one(dataset, share)
    else:
        device = predictor.runtime.device if isinstance(predictor, TorchPredictor) else torch.device("cpu")
        loaded = eval_batches(
            predictor.preprocessing,
            dataset,
            batch=batch,
            workers=workers,
            share=share,
            neighbours=processes.neighbours,
            device=device,
        )
    due: deque[tuple[Callable[[], Tensor], Tensor]] = deque()  # of batches that a device may be at

    def add() -> None:
        logits, labels = due.popleft()
        tally.add(logits()[: len(labels)], labels)

    with closing(loaded) as parts:  # pyright: ignore[reportArgumentType] (a generator, which ends its processes)
        for part in parts:
            waiting += time.monotonic() - asked
            unreadable = part.get("bad", {})
            bad |= unreadable
            if bad and not allow_bad:
                break
            images, labels = part["images"], part["labels"]
            if not len(labels) and processes.count > 1:
                images = images.new_zeros((1, *images.shape[1:]))  # others wait for this one at the model's parts
            if len(images):
                done += len(labels)
                again = double and done + len(bad) == len(share) and share[-1] not in bad
                due.append((_asked(predictor, images), labels[: len(labels) - again]))
            if len(due) > 1:
                add()
            if on_batch:
                on_batch(len(labels) + len(unreadable))
            asked = time.monotonic()
    if due:
        add()
    bad = {index: told for part in processes.all(bad) for index, told in part.items()}
    tally, *others = processes.all(tally)
    for other in others:
        tally += other
    if bad and not allow_bad:
        raise DataError(next(iter(bad.values())), "mend or remove it, or leave such images out with --allow-bad")
    if not math.isfinite(tally.loss):
        raise NumericsError(f"{predictor.origin} answers with NaN or infinity")
    if not tally.images:
        raise DataError("no image to score", f"{len(bad)} could not be read" if bad else "")
    facts = {"seen": len(seen), "classes": len(predictor.classes), "bad": tuple(bad.values())}
    return tally.scores(facts | {"seconds": time.monotonic() - begin, "waiting": waiting})


def _tally(predictor: Predictor, dataset: Dataset, columns: Tensor, seen: Tensor) -> Tally:
    if dataset.multi_label:
        return MultiLabelTally(columns, predictor.thresholds)
    return OneLabelTally(columns, seen)


def _asked(predictor: Predictor, images: Tensor) -> Callable[[], Tensor]:
    """The logits: what waits for them, where a device is at work by itself."""
    if isinstance(predictor, TorchPredictor):
        return predictor.ask(images)
    logits = predictor.logits(images)
    return lambda: logits


def _one_by_one(dataset: Dataset, share: Sequence[int]) -> Iterator[Batch]:
    """Each image as it is, in a batch as of `eval_batches`."""
    for index in share:
        labels = torch.from_numpy(dataset.labels[index : index + 1])
        try:
            image = pixels(dataset.image(index))
        except BadImage as error:
            yield {"images": torch.empty(0, 3, 0, 0), "labels": labels[:0], "bad": {index: str(error)}}
        else:
            yield {"images": image[None], "labels": labels}


def share_of(images: int, processes: Processes) -> tuple[list[int], bool]:
    """The images that this process scores, and whether the last is one too many.

    All processes score equally many, since those that hold parts of one model must call it together.
    """
    share = list(range(processes.rank, images, processes.count))
    double = len(share) < -(-images // processes.count)
    return ([*share, images - 1] if double else share), double
