"""timm's VisionTransformer, whose names are also DeiT's, MAE's after fine-tuning, I-JEPA's and our own.

config.json of timm's folders tells heads, pool, activation, epsilon, preprocessing and classes. Without it heads are
guessed as `_architecture` says, the pool by the tensors, and the rest is timm's default: exact GELU, epsilon 1e-6 (1e-5
with CLIP's norm before the blocks), 0.875 of the shorter side, bicubic, ImageNet's mean and deviation. A hybrid gets
the epsilon of Google's code in its filters, 1e-5 on the deviation, where timm has 1e-8 on the variance.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.model import ViTConfig
from vitcli.weights import Beside, Foreign, Tensors, _refused, _timm_config
from vitcli.weights._architecture import add_zero_biases, infer, position_table

CORE = {"patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"}
# Originals of other projects that share the core.
OTHERS = {"blocks.0.gamma_1", "mask_token", "register_tokens"}
# Where a hybrid of the root alone keeps it; the others have it one level lower, as we.
ROOT = re.compile(r"^patch_embed\.backbone\.(?=conv\.|norm\.)")


def matches(names: set[str]) -> bool:
    """True for timm's VisionTransformer, with whatever head, and for DeiT's."""
    return names >= CORE and not names & OTHERS and not _refused.reason(names)


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """Weights under the names that they have."""
    return plain("timm", tensors, beside, posemb_resize="bicubic_antialias")


def plain(format: str, tensors: Tensors, beside: Beside, posemb_resize: str, crop_pct: float = 0.875) -> Foreign:
    """A model whose tensors have timm's names; `crop_pct` is what timm calls so, for files without config.json."""
    told = _timm_config.read(beside.config, crop_pct)
    state = {ROOT.sub("patch_embed.backbone.stem.", name): value for name, value in tensors.items()}
    tensors.clear()
    _join_gates(state)
    add_zero_biases(state, "attn.qkv")
    if "norm_pre.weight" in state:
        add_zero_biases(state, "patch_embed.proj")
        if "attn_pool.latent" in state and not told.architecture:
            raise CheckpointError(
                "norm_pre beside attn_pool belongs to Perception Encoder, which needs rotary positions"
            )
    conventions = {
        "activation": "gelu",
        "norm_eps": 1e-5 if "norm_pre.weight" in state else 1e-6,
        "posemb_resize": posemb_resize,
        **({"pool": "gap"} if "fc_norm.weight" in state else {}),
        **told.conventions(),
    }
    config, classes, image_size = _infer(state, told.heads, told.image_size, conventions)
    return Foreign(format, config, state, classes, image_size, told.preprocessing(image_size), told.names(classes))


def _infer(
    state: dict[str, Tensor], heads: int | None, image_size: tuple[int, int] | None, conventions: dict[str, Any]
) -> tuple[ViTConfig, int, tuple[int, int]]:
    """By the image size of config.json; where the table is for another, which timm would stretch, by the table."""
    try:
        return infer(state, heads, image_size, **conventions)
    except CheckpointError:
        if not image_size:
            raise
        return infer(state, heads, **conventions)


def _join_gates(state: dict[str, Tensor]) -> None:
    """timm's SwiGLU has two layers where its packed form and ours have one: the gate, then the values."""
    for name in [name for name in state if ".mlp.fc1_g." in name]:
        values = name.replace("fc1_g", "fc1_x")
        if values not in state:
            raise CheckpointError(f"tensor {ascii(values)[1:-1][:80]} is missing")
        state[name.replace("fc1_g", "fc1")] = torch.cat([state.pop(name), state.pop(values)])


def write(foreign: Foreign, out: Path) -> None:
    """A folder that timm.create_model("local-dir:FOLDER", pretrained=True) opens, loading it strictly.

    A fixed position table becomes a learned one. Raises CheckpointError with the first part that timm cannot express.
    """
    c, state = foreign.config, dict(foreign.state)
    if part := _foreign_part(foreign):
        raise CheckpointError(f"timm's VisionTransformer has no {part}", "vit export --onnx writes any model")
    if c.pre_norm:
        del state["patch_embed.proj.bias"]
    state["pos_embed"] = _positions(foreign)
    given = {
        "patch_size": c.patch,
        "embed_dim": c.width,
        "depth": c.depth,
        "num_heads": c.heads,
        "mlp_ratio": _ratio(c.mlp_dim * (2 if c.activation == "swiglu" else 1), c.width),
        "global_pool": next(theirs for theirs, ours in _timm_config.POOLS.items() if ours == c.pool),
        "fc_norm": c.norm_after_pool,
        "class_token": c.class_token,
        "reg_tokens": c.registers,
        "no_embed_class": not c.posemb_class,
        "pre_norm": c.pre_norm,
        "init_values": c.layerscale,
        "qk_norm": c.qk_norm,
    }
    if c.activation != "swiglu":
        given["act_layer"] = c.activation
    config = _timm_config.write(foreign, _architecture(c), given)
    out.mkdir()
    save_file({name: value.contiguous() for name, value in state.items()}, out / "model.safetensors", {"format": "pt"})
    (out / _timm_config.FILE).write_text(json.dumps(config, indent=2))


def _architecture(c: ViTConfig) -> str:
    """One of timm's names whose code sets what arguments in a file cannot: classes, and the norms' epsilon."""
    if c.distilled:
        return "deit_base_distilled_patch16_224"
    if c.activation == "swiglu":
        return "vit_giant_patch14_dinov2"
    return "vit_base_patch16_224" if c.norm_eps == 1e-6 else "vit_base_patch16_clip_224"


def _foreign_part(foreign: Foreign) -> str | None:
    """What timm cannot express, in words; None if nothing."""
    c, swiglu = foreign.config, foreign.config.activation == "swiglu"
    parts = {
        "ResNet stem with the original's epsilon in its filters, so its logits would differ": c.stem is not None,
        "model without blocks (depth: 0)": c.depth == 0,
        "layer before the head (representation_size)": c.representation_size is not None,
        "pool: token_gap": c.pool == "token_gap",
        "pool: none without registers in its output": c.pool == "none" and c.registers > 0,
        "swiglu in attention pooling": swiglu and c.pool == "map",
        "distilled model with swiglu": swiglu and c.distilled,
        "distilled model without position rows for its class tokens": c.distilled and not c.posemb_class,
        f"norm_eps: {c.norm_eps:g}, only 1e-06 and 1e-05": c.norm_eps not in (1e-6, 1e-5),
        f"norm_eps: {c.norm_eps:g} with swiglu or distilled": (swiglu or c.distilled) and c.norm_eps != 1e-6,
        "bias of the patches beside a norm before the blocks (pre_norm)": c.pre_norm
        and bool(foreign.state["patch_embed.proj.bias"].any()),
    }
    return next((part for part, found in parts.items() if found), None)


def _positions(foreign: Foreign) -> Tensor:
    """The table as timm has it: for registers too where there is a row for the class token."""
    c, table = foreign.config, position_table(foreign)
    own, patches = table.tensor_split([c.posemb_prefix], dim=1)
    return torch.cat([own, table.new_zeros(1, c.registers * c.posemb_class, c.width), patches], dim=1)


def _ratio(hidden: int, width: int) -> float:
    """What timm multiplies `width` by, and rounds down, to get `hidden`."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
