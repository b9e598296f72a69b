"""DeiT III, DINO, DINOv2, MAE and I-JEPA as facebookresearch saves them, held against references with their weights.

The references are timm's and transformers' classes; the tests rename their tensors to the originals' layouts.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from vitcli import checkpoint, weights
from vitcli.data import Preprocessing
from vitcli.errors import CheckpointError
from vitcli.model.position import resize

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
State = dict[str, torch.Tensor]


def filled(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def reference(**config) -> nn.Module:
    return filled(VisionTransformer(**{**SMALL, **config}))


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def renamed(state: State, *changes: tuple[str, str]) -> State:
    for old, new in changes:
        state = {re.sub(old, new, name): value for name, value in state.items()}
    return {name: value.clone() for name, value in state.items()}


def assert_logits(path: Path, theirs: nn.Module, format: str) -> checkpoint.Trained:
    ours = checkpoint.load(path)
    assert ours.origin == f"{path} ({format})"
    with torch.no_grad():
        expected = theirs(images())
        expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
        torch.testing.assert_close(
            ours.model(images()), expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max()))
        )
    return ours


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        weights.load(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"{path}: ")


# DeiT III


def deit3() -> tuple[nn.Module, State]:
    model = reference(no_embed_class=True, init_values=1e-4)
    return model, renamed(model.state_dict(), (r"\.ls(\d)\.gamma", r".gamma_\1"))


def test_deit3(tmp_path):
    model, state = deit3()
    save_file(state, tmp_path / "deit_3.safetensors")
    ours = assert_logits(tmp_path / "deit_3.safetensors", model, "deit3")
    assert ours.preprocessing == Preprocessing(res=(32, 32), resize=32, **IMAGENET)
    assert (ours.config.posemb_resize, ours.config.posemb_class) == ("bicubic", False)


def test_rope_vit_beside_its_config_is_not_taken_for_deit3(tmp_path):
    """Its rotary positions are in none of its tensors."""
    save_file(deit3()[1], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_small_patch16_rope_ape_224"}))
    assert refusal(tmp_path) == "config.json: architecture vit_small_patch16_rope_ape_224 needs rotary positions"


# DINO and DINOv2


def dinov2(state: State) -> State:
    """transformers' names to the original's."""
    state = renamed(
        state,
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.", ""),
        (r"^layernorm\.", "norm."),
        (r"^encoder\.layer\.", "blocks."),
        (r"attention\.output\.dense", "attn.proj"),
        (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
        (r"mlp\.weights_in", "mlp.w12"),
        (r"mlp\.weights_out", "mlp.w3"),
    )
    for name in [name for name in state if ".query." in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return state


def chunked(state: State) -> State:
    """Two blocks in a chunk; a block keeps its number."""
    return renamed(state, (r"^blocks\.([01])\.", r"blocks.0.\1."), (r"^blocks\.([23])\.", r"blocks.1.\1."))


@pytest.mark.parametrize("chunk", [False, True], ids=["", "chunks"])
@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 3])
def test_dinov2(tmp_path, registers, swiglu, chunk):
    config = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    if registers:
        config = Dinov2WithRegistersConfig(**config, use_swiglu_ffn=swiglu, num_register_tokens=registers)
        model = filled(Dinov2WithRegistersModel(config))
    else:
        model = filled(Dinov2Model(Dinov2Config(**config, use_swiglu_ffn=swiglu)))
    model.save_pretrained(tmp_path / "folder")
    state = dinov2(load_file(tmp_path / "folder/model.safetensors"))
    assert state["mask_token"].shape == (1, 48)
    save_file(chunked(state) if chunk else state, tmp_path / "dinov2.safetensors")
    ours = assert_logits(tmp_path / "dinov2.safetensors", model, "dino")
    assert ours.preprocessing == Preprocessing(res=(32, 32), resize=36, **IMAGENET)
    resize = "bicubic_antialias" if registers else "bicubic_offset"
    assert (ours.config.posemb_resize, ours.config.registers, ours.classes) == (resize, registers, ())


def test_dinov2_at_another_resolution_is_stretched_as_the_original_does(tmp_path):
    """From the 5x5 table to 3x3 patches, by the ratio of sides with a tenth of a patch more."""
    model = reference(img_size=40, num_classes=0, init_values=1.0)
    save_file({**model.state_dict(), "mask_token": torch.zeros(1, 48)}, tmp_path / "dinov2.safetensors")
    ours = checkpoint.load(tmp_path / "dinov2.safetensors")
    table = ours.model.state_dict()["pos_embed"][0, 1:]
    image = table.reshape(1, 5, 5, 48).permute(0, 3, 1, 2)
    expected = F.interpolate(image, scale_factor=((3 + 0.1) / 5, (3 + 0.1) / 5), mode="bicubic")
    stretched = resize(table, (5, 5), (3, 3), ours.config.posemb_resize)
    torch.testing.assert_close(stretched, expected[0].permute(1, 2, 0).flatten(0, 1), rtol=0, atol=1e-5)


def test_dinov2_is_shown_224_pixels_wherever_its_weights_are_from(tmp_path):
    """The table is for 518. transformers' folder says 224 in its processor, DINOv2's own code in its evaluation."""
    config = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 518, "patch_size": 14}
    model = filled(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**config, num_register_tokens=2)))
    model.save_pretrained(tmp_path / "folder")
    size = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    (tmp_path / "folder/preprocessor_config.json").write_text(json.dumps(size))
    state = dinov2(load_file(tmp_path / "folder/model.safetensors"))
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, 48)
    save_file(state, tmp_path / "dinov2.safetensors")

    theirs, ours = (checkpoint.load(tmp_path / name) for name in ("folder", "dinov2.safetensors"))
    assert ours.image_size == theirs.image_size == (224, 224)
    assert ours.preprocessing == theirs.preprocessing == Preprocessing(res=(224, 224), resize=256, **IMAGENET)
    given = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours.model(given), theirs.model(given))
        torch.testing.assert_close(ours.model(given), model(given).pooler_output, rtol=0, atol=1e-5)


def test_dinov2_with_its_linear_classifier(tmp_path):
    """The head reads the class token and the mean of the patches, as dinov2/hub/classifiers.py joins them."""
    model, head = reference(num_classes=0, init_values=1.0), filled(nn.Linear(96, 10))
    state = renamed(model.state_dict(), ("^", "backbone.")) | renamed(head.state_dict(), ("^", "linear_head."))
    save_file({**state, "backbone.mask_token": torch.zeros(1, 48)}, tmp_path / "lc.safetensors")
    ours = checkpoint.load(tmp_path / "lc.safetensors")
    with torch.no_grad():
        tokens = model.forward_features(images())
        expected = head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))
        torch.testing.assert_close(
            ours.model(images()), expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max()))
        )


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_training_checkpoint_gives_its_teacher(tmp_path, kind):
    model = reference(num_classes=0, **({"init_values": 1.0} if kind == "dinov2" else {}))
    teacher = renamed(model.state_dict(), ("^", "backbone."))
    if kind == "dino":
        teacher |= {"head.mlp.0.weight": torch.ones(8, 48), "head.last_layer.weight_v": torch.ones(8, 8)}
    else:
        teacher |= {"backbone.mask_token": torch.ones(1, 48), "dino_head.mlp.0.weight": torch.ones(8, 48)}
    student = {f"module.{name}": torch.zeros_like(value) for name, value in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 7}, tmp_path / "checkpoint.pth")
    assert_logits(tmp_path / "checkpoint.pth", model, "dino")


def test_giant_has_the_heads_of_its_width(tmp_path):
    config = {"embed_dim": 1536, "depth": 1, "num_heads": 24, "num_classes": 0, "init_values": 1.0, "mlp_ratio": 2}
    model = VisionTransformer(**{**SMALL, **config}, mlp_layer=SwiGLUPacked)
    state = renamed(model.state_dict(), (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"))
    save_file({**state, "mask_token": torch.zeros(1, 1536)}, tmp_path / "giant.safetensors")
    config = weights.load(tmp_path / "giant.safetensors").config
    assert (config.heads, config.activation, config.mlp_dim) == (24, "swiglu", 1536)


# MAE and I-JEPA


def test_mae_with_its_decoder(tmp_path):
    model = reference(num_classes=0)
    decoder = {
        "mask_token": torch.ones(1, 1, 32),
        "decoder_pos_embed": torch.ones(1, 17, 32),
        "decoder_embed.weight": torch.ones(32, 48),
        "decoder_blocks.0.norm1.weight": torch.ones(32),
        "decoder_pred.bias": torch.ones(192),
    }
    save_file({**model.state_dict(), **decoder}, tmp_path / "mae.safetensors")
    ours = assert_logits(tmp_path / "mae.safetensors", model, "mae")
    assert (ours.classes, ours.config.posemb_resize) == ((), "bicubic")
    assert ours.preprocessing == Preprocessing(res=(32, 32), resize=36, **IMAGENET)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_mae_after_finetuning(tmp_path, pool):
    """Mean of the patches, then fc_norm, beside a class token that nobody reads; or the class token after norm."""
    model = reference(global_pool=pool)
    assert ("fc_norm.weight" in model.state_dict()) == (pool == "avg")
    save_file(model.state_dict(), tmp_path / "mae.safetensors")
    assert assert_logits(tmp_path / "mae.safetensors", model, "timm").config.class_token


@pytest.mark.parametrize("kept", ["target_encoder", "encoder"])
def test_ijepa(tmp_path, kept):
    """The averaged encoder where both are there. Its features are the mean of all patches."""
    model = reference(num_classes=0, class_token=False, global_pool="avg", fc_norm=False)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    both = {"encoder": zeros, "target_encoder": state} if kept == "target_encoder" else {"encoder": state}
    torch.save({**both, "predictor": {"module.mask_token": torch.ones(1, 1, 8)}, "epoch": 1}, tmp_path / "jepa.pth")
    assert assert_logits(tmp_path / "jepa.pth", model, "timm").config.pool == "gap"


# Tensors that do not fit


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("deit3", {"blocks.1.gamma_2": None}, "missing from what looks like a deit3 file: blocks.1.ls2.gamma"),
        ("deit3", {"blocks.1.gamma_3": torch.ones(48)}, "unexpected in a deit3 file: blocks.1.gamma_3"),
        ("deit3", {"blocks.1.gamma_2": torch.ones(47)}, "blocks.1.ls2.gamma has shape (47,), expected (48,)"),
        ("dino", {"blocks.1.mlp.fc1.bias": None}, "missing from what looks like a dino file: blocks.1.mlp.fc1.bias"),
        ("dino", {"blocks.1.1.norm1.bias": torch.ones(48)}, "there is a second tensor for blocks.1.norm1.bias"),
        ("dino", {"register_tokens": torch.ones(4, 48)}, "reg_token has shape (4, 48), expected 3 dimensions"),
        ("mae", {"blocks.1.attn.proj.bias": None}, "missing from what looks like a mae file: blocks.1.attn.proj.bias"),
        ("mae", {"encoder_extra": torch.ones(1)}, "unexpected in a mae file: encoder_extra"),
        ("mae", {"pos_embed": torch.ones(1, 15, 48)}, "pos_embed has 15 rows, which is not a square grid"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value[:12],
)
def test_tensors_that_do_not_fit(tmp_path, format, change, message):
    state = deit3()[1] if format == "deit3" else reference(init_values=1.0).state_dict()
    state |= {"deit3": {}, "dino": {"mask_token": torch.ones(1, 48)}}.get(
        format, {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 48)}
    )
    state = {name: value for name, value in {**state, **change}.items() if value is not None}
    save_file(state, tmp_path / "some.safetensors")
    assert message in refusal(tmp_path / "some.safetensors")
