"""The .npz files of google-research/vision_transformer: ViT, AugReg and the hybrids.

Kernels are stored as flax applies them: input before output, convolutions (height, width, in, out), and attention
with heads as a dimension of its own.
"""

import re

import torch
from torch import Tensor

from vitcli.weights import Beside, Foreign, Tensors
from vitcli.weights._architecture import infer

PREFIX = "opt/target/"  # files saved together with their optimiser
# Modules of a block: as in the released files, and as today's flax names them.
RELEASED = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
CURRENT = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")


def matches(names: set[str]) -> bool:
    """True for an encoder of vit_jax; big_vision's newer files keep the position table elsewhere."""
    names = {name.removeprefix(PREFIX) for name in names}
    return {"embedding/kernel", "Transformer/posembed_input/pos_embedding"} <= names


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """Weights, with the head width that the shapes tell."""
    for name in [name for name in tensors if name.startswith("opt/")]:
        value = tensors.pop(name)
        if name.startswith(PREFIX):
            tensors[name.removeprefix(PREFIX)] = value

    state = _layer(tensors, "embedding", "patch_embed.proj")
    if "conv_root/kernel" in tensors:
        state |= _resnet(tensors)
    if "cls" in tensors:
        state["cls_token"] = tensors.take("cls")
    state["pos_embed"] = tensors.take("Transformer/posembed_input/pos_embedding")
    names = RELEASED if f"Transformer/encoderblock_0/{RELEASED[1]}/out/bias" in tensors else CURRENT
    heads = beside.heads
    for i in range(_count(tensors, "Transformer/encoderblock_")):
        query = tensors.get(f"Transformer/encoderblock_{i}/{names[1]}/query/bias")
        heads = query.shape[0] if query is not None and query.ndim == 2 else heads
        state |= _block(tensors, f"Transformer/encoderblock_{i}", names, f"blocks.{i}")
    state |= _layer(tensors, "Transformer/encoder_norm", "norm")
    for theirs, ours in (("pre_logits", "pre_logits.fc"), ("head", "head")):
        if f"{theirs}/kernel" in tensors:
            state |= _layer(tensors, theirs, ours)

    config, classes, image_size = infer(state, heads, activation="gelu_tanh")
    return Foreign("google", config, state, classes, image_size, _preprocessing(image_size[0]))


def _preprocessing(res: int) -> dict:
    """At 224 the pre-training's evaluation (resize_small(256), central_crop(224)), else the fine-tuning's stretch."""
    evaluation = (
        {"resize": 256, "interpolation": "area"}
        if res == 224
        else {"resize": None, "interpolation": "bilinear", "antialias": False}
    )
    return {"res": res, "mean": 0.5, "std": 0.5, **evaluation}


def _count(tensors: Tensors, prefix: str) -> int:
    """How many different numbers follow `prefix`."""
    return len({found[1] for name in tensors if (found := re.match(re.escape(prefix) + r"(\d+)/", name))})


def _layer(tensors: Tensors, theirs: str, ours: str) -> dict[str, Tensor]:
    """A dense layer, a convolution or a norm: `kernel` or `scale`, and `bias` where there is one."""
    if f"{theirs}/scale" in tensors:
        # Old files keep a GroupNorm's numbers as (1, 1, 1, channels).
        return {
            f"{ours}.weight": tensors.take(f"{theirs}/scale").flatten(),
            f"{ours}.bias": tensors.take(f"{theirs}/bias").flatten(),
        }
    kernel = tensors.take(f"{theirs}/kernel")
    layer = {f"{ours}.weight": kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.t()}
    if f"{theirs}/bias" in tensors:
        layer[f"{ours}.bias"] = tensors.take(f"{theirs}/bias")
    return layer


def _block(tensors: Tensors, theirs: str, names: tuple[str, ...], ours: str) -> dict[str, Tensor]:
    norm1, attention, norm2, mlp = (f"{theirs}/{name}" for name in names)
    parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
    return {
        **_layer(tensors, norm1, f"{ours}.norm1"),
        f"{ours}.attn.qkv.weight": torch.cat([tensors.take(f"{part}/kernel").flatten(1).t() for part in parts]),
        f"{ours}.attn.qkv.bias": torch.cat([tensors.take(f"{part}/bias").flatten() for part in parts]),
        f"{ours}.attn.proj.weight": tensors.take(f"{attention}/out/kernel").flatten(0, 1).t(),
        f"{ours}.attn.proj.bias": tensors.take(f"{attention}/out/bias"),
        **_layer(tensors, norm2, f"{ours}.norm2"),
        **_layer(tensors, f"{mlp}/Dense_0", f"{ours}.mlp.fc1"),
        **_layer(tensors, f"{mlp}/Dense_1", f"{ours}.mlp.fc2"),
    }


def _resnet(tensors: Tensors) -> dict[str, Tensor]:
    backbone = "patch_embed.backbone"
    state = _layer(tensors, "conv_root", f"{backbone}.stem.conv") | _layer(tensors, "gn_root", f"{backbone}.stem.norm")
    for stage in range(_count(tensors, "block")):
        for unit in range(_count(tensors, f"block{stage + 1}/unit")):
            theirs, ours = f"block{stage + 1}/unit{unit + 1}", f"{backbone}.stages.{stage}.blocks.{unit}"
            for n in (1, 2, 3):
                state |= _layer(tensors, f"{theirs}/conv{n}", f"{ours}.conv{n}")
                state |= _layer(tensors, f"{theirs}/gn{n}", f"{ours}.norm{n}")
            if f"{theirs}/conv_proj/kernel" in tensors:
                state |= _layer(tensors, f"{theirs}/conv_proj", f"{ours}.downsample.conv")
                state |= _layer(tensors, f"{theirs}/gn_proj", f"{ours}.downsample.norm")
    return state
