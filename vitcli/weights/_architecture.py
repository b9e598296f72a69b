"""What the shapes of a ViT's tensors, under our names, tell about it."""

import re
from collections import Counter
from dataclasses import replace
from math import isqrt
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.model import SIZES, ResNetStem, ViTConfig
from vitcli.model.position import fixed_table, resize_state
from vitcli.weights import Foreign

State = dict[str, Tensor]
UNIT = r"stages\.(\d{1,3})\.blocks\.(\d{1,3})\."


class Architecture(NamedTuple):
    """The arguments of `ViTConfig.build`, and the config itself."""

    config: ViTConfig
    head_classes: int
    image_size: tuple[int, int]


def infer(
    state: State, heads: int | None = None, image_size: tuple[int, int] | None = None, **conventions: Any
) -> Architecture:
    """The architecture of `state`, which may be brought to our form.

    Its position table becomes the class token's rows, then patches. `image_size` (height, width) is for formats that
    say it; else the grid of patches is taken for square, and without a learned table for that of 224 pixels.
    `conventions` are the keys of ViTConfig that a format implies and no shape tells; they win over what the shapes
    suggest. Raises CheckpointError.
    """
    width, _, patch, _ = _shape(state, "patch_embed.proj.weight", 4)
    class_token, distilled = "cls_token" in state, "dist_token" in state
    registers = _shape(state, "reg_token", 3)[1] if "reg_token" in state else 0
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    hidden = _shape(state, "blocks.0.mlp.fc2.weight", 2)[1] if depth else width
    found: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "mlp_dim": hidden,
        "heads": heads or _heads(state, width),
        "patch": patch,
        "stem": _stem(state),
        "pool": _pool(state, width),
        "class_token": class_token,
        "distilled": distilled,
        "registers": registers,
        "posemb_class": False,
        "layerscale": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "pre_norm": "norm_pre.weight" in state,
        "norm_after_pool": "fc_norm.weight" in state,
        "representation_size": _outputs(state, "pre_logits.fc.weight") or None,
        **conventions,
    }
    if depth and _shape(state, "blocks.0.mlp.fc1.weight", 2)[0] == 2 * hidden:
        found["activation"] = "swiglu"
    try:
        config = ViTConfig(**found)
        stride, learned = config.stride, config.posemb == "learned" and depth
        size = image_size or (None if learned else (224, 224))
        grid = (max(1, size[0] // stride), max(1, size[1] // stride)) if size else None
        grid, found["posemb_class"] = _positions(state, grid, int(class_token) + distilled, registers)
        config = ViTConfig(**found)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(": ".join([*map(str, first["loc"]), first["msg"]])) from error
    return Architecture(config, _outputs(state, "head.weight"), (grid[0] * stride, grid[1] * stride))


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


def _pool(state: State, width: int) -> str:
    """What the head reads, as far as the tensors tell."""
    if "attn_pool.latent" in state:
        return "map"
    if "cls_token" not in state:
        return "gap"
    reads = _shape(state, "head.weight", 2)[1] if "head.weight" in state else width
    return "token_gap" if reads == 2 * width and "pre_logits.fc.weight" not in state else "token"


def _positions(state: State, grid: tuple[int, int] | None, cls: int, registers: int) -> tuple[tuple[int, int], bool]:
    """Rows and columns of the grid of patches, and whether the `cls` class tokens have position rows.

    Rows of registers, which timm's older models have, are added to the registers and removed.
    """
    if "pos_embed" not in state and grid:
        return grid, False
    rows = _shape(state, "pos_embed", 3)[1]
    for prefix in (0, cls, cls + registers):
        patches = rows - prefix
        side = isqrt(max(0, patches))
        if patches <= 0 or patches != (grid[0] * grid[1] if grid else side * side):
            continue
        if prefix > cls:
            own, of_registers, table = state["pos_embed"].split([cls, registers, patches], dim=1)
            state["reg_token"] = state["reg_token"] + of_registers
            state["pos_embed"] = torch.cat([own, table], dim=1)
        return grid or (side, side), bool(cls and prefix)
    shown = f"a grid of {grid[0]}x{grid[1]} patches" if grid else "a square grid of patches"
    raise CheckpointError(f"pos_embed has {rows} rows, which is not {shown}, with or without {cls} class tokens")


def stretched(foreign: Foreign, res: tuple[int, int]) -> Foreign:
    """The model for images (height, width) that its origin shows it, though its position table is for others.

    Rows and columns beyond the last whole patch go. Raises CheckpointError for images smaller than a patch.
    """
    stride = foreign.config.stride
    size = res[0] // stride * stride, res[1] // stride * stride
    if 0 in size:
        raise CheckpointError(f"images of {res[0]}x{res[1]} are smaller than a patch of {stride}")
    state = foreign.state
    if size != foreign.image_size:
        state = resize_state(state, foreign.config, foreign.image_size, size)
    return replace(foreign, state=state, image_size=size, preprocessing={**foreign.preprocessing, "res": size})


def position_table(foreign: Foreign) -> Tensor:
    """The position table (1, rows, width) as a learned one: a fixed one computed, zeros where there is none."""
    c = foreign.config
    if c.posemb == "none":
        down, across = c.grid(foreign.image_size)
        return torch.zeros(1, c.posemb_prefix + down * across, c.width)
    return foreign.state["pos_embed"] if c.posemb == "learned" else fixed_table(c, foreign.image_size)


def add_zero_biases(state: State, *layers: str) -> None:
    """Zeros for the kinds of layers (`attn.qkv`) that a model trains without a bias: for all of a kind, or for none."""
    for layer in layers:
        weights = [name for name in state if name.endswith(f"{layer}.weight")]
        if not any(name.endswith(f"{layer}.bias") for name in state):
            state |= {name.removesuffix("weight") + "bias": torch.zeros(state[name].shape[:1]) for name in weights}


def _stem(state: State) -> ResNetStem | None:
    """A hybrid's ResNet: its width, and the number of units in each stage."""
    prefix = "patch_embed.backbone."
    if prefix + "stem.conv.weight" not in state:
        return None
    units = {found.groups() for name in state if (found := re.match(re.escape(prefix) + UNIT, name))}
    stages = Counter(int(stage) for stage, _ in units)
    layers = tuple(stages[stage] for stage in sorted(stages))
    return ResNetStem(layers=layers, width=_shape(state, prefix + "stem.conv.weight", 4)[0])
