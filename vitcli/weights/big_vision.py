"""The .npz files of google-research/big_vision: its ViTs, old and new, and the image towers of LiT and SigLIP.

The parameters stand alone or beside the state of training, the image tower beside that of the text. Patches have
positions; a class token has none, but for older files, where it is added to the token, as big_vision itself does.
Blocks may be stacked along a first axis of depth (`scan`). A file without positions is of sincos2d, taken for 224
pixels. A tower's head makes an embedding, not classes.
"""

from math import isqrt

from vitcli.weights import Beside, Foreign, Tensors
from vitcli.weights._architecture import infer
from vitcli.weights._flax import (
    MAP,
    State,
    count,
    count_heads,
    keep,
    preprocessing,
    read_attention,
    read_encoder,
    read_layer,
)

# Bare parameters, those in a training's checkpoint, those in an older one; a model, or its image tower.
PREFIXES = "", "img/", "params/", "params/img/", "opt/target/", "opt/target/img/"
TRAINING = r"(opt|chrono|extra)/"
TEXT = r"(txt/|[tb]$)"  # the other tower; temperature and bias of the loss
TABLES = "pos_embedding", "Transformer/pos_embedding", "Transformer/posembed_input/pos_embedding"  # newest first
HEAD = "MAPHead_0/"
INLINE = "probe", "MultiHeadDotProductAttention_0/", "LayerNorm_0/", "MlpBlock_0/"  # MAP when ViT-G was developed
STACKED, APART = "Transformer/encoderblock/", "Transformer/encoderblock_"


def matches(names: set[str]) -> bool:
    """True for a ViT below one of the prefixes, but for vit_jax's own files, which the place of the table tells."""
    prefix = _prefix(names)
    return prefix is not None and not (prefix in ("", "opt/target/") and prefix + TABLES[2] in names)


def _prefix(names: set[str]) -> str | None:
    core = "embedding/kernel", "Transformer/encoder_norm/scale"
    return next((prefix for prefix in PREFIXES if all(prefix + name in names for name in core)), None)


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """Weights of the one model or the image tower, with the heads that the shapes tell."""
    prefix = _prefix(set(tensors)) or ""
    whole, tower = prefix.removesuffix("img/"), prefix.endswith("img/")
    keep(tensors, prefix, f"{TRAINING}|{whole}{TEXT}" if tower else TRAINING)
    _unstack(tensors)
    heads = count_heads(tensors)
    state = _read_map(tensors) or _read_class_token(tensors)
    state |= _read_positions(tensors, state) | read_encoder(tensors)

    posemb = "learned" if "pos_embed" in state else "sincos2d"
    config, head, image_size = infer(state, heads, activation="gelu_tanh", posemb=posemb)
    prepared = preprocessing(image_size, crop=not tower)
    return Foreign("big_vision", config, state, head, image_size, prepared, () if tower else None)


def _unstack(tensors: Tensors) -> None:
    """Give each block of a scanned encoder arrays of its own, without keeping the stacks in memory."""
    stacked = [] if count(tensors, APART) else [name for name in tensors if name.startswith(STACKED)]
    for name in stacked:
        for i, value in enumerate(tensors.pop(name).unbind()):
            tensors[f"{APART}{i}/{name.removeprefix(STACKED)}"] = value.clone()


def _read_map(tensors: Tensors) -> State:
    """The attention pooling, {} where there is none."""
    if "probe" in tensors:
        for name in [name for name in tensors if name.startswith(INLINE)]:
            tensors[HEAD + name] = tensors.pop(name)
    if f"{HEAD}probe" not in tensors:
        return {}
    return {
        "attn_pool.latent": tensors.take(f"{HEAD}probe"),
        **read_attention(tensors, f"{HEAD}MultiHeadDotProductAttention_0", "attn_pool", MAP),
        **read_layer(tensors, f"{HEAD}LayerNorm_0", "attn_pool.norm"),
        **read_layer(tensors, f"{HEAD}MlpBlock_0/Dense_0", "attn_pool.mlp.fc1"),
        **read_layer(tensors, f"{HEAD}MlpBlock_0/Dense_1", "attn_pool.mlp.fc2"),
    }


def _read_class_token(tensors: Tensors) -> State:
    return {"cls_token": tensors.take("cls")} if "cls" in tensors else {}


def _read_positions(tensors: Tensors, state: State) -> State:
    """The table of patches, {} where there is none. An older table's first row goes to the class token in `state`."""
    place = next((name for name in TABLES if name in tensors), None)
    if place is None:
        return {}
    table = tensors.take(place)
    rows = table.shape[1]
    if isqrt(rows) ** 2 + 1 != rows:
        return {"pos_embed": table}
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].float() + table[:, :1].float()
    return {"pos_embed": table[:, 1:]}
