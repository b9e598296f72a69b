"""The Vision Transformer of *An Image is Worth 16x16 Words* (arXiv 2010.11929), after vit_jax/models_vit.py.

Parameter names are timm's.
"""

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitcli.model import ViTConfig
from vitcli.model.attention import Attention, AttentionPool
from vitcli.model.feedforward import FeedForward
from vitcli.model.position import fixed_table
from vitcli.model.stem import PatchEmbed, ResNet, lecun_normal


class ViT(nn.Module):
    """Images (b, 3, h, w) to logits (b, classes), or (b, tokens, classes) with `pool: none`.

    `classes` 0 leaves the head out: features (b, width) come out.
    """

    def __init__(self, config: ViTConfig, classes: int, image_size: tuple[int, int]):
        super().__init__()
        self.config, self.classes, self.image_size = config, classes, image_size
        c, d = config, config.width

        backbone = ResNet(c.stem.layers, c.stem.width) if c.stem else None
        self.patch_embed = PatchEmbed(backbone.channels if backbone else 3, c.patch, d, backbone)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d)) if c.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, d)) if c.distilled else None
        self.reg_token = normal(1e-6, 1, c.registers, d) if c.registers else None
        self.pos_embed = self._learned_positions()
        self.fix_positions()
        self.dropout = nn.Dropout(c.dropout if c.depth else 0.0)
        self.norm_pre = nn.LayerNorm(d, c.norm_eps) if c.pre_norm else nn.Identity()

        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        self.blocks = nn.ModuleList(Block(c, rate) for rate in rates)
        norm, after = nn.LayerNorm(d, c.norm_eps) if c.depth else nn.Identity(), c.norm_after_pool
        self.norm, self.fc_norm = (nn.Identity(), norm) if after else (norm, nn.Identity())

        if c.pool == "map":
            mlp = FeedForward(d, c.mlp_dim, c.activation, dropout=0.0)
            self.attn_pool = AttentionPool(d, c.heads, c.norm_eps, mlp)
        features = 2 * d if c.pool == "token_gap" else d
        self.pre_logits = _pre_logits(features, c.representation_size) if c.representation_size else nn.Identity()
        features = c.representation_size or features
        self.head = _head(features, classes, c.head_bias) if classes else nn.Identity()
        self.head_dist = None
        if c.distilled:
            self.head_dist = _head(features, classes, c.head_bias) if classes else nn.Identity()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b *n k"]:
        # Where only class tokens are read, the last block computes no others: the same function, for less.
        tokens = self.encode(self.embed(images), 1 + self.config.distilled if self.config.pool == "token" else None)
        logits = self.head(self.pre_logits(self.pool(tokens)))
        return logits if self.head_dist is None else (logits + self.head_dist(tokens[:, 1])) / 2

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Class token, registers and patches. Registers have no position; the class token may have one."""
        x, table, cls = self.patch_embed(images), self.pos_embed, self.cls_token
        if cls is not None and self.dist_token is not None:
            cls = torch.cat([cls, self.dist_token], dim=1)
        if table is not None:
            rows = self.config.posemb_prefix
            x = x + table[:, rows:]
            if cls is not None and rows:
                cls = cls + table[:, :rows]
        for token in (self.reg_token, cls):
            if token is not None:
                x = torch.cat([token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.norm_pre(self.dropout(x))

    def encode(self, x: Float[Tensor, "b n d"], first: int | None = None) -> Float[Tensor, "b m d"]:
        """The blocks and the last norm: all tokens, or only the `first` ones."""
        for i, block in enumerate(self.blocks):
            x = block(x, first if i == len(self.blocks) - 1 else None)
        return self.norm(x)

    def pool(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b *m features"]:
        """What the head reads. Registers are never read; the mean and MAP read patches only."""
        cls, prefix = int(self.config.class_token), self.config.prefix
        match self.config.pool:
            case "token":
                return self.fc_norm(x[:, 0])
            case "gap":
                return self.fc_norm(x[:, prefix:].mean(dim=1))
            case "token_gap":
                return torch.cat([self.fc_norm(x[:, 0]), self.fc_norm(x[:, prefix:].mean(dim=1))], dim=-1)
            case "map":
                return self.attn_pool(x[:, prefix:])
            case "none":
                return torch.cat([x[:, :cls], x[:, prefix:]], dim=1) if self.config.registers else x

    def _learned_positions(self) -> nn.Parameter | None:
        """The table `pos_embed` (1, rows, width) where it is trained."""
        if self.config.posemb != "learned" or self.config.depth == 0:
            return None
        down, across = self.config.grid(self.image_size)
        std = self.config.posemb_std or self.config.width**-0.5
        return normal(std, 1, self.config.posemb_prefix + down * across, self.config.width)

    def fix_positions(self) -> None:
        """Compute the table where it is fixed, and so no part of the state: also after a build on the meta device."""
        if self.config.posemb.startswith("sincos2d") and self.config.depth > 0:
            del self.pos_embed
            self.register_buffer("pos_embed", fixed_table(self.config, self.image_size), persistent=False)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); LayerScale and stochastic depth on both branches."""

    def __init__(self, config: ViTConfig, drop_path: float):
        super().__init__()
        c, d = config, config.width
        self.norm1 = nn.LayerNorm(d, c.norm_eps)
        self.attn = Attention(d, c.heads, c.qk_norm, c.norm_eps, c.attention_dropout, c.dropout)
        self.ls1 = LayerScale(d, c.layerscale) if c.layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(d, c.norm_eps)
        self.mlp = FeedForward(d, c.mlp_dim, c.activation, c.dropout)
        self.ls2 = LayerScale(d, c.layerscale) if c.layerscale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"], first: int | None = None) -> Float[Tensor, "b m d"]:
        """All tokens, or only the `first` ones, which have attended to all."""
        kept = x if first is None else x[:, :first]
        x, normed = self.between(kept, self.attn(self.norm1(x), first))
        return x + self.drop_path(self.ls2(self.mlp(normed)))

    def between(
        self, x: Float[Tensor, "b m d"], branch: Float[Tensor, "b m d"]
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b m d"]]:
        """x + branch and its norm, which a runtime may compute by one kernel."""
        x = x + self.drop_path(self.ls1(branch))
        return x, self.norm2(x)


class LayerScale(nn.Module):
    """A learned factor for each channel (arXiv 2103.17239)."""

    def __init__(self, width: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return x * self.gamma.to(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth: drops a sample's whole branch at `rate`, and scales the others up to make up for it."""

    def __init__(self, rate: float):
        super().__init__()
        self.active = rate > 0
        # A tensor, so that to a compiler blocks of different rates are the same computation.
        self.keep: Tensor
        self.register_buffer("keep", torch.tensor(1 - rate, device="cpu"), persistent=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if not self.training or not self.active:
            return x
        chance = torch.rand(x.shape[0], 1, 1, device=x.device)
        return x * ((chance < self.keep) / self.keep).to(x.dtype)


def normal(std: float, *shape: int) -> nn.Parameter:
    """A parameter from a normal distribution round 0."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=std))


# The steps of nn.init.trunc_normal_.
TRUNCATED = (Tensor.uniform_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_)


class _Undrawn(TorchFunctionMode):
    """Leaves new parameters as they are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.init.normal_:
            return (kwargs or {})["tensor"]
        if func in TRUNCATED:
            return args[0]
        return func(*args, **(kwargs or {}))


def drawing() -> AbstractContextManager:
    """How initial weights are drawn: not on the meta device, where torch would load 150 MB of Python to draw none."""
    return _Undrawn() if torch.get_default_device().type == "meta" else nullcontext()


def _pre_logits(width: int, features: int) -> nn.Sequential:
    layer = nn.Linear(width, features)
    lecun_normal(layer)
    return nn.Sequential(OrderedDict(fc=layer, act=nn.Tanh()))


def _head(features: int, classes: int, bias: float) -> nn.Linear:
    layer = nn.Linear(features, classes)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, bias)
    return layer
