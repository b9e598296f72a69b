"""timm's layout, in and out, held against timm's own classes."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.layers import SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitcli import checkpoint, exporters, weights
from vitcli.data import Preprocessing
from vitcli.data.imagenet import WNIDS
from vitcli.data.preprocess import normalise, prepare
from vitcli.errors import CheckpointError
from vitcli.exporters import photographs
from vitcli.model import ViTConfig
from vitcli.weights import Beside, Foreign, Tensors

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
OURS = {"width": 48, "depth": 2, "mlp_dim": 96, "heads": 3, "patch": 8}


def filled(model: nn.Module) -> nn.Module:
    """Every parameter at random, norms too; only in timm's CLIP there is no bias of the patches."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def reference(kind: type = VisionTransformer, **config) -> nn.Module:
    return filled(kind(**{**SMALL, **config}))


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(1))


def assert_logits(path: Path, theirs: nn.Module, size: tuple[int, int] = (32, 32)) -> checkpoint.Trained:
    """The file gives the logits that their model gives."""
    ours, x = checkpoint.load(path), images(*size)
    assert ours.image_size == size
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours.model(x), expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))
    return ours


def folder(tmp_path: Path, model: nn.Module, architecture: str, **config) -> Path:
    """A folder as the Hugging Face hub has it."""
    config = {"architecture": architecture, "pretrained_cfg": {}, **config}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        weights.load(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"{path}: ")


# Read, without a config


def test_golden_file(shared):
    ours = checkpoint.load(shared / "golden/timm_token.safetensors")
    io = np.load(shared / "golden/timm_token_io.npz")
    logits = ours.model(torch.from_numpy(io["images"])).detach().numpy()
    np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=1e-5)
    assert (ours.config.heads, ours.config.activation) == (3, "gelu")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
        {"init_values": 0.1, "qk_norm": True, "num_heads": 6},
        {"reg_tokens": 2, "no_embed_class": True},
        {"reg_tokens": 2},
        {"reg_tokens": 3, "class_token": False, "global_pool": "avg"},
        {"no_embed_class": True},
        {"qkv_bias": False},
        {"pre_norm": True, "norm_layer": lambda width, **to: nn.LayerNorm(width, 1e-5, **to)},
        {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4, "init_values": 1.0},
        {"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "mlp_ratio": 2},
        {"num_classes": 0},
    ],
    ids=lambda config: " ".join(config) or "plain",
)
def test_layouts(tmp_path, config):
    model = reference(**config)
    save_file(model.state_dict(), tmp_path / "some.safetensors")
    ours = assert_logits(tmp_path / "some.safetensors", model)
    assert (ours.origin, ours.model.classes) == (f"{tmp_path}/some.safetensors (timm)", config.get("num_classes", 10))


@pytest.mark.parametrize("classes", [10, 0])
def test_distilled(tmp_path, classes):
    model = reference(VisionTransformerDistilled, num_classes=classes)
    save_file(model.state_dict(), tmp_path / "deit.safetensors")
    assert assert_logits(tmp_path / "deit.safetensors", model).config.distilled


def test_preprocessing_by_convention(tmp_path):
    save_file(reference(img_size=64, patch_size=16).state_dict(), tmp_path / "some.safetensors")
    assert checkpoint.load(tmp_path / "some.safetensors").preprocessing == Preprocessing(
        res=(64, 64), resize=73, interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )


def test_hybrid_of_the_root_alone(tmp_path):
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=32, num_classes=3, depth=1)
    save_file(model.state_dict(), tmp_path / "some.safetensors")
    config = weights.load(tmp_path / "some.safetensors").config
    assert config.stem is not None
    assert (config.stem.layers, config.patch) == ((), 8)


# Read, with timm's config.json


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("vit_base_patch16_224", {"global_pool": "avg", "fc_norm": False}),
        ("vit_base_patch16_224", {"global_pool": "", "num_heads": 6}),
        ("vit_base_patch16_224", {"global_pool": "token", "fc_norm": True}),
        ("vit_base_patch16_224", {"act_layer": "quick_gelu"}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_base_patch32_clip_quickgelu_224", {}),
        ("vit_base_patch32_siglip_256", {}),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_giantopt_patch16_siglip_gap_256", {"num_heads": 4}),
        ("vit_giant_patch14_reg4_dinov2", {}),
        ("vit_base_patch16_gap_224", {"num_heads": 2}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_base_patch16_224", {"img_size": (16, 40), "reg_tokens": 1}),
    ],
    ids=str,
)
def test_folder_that_timm_saved(tmp_path, architecture, config):
    """timm's own writer, for an architecture whose code sets more than its tensors show."""
    model = filled(timm.create_model(architecture, **{**SMALL, **config}))
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert_logits(tmp_path, model, config.get("img_size", (32, 32)))


def test_every_architecture_of_timm():
    """What the config says, the tensors show and we repeat is what timm builds, or the architecture is refused."""
    plain, refused = 0, set()
    names = [name for pattern in ("vit_*", "deit*", "flexivit*", "eva_large*", "test_vit*", "beit3*", "aimv2*")
             for name in timm.list_models(pattern)]  # fmt: skip
    for name in names:
        if timm.models.model_entrypoint(name).__module__ not in (
            "timm.models.vision_transformer",
            "timm.models.deit",
        ):
            continue
        with torch.device("meta"):
            theirs = timm.create_model(name, depth=1)
        state = theirs.state_dict()
        size = theirs.patch_embed.img_size
        config = {
            "architecture": name,
            "global_pool": theirs.global_pool,
            "pretrained_cfg": {"input_size": [3, *size], "fixed_input_size": True},
        }
        try:
            assert weights.timm.matches(set(state)), "other blocks"
            ours = weights.timm.read(Tensors(state), Beside(config))
            with torch.device("meta"):
                built = ours.config.build(ours.head_classes, ours.image_size).state_dict()
            assert {k: v.shape for k, v in built.items()} == {k: v.shape for k, v in ours.state.items()}
        except (CheckpointError, AssertionError):
            refused.add(name)
            continue
        block, pools = theirs.blocks[0], {"avg": "gap"}
        activations = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "swiglu", "GELU": "gelu"}
        assert ours.config.activation == activations[type(block.mlp.act).__name__], name
        assert ours.config.norm_eps == block.norm1.eps, name
        assert ours.config.heads == block.attn.num_heads, name
        assert ours.config.pool == pools.get(theirs.global_pool, theirs.global_pool), name
        assert ours.image_size == tuple(side // ours.config.patch * ours.config.patch for side in size), name
        plain += 1
    known = (
        "aimv2",
        "beit3",
        "radio",
        "intern300m",
        "_xp_",
        "18x2",
        "rpn",
        "pwee",
        "dwee",
        "dlittle",
        "test_vit3",
        "test_vit4",
    )
    assert plain > 140
    assert [name for name in refused if not any(word in name for word in known)] == []


def test_config_decides_preprocessing_and_classes(tmp_path):
    cfg = {
        "input_size": [3, 32, 32],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.1, 0.2, 0.3],
        "label_names": [f"class {i}" for i in range(10)],
    }
    ours = checkpoint.load(folder(tmp_path, reference(), "vit_base_patch16_224", pretrained_cfg=cfg))
    assert ours.preprocessing == Preprocessing(
        res=(32, 32), resize=35, interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)
    )
    assert ours.classes == tuple(cfg["label_names"])


def test_older_config_with_all_in_one_object(tmp_path):
    config = {"pretrained_cfg": None, "crop_mode": "squash", "crop_pct": 1.0, "labels": list("abcdefghij")}
    path = folder(tmp_path, reference(), "vit_base_patch16_224", **config)
    (path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224", **config} | {"x": 1}))
    text = json.loads((path / "config.json").read_text())
    del text["pretrained_cfg"]
    (path / "config.json").write_text(json.dumps(text))
    ours = checkpoint.load(path)
    assert (ours.preprocessing.resize, ours.classes) == (None, tuple("abcdefghij"))


def test_1000_classes_without_names_are_imagenets(tmp_path):
    assert checkpoint.load(folder(tmp_path, reference(num_classes=1000), "vit_base_patch16_224")).classes == WNIDS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "vit_base_patch16_rope_224"}, "needs rotary positions"),
        ({"architecture": "vit_base_patch16_rpn_224"}, "has its norms after attention and MLP"),
        ({"model_args": {"global_pool": "avgmax"}}, "config.json: global_pool 'avgmax' is none of 'token', 'avg'"),
        ({"model_args": {"act_layer": "relu"}}, "config.json: act_layer 'relu' is none of 'gelu'"),
        ({"model_args": {"norm_layer": "rmsnorm"}}, "config.json: norm_layer 'rmsnorm' is none of 'layernorm'"),
        ({"model_args": {"num_heads": 5}}, "width 48 is not divisible by heads 5"),
        ({"model_args": {"num_heads": "x"}}, "config.json: model_args.num_heads: Input should be a valid integer"),
        ({"model_args": [1]}, "config.json: model_args: Input should be"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "config.json: pretrained_cfg.std.0: Input should be greater than 0"),
        ({"pretrained_cfg": {"crop_pct": 1e-9}}, "config.json: pretrained_cfg.crop_pct: Input should be greater than"),
        ({"vitcli": {"posemb_resize": "x"}}, "Input should be 'bilinear'"),
        ({"label_names": ["one"]}, "it names 1 classes, and its head has 10"),
    ],
    ids=str,
)
def test_config_that_does_not_fit(tmp_path, config, message):
    path = folder(tmp_path, reference(), **{"architecture": "vit_base_patch16_224", **config})
    assert message in refusal(path)


# What is no plain ViT


def test_transformers_that_look_like_a_vit_are_refused(tmp_path):
    """One of each of timm's families that share names with a ViT. What it is, is said by what shows it."""
    signs = {
        "vit_small_patch16_dinov3": "no pos_embed, so its positions are rotary, as DINOv3's",
        "vit_small_patch16_dinov3_qkvb": "blocks.0.attn.q_bias belongs to a ViT of the BEiT and EVA family",
        "vit_small_patch16_rope_mixed_ape_224": "rope.freqs belongs to a ViT with rotary positions",
        "eva02_tiny_patch14_224": "blocks.0.attn.q_bias belongs to a ViT of the BEiT and EVA family",
        "eva02_base_patch14_224": "blocks.0.attn.q_proj.weight belongs to a ViT of the BEiT and EVA family",
        "beit_base_patch16_224": "relative_position_bias_table belongs to a transformer with relative positions",
        "vit_relpos_small_patch16_224": "belongs to a transformer with relative positions",
        "vit_srelpos_small_patch16_224": "belongs to a transformer with relative positions",
        "vit_pe_lang_large_patch14_448": "belongs to Perception Encoder, which needs rotary positions",
        "samvit_base_patch16": "blocks.0.attn.rel_pos_h belongs to SAM's image encoder",
        "swin_tiny_patch4_window7_224": "layers.0.blocks.0.norm1.weight belongs to a transformer in stages",
        "cait_xxs24_224": "blocks.0.attn.proj_l.weight belongs to CaiT",
        "vit_base_patch16_xp_224": "belongs to a ViT with parallel blocks",
        "vit_small_patch16_18x2_224": "belongs to a ViT with parallel blocks",
        "vit_dwee_patch16_reg1_gap_256": "belongs to a ViT with differential attention",
        "beit3_base_patch16_224": "blocks.0.attn.norm.weight belongs to a ViT with norms within",
        "aimv2_large_patch14_224": "they are RMSNorm",
        "vit_small_resnet26d_224": "belongs to a hybrid whose convolutions are not Google's ResNet",
    }
    for name, sign in signs.items():
        with torch.device("meta"):
            names = set(timm.create_model(name).state_dict())
        save_file({key: torch.zeros(1) for key in names}, tmp_path / "some.safetensors")
        assert sign in refusal(tmp_path / "some.safetensors"), name


def test_dinov3_is_refused_by_name(tmp_path):
    state = reference().state_dict() | {"rope_embed.periods": torch.ones(4), "storage_tokens": torch.ones(1, 4, 48)}
    del state["pos_embed"]
    save_file(state, tmp_path / "dinov3.safetensors")
    message = refusal(tmp_path / "dinov3.safetensors")
    assert message.endswith("rope_embed.periods belongs to DINOv3, which needs rotary positions")


def test_perception_encoder_is_refused_by_its_two_parts(tmp_path):
    model = reference(pre_norm=True, class_token=False, global_pool="map")
    save_file(model.state_dict(), tmp_path / "some.safetensors")
    assert "Perception Encoder, which needs rotary positions" in refusal(tmp_path / "some.safetensors")


def test_model_without_its_last_norm(tmp_path):
    save_file(reference(final_norm=False).state_dict(), tmp_path / "some.safetensors")
    assert refusal(tmp_path / "some.safetensors") == "missing from what looks like a timm file: norm.bias, norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.mlp.fc1_x.bias": None}, "tensor blocks.1.mlp.fc1_x.bias is missing"),
        ({"blocks.1.mlp.fc1_g.bias": torch.zeros(())}, "wrong shape"),
        ({"blocks.1.attn.proj.bias": None}, "missing from what looks like a timm file: blocks.1.attn.proj.bias"),
        ({"surprise": torch.zeros(1)}, "unexpected in a timm file: surprise"),
        ({"norm.weight": torch.zeros(47)}, "norm.weight has shape (47,), expected (48,)"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    state = reference(mlp_layer=SwiGLU).state_dict() | change
    save_file({name: value for name, value in state.items() if value is not None}, tmp_path / "some.safetensors")
    assert message in refusal(tmp_path / "some.safetensors")


# Write


def trained(
    size: tuple[int, int] = (32, 32), classes: tuple[str, ...] = tuple("abcde"), **config
) -> checkpoint.Trained:
    """A model of ours with every parameter at random; `preprocessing` and what ViTConfig takes may be given."""
    preprocessing = config.pop("preprocessing", {"res": size})
    made = ViTConfig(**{**OURS, **config})
    model = filled(made.build(len(classes), size))
    if made.pre_norm:
        nn.init.zeros_(model.patch_embed.proj.bias)
    return checkpoint.Trained(model, made, classes, size, Preprocessing.parse(preprocessing), "here")


def write(made: checkpoint.Trained, out: Path) -> Path:
    """As the exporter does, without its check on photographs."""
    preprocessing = made.preprocessing.model_dump(mode="json")
    state, head = made.model.state_dict(), made.model.classes
    weights.timm.write(Foreign("timm", made.config, state, head, made.image_size, preprocessing, made.classes), out)
    return out


def opened(path: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pool": "gap"},
        {"pool": "gap", "class_token": True, "norm_after_pool": True},
        {"norm_after_pool": True},
        {"pool": "map", "activation": "gelu"},
        {"pool": "map", "class_token": True, "registers": 2},
        {"pool": "none", "class_token": True},
        {"activation": "quick_gelu", "pre_norm": True, "norm_eps": 1e-5},
        {"activation": "gelu", "norm_eps": 1e-5},
        {"activation": "swiglu", "mlp_dim": 70, "layerscale": 0.1},
        {"layerscale": 1e-5, "qk_norm": True},
        {"registers": 2},
        {"registers": 3, "posemb_class": False},
        {"registers": 4, "patch": 16},
        {"posemb_class": False},
        {"distilled": True, "activation": "gelu"},
        {"posemb": "sincos2d"},
        {"posemb": "sincos2d_mae", "class_token": True, "pool": "gap", "posemb_class": True},
        {"posemb": "none"},
        {"mlp_dim": 107, "heads": 4, "size": (16, 40)},
        {"classes": ()},
    ],
    ids=lambda config: " ".join(config) or "plain",
)
def test_timm_opens_what_was_written_and_so_do_we(tmp_path, config):
    """timm loads strictly: it would raise. Tensors, preprocessing and classes come back as they were."""
    made = trained(**config)
    theirs, x = opened(write(made, tmp_path / "out")), images(*made.image_size)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(x), made.model(x), rtol=0, atol=1e-5 * max(1.0, float(made.model(x).abs().max()))
        )

    back = checkpoint.load(tmp_path / "out")
    state, returned = made.model.state_dict(), back.model.state_dict()
    assert all(torch.equal(value, returned[name]) for name, value in state.items())
    assert returned.keys() - state.keys() <= ({"pos_embed"} if made.config.posemb != "learned" else set())
    assert (back.preprocessing, back.classes) == (made.preprocessing, made.classes)
    kept = {
        "posemb": "learned",
        "posemb_class": made.config.posemb_class,
        "layerscale": made.config.layerscale and 1e-5,
    }
    if made.config.posemb == "learned":
        assert back.config == made.config.model_copy(update=kept)


def test_exported_and_exported_again_the_files_are_the_same(tmp_path):
    first = trained(registers=2, posemb="sincos2d")
    report = exporters.target("timm").export(first, tmp_path / "first")
    assert report.details == {"tensors": len(first.model.state_dict())}
    exporters.target("timm").export(checkpoint.load(tmp_path / "first"), tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize(
    "preprocessing",
    [
        {"res": 32, "resize": 37, "interpolation": "bicubic", "mean": 0.5, "std": 0.25},
        {"res": 32, "resize": 32, "interpolation": "bilinear"},
        {"res": 32, "resize": None, "interpolation": "bicubic"},
        {"res": 32, "resize": 49, "interpolation": "nearest", "mean": [0.1, 0.2, 0.3]},
    ],
    ids=str,
)
def test_timm_prepares_images_as_we_do(tmp_path, preprocessing):
    made = trained(preprocessing=preprocessing)
    theirs = opened(write(made, tmp_path / "out"))
    transform = create_transform(**resolve_model_data_config(theirs), is_training=False)
    for image in photographs()[:3]:
        ours = normalise(prepare(image, made.preprocessing)[None], made.preprocessing)[0]
        torch.testing.assert_close(transform(image), ours, rtol=0, atol=1e-6)


def test_every_shorter_side_is_a_share(tmp_path):
    """timm divides by the share and rounds down; a float must not lose a pixel."""
    for resize in range(32, 100):
        made = trained(depth=1, preprocessing={"res": 32, "resize": resize})
        config = json.loads((write(made, tmp_path / str(resize)) / "config.json").read_text())
        assert math.floor(32 / config["pretrained_cfg"]["crop_pct"]) == resize


def test_embedding_of_an_image_tower_stays_no_classes(tmp_path):
    made = trained(pre_norm=True, norm_eps=1e-5, activation="gelu")
    write(replace(made, classes=()), tmp_path / "out")
    assert checkpoint.load(tmp_path / "out").classes == ()
    assert opened(tmp_path / "out").num_classes == 5


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"patch": 1, "stem": {"layers": (1,), "width": 32}}, "ResNet stem with the original's epsilon in its filters"),
        ({"depth": 0, "pool": "gap"}, "model without blocks (depth: 0)"),
        ({"representation_size": 24}, "layer before the head (representation_size)"),
        ({"pool": "token_gap"}, "pool: token_gap"),
        ({"pool": "none", "class_token": True, "registers": 1}, "pool: none without registers in its output"),
        ({"pool": "map", "activation": "swiglu"}, "swiglu in attention pooling"),
        ({"distilled": True, "activation": "swiglu"}, "distilled model with swiglu"),
        ({"distilled": True, "posemb_class": False}, "distilled model without position rows for its class tokens"),
        ({"norm_eps": 1e-12}, "norm_eps: 1e-12, only 1e-06 and 1e-05"),
        ({"norm_eps": 1e-5, "distilled": True}, "norm_eps: 1e-05 with swiglu or distilled"),
    ],
    ids=str,
)
def test_what_timm_cannot_express_is_named(tmp_path, config, part):
    with pytest.raises(CheckpointError, match="timm's VisionTransformer has no") as caught:
        exporters.target("timm").export(trained(**config), tmp_path / "out")
    assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bias_of_clips_patches_is_named(tmp_path):
    made = trained(pre_norm=True)
    nn.init.ones_(made.model.patch_embed.proj.bias)
    with pytest.raises(CheckpointError, match="bias of the patches"):
        exporters.target("timm").export(made, tmp_path / "out")


def test_deit_tiny_gives_the_logits_of_timm_and_goes_back_to_timm(shared, tmp_path):
    path = shared / "data/deit_tiny_patch16_224.pth"
    theirs = timm.create_model("deit_tiny_patch16_224").eval()
    theirs.load_state_dict(torch.load(path, weights_only=True)["model"])
    ours = assert_logits(path, theirs, (224, 224))
    assert ours.preprocessing == Preprocessing(
        res=(224, 224), resize=256, interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    again = opened(write(ours, tmp_path / "out"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert resolve_model_data_config(again)["crop_pct"] == 224 / 256
    assert json.loads((tmp_path / "out/config.json").read_text())["label_names"] == list(WNIDS)
