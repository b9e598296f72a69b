"""transformers: ViT, DeiT, DINOv2 with and without registers, image towers of SigLIP and CLIP; a folder or a bare file.

config.json decides activation, epsilon, heads, image size and class names; preprocessor_config.json the preprocessing.
Without them the defaults of transformers' own classes hold. Where the preprocessing makes other sizes than the
position table is for, as in DINOv2's folders, the table is stretched, as transformers does at each image.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vitcli.errors import CheckpointError
from vitcli.weights import Beside, Foreign, Tensors, _huggingface_config, _huggingface_processor
from vitcli.weights._architecture import add_zero_biases, infer, position_table, stretched
from vitcli.weights._huggingface_card import card
from vitcli.weights._huggingface_config import FAMILIES, Config, family_of
from vitcli.weights._huggingface_processor import Processor
from vitcli.weights._json import Pixels, checked
from vitcli.weights._names import rename

BLOCK = "encoder.layer.#."
EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "layernorm.": "norm.",
    "classifier.": "head.",
    BLOCK + "attention.attention.query.": "blocks.#.attn.q.",
    BLOCK + "attention.attention.key.": "blocks.#.attn.k.",
    BLOCK + "attention.attention.value.": "blocks.#.attn.v.",
    BLOCK + "attention.output.dense.": "blocks.#.attn.proj.",
}
VIT = EMBEDDINGS | {
    BLOCK + "layernorm_before.": "blocks.#.norm1.",
    BLOCK + "layernorm_after.": "blocks.#.norm2.",
    BLOCK + "intermediate.dense.": "blocks.#.mlp.fc1.",
    BLOCK + "output.dense.": "blocks.#.mlp.fc2.",
    "pooler.dense.": "pre_logits.fc.",
}
DEIT = VIT | {"cls_classifier.": "head.", "distillation_classifier.": "head_dist."}
DINOV2 = EMBEDDINGS | {
    BLOCK + "norm1.": "blocks.#.norm1.",
    BLOCK + "norm2.": "blocks.#.norm2.",
    BLOCK + "layer_scale1.lambda1": "blocks.#.ls1.gamma",
    BLOCK + "layer_scale2.lambda1": "blocks.#.ls2.gamma",
    BLOCK + "mlp.fc1.": "blocks.#.mlp.fc1.",
    BLOCK + "mlp.fc2.": "blocks.#.mlp.fc2.",
}
SWIGLU = {BLOCK + "mlp.weights_in.": "blocks.#.mlp.fc1.", BLOCK + "mlp.weights_out.": "blocks.#.mlp.fc2."}
SIGLIP_BLOCK = "encoder.layers.#."
SIGLIP = {
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "post_layernorm.": "norm.",
    "classifier.": "head.",
    SIGLIP_BLOCK + "layer_norm1.": "blocks.#.norm1.",
    SIGLIP_BLOCK + "layer_norm2.": "blocks.#.norm2.",
    SIGLIP_BLOCK + "self_attn.q_proj.": "blocks.#.attn.q.",
    SIGLIP_BLOCK + "self_attn.k_proj.": "blocks.#.attn.k.",
    SIGLIP_BLOCK + "self_attn.v_proj.": "blocks.#.attn.v.",
    SIGLIP_BLOCK + "self_attn.out_proj.": "blocks.#.attn.proj.",
    SIGLIP_BLOCK + "mlp.fc1.": "blocks.#.mlp.fc1.",
    SIGLIP_BLOCK + "mlp.fc2.": "blocks.#.mlp.fc2.",
    "head.probe": "attn_pool.latent",
    "head.attention.in_proj_": "attn_pool.in_proj_",
    "head.attention.out_proj.": "attn_pool.proj.",
    "head.layernorm.": "attn_pool.norm.",
    "head.mlp.fc1.": "attn_pool.mlp.fc1.",
    "head.mlp.fc2.": "attn_pool.mlp.fc2.",
}
CLIP = SIGLIP | {
    "embeddings.class_embedding": "cls_token",
    "pre_layrnorm.": "norm_pre.",  # sic
    "visual_projection.": "head.",
}
# Names of transformers 5 in memory; its files keep the older ones.
NEWER_BLOCK = {
    "layernorm_before.": "norm1.",
    "attention.q_proj.": "attn.q.",
    "attention.k_proj.": "attn.k.",
    "attention.v_proj.": "attn.v.",
    "attention.o_proj.": "attn.proj.",
    "layernorm_after.": "norm2.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
    "mlp.gate_proj.": "mlp.gate.",
    "mlp.up_proj.": "mlp.up.",
    "mlp.down_proj.": "mlp.fc2.",
}
NEWER = {
    f"{stack}{theirs}": f"blocks.#.{ours}" for stack in ("layers.#.", BLOCK) for theirs, ours in NEWER_BLOCK.items()
}

TABLES = {"vit": VIT, "deit": DEIT, "dinov2": DINOV2, "dinov2_with_registers": DINOV2, "siglip": SIGLIP, "clip": CLIP}
PREFIXES = ("vit.", "deit.", "dinov2.", "dinov2_with_registers.", "vision_model.")
PATCHES = ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embedding.weight")
POSITIONS = ("embeddings.position_embeddings", "embeddings.position_embedding.weight")
FIRST_NORM = re.compile(r"(encoder\.layers?|layers)\.0\.(layernorm_before|norm1|layer_norm1)\.weight")
DINOV3 = {"embeddings.patch_embeddings.weight", "embeddings.register_tokens"}
# Of pre-training, or of a text tower beside the image tower.
UNUSED = re.compile(r"embeddings\.(mask_token|position_ids)|decoder\..*|text_(model|projection)\..*|logit_(scale|bias)")


def matches(names: set[str]) -> bool:
    """True for the image encoders above, under their prefix or bare; and for DINOv3, which `read` refuses."""
    for prefix in ("", *PREFIXES):
        bare = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if bare.intersection(PATCHES) and bare.intersection(POSITIONS):
            return any(map(FIRST_NORM.fullmatch, bare))
    return _is_dinov3(names)


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """Weights, with the numbers and names that the folder says."""
    if _is_dinov3(tensors):
        raise CheckpointError("it is DINOv3, whose rotary positions no model here has")
    _remove_prefix(tensors)
    for name in [name for name in tensors if UNUSED.fullmatch(name)]:
        del tensors[name]
    family = _family(tensors)
    found = _huggingface_config.read(beside.config)
    state = Tensors(rename(tensors, TABLES[family] | SWIGLU | NEWER))
    _fit(state, family, found)

    conventions = found.conventions(family)
    config, classes, image_size = infer(state, found.num_attention_heads, found.sides, **conventions)
    pixels = _pixels(found, beside, FAMILIES[family].pixels(image_size))
    foreign = Foreign(
        format="huggingface",
        config=config,
        state=dict(state),
        head_classes=classes,
        image_size=image_size,
        preprocessing=pixels.model_dump(),
        classes=() if family == "clip" and classes else found.names(classes),
        thresholds=found.thresholds(classes),
    )
    return stretched(foreign, pixels.res)


def _is_dinov3(names: Iterable[str]) -> bool:
    return {name[name.find("embeddings.") :] for name in names} >= DINOV3


def _remove_prefix(tensors: Tensors) -> None:
    """The names of a model with a head as those of the model alone."""
    for name in list(tensors):
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        if name.removeprefix(prefix) not in tensors:
            tensors[name.removeprefix(prefix)] = tensors.pop(name)


def _family(names: Tensors) -> str:
    if "embeddings.patch_embedding.weight" in names:
        return "clip" if "embeddings.class_embedding" in names else "siglip"
    if "encoder.layer.0.layer_scale1.lambda1" in names:
        return "dinov2_with_registers" if "embeddings.register_tokens" in names else "dinov2"
    return "deit" if "embeddings.distillation_token" in names else "vit"


def _fit(state: Tensors, family: str, found: Config) -> None:
    """Bring `state` into our form."""
    _fuse(state)
    add_zero_biases(state, "attn.qkv")
    headed = "head.weight" in state
    if family in ("siglip", "clip") and "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][None]
    if family == "clip":
        if "norm_pre.weight" in state and "head.bias" in state:
            raise CheckpointError("it is CLIPForImageClassification, whose head reads patches without the last norm")
        state["cls_token"] = state.take("cls_token")[None, None]
        add_zero_biases(state, "patch_embed.proj", "head")
    if family == "siglip" and headed:
        _drop(state, "attn_pool.")  # its classifier reads the mean
    if family != "vit" or headed:
        _drop(state, "pre_logits.")  # no classifier reads the pooler
    elif "pre_logits.fc.weight" in state and found.pooler_act != "tanh":
        raise CheckpointError(f"its pooler ends with {found.pooler_act!a}, not with tanh")
    if family == "deit" and headed and "head_dist.weight" not in state:
        state["reg_token"] = state.take("dist_token")  # DeiTForImageClassification reads the class token alone
    if not found.vitcli.posemb_class and "pos_embed" in state:
        rows = 1 + ("dist_token" in state)
        if not state["pos_embed"][:, :rows].any():
            state["pos_embed"] = state["pos_embed"][:, rows:]


def _fuse(state: Tensors) -> None:
    """Join what we keep as one: queries, keys and values; SwiGLU's halves. Part what transformers keeps as one."""
    for name in list(state):
        layer, _, part = name.rpartition(".")
        block = layer.rpartition(".")[0]
        if layer.endswith(".attn.q"):
            state[f"{block}.qkv.{part}"] = torch.cat([state.take(f"{block}.{letter}.{part}") for letter in "qkv"])
        elif layer.endswith(".mlp.gate"):
            state[f"{block}.fc1.{part}"] = torch.cat([state.take(f"{block}.{half}.{part}") for half in ("gate", "up")])
        elif name.startswith("attn_pool.in_proj_"):
            fused, part = state.take(name), name.removeprefix("attn_pool.in_proj_")
            width = fused.shape[0] // 3
            state[f"attn_pool.q.{part}"], state[f"attn_pool.kv.{part}"] = fused[:width], fused[width:]


def _drop(state: Tensors, prefix: str) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _pixels(found: Config, beside: Beside, usual: Pixels) -> Pixels:
    """The preprocessing: what our own file says, if preprocessor_config.json is still as it was written beside it."""
    own = found.vitcli.preprocessing
    written = _huggingface_processor.write(own) if own else {}
    if own and all(beside.preprocessor.get(key, value) == value for key, value in written.items()):
        return own
    return checked(Processor, beside.preprocessor, _huggingface_processor.FILE).pixels(usual)


def write(foreign: Foreign, out: Path) -> None:
    """The folder `out`: config.json, model.safetensors, preprocessor_config.json and README.md, a model card.

    Raises CheckpointError with the part of the model that transformers cannot express.
    """
    family = family_of(foreign)
    pixels = checked(Pixels, foreign.preprocessing, "preprocessing")
    config = _huggingface_config.write(foreign, pixels)
    out.mkdir(exist_ok=True)
    for file, content in (
        (_huggingface_config.FILE, config),
        (_huggingface_processor.FILE, _huggingface_processor.write(pixels)),
    ):
        (out / file).write_text(json.dumps(content, indent=2) + "\n")
    save_file(_tensors(foreign, family), out / "model.safetensors", metadata={"format": "pt"})
    (out / "README.md").write_text(card(foreign, pixels, config["architectures"][0]), encoding="utf-8")


def _tensors(foreign: Foreign, family: str) -> dict[str, Tensor]:
    """The state under transformers' names: those of its files, which all versions read."""
    c, headed = foreign.config, foreign.head_classes > 0
    positions, rows = position_table(foreign), {"deit": 2, "siglip": 0}.get(family, 1)
    positions = torch.cat([positions.new_zeros(1, rows - c.posemb_prefix, c.width), positions], dim=1)
    state = {name: value.detach().cpu() for name, value in {**foreign.state, "pos_embed": positions}.items()}
    if family == "siglip":
        state["pos_embed"] = state["pos_embed"][0]
    for name in list(state):
        block, part = name.rpartition(".")[0].removesuffix("qkv"), name.rpartition(".")[2]
        if ".attn.qkv." in name:
            state |= dict(zip((f"{block}{letter}.{part}" for letter in "qkv"), state.pop(name).chunk(3), strict=True))
        if name.startswith("attn_pool.q."):
            halves = [state.pop(name), state.pop(name.replace(".q.", ".kv."))]
            state[f"attn_pool.in_proj_{part}"] = torch.cat(halves)

    table = TABLES[family] | (SWIGLU if c.activation == "swiglu" else {})
    renamed = rename(state, {ours: theirs for theirs, ours in table.items()})
    assert not state, f"{family} has no names for {sorted(state)}"
    if family.startswith("dinov2"):
        renamed["embeddings.mask_token"] = torch.zeros(1, c.width)
    prefix = "vision_model." if family == "siglip" else f"{family}." if headed else ""
    return {
        name if "classifier" in name else f"{prefix}{name}": value.clone(memory_format=torch.contiguous_format)
        for name, value in renamed.items()
    }
