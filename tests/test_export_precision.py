"""Precisions, other resolutions, the graph's quality, the report: what `vit export --onnx` promises beyond fp32."""

import collections
import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command import Vit
from onnxscript import ir
from PIL import Image
from sklearn.datasets import load_sample_images
from test_export import CLASSES, Table, tiny
from torch import nn

from vitcli import checkpoint, exporters, recipe
from vitcli.data import Preprocessing
from vitcli.data.images import decode
from vitcli.data.preprocess import normalise, prepare
from vitcli.errors import DataError, RecipeError, StorageError
from vitcli.exporters import _graph, _rebuild, _snippet
from vitcli.exporters import onnx as to_onnx
from vitcli.exporters.onnx import GraphOptions
from vitcli.inference import torch_predictor
from vitcli.model import ViTConfig
from vitcli.model.attention import Attention, AttentionPool
from vitcli.model.vit import ViT
from vitcli.onnx.model import OnnxPredictor


@pytest.fixture(autouse=True, scope="module")
def no_shape_checks():
    """While torch traces a model, comparing shapes would turn the free batch into a number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


def metadata(file: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(file, load_external_data=False).metadata_props}


def run(file: Path, images: np.ndarray) -> np.ndarray:
    """Plain ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """fp32 as it comes."""
    trained, file = tiny(), tmp_path_factory.mktemp("plain") / "model.onnx"
    to_onnx.export(trained, file)
    return trained, file


@pytest.fixture
def traced(plain, monkeypatch):
    """Take the model that was traced before, which saves seconds."""
    monkeypatch.setattr(to_onnx, "_trace", lambda *_: ir.load(plain[1]))


# --- The graph ---------------------------------------------------------------------------------------------------


def faults(model: onnx.ModelProto) -> list[str]:
    """What a clean graph has not: nodes and weights that nothing reads, and nodes that could be computed beforehand."""
    graph = model.graph
    read = collections.Counter(name for node in graph.node for name in node.input) + collections.Counter(
        output.name for output in graph.output
    )
    constants, found = {tensor.name for tensor in graph.initializer}, []
    found += [f"nothing reads the weight {name}" for name in constants if not read[name]]
    for node in graph.node:
        if not any(read[name] for name in node.output):
            found.append(f"nothing reads {node.name}")
        if all(name in constants for name in node.input if name):
            found.append(f"{node.name} is constant")
            constants |= set(node.output)
        if node.op_type in ("Identity", "Dropout"):
            found.append(f"{node.name} does nothing")
        first = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "Shape" and (first.get("start"), first.get("end")) != (0, 1):
            found.append(f"{node.name} asks for sizes that are known")
    return found


def counted(model: onnx.ModelProto) -> collections.Counter:
    return collections.Counter(node.op_type for node in model.graph.node)


def modules(model: nn.Module, *kinds: type) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


def test_the_check_of_graphs_finds_faults():
    def model(*nodes):
        ends = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
        weights = [onnx.numpy_helper.from_array(np.ones(2, np.float32), name) for name in "ab"]
        made = [onnx.helper.make_node(op, i.split(), o.split(), name=op) for op, i, o in nodes]
        return onnx.helper.make_model(onnx.helper.make_graph(made, "test", ends[:1], ends[1:], weights))

    assert faults(model(("Add", "x a", "s"), ("Mul", "s b", "y"))) == []
    assert faults(model(("Add", "x a", "y"))) == ["nothing reads the weight b"]
    assert faults(model(("Neg", "a", "n"), ("Add", "n b", "s"), ("Add", "x s", "y"))) == [
        "Neg is constant", "Add is constant",
    ]  # fmt: skip
    assert faults(model(("Add", "x a", "y"), ("Mul", "x b", "z"))) == ["nothing reads Mul"]
    assert faults(model(("Identity", "x", "s"), ("Shape", "x", "t"), ("Max", "s a b t", "y"))) == [
        "Identity does nothing", "Shape asks for sizes that are known",
    ]  # fmt: skip


GRAPHS = {
    "plain 20": ({}, 20),
    "plain 23": ({"activation": "gelu"}, 23),
    "rich 20": ({"pool": "map", "qk_norm": True, "layerscale": 0.1, "registers": 2}, 20),
    "rich 23": ({"pool": "map", "qk_norm": True, "layerscale": 0.1, "registers": 2}, 23),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, id=name, marks=[pytest.mark.slow] if "rich" in name else []) for name in GRAPHS],
)
def graph(request, tmp_path_factory):
    options, opset = GRAPHS[request.param]
    if request.param == "plain 20":
        trained, file = request.getfixturevalue("plain")
    else:
        trained, file = tiny(**options), tmp_path_factory.mktemp("graph") / "model.onnx"
        to_onnx.export(trained, file, options=GraphOptions(opset=opset))
    return trained, onnx.load(file), opset


def hold_quality(model: ViT, found: onnx.ModelProto, opset: int) -> None:
    assert {entry.domain for entry in found.opset_import} == {""}
    assert {node.domain for node in found.graph.node} == {""}
    assert faults(found) == []
    ops = counted(found)
    assert ops["LayerNormalization"] == modules(model, nn.LayerNorm)
    assert ops["Gelu"] == modules(model, nn.GELU)
    attentions = modules(model, Attention, AttentionPool)
    assert ops["Attention"] == (attentions if opset >= 23 else 0)
    assert ops["Softmax"] == (0 if opset >= 23 else attentions)
    for node in found.graph.node:
        if node.op_type == "Attention" and not model.config.qk_norm:
            heads = {a.name: a.i for a in node.attribute if a.name.endswith("_num_heads")}
            assert heads == {"q_num_heads": model.config.heads, "kv_num_heads": model.config.heads}
            made = {output: other.op_type for other in found.graph.node for output in other.output}
            assert not {made[name] for name in node.input} & {"Transpose", "Reshape"}
    named = [node.name for node in found.graph.node]
    assert len(set(named)) == len(named)
    for value in [*found.graph.input, *found.graph.output]:
        first, *rest = value.type.tensor_type.shape.dim
        assert first.dim_param == "batch"
        assert all(dim.dim_value > 0 for dim in rest)
    free = {dim.dim_param for v in found.graph.value_info for dim in v.type.tensor_type.shape.dim if dim.dim_param}
    assert free <= {"batch"}


def test_graph_quality(graph):
    trained, found, opset = graph
    hold_quality(trained.model, found, opset)


def test_nodes_and_weights_are_named_after_the_model(graph):
    trained, found, _ = graph
    names = {node.name for node in found.graph.node}
    assert names >= {"blocks.0.mlp.fc1.MatMul", "blocks.0.norm1.LayerNormalization", "blocks.0.attn.qkv.MatMul"}
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    state = trained.model.state_dict()
    assert np.array_equal(weights["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"].T)
    assert np.array_equal(weights["head.bias"], state["head.bias"])


def test_a_deep_model_stays_within_the_bars(graph):
    """B/16's twelve blocks, counted from this model's two: weights and widths change no node."""
    trained, found, opset = graph
    per_block = 2 * trained.config.qk_norm + 2 * bool(trained.config.layerscale)  # nodes that B/16 has not
    pooling = sum(node.name.startswith("attn_pool.") for node in found.graph.node)
    block = sum(node.name.startswith("blocks.0.") for node in found.graph.node)
    assert block > 12
    bar = 460 if opset < 23 else 300 if trained.config.qk_norm else 200
    assert len(found.graph.node) + 10 * block - 12 * per_block - pooling <= bar


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "bar"), [(20, 460), (23, 200)])
def test_b16_at_full_size(tmp_path, opset, bar):
    config = ViTConfig.parse({"variant": "B/16"})
    torch.manual_seed(0)
    model = config.build(1000, (224, 224)).eval()
    nn.init.normal_(model.head.weight, std=0.02)
    classes = tuple(map(str, range(1000)))
    trained = checkpoint.Trained(model, config, classes, (224, 224), Preprocessing.parse({}), "a random B/16")
    report = to_onnx.export(trained, tmp_path / "b16.onnx", options=GraphOptions(opset=opset))
    print(report)
    assert report.details["nodes"] <= bar
    hold_quality(model, onnx.load(tmp_path / "b16.onnx"), opset)


# --- fp16, softmax, resolution, batch ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """fp16 with softmax at another resolution, for at most 4 images."""
    trained = _rebuild.at_resolution(tiny(), 48)
    file = tmp_path_factory.mktemp("half") / "half.onnx"
    stages = []
    options = GraphOptions(precision="fp16", softmax=True, max_batch=4, opset=23)
    report = to_onnx.export(trained, file, options=options, on_stage=stages.append)
    return trained, file, report, stages


def test_fp16_has_float_ends_and_half_weights(half):
    _, file, report, _ = half
    model = onnx.load(file)
    ends = [*model.graph.input, *model.graph.output]
    assert {end.type.tensor_type.elem_type for end in ends} == {onnx.TensorProto.FLOAT}
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    assert counted(model)["Cast"] == 2
    assert faults(model) == []
    assert report.precision == metadata(file)["precision"] == "fp16"


def test_fp16_norms_compute_in_float(half):
    norms = [node for node in onnx.load(half[1]).graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 5
    for node in norms:
        assert {a.name: a.i for a in node.attribute}["stash_type"] == onnx.TensorProto.FLOAT


def test_fp16_softmax_and_resolution_answer_as_the_checkpoint(half):
    trained, file, report, _ = half
    images = normalise(exporters.sample(trained.preprocessing, None), trained.preprocessing)
    with torch.no_grad():
        expected = trained.model(images).softmax(1).numpy()
    assert expected.max(1).min() < 0.99
    for batch in (1, 2, 4):
        found = np.concatenate([run(file, part.numpy()) for part in images.split(batch)])
        assert np.abs(found - expected).max() < 1e-2
        assert np.allclose(found.sum(1), 1, atol=1e-5)
    assert report.parity.snr > 40
    assert report.parity.difference <= 1e-2 * max(1, report.parity.largest)
    predicted = OnnxPredictor(file).logits(exporters.sample(trained.preprocessing, None))
    assert torch.allclose(predicted.softmax(1), torch.from_numpy(expected), atol=1e-2)


def test_what_was_asked_for_is_in_the_metadata(half):
    found = metadata(half[1])
    assert (found["softmax"], found["max_batch"], found["preprocess"]) == ("true", "4", "none")
    assert json.loads(found["preprocessing"])["res"] == [48, 48]
    assert half[2].details["max_batch"] == 4


def test_the_stages_are_told_in_order(half):
    assert half[3] == ["trace", "optimise", "check", "parity"]


def test_another_resolution_stretches_the_positions_as_the_config_says():
    trained = tiny(posemb_resize="bicubic")
    other = _rebuild.at_resolution(trained, 48)
    before, after = trained.model.pos_embed.detach(), other.model.pos_embed.detach()
    assert torch.equal(after[:, 0], before[:, 0])
    table = before[0, 1:].unflatten(0, (4, 4)).movedim(-1, 0)[None]
    stretched = nn.functional.interpolate(table, (6, 6), mode="bicubic")[0].movedim(0, -1).flatten(0, 1)
    assert torch.allclose(after[0, 1:], stretched, atol=1e-6)
    assert other.image_size == other.preprocessing.res == (48, 48)
    assert other.model.head.weight.data_ptr() == trained.model.head.weight.data_ptr()


def test_another_resolution_keeps_the_share_of_the_crop():
    trained = replace(tiny(), preprocessing=Preprocessing(res=(32, 32), resize=36))
    assert _rebuild.at_resolution(trained, 64).preprocessing.resize == 72


def test_a_resolution_that_the_patches_do_not_divide():
    with pytest.raises(RecipeError, match=r"50x50 is not divisible by 8; the nearest is 48"):
        _rebuild.at_resolution(tiny(), 50)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "swiglu"])
@pytest.mark.parametrize("opset", [18, 20, 23])
def test_fp16_of_every_activation(tmp_path, opset, activation):
    trained = tiny(activation=activation)
    options = GraphOptions(precision="fp16", opset=opset)
    report = to_onnx.export(trained, tmp_path / "model.onnx", options=options)
    assert report.parity.difference <= 1e-2 * max(1, report.parity.largest)
    assert faults(onnx.load(tmp_path / "model.onnx")) == []


def test_a_model_beyond_fp16_is_refused(tmp_path):
    trained = tiny()
    with torch.no_grad():
        trained.model.blocks[0].mlp.fc1.bias.fill_(70_000)
        trained.model.blocks[0].mlp.fc2.weight.mul_(1e-5)
    with pytest.raises(DataError, match="does not answer as its checkpoint") as caught:
        to_onnx.export(trained, tmp_path / "model.onnx", options=GraphOptions(precision="fp16"))
    assert "leave out --fp16" in caught.value.hint
    assert not list(tmp_path.iterdir())


# --- The gate ----------------------------------------------------------------------------------------------------

NUMBERED = torch.arange(17, dtype=torch.uint8).view(17, 1, 1, 1).expand(17, 3, 1, 1)


def test_snr_is_the_power_of_the_logits_over_that_of_the_differences():
    parity = exporters.check(Table([[3.0, 4.0]] * 17), Table([[3.0, 4.005]] * 17), NUMBERED, "fp16")
    assert parity.snr == pytest.approx(10 * np.log10(25 / 0.005**2), abs=0.1)
    assert exporters.check(Table([[3.0, 4.0]] * 17), Table([[3.0, 4.0]] * 17), NUMBERED).snr is None
    assert parity.images_per_second > 0


@pytest.mark.parametrize(
    ("precision", "found", "passes"),
    [
        ("fp16", [10.0, 9.0901], True),
        ("fp16", [10.0, 9.2001], False),  # more than 1e-2 of 10
        ("fp16", [9.96, 9.97], False),  # another first class, where fp32 was sure
        ("int8", [9.5, 9.6], True),
        ("int8", [5.0, 13.0], False),  # 8.8 dB
        ("int8", [float("nan"), 9.0], False),
    ],
)
def test_each_precision_has_its_bound(precision, found, passes):
    expected = Table([[10.0, 9.0 if found[1] != 9.97 else 9.95]] * 17)
    if passes:
        exporters.check(expected, Table([found] * 17), NUMBERED, precision)
    else:
        with pytest.raises(DataError, match="does not answer as its checkpoint"):
            exporters.check(expected, Table([found] * 17), NUMBERED, precision)


def test_batches_do_not_exceed_the_largest():
    first, second = Table([[1.0, 0.0]] * 17), Table([[1.0, 0.0]] * 17)
    exporters.check(first, second, NUMBERED, max_batch=4)
    assert first.batches == second.batches == [1, 2, 4, 4, 4, 2]


def test_images_of_a_batch_get_the_first_ones_size_and_stay_whole():
    """What is cut off may be what the image shows, and int8 then seems to answer worse than it does."""
    corner = Image.new("RGB", (7, 4))
    corner.putpixel((6, 3), (255, 255, 255))
    first, second = exporters.alike([Image.new("RGB", (5, 9)), corner])
    assert first.size == second.size == (5, 9)
    assert second.getpixel((4, 8)) > (100, 100, 100)


# --- int8 --------------------------------------------------------------------------------------------------------


def sure(**options) -> checkpoint.Trained:
    """A model whose classes stand clear of one another."""
    trained = tiny(**options)
    nn.init.normal_(trained.model.head.weight, std=2.0)
    return trained


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    trained = sure()
    images = exporters.photographs() * 2
    file = tmp_path_factory.mktemp("int8") / "int8.onnx"
    stages = []
    options = GraphOptions(precision="int8", calib=images)
    report = to_onnx.export(trained, file, options=options, on_stage=stages.append)
    return trained, file, report, stages


def test_int8_is_scored_on_the_held_out_half(int8):
    trained, file, report, stages = int8
    assert stages == ["trace", "optimise", "quantise", "check", "parity"]
    assert (report.held_out.images, report.held_out.measure, report.held_out.fp32) == (10, "agreement", 1.0)
    held = torch.stack([prepare(image, trained.preprocessing) for image in (exporters.photographs() * 2)[1::2]])
    first = torch_predictor(trained, "cpu").logits(held).argmax(1)
    second = run(file, normalise(held, trained.preprocessing).numpy()).argmax(1)
    assert report.held_out.exported == np.mean(first.numpy() == second)
    assert report.held_out.drop == pytest.approx(100 * (1 - report.held_out.exported))
    ops = counted(onnx.load(file))
    assert ops["QuantizeLinear"] > 0
    assert ops["DequantizeLinear"] > 0
    assert report.parity.snr > 10


@pytest.mark.usefixtures("traced")
def test_a_drop_beyond_the_limit_leaves_nothing(tmp_path, monkeypatch):
    from vitcli.exporters import _int8

    monkeypatch.setattr(_int8, "quantise", lambda *_, **__: None)
    monkeypatch.setattr(to_onnx, "_score", lambda *_: exporters.HeldOut(50, "labels", 0.8, 0.78, 2.0))
    options = GraphOptions(precision="int8", calib=exporters.photographs(), max_drop=1.5)
    with pytest.raises(DataError, match=r"int8 loses 2.00 points of top-1 on 50 held-out images, more than --max-drop"):
        to_onnx.export(tiny(), tmp_path / "model.onnx", options=options)
    assert not list(tmp_path.iterdir())


def test_top1_is_counted_against_labels_where_there_are_some():
    first, second = Table([[1.0, 0.0]] * 17), Table([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 13)
    scores = to_onnx._score(first, second, NUMBERED[:8], [0] * 6 + [1] * 2)
    assert (scores.measure, scores.fp32, scores.exported, scores.drop) == ("labels", 0.75, 0.75, 0.0)
    scores = to_onnx._score(first, second, NUMBERED[:8], None)
    assert (scores.measure, scores.fp32, scores.exported, scores.drop) == ("agreement", 1.0, 0.5, 50.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int8"}, RecipeError, "--int8 and --calib"),
        ({"calib": exporters.photographs()}, RecipeError, "--int8 and --calib"),
        ({"precision": "int8", "calib": exporters.photographs()[:1]}, DataError, "1 images are not enough"),
        ({"max_batch": 0}, RecipeError, "--max-batch 0"),
    ],
)
def test_options_that_cannot_be_are_refused_before_work(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        to_onnx.export(tiny(), tmp_path / "new" / "model.onnx", options=GraphOptions(**options))
    assert not list(tmp_path.iterdir())


# --- preprocessing inside ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("mode", "bound"), [("normalise", 1e-5), ("full", 1e-2)])
def test_a_file_that_prepares_images_answers_as_the_checkpoint(tmp_path, mode, bound):
    trained = replace(tiny(), preprocessing=Preprocessing(res=(32, 32), resize=36, interpolation="bicubic"))
    report = to_onnx.export(trained, tmp_path / "model.onnx", options=GraphOptions(preprocess=mode))
    assert report.parity.difference <= bound * max(1, report.parity.largest)
    assert metadata(tmp_path / "model.onnx")["preprocess"] == mode
    photographs = exporters.photographs()
    prepared = torch.stack([prepare(image, trained.preprocessing) for image in photographs])
    given = photographs if mode == "full" else [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in prepared]
    expected = torch_predictor(trained, "cpu").logits(prepared).numpy()
    found = run(tmp_path / "model.onnx", np.stack([np.asarray(image) for image in given]))
    assert np.abs(found - expected).max() <= bound * max(1, np.abs(expected).max())


# --- Disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk():
    """No file grows beyond 20 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("traced", "full_disk")
def test_a_full_disk_leaves_neither_the_model_nor_its_data(tmp_path, monkeypatch):
    monkeypatch.setattr(_graph, "ONE_FILE", 0)
    with pytest.raises(StorageError, match="cannot write"):
        to_onnx.export(tiny(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("target", ["google", "huggingface", "timm", "torchvision"])
def test_a_full_disk_leaves_nothing_of_weights(tmp_path, target):
    with pytest.raises(StorageError, match="cannot write"):
        exporters.target(target).export(tiny(activation="gelu"), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("place", "reason"), [("file/m.onnx", "file is a file"), ("file/a/m.onnx", "Not a directory")])
def test_a_file_where_a_folder_should_be(tmp_path, place, reason):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=reason), exporters.place_for(tmp_path / place):
        pass


def test_a_folder_without_permission(tmp_path):
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from vitcli.errors import StorageError\n"
        "from vitcli.exporters import place_for\n"
        "os.geteuid() or os.setuid(65534)\n"  # root may write everywhere
        "try:\n"
        "    with place_for(Path(sys.argv[1])):\n"
        "        pass\n"
        "except StorageError as error:\n"
        "    print(error.exit_code, error)\n"
    )
    tmp_path.chmod(0o500)
    command = [sys.executable, "-c", program, str(tmp_path / "model.onnx")]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.stdout == f"74 cannot write {tmp_path / 'model.onnx'}: Permission denied\n", said.stderr
    assert not list(tmp_path.iterdir())


def test_fp16_beyond_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(_graph, "ONE_FILE", 0)
    trained = tiny()
    to_onnx.export(trained, tmp_path / "big.onnx", options=GraphOptions(precision="fp16"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    images = exporters.sample(trained.preprocessing, None)
    expected = torch_predictor(trained, "cpu").logits(images)
    assert torch.allclose(OnnxPredictor(tmp_path / "big.onnx").logits(images), expected, atol=1e-2 * expected.max())


# --- The snippet -------------------------------------------------------------------------------------------------


def pasted(snippet: str, image: Path, folder: Path) -> str:
    """What the snippet prints in a Python that knows nothing of vitcli."""
    (folder / "snippet.py").write_text(snippet.replace("photo.jpg", str(image)))
    ended = subprocess.run([sys.executable, "-I", "snippet.py"], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_the_snippet_gives_the_checkpoints_answer(tmp_path, half):
    trained, _, report, _ = half
    assert "vitcli" not in report.snippet
    assert "torch" not in report.snippet
    photograph = tmp_path / "photo.png"
    Image.fromarray(load_sample_images().images[1]).save(photograph)
    prepared = prepare(decode(photograph), trained.preprocessing)[None]
    answer = CLASSES[torch_predictor(trained, "cpu").logits(prepared).argmax()]
    assert pasted(report.snippet, photograph, tmp_path) == answer


PREPARINGS = [
    {"res": (32, 24)},
    {"res": (24, 32), "resize": 40, "interpolation": "bicubic"},
    {"res": (24, 24), "resize": 30, "interpolation": "nearest"},
    {"res": (32, 32), "resize": 33, "interpolation": "area"},
    {"res": (32, 48), "interpolation": "bilinear", "antialias": False},
    {"res": (32, 32), "resize": 50, "interpolation": "bicubic", "antialias": False},
]


@pytest.mark.parametrize("options", PREPARINGS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_snippet_prepares_as_we_do(options, tmp_path):
    preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), **options)
    photograph = tmp_path / "photo.png"
    Image.fromarray(load_sample_images().images[0][:100, :140]).save(photograph)
    text = _snippet.snippet("model.onnx", preprocessing, "none", tokens=False).replace("photo.jpg", str(photograph))
    start, end = text.index("session ="), text.index("image = ImageOps")
    space: dict = {}
    exec(text[:start] + text[end : text.index("answer =")], space)  # our own text, and the point of the test
    expected = normalise(prepare(decode(photograph), preprocessing)[None], preprocessing)[0].permute(1, 2, 0).numpy()
    levels = np.abs(space["pixels"] - expected) * np.float32(preprocessing.std) * 255
    exact = preprocessing.interpolation != "area" and preprocessing.antialias
    assert levels.max() <= (0.01 if exact else 1.01)  # torch rounds between rows and columns, and sums round ties


# --- The command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run folder of a model for the digits, never trained."""
    place = tmp_path_factory.mktemp("runs") / "digits"
    loaded = recipe.load("quickstart", ["model.depth=1"])
    torch.manual_seed(0)
    model = loaded.model.build(10, (8, 8))
    nn.init.normal_(model.head.weight)
    (place / "checkpoints").mkdir(parents=True)
    checkpoint.save_model(place / "best", model.state_dict(), loaded, tuple("0123456789"), 1)
    return place


@pytest.fixture
def vit(capsys, monkeypatch, tmp_path) -> Vit:
    monkeypatch.chdir(tmp_path)
    return Vit(capsys, monkeypatch)


def test_the_command_reports_and_stores(vit, folder):
    said = vit("export", "--onnx", "--fp16", "--res", 12, "--ckpt", folder, "--max-batch", 8)
    assert said.code == 0, said.err
    file = folder / "export" / "model_12_fp16.onnx"
    assert file.is_file()
    report = json.loads((folder / "export" / "report.json").read_text())
    assert report["file"] == str(file)
    assert report["precision"] == "fp16"
    assert report["parity_images"] == "the run's validation images"
    assert report["parity"]["agreement"] > 0.9
    assert report["parity"]["snr"] > 40
    assert report["snippet"] in said.out
    assert "--maxShapes=pixel_values:8x3x12x12" in report["trtexec"]
    assert str(file) in said.out
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["trace", "optimise", "check", "parity"]
    found = metadata(file)
    assert len(found["source_sha256"]) == 64
    assert json.loads(found["recipe"])["batch"] == 32
    assert str(folder) not in file.read_bytes().decode("latin-1")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--onnx", "--opset", "17"], 2, "--opset 17 is not possible"),
        (["--onnx", "--opset", "26"], 2, "--opset 26 is not possible"),
        (["--onnx", "--res", "9"], 2, "resolution 9x9 is not divisible by 2; the nearest is 8"),
        (["--onnx", "--fp16", "--int8", "--calib", "full"], 2, "--fp16 does not go with --int8"),
        (["--onnx", "--int8"], 2, "--int8 needs images to calibrate on"),
        (["--onnx", "--calib", "full"], 2, "--calib has no effect without --int8"),
        (["--onnx", "--max-drop", "1"], 2, "--max-drop has no effect without --int8"),
        (["--onnx", "--int8", "--calib", "empty"], 3, "no images in empty"),
        (["--onnx", "--int8", "--calib", "absent"], 3, "absent is not a folder"),
        (["--onnx", "--int8", "--calib", "bad"], 3, "bad/b.png: not an image"),
        (["--onnx", "--int8", "--calib", "one"], 3, "1 images are not enough"),
        (["--onnx", "--parity-images", "empty"], 3, "no images in empty"),
        (["--onnx", "--parity-images", "bad"], 3, "bad/b.png: not an image"),
        (["--to", "google", "--fp16"], 2, "--fp16 has no effect with --to google"),
        (["--to", "google", "--opset", "20"], 2, "--opset has no effect with --to google"),
        (["--to", "google", "--max-batch", "8"], 2, "--max-batch has no effect with --to google"),
        (["--to", "google", "--int8", "--calib", "full"], 2, "--int8 has no effect with --to google"),
        (["--onnx", "--to", "google"], 2, "--onnx does not go with --to google"),
        (["--onnx", "-o", "full/a.png/model.onnx"], 74, "cannot write"),
        ([], 2, "no format given"),
    ],
)
def test_a_mistake_is_one_line(vit, folder, tmp_path, options, code, message):
    for name in ("full", "empty", "bad", "one"):
        (tmp_path / name).mkdir()
    for place in ("full/a.png", "full/b.png", "bad/a.png", "one/a.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / place)
    (tmp_path / "bad" / "b.png").write_bytes(b"no image")
    before = sorted(tmp_path.rglob("*"))
    said = vit("export", *options, "--ckpt", folder)
    assert said.code == code, said.err
    assert said.out == ""
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "a bug" not in said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_calibration_folders_give_labels_where_the_model_knows_them(tmp_path):
    from vitcli.commands import export as export_command

    trained = replace(tiny(), classes=("cat", "dog", "owl", "elk", "emu"))
    for name in ("owl/a", "owl/b", "cat/c"):
        (tmp_path / "known" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "known" / f"{name}.png")
    files, labels = export_command._calibration(tmp_path / "known", trained)
    assert (len(files), labels) == (3, [0, 2, 2])
    assert files[2].size == (9, 9)
    Image.new("RGB", (9, 9)).save(tmp_path / "known" / "plain.png")
    assert export_command._calibration(tmp_path / "known", trained)[1] is None


def test_a_large_folder_is_taken_evenly(tmp_path):
    from vitcli.commands import export as export_command

    for number in range(20):
        Image.new("RGB", (1, 1)).save(tmp_path / f"{number:02d}.png")
    files = export_command._files(tmp_path, 8)
    assert [Path(path).stem for path in files.paths] == ["00", "03", "06", "09", "12", "15", "18"]


def test_stages_are_shown_on_a_terminal_and_told_elsewhere():
    import io

    from rich.console import Console

    from vitcli.report.stages import Stages

    for terminal in (True, False):
        shown = io.StringIO()
        with Stages(Console(file=shown, force_terminal=terminal, width=80)) as stages:
            stages.begin("trace")
            stages.begin("parity")
        assert "trace" in shown.getvalue()
        assert "parity" in shown.getvalue()
        assert ("✓" in shown.getvalue()) is terminal
        assert ("trace: 0.0 s" in shown.getvalue()) is not terminal
        assert "0.0 s" in shown.getvalue()


# --- DeiT-Tiny on real images ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deit(shared):
    trained = checkpoint.load(shared / "data" / "deit_tiny_patch16_224.pth")
    files = sorted((shared / "data" / "imagenet200").glob("*/*.JPEG"))
    assert len(files) == 200
    return trained, [decode(file) for file in files], [trained.classes.index(file.parent.name) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
def test_deit_tiny_in_fp16(tmp_path, deit, opset):
    trained, images, _ = deit
    options = GraphOptions(precision="fp16", opset=opset)
    report = to_onnx.export(trained, tmp_path / "deit.onnx", images=images, options=options)
    print(report)
    assert report.parity.images == 200
    assert report.parity.agreement >= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
def test_deit_tiny_in_int8(tmp_path, deit, opset):
    trained, images, labels = deit
    options = GraphOptions(opset=opset)
    whole = to_onnx.export(trained, tmp_path / "fp32.onnx", images=images[:20], options=options)
    options = GraphOptions(opset=opset, precision="int8", calib=images, labels=labels, max_drop=1.0)
    report = to_onnx.export(trained, tmp_path / "int8.onnx", images=images, options=options)
    print(report)
    assert report.held_out.images == 100
    assert report.megabytes <= 0.3 * whole.megabytes
