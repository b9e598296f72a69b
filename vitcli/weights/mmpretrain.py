"""Checkpoints of mmpretrain: its VisionTransformer, DistilledVisionTransformer and DeiT3, with a head or without.

The files tell neither heads nor preprocessing. Heads are guessed as `_architecture` says, but for mmpretrain's own
"small", which has eight; the preprocessing is that of its DeiTs. Its ViTs of the paper want mean and deviation 0.5,
which nothing in a file shows unless it holds its data_preprocessor.
"""

from typing import Any

from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.weights import Beside, Foreign, Tensors
from vitcli.weights._architecture import add_zero_biases, infer
from vitcli.weights._names import rename

BLOCK = "backbone.layers.#."
NAMES = {
    "backbone.cls_token": "cls_token",
    "backbone.dist_token": "dist_token",
    "backbone.pos_embed": "pos_embed",
    "backbone.patch_embed.projection.": "patch_embed.proj.",
    "backbone.pre_norm.": "norm_pre.",
    BLOCK + "ln1.": "blocks.#.norm1.",
    BLOCK + "attn.qkv.": "blocks.#.attn.qkv.",
    BLOCK + "attn.proj.": "blocks.#.attn.proj.",
    BLOCK + "attn.gamma1.weight": "blocks.#.ls1.gamma",
    BLOCK + "attn.gamma1": "blocks.#.ls1.gamma",
    BLOCK + "ln2.": "blocks.#.norm2.",
    BLOCK + "ffn.layers.0.0.": "blocks.#.mlp.fc1.",
    BLOCK + "ffn.layers.1.": "blocks.#.mlp.fc2.",
    BLOCK + "ffn.w12.": "blocks.#.mlp.fc1.",
    BLOCK + "ffn.w3.": "blocks.#.mlp.fc2.",
    BLOCK + "ffn.gamma2.weight": "blocks.#.ls2.gamma",
    BLOCK + "ffn.gamma2": "blocks.#.ls2.gamma",
    "backbone.ln1.": "norm.",
    "backbone.ln2.": "fc_norm.",
    "head.layers.pre_logits.": "pre_logits.fc.",
    "head.layers.head.": "head.",
    "head.layers.head_dist.": "head_dist.",
    "head.fc.": "head.",
}
SMALL = (768, 8, 2304)  # width, depth, MLP width


def matches(names: set[str]) -> bool:
    """True for a ViT as backbone of mmpretrain."""
    return names >= {"backbone.pos_embed", "backbone.patch_embed.projection.weight", "backbone.layers.0.ln1.weight"}


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """The backbone and its head; what self-supervised training puts between them (`neck`) is dropped."""
    told = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("data_preprocessor.", "neck."))}
    state = rename(tensors, NAMES)
    if {"norm.weight", "fc_norm.weight"} <= state.keys():
        raise CheckpointError("it has a norm before the mean of the patches and one after (backbone.ln1, backbone.ln2)")
    add_zero_biases(state, "attn.qkv", "patch_embed.proj")
    config, classes, image_size = infer(
        state,
        _heads(state),
        pool="gap" if "fc_norm.weight" in state or "cls_token" not in state else "token",
        activation="gelu",
        posemb_resize="bicubic",
    )
    return Foreign("mmpretrain", config, state, classes, image_size, _preprocessing(image_size, told))


def _heads(state: dict[str, Tensor]) -> int | None:
    """Eight for mmpretrain's "small", which has the width of a B with eight blocks and a narrow MLP."""
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    hidden = state.get("blocks.0.mlp.fc1.bias", state["pos_embed"]).shape[0]
    return 8 if (state["pos_embed"].shape[-1], len(blocks), hidden) == SMALL else None


def _preprocessing(image_size: tuple[int, int], told: dict[str, Tensor]) -> dict[str, Any]:
    """DeiT's, with the mean and deviation of data_preprocessor, in levels of 0 to 255, where the file has it."""
    statistics = [told.get(f"data_preprocessor.{name}") for name in ("mean", "std")]
    if any(values is None or values.numel() != 3 for values in statistics):
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    else:
        mean, std = (tuple((values.flatten() / 255).tolist()) for values in statistics if values is not None)
    resize = max(image_size) * 256 // 224
    return {
        "res": image_size,
        "resize": resize,
        "interpolation": "bicubic",
        "antialias": True,
        "mean": mean,
        "std": std,
    }
