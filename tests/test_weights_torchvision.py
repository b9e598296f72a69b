"""torchvision's VisionTransformer, read and written."""

import json
import struct
from functools import partial

import numpy as np
import pytest
import torch
from command import Vit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import ConvStemConfig

from vitcli import checkpoint
from vitcli.errors import CheckpointError
from vitcli.exporters import torchvision as exporter
from vitcli.model import ViTConfig
from vitcli.weights import Foreign, load
from vitcli.weights.torchvision import write

SIZES = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96}


@pytest.fixture
def vit(capsys, monkeypatch) -> Vit:
    return Vit(capsys, monkeypatch)


def reference(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{**SIZES, "num_classes": 10, **changes}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def ours(foreign: Foreign) -> nn.Module:
    model = foreign.config.build(foreign.head_classes, foreign.image_size).eval()
    model.load_state_dict(foreign.state)
    return model


def small(size: tuple[int, int] = (32, 32), classes: int = 10, **changes) -> Foreign:
    """A model of ours as an exporter hands it to `write`."""
    sizes = {"width": 48, "depth": 2, "mlp_dim": 96, "heads": 4, "patch": 8, "activation": "gelu"}
    config = ViTConfig.parse(sizes | changes)
    torch.manual_seed(0)
    model = config.build(classes, size)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    preprocessing = {"res": list(size), "resize": 36, "interpolation": "area", "mean": [0.4, 0.5, 0.6]}
    names = tuple(f"class {i}" for i in range(classes))
    return Foreign("torchvision", config, dict(model.state_dict()), classes, size, preprocessing, names)


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(path, model: nn.Module, size: int = 32) -> Foreign:
    foreign = load(path)
    expected = model(images(size))
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(ours(foreign)(images(size)), expected, rtol=0, atol=1e-5 * scale)
    assert foreign.format == "torchvision"
    return foreign


def test_the_golden_file(shared):
    io = np.load(shared / "golden/torchvision_io.npz")
    foreign = load(shared / "golden/torchvision.pth")
    logits = ours(foreign)(torch.from_numpy(io["images"])).detach().numpy()
    np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("representation_size", [None, 24])
def test_a_model_of_torchvision(tmp_path, representation_size):
    model = reference(representation_size=representation_size)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    foreign = assert_same(tmp_path / "model.safetensors", model)
    config = foreign.config
    assert (config.heads, config.norm_eps, config.activation, config.pool) == (3, 1e-6, "gelu", "token")
    assert (config.representation_size, config.posemb_resize) == (representation_size, "bicubic_corners")
    assert foreign.classes is None


def test_names_before_the_mlp_was_torchvisions(tmp_path):
    model = reference()
    state = {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value
        for name, value in model.state_dict().items()
    }
    assert sum("linear_" in name for name in state) == 8
    save_file(state, tmp_path / "model.safetensors")
    assert_same(tmp_path / "model.safetensors", model)


def test_replaced_head_of_a_tutorial(tmp_path):
    model = reference()
    model.heads = nn.Linear(48, 3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert assert_same(tmp_path / "model.safetensors", model).head_classes == 3


def test_without_head(tmp_path):
    model = reference()
    model.heads = nn.Identity()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert assert_same(tmp_path / "model.safetensors", model).head_classes == 0


@pytest.mark.parametrize(
    ("size", "patch", "width", "resize", "interpolation"),
    [
        (224, 32, 48, 256, "bilinear"),
        (224, 16, 1024, 242, "bilinear"),
        (224, 14, 48, 224, "bicubic"),
        (384, 32, 48, 384, "bicubic"),
    ],
    ids=["V1", "V1 of L/16", "SWAG of H/14", "SWAG end to end"],
)
def test_preprocessing_is_that_of_the_published_weights(tmp_path, size, patch, width, resize, interpolation):
    model = VisionTransformer(size, patch, 1, 1, width, 8, num_classes=1000)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    trained = checkpoint.load(tmp_path / "model.safetensors")
    found = trained.preprocessing
    assert (found.res, found.resize, found.interpolation) == ((size, size), resize, interpolation)
    assert (found.mean, found.std, found.antialias) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True)
    assert trained.classes[0] == "n01440764"


# Files that do not fit


def refusal(tmp_path, state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    save_file(state, tmp_path / "model.safetensors", metadata)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "model.safetensors")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"{tmp_path / 'model.safetensors'}: ")


def test_a_convolutional_stem_is_refused_by_name(tmp_path):
    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 4)]
    assert "conv_stem_configs" in refusal(tmp_path, reference(conv_stem_configs=stem).state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.layers.encoder_layer_1.ln_2.bias": None}, "missing from what looks like a torchvision file"),
        ({"conv_proj.weight": None}, "tensor patch_embed.proj.weight is missing"),
        ({"encoder.surprise": torch.zeros(1)}, "unexpected in a torchvision file: encoder.surprise"),
        ({"encoder.layers.encoder_layer_0.mlp.linear_1.bias": torch.zeros(96)}, "unexpected in a torchvision file"),
        ({"class_token": torch.zeros(1, 1, 47)}, "cls_token has shape (1, 1, 47), expected (1, 1, 48)"),
        ({"encoder.pos_embedding": torch.zeros(1, 19, 48)}, "pos_embed has 19 rows, which is not a square grid"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(tmp_path, changes, message):
    state = reference().state_dict() | changes
    assert message in refusal(tmp_path, {name: value for name, value in state.items() if value is not None})


@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (2, 3, 4), (1, 1, 1, 1, 1)], ids=str)
def test_any_tensor_of_a_wrong_shape(tmp_path, shape):
    state = reference(num_layers=1, representation_size=24).state_dict()
    for name in state:
        refusal(tmp_path, {**state, name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", "its metadata is damaged: JSON"),
        ('{"heads": 0, "preprocessing": {}, "classes": null}', "its metadata is damaged: heads"),
        ('{"heads": 3, "preprocessing": {"mean": "x"}, "classes": null}', "its preprocessing cannot be used"),
        ('{"heads": 3, "preprocessing": {"res": 64}, "classes": null}', "images of 64x64 but 32x32 is what"),
        ('{"heads": 3, "preprocessing": {"res": 32}, "classes": ["a"]}', "it names 1 classes, and its head has 10"),
        ('{"heads": 5, "preprocessing": {"res": 32}, "classes": null}', "width 48 is not divisible by heads 5"),
    ],
    ids=["no JSON", "no heads", "mean", "resolution", "classes", "heads"],
)
def test_tampered_metadata(tmp_path, told, message):
    assert message in refusal(tmp_path, reference().state_dict(), {"vitcli": told})


def test_a_header_that_claims_too_much_is_not_read_for_its_metadata(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 90_000_000) + b"{" + bytes(200))
    with pytest.raises(CheckpointError, match="claims 90000000 bytes"):
        load(tmp_path / "model.safetensors")


# Writing


@pytest.mark.parametrize("representation_size", [None, 24])
@torch.no_grad()
def test_what_is_written_loads_strictly_and_answers_alike(tmp_path, representation_size):
    foreign = small(representation_size=representation_size)
    write(foreign, tmp_path / "model.safetensors")
    model = VisionTransformer(**SIZES | {"num_heads": 4}, num_classes=10, representation_size=representation_size)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    expected = ours(foreign)(images())
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(model.eval()(images()), expected, rtol=0, atol=1e-5 * scale)


def test_written_and_read_is_the_same_to_the_bit(tmp_path):
    foreign = small()
    write(foreign, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.state.keys() == foreign.state.keys()
    assert all(torch.equal(again.state[name], value) for name, value in foreign.state.items())
    assert again.config.heads == 4  # which no tensor shows, and is not the usual for this width
    assert (again.classes, again.preprocessing) == (foreign.classes, foreign.preprocessing)


def test_read_and_written_is_the_same_to_the_bit(tmp_path):
    state = reference(representation_size=24).state_dict()
    save_file(state, tmp_path / "theirs.safetensors")
    write(load(tmp_path / "theirs.safetensors"), tmp_path / "ours.safetensors")
    written = load_file(tmp_path / "ours.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"pool": "gap"}, "pool: gap"),
        ({"pool": "map"}, "pool: map"),
        ({"pool": "token_gap"}, "pool: token_gap"),
        ({"registers": 2}, "registers"),
        ({"layerscale": 0.1}, "LayerScale"),
        ({"distilled": True}, "distilled"),
        ({"activation": "gelu_tanh"}, "activation: gelu_tanh"),
        ({"activation": "quick_gelu"}, "activation: quick_gelu"),
        ({"activation": "swiglu"}, "activation: swiglu"),
        ({"norm_eps": 1e-5}, "norm_eps: 1e-05"),
        ({"posemb_class": False}, "class token without a row"),
        ({"posemb": "sincos2d"}, "posemb: sincos2d"),
        ({"qk_norm": True}, "qk_norm"),
        ({"pre_norm": True}, "pre_norm"),
        ({"norm_after_pool": True}, "norm_after_pool"),
        ({"stem": {"layers": (), "width": 32}, "patch": 2}, "ResNet stem"),
        ({"classes": 0}, "model without a head"),
        ({"size": (32, 40)}, "image that is not square"),
    ],
    ids=str,
)
def test_what_torchvision_cannot_express_is_named(tmp_path, changes, part):
    with pytest.raises(CheckpointError) as caught:
        write(small(**changes), tmp_path / "model.safetensors")
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "vit export" in caught.value.hint
    assert not (tmp_path / "model.safetensors").exists()


@torch.no_grad()
def test_another_epsilon_really_matters():
    model = reference()
    other = reference(norm_layer=partial(nn.LayerNorm, eps=1e-2))
    assert (model(images()) - other(images())).abs().max() > 1e-5


def test_the_exporter_and_the_commands(tmp_path, vit):
    save_file(reference().state_dict(), tmp_path / "theirs.safetensors")
    out = tmp_path / "ours.safetensors"
    said = vit("export", "--to", "torchvision", "--ckpt", tmp_path / "theirs.safetensors", "-o", out, "--json")
    assert said.code == 0, said.err
    assert said.json["parity"]["agreement"] == 1.0
    assert "left out" not in said.json["details"]
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["vitcli"])["heads"] == 3
    assert exporter.OUTPUT.endswith(".safetensors")
