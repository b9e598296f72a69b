"""State dicts of torchvision.models.VisionTransformer: its own weights, SWAG's, and models trained with its code.

The files tell neither heads nor preprocessing. Heads are guessed as `_architecture` says. Weights at 224 are taken for
the first of torchvision's (IMAGENET1K_V1), those at other resolutions and of H/14 for SWAG's. SWAG's linear probes of
B/16 and L/16 are at 224 too, and cannot be told from the former: they want resize 224 and bicubic. A file of `write`
says all of this in its metadata.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt, ValidationError
from safetensors.torch import save_file

from vitcli.errors import CheckpointError
from vitcli.weights import Beside, Foreign, Tensors
from vitcli.weights._architecture import infer
from vitcli.weights._names import rename

BLOCK = "encoder.layers.encoder_layer_#."
NAMES = {
    "class_token": "cls_token",
    "conv_proj.": "patch_embed.proj.",
    "encoder.pos_embedding": "pos_embed",
    BLOCK + "ln_1.": "blocks.#.norm1.",
    BLOCK + "self_attention.in_proj_": "blocks.#.attn.qkv.",
    BLOCK + "self_attention.out_proj.": "blocks.#.attn.proj.",
    BLOCK + "ln_2.": "blocks.#.norm2.",
    BLOCK + "mlp.0.": "blocks.#.mlp.fc1.",
    BLOCK + "mlp.3.": "blocks.#.mlp.fc2.",
    "encoder.ln.": "norm.",
    "heads.pre_logits.": "pre_logits.fc.",
    "heads.head.": "head.",
}
OLDER = {BLOCK + "mlp.linear_1.": "blocks.#.mlp.fc1.", BLOCK + "mlp.linear_2.": "blocks.#.mlp.fc2."}
REPLACED_HEAD = {"heads.": "head."}  # model.heads = nn.Linear(768, 10)


class Told(BaseModel):
    """What a file of `write` says in its metadata."""

    heads: PositiveInt
    preprocessing: dict[str, Any]
    classes: tuple[str, ...] | None


def matches(names: set[str]) -> bool:
    """True for torchvision's VisionTransformer, whatever its stem and head."""
    return names >= {"class_token", "encoder.pos_embedding", "encoder.ln.weight"}


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """Weights and, if `write` made the file, heads, preprocessing and classes."""
    if any(name.startswith("conv_proj.conv_") for name in tensors):
        raise CheckpointError("its patches come from a stem of several convolutions (conv_stem_configs), not from one")
    told = _told(beside.metadata)
    state = rename(tensors, NAMES | OLDER | REPLACED_HEAD)
    config, head_classes, image_size = infer(
        state, told and told.heads, activation="gelu", posemb_resize="bicubic_corners"
    )
    preprocessing = told.preprocessing if told else _preprocessing(image_size[0], config.width, config.patch)
    return Foreign(
        "torchvision", config, state, head_classes, image_size, preprocessing, told.classes if told else None
    )


def _told(metadata: dict[str, str]) -> Told | None:
    if "vitcli" not in metadata:
        return None
    try:
        return Told.model_validate_json(metadata["vitcli"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise CheckpointError(f"its metadata is damaged: {where}: {first['msg']}") from error


def _preprocessing(res: int, width: int, patch: int) -> dict[str, Any]:
    """As torchvision evaluates its weights of this resolution (transforms in torchvision/models)."""
    imagenet = {"res": res, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "antialias": True}
    if res != 224 or patch == 14:
        return {**imagenet, "resize": res, "interpolation": "bicubic"}
    return {**imagenet, "resize": 242 if (width, patch) == (1024, 16) else 256, "interpolation": "bilinear"}


def write(foreign: Foreign, out: Path) -> None:
    """A .safetensors file whose tensors torchvision.models.VisionTransformer loads strictly.

    Raises CheckpointError with the first part of the model that is not in that class.
    """
    if part := _foreign_part(foreign):
        raise CheckpointError(f"torchvision's VisionTransformer has no {part}", "vit export --onnx writes any model")
    state = dict(foreign.state)
    renamed = rename(state, {ours: theirs for theirs, ours in NAMES.items()})
    assert not state, f"tensors without a name in torchvision: {sorted(state)}"
    told = Told(
        heads=foreign.config.heads,
        preprocessing=foreign.preprocessing,
        classes=foreign.classes,
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in renamed.items()},
        out,
        {"format": "pt", "vitcli": told.model_dump_json()},
    )


def _foreign_part(foreign: Foreign) -> str | None:
    """What torchvision's class cannot express, in words; None if nothing."""
    c = foreign.config
    parts = {
        "hybrid's ResNet stem": c.stem is not None,
        f"pool: {c.pool}, only the class token": c.pool != "token",
        "second class token (distilled)": c.distilled,
        "registers": c.registers > 0,
        f"fixed position table (posemb: {c.posemb})": c.posemb != "learned",
        "class token without a row in the position table (posemb_class: false)": not c.posemb_class,
        "LayerScale": c.layerscale is not None,
        "norm of queries and keys (qk_norm)": c.qk_norm,
        "norm before the blocks (pre_norm)": c.pre_norm,
        "norm after pooling (norm_after_pool)": c.norm_after_pool,
        f"activation: {c.activation}, only gelu": c.activation != "gelu",
        f"norm_eps: {c.norm_eps:g}, only 1e-06 is its own": c.norm_eps != 1e-6,
        "model without a head": not foreign.head_classes,
        "image that is not square": foreign.image_size[0] != foreign.image_size[1],
    }
    return next((part for part, found in parts.items() if found), None)
