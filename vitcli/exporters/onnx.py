"""ONNX: one file that other programs run, with class names and preprocessing inside.

Input `pixel_values` (batch, 3, h, w) is normalised as the metadata's `preprocessing` says; output is `logits`
(batch, classes). The batch is free, all else is fixed.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from vitcli import __version__
from vitcli.errors import CheckpointError, DataError, RecipeError
from vitcli.exporters import Report, check, place_for, sample

if TYPE_CHECKING:
    import onnx
    from PIL.Image import Image

    from vitcli.checkpoint import Trained

OUTPUT = "model.onnx"
OPSETS = range(18, 26)  # torch 2.15 writes invalid files at 17 and 26, and says nothing
ONE_FILE = 1.8e9  # bytes of weights; protobuf ends at 2 GB


def export(
    trained: Trained,
    out: Path,
    *,
    images: Sequence[Image] | None = None,
    opset: int = 20,
    source: Path | None = None,
    recipe: str | None = None,
) -> Report:
    """Write `out`, and above 1.8 GB of weights `out`.data beside it, and hold it against the checkpoint on `images`.

    `source` is the file that the model was loaded from and `recipe` its recipe's name, both for the metadata.
    Raises RecipeError for another opset, DataError if the file does not answer as the checkpoint, StorageError.
    """
    from vitcli.inference import torch_predictor
    from vitcli.onnx_model import OnnxPredictor

    if opset not in OPSETS:
        raise RecipeError(f"--opset {opset} is not possible", f"choose from {OPSETS[0]} to {OPSETS[-1]}")
    if not trained.classes:
        raise CheckpointError(f"{trained.origin} names no classes", "train one: vit finetune --ckpt")
    begin = time.monotonic()
    reference = torch_predictor(trained, "cpu")
    prepared = sample(trained.preprocessing, images)
    with place_for(out) as file:
        _trace(trained, file, opset)
        nodes = _finish(file, opset, _metadata(trained, opset, source, recipe))
        parity = check(reference, OnnxPredictor(file, "cpu"), prepared)
        size = sum(part.stat().st_size for part in file.parent.iterdir())
    details: dict[str, str | int] = {"opset": opset, "nodes": nodes}
    return Report("onnx", str(out), round(size / 1e6, 1), details, parity, round(time.monotonic() - begin, 1))


def _trace(trained: Trained, file: Path, opset: int) -> None:
    import torch

    weights = sum(tensor.nbytes for tensor in trained.model.state_dict().values())
    example = torch.zeros(2, 3, *trained.image_size)  # a batch of 1 would be taken for a constant by older torch
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # onnxscript before 0.7 prints its progress
        warnings.simplefilter("ignore")  # torch's exporter warns of itself
        torch.onnx.export(
            trained.model,
            (example,),
            file,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            opset_version=opset,
            external_data=weights > ONE_FILE,
            dynamo=True,
            verbose=False,
        )


def _metadata(trained: Trained, opset: int, source: Path | None, recipe: str | None) -> dict[str, str]:
    metadata = {
        "vitcli": __version__,
        "opset": str(opset),
        "model": trained.config.model_dump_json(),
        "classes": json.dumps(trained.classes),
        "preprocessing": trained.preprocessing.model_dump_json(),
    }
    if recipe:
        metadata["recipe"] = recipe
    if source and source.is_file():
        with source.open("rb") as file:
            metadata["source_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return metadata


def _finish(file: Path, opset: int, metadata: dict[str, str]) -> int:
    """Replace torch's notes, which hold paths of this machine, by ours; check the file. Returns its nodes."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    _strip(model)
    model.producer_name, model.producer_version = "vitcli", __version__
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, file)
    onnx.checker.check_model(str(file), full_check=True)
    found = {entry.domain: entry.version for entry in model.opset_import}
    if found != {"": opset}:
        raise DataError(f"torch wrote opset {found}, not {opset}", "choose another --opset")
    return len(model.graph.node)


def _strip(model: onnx.ModelProto) -> None:
    from vitcli.onnx_model import messages

    for part in messages(model):
        for field in ("doc_string", "metadata_props"):
            if field in part.DESCRIPTOR.fields_by_name:
                part.ClearField(field)
