import hashlib
import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.external_data_helper import set_external_data
from onnxscript import ir
from PIL import Image

from vitcli import exporters
from vitcli.checkpoint import Trained
from vitcli.checkpoint import load as load_checkpoint
from vitcli.data import Preprocessing
from vitcli.data.images import decode
from vitcli.data.preprocess import normalise
from vitcli.errors import CheckpointError, DataError, RecipeError, StorageError, UserError
from vitcli.exporters import _graph
from vitcli.exporters import onnx as to_onnx
from vitcli.exporters.onnx import GraphOptions
from vitcli.inference import torch_predictor
from vitcli.model import ViTConfig
from vitcli.onnx import model as onnx_model
from vitcli.onnx import providers as onnx_providers
from vitcli.onnx.model import OnnxPredictor

TINY = {"width": 48, "depth": 2, "mlp_dim": 96, "heads": 4, "patch": 8}


@pytest.fixture(autouse=True, scope="module")
def no_shape_checks():
    """While torch traces a model, comparing shapes would turn the free batch into a number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


CLASSES = ("tench", "=SUM(A1)", "Glühwürmchen", "owl", "\x1b[31mred")


def tiny(size=(32, 32), **options) -> Trained:
    """A model with random weights everywhere, the head's too, so that every class can win."""
    config = ViTConfig.parse(TINY | options)
    torch.manual_seed(0)
    model = config.build(len(CLASSES), size).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    torch.nn.init.normal_(model.head.weight, std=0.5)
    preprocessing = Preprocessing(res=size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return Trained(model, config, CLASSES, size, preprocessing, "a random model")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Trained, Path, exporters.Report]:
    trained = tiny()
    file = tmp_path_factory.mktemp("export") / "model.onnx"
    return trained, file, to_onnx.export(trained, file)


def hold_against_checkpoint(trained: Trained, file: Path, opset: int) -> None:
    """The file, run by plain ONNX Runtime, against the model, run by plain torch, on real images."""
    proto = onnx.load(file)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": opset}
    assert [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [
        "batch", 3, *trained.image_size,
    ]  # fmt: skip
    assert [i.name for i in proto.graph.input] + [o.name for o in proto.graph.output] == ["pixel_values", "logits"]
    assert [child.name for child in file.parent.iterdir()] == [file.name]

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    images = normalise(exporters.sample(trained.preprocessing, None), trained.preprocessing)
    with torch.no_grad():
        expected = trained.model(images).numpy()
    for batch in (1, 2, 7):
        found = np.concatenate([session.run(None, {"pixel_values": part.numpy()})[0] for part in images.split(batch)])
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
        assert (found.argmax(-1) == expected.argmax(-1)).all()


ODD = {
    "token": ({}, (32, 32)),
    "gap": ({"pool": "gap", "registers": 3, "layerscale": 0.5, "qk_norm": True}, (32, 32)),
    "map": ({"pool": "map", "activation": "gelu", "representation_size": 24}, (32, 48)),
    "none": ({"pool": "none", "posemb": "sincos2d", "registers": 1}, (48, 32)),
    "mae": ({"pool": "gap", "class_token": True, "posemb": "sincos2d_mae", "dropout": 0.1, "drop_path": 0.1}, (32, 32)),
    "hybrid": ({"patch": 1, "stem": {"layers": [1, 1], "width": 32}}, (64, 64)),
    "root": ({"patch": 2, "stem": {"layers": [], "width": 32}, "posemb": "none", "pool": "gap"}, (64, 64)),
    "no encoder": ({"depth": 0, "pool": "gap", "posemb": "none"}, (32, 32)),
}
FAST = {("token", 18), ("gap", 20), ("map", 23), ("none", 20)}


@pytest.mark.parametrize(
    ("name", "opset"),
    [
        pytest.param(name, opset, marks=[] if (name, opset) in FAST else pytest.mark.slow)
        for name in ODD
        for opset in (18, 20, 23)
    ],
)
def test_the_file_answers_as_the_model(tmp_path, capfd, name, opset):
    options, size = ODD[name]
    trained = tiny(size, **options)
    report = to_onnx.export(trained, tmp_path / "model.onnx", options=GraphOptions(opset=opset))
    assert capfd.readouterr() == ("", "")
    hold_against_checkpoint(trained, tmp_path / "model.onnx", opset)
    assert report.parity.agreement == 1
    assert report.parity.images == 10
    assert report.parity.difference <= 1e-5 * max(1, report.parity.largest)
    assert report.parity.largest > 0.1
    assert report.details["opset"] == opset
    predictor = OnnxPredictor(tmp_path / "model.onnx")
    assert predictor.classes == CLASSES
    assert predictor.preprocessing == trained.preprocessing
    images = exporters.sample(trained.preprocessing, None)
    assert torch.allclose(predictor.logits(images), torch_predictor(trained, "cpu").logits(images), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [19, 21, 22, 24, 25])
def test_every_other_opset(tmp_path, opset):
    trained = tiny()
    to_onnx.export(trained, tmp_path / "model.onnx", options=GraphOptions(opset=opset))
    hold_against_checkpoint(trained, tmp_path / "model.onnx", opset)


@pytest.mark.parametrize("opset", [17, 26])
def test_an_opset_that_torch_writes_wrongly_is_refused_before_work(tmp_path, opset):
    with pytest.raises(RecipeError, match=f"opset {opset}"):
        to_onnx.export(tiny(), tmp_path / "new" / "model.onnx", options=GraphOptions(opset=opset))
    assert not list(tmp_path.iterdir())


def test_metadata(tmp_path, exported):
    trained, file, report = exported
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert tuple(json.loads(metadata["classes"])) == CLASSES
    assert Preprocessing.parse(json.loads(metadata["preprocessing"])) == trained.preprocessing
    assert ViTConfig.parse(json.loads(metadata["model"])) == trained.config
    assert metadata["opset"] == "20"
    assert report.megabytes == round(file.stat().st_size / 1e6, 1)

    source = tmp_path / "weights.bin"
    source.write_bytes(b"weights")
    found = to_onnx._metadata(trained, GraphOptions(), source)
    assert found["source_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert not {"source_sha256", "recipe"} & to_onnx._metadata(trained, GraphOptions(), tmp_path).keys()


def test_nothing_of_this_machine_is_in_the_file(exported):
    content = exported[1].read_bytes()
    for trace in (str(Path.home()), os.getcwd(), str(Path(torch.__file__).parents[1]), "site-packages", ".py", "/tmp"):
        assert trace.encode() not in content, trace


@pytest.fixture
def traced(exported, monkeypatch):
    """Take the model that was traced before, which saves seconds."""
    monkeypatch.setattr(to_onnx, "_trace", lambda *_: ir.load(exported[1]))


@pytest.mark.usefixtures("traced")
def test_the_given_images_are_used(tmp_path, monkeypatch):
    seen = []
    honest = to_onnx.check

    def spy(reference, file, images, *rest, **options):
        seen.append(images)
        return honest(reference, file, images, *rest, **options)

    monkeypatch.setattr(to_onnx, "check", spy)
    given = [Image.new("RGB", (40, 50), (i, 0, 0)) for i in range(12)]
    to_onnx.export(tiny(), tmp_path / "model.onnx", images=given)
    assert seen[0][:, 0, 0, 0].tolist() == list(range(12))


def test_a_few_images_are_repeated_up_to_ten():
    images = exporters.sample(Preprocessing(res=(8, 8)), [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(3)])
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_photographs_are_ten_different_images():
    photographs = exporters.photographs()
    assert len({photograph.tobytes() for photograph in photographs}) == 10


@pytest.mark.usefixtures("traced")
def test_a_file_that_answers_otherwise_is_not_left(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"the older export")
    honest = OnnxPredictor.logits
    monkeypatch.setattr(OnnxPredictor, "logits", lambda self, images: honest(self, images) + 1e-3)
    with pytest.raises(DataError, match="does not answer as its checkpoint") as caught:
        to_onnx.export(tiny(), tmp_path / "model.onnx")
    assert caught.value.exit_code == 3
    assert (tmp_path / "model.onnx").read_bytes() == b"the older export"
    assert len(list(tmp_path.iterdir())) == 1


class Table:
    """A predictor that reads its answer for an image from the image's first pixel."""

    def __init__(self, logits):
        self.table, self.batches = torch.tensor(logits), []
        self.classes, self.preprocessing, self.origin = CLASSES, Preprocessing(res=(1, 1)), "table"

    def logits(self, images):
        self.batches.append(len(images))
        return self.table[images[:, 0, 0, 0].long()]


NUMBERED = torch.arange(17, dtype=torch.uint8).view(17, 1, 1, 1).expand(17, 3, 1, 1)


def test_check_asks_at_batches_of_one_two_and_seven():
    first, second = Table([[1.0, 0.0]] * 17), Table([[1.0, 5e-6]] * 17)
    parity = exporters.check(first, second, NUMBERED)
    assert first.batches == second.batches == [1, 2, 7, 7]
    assert (parity.images, parity.agreement, parity.largest) == (17, 1.0, 1.0)
    assert parity.difference == pytest.approx(5e-6)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ([100.0, 99.0005], True),  # within 1e-5 of 100
        ([100.0, 99.002], False),
        ([float("nan"), 99.0], False),
        ([float("inf"), 99.0], False),
    ],
)
def test_the_tolerance_is_relative_to_the_largest_logit(change, passes):
    good = [[100.0, 99.0]] * 17
    bad = [*good[:16], change]
    if passes:
        exporters.check(Table(good), Table(bad), NUMBERED)
    else:
        with pytest.raises(DataError):
            exporters.check(Table(good), Table(bad), NUMBERED)


def test_a_decided_first_class_may_not_change():
    assert exporters.check(Table([[50.0, 50.00005]] * 17), Table([[50.0, 49.9999]] * 17), NUMBERED).agreement == 0
    with pytest.raises(DataError, match=r"0\.0% of 17"):
        exporters.check(Table([[50.0, 50.00015]] * 17), Table([[50.0, 49.9999]] * 17), NUMBERED)


def test_a_full_disk_leaves_nothing(tmp_path):
    trained = tiny()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        with pytest.raises(StorageError, match="cannot write") as caught:
            to_onnx.export(trained, tmp_path / "model.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "model.onnx", tmp_path):
        with pytest.raises(StorageError, match=str(out)):
            to_onnx.export(tiny(), out)


def test_a_model_without_head_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="names no classes"):
        to_onnx.export(replace(tiny(), classes=()), tmp_path / "model.onnx")


def test_weights_beyond_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(_graph, "ONE_FILE", 0)
    trained = tiny()
    report = to_onnx.export(trained, tmp_path / "big.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert report.megabytes == round(sum(file.stat().st_size for file in tmp_path.iterdir()) / 1e6, 1)
    images = exporters.sample(trained.preprocessing, None)
    found = OnnxPredictor(tmp_path / "big.onnx").logits(images)
    assert torch.allclose(found, torch_predictor(trained, "cpu").logits(images), atol=1e-4)


def with_external(exported, folder: Path, **entry) -> Path:
    """The exported model, its first weight said to lie in another file."""
    model = onnx.load(exported[1])
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    content = tensor.raw_data
    set_external_data(tensor, **entry)
    tensor.ClearField("raw_data")
    (folder / "weights").write_bytes(content)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_external_data_beside_the_model_is_read(tmp_path, exported):
    path = with_external(exported, tmp_path, location="weights")
    images = exporters.sample(exported[0].preprocessing, None)
    assert torch.equal(OnnxPredictor(path).logits(images), OnnxPredictor(exported[1]).logits(images))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"location": "{folder}/weights"}, "not a plain file name"),
        ({"location": "/etc/hostname"}, "not a plain file name"),
        ({"location": "../weights"}, "not a plain file name"),
        ({"location": "inner/weights"}, "not a plain file name"),
        ({"location": "inner/../weights"}, "not a plain file name"),
        ({"location": "..\\weights"}, "not a plain file name"),
        ({"location": ".."}, "not a plain file name"),
        ({"location": ""}, "not a plain file name"),
        ({"location": "symbolic"}, "symbolic link"),
        ({"location": "dangling"}, "symbolic link"),
        ({"location": "hard"}, "hard link"),
        ({"location": "pipe"}, "not a regular file"),
        ({"location": "inner"}, "not a regular file"),
        ({"location": "absent"}, "is missing"),
        ({"location": "weights", "length": 1 << 60}, "shorter"),
        ({"location": "weights", "offset": 1 << 60}, "shorter"),
        ({"location": "weights", "offset": -8}, "shorter"),
    ],
)
def test_external_data_elsewhere_is_refused_before_onnx_runtime_sees_it(tmp_path, exported, monkeypatch, entry, reason):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(100_000))
    (folder / "symbolic").symlink_to(tmp_path / "secret")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "hard").hardlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    path = with_external(exported, folder, **entry | {"location": entry["location"].format(folder=folder)})
    monkeypatch.setattr(onnx_providers, "runtime", lambda: pytest.fail("ONNX Runtime was asked"))
    with pytest.raises(CheckpointError, match=reason) as caught:
        OnnxPredictor(path)
    assert caught.value.exit_code == 4


def test_external_data_inside_an_attribute_is_seen(tmp_path, exported):
    model = onnx.load(exported[1])
    value = onnx.TensorProto(data_type=1, dims=[4])
    value.raw_data = b""
    set_external_data(value, location="/etc/hostname")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=value)], "inner", [], [])
    model.graph.node.add().CopyFrom(onnx.helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="not a plain file name"):
        OnnxPredictor(tmp_path / "model.onnx")


def changed(exported, path: Path, change) -> Path:
    model = onnx.load(exported[1])
    change(model, {entry.key: entry for entry in model.metadata_props})
    onnx.save(model, path)
    return path


def drop(*keys):
    def change(model, entries):
        kept = [entry for key, entry in entries.items() if key not in keys]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)

    return change


def set_to(key, value):
    return lambda model, entries: setattr(entries[key], "value", value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("classes"), "has no classes in its metadata"),
        (drop("preprocessing"), "has no preprocessing in its metadata"),
        (drop("classes", "preprocessing"), "no classes and no preprocessing"),
        (set_to("classes", "[1, 2]"), "unusable metadata"),
        (set_to("classes", "["), "unusable metadata"),
        (set_to("classes", '{"tench": 0}'), "unusable metadata"),
        (set_to("classes", '["tench"]'), "does not fit its own metadata"),
        (set_to("preprocessing", "null"), "unusable metadata"),
        (set_to("preprocessing", '{"res": [32, 32], "run": "rm"}'), "unusable metadata"),
        (set_to("preprocessing", '{"res": [64, 64]}'), "does not fit its own metadata"),
        (set_to("preprocessing", "[" * 100_000), "unusable metadata"),
        (lambda m, _: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1), "does not fit its own"),
        (lambda m, _: setattr(m.graph.node[3], "op_type", "NoSuchOperator"), "cannot run it"),
        (lambda m, _: setattr(m.graph.node[3], "domain", "evil.custom"), "cannot run it"),
        (lambda m, _: m.graph.ClearField("node"), "no graph"),
    ],
)
def test_a_tampered_file_is_refused(tmp_path, exported, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        OnnxPredictor(changed(exported, tmp_path / "model.onnx", change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80\x04\x95.", b"\xff" * 1000])
def test_what_is_not_onnx_is_refused(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(CheckpointError):
        OnnxPredictor(tmp_path / "model.onnx")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            OnnxPredictor(path)


def test_a_cut_off_file_is_refused(tmp_path, exported):
    content = exported[1].read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / "model.onnx").write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError):
            OnnxPredictor(tmp_path / "model.onnx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_is_never_replaced_in_silence(exported, capfd):
    with pytest.raises(UserError, match="no CUDA device"):
        OnnxPredictor(exported[1], "cuda")
    assert OnnxPredictor(exported[1], "auto")._runner.provider == "CPUExecutionProvider"
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="CPU build of ORT")
def test_a_gpu_that_onnx_runtime_cannot_use_is_said(exported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=1, device_index=0))
    monkeypatch.setattr(onnx_providers, "why_not", lambda provider: ("libx.so.1 is missing", "pip install x"))
    with pytest.raises(UserError, match=r"libx\.so\.1 is missing") as caught:
        OnnxPredictor(exported[1], "cuda")
    assert caught.value.hint == "pip install x"
    with pytest.warns(UserWarning, match="computes on the CPU: libx.so.1 is missing"):
        OnnxPredictor(exported[1], "auto")


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 20, 23])
def test_deit_tiny_on_real_images(tmp_path, shared, opset):
    file = shared / "data" / "deit_tiny_patch16_224.pth"
    trained = load_checkpoint(file)
    images = [decode(path) for path in sorted((shared / "data" / "imagenet200").glob("*/*.JPEG"))]
    assert len(images) == 200
    options = GraphOptions(opset=opset)
    report = to_onnx.export(trained, tmp_path / "deit.onnx", images=images, options=options, source=file)
    print(report)
    assert report.parity.agreement == 1
    assert report.parity.images == 200
    assert report.parity.difference <= 1e-5 * report.parity.largest
    metadata = {entry.key: entry.value for entry in onnx_model.read(tmp_path / "deit.onnx").metadata_props}
    assert metadata["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
