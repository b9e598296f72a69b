"""Linear layers in INT8: what is quantised, how, and what it costs."""

import shutil
from pathlib import Path

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vitcli import exporters
from vitcli.checkpoint import Trained
from vitcli.checkpoint import load as load_checkpoint
from vitcli.data import Preprocessing
from vitcli.data.images import decode
from vitcli.data.preprocess import normalise, prepare
from vitcli.errors import RecipeError
from vitcli.exporters import _int8
from vitcli.exporters import onnx as to_onnx
from vitcli.exporters.onnx import GraphOptions
from vitcli.model import ViTConfig

TINY = {"width": 48, "depth": 2, "mlp_dim": 96, "heads": 4, "patch": 8}


@pytest.fixture(autouse=True, scope="module")
def no_shape_checks():
    """While torch traces a model, comparing shapes would turn the free batch into a number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(scope="module", params=[20, pytest.param(23, marks=pytest.mark.slow)])
def exported(tmp_path_factory, request) -> tuple[Path, Trained]:
    config = ViTConfig.parse(TINY)
    torch.manual_seed(0)
    model = config.build(5, (32, 32)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    trained = Trained(model, config, tuple("abcde"), (32, 32), Preprocessing(res=(32, 32)), "a random model")
    file = tmp_path_factory.mktemp("export") / "model.onnx"
    to_onnx.export(trained, file, options=GraphOptions(opset=request.param))
    return file, trained


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Ten photographs as the model sees them."""
    p = Preprocessing(res=(32, 32))
    return normalise(exporters.sample(p, None), p).numpy()


@pytest.fixture
def file(tmp_path, exported) -> Path:
    (tmp_path / "model.onnx").write_bytes(exported[0].read_bytes())
    return tmp_path / "model.onnx"


def run(file: Path, pixels: np.ndarray, optimise: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": pixels})[0]


def snr(expected: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum()))


def kinds(file: Path) -> list[str]:
    return [node.op_type for node in onnx.load(file).graph.node]


def test_every_linear_layer_is_symmetric_int8_per_channel(file, exported, pixels, capfd):
    before = onnx.load(file)
    _int8.quantise(file, [pixels[:6], pixels[6:]])
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(file), full_check=True)
    after = onnx.load(file)
    assert after.opset_import == before.opset_import
    assert {entry.domain for entry in after.opset_import} == {""}
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)
    assert after.metadata_props == before.metadata_props

    maker = {output: node for node in after.graph.node for output in node.output}
    constant = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    layers = _int8.layers(before.graph)
    names = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert {layer.name for layer in layers} == {*names, "head"}
    written = {node.name: node for node in after.graph.node}
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in before.graph.initializer}
    for layer in layers:
        given, weight = (maker[name] for name in written[layer.node.name].input[:2])
        assert given.op_type == weight.op_type == "DequantizeLinear"
        (rounding,) = [node for node in after.graph.node if node.output[0] == given.input[0]]
        assert rounding.op_type == "QuantizeLinear"
        assert list(rounding.input)[1:] == list(given.input)[1:]
        assert constant[rounding.input[2]].dtype == np.int8
        assert constant[rounding.input[2]] == 0
        whole, scale = (constant[name] for name in weight.input)
        original = weights[layer.node.input[1]]
        assert whole.dtype == np.int8
        assert scale.shape == (original.shape[layer.axis],)
        assert weight.attribute[0].i == layer.axis
        assert np.abs(whole.astype(int)).max(1 - layer.axis).tolist() == [127] * len(scale)
        error = np.abs(whole * np.expand_dims(scale, 1 - layer.axis) - original)
        assert (error <= np.expand_dims(scale, 1 - layer.axis) * 0.5001).all()
    assert kinds(file).count("Conv") == 1
    assert "blocks.0.mlp.fc1.weight" not in constant


def test_the_answer_is_near(file, exported, pixels):
    before = run(file, pixels)
    _int8.quantise(file, [pixels])
    for batch in (1, 2, 7):
        assert run(file, pixels[:batch]).shape == (batch, 5)
    assert snr(before, run(file, pixels)) > 25
    assert snr(before, run(file, pixels, optimise=False)) > 25
    assert file.stat().st_size < exported[0].stat().st_size


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["head"], {"head"}),
        (["blocks.0.mlp"], {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}),
        (["*.qkv"], {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}),
        (["*.fc2", "head"], {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2", "head"}),
    ],
)
def test_skipped_layers_stay_as_they_are(file, pixels, skip, left):
    weights = {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}
    _int8.quantise(file, [pixels], skip=skip)
    after = onnx.load(file).graph
    assert {layer.name for layer in _int8.layers(after)} == left
    for layer in _int8.layers(after):
        assert weights[layer.node.input[1]] in after.initializer


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (["blocks.0.mlp.fc3"], "did you mean blocks.0.mlp.fc[12]"),
        (["block"], "no linear layer"),
        (["blocks.7"], "no linear"),
        (["*"], "leaves no linear layer"),
    ],
)
def test_a_wrong_skip_is_told(file, pixels, skip, message):
    before = file.read_bytes()
    with pytest.raises(RecipeError, match=message):
        _int8.quantise(file, [pixels], skip=skip)
    assert file.read_bytes() == before
    assert len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize("percentile", [0, -1, 100.1, float("nan")])
def test_a_wrong_percentile_is_told(file, pixels, percentile):
    with pytest.raises(RecipeError, match="--percentile"):
        _int8.quantise(file, [pixels], percentile=percentile)


@pytest.mark.parametrize("percentile", [50, 99, 99.999, 100])
def test_the_range_is_the_percentile_of_all_values(file, pixels, percentile):
    layer = next(layer for layer in _int8.layers(onnx.load(file).graph) if layer.name == "blocks.1.mlp.fc2")
    name = layer.node.input[0]
    seen = np.abs(_int8._session(file, [name]).run([name], {"pixel_values": pixels})[0])
    found = _int8._ranges(file, [name], [pixels[:3], pixels[3:]], percentile)[name]
    assert abs((seen >= found).sum() - max(1, (1 - percentile / 100) * seen.size)) <= 1


def test_weights_beside_the_file_become_part_of_it(tmp_path, file, pixels):
    big = tmp_path / "big" / "model.onnx"
    big.parent.mkdir()
    onnx.save(onnx.load(file), big, save_as_external_data=True, location="model.onnx.data")
    _int8.quantise(big, [pixels])
    _int8.quantise(file, [pixels])
    assert [path.name for path in big.parent.iterdir()] == ["model.onnx"]
    assert np.array_equal(run(big, pixels), run(file, pixels))


def test_weights_too_large_for_one_file_stay_beside_it(file, pixels, monkeypatch):
    monkeypatch.setattr(_int8._graph, "ONE_FILE", 1000)
    _int8.quantise(file, [pixels])
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    onnx.checker.check_model(str(file), full_check=True)
    assert run(file, pixels).shape == (10, 5)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
def test_deit_tiny_on_real_images(tmp_path, shared, opset):
    trained = load_checkpoint(shared / "data" / "deit_tiny_patch16_224.pth")
    paths = sorted((shared / "data" / "imagenet200").glob("*/*.JPEG"))
    lines = (shared / "data" / "imagenet_synset_words.txt").read_text().splitlines()
    names = [line.split()[0] for line in lines]
    labels = np.array([names.index(path.parent.name) for path in paths])
    p = trained.preprocessing
    pixels = normalise(torch.stack([prepare(decode(path), p) for path in paths]), p).numpy()
    file = tmp_path / "deit.onnx"
    to_onnx.export(trained, file, options=GraphOptions(opset=opset))
    before = np.concatenate([run(file, part) for part in np.split(pixels, 20)])
    after = np.empty_like(before)
    for half in (0, 1):  # each calibrates for the other, so that every image is held out once
        int8 = tmp_path / f"{half}.onnx"
        shutil.copy(file, int8)
        _int8.quantise(int8, np.split(pixels[half::2], 25))
        after[1 - half :: 2] = np.concatenate([run(int8, part) for part in np.split(pixels[1 - half :: 2], 10)])
        assert int8.stat().st_size <= 0.3 * file.stat().st_size
    shares = [np.exp(x - x.max(1, keepdims=True)) for x in (before, after)]
    first, second = (x / x.sum(1, keepdims=True) for x in shares)
    right = [float((logits.argmax(1) == labels).mean()) for logits in (before, after)]
    alike = float((before.argmax(1) == after.argmax(1)).mean())
    print(
        f"\nopset {opset}: fp32 {right[0]:.3f}, int8 {right[1]:.3f}, alike {alike:.3f}, {snr(before, after):.1f} dB, "
        f"probabilities differ by at most {np.abs(first - second).max():.3f}"
    )
    assert right[0] - right[1] <= 0.01 + 1e-9
    assert alike >= 0.97
    assert snr(before, after) > 17
