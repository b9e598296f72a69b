"""Name what is in an image. A checkpoint and an .onnx answer alike."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vitcli import checkpoint, runtime
from vitcli.data import Preprocessing, imagenet
from vitcli.data.images import EXTENSIONS, BadImage, decode
from vitcli.data.prefetch import fetched, put
from vitcli.data.preprocess import normalise, pixels, prepare
from vitcli.errors import CheckpointError, DataError, NumericsError, UserError
from vitcli.model.vit import ViT
from vitcli.onnx.providers import Provider
from vitcli.runtime import Device, Precision, Runtime, RuntimeConfig

DIRECTLY = 2**20  # bytes that go to a GPU in less time than it takes to pin them


class Predictor(Protocol):
    """What can answer for images. `classes` are names in the order of the logits.

    `whole` says that it takes images as they were decoded, and resizes and crops them itself, as an .onnx may. Where an
    image may be of several classes, `thresholds` are the probabilities from which on each applies, a probability being
    the sigmoid of a logit; else None.
    """

    classes: tuple[str, ...]
    thresholds: tuple[float, ...] | None
    preprocessing: Preprocessing
    origin: str
    whole: bool

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images (b, 3, h, w) -> float32 logits (b, classes) on the CPU."""
        ...


class TorchPredictor:
    """A model on the device of `runtime`, where it already is. One in training is left in training mode."""

    whole = False

    def __init__(
        self,
        model: ViT,
        classes: tuple[str, ...],
        preprocessing: Preprocessing,
        runtime: Runtime,
        origin: str,
        thresholds: tuple[float, ...] | None = None,
    ):
        self.model, self.classes, self.preprocessing = model, classes, preprocessing
        self.runtime, self.origin, self.thresholds = runtime, origin, thresholds
        self._batch = 0  # images in a recorded call

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images (b, 3, h, w) -> float32 logits (b, classes) on the CPU.

        A model without pooling answers for each token; the answer for the image is their mean.
        """
        return self._answers(images).cpu()

    def ask(self, images: Tensor) -> Callable[[], Tensor]:
        """Have the device begin with `logits`: what waits for them."""
        return fetched(self._answers(images))

    def _answers(self, images: Tensor) -> Tensor:
        training = self.model.training
        if training:  # asked first, since to tell all modules takes longer than a GPU needs for an image
            self.model.eval()
        try:
            return self._compute(images)
        finally:
            if training:
                self.model.train()

    def _compute(self, images: Tensor) -> Tensor:
        """Where the runtime compiles, all batches are as large as the largest so far, so that few are compiled."""
        if not self.runtime.compile:
            return self._forward(images)
        count = len(images)
        if count > self._batch:
            self._batch, self._recorded = count, self.runtime.recorded(self._forward)
        if count < self._batch:
            images = torch.cat([images, images[:1].expand(self._batch - count, -1, -1, -1)])
        if images.nbytes > DIRECTLY:
            images = put(images, self.runtime.device)
        return self._recorded(images)[:count]

    def _forward(self, images: Tensor) -> Tensor:
        with torch.no_grad(), self.runtime.autocast():
            logits = self.model(normalise(put(images, self.runtime.device), self.preprocessing)).float()
        return logits.mean(1) if logits.ndim == 3 else logits


def open_predictor(
    path: Path,
    *,
    device: Device = "auto",
    provider: Provider = "auto",
    precision: Precision = "fp32",
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
        from vitcli.onnx.model import OnnxPredictor

        return OnnxPredictor(path, provider)
    if provider != "auto":
        raise UserError(f"--provider {provider} applies to .onnx files only", "use --device")
    trained = checkpoint.load(path)
    if not trained.classes:
        raise CheckpointError(f"{trained.origin} names no classes", "train one: vit finetune --ckpt")
    return torch_predictor(trained, device, precision)


def torch_predictor(
    trained: checkpoint.Trained,
    device: Device,
    precision: Precision = "fp32",
) -> TorchPredictor:
    """A trained model, moved to the device, as a predictor: in fp32 the reference, in bf16 compiled on CUDA."""
    compiled = {} if precision == "bf16" else {"compile": False}
    started = runtime.start(RuntimeConfig.parse({"device": device, "precision": precision} | compiled))
    started.frozen(started.prepare(trained.model))
    return TorchPredictor(
        trained.model, trained.classes, trained.preprocessing, started, trained.origin, trained.thresholds
    )


def _finite(predictor: Predictor, images: Tensor) -> Tensor:
    logits = predictor.logits(images)
    if not logits.isfinite().all():
        raise NumericsError(f"{predictor.origin} answers with NaN or infinity")
    return logits


class Guess(NamedTuple):
    """A class: its id in the model, its name in words, its probability.

    `applies` says whether the probability reaches the class's threshold, where an image may be of several; else None.
    """

    id: str
    name: str
    probability: float
    applies: bool | None = None


@dataclass(frozen=True)
class Answer:
    """What is in an image: the likeliest classes and all that apply, best first, or why it could not be read."""

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
            return pixels(image) if predictor.whole else prepare(image, predictor.preprocessing)
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
    # By numpy: torch's threads would be in ONNX Runtime's way (onnx/session.py).
    arrays = (image.numpy() for image in images)
    alike = [torch.from_numpy(np.stack(list(part))) for _, part in groupby(arrays, key=lambda image: image.shape)]
    if not alike:
        return []
    logits, several = torch.cat([_finite(predictor, part) for part in alike]).double(), predictor.thresholds is not None
    shares = logits.sigmoid() if several else logits.softmax(dim=1)
    values, indices = shares.sort(dim=1, descending=True, stable=True)
    end, found = None if several else top, []
    for row, probabilities in zip(indices.tolist(), values.tolist(), strict=True):
        guesses = [_guess(predictor, i, p) for i, p in zip(row[:end], probabilities[:end], strict=True)]
        found.append(tuple(guess for place, guess in enumerate(guesses) if place < top or guess.applies))
    return found


def _guess(predictor: Predictor, index: int, probability: float) -> Guess:
    name, thresholds = predictor.classes[index], predictor.thresholds
    applies = None if thresholds is None else probability >= thresholds[index]
    return Guess(name, imagenet.name(name), probability, applies)
