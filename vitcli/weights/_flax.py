"""What the .npz files of Google's two ViT projects share: flax's layers under flax's names, and ours.

Kernels are stored as flax applies them: input before output, convolutions (height, width, in, out), and attention
with heads as a dimension of its own. `read_...` takes tensors out of a file, `write_...` gives them back as they were.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.weights import Tensors

State = dict[str, Tensor]
Names = tuple[str, str, str, str]

# Modules of a block: as in the released files, and as today's flax names them.
RELEASED: Names = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
CURRENT: Names = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")

# Our layers that hold flax's query, key and value, in a block and in MAP.
BLOCK = {"qkv": ("query", "key", "value")}
MAP = {"q": ("query",), "kv": ("key", "value")}


def keep(tensors: Tensors, prefix: str, dropped: str) -> None:
    """Take `prefix` off the names, where no other has the rest. Others that begin with the pattern `dropped` go."""
    for name in list(tensors):
        if name.startswith(prefix):
            if (rest := name.removeprefix(prefix)) not in tensors:
                tensors[rest] = tensors.pop(name)
        elif re.match(dropped, name):
            del tensors[name]


def read_encoder(tensors: Tensors) -> State:
    """Patches, blocks, last norm, pre_logits and head: all but class token, positions and pooling."""
    names = RELEASED if f"Transformer/encoderblock_0/{RELEASED[1]}/out/bias" in tensors else CURRENT
    depth = count(tensors, "Transformer/encoderblock_")
    state = {}
    for theirs, ours in layers(depth, names):
        state |= read_layer(tensors, theirs, ours)
    for theirs, ours in attentions(depth, names):
        state |= read_attention(tensors, theirs, ours, BLOCK)
    for theirs, ours in (("pre_logits", "pre_logits.fc"), ("head", "head")):
        if f"{theirs}/kernel" in tensors:
            state |= read_layer(tensors, theirs, ours)
    return state


def layers(depth: int, names: Names) -> Iterator[tuple[str, str]]:
    """Their and our name of every dense layer and norm, of the patches and the encoder."""
    norm1, _, norm2, mlp = names
    yield "embedding", "patch_embed.proj"
    for i in range(depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        yield f"{theirs}/{norm1}", f"{ours}.norm1"
        yield f"{theirs}/{norm2}", f"{ours}.norm2"
        yield f"{theirs}/{mlp}/Dense_0", f"{ours}.mlp.fc1"
        yield f"{theirs}/{mlp}/Dense_1", f"{ours}.mlp.fc2"
    if depth:
        yield "Transformer/encoder_norm", "norm"


def attentions(depth: int, names: Names) -> Iterator[tuple[str, str]]:
    """Their and our name of every attention of the encoder."""
    for i in range(depth):
        yield f"Transformer/encoderblock_{i}/{names[1]}", f"blocks.{i}.attn"


def read_layer(tensors: Tensors, theirs: str, ours: str) -> State:
    """A dense layer, a convolution or a norm: `kernel` or `scale`, and `bias` where there is one."""
    if f"{theirs}/scale" in tensors:  # released files keep a GroupNorm's numbers as (1, 1, 1, channels)
        weight, bias = (tensors.take(f"{theirs}/{part}").flatten() for part in ("scale", "bias"))
        return {f"{ours}.weight": weight, f"{ours}.bias": bias}
    kernel = tensors.take(f"{theirs}/kernel")
    layer = {f"{ours}.weight": kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.t()}
    if f"{theirs}/bias" in tensors:
        layer[f"{ours}.bias"] = tensors.take(f"{theirs}/bias")
    return layer


def write_layer(state: State, theirs: str, ours: str) -> State:
    """The reverse of `read_layer`."""
    weight = state[f"{ours}.weight"]
    if weight.ndim == 1:
        parts = {f"{theirs}/scale": weight, f"{theirs}/bias": state[f"{ours}.bias"]}
        is_group_norm = theirs.rpartition("/")[2].startswith("gn")
        return {name: value.reshape(1, 1, 1, -1) if is_group_norm else value for name, value in parts.items()}
    layer = {f"{theirs}/kernel": weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.t()}
    if f"{ours}.bias" in state:
        layer[f"{theirs}/bias"] = state[f"{ours}.bias"]
    return layer


def read_attention(tensors: Tensors, theirs: str, ours: str, fused: dict[str, tuple[str, ...]]) -> State:
    """Attention, whose queries, keys and values are stored apart and together in our layers `fused`."""
    state = {}
    for layer, parts in fused.items():
        kernels = [tensors.take(f"{theirs}/{part}/kernel").flatten(1).t() for part in parts]
        biases = [tensors.take(f"{theirs}/{part}/bias").flatten() for part in parts]
        state |= {f"{ours}.{layer}.weight": torch.cat(kernels), f"{ours}.{layer}.bias": torch.cat(biases)}
    state[f"{ours}.proj.weight"] = tensors.take(f"{theirs}/out/kernel").flatten(0, 1).t()
    state[f"{ours}.proj.bias"] = tensors.take(f"{theirs}/out/bias")
    return state


def write_attention(state: State, theirs: str, ours: str, heads: int) -> State:
    """The reverse of `read_attention`, for a block."""
    parts = BLOCK["qkv"]
    weights, biases = (state[f"{ours}.qkv.{kind}"].chunk(len(parts)) for kind in ("weight", "bias"))
    layer = {}
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        layer[f"{theirs}/{part}/kernel"] = weight.t().unflatten(1, (heads, -1))
        layer[f"{theirs}/{part}/bias"] = bias.unflatten(0, (heads, -1))
    layer[f"{theirs}/out/kernel"] = state[f"{ours}.proj.weight"].t().unflatten(0, (heads, -1))
    layer[f"{theirs}/out/bias"] = state[f"{ours}.proj.bias"]
    return layer


def count_heads(tensors: Tensors) -> int | None:
    """Heads, which the kernels of every attention tell; None without one. Raises CheckpointError if they disagree."""
    found = set()
    for name, value in tensors.items():
        kernel = re.search(r"/(query|key|value|out)/kernel$", name)
        if kernel and value.ndim == 3:
            found.add(value.shape[0 if kernel[1] == "out" else 1])
    if len(found) > 1:
        raise CheckpointError(f"its attention has {' and '.join(map(str, sorted(found)))} heads; one number is known")
    return next(iter(found), None)


def count(tensors: Tensors, prefix: str) -> int:
    """How many different numbers follow `prefix`."""
    return len({found[1] for name in tensors if (found := re.match(re.escape(prefix) + r"(\d+)/", name))})


def preprocessing(image_size: tuple[int, int], crop: bool = True) -> dict[str, Any]:
    """At 224 the pre-training's evaluation (resize_small(256), central_crop(224)), else a stretch, as fine-tuned.

    `crop` false is for models that are stretched to at 224 too. Pixels are in [-1, 1].
    """
    at_224 = crop and image_size == (224, 224)
    return {
        "res": list(image_size),
        "resize": 256 if at_224 else None,
        "interpolation": "area" if at_224 else "bilinear",
        "antialias": at_224,  # area always is
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
