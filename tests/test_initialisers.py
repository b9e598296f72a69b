"""First weights are the original's (vit_jax), by their distributions."""

import math

import pytest
import torch

from vitcli.model import ViTConfig
from vitcli.model.vit import ViT

WIDTH, HIDDEN, PATCH = 256, 1024, 16
CONFIG = {"width": WIDTH, "depth": 2, "mlp_dim": HIDDEN, "heads": 4, "patch": PATCH}


def build(**config) -> ViT:
    torch.manual_seed(0)
    return ViTConfig(**{**CONFIG, **config}).build(100, (224, 224))


@pytest.fixture(scope="module")
def model() -> ViT:
    return build(representation_size=512, head_bias=-6.9, registers=4, layerscale=0.1)


# Estimates from n numbers may be off by about 5 of their own deviations.
def assert_uniform(weight: torch.Tensor, bound: float) -> None:
    assert weight.abs().max().item() <= bound
    assert weight.abs().max().item() >= 0.98 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=2 / math.sqrt(weight.numel()))
    assert weight.mean().item() == pytest.approx(0, abs=5 * bound / math.sqrt(3 * weight.numel()))


def assert_normal(weight: torch.Tensor, std: float, cut: bool = False) -> None:
    assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(weight.numel()))
    assert weight.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(weight.numel()))
    # A jax truncated normal is cut at two deviations of the normal before the cut, which is wider by 1 / 0.8796.
    limit = 2 * std / 0.87962566103423978
    assert (weight.abs().max().item() <= limit) is cut


def test_queries_keys_and_values_are_initialised_one_by_one(model):
    for block in model.blocks:
        for weight in block.attn.qkv.weight.chunk(3):
            assert_uniform(weight, math.sqrt(6 / (2 * WIDTH)))
        assert_uniform(block.attn.proj.weight, math.sqrt(6 / (2 * WIDTH)))
        assert not block.attn.qkv.bias.any()
        assert not block.attn.proj.bias.any()


def test_mlp(model):
    for block in model.blocks:
        for layer in (block.mlp.fc1, block.mlp.fc2):
            assert_uniform(layer.weight, math.sqrt(6 / (WIDTH + HIDDEN)))
            assert layer.bias.std().item() == pytest.approx(1e-6, rel=0.2)


def test_patches(model):
    assert_normal(model.patch_embed.proj.weight, 1 / math.sqrt(3 * PATCH**2), cut=True)
    assert not model.patch_embed.proj.bias.any()


def test_pre_logits(model):
    assert_normal(model.pre_logits.fc.weight, 1 / math.sqrt(WIDTH), cut=True)
    assert not model.pre_logits.fc.bias.any()


def test_head_is_zero_with_its_bias(model):
    assert not model.head.weight.any()
    assert (model.head.bias == -6.9).all()
    assert torch.equal(model(torch.randn(2, 3, 224, 224)), torch.full((2, 100), -6.9))


def test_tokens_norms_and_layerscale(model):
    assert not model.cls_token.any()
    assert model.reg_token.std().item() == pytest.approx(1e-6, rel=0.1)
    for name, value in model.state_dict().items():
        if "norm" in name:
            assert (value == float(name.endswith("weight"))).all()
        if "gamma" in name:
            assert (value == 0.1).all()


@pytest.mark.parametrize(("std", "expected"), [(0.02, 0.02), (None, 1 / math.sqrt(WIDTH))])
def test_positions(std, expected):
    assert_normal(build(posemb_std=std).pos_embed, expected)


def test_attention_pool():
    pool = build(pool="map").attn_pool
    assert_uniform(pool.latent, math.sqrt(6 / (1 + WIDTH)))
    for weight in (pool.q.weight, *pool.kv.weight.chunk(2), pool.proj.weight):
        assert_uniform(weight, math.sqrt(6 / (2 * WIDTH)))
    for layer in (pool.q, pool.kv, pool.proj):
        assert not layer.bias.any()


def test_resnet_branches_start_at_zero():
    stem = build(patch=1, stem={"layers": (1, 1), "width": 64}).patch_embed.backbone
    assert_normal(stem.stem.conv.weight, 1 / math.sqrt(3 * 49), cut=True)
    for stage in stem.stages:
        block = stage.blocks[0]
        assert_normal(block.conv2.weight, 1 / math.sqrt(block.conv2.weight[0].numel()), cut=True)
        assert not block.norm3.weight.any()
        assert (block.norm2.weight == 1).all()
        assert (block.downsample.norm.weight == 1).all()


def test_weights_follow_the_seed():
    first, second = build().state_dict(), build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
