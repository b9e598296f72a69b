"""Score a data set, name an image. A checkpoint and an .onnx answer alike."""

from __future__ import annotations

import glob
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vitcli import checkpoint, runtime
from vitcli.data import Preprocessing, imagenet
from vitcli.data.images import EXTENSIONS, BadImage, decode
from vitcli.data.loader import eval_batches
from vitcli.data.place import Batch, put
from vitcli.data.preprocess import normalise, pixels, prepare
from vitcli.data.sources import Dataset
from vitcli.errors import CheckpointError, DataError, NumericsError, UserError
from vitcli.model.vit import ViT
from vitcli.onnx_model import OnnxPredictor, Provider
from vitcli.processes import Processes
from vitcli.runtime import Runtime, RuntimeConfig


class Predictor(Protocol):
    """What can answer for images. `classes` are names in the order of the logits."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    origin: str

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images (b, 3, h, w) -> float32 logits (b, classes) on the CPU."""
        ...


class TorchPredictor:
    """A model on the device of `runtime`, where it already is. One in training is left in training mode."""

    def __init__(
        self, model: ViT, classes: tuple[str, ...], preprocessing: Preprocessing, runtime: Runtime, origin: str
    ):
        self.model, self.classes, self.preprocessing = model, classes, preprocessing
        self.runtime, self.origin = runtime, origin
        self._batch = 0  # images in a recorded call

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images (b, 3, h, w) -> float32 logits (b, classes) on the CPU.

        A model without pooling answers for each token; the answer for the image is their mean.
        """
        training = self.model.training
        self.model.eval()
        try:
            return self._compute(put(images, self.runtime.device)).cpu()
        finally:
            self.model.train(training)

    def _compute(self, images: Tensor) -> Tensor:
        """Where the runtime compiles, all batches are as large as the largest so far, so that few are compiled."""
        if not self.runtime.compile:
            return self._forward(images)
        if len(images) > self._batch:
            self._batch, self._recorded = len(images), self.runtime.recorded(self._forward)
        padding = images[:1].expand(self._batch - len(images), -1, -1, -1)
        return self._recorded(torch.cat([images, padding]))[: len(images)]

    def _forward(self, images: Tensor) -> Tensor:
        with torch.no_grad(), self.runtime.autocast():
            logits = self.model(normalise(images, self.preprocessing)).float()
        return logits.mean(1) if logits.ndim == 3 else logits


def open_predictor(
    path: Path,
    *,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    provider: Provider = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Predictor:
    """A run folder, a checkpoint or an .onnx, ready to answer.

    `device` and `precision` are for checkpoints, `provider` for .onnx files. Raises CheckpointError for a file that
    cannot be used, UserError for a device that is not there.
    """
    if path.suffix.lower() == ".onnx":
        if device != "auto":
            raise UserError(f"--device {device} does not apply to an .onnx file", "use --provider cuda or cpu")
        if precision != "fp32":
            raise UserError("--precision does not apply to an .onnx file", "export it with --fp16")
        return OnnxPredictor(path, provider)
    if provider != "auto":
        raise UserError(f"--provider {provider} applies to .onnx files only", "use --device")
    trained = checkpoint.load(path)
    if not trained.classes:
        raise CheckpointError(f"{trained.origin} names no classes", "train one: vit finetune --ckpt")
    return torch_predictor(trained, device, precision)


def torch_predictor(
    trained: checkpoint.Trained,
    device: Literal["auto", "cpu", "cuda", "mps"],
    precision: Literal["fp32", "bf16"] = "fp32",
) -> TorchPredictor:
    """A trained model, moved to the device, as a predictor: in fp32 the reference, in bf16 compiled on CUDA."""
    compiled = {} if precision == "bf16" else {"compile": False}
    started = runtime.start(RuntimeConfig.parse({"device": device, "precision": precision} | compiled))
    started.prepare(trained.model)
    return TorchPredictor(trained.model, trained.classes, trained.preprocessing, started, trained.origin)


@dataclass(frozen=True)
class Scores:
    """How well a data set is classified.

    `loss` is the mean cross-entropy; `top1` and `top5` are shares over all the model's classes; `top1_seen` is the
    share when only the `seen` classes that have images may answer, as is usual for ImageNet-A and -R, or None if
    they are all. `bad` names the images that could not be read; they are in no other number. `seconds` is all the
    time, `waiting` the part spent waiting for data.
    """

    images: int
    loss: float
    top1: float
    top5: float
    top1_seen: float | None
    seen: int
    classes: int
    bad: tuple[str, ...]
    seconds: float
    waiting: float

    @property
    def images_per_second(self) -> float:
        """Images scored in a second of all the time."""
        return self.images / self.seconds


def score(
    predictor: Predictor,
    dataset: Dataset,
    *,
    batch: int,
    workers: int | None = None,
    allow_bad: bool = False,
    on_batch: Callable[[int], None] | None = None,
    processes: Processes | None = None,
    batches: Iterator[Batch] | None = None,
) -> Scores:
    """Score every image once; classes meet by name. The counts do not depend on `batch`, nor on how many `processes`
    share the images.

    `batches` are those of `eval_batches` with this process's `share_of` the images, where the caller keeps them.
    `on_batch` is told how many images are done. Raises DataError for a class that the model does not know, and for
    an unreadable image unless `allow_bad`; NumericsError where the model does not answer with numbers.
    """
    columns = torch.tensor(imagenet.match(dataset.classes, predictor.classes))
    seen = columns[torch.from_numpy(dataset.labels).unique()].unique()
    processes = processes or Processes()
    share, double = share_of(len(dataset), processes)
    images = top1 = top5 = top1_seen = 0
    loss, waiting, bad = 0.0, 0.0, []
    begin = asked = time.monotonic()
    if batches is not None:
        loaded = batches
    elif takes_any_size(predictor):
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
    with closing(loaded) as parts:  # pyright: ignore[reportArgumentType] (a generator, which ends its processes)
        for part in parts:
            waiting += time.monotonic() - asked
            bad += part.get("bad", {}).values()
            if bad and not allow_bad and processes.count == 1:
                break  # one of several must not leave those with whom it holds a model
            if len(part["labels"]):
                labels = columns[part["labels"]]
                logits = predictor.logits(part["images"])
                if double and images + len(bad) + len(labels) == len(share):
                    logits, labels = logits[:-1], labels[:-1]
                place = rank(logits, labels)
                images += len(labels)
                loss += F.cross_entropy(logits.double(), labels, reduction="sum").item()
                top1 += int((place < 1).sum())
                top5 += int((place < 5).sum())
                top1_seen += int((rank(logits[:, seen], torch.searchsorted(seen, labels)) < 1).sum())
            if on_batch:
                on_batch(images + len(bad))
            asked = time.monotonic()
    bad = [image for part in processes.all(bad) for image in part]
    counts = zip(*processes.all((images, loss, top1, top5, top1_seen)), strict=True)
    images, loss, top1, top5, top1_seen = map(sum, counts)
    if bad and not allow_bad:
        raise DataError(bad[0], "mend or remove it, or leave such images out with --allow-bad")
    if not math.isfinite(loss):
        raise NumericsError(f"{predictor.origin} answers with NaN or infinity")
    if not images:
        raise DataError("no image to score", f"{len(bad)} could not be read" if bad else "")
    return Scores(
        images=images,
        loss=loss / images,
        top1=top1 / images,
        top5=top5 / images,
        top1_seen=top1_seen / images if len(seen) < len(predictor.classes) else None,
        seen=len(seen),
        classes=len(predictor.classes),
        bad=tuple(bad),
        seconds=time.monotonic() - begin,
        waiting=waiting,
    )


def takes_any_size(predictor: Predictor) -> bool:
    """Whether a predictor resizes images itself: an .onnx with its preprocessing in the graph."""
    return isinstance(predictor, OnnxPredictor) and predictor.whole


def _one_by_one(dataset: Dataset, share: Sequence[int]) -> Iterator[Batch]:
    """Each image as it is, in a batch as of `eval_batches`."""
    for index in share:
        try:
            image = pixels(dataset.image(index))
        except BadImage as error:
            yield {"labels": torch.empty(0, dtype=torch.int64), "bad": {index: str(error)}}
        else:
            yield {"images": image[None], "labels": torch.from_numpy(dataset.labels[index : index + 1])}


def share_of(images: int, processes: Processes) -> tuple[list[int], bool]:
    """The images that this process scores, and whether the last is one too many.

    All processes score equally many, since those that hold parts of one model must call it together.
    """
    share = list(range(processes.rank, images, processes.count))
    double = len(share) < -(-images // processes.count)
    return ([*share, images - 1] if double else share), double


def rank(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label's, of equals the lower index first: (b, classes), (b,) -> (b,)."""
    own = logits.gather(1, labels[:, None])
    lower = torch.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & lower)).sum(1)


def _finite(predictor: Predictor, images: Tensor) -> Tensor:
    logits = predictor.logits(images)
    if not logits.isfinite().all():
        raise NumericsError(f"{predictor.origin} answers with NaN or infinity")
    return logits


class Guess(NamedTuple):
    """A class: its id in the model, its name in words, its probability."""

    id: str
    name: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """What is in an image: the likeliest classes, best first, or why it could not be read."""

    path: str
    top: tuple[Guess, ...] = ()
    error: str | None = None


def find_images(args: Sequence[str]) -> list[str]:
    """The images that files, folders, patterns and `-` (a list on stdin, one path a line) stand for, in that order.

    A folder gives the images in and below it, sorted. A file that is missing is kept: its answer will be an error.
    """
    paths: list[str] = []
    for arg in args:
        if arg == "-":
            paths += [line for line in map(os.fsdecode, sys.stdin.buffer.read().splitlines()) if line]
        elif os.path.isdir(arg):
            paths += _images_below(arg)
        elif glob.has_magic(arg) and not os.path.lexists(arg):
            paths += sorted(glob.glob(arg, recursive=True)) or [arg]
        else:
            paths.append(arg)
    if not paths:
        raise DataError("no images given", "name image files, folders or patterns, or - for a list on stdin")
    return paths


def _images_below(folder: str) -> list[str]:
    """Hidden files and folders are passed over, as in data sets; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".")]
        found += [os.path.join(place, name) for name in visible if os.path.splitext(name)[1].lower() in EXTENSIONS]
    if not found:
        raise DataError(f"no images in {folder}", f"looked for {', '.join(sorted(EXTENSIONS))}")
    return sorted(found)


def predict(predictor: Predictor, paths: Sequence[str], *, top: int = 5, batch: int = 32) -> Iterator[Answer]:
    """An answer for each path, in their order. The next images are read while the model works."""

    def load(path: str) -> Tensor | BadImage:
        try:
            image = decode(path)
            return pixels(image) if takes_any_size(predictor) else prepare(image, predictor.preprocessing)
        except BadImage as error:
            return error

    chunks = [paths[first : first + batch] for first in range(0, max(1, len(paths)), batch)]
    with ThreadPoolExecutor() as pool:
        ahead = pool.map(load, chunks[0])
        for chunk, following in zip(chunks, [*chunks[1:], []], strict=True):
            loaded, ahead = list(ahead), pool.map(load, following)
            images = [image for image in loaded if isinstance(image, Tensor)]
            guesses = iter(_guesses(predictor, images, top))
            for path, image in zip(chunk, loaded, strict=True):
                if isinstance(image, BadImage):
                    yield Answer(path, error=image.reason)
                else:
                    yield Answer(path, next(guesses))


def _guesses(predictor: Predictor, images: list[Tensor], top: int) -> list[tuple[Guess, ...]]:
    alike = [torch.stack(list(part)) for _, part in groupby(images, key=lambda image: image.shape)]
    if not alike:
        return []
    shares = torch.cat([_finite(predictor, part) for part in alike]).double().softmax(dim=1)
    values, indices = shares.sort(dim=1, descending=True, stable=True)
    ids = predictor.classes
    return [
        tuple(Guess(ids[i], imagenet.name(ids[i]), p) for i, p in zip(row[:top], shares[:top], strict=True))
        for row, shares in zip(indices.tolist(), values.tolist(), strict=True)
    ]
