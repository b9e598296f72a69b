"""TensorRT: an engine for NVIDIA's GPUs, built from an .onnx that is written beside it.

The precision is in the graph and the network strongly typed: TensorRT chooses kernels, never precisions. An engine fits
the version that built it, and TensorRT's also the kind of GPU, so the .onnx is what to keep.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitcli.errors import DataError, RecipeError, UserError
from vitcli.exporters import Report, check, onnx, place_for, sample
from vitcli.onnx import tensorrt_library
from vitcli.onnx.tensorrt_library import Library

if TYPE_CHECKING:
    from onnx import ModelProto
    from PIL.Image import Image
    from torch import Tensor

    from vitcli.checkpoint import Trained

OUTPUT = "model.plan"
OPTIONS = onnx.GraphOptions
Shape = tuple[int, ...]
USUAL, LARGEST = 32, 256  # images in a batch: what the engine is tuned for, and the most that it takes


def export(
    trained: Trained,
    out: Path,
    *,
    images: Sequence[Image] | None = None,
    options: onnx.GraphOptions = onnx.PLAIN,
    source: Path | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Report:
    """Write the .onnx beside `out` and build `out` from it; what it takes is the ONNX target's.

    The engine itself is held against the checkpoint where it can run; else `details` says why not, and the parity is
    the .onnx file's. Raises UserError without TensorRT, DataError for a graph that it does not build and for an engine
    that does not answer as the checkpoint, and what the ONNX target raises.
    """
    from vitcli.inference import torch_predictor
    from vitcli.onnx.model import OnnxPredictor

    if options.preprocess == "full":
        raise RecipeError("--preprocess full does not go with TensorRT: it takes images of one size", "take normalise")
    library, file = _library(), out.with_suffix(".onnx")
    begin, stage = time.monotonic(), on_stage or (lambda name: None)
    written = onnx.export(trained, file, images=images, options=options, source=source, on_stage=on_stage)
    with place_for(out) as place:
        stage("build")
        plan = build(library, file, options.max_batch or LARGEST)
        place.write_bytes(plan)
        parity, reason = written.parity, tensorrt_library.why_not(library)
        if reason is None:
            stage("parity")
            pair = torch_predictor(trained, "cpu"), OnnxPredictor(file, runner=Engine(library, plan))
            reference, engine = map(onnx.LogProbabilities, pair) if options.softmax else pair
            prepared = sample(trained.preprocessing, images)
            parity = check(reference, engine, prepared, options.precision, max_batch=options.max_batch)
    ran = f"not run, the parity is the .onnx file's: {reason}" if reason else "agrees"
    return replace(
        written,
        target="tensorrt",
        file=str(out),
        megabytes=round(len(plan) / 1e6, 1),
        details=written.details | {"onnx": str(file), "builder": str(library), "engine": ran},
        parity=parity,
        seconds=round(time.monotonic() - begin, 1),
        snippet="",
    )


def command(file: Path, max_batch: int | None = None) -> str | None:
    """The line that builds the same engine with NVIDIA's trtexec; None for a graph that takes images of any size."""
    from vitcli.onnx.model import read

    model = read(file)
    profile = _profile(model, max_batch or LARGEST)
    if profile is None:
        return None
    name, *shapes = profile
    words = ["trtexec", f"--onnx={file}", f"--saveEngine={file.with_suffix('.plan')}", "--stronglyTyped", "--noTF32"]
    for bound, shape in zip(("min", "opt", "max"), shapes, strict=True):
        words.append(f"--{bound}Shapes={name}:{'x'.join(map(str, shape))}")
    if any(node.op_type == "Attention" for node in model.graph.node):  # as `build` allows it
        words.append("--decomposableAttentions=*")
    return shlex.join(words)


def build(library: Library, file: Path, max_batch: int) -> bytes:
    """An engine of the .onnx for batches of 1 to `max_batch`. Raises DataError with TensorRT's own words."""
    from vitcli.onnx.model import read

    profile = _profile(read(file), max_batch)
    if profile is None:
        raise UserError("TensorRT takes images of one size", "leave out --preprocess full")
    trt = library.module
    library.complaints.clear()
    builder = trt.Builder(library.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(file)):
        error = parser.get_error(0)
        where = f"{error.node_operator()} {error.node_name()}"
        raise DataError(f"{library} cannot read {file}: {where}: {_line(error.desc())}")
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":  # no kernel takes attention in fp32 whole
            layer.__class__ = trt.IAttentionInputLayer  # TensorRT's way to a layer's own fields
            layer.attention.decomposable = True
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # its default, and not the checkpoint's answer
    shapes = builder.create_optimization_profile()
    shapes.set_shape(*profile)
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise DataError(f"{library} cannot build {file}: {_line((library.complaints or ['no reason given'])[-1])}")
    return bytes(plan)


class Engine:
    """An engine on torch's present GPU, as what runs the graph that it was built from."""

    def __init__(self, library: Library, plan: bytes):
        trt = library.module
        library.complaints.clear()
        self._engine = trt.Runtime(library.logger).deserialize_cuda_engine(plan)
        if self._engine is None:
            raise UserError(f"{library} cannot load its engine: {_line(' '.join(library.complaints))}")
        self._context = self._engine.create_execution_context()
        ends = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        shapes: dict[str, list[int | str]] = {
            name: ["batch" if size < 0 else size for size in self._engine.get_tensor_shape(name)] for name in ends
        }
        given = [name for name in ends if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs = {name: shapes[name] for name in given}
        self.outputs = {name: shapes[name] for name in ends if name not in given}
        self._largest = self._engine.get_tensor_profile_shape(given[0], 0)[2][0]

    def run(self, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """uint8 images -> the graph's float32 output on the CPU; `prepare` makes the graph's input of some of them."""
        import torch

        (source,), (target,) = self.inputs, self.outputs
        answers = []
        for piece in images.split(self._largest):
            given = prepare(piece.cuda()).contiguous()
            self._context.set_input_shape(source, tuple(given.shape))
            answer = torch.empty(tuple(self._context.get_tensor_shape(target)), device=given.device)
            self._context.set_tensor_address(source, given.data_ptr())
            self._context.set_tensor_address(target, answer.data_ptr())
            if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise UserError(f"TensorRT cannot run a batch of {len(given)}")
            answers.append(answer.cpu())
        return torch.cat(answers)


def _library() -> Library:
    names = tensorrt_library.installed()
    if not names:
        raise UserError("neither TensorRT nor TensorRT-RTX is installed", tensorrt_library.INSTALL)
    try:
        return tensorrt_library.load(names[0])
    except (ImportError, OSError) as error:
        raise UserError(f"{names[0]} does not load: {error}", "see vit doctor") from None


def _profile(model: ModelProto, max_batch: int) -> tuple[str, Shape, Shape, Shape] | None:
    """The input's name and its least, usual and largest shape; None where height and width are free."""
    end = model.graph.input[0]
    sizes = tuple(dim.dim_value for dim in end.type.tensor_type.shape.dim[1:])
    if 0 in sizes:
        return None
    return end.name, (1, *sizes), (min(USUAL, max_batch), *sizes), (max_batch, *sizes)


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
