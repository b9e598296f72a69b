"""What the shapes of a ViT's tensors, under our names, tell about it."""

import re
from collections import Counter
from math import isqrt
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.model import SIZES, ResNetStem, ViTConfig

State = dict[str, Tensor]
UNIT = r"stages\.(\d{1,3})\.blocks\.(\d{1,3})\."


class Architecture(NamedTuple):
    """The arguments of `ViTConfig.build`, and the config itself."""

    config: ViTConfig
    head_classes: int
    image_size: tuple[int, int]


def infer(state: State, heads: int | None = None, **conventions: Any) -> Architecture:
    """The architecture of `state`, whose position table may be brought to our form: class token's row, then patches.

    `conventions` are the keys of ViTConfig that a format implies and no shape tells. Raises CheckpointError.
    """
    width, _, patch, _ = _shape(state, "patch_embed.proj.weight", 4)
    class_token = "cls_token" in state
    registers = _shape(state, "reg_token", 3)[1] if "reg_token" in state else 0
    side, posemb_class = _positions(state, class_token, registers)
    try:
        config = ViTConfig(
            width=width,
            depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            mlp_dim=_shape(state, "blocks.0.mlp.fc1.weight", 2)[0],
            heads=heads or _heads(state, width),
            patch=patch,
            stem=_stem(state),
            pool="map" if "attn_pool.latent" in state else "token" if class_token else "gap",
            class_token=class_token,
            registers=registers,
            posemb_class=posemb_class,
            layerscale=1e-5 if "blocks.0.ls1.gamma" in state else None,
            qk_norm="blocks.0.attn.q_norm.weight" in state,
            representation_size=_outputs(state, "pre_logits.fc.weight") or None,
            **conventions,
        )
    except ValidationError as error:
        raise CheckpointError(error.errors()[0]["msg"]) from error
    size = side * config.stride
    return Architecture(config, _outputs(state, "head.weight"), (size, size))


def _shape(state: State, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"tensor {name} is missing")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{name} has shape {shape}, expected {dimensions} dimensions")
    return shape


def _outputs(state: State, name: str) -> int:
    """Outputs of a dense layer; 0 if there is no such layer."""
    return _shape(state, name, 2)[0] if name in state else 0


def _heads(state: State, width: int) -> int:
    """Heads of a fused qkv, which does not show them.

    QK-norm shows their width. Else a published width has its published number of heads (`SIZES`), and any other the
    usual head width of 64, or the largest power of two below that divides the width.
    """
    if "blocks.0.attn.q_norm.weight" in state:
        return width // _shape(state, "blocks.0.attn.q_norm.weight", 1)[0]
    published = {size[0]: size[3] for size in SIZES.values()}
    return published.get(width) or width // min(64, width & -width)


def _positions(state: State, class_token: bool, registers: int) -> tuple[int, bool]:
    """Side of the square grid, and whether the class token has a row.

    Rows of registers, which timm's older models have, are added to the registers and removed.
    """
    rows = _shape(state, "pos_embed", 3)[1]
    if _is_square(rows):
        return isqrt(rows), False
    if class_token and _is_square(rows - 1):
        return isqrt(rows - 1), True
    cls = int(class_token)
    if registers and _is_square(rows - cls - registers):
        own, of_registers, patches = state["pos_embed"].split([cls, registers, rows - cls - registers], dim=1)
        state["reg_token"] = state["reg_token"] + of_registers
        state["pos_embed"] = torch.cat([own, patches], dim=1)
        return isqrt(rows - cls - registers), class_token
    raise CheckpointError(
        f"pos_embed has {rows} rows, which is no square grid of patches, with or without a class token"
    )


def _is_square(n: int) -> bool:
    return n > 0 and isqrt(n) ** 2 == n


def _stem(state: State) -> ResNetStem | None:
    """A hybrid's ResNet: its width, and the number of units in each stage."""
    prefix = "patch_embed.backbone."
    if prefix + "stem.conv.weight" not in state:
        return None
    units = {found.groups() for name in state if (found := re.match(re.escape(prefix) + UNIT, name))}
    stages = Counter(int(stage) for stage, _ in units)
    layers = tuple(stages[stage] for stage in sorted(stages))
    return ResNetStem(layers=layers, width=_shape(state, prefix + "stem.conv.weight", 4)[0])
