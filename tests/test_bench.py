"""`vit bench`: who is measured is the same model, and how it is measured is fair."""

from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

import onnx
import pytest
import torch
from command import Vit, sets
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from vitcli.bench import measure as bench
from vitcli.bench import peer_data, peers
from vitcli.bench.measure import Contender
from vitcli.data import DataConfig, Preprocessing
from vitcli.errors import MemoryExhaustedError
from vitcli.model import ViTConfig
from vitcli.plan import cost
from vitcli.weights import Foreign, huggingface, timm, torchvision

SIZE = {"width": 48, "depth": 2, "mlp_dim": 96, "heads": 3, "patch": 8}
TINY = sets(
    "model={width: 32, depth: 1, mlp_dim: 64, heads: 2, patch: 4, activation: gelu}",
    "runtime={device: cpu, precision: fp32, threads: 1}",
)
QUICK = ("--blocks", 2, "--seconds", 0.01)
CPU = torch.device("cpu")


@pytest.fixture
def vit(capsys, monkeypatch, tmp_path) -> Vit:
    monkeypatch.chdir(tmp_path)
    return Vit(capsys, monkeypatch)


def random_model(**options) -> nn.Module:
    torch.manual_seed(0)
    model = ViTConfig.parse(SIZE | options).build(5, (32, 32)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def foreign(name: str, model: nn.Module, **changes) -> Foreign:
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("pre_logits")}
    state["head.weight"] = torch.zeros(model.classes, model.config.width)  # as without a layer before it
    pixels = Preprocessing(res=(32, 32)).model_dump(mode="json")
    return Foreign(name, model.config.model_copy(update=changes), state, model.classes, (32, 32), pixels)


def with_our_weights(name: str, model: nn.Module, folder: Path) -> nn.Module:
    """A peer's model that holds ours, by way of the files that we write for that peer."""
    peer = peers.build(name, model.config, 5, (32, 32)).eval()
    whole = foreign(name, model, activation="gelu", representation_size=None, norm_eps=1e-6)
    inner, head = peer, "head"
    if name == "torchvision":
        torchvision.write(whole, folder / "model.safetensors")
        theirs, head = load_file(folder / "model.safetensors"), "heads"
    elif name == "transformers":
        huggingface.write(whole, folder)
        theirs = type(peer.model).from_pretrained(folder).state_dict()
        inner, head = peer.model, "classifier"
    else:
        theirs = whole.state
    body = {key: value for key, value in theirs.items() if not key.startswith(head)}
    missing, unexpected = inner.load_state_dict(body, strict=False)
    assert not unexpected
    assert {key.split(".")[0] for key in missing} <= {head, "pos_embed"}
    getattr(inner, head)[-1].load_state_dict(model.head.state_dict())
    if model.config.representation_size:
        getattr(inner, head)[0].load_state_dict(model.pre_logits.fc.state_dict())
    if "pos_embed" in missing:
        inner.pos_embed.data = model.pos_embed
    return peer


@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers"])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "representation_size": 16, "norm_eps": 1e-5}])
def test_a_peer_is_the_same_function(name, options, tmp_path):
    model = random_model(**options)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(with_our_weights(name, model, tmp_path)(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "gap"},
        {"pool": "gap", "class_token": True},
        {"posemb_class": False},
        {"layerscale": 0.1, "qk_norm": True},
        {"pool": "gap", "posemb": "sincos2d", "drop_path": 0.1},
    ],
)
def test_timm_has_more_models(options, tmp_path):
    model = random_model(**options)
    peer, images = with_our_weights("timm", model, tmp_path), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(peer(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("timm", {"registers": 2}, "timm has no such model: registers 2"),
        ("timm", {"activation": "swiglu"}, "activation swiglu"),
        ("timm", {"pool": "map"}, "pool map"),
        ("torchvision", {"layerscale": 0.1}, "torchvision has no such model: layerscale 0.1"),
        ("transformers", {"drop_path": 0.1}, "transformers has no such model: drop_path 0.1"),
    ],
)
def test_a_peer_without_such_a_model(name, options, reason):
    with pytest.raises(peers.PeerError, match=reason):
        peers.build(name, ViTConfig.parse(SIZE | options), 5, (32, 32))


def recorder(calls: list, name: str) -> Contender:
    def prepare(batch):
        calls.append((name, "prepare", batch))
        return lambda: calls.append((name, batch))

    return Contender(name, "", prepare)


def failing(name: str, error: Exception, at: int) -> Contender:
    def call(batch):
        if batch >= at:
            raise error

    return Contender(name, "", lambda batch: lambda: call(batch))


def run(contenders, batches, blocks=3):
    return bench.measure(contenders, batches, CPU, blocks=blocks, seconds=1e-9, on_stage=lambda name: None)


def test_blocks_alternate_after_all_are_warm():
    calls = []
    first, second = run([recorder(calls, "a"), recorder(calls, "b")], [8])
    rounds = calls[-6:]
    assert [name for name, _ in rounds] == ["a", "b"] * 3
    assert ("b", "prepare", 8) in calls[:-6]
    assert len(first.blocks) == len(second.blocks) == 3
    assert first.median == sorted(first.blocks)[1]


def test_what_was_made_ready_before_a_block_does_not_count():
    calls = []
    ready = replace(recorder(calls, "a"), before=5)
    run([ready, recorder(calls, "b")], [8])
    turns = [len(list(turn)) for name, turn in groupby(calls[-14:], key=lambda call: call[0])]
    assert turns == [6, 1, 6, 1]


def test_each_takes_its_best_batch_and_says_what_did_not_fit():
    small = failing("small", torch.OutOfMemoryError("CUDA out of memory"), at=64)
    results = run([recorder([], "any"), small], [16, 64])
    assert results[0].batch == max(results[0].tried, key=results[0].tried.get)
    assert results[1].batch == 16
    assert results[1].tried[64] is None
    assert len(results[1].blocks) == 3


def test_a_peer_that_fails_does_not_end_the_measurement():
    ours, broken, full = run(
        [recorder([], "ours"), failing("b", ValueError("no such op"), 1), failing("f", torch.OutOfMemoryError(), 1)],
        [4],
    )
    assert (ours.failed, broken.failed, full.failed) == ("", "no such op", "out of memory")
    assert ours.blocks
    assert not broken.blocks
    assert not full.blocks


def test_our_own_failure_is_not_hidden():
    with pytest.raises(ValueError, match="a bug"):
        run([failing("ours", ValueError("a bug"), 1), recorder([], "peer")], [4])


def test_nothing_fits():
    with pytest.raises(MemoryExhaustedError, match="out of memory with a batch of 4, 8") as caught:
        run([failing("ours", torch.OutOfMemoryError(), 1)], [4, 8])
    assert caught.value.hint == "--batch 2"
    assert caught.value.exit_code == 6


def test_train_beside_every_peer(vit, tmp_path):
    against = ("--against", "timm,torchvision", "--against", "transformers,plain")
    command = ("bench", "train", "quickstart", *TINY, *sets("model.pool=token"), "--batch", "4,1000000000000")
    said = vit(*command, *against, *QUICK, "-o", "speed.png", "-o", "speed.md", "--json")
    assert said.code == 0, said.err
    answer = said.json
    assert [result["name"] for result in answer["results"]] == [
        "vitcli",
        "timm",
        "torchvision",
        "transformers",
        "plain",
    ]
    for result in answer["results"]:
        assert result["failed"] == ""
        assert (result["batch"], len(result["blocks"])) == (4, 2)
        assert result["tried"]["1000000000000"] is None
        assert min(result["blocks"]) <= result["images_per_second"] <= max(result["blocks"])
        assert result["flops"] == pytest.approx(result["images_per_second"] * answer["flops_per_image"])
        assert result["share_of_ceiling"] == pytest.approx(result["flops"] / answer["ceiling_flops"])
        assert result["memory"] is None
    config = ViTConfig.parse({"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2, "patch": 4})
    assert answer["flops_per_image"] == 3 * cost(config, 10, (8, 8))[1]
    assert answer["command"].startswith("vit bench train quickstart")
    assert answer["machine"]["torch"] == torch.__version__
    with Image.open(tmp_path / "speed.png") as picture:
        assert picture.width > 800
    rows = (tmp_path / "speed.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:7]] == [
        "vitcli",
        "timm",
        "torchvision",
        "transformers",
        "plain",
    ]
    assert "at 1000000000000: out of memory" in rows[2]


def test_a_peer_that_cannot_is_told_and_left_out(vit, monkeypatch):
    found = peers.find_spec
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "timm" else found(name))
    said = vit("bench", "train", "quickstart", *TINY, "--batch", 4, *QUICK, "--against", "timm,torchvision")
    assert said.code == 0, said.err
    assert "warning: timm is not installed, so it is left out (pip install timm)" in said.err
    lines = [line.split("\t") for line in said.out.splitlines()]
    assert [line[0] for line in lines] == [
        "training",
        "machine",
        "ceiling",
        "command",
        "contender",
        "vitcli",
        "torchvision",
    ]
    assert lines[-1][1:] == [
        *"------",
        "torchvision has no such model: pool gap, class_token False, posemb_class False",
    ]


def write_onnx(file: Path) -> None:
    """A classifier by the mean of each channel, as `vit export` would describe it."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixel_values"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    given = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 32, 32])
    answer = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "mean", [given], [answer])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    pixels = Preprocessing(res=(32, 32)).model_dump_json()
    helper.set_model_props(model, {"classes": '["red", "green", "blue"]', "preprocessing": pixels})
    onnx.save(model, file)


def test_infer_of_checkpoint_and_onnx_beside_timm(vit, tmp_path):
    model = random_model(activation="gelu")
    timm.write(foreign("timm", model), tmp_path / "model")
    write_onnx(tmp_path / "model.onnx")
    models = ("--ckpt", "model.onnx", "--ckpt", "model", "--device", "cpu", "--precision", "fp32", "--threads", 1)
    said = vit("bench", "infer", *models, "--batch", "2", "--against", "timm,plain", *QUICK, "--json")
    assert said.code == 0, said.err
    results = said.json["results"]
    assert [result["name"] for result in results] == ["vitcli model", "vitcli model.onnx", "timm", "plain"]
    assert all(len(result["blocks"]) == 2 for result in results)
    assert said.json["flops_per_image"] == cost(model.config, 5, (32, 32))[1]

    alone = vit(
        "bench", "infer", "--ckpt", "model.onnx", "--device", "cpu", "--threads", 1, "--batch", 2, *QUICK, "--json"
    ).json
    assert alone["flops_per_image"] is None
    assert alone["results"][0]["blocks"]
    said = vit("bench", "infer", "--ckpt", "model.onnx", "--device", "cpu", "--against", "timm")
    assert said.code == 4
    assert "model.onnx does not say its architecture" in said.err


def test_infer_of_a_recipe_computes_as_the_recipe_says(vit):
    said = vit("bench", "infer", "quickstart", *TINY, "--batch", 2, *QUICK, "--json").json
    assert said["results"][0]["settings"].startswith("fp32")
    assert said["machine"]["threads"] == "1"
    said = vit("bench", "infer", "quickstart", *TINY, "--precision", "bf16", "--batch", 2, *QUICK, "--json").json
    assert said["results"][0]["settings"].startswith("bf16")


def test_data(vit):
    said = vit("bench", "data", "quickstart", *sets("data.workers=0"), *QUICK, "--json")
    assert said.code == 0, said.err
    (result,) = said.json["results"]
    assert result["batch"] == 32
    assert result["settings"] == "0 loader processes"
    assert 0 < result["images_per_second_per_core"] <= result["images_per_second"]
    assert "img/s a core" in vit("bench", "data", "quickstart", *sets("data.workers=0"), *QUICK).out


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> Path:
    """24 images of two classes, one red and one blue, of 40x30 pixels."""
    folder = tmp_path_factory.mktemp("jpegs")
    for name, colour in (("blue", (20, 40, 230)), ("red", (230, 40, 20))):
        (folder / name).mkdir()
        for number in range(12):
            Image.new("RGB", (40, 30), colour).save(folder / name / f"{number}.jpg")
    return folder


def test_data_beside_other_loaders(vit, jpegs):
    settings = sets(f"data.source.path={jpegs}", "data.res=16", "data.resize=16", "data.workers=0")
    said = vit(
        "bench", "data", "b16_in1k", *settings, "--batch", 8, "--against", "timm,torchvision,transformers", *QUICK
    )
    assert said.code == 0, said.err
    rows = [line.split("\t") for line in said.out.splitlines()[-4:]]
    assert [(row[0], row[6]) for row in rows] == [
        ("vitcli", "8"),
        ("timm", "8"),
        ("torchvision", "8"),
        ("transformers", "-"),
    ]
    assert rows[1][-1].startswith("0 loader processes, its own transforms")
    assert rows[3][-1] == "transformers has no loader of its own"


@pytest.mark.parametrize("peer", ["timm", "torchvision"])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_peers_load_is_the_recipes(jpegs, peer, workers):
    augment = {"randaugment": {"n": 1, "m": 3}, "color_jitter": 0.01, "random_erasing": 0.01, "area": (0.5, 1.0)}
    data = DataConfig.parse(
        {"source": {"name": "folder", "path": str(jpegs)}, "res": 16, "augment": augment, "workers": workers}
    )
    loaded = peer_data.batches(peer, data, data.source.open("train"), 8, CPU)
    colours = {0: [], 1: []}
    for images, labels in islice(loaded, 6):  # two epochs
        assert (images.shape, images.dtype, labels.shape) == ((8, 3, 16, 16), torch.float32, (8,))
        for image, label in zip(images, labels.tolist(), strict=True):
            colours[label].append(image.mean((1, 2)))
    blue, red = (torch.stack(colours[label]).median(0).values for label in (0, 1))
    assert len(colours[0]) == len(colours[1]) == 24
    torch.testing.assert_close(blue, torch.tensor([20, 40, 230]) / 127.5 - 1, rtol=0, atol=0.4)
    torch.testing.assert_close(red, torch.tensor([230, 40, 20]) / 127.5 - 1, rtol=0, atol=0.4)
    loaded.close()


@pytest.mark.parametrize(
    ("peer", "settings", "reason"),
    [
        ("transformers", {}, "transformers has no loader of its own"),
        ("timm", {"augment": {"crop": "central_crop"}}, "timm has no crop like central_crop"),
        ("torchvision", {"sampling": "balanced"}, "torchvision does not sample as balanced"),
        ("timm", {"source": "digits"}, "timm reads files"),
    ],
)
def test_what_peers_cannot_load(jpegs, peer, settings, reason):
    data = DataConfig.parse({"source": {"name": "folder", "path": str(jpegs)}, "res": 16} | settings)
    with pytest.raises(peers.PeerError, match=reason):
        next(peer_data.batches(peer, data, data.source.open("train"), 8, CPU))


def test_train_from_disk(vit, jpegs):
    settings = sets(f"data.source.path={jpegs}", "data.classes=2", "data.res=8", "data.resize=8", "data.workers=0")
    command = ("bench", "train", "b16_in1k", *TINY, *settings, "--batch", 4, "--from-disk", "--against", "timm,plain")
    said = vit(*command, *QUICK, "--json")
    assert said.code == 0, said.err
    how = {(result["name"], result["settings"].rpartition("; ")[2]) for result in said.json["results"]}
    assert how == {("vitcli", "from disk"), ("vitcli", "one batch"), ("timm", "from disk"), ("plain", "from disk")}
    assert all(len(result["blocks"]) == 2 for result in said.json["results"])
    assert vit(*command, *QUICK, "--batch", 32).code == 3  # there are 24


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("train", "quickstart", "--against", "tim"), 2, "no peer is called 'tim'"),
        (("train", "quickstart", "--against", "tim"), 2, "hint: peers: timm, torchvision, transformers, plain"),
        (("train", "quickstart", "--batch", "0"), 2, "--batch 0: expected numbers of images"),
        (("train", "quickstart", "--batch", "a,8"), 2, "hint: as in --batch 256,512"),
        (("train", "quickstart", "-o", "speed.gif"), 2, "-o speed.gif: not a known form"),
        (("train", "quickstart", "-o", "missing/speed.png"), 2, "no such folder"),
        (("train", "quickstrat"), 2, "did you mean quickstart?"),
        (("train", "quickstart", "--set", "optim.lr=fast"), 2, "optim.lr"),
        (("infer", "--ckpt", "missing.npz"), 4, "missing.npz does not exist"),
        (("infer", "--ckpt", "x.npz", "--set", "batch=4"), 2, "--set does not go with --ckpt"),
        (("infer", "quickstart", "--ckpt", "x.npz"), 2, "a recipe does not go with --ckpt"),
        (("data", "b16_in1k"), 3, "data/imagenet"),
    ],
)
def test_mistakes(vit, words, code, message):
    said = vit("bench", *words)
    assert said.code == code
    assert message in said.err
    assert said.out == ""
