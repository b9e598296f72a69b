from types import SimpleNamespace

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command import Vit
from PIL import Image
from test_export import tiny

from vitcli.data.preprocess import normalise
from vitcli.errors import CheckpointError, UserError
from vitcli.exporters import onnx as to_onnx
from vitcli.onnx import providers as onnx_providers
from vitcli.onnx import session as onnx_session
from vitcli.onnx.model import OnnxPredictor
from vitcli.onnx.session import Session

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
gpu_build = pytest.mark.skipif(
    "TensorrtExecutionProvider" not in onnxruntime.get_available_providers(), reason="CPU build of ORT"
)


@pytest.fixture(scope="module")
def trained():
    return tiny()


@pytest.fixture(scope="module")
def file(tmp_path_factory, trained):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        path = tmp_path_factory.mktemp("session") / "model.onnx"
        to_onnx.export(trained, path)
    return path


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (11, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("piece", [1, 4, 11, 64])
def test_a_bound_session_answers_as_a_plain_one(monkeypatch, trained, file, images, piece):
    monkeypatch.setattr(onnx_session, "PIECE", piece)
    pixels = normalise(images, trained.preprocessing).numpy()
    (expected,) = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(
        None, {"pixel_values": pixels}
    )
    session, seen = Session(file, onnx.load(file), "cpu"), []

    def prepare(some):
        seen.append(len(some))
        return normalise(some, trained.preprocessing)

    found = session.run(images, prepare)
    assert found.dtype == torch.float32
    assert found.shape == (11, 5)
    assert np.abs(found.numpy() - expected).max() <= 1e-5
    assert sum(seen) == 11
    assert max(seen) <= piece


def test_torch_leaves_the_cores_to_onnx_runtime(file, images):
    """Its threads would spin beside those of ONNX Runtime, which then took three times as long (2 cores)."""
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        session = Session(file, onnx.load(file), "cpu")
        session.run(images, lambda some: seen.append(torch.get_num_threads()) or some.float())
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_channels_last_and_sliced_images_are_read_rightly(trained, file, images):
    predictor = OnnxPredictor(file, "cpu")
    expected = predictor.logits(images)
    assert torch.equal(predictor.logits(images.to(memory_format=torch.channels_last)), expected)
    doubled = images.repeat_interleave(2, dim=0)
    assert torch.equal(predictor.logits(doubled[::2]), expected)


def test_answers_do_not_share_memory(file, images):
    predictor = OnnxPredictor(file, "cpu")
    first = predictor.logits(images[:2])
    kept = first.clone()
    predictor.logits(images[2:4])
    assert torch.equal(first, kept)


def test_the_ends_of_the_graph(file):
    session = Session(file, onnx.load(file), "cpu")
    assert session.provider == "CPUExecutionProvider"
    assert session.inputs == {"pixel_values": ["batch", 3, 32, 32]}
    assert session.outputs == {"logits": ["batch", 5]}


@without_gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_without_a_gpu_none_is_pretended(file, capfd, provider):
    with pytest.raises(UserError, match=f"--provider {provider}: no CUDA device") as caught:
        OnnxPredictor(file, provider)
    assert caught.value.exit_code == 2
    assert "--provider cpu" in caught.value.hint
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def pretended(monkeypatch):
    """A machine whose GPU torch sees, and whose libraries ONNX Runtime does not find."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=1, device_index=0))


@without_gpu
@gpu_build
@pytest.mark.usefixtures("pretended")
def test_a_provider_that_does_not_load_is_an_error_with_its_reason(file, capfd):
    with pytest.raises(UserError, match=r"--provider tensorrt: lib[\w.]+ is missing") as caught:
        OnnxPredictor(file, "tensorrt")
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@without_gpu
@gpu_build
@pytest.mark.usefixtures("pretended")
def test_only_auto_takes_the_cpu_in_its_stead(file, monkeypatch, capfd):
    monkeypatch.setattr(onnx_providers, "why_not", lambda provider: ("libx.so.1 is missing", "pip install x"))
    with pytest.raises(UserError, match=r"--provider cuda: libx\.so\.1 is missing") as caught:
        OnnxPredictor(file, "cuda")
    assert caught.value.hint == "pip install x"
    with pytest.warns(UserWarning, match=r"computes on the CPU: libx\.so\.1 is missing. pip install x"):
        session = Session(file, onnx.load(file), "auto")
    assert session.provider == "CPUExecutionProvider"
    assert capfd.readouterr() == ("", "")


@without_gpu
@pytest.mark.usefixtures("pretended")
def test_a_build_without_the_provider_is_said(file, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="this onnxruntime has no tensorrt") as caught:
        Session(file, onnx.load(file), "tensorrt")
    assert caught.value.hint == "pip install onnxruntime-gpu"


def test_a_graph_that_onnx_runtime_refuses(tmp_path, file):
    model = onnx.load(file)
    model.graph.node[3].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="cannot run it"):
        Session(tmp_path / "model.onnx", model, "cpu")


def test_names_in_a_graph_cannot_colour_the_terminal(tmp_path, file, capsys, monkeypatch):
    """ONNX Runtime quotes them in what it complains of."""
    model = onnx.load(file)
    model.graph.node[3].input[0] = "\x1b[31mred\x07"
    onnx.save(model, tmp_path / "model.onnx")
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    said = Vit(capsys, monkeypatch)("predict", "--ckpt", tmp_path / "model.onnx", tmp_path / "image.png")
    assert said.code == 4
    assert r"'\x1b[31mred\x07'" in said.err
    assert all(line.isprintable() for line in said.err.splitlines())


def test_settings_that_keep_the_checkpoints_answer(file):
    model = onnx.load(file)
    assert onnx_session._settings(model, "cuda")["use_tf32"] == "0"
    settings = onnx_session._settings(model, "tensorrt")
    assert settings["trt_profile_min_shapes"] == "pixel_values:1x3x32x32"
    assert settings["trt_profile_max_shapes"] == f"pixel_values:{onnx_session.PIECE}x3x32x32"
    assert settings["trt_fp16_enable"] == settings["trt_int8_enable"] == "0"
    model.graph.initializer[0].data_type = onnx.TensorProto.FLOAT16
    model.graph.node[0].op_type = "QuantizeLinear"
    settings = onnx_session._settings(model, "tensorrt")
    assert settings["trt_fp16_enable"] == settings["trt_int8_enable"] == "1"
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(UserError, match="any size"):
        onnx_session._settings(model, "tensorrt")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("piece", [3, 64])
def test_the_gpu_answers_as_the_cpu(monkeypatch, file, images, piece):
    monkeypatch.setattr(onnx_session, "PIECE", piece)
    expected, predictor = OnnxPredictor(file, "cpu").logits(images), OnnxPredictor(file, "cuda")
    for _ in range(20):  # buffers that were given back too early would show
        assert torch.allclose(predictor.logits(images), expected, atol=1e-3)
