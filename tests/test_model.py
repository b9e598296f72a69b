"""The model computes what the original and timm compute, with the same parameter names."""

import re

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitcli.model import ViTConfig
from vitcli.model.attention import Attention, explicit_attention, fused_attention
from vitcli.model.stem import ResNet, StdConv, group_norm
from vitcli.model.vit import Block, DropPath, ViT

MU = {"variant": "mu/8", "depth": 2}


def build(classes: int = 5, size: tuple[int, int] = (32, 48), **config) -> ViT:
    """A small model whose every parameter is random, so that none can be left out unnoticed."""
    return randomise(ViTConfig(**{**MU, **config}).build(classes, size)).eval()


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("Ti/16", 5_717_416),
        ("S/16", 22_050_664),
        ("B/16", 86_567_656),
        ("L/16", 304_326_632),
        ("H/14", 632_045_800),
        ("R50+B/16", 98_659_112),
    ],
)
def test_parameters_are_as_many_as_published(variant, parameters):
    with torch.device("meta"):
        model = ViTConfig(variant=variant).build(1000, (224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vit_tiny_patch16_224", {"variant": "Ti/16"}),
        ("vit_huge_patch14_224", {"variant": "H/14"}),
        ("vit_so400m_patch14_siglip_224", {"variant": "So400m/14", "pool": "map"}),
        ("vit_small_r26_s32_224", {"variant": "R26+S/32"}),
        ("vit_base_r50_s16_224", {"variant": "R50+B/16"}),
        ("vit_large_r50_s32_224", {"variant": "R50+L/32"}),
        (
            "vit_small_patch14_reg4_dinov2",
            {"variant": "S/14", "registers": 4, "posemb_class": False, "layerscale": 1e-5},
        ),
    ],
)
def test_names_and_shapes_are_those_of_timm(name, config):
    with torch.device("meta"):
        reference = timm.create_model(name, num_classes=10)
        model = ViTConfig(**config).build(10, reference.patch_embed.img_size)
    assert shapes(model) == shapes(reference)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        ({}, {}),
        ({"pool": "gap"}, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
        ({"pool": "gap", "class_token": True}, {"global_pool": "avg", "fc_norm": False}),
        ({"pool": "map"}, {"class_token": False, "global_pool": "map"}),
        ({"layerscale": 0.1, "qk_norm": True}, {"init_values": 0.1, "qk_norm": True}),
        ({"registers": 3, "posemb_class": False}, {"reg_tokens": 3, "no_embed_class": True}),
        (
            {"registers": 3, "posemb_class": False, "pool": "gap", "class_token": True},
            {"reg_tokens": 3, "no_embed_class": True, "global_pool": "avg", "fc_norm": False},
        ),
    ],
    ids=["token", "gap", "gap with class token", "map", "layerscale and qk_norm", "registers", "gap with registers"],
)
def test_logits_are_those_of_timm(config, theirs):
    model = build(activation="gelu", **config)
    reference = timm.models.vision_transformer.VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, **theirs
    ).eval()
    reference.load_state_dict(model.state_dict())
    x = images(3, 3, 32, 48)
    torch.testing.assert_close(model(x), reference(x), rtol=0, atol=1e-5)


def test_hybrid_gives_the_logits_of_timm():
    """With the two differences of timm taken out: GroupNorm's epsilon, and where StdConv's is added."""
    reference = timm.create_model(
        "vit_small_r26_s32_224", img_size=64, embed_dim=32, depth=1, num_heads=2, num_classes=5
    )
    model = build(
        size=(64, 64),
        width=32,
        depth=1,
        heads=2,
        mlp_dim=128,
        patch=1,
        stem={"layers": (2, 2, 2, 2)},
        activation="gelu",
    )
    for module in model.modules():
        if isinstance(module, StdConv):
            module.weight.data *= 1e4
    for module in reference.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-6
    reference.eval().load_state_dict(model.state_dict())
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_std_conv_standardises_and_pads_as_the_original(kernel, stride):
    conv = StdConv(4, 6, kernel, stride)
    x = images(2, 4, 16, 24).double()

    w = conv.double().weight.detach().numpy()
    w = (w - w.mean(axis=(1, 2, 3), keepdims=True)) / (w.std(axis=(1, 2, 3), keepdims=True) + 1e-5)
    windows = same_windows(x.numpy(), kernel, stride, fill=0.0)
    expected = np.einsum("bchwij,ocij->bohw", windows, w)

    np.testing.assert_allclose(conv(x).detach().numpy(), expected, rtol=0, atol=1e-10)


def test_group_norm_is_that_of_flax():
    """On small numbers, where the epsilon counts."""
    x = 1e-3 * images(2, 64, 4, 6).double()
    groups = x.numpy().reshape(2, 32, -1)
    expected = (groups - groups.mean(axis=2, keepdims=True)) / np.sqrt(groups.var(axis=2, keepdims=True) + 1e-6)
    np.testing.assert_allclose(group_norm(64).double()(x).detach().numpy().reshape(2, 32, -1), expected, atol=1e-10)


def test_max_pool_of_the_root_pads_as_the_original():
    """Without stages the ResNet is conv, norm, ReLU and the pooling."""
    root = ResNet((), 32)
    x = images(1, 3, 16, 24)
    before = root.stem(x).relu().detach().numpy()
    expected = same_windows(before, 3, 2, fill=-np.inf).max(axis=(-2, -1))
    np.testing.assert_array_equal(root(x).detach().numpy(), expected)


def same_windows(x: np.ndarray, kernel: int, stride: int, fill: float) -> np.ndarray:
    """TensorFlow's SAME, by its definition for any size: (b, c, h, w, kernel, kernel)."""
    pads = [(0, 0), (0, 0)]
    for side in x.shape[2:]:
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads.append((total // 2, total - total // 2))
    padded = np.pad(x, pads, constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
    return windows[:, :, ::stride, ::stride]


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, (2, 5)),
        ({"pool": "gap", "registers": 2}, (2, 5)),
        ({"pool": "map", "registers": 2}, (2, 5)),
        ({"pool": "none"}, (2, 24, 5)),
        ({"pool": "none", "class_token": True, "registers": 2}, (2, 25, 5)),
        ({"representation_size": 7}, (2, 5)),
        ({"posemb": "none"}, (2, 5)),
        ({"posemb": "sincos2d"}, (2, 5)),
        ({"depth": 0, "pool": "gap"}, (2, 5)),
        ({"depth": 0, "pool": "none"}, (2, 24, 5)),
    ],
    ids=str,
)
def test_shape_of_the_output(config, shape):
    assert build(**config)(images(2, 3, 32, 48)).shape == shape


def test_unpooled_tokens_are_the_class_token_and_the_patches():
    pooled, unpooled = build(registers=2), build(registers=2, pool="none", class_token=True)
    unpooled.load_state_dict(pooled.state_dict())
    x = images(2, 3, 32, 48)
    torch.testing.assert_close(unpooled(x)[:, 0], pooled(x), rtol=0, atol=1e-6)


def test_without_encoder_the_patches_are_averaged():
    model = build(classes=0, depth=0, pool="gap")
    assert {name.split(".")[0] for name in model.state_dict()} == {"patch_embed"}
    x = images(2, 3, 32, 48)
    torch.testing.assert_close(model(x), model.patch_embed.proj(x).mean(dim=(2, 3)))


def test_without_classes_the_features_come_out():
    model = build(classes=0, representation_size=7)
    assert model(images(2, 3, 32, 48)).shape == (2, 7)
    assert not [name for name in model.state_dict() if name.startswith("head")]


def test_fixed_tables_are_not_part_of_the_state():
    assert "pos_embed" not in build(posemb="sincos2d").state_dict()
    assert "pos_embed" not in build(posemb="sincos2d_mae").state_dict()


def test_position_row_of_the_class_token_is_zero_in_a_fixed_table():
    model = build(posemb="sincos2d_mae", posemb_class=True)
    assert model.pos_embed.shape == (1, 25, 32)
    assert not model.pos_embed[:, 0].any()
    assert torch.equal(model.embed(images(1, 3, 32, 48))[0, 0], model.cls_token[0, 0])


def test_registers_have_no_position():
    model = build(registers=2)
    tokens = model.embed(images(2, 3, 32, 48))
    assert tokens.shape == (2, 1 + 2 + 24, 32)
    assert torch.equal(tokens[:, 1:3], model.reg_token.expand(2, -1, -1))


def test_class_token_takes_the_first_row_of_the_table():
    model = build()
    tokens = model.embed(images(2, 3, 32, 48))
    assert torch.equal(tokens[0, 0], (model.cls_token + model.pos_embed[:, :1])[0, 0])


@pytest.mark.parametrize("config", [{}, {"qk_norm": True}, {"pool": "map"}], ids=str)
def test_both_attentions_agree(config):
    model = build(**config)
    x = images(2, 3, 32, 48)
    fused = model(x)
    swapped = 0
    for module in model.modules():
        if isinstance(module, Attention):
            assert module.attend is fused_attention
            module.attend = explicit_attention
            swapped += 1
    assert swapped == 2
    torch.testing.assert_close(model(x), fused, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config", [{}, {"registers": 2, "qk_norm": True}, {"distilled": True}, {"pool": "gap"}], ids=str
)
def test_computing_only_what_the_head_reads_is_the_same_function(config):
    model = build(**config)
    x = images(2, 3, 32, 48)
    tokens = model.encode(model.embed(x))
    logits = model.head(model.pool(tokens))
    if model.head_dist is not None:
        logits = (logits + model.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attend", [fused_attention, explicit_attention])
def test_attention_dropout_keeps_the_mean(attend):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 8, 16).unbind()
    mean = torch.stack([attend(q, k, v, 0.5) for _ in range(4000)]).mean(dim=0)
    torch.testing.assert_close(mean, attend(q, k, v, 0.0), rtol=0, atol=0.08)


@pytest.mark.parametrize("key", ["dropout", "attention_dropout", "drop_path"])
def test_regularisers_act_in_training_only(key):
    plain, model = build(), build(**{key: 0.5})
    model.load_state_dict(plain.state_dict())
    x = images(4, 3, 32, 48)
    assert torch.equal(model(x), plain(x))
    assert not torch.equal(model.train()(x), plain(x))


def test_stochastic_depth_grows_linearly():
    model = build(depth=5, drop_path=0.2)
    rates = [1 - block.drop_path.keep.item() for block in model.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2], abs=1e-6)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 3)
    y = DropPath(0.25).train()(x)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert y.mean().item() == pytest.approx(1, abs=0.02)


def test_every_layer_norm_has_the_epsilon():
    model = build(norm_eps=1e-3, qk_norm=True, pool="map")
    norms = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [1e-3] * (2 * 4 + 1 + 1)


def test_every_parameter_is_trained():
    model = build(
        registers=2, layerscale=0.1, qk_norm=True, representation_size=8, pool="map", class_token=True, size=(64, 64),
        patch=1, stem={"layers": (1, 1), "width": 32},
    ).train()  # fmt: skip
    model(images(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own look at its inputs
def test_blocks_compile_in_one_graph(unchecked):
    model = build(drop_path=0.1, dropout=0.1)
    x = images(2, 3, 32, 48)
    expected = model(x)
    names = list(model.state_dict())
    for block in model.blocks:
        assert isinstance(block, Block)
        block.compile(fullgraph=True, backend="eager")
    assert torch.equal(model(x), expected)
    model.train()(x).sum().backward()
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    "config", [{"registers": 1}, {"pool": "map"}, {"patch": 1, "stem": {"layers": (1, 1), "width": 32}}], ids=str
)
def test_model_exports_with_a_free_batch_size(config):
    model = build(size=(32, 64), **config)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (images(2, 3, 32, 64),), dynamic_shapes=({0: batch},)).module()
        x = images(5, 3, 32, 64)
        torch.testing.assert_close(exported(x), model(x), rtol=0, atol=1e-6)


def test_image_that_does_not_fit_the_patches_is_refused():
    with pytest.raises(ValueError, match=re.escape("resolution 30x32 is not divisible by 8; the nearest is 32")):
        ViTConfig(**MU).build(5, (30, 32))
