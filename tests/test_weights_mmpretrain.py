"""Checkpoints of mmpretrain, against timm models with their weights renamed."""

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitcli import checkpoint
from vitcli.errors import CheckpointError
from vitcli.weights import Beside, Foreign, Tensors, load, mmpretrain

SIZES = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 2,
    "num_classes": 10,
}
RENAMES = (
    (r"^(cls_token|dist_token|pos_embed|patch_embed|blocks|norm|fc_norm)(?=\.|_|$)", r"backbone.\1"),
    (r"^head_dist\.", "head.layers.head_dist."),
    (r"^head\.(?=weight|bias)", "head.layers.head."),
    (r"patch_embed\.proj", "patch_embed.projection"),
    (r"^backbone\.norm_pre", "backbone.pre_norm"),
    (r"^backbone\.norm\.", "backbone.ln1."),
    (r"^backbone\.fc_norm\.", "backbone.ln2."),
    (r"^backbone\.blocks", "backbone.layers"),
    (r"\.norm([12])\.", r".ln\1."),
    (r"\.mlp\.fc1", ".ffn.layers.0.0"),
    (r"\.mlp\.fc2", ".ffn.layers.1"),
    (r"\.ls1\.gamma", ".attn.gamma1.weight"),
    (r"\.ls2\.gamma", ".ffn.gamma2.weight"),
)


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def reference(**changes) -> nn.Module:
    return randomised(VisionTransformer(**{**SIZES, **changes}))


def theirs(model: nn.Module) -> dict[str, Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    return state


@torch.no_grad()
def assert_same(path: Path, model: nn.Module) -> Foreign:
    foreign = load(path)
    found = foreign.config.build(foreign.head_classes, foreign.image_size).eval()
    found.load_state_dict(foreign.state)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = model(images)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found(images), expected, rtol=0, atol=1e-5 * scale)
    assert foreign.format == "mmpretrain"
    return foreign


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 0},
        {"init_values": 0.1},
        {"init_values": 0.1, "no_embed_class": True},
        {"pre_norm": True},
        {"qkv_bias": False},
        {"global_pool": "avg", "fc_norm": True},
        {"class_token": False, "global_pool": "avg", "fc_norm": True},
    ],
    ids=["plain", "no head", "LayerScale", "DeiT III", "CLIP", "no qkv bias", "MAE", "no class token"],
)
def test_a_model_of_mmpretrain(tmp_path, changes):
    model = reference(**changes)
    save_file(theirs(model), tmp_path / "model.safetensors")
    foreign = assert_same(tmp_path / "model.safetensors", model)
    assert (foreign.config.norm_eps, foreign.config.activation) == (1e-6, "gelu")
    assert foreign.config.posemb_resize == "bicubic"
    assert foreign.classes is None


def test_in_its_wrapper_with_what_else_it_holds(tmp_path):
    model = reference()
    state = theirs(model) | {
        "data_preprocessor.mean": torch.tensor([127.5, 51.0, 0.0])[:, None, None],
        "data_preprocessor.std": torch.tensor([127.5, 255.0, 51.0])[:, None, None],
        "neck.mask_token": torch.zeros(1, 1, 8),
    }
    meta = {"epoch": 3, "dataset_meta": {"classes": ["a", "b"]}, "cfg": "model = dict()"}
    torch.save({"meta": meta, "state_dict": state, "message_hub": {"log_scalars": {}}}, tmp_path / "epoch_3.pth")
    assert_same(tmp_path / "epoch_3.pth", model)
    found = checkpoint.load(tmp_path / "epoch_3.pth").preprocessing
    assert (*found.mean, *found.std) == pytest.approx((0.5, 0.2, 0.0, 0.5, 1.0, 0.2))


def test_preprocessing_is_deits(tmp_path):
    save_file(theirs(reference(img_size=224, patch_size=32)), tmp_path / "model.safetensors")
    found = checkpoint.load(tmp_path / "model.safetensors").preprocessing
    assert (found.res, found.resize, found.interpolation, found.antialias) == ((224, 224), 256, "bicubic", True)
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_distilled(tmp_path):
    model = timm.models.deit.VisionTransformerDistilled(**SIZES)
    model = randomised(model)
    save_file(theirs(model), tmp_path / "model.safetensors")
    foreign = assert_same(tmp_path / "model.safetensors", model)
    assert foreign.config.distilled
    assert foreign.state["pos_embed"].shape == (1, 18, 48)


@pytest.mark.parametrize("before", [".attn.gamma1.weight", ".ffn.gamma2.weight"])
def test_older_names_of_layerscale(tmp_path, before):
    model = reference(init_values=0.1)
    state = {name.replace(before, before.removesuffix(".weight")): value for name, value in theirs(model).items()}
    assert not any(before in name for name in state)
    save_file(state, tmp_path / "model.safetensors")
    assert_same(tmp_path / "model.safetensors", model)


def test_swiglu(tmp_path):
    swiglu = timm.layers.SwiGLUPacked
    model = reference(mlp_layer=swiglu, act_layer=nn.SiLU, init_values=0.1)
    state = {}
    for name, value in theirs(model).items():
        state[name.replace("ffn.layers.0.0", "ffn.w12").replace("ffn.layers.1", "ffn.w3")] = value
    assert "backbone.layers.1.ffn.w12.weight" in state
    save_file(state, tmp_path / "model.safetensors")
    assert assert_same(tmp_path / "model.safetensors", model).config.activation == "swiglu"


@torch.no_grad()
def test_pre_logits(tmp_path):
    model = reference()
    layer = nn.Linear(48, 24)
    model.head = nn.Sequential(layer, nn.Tanh(), nn.Linear(24, 10))
    randomised(model)
    state = theirs(model)
    for number, name in (("0", "pre_logits"), ("2", "head")):
        for part in ("weight", "bias"):
            state[f"head.layers.{name}.{part}"] = state.pop(f"head.{number}.{part}")
    save_file(state, tmp_path / "model.safetensors")
    assert assert_same(tmp_path / "model.safetensors", model).config.representation_size == 24


def test_linear_head(tmp_path):
    model = reference(global_pool="avg", fc_norm=True)
    state = {name.replace("head.layers.head", "head.fc"): value for name, value in theirs(model).items()}
    assert "head.fc.weight" in state
    save_file(state, tmp_path / "model.safetensors")
    assert_same(tmp_path / "model.safetensors", model)


@pytest.mark.parametrize(("width", "depth", "ratio", "heads"), [(768, 8, 3, 8), (768, 1, 3, 12)])
def test_its_own_small_has_eight_heads(tmp_path, width, depth, ratio, heads):
    with torch.device("meta"):
        model = VisionTransformer(embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=ratio, patch_size=112)
    tensors = Tensors({name: torch.zeros(()).expand(value.shape) for name, value in theirs(model).items()})
    assert mmpretrain.read(tensors, Beside()).config.heads == heads


# Files that do not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.layers.1.ffn.layers.1.bias": None}, "missing from what looks like a mmpretrain file"),
        ({"backbone.layers.0.ffn.layers.1.weight": None}, "tensor blocks.0.mlp.fc2.weight is missing"),
        ({"backbone.surprise": torch.zeros(1)}, "unexpected in a mmpretrain file: backbone.surprise"),
        ({"backbone.ln1.weight": torch.zeros(47)}, "norm.weight has shape (47,), expected (48,)"),
        ({"backbone.pos_embed": torch.zeros(1, 19, 48)}, "pos_embed has 19 rows, which is not a square grid"),
        ({"backbone.ln2.weight": torch.zeros(48)}, "a norm before the mean of the patches and one after"),
        ({"backbone.patch_embed.projection.weight": None}, "its tensors are those of no known format"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(tmp_path, changes, message):
    state = theirs(reference()) | changes
    state = {name: value for name, value in state.items() if value is not None}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "model.safetensors")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (2, 3, 4), (1, 1, 1, 1, 1)], ids=str)
def test_any_tensor_of_a_wrong_shape(tmp_path, shape):
    state = theirs(reference(depth=1, init_values=0.1))
    for name in state:
        save_file({**state, name: torch.zeros(shape)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError):
            load(tmp_path / "model.safetensors")
