"""An exported .onnx as a predictor: read with distrust, run by ONNX Runtime."""

from __future__ import annotations

import json
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from google.protobuf.message import DecodeError, Message
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from vitcli import onnx_providers
from vitcli.data import Preprocessing
from vitcli.data.preprocess import normalise
from vitcli.errors import CheckpointError, UserError

Provider = Literal["auto", "cuda", "cpu"]


class OnnxPredictor:
    """A classifier from an .onnx that `vit export` wrote: class names and preprocessing come from the file.

    `provider` cuda computes on the GPU or raises UserError; auto takes a GPU that is there. Raises CheckpointError
    for a file that is damaged, foreign, or reaches outside its folder.
    """

    def __init__(self, path: Path, provider: Provider = "auto"):
        model = read(path)
        self.classes, self.preprocessing = _metadata(model, path)
        self.origin = f"{path}, ONNX opset {next(o.version for o in model.opset_import if not o.domain)}"
        self._session = _session(path, provider)
        self._check_shapes(path)

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images (b, 3, h, w) -> float32 logits (b, classes) on the CPU."""
        pixels = normalise(images, self.preprocessing).numpy()
        logits = torch.from_numpy(self._session.run(["logits"], {"pixel_values": pixels})[0])
        return logits.mean(1) if logits.ndim == 3 else logits

    def _check_shapes(self, path: Path) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        expected = {"pixel_values": [3, *self.preprocessing.res], "logits": [len(self.classes)]}
        found = {end.name: end.shape[1:] for end in inputs} | {end.name: end.shape[-1:] for end in outputs}
        if found != expected or isinstance(inputs[0].shape[0], int):
            ends = ", ".join(f"{end.name} {end.shape}" for end in [*inputs, *outputs])
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


def _metadata(model: onnx.ModelProto, path: Path) -> tuple[tuple[str, ...], Preprocessing]:
    entries = {entry.key: entry.value for entry in model.metadata_props}
    if missing := [key for key in ("classes", "preprocessing") if key not in entries]:
        raise CheckpointError(
            f"{path} has no {' and no '.join(missing)} in its metadata",
            "use a file that vit export wrote; an .onnx of another program does not say how to prepare an image",
        )
    try:
        classes = TypeAdapter(list[str]).validate_json(entries["classes"], strict=True)
        return tuple(classes), Preprocessing.parse(json.loads(entries["preprocessing"]))
    except (ValidationError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has unusable metadata: {str(error).splitlines()[0]}") from None


def _session(path: Path, provider: Provider) -> Any:
    onnxruntime = onnx_providers.runtime()
    cuda = "CUDAExecutionProvider"
    wanted = provider == "cuda" or (provider == "auto" and torch.cuda.is_available())
    if provider == "cuda" and not torch.cuda.is_available():
        raise UserError("--provider cuda: no CUDA device is visible", "see vit doctor, or take --provider cpu")
    if provider == "cuda" and cuda not in onnxruntime.get_available_providers():
        raise UserError("--provider cuda: this onnxruntime has no CUDA", "pip install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    # TF32 is ONNX Runtime's default and would answer otherwise than the checkpoint.
    providers: list[Any] = [(cuda, {"use_tf32": "0"})] if wanted else []
    try:
        session = onnxruntime.InferenceSession(str(path), options, [*providers, "CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no other class
        raise CheckpointError(f"{path}: ONNX Runtime cannot run it: {str(error).splitlines()[0][:300]}") from None
    if wanted and session.get_providers()[0] != cuda:
        reason, remedy = onnx_providers.why_not(cuda) or ("it loads for another model, but not for this one", "")
        if provider == "cuda":
            raise UserError(f"--provider cuda: {reason}", remedy)
        warnings.warn(f"ONNX Runtime computes on the CPU: {reason}. {remedy}", stacklevel=3)
    return session
