"""Exports held against NVIDIA's own parser and builder, TensorRT-RTX's, which need no GPU."""

import ctypes
import math
import shlex
import shutil
from dataclasses import replace
from functools import cache, wraps
from types import SimpleNamespace

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command import Vit
from onnx import TensorProto, numpy_helper
from test_export import CLASSES, ODD, tiny

from vitcli import checkpoint, exporters
from vitcli.data.images import decode
from vitcli.errors import DataError, RecipeError, UserError
from vitcli.exporters import _image_graph
from vitcli.exporters import onnx as to_onnx
from vitcli.exporters import tensorrt as to_tensorrt
from vitcli.exporters.onnx import GraphOptions
from vitcli.onnx import tensorrt_library
from vitcli.onnx.model import OnnxPredictor
from vitcli.onnx.session import Session

# What a ViT needs. TensorRT's parser has all of them.
OPERATORS = {
    *(
        "Conv",
        "MatMul",
        "Gemm",
        "LayerNormalization",
        "Gelu",
        "Softmax",
        "Attention",
        "Tanh",
        "Add",
        "Mul",
        "ReduceMean",
    ),
    *("Reshape", "Transpose", "Split", "Concat", "Expand", "Gather", "Slice", "Shape", "Cast"),
    *("QuantizeLinear", "DequantizeLinear"),
}
STEM = {"GroupNormalization", "InstanceNormalization", "MaxPool", "Pad", "Relu"}  # of a hybrid
GRAPHS = [(precision, opset) for precision in ("fp32", "fp16", "int8") for opset in (20, 23)]


@pytest.fixture(autouse=True, scope="module")
def no_shape_checks():
    """While torch traces a model, comparing shapes would turn the free batch into a number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(scope="module")
def library():
    if "TensorRT-RTX" not in tensorrt_library.installed():
        pytest.skip('TensorRT-RTX is not installed: pip install -e ".[tensorrt]"')
    return tensorrt_library.load("TensorRT-RTX")


export_onnx = to_onnx.export  # which some tests replace


def write(trained, file, precision, opset):
    calib = exporters.photographs() if precision == "int8" else None
    return export_onnx(trained, file, options=GraphOptions(opset=opset, precision=precision, calib=calib))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(precision, opset): the tiny model's file and report, written once."""

    @cache
    def once(precision, opset):
        file = tmp_path_factory.mktemp("a folder") / "model.onnx"
        return file, write(tiny(), file, precision, opset)

    return once


@pytest.fixture(params=GRAPHS, ids=lambda graph: f"{graph[0]}-{graph[1]}")
def graph(request, exported):
    """(file, precision, opset)"""
    return exported(*request.param)[0], *request.param


@pytest.fixture
def file(exported):
    return exported("fp32", 20)[0]


def test_nvidia_builds_it(library, graph, capfd):
    plan = to_tensorrt.build(library, graph[0], 256)
    assert len(plan) > 100_000
    assert capfd.readouterr() == ("", "")


def test_nvidia_reads_it_as_we_mean_it(library, graph):
    file, precision, _ = graph
    trt = library.module
    network = trt.Builder(library.logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library.logger)
    assert parser.parse_from_file(str(file))
    assert parser.num_errors == 0
    source, target = network.get_input(0), network.get_output(0)
    assert (network.num_inputs, network.num_outputs) == (1, 1)
    assert (source.name, tuple(source.shape), source.dtype) == ("pixel_values", (-1, 3, 32, 32), trt.float32)
    assert (target.name, tuple(target.shape), target.dtype) == ("logits", (-1, len(CLASSES)), trt.float32)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    products = [layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
    inside = trt.float16 if precision == "fp16" else trt.float32
    assert {layer.get_output(0).dtype for layer in products} == {inside}
    quantised = [layer for layer in layers if layer.type == trt.LayerType.QUANTIZE]
    assert {layer.get_output(0).dtype for layer in quantised} == ({trt.int8} if precision == "int8" else set())


def test_operators_and_shapes(graph):
    file, _, opset = graph
    assert_ready(file, opset)


def assert_ready(file, opset, operators=OPERATORS):
    model = onnx.load(file)
    onnx.checker.check_model(str(file), full_check=True)
    assert [child.name for child in file.parent.glob("*.onnx*")] == [file.name]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset}
    assert {node.domain for node in model.graph.node} == {""}
    assert {node.op_type for node in model.graph.node} <= operators
    assert not model.functions
    for end in (*model.graph.input, *model.graph.output):
        batch, *others = end.type.tensor_type.shape.dim
        assert (batch.dim_param, end.type.tensor_type.elem_type) == ("batch", TensorProto.FLOAT)
        assert all(dim.dim_value > 0 for dim in others)
    for node in model.graph.node:
        if node.op_type in ("Attention", "LayerNormalization"):
            assert len(node.output) == 1


def test_precision_is_in_the_graph(graph):
    file, precision, opset = graph
    model = onnx.load(file)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    halves = [tensor for tensor in constants.values() if tensor.data_type == TensorProto.FLOAT16]
    weights = sum(math.prod(tensor.dims) for tensor in constants.values())
    assert sum(math.prod(tensor.dims) for tensor in halves) > 0.95 * weights if precision == "fp16" else not halves
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert bool(pairs) == (precision == "int8")
    for node in pairs:
        scale = numpy_helper.to_array(constants[node.input[1]])
        assert scale.dtype == np.float32
        assert (scale > 0).all()
        if len(node.input) > 2:
            zero = numpy_helper.to_array(constants[node.input[2]])
            assert zero.dtype == np.int8
            assert not zero.any()
        else:  # the type is the input's then, and the zero point 0
            assert constants[node.input[0]].data_type == TensorProto.INT8
    if precision == "int8":
        linear = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
        dequantised = {name for name, node in made.items() if node.op_type == "DequantizeLinear"}
        quantised = [node for node in linear if dequantised.issuperset(node.input[:2])]
        assert len(quantised) >= 9  # qkv, projection, two of the MLP in each of two blocks, and the head
        assert len(linear) - len(quantised) == (4 if opset == 20 else 0)  # attention's two products in each block
        for node in quantised:
            weight = made[node.input[1]]
            axis = next(attribute.i for attribute in weight.attribute if attribute.name == "axis")
            assert list(constants[weight.input[1]].dims) == [constants[weight.input[0]].dims[axis]]


def test_nvidia_builds_a_graph_that_normalises(tmp_path, library, file):
    onnx.save(_image_graph.prepend(onnx.load(file), tiny().preprocessing, "normalise"), tmp_path / "model.onnx")
    assert len(to_tensorrt.build(library, tmp_path / "model.onnx", 16)) > 100_000
    assert "--minShapes=images:1x32x32x3" in (to_tensorrt.command(tmp_path / "model.onnx") or "")


def test_the_command(graph):
    file, _, opset = graph
    program, *options = shlex.split(to_tensorrt.command(file) or "")
    given = {name: value for name, _, value in (option.partition("=") for option in options)}
    assert program == "trtexec"
    assert given["--onnx"] == str(file)
    assert given["--saveEngine"] == str(file.with_suffix(".plan"))
    assert given.keys() >= {"--stronglyTyped", "--noTF32"}
    assert [given[f"--{bound}Shapes"] for bound in ("min", "opt", "max")] == [
        f"pixel_values:{batch}x3x32x32" for batch in (1, 32, 256)
    ]
    assert ("--decomposableAttentions" in given) == (opset == 23)


def test_the_commands_batches(file):
    few, many = (shlex.split(to_tensorrt.command(file, batch) or "") for batch in (8, 512))
    assert few[-2:] == ["--optShapes=pixel_values:8x3x32x32", "--maxShapes=pixel_values:8x3x32x32"]
    assert many[-2:] == ["--optShapes=pixel_values:32x3x32x32", "--maxShapes=pixel_values:512x3x32x32"]


def test_a_graph_of_any_size_has_no_command(tmp_path, library, file):
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, tmp_path / "free.onnx")
    assert to_tensorrt.command(tmp_path / "free.onnx") is None
    with pytest.raises(UserError, match="one size"):
        to_tensorrt.build(library, tmp_path / "free.onnx", 8)


@pytest.fixture
def written(exported, monkeypatch):
    """Take the .onnx that was written before, which saves seconds."""

    @wraps(export_onnx)
    def copy(trained, file, *, options=to_onnx.PLAIN, **_):
        source, report = exported(options.precision, options.opset)
        shutil.copy(source, file)
        return replace(report, file=str(file))

    monkeypatch.setattr(to_onnx, "export", copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.usefixtures("library", "written")
def test_export_says_that_it_did_not_run_the_engine(tmp_path):
    report = to_tensorrt.export(tiny(), tmp_path / "tiny.plan", options=GraphOptions(opset=23))
    assert sorted(child.name for child in tmp_path.iterdir()) == ["tiny.onnx", "tiny.plan"]
    assert (report.target, report.file) == ("tensorrt", str(tmp_path / "tiny.plan"))
    assert report.megabytes == round((tmp_path / "tiny.plan").stat().st_size / 1e6, 1)
    assert report.details["engine"] == "not run, the parity is the .onnx file's: no CUDA device is visible"
    assert str(report.details["builder"]).startswith("TensorRT-RTX 1.")
    assert report.details["onnx"] == str(tmp_path / "tiny.onnx")
    assert report.parity.agreement == 1


@pytest.mark.usefixtures("library", "written")
@pytest.mark.parametrize("fault", [0.0, 1.0])
def test_an_engine_that_runs_is_held_against_the_checkpoint(tmp_path, monkeypatch, fault):
    class Faulty(Session):
        def __init__(self, library, plan):
            file = tmp_path / "tiny.onnx"
            super().__init__(file, onnx.load(file), "cpu")

        def run(self, images, prepare):
            return super().run(images, prepare) + fault

    monkeypatch.setattr(tensorrt_library, "why_not", lambda library: None)
    monkeypatch.setattr(to_tensorrt, "Engine", Faulty)
    if not fault:
        report = to_tensorrt.export(tiny(), tmp_path / "tiny.plan")
        assert report.details["engine"] == "agrees"
        assert report.parity.agreement == 1
    else:
        with pytest.raises(DataError, match="does not answer as its checkpoint"):
            to_tensorrt.export(tiny(), tmp_path / "tiny.plan")
        assert [child.name for child in tmp_path.iterdir()] == ["tiny.onnx"]


@pytest.fixture
def vit(capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda path: tiny())
    return Vit(capsys, monkeypatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.usefixtures("library", "written")
def test_vit_export_tensorrt(vit, tmp_path):
    said = vit("export", "--tensorrt", "--fp16", "--ckpt", "weights.npz", "-o", tmp_path / "tiny.plan", "--json")
    assert said.code == 0, said.err
    assert (said.json["target"], said.json["precision"]) == ("tensorrt", "fp16")
    assert "not run" in said.json["details"]["engine"]
    assert sorted(child.name for child in tmp_path.iterdir()) == ["tiny.onnx", "tiny.plan"]


def test_vit_export_tensorrt_without_it(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_library, "MODULES", {"TensorRT": "no_such_module"})
    said = vit("export", "--tensorrt", "--ckpt", "weights.npz", "-o", tmp_path / "tiny.plan")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: neither TensorRT nor TensorRT-RTX is installed\nhint: pip install")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("written")
def test_the_command_is_printed_after_an_onnx_export(vit, tmp_path):
    said = vit("export", "--onnx", "--ckpt", "weights.npz", "-o", tmp_path / "tiny.onnx", "--max-batch", 64, "--json")
    assert said.code == 0, said.err
    assert said.json["trtexec"] == to_tensorrt.command(tmp_path / "tiny.onnx", 64)
    assert "--maxShapes=pixel_values:64x3x32x32" in said.json["trtexec"]


def test_any_size_is_refused_before_work(tmp_path, library):
    with pytest.raises(RecipeError, match="--preprocess full"):
        to_tensorrt.export(tiny(), tmp_path / "tiny.plan", options=GraphOptions(preprocess="full"))
    assert not list(tmp_path.iterdir())


def test_without_tensorrt(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_library, "MODULES", {"TensorRT": "no_such_module"})
    with pytest.raises(UserError, match="neither TensorRT nor TensorRT-RTX is installed") as caught:
        to_tensorrt.export(tiny(), tmp_path / "tiny.plan")
    assert caught.value.exit_code == 2
    assert "pip install" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["OSError('libnvinfer.so.11: no such file')", "ImportError('no libnvinfer.so.11')"])
def test_tensorrt_that_does_not_load(tmp_path, monkeypatch, fault):
    (tmp_path / "broken_tensorrt.py").write_text(f"raise {fault}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tensorrt_library, "MODULES", {"TensorRT": "broken_tensorrt"})
    tensorrt_library.load.cache_clear()
    with pytest.raises(UserError, match=r"TensorRT does not load: .*libnvinfer\.so\.11"):
        to_tensorrt.export(tiny(), tmp_path / "out" / "tiny.plan")
    tensorrt_library.load.cache_clear()


def test_a_graph_that_tensorrt_refuses(tmp_path, library):
    x = onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 4])
    y = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"])
    inner = onnx.helper.make_graph([onnx.helper.make_node("Det", ["x"], ["y"])], "determinant", [x], [y])
    model = onnx.helper.make_model(inner, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "det.onnx")
    with pytest.raises(DataError, match=r"TensorRT-RTX 1\.[\d.]+ cannot read .*det\.onnx: Det") as caught:
        to_tensorrt.build(library, tmp_path / "det.onnx", 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((8, 6), None),
        ((12, 0), None),
        ((9, 0), "a GPU has compute capability 9.0, and TensorRT-RTX runs on 8.0, 8.6, 8.9, 12.0, 12.1"),
        ((7, 5), "a GPU has compute capability 7.5, and TensorRT-RTX runs on 8.0, 8.6, 8.9, 12.0, 12.1"),
    ],
)
def test_gpus_that_tensorrt_rtx_runs_on(library, monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert tensorrt_library.why_not(library) == reason
    assert tensorrt_library.why_not(library._replace(name="TensorRT")) is None


class Context:
    """An execution context that runs the graph on the CPU, from the addresses that it is given."""

    def __init__(self, file, largest):
        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self.largest, self.shapes, self.addresses, self.ran = largest, {}, {}, []

    def set_input_shape(self, name, shape):
        assert shape[0] <= self.largest
        self.shapes = {name: shape, "logits": (shape[0], len(CLASSES))}

    def get_tensor_shape(self, name):
        return self.shapes[name]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        floats = ctypes.POINTER(ctypes.c_float)
        views = {
            name: np.ctypeslib.as_array(ctypes.cast(address, floats), self.shapes[name])
            for name, address in self.addresses.items()
        }
        views["logits"][:] = self.session.run(None, {"pixel_values": views["pixel_values"].copy()})[0]
        self.ran.append((stream, len(views["logits"])))
        return True


def test_an_engine_is_fed_and_read_at_the_right_places(file, monkeypatch):
    """What TensorRT itself does needs a GPU; the addresses and shapes that it gets are seen here."""
    context = Context(file, largest=4)
    shapes = {"pixel_values": (-1, 3, 32, 32), "logits": (-1, len(CLASSES))}
    engine = SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=lambda index: list(shapes)[index],
        get_tensor_shape=shapes.get,
        get_tensor_mode=lambda name: "in" if name == "pixel_values" else "out",
        get_tensor_profile_shape=lambda name, profile: [(size, *shapes[name][1:]) for size in (1, 2, 4)],
        create_execution_context=lambda: context,
    )
    module = SimpleNamespace(
        Runtime=lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda plan: engine if plan == b"plan" else None
        ),
        TensorIOMode=SimpleNamespace(INPUT="in"),
    )
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    library = tensorrt_library.Library("TensorRT", "11", module, None, [])
    images = exporters.sample(tiny().preprocessing, None)
    predictor = OnnxPredictor(file, runner=to_tensorrt.Engine(library, b"plan"))
    assert torch.allclose(predictor.logits(images), OnnxPredictor(file, "cpu").logits(images), atol=1e-5)
    assert context.ran == [(7, 4), (7, 4), (7, 2)]
    with pytest.raises(UserError, match="TensorRT 11 cannot load its engine"):
        to_tensorrt.Engine(library, b"another")


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(("precision", "opset"), GRAPHS)
def test_every_architecture(tmp_path, library, name, precision, opset):
    options, size = ODD[name]
    write(tiny(size, **options), tmp_path / "model.onnx", precision, opset)
    assert_ready(tmp_path / "model.onnx", opset, OPERATORS | STEM)
    assert len(to_tensorrt.build(library, tmp_path / "model.onnx", 16)) > 100_000


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "opset"), GRAPHS)
def test_deit_tiny(tmp_path, shared, library, precision, opset):
    trained = checkpoint.load(shared / "data" / "deit_tiny_patch16_224.pth")
    photographs = sorted((shared / "data" / "imagenet200").glob("*/*.JPEG"))[::10]
    calib = [decode(path) for path in photographs] if precision == "int8" else None
    file = tmp_path / "deit.onnx"
    to_onnx.export(trained, file, options=GraphOptions(opset=opset, precision=precision, calib=calib))
    assert_ready(file, opset)
    assert len(to_tensorrt.build(library, file, 256)) > 1e6


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "opset"), GRAPHS)
def test_b16(tmp_path, library, precision, opset):
    trained = tiny((224, 224), width=768, depth=12, mlp_dim=3072, heads=12, patch=16)
    write(trained, tmp_path / "b16.onnx", precision, opset)
    assert_ready(tmp_path / "b16.onnx", opset)
    assert len(to_tensorrt.build(library, tmp_path / "b16.onnx", 256)) > 50e6
