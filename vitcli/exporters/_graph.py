"""From a ViT to a clean ONNX graph: traced by torch, folded, its nodes named after the model's parts, saved."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vitcli.model.attention import Attention, AttentionPool, explicit_attention

if TYPE_CHECKING:
    import onnx
    from onnxscript import ir

    from vitcli.model.vit import ViT

ONE_FILE = 1.8e9  # bytes of weights; protobuf ends at 2 GB
ATTENTION = 23  # the first opset with a node for it; before, written out it needs a third fewer nodes than traced


class Graph(nn.Module):
    """What the file computes: fp32 in and out whatever the weights are, softmax on top if wished."""

    def __init__(self, model: ViT, softmax: bool):
        super().__init__()
        self.model, self.softmax = model, softmax
        self.dtype = next(model.parameters()).dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits = self.model(pixel_values.to(self.dtype)).float()
        return logits.softmax(-1) if self.softmax else logits


def trace(model: ViT, opset: int, softmax: bool) -> ir.Model:
    """The graph of a model that nothing else uses: its attention is replaced."""
    if opset < ATTENTION:
        for part in model.modules():
            if isinstance(part, Attention | AttentionPool):
                part.attend = explicit_attention
    example = torch.zeros(2, 3, *model.image_size)  # a batch of 1 would be taken for a constant by older torch
    with _silent():
        program: Any = torch.onnx.export(
            Graph(model, softmax),
            (example,),
            input_names=["pixel_values"],
            output_names=["probabilities" if softmax else "logits"],
            dynamic_shapes=({0: "batch"},),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    return program.model


@contextmanager
def _silent() -> Iterator[None]:
    """torch's exporter warns of itself, onnxscript logs what it does not fold and, before 0.7, prints progress."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def tidy(model: ir.Model) -> None:
    """Fold what torch leaves of constants, leave the heads to Attention, drop what nothing reads, and give nodes and
    weights the model's names."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in list(model.graph):
        _fold(model, node)
    for node in list(model.graph):
        if node.op_type == "Attention":
            _split_within(node)
    RemoveUnusedNodesPass()(model)
    names, part = set(model.graph.initializers), "vit"
    for node in model.graph:
        part = _part(node) or part
        node.name = _fresh(f"{part}.{node.op_type}", names)
        for value in node.inputs:
            if value is not None and value.is_initializer() and (value.name or "").startswith("model."):
                _rename(model, value, (value.name or "").removeprefix("model."), names)
        if node.op_type == "MatMul" and (weight := node.inputs[1]) is not None and weight.is_initializer():
            _rename(model, weight, f"{part}.weight", names)


def _fold(model: ir.Model, node: ir.Node) -> None:
    """Replace a node that reads constants only by what it gives."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator
    from onnxscript import ir

    inputs = [value for value in node.inputs if value is not None]
    constants = {str(value.name): value.const_value.numpy() for value in inputs if value.const_value is not None}
    if not inputs or len(constants) < len({value.name for value in inputs}):
        return
    given, made = (
        [helper.make_empty_tensor_value_info(str(v.name)) for v in values] for values in (inputs, node.outputs)
    )
    graph = helper.make_graph([ir.serde.serialize_node(node)], "fold", given, made)
    opsets = [helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    found = ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets)).run(None, constants)
    for old, array in zip(node.outputs, map(np.asarray, found), strict=True):
        tensor = ir.tensor(array, name=old.name)
        new = ir.Value(name=old.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.register_initializer(new)
        ir.convenience.replace_all_uses_with(old, new)
    model.graph.remove(node, safe=True)


def _split_within(attention: ir.Node) -> None:
    """Let the node split (batch, tokens, width) into heads and join them: on a GPU each transpose would be a copy.

    Where something else happens to the heads, such as their normalisation, the node is left as it is.
    """
    from onnxscript import ir

    chains = [_before(value) for value in attention.inputs]
    after = _only_reader(_only_reader(attention, "Transpose"), "Reshape")
    heads = attention.inputs[0].shape[1] if attention.inputs[0] is not None and attention.inputs[0].shape else None
    if after is None or None in chains or not isinstance(heads, int):
        return
    for index, value in enumerate(chains):
        attention.replace_input_with(index, value)
    for name in ("q_num_heads", "kv_num_heads"):
        attention.attributes[name] = ir.AttrInt64(name, heads)
    attention.outputs[0].shape = after.outputs[0].shape
    ir.convenience.replace_all_uses_with(after.outputs[0], attention.outputs[0])


def _before(value: ir.Value | None) -> ir.Value | None:
    """What was split into heads, (batch, tokens, width), to give a value; None if something else gave it."""
    found = value
    for op in ("Transpose", "Reshape"):
        node = found.producer() if found is not None else None
        found = node.inputs[0] if node is not None and node.op_type == op else None
    return found if found is not None and found.shape is not None and found.shape.rank() == 3 else None


def _only_reader(node: ir.Node | None, op: str) -> ir.Node | None:
    """The node that alone reads a node's output, if it does `op`."""
    readers = [reader for reader, _ in node.outputs[0].uses()] if node is not None else []
    return readers[0] if len(readers) == 1 and readers[0].op_type == op else None


def _part(node: ir.Node) -> str:
    """The module that a node belongs to, as `blocks.0.mlp.fc1`; `vit` for the whole, "" where torch does not say."""
    written = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    if not written:
        return ""
    scopes = [scope.strip(" '") for scope in written.strip("[]").split(",")][:-1]  # the last is the operation's
    parts = [scope.removeprefix("model").lstrip(".") for scope in scopes if scope.startswith("model")]
    return parts[-1] if parts and parts[-1] else "vit"


def _fresh(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


def _rename(model: ir.Model, value: ir.Value, name: str, taken: set[str]) -> None:
    if value.name != name and not (value.name or "").startswith(name):
        model.graph.initializers.pop(value.name or "")
        value.name = _fresh(name, taken)
        model.graph.initializers[value.name] = value


def size(model: ir.Model) -> int:
    """Bytes of the weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def save(model: ir.Model, file: Path, beside: bool) -> None:
    """Write the file; `beside` puts the weights into `file`.data."""
    from onnxscript import ir

    ir.save(model, file, external_data=f"{file.name}.data" if beside else None)


def finish(file: Path, metadata: dict[str, str]) -> onnx.ModelProto:
    """Replace torch's notes, which hold paths of this machine, by ours; check the file. Returns it without weights
    that lie beside it."""
    import onnx

    from vitcli import __version__
    from vitcli.onnx.model import messages

    model = onnx.load(file, load_external_data=False)
    for part in messages(model):
        for field in ("doc_string", "metadata_props"):
            if field in part.DESCRIPTOR.fields_by_name:
                part.ClearField(field)
    model.producer_name, model.producer_version = "vitcli", __version__
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, file)
    onnx.checker.check_model(str(file), full_check=True)
    return model
