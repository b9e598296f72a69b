"""What a graph does to an image itself, against our own preprocessing; and how files that do it are read."""

import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from vitcli import exporters, inference, scoring
from vitcli.data import Preprocessing
from vitcli.data.images import decode
from vitcli.data.preprocess import normalise, prepare
from vitcli.data.sources.folder import Folder
from vitcli.errors import CheckpointError, DataError
from vitcli.exporters import _image_graph
from vitcli.onnx.model import OnnxPredictor

KINDS = [
    ("bilinear", True),
    ("bicubic", True),
    ("bilinear", False),
    ("bicubic", False),
    ("nearest", True),
    ("area", True),
]
STRETCH, CROP, WIDE = ((64, 64), None), ((64, 64), 73), ((24, 40), None)


def model(res, opset=20) -> onnx.ModelProto:
    """Gives what it is given: the pixels that a ViT would see."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, *res]) for name in ("pixel_values", "out")
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["pixel_values"], ["out"])], "g", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def opened(proto: onnx.ModelProto) -> Callable[[np.ndarray], np.ndarray]:
    """The graph as a function of uint8 images (b, h, w, 3)."""
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain for entry in proto.opset_import} == {""}
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type) == ("images", "tensor(uint8)")
    return lambda images: session.run(None, {"images": images})[0]


def hold(p: Preprocessing, images: Sequence[Image.Image], allowed: float = 0) -> tuple[float, float]:
    """The graph's levels of 255 against our own preprocessing: the largest difference, the share of other levels."""
    graph = opened(_image_graph.prepend(model(p.res), p, "full"))
    furthest, other, pixels = 0.0, 0, 0
    for image in images:
        found = (graph(np.asarray(image)[None])[0] * 0.5 + 0.5) * 255
        off = np.abs(found - prepare(image, p).numpy())
        assert off.max() <= allowed + 1e-3, image.size
        furthest, other, pixels = max(furthest, float(off.max())), other + int((off > 0.5).sum()), pixels + off.size
    return furthest, other / pixels


def photographs() -> list[Image.Image]:
    """Wide, tall, square, tiny, narrow, one pixel, and of the model's own size."""
    photo = exporters.photographs()[3]
    sizes = [(400, 320), (150, 400), (64, 64), (32, 32), (300, 9), (7, 5), (1, 1), (73, 80), (40, 24)]
    return [photo.resize(size) for size in sizes]


@pytest.mark.parametrize(("interpolation", "antialias"), KINDS)
@pytest.mark.parametrize(("res", "resize"), [STRETCH, CROP, WIDE])
def test_the_graph_prepares_as_we_do(interpolation, antialias, res, resize):
    p = Preprocessing(res=res, resize=resize, interpolation=interpolation, antialias=antialias)
    hold(p, photographs(), allowed=1 if interpolation == "area" else 0)  # a mean of exactly .5 goes either way


def test_rows_come_first_where_pillow_begins_with_them():
    tall = exporters.photographs()[0].resize((70, 300))
    hold(Preprocessing(res=(64, 64), interpolation="bicubic"), [tall])


@pytest.mark.parametrize("opset", [18, 23, 25])
def test_opsets_and_batches(opset):
    p = Preprocessing(res=(32, 32), resize=36, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    images = exporters.photographs()[:3]
    expected = normalise(torch.stack([prepare(image, p) for image in images]), p).numpy()
    graph = opened(_image_graph.prepend(model((32, 32), opset), p, "full"))
    found = graph(np.stack([np.asarray(image) for image in images]))
    assert np.abs(found - expected).max() <= 1e-6


def test_normalise_takes_images_of_the_models_size():
    p = Preprocessing(res=(24, 40), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    images = torch.stack([prepare(image, p) for image in exporters.photographs()])
    proto = _image_graph.prepend(model((24, 40)), p, "normalise")
    shape = [dim.dim_param or dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 24, 40, 3]
    assert np.array_equal(opened(proto)(images.permute(0, 2, 3, 1).numpy()), normalise(images, p).numpy())


def test_the_given_model_stays_as_it_is():
    given = model((8, 8))
    before = given.SerializeToString()
    _image_graph.prepend(given, Preprocessing(res=(8, 8)), "full")
    assert given.SerializeToString() == before


CLASSES = ["dark", "light"]
TOWARDS_LIGHT = np.array([[-1, 1]] * 3, np.float32)


def classifier(path, preprocess="none", softmax=False, lies=()) -> OnnxPredictor:
    """Says how light an image is; its logits are far apart, and those of a black image beyond float32's exponent."""
    p = Preprocessing(res=(16, 16), resize=20, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.002,) * 3)
    end = "probabilities" if softmax else "logits"
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["scores"]),
        helper.make_node("Softmax" if softmax else "Identity", ["scores"], [end]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", 2])],
        [onnx.numpy_helper.from_array(TOWARDS_LIGHT, "weight"), onnx.numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    proto = _image_graph.prepend(proto, p, preprocess) if preprocess != "none" else proto
    entries = {"classes": json.dumps(CLASSES), "preprocessing": p.model_dump_json(), "preprocess": preprocess}
    entries |= {"softmax": "true"} if softmax else {}
    helper.set_model_props(proto, entries | dict(lies))
    onnx.save(proto, path)
    return OnnxPredictor(path, "cpu")


@pytest.fixture
def pictures(tmp_path):
    """Class folders with images of many sizes, light and dark, and one that is broken."""
    for number, (size, level) in enumerate(
        itertools.product([(30, 40), (40, 30), (16, 16), (5, 9)], (3, 120, 135, 250))
    ):
        folder = tmp_path / "pictures" / CLASSES[level > 127]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (level, level, level)).save(folder / f"{number:02}.png")
    return tmp_path / "pictures"


def test_every_file_scores_and_names_alike(tmp_path, pictures):
    answers, scores = [], []
    paths = inference.find_images([str(pictures)])
    for preprocess, softmax in itertools.product(("none", "normalise", "full"), (False, True)):
        predictor = classifier(tmp_path / "model.onnx", preprocess, softmax)
        found = inference.predict(predictor, [*paths, str(tmp_path / "none.png")], batch=3)
        answers.append([[(guess.id, round(guess.probability, 5)) for guess in answer.top] for answer in found])
        score = scoring.score(predictor, Folder.parse({"path": str(pictures)}).open_for_scoring(), batch=3, workers=0)
        scores.append((score.images, score.top1, score.top5))
    assert all(answer == answers[0] for answer in answers)
    assert scores == [(16, 1.0, 1.0)] * 6
    assert [answer[0][0] for answer in answers[0][:16]] == ["dark"] * 8 + ["light"] * 8
    assert answers[0][16] == []


def test_the_graphs_own_resize_is_what_is_scored(tmp_path, pictures, monkeypatch):
    predictor = classifier(tmp_path / "model.onnx", "full")
    monkeypatch.setattr(inference, "prepare", lambda *_: pytest.fail("prepared outside the graph"))
    seen = []
    monkeypatch.setattr(
        predictor, "logits", lambda images: seen.append(images.shape[2:]) or torch.zeros(len(images), 2)
    )
    scoring.score(predictor, Folder.parse({"path": str(pictures)}).open_for_scoring(), batch=4, workers=0)
    list(inference.predict(predictor, inference.find_images([str(pictures)])))
    assert {tuple(size) for size in seen} == {(40, 30), (30, 40), (16, 16), (9, 5)}


def test_broken_images_are_told_by_a_file_that_resizes_too(tmp_path, pictures):
    (pictures / "dark" / "00.png").write_bytes(b"no image")
    predictor = classifier(tmp_path / "model.onnx", "full")
    dataset = Folder.parse({"path": str(pictures)}).open_for_scoring()
    scores = scoring.score(predictor, dataset, batch=4, workers=0, allow_bad=True)
    assert scores.images == 15
    assert len(scores.bad) == 1
    with pytest.raises(DataError, match=r"00\.png"):
        scoring.score(predictor, dataset, batch=4, workers=0)


def test_probabilities_of_nothing_are_no_infinity(tmp_path):
    predictor = classifier(tmp_path / "model.onnx", softmax=True)
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert predictor.logits(black).isfinite().all()
    assert predictor.logits(black).argmax() == 0


@pytest.mark.parametrize(
    ("preprocess", "lies", "message"),
    [
        ("full", {"preprocess": "none"}, "does not fit its own metadata"),
        ("full", {"preprocess": "normalise"}, "does not fit its own metadata"),
        ("normalise", {"preprocess": "full"}, "does not fit its own metadata"),
        ("none", {"preprocess": "full"}, "does not fit its own metadata"),
        ("none", {"softmax": "true"}, "does not fit its own metadata"),
        ("none", {"softmax": "perhaps"}, "unusable metadata"),
        ("none", {"preprocess": "all of it"}, "unusable metadata"),
    ],
)
def test_metadata_that_lies_is_refused(tmp_path, preprocess, lies, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        classifier(tmp_path / "model.onnx", preprocess, lies=lies)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("interpolation", "antialias"), KINDS)
@pytest.mark.parametrize(("res", "resize"), [((224, 224), 256), ((224, 224), None), ((384, 384), 438), ((32, 32), 32)])
def test_real_images(shared, interpolation, antialias, res, resize):
    p = Preprocessing(res=res, resize=resize, interpolation=interpolation, antialias=antialias)
    images = [decode(path) for path in sorted((shared / "data" / "imagenet200").glob("*/*.JPEG"))[::4]]
    images += [image.resize((32, 32)) for image in images[:10]]
    furthest, other = hold(p, images, allowed=1 if interpolation == "area" else 0)
    print(interpolation, antialias, res, resize, f"furthest {furthest:.3f}, other {other:.2e}")
