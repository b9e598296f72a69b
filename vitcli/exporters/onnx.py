"""ONNX: one file that other programs run, with class names and preprocessing inside.

Input `pixel_values` (batch, 3, h, w), float32, is normalised as the metadata's `preprocessing` says; output is `logits`
(batch, classes), float32. The batch is free, all else is fixed. With `--preprocess` the input is `images`
(batch, height, width, 3), uint8; with `--softmax` the output is `probabilities`.

Metadata: vitcli opset model classes preprocessing precision preprocess, and where they apply softmax ("true"),
thresholds, max_batch, recipe, source_sha256. Where an image may be of several classes, each applies where the sigmoid
of its logit reaches its one of the `thresholds`. ONNX has no place for the bound of a free dimension, so `max_batch` is
there for who plans memory or builds an engine.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vitcli import __version__
from vitcli.errors import CheckpointError, DataError, RecipeError
from vitcli.exporters import (
    HeldOut,
    Parity,
    Precision,
    Report,
    alike,
    batches,
    check,
    compare,
    enough,
    place_for,
    rate,
    sample,
)
from vitcli.onnx import Preprocess

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from onnxscript import ir
    from PIL.Image import Image
    from torch import Tensor

    from vitcli.checkpoint import Trained
    from vitcli.inference import Predictor

OUTPUT = "model.onnx"
OPSETS = range(18, 26)  # torch 2.15 writes invalid files at 17 and 26, and says nothing
LEAST = -80.0  # logs of probabilities below this count as equal; float32 ends at -87


@dataclass(frozen=True)
class GraphOptions:
    """What may be chosen about a graph; from `calib` on, of int8 alone."""

    opset: int = 20
    precision: Precision = "fp32"  # inside; --fp16 or --int8
    preprocess: Preprocess = "none"
    softmax: bool = False  # probabilities instead of logits
    max_batch: int | None = None  # the largest batch, for the metadata
    calib: Sequence[Image] | None = None  # every other image calibrates, and the rest are scored
    labels: Sequence[int] | None = None  # the classes of all of `calib`; None scores against fp32
    skip: Sequence[str] = ()  # layers to leave in fp32
    percentile: float = 99.999  # of activations that fit
    max_drop: float | None = None  # the most top-1 that may be lost, in points


OPTIONS, PLAIN = GraphOptions, GraphOptions()


def export(
    trained: Trained,
    out: Path,
    *,
    images: Sequence[Image] | None = None,
    options: GraphOptions = PLAIN,
    source: Path | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Report:
    """Write `out`, and above 1.8 GB of weights `out`.data beside it, and hold it against the checkpoint on `images`.

    `source` is the file that the model was loaded from, for the metadata. `on_stage` is told what begins: trace,
    optimise, quantise, check, parity.

    Raises RecipeError for options that cannot be, CheckpointError for a model without classes, DataError if the file
    does not answer as the checkpoint or loses more than `max_drop`, StorageError.
    """
    from vitcli.exporters import _graph
    from vitcli.exporters._snippet import snippet
    from vitcli.inference import torch_predictor

    _refuse(trained, options)
    precision, max_batch = options.precision, options.max_batch
    begin, stage = time.monotonic(), on_stage or (lambda name: None)
    reference = torch_predictor(trained, "cpu")
    prepared = sample(trained.preprocessing, images)
    halves = _halves(trained, options.calib) if options.calib else None
    metadata = _metadata(trained, options, source)

    with place_for(out) as file:
        stage("trace")
        graph = _trace(trained, options)
        stage("optimise")
        _graph.tidy(graph)
        _graph.save(graph, file, beside=_graph.size(graph) > _graph.ONE_FILE)
        if halves:
            from vitcli.exporters import _int8

            stage("quantise")
            calibration = _normalised(trained, halves[0])
            _int8.quantise(file, calibration, skip=options.skip, percentile=options.percentile)
        stage("check")
        model = _graph.finish(file, metadata)
        _check_opset(model, options.opset)
        stage("parity")
        exported = _open(file)
        both = _comparable(options.softmax, reference, exported)
        parity = check(*both, prepared, precision, max_batch=max_batch)
        labels = options.labels[1::2] if options.labels else None
        held_out = _score(reference, exported, halves[1], labels) if halves else None
        _check_drop(held_out, options.max_drop)
        if options.preprocess != "none":
            model = _prepend(trained, file, model, options.preprocess, metadata)
            both = _comparable(options.softmax, reference, _open(file))
            if options.preprocess == "full":
                bound = "full" if precision == "fp32" else precision
                parity = _check_whole(trained, *both, images, bound, max_batch)
            else:
                parity = check(*both, prepared, precision, max_batch=max_batch)
        size = sum(part.stat().st_size for part in file.parent.iterdir())
    details: dict[str, str | int] = {"opset": options.opset, "nodes": len(model.graph.node)}
    return Report(
        target="onnx",
        file=str(out),
        megabytes=round(size / 1e6, 1),
        details=details | ({"max_batch": max_batch} if max_batch else {}),
        parity=parity,
        seconds=round(time.monotonic() - begin, 1),
        precision=precision,
        held_out=held_out,
        snippet=snippet(
            str(out),
            trained.preprocessing,
            options.preprocess,
            tokens=trained.config.pool == "none",
            multi_label=trained.thresholds is not None,
        ),
    )


def _refuse(trained: Trained, options: GraphOptions) -> None:
    max_batch, calib = options.max_batch, options.calib
    if options.opset not in OPSETS:
        raise RecipeError(f"--opset {options.opset} is not possible", f"choose from {OPSETS[0]} to {OPSETS[-1]}")
    if max_batch is not None and max_batch < 1:
        raise RecipeError(f"--max-batch {max_batch} is not possible", "at least 1")
    if (options.precision == "int8") != (calib is not None):
        raise RecipeError("--int8 and --calib go together", "vit export --onnx --int8 --calib FOLDER")
    if calib is not None and len(calib) < 2:
        raise DataError(
            f"{len(calib)} images are not enough to calibrate on: half of them are held out",
            "give some hundreds, like those that the model will see",
        )
    if options.softmax and trained.thresholds is not None:
        raise RecipeError(
            "--softmax is for classes that exclude one another, and an image may be of several of this model's",
            "leave it out, and apply a sigmoid to the logits",
        )
    if not trained.classes:
        raise CheckpointError(f"{trained.origin} names no classes", "train one: vit finetune --ckpt")


def _halves(trained: Trained, calibration: Sequence[Image]) -> tuple[Tensor, Tensor]:
    """Prepared images to calibrate on, and those held out: every other one. Raises DataError for an unreadable one."""
    import torch

    from vitcli.data.preprocess import prepare

    images = torch.stack([prepare(image, trained.preprocessing) for image in calibration])
    return images[::2], images[1::2]


def _normalised(trained: Trained, images: Tensor) -> list[np.ndarray]:
    from vitcli.data.preprocess import normalise

    return [normalise(part, trained.preprocessing).numpy() for part in images.split(8)]


def _trace(trained: Trained, options: GraphOptions) -> ir.Model:
    import torch

    from vitcli.exporters import _graph
    from vitcli.exporters._rebuild import rebuilt

    dtype = torch.float16 if options.precision == "fp16" else torch.float32
    return _graph.trace(rebuilt(trained, trained.image_size, dtype), options.opset, options.softmax)


def _prepend(
    trained: Trained, file: Path, model: onnx.ModelProto, mode: Literal["normalise", "full"], metadata: dict[str, str]
) -> onnx.ModelProto:
    import onnx

    from vitcli.exporters import _graph, _image_graph

    onnx.save(_image_graph.prepend(model, trained.preprocessing, mode), file)
    return _graph.finish(file, metadata | {"preprocess": mode})


def _metadata(trained: Trained, options: GraphOptions, source: Path | None) -> dict[str, str]:
    metadata = {
        "vitcli": __version__,
        "opset": str(options.opset),
        "model": trained.config.model_dump_json(),
        "classes": json.dumps(trained.classes),
        "preprocessing": trained.preprocessing.model_dump_json(),
    }
    if trained.thresholds is not None:
        metadata["thresholds"] = json.dumps(trained.thresholds)
    if trained.recipe is not None:
        metadata["recipe"] = json.dumps(trained.recipe.model_dump(mode="json", exclude={"data": {"source"}}))
    if source and source.is_file():
        with source.open("rb") as file:
            metadata["source_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    metadata |= {"precision": options.precision, "preprocess": "none"}
    metadata |= {"softmax": "true"} if options.softmax else {}
    return metadata | ({"max_batch": str(options.max_batch)} if options.max_batch else {})


def _check_opset(model: onnx.ModelProto, opset: int) -> None:
    found = {entry.domain: entry.version for entry in model.opset_import}
    if found != {"": opset}:
        raise DataError(f"torch wrote opset {found}, not {opset}", "choose another --opset")


def _open(file: Path) -> Predictor:
    from vitcli.onnx.model import OnnxPredictor

    return OnnxPredictor(file, "cpu")


class LogProbabilities:
    """A predictor whose answers are made comparable with those of a file that gives probabilities."""

    def __init__(self, predictor: Predictor):
        self.predictor, self.origin = predictor, predictor.origin
        self.classes, self.preprocessing = predictor.classes, predictor.preprocessing
        self.thresholds, self.whole = predictor.thresholds, predictor.whole

    def logits(self, images: Tensor) -> Tensor:
        return self.predictor.logits(images).log_softmax(1).clamp(min=LEAST)


def _comparable(softmax: bool, reference: Predictor, exported: Predictor) -> tuple[Predictor, Predictor]:
    return (LogProbabilities(reference), LogProbabilities(exported)) if softmax else (reference, exported)


def _score(reference: Predictor, exported: Predictor, images: Tensor, labels: Sequence[int] | None) -> HeldOut:
    """Top-1 of both on the held-out images, or how often the second agrees with the first."""
    import torch

    first, second = (
        torch.cat([predictor.logits(part).argmax(1) for part in images.split(7)]) for predictor in (reference, exported)
    )
    truth = first if labels is None else torch.tensor(labels)
    fp32, other = float((first == truth).double().mean()), float((second == truth).double().mean())
    drop = round(100 * (fp32 - other), 4)
    return HeldOut(len(images), "agreement" if labels is None else "labels", fp32, other, drop)


def _check_drop(held_out: HeldOut | None, max_drop: float | None) -> None:
    if held_out and max_drop is not None and held_out.drop > max_drop:
        raise DataError(
            f"int8 loses {held_out.drop:.2f} points of top-1 on {held_out.images} held-out images, "
            f"more than --max-drop {max_drop:g}",
            "nothing was written; leave layers in fp32 with --skip, or calibrate on more images",
        )


def _check_whole(
    trained: Trained,
    reference: Predictor,
    exported: Predictor,
    images: Sequence[Image] | None,
    bound: str,
    max_batch: int | None,
) -> Parity:
    """Hold a file that prepares images itself against our own preparing; the images of a batch get one size."""
    import torch

    from vitcli.data.preprocess import pixels, prepare

    expected, found, seconds = [], [], []
    for batch in map(alike, batches(enough(images), max_batch)):
        expected.append(reference.logits(torch.stack([prepare(image, trained.preprocessing) for image in batch])))
        begin = time.perf_counter()
        found.append(exported.logits(torch.stack([pixels(image) for image in batch])))
        seconds.append((len(batch), time.perf_counter() - begin))
    return compare(torch.cat(expected), torch.cat(found), bound, images_per_second=rate(seconds))
