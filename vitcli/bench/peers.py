"""The same Vision Transformer as other libraries build it, for `vit bench`. Nothing else needs them."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vitcli.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from vitcli.model import ViTConfig

# What each can build beyond the paper's plain ViT, as keys of ViTConfig.
NAMES: dict[str, frozenset[str]] = {
    "timm": frozenset({"pool", "class_token", "posemb", "posemb_class", "layerscale", "qk_norm", "drop_path"}),
    "torchvision": frozenset(),
    "transformers": frozenset(),
}
PLAIN = "plain"  # no library: our model as torch computes it by itself, in fp32 and eager
PAPER = {
    "stem": None,
    "pool": "token",
    "class_token": True,
    "distilled": False,
    "registers": 0,
    "posemb": "learned",
    "posemb_class": True,
    "drop_path": 0.0,
    "layerscale": None,
    "qk_norm": False,
    "pre_norm": False,
    "norm_after_pool": False,
}
GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # torch's `approximate`


class PeerError(RecipeError):
    """A peer that is not installed here, or that cannot build such a model."""


def check(name: str) -> None:
    """Raises RecipeError for a name that stands for no peer, PeerError for one that is not installed."""
    if name not in (*NAMES, PLAIN):
        raise RecipeError(f"no peer is called {name!r}", f"peers: {', '.join((*NAMES, PLAIN))}")
    if name != PLAIN and not find_spec(name):
        raise PeerError(f"{name} is not installed", f"pip install {name}")


def build(name: str, config: ViTConfig, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """A new model of a peer: normalised images (b, 3, h, w) -> logits (b, classes), the function of `config.build`.

    Raises PeerError where the peer has no such model.
    """
    lacking = {key: getattr(config, key) for key, plain in PAPER.items() if getattr(config, key) != plain}
    wanted = {key: value for key, value in lacking.items() if key not in NAMES[name]}
    if config.activation not in GELU:
        wanted["activation"] = config.activation
    if config.pool not in ("token", "gap"):
        wanted["pool"] = config.pool
    if name == "torchvision" and image_size[0] != image_size[1]:
        wanted["res"] = list(image_size)
    if wanted:
        asked = ", ".join(f"{key} {value}" for key, value in wanted.items())
        raise PeerError(f"{name} has no such model: {asked}")
    model = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}[name](
        config, classes, image_size
    )
    ours, theirs = _trained(config, classes, image_size), sum(p.numel() for p in model.parameters() if p.requires_grad)
    if theirs != ours:
        raise PeerError(f"{name} builds {theirs:,} parameters where ours are {ours:,}: not the same model")
    return model


def _trained(config: ViTConfig, classes: int, image_size: tuple[int, int]) -> int:
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build(classes, image_size).parameters())


def _timm(config: ViTConfig, classes: int, image_size: tuple[int, int]) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model: Any = VisionTransformer(
        img_size=image_size,
        patch_size=config.patch,
        num_classes=classes,
        global_pool="token" if config.pool == "token" else "avg",
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_dim / config.width,
        qk_norm=config.qk_norm,
        init_values=config.layerscale,
        class_token=config.class_token,
        no_embed_class=not config.posemb_class,
        pos_embed="none" if config.posemb == "none" else "learn",
        fc_norm=False,
        pos_drop_rate=config.dropout,
        proj_drop_rate=config.dropout,
        attn_drop_rate=config.attention_dropout,
        drop_path_rate=config.drop_path,
        norm_layer=_norm(config),
        act_layer=_gelu(config),
    )
    if config.posemb.startswith("sincos2d"):
        model.pos_embed.requires_grad_(False)
    model.head = _head(config, classes)
    return model


def _torchvision(config: ViTConfig, classes: int, image_size: tuple[int, int]) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    model: Any = VisionTransformer(
        image_size=image_size[0],
        patch_size=config.patch,
        num_layers=config.depth,
        num_heads=config.heads,
        hidden_dim=config.width,
        mlp_dim=config.mlp_dim,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        num_classes=classes,
        norm_layer=_norm(config),
    )
    for block in model.encoder.layers:
        block.mlp[1] = _gelu(config)()  # it has no choice of the GELU's form
    model.heads = _head(config, classes)
    return model


def _transformers(config: ViTConfig, classes: int, image_size: tuple[int, int]) -> nn.Module:
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTForImageClassification

    theirs = TheirConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_dim,
        hidden_act="gelu" if config.activation == "gelu" else "gelu_pytorch_tanh",
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        layer_norm_eps=config.norm_eps,
        image_size=image_size,
        patch_size=config.patch,
    )
    model: Any = ViTForImageClassification._from_config(theirs, attn_implementation="sdpa")
    model.classifier = _head(config, classes)
    return _logits_of(model)


def _logits_of(model: nn.Module) -> nn.Module:
    """A model of transformers that gives its logits alone."""
    from torch import Tensor, nn

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model(pixel_values=images).logits

    return Logits()


def _norm(config: ViTConfig) -> Callable[..., nn.Module]:
    from torch import nn

    return partial(nn.LayerNorm, eps=config.norm_eps)


def _gelu(config: ViTConfig) -> Callable[..., nn.Module]:
    from torch import nn

    return partial(nn.GELU, approximate=GELU[config.activation])


def _head(config: ViTConfig, classes: int) -> nn.Module:
    """The head of `ViTConfig`, with the dense + tanh layer before it that most recipes ask for and no peer has."""
    from torch import nn

    features = config.representation_size or config.width
    layers = [nn.Linear(config.width, features), nn.Tanh()] if config.representation_size else []
    return nn.Sequential(*layers, nn.Linear(features, classes))
