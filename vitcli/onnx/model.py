"""An exported .onnx as a predictor: read with distrust, run by ONNX Runtime."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from google.protobuf.message import DecodeError, Message
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from vitcli.checkpoint import checked_thresholds
from vitcli.data import Preprocessing
from vitcli.data.preprocess import normalise
from vitcli.errors import CheckpointError
from vitcli.onnx import Preprocess
from vitcli.onnx.providers import Provider
from vitcli.onnx.session import Runner, Session


class OnnxPredictor:
    """A classifier from an .onnx that `vit export` wrote: class names and preprocessing come from the file.

    `whole` says that the graph itself resizes and crops: `logits` takes images as they were decoded. `provider` is
    ONNX Runtime's, see Session; `runner` runs the graph in its stead. Raises CheckpointError for a file that is
    damaged, foreign, or reaches outside its folder.
    """

    def __init__(self, path: Path, provider: Provider = "auto", runner: Runner | None = None):
        model = read(path)
        facts = _metadata(model, path)
        self.classes, self.preprocessing, self.thresholds = facts.classes, facts.preprocessing, facts.thresholds
        self.whole, self._facts = facts.preprocess == "full", facts
        self.origin = f"{path}, ONNX opset {next(o.version for o in model.opset_import if not o.domain)}"
        self._runner = runner or Session(path, model, provider)
        self._check_shapes(path)

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images (b, 3, h, w) -> float32 logits (b, classes) on the CPU; of a file that ends in a softmax, the
        logs of the probabilities, which a softmax leaves as they are."""
        answer = self._runner.run(images, self._given)
        logits = answer.clamp(min=torch.finfo(answer.dtype).tiny).log() if self._facts.softmax else answer
        return logits.mean(1) if logits.ndim == 3 else logits

    def _given(self, images: Tensor) -> Tensor:
        """The graph's input."""
        return normalise(images, self.preprocessing) if self._facts.preprocess == "none" else images.permute(0, 2, 3, 1)

    def _check_shapes(self, path: Path) -> None:
        inputs, outputs = self._runner.inputs, self._runner.outputs
        given, shape = {
            "none": ("pixel_values", [3, *self.preprocessing.res]),
            "normalise": ("images", [*self.preprocessing.res, 3]),
            "full": ("images", ["height", "width", 3]),
        }[self._facts.preprocess]
        expected = {given: shape, "probabilities" if self._facts.softmax else "logits": [len(self.classes)]}
        found = {name: shape[1:] for name, shape in inputs.items()}
        found |= {name: shape[-1:] for name, shape in outputs.items()}
        if found != expected or isinstance(inputs[given][0], int):
            ends = ", ".join(f"{name} {shape}" for name, shape in (inputs | outputs).items())
            raise CheckpointError(f"{path} does not fit its own metadata: it has {ends}", f"expected {expected}")


def messages(message: Message) -> Iterator[Any]:
    """A protobuf message and every message within it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type:
            for part in [value] if isinstance(value, Message) else value:
                yield from messages(part)


def read(path: Path) -> onnx.ModelProto:
    """The model without its external data, which may only lie in plain files beside it. Raises CheckpointError."""
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except DecodeError:
        raise CheckpointError(f"{path} is not an ONNX file, or is damaged or cut off") from None
    if not model.opset_import or not model.graph.node:
        raise CheckpointError(f"{path} is not an ONNX model: it holds no graph")
    for part in messages(model):
        if isinstance(part, onnx.TensorProto) and (part.data_location or part.external_data):
            _check_external(path, {entry.key: entry.value for entry in part.external_data})
    return model


def _check_external(path: Path, entry: dict[str, str]) -> None:
    name = entry.get("location", "")
    file = path.parent / name
    if name in ("", ".", "..") or name != Path(name).name or "\\" in name:
        reason = "is not a plain file name"
    elif file.is_symlink():
        reason = "is a symbolic link"
    elif not file.exists():
        reason = "is missing: keep it beside the .onnx"
    elif not stat.S_ISREG((status := file.stat()).st_mode):
        reason = "is not a regular file"
    elif status.st_nlink > 1:
        reason = "is a hard link, which may lead out of the folder"
    elif not _fits(entry.get("offset", "0"), entry.get("length", "0"), status.st_size):
        reason = "is shorter than the model says"
    else:
        return
    raise CheckpointError(f"{path} keeps weights in {name!r}, which {reason}")


def _fits(offset: str, length: str, size: int) -> bool:
    return offset.isdecimal() and length.isdecimal() and int(offset) + int(length) <= size


class _Facts(NamedTuple):
    """What the metadata says. Files from before there was a choice do not say `preprocess`."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    preprocess: Preprocess
    softmax: bool
    thresholds: tuple[float, ...] | None


def _metadata(model: onnx.ModelProto, path: Path) -> _Facts:
    entries = {entry.key: entry.value for entry in model.metadata_props}
    if missing := [key for key in ("classes", "preprocessing") if key not in entries]:
        raise CheckpointError(
            f"{path} has no {' and no '.join(missing)} in its metadata",
            "use a file that vit export wrote; an .onnx of another program does not say how to prepare an image",
        )
    try:
        classes = tuple(TypeAdapter(list[str]).validate_json(entries["classes"], strict=True))
        return _Facts(
            classes,
            Preprocessing.parse(json.loads(entries["preprocessing"])),
            TypeAdapter(Preprocess).validate_python(entries.get("preprocess", "none")),
            TypeAdapter(bool).validate_json(entries.get("softmax", "false"), strict=True),
            checked_thresholds(json.loads(entries.get("thresholds", "null")), len(classes)),
        )
    except (ValidationError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has unusable metadata: {str(error).splitlines()[0]}") from None
