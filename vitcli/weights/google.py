"""The .npz files of google-research/vision_transformer: ViT, AugReg, the hybrids, and a ResNet stem without encoder.

`write` makes the released files' names, shapes and float32, to the bit what was read from one. What these files imply
is not stored: GELU in the tanh form, a square image, the usual preprocessing, classes without names. Where a model
differs, one more array, `vitcli/config`, says so: JSON, a byte in each float32, so that code which trains all arrays of
a file, as the original does, can carry it along. The original's loader ignores it, and so computes the tanh form of an
exact GELU. A fixed table of positions is written, and read back, as a learned one of the same values.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.model import ViTConfig
from vitcli.weights import Beside, Foreign, Tensors
from vitcli.weights._architecture import infer, position_table
from vitcli.weights._flax import (
    RELEASED,
    attentions,
    count,
    count_heads,
    keep,
    layers,
    preprocessing,
    read_encoder,
    read_layer,
    write_attention,
    write_layer,
)

PREFIX = "opt/target/"  # files saved together with their optimiser
TABLE = "Transformer/posembed_input/pos_embedding"
CONFIG = "vitcli/config"
# Arrays of a model without encoder (transformer=None).
NO_ENCODER = re.compile(r"(embedding|pre_logits|head|conv_root|gn_root|block\d+/unit\d+/\w+)/(kernel|scale|bias)")
# The keys of CONFIG, each with what its value must be.
SAID: dict[str, Callable[[Any], bool]] = {
    "activation": lambda value: isinstance(value, str),
    "posemb_resize": lambda value: isinstance(value, str),
    "pool": lambda value: isinstance(value, str),
    "image_size": lambda value: isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value),
    "preprocessing": lambda value: isinstance(value, dict),
    "classes": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}
# SHA-256 of ImageNet-1k's WordNet ids, a line each: what 1000 classes without names are taken for.
IMAGENET = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


def matches(names: set[str]) -> bool:
    """True for vit_jax's models; big_vision's newer files keep the position table elsewhere."""
    names = {name.removeprefix(PREFIX) for name in names}
    without = {name for name in names if not name.startswith("opt/") and name != CONFIG}
    return "embedding/kernel" in names and (TABLE in names or all(map(NO_ENCODER.fullmatch, without)))


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """Weights, with the heads that the shapes tell, and what `write` said besides."""
    keep(tensors, PREFIX, "opt/")
    said = _said(tensors)
    heads = count_heads(tensors)
    state = read_encoder(tensors)
    units = [count(tensors, f"block{stage + 1}/unit") for stage in range(count(tensors, "block"))]
    for theirs, ours in _stem(units) if "conv_root/kernel" in tensors else ():
        state |= read_layer(tensors, theirs, ours)
    for theirs, ours in (("cls", "cls_token"), (TABLE, "pos_embed")):
        if theirs in tensors:
            state[ours] = tensors.take(theirs)

    image_size = tuple(said["image_size"]) if "image_size" in said else None
    conventions = {"activation": "gelu_tanh", "posemb_resize": "bilinear"}
    conventions |= {key: said[key] for key in ("activation", "posemb_resize", "pool") if key in said}
    config, head, image_size = infer(state, heads, image_size, **conventions)
    classes = tuple(said["classes"]) if "classes" in said else None
    prepared = preprocessing(image_size) | said.get("preprocessing", {})
    return Foreign("google", config, state, head, image_size, {**prepared, "res": list(image_size)}, classes)


def write(foreign: Foreign, out: Path) -> None:
    """An .npz of the same bytes each time. Raises CheckpointError for what the original's code has no word for."""
    state, config = foreign.state, foreign.config
    _refuse(config)
    arrays = {}
    for theirs, ours in layers(config.depth, RELEASED):
        arrays |= write_layer(state, theirs, ours)
    for theirs, ours in attentions(config.depth, RELEASED):
        arrays |= write_attention(state, theirs, ours, config.heads)
    for theirs, ours in _stem(config.stem.layers) if config.stem else ():
        arrays |= write_layer(state, theirs, ours)
    for theirs, ours in (("pre_logits", "pre_logits.fc"), ("head", "head")):
        if f"{ours}.weight" in state:
            arrays |= write_layer(state, theirs, ours)
    if config.class_token:
        arrays["cls"] = state["cls_token"]
    if config.depth:
        arrays[TABLE] = position_table(foreign)
    if said := _unusual(foreign):
        text = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
        arrays[CONFIG] = torch.tensor(list(text), dtype=torch.float32)
    _save(arrays, out)


def _stem(units: list[int] | tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Their and our name of every layer of a hybrid's ResNet with so many units in each stage."""
    backbone = "patch_embed.backbone"
    yield "conv_root", f"{backbone}.stem.conv"
    yield "gn_root", f"{backbone}.stem.norm"
    for i in range(len(units)):
        for j in range(units[i]):
            theirs, ours = f"block{i + 1}/unit{j + 1}", f"{backbone}.stages.{i}.blocks.{j}"
            for n in (1, 2, 3):
                yield f"{theirs}/conv{n}", f"{ours}.conv{n}"
                yield f"{theirs}/gn{n}", f"{ours}.norm{n}"
            if j == 0:
                yield f"{theirs}/conv_proj", f"{ours}.downsample.conv"
                yield f"{theirs}/gn_proj", f"{ours}.downsample.norm"


def _said(tensors: Tensors) -> dict[str, Any]:
    """What CONFIG says, each value of the type that it must have; {} for Google's own files."""
    if CONFIG not in tensors:
        return {}
    numbers = tensors.take(CONFIG)
    try:
        said = json.loads(bytes(map(int, numbers.tolist())))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{CONFIG} is damaged: it holds no JSON") from error
    if not isinstance(said, dict):
        raise CheckpointError(f"{CONFIG} holds a {type(said).__name__}, not an object")
    for key, value in said.items():
        if not (key in SAID and SAID[key](value)):
            raise CheckpointError(f"{CONFIG} has a wrong {ascii(key)[:80]}")
    return said


def _unusual(foreign: Foreign) -> dict[str, Any]:
    """What a reader would take otherwise for granted."""
    config, (height, width) = foreign.config, foreign.image_size
    said: dict[str, Any] = {}
    for key, usual in (("activation", "gelu_tanh"), ("posemb_resize", "bilinear")):
        if getattr(config, key) != usual:
            said[key] = getattr(config, key)
    if config.pool == "none":  # the original's `unpooled`, whose arrays are those of `gap`
        said["pool"] = "none"
    side = 224 // config.stride * config.stride
    square = height == width if config.depth else height == width == side
    if not square:
        said["image_size"] = [height, width]
    prepared = json.loads(json.dumps(foreign.preprocessing))
    if prepared not in ({}, preprocessing(foreign.image_size)):
        said["preprocessing"] = prepared
    if foreign.classes is not None and not _is_usual(foreign.classes, foreign.head_classes):
        said["classes"] = list(foreign.classes)
    return said


def _is_usual(classes: tuple[str, ...], head: int) -> bool:
    """Whether classes without names would be given these."""
    if head == 1000:
        return hashlib.sha256("\n".join(classes).encode()).hexdigest() == IMAGENET
    return classes == tuple(map(str, range(head)))


def _refuse(c: ViTConfig) -> None:
    """Raise CheckpointError with the first part that vit_jax cannot compute."""
    parts = {
        "registers": c.registers,
        "LayerScale": c.layerscale,
        "QK-norm": c.qk_norm,
        f"activation {c.activation}": c.activation not in ("gelu_tanh", "gelu"),
        "distillation token": c.distilled,
        f"pooling {c.pool}": c.pool not in ("token", "gap", "none"),
        f"class token with pooling {c.pool}": c.class_token and c.pool != "token",
        "class token without a position": c.class_token and not c.posemb_class,
        "encoder without positions": c.depth and c.posemb == "none",
        "norm before the blocks": c.pre_norm,
        "norm after pooling": c.norm_after_pool,
        f"norm_eps: {c.norm_eps:g}, only 1e-06": c.norm_eps != 1e-6,
    }
    for part, there in parts.items():
        if there:
            raise CheckpointError(f"Google's format has no {part}", "vit export --onnx takes any model")


def _save(arrays: dict[str, Tensor], out: Path) -> None:
    """An .npz as numpy.savez writes it, in order of names, one array in memory at a time."""
    with zipfile.ZipFile(out, "w") as archive:
        for name, value in sorted(arrays.items()):
            array = np.ascontiguousarray(value.detach().cpu().float().numpy())
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
