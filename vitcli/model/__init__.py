"""The Vision Transformer: `ViTConfig` describes one, `ViTConfig.build` makes it.

The modules of this folder are pure: no device, precision, process, compilation, optimiser or recipe is known here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from vitcli.schema import Schema, wrong

if TYPE_CHECKING:
    from vitcli.model.vit import ViT

Rate = Field(default=0.0, ge=0.0, lt=1.0)

# name: width, depth, MLP width, heads. Ti-H: arXiv 2010.11929 and 2106.10270; the others: arXiv 2106.04560, Table 2.
SIZES = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}

# Hybrids: blocks of each ResNet stage, and the patch size on the feature map (vit_jax/configs/models.py).
HYBRIDS = {
    "R+Ti/16": ((), 8),
    "R26+S/32": ((2, 2, 2, 2), 1),
    "R26+B/32": ((2, 2, 2, 2), 1),
    "R50+B/16": ((3, 4, 9), 1),
    "R50+L/32": ((3, 4, 6, 3), 1),
}


class ResNetStem(Schema):
    """The ResNet-v2-like stem of the hybrids: a 7x7 root, then bottleneck stages (vit_jax/models_resnet.py)."""

    layers: tuple[PositiveInt, ...] = Field(
        (3, 4, 9), max_length=8, description="bottleneck blocks of each stage; [] is the root"
    )
    width: PositiveInt = Field(64, description="channels of the root; a multiple of 32")


class ViTConfig(Schema):
    """A ViT's architecture. The defaults are those of *An Image is Worth 16x16 Words* and its Flax code."""

    variant: str | None = Field(None, description="a named size: Ti S M B L H g G with a patch (B/16), or R50+B/16")
    width: PositiveInt = Field(description="channels of a token")
    depth: int = Field(ge=0, le=1000, description="encoder blocks; 0 leaves out the whole encoder (transformer=None)")
    mlp_dim: PositiveInt = Field(description="hidden channels of a block's MLP")
    heads: PositiveInt = Field(description="attention heads")
    patch: PositiveInt = Field(description="side of a patch, in pixels of the image or of the stem's feature map")
    stem: ResNetStem | None = Field(None, description="a ResNet before the patches, as in the hybrids")

    pool: Literal["token", "gap", "token_gap", "map", "none"] = Field(
        "token", description="what the head reads; token_gap: class token and mean side by side; none: all tokens"
    )
    class_token: bool = Field(description="a learned first token; by default only for pool: token and token_gap")
    distilled: bool = Field(False, description="DeiT's second token, with a head of its own (arXiv 2012.12877)")
    registers: int = Field(0, ge=0, description="further learned tokens without position (arXiv 2309.16588)")
    posemb: Literal["learned", "sincos2d", "sincos2d_mae", "none"] = Field(
        "learned", description="position table; sincos2d is big_vision's and MoCo v3's, sincos2d_mae MAE's"
    )
    posemb_class: bool = Field(description="position rows for the class token too; by default where there is one")
    posemb_std: float | None = Field(0.02, gt=0, description="initial spread of a learned table; null: 1/sqrt(width)")
    posemb_resize: Literal["bilinear", "bicubic", "bicubic_antialias", "bicubic_corners", "bicubic_offset"] = Field(
        "bilinear",
        description="stretches the table to another resolution: as the original; DeiT, MAE and transformers; timm; "
        "torchvision; DINOv2",
    )

    dropout: float = Rate
    attention_dropout: float = Rate
    drop_path: float = Field(0.0, ge=0.0, lt=1.0, description="stochastic depth: rate of the last block, linear from 0")
    layerscale: float | None = Field(None, gt=0, description="initial LayerScale; null: none (arXiv 2103.17239)")
    qk_norm: bool = Field(False, description="LayerNorm on queries and keys (arXiv 2302.05442)")
    activation: Literal["gelu_tanh", "gelu", "quick_gelu", "swiglu"] = Field(
        "gelu_tanh", description="gelu_tanh is flax's default and so the original's; quick_gelu is CLIP's"
    )
    pre_norm: bool = Field(False, description="a LayerNorm before the blocks, as in CLIP")
    norm_after_pool: bool = Field(False, description="the last LayerNorm after pooling, as MAE fine-tunes")
    norm_eps: float = Field(1e-6, gt=0)
    representation_size: PositiveInt | None = Field(None, description="a dense + tanh layer before the head")
    head_bias: float = Field(0.0, description="initial bias of the zero head (head_bias_init)")

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, values: Any) -> Any:
        """Fill in what `variant` and `pool` imply; a key that is given wins."""
        if not isinstance(values, dict):
            return values
        implied = _decode(values["variant"]) if isinstance(values.get("variant"), str) else {}
        class_token = values.get("class_token", values.get("pool", "token") in ("token", "token_gap"))
        posemb_class = class_token and values.get("posemb", "learned") == "learned"
        implied |= {"class_token": class_token, "posemb_class": posemb_class}
        return {**implied, **values}

    @model_validator(mode="after")
    def _check(self) -> ViTConfig:
        if self.width % self.heads:
            raise wrong("heads", f"width {self.width} is not divisible by heads {self.heads}")
        if self.posemb.startswith("sincos2d") and self.width % 4:
            raise wrong("posemb", f"{self.posemb} needs a width divisible by 4, not {self.width}")
        if self.pool in ("token", "token_gap") and not self.class_token:
            raise wrong("class_token", f"pool: {self.pool} reads the class token, so class_token must be true")
        if self.distilled and (self.pool != "token" or self.registers or self.representation_size):
            raise wrong("distilled", "goes with pool: token, without registers and representation_size")
        if self.norm_after_pool and (self.pool in ("map", "none") or self.distilled or not self.depth):
            raise wrong("norm_after_pool", "goes with pool: token, gap or token_gap, and is not DeiT's")
        if self.posemb_class and not self.class_token:
            raise wrong("posemb_class", "needs class_token: true")
        if self.stem and self.stem.width % 32:
            raise wrong("stem", f"width {self.stem.width} is not a multiple of 32, the number of GroupNorm's groups")
        if self.depth == 0 and (self.pool not in ("gap", "none") or self.class_token or self.registers):
            raise wrong("depth", "0 leaves no tokens: use pool: gap or none, without class_token and registers")
        return self

    @property
    def prefix(self) -> int:
        """Tokens before the patches: class token, DeiT's second one, registers."""
        return int(self.class_token) + int(self.distilled) + self.registers

    @property
    def posemb_prefix(self) -> int:
        """Rows of the position table before those of the patches."""
        return self.posemb_class * (1 + self.distilled)

    @property
    def stride(self) -> int:
        """Pixels of the image that one token stands for, along each side."""
        return self.patch * (2 ** (2 + max(0, len(self.stem.layers) - 1)) if self.stem else 1)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Tokens down and across for an image (height, width). Raises ValueError if the patches do not fit."""
        height, width = image_size
        if height % self.stride or width % self.stride:
            near = max(self.stride, round(height / self.stride) * self.stride)
            raise ValueError(f"resolution {height}x{width} is not divisible by {self.stride}; the nearest is {near}")
        return height // self.stride, width // self.stride

    def build(self, classes: int, image_size: tuple[int, int]) -> ViT:
        """A new model for images (height, width), with the original's initial weights.

        `classes` 0 leaves the head out. The weights come from torch's global generator; on the meta device there are
        none, and none are drawn.
        """
        from vitcli.model.vit import ViT, drawing

        with drawing():
            return ViT(self, classes, image_size)


def _decode(variant: str) -> dict[str, Any]:
    """Numbers of a named size: `B/16`, `R50+B/16`."""
    match = re.fullmatch(r"(?:R\d*\+)?(\w+?)/(\d+)", variant)
    if not match or match[1] not in SIZES or ("+" in variant and variant not in HYBRIDS):
        known = f"SIZE/PATCH with a size of {', '.join(SIZES)}, or {', '.join(HYBRIDS)}"
        raise wrong("variant", f"{variant!r} is not known: {known}")
    numbers: dict[str, Any] = dict(zip(("width", "depth", "mlp_dim", "heads"), SIZES[match[1]], strict=True))
    if variant not in HYBRIDS:
        return {**numbers, "patch": int(match[2])}
    layers, patch = HYBRIDS[variant]
    return {**numbers, "patch": patch, "stem": {"layers": layers}}
