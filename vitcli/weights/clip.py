"""Image towers of CLIP, as OpenAI and open_clip save them: beside the text tower, or alone.

A tower ends in an embedding, not in classes. OpenAI's has QuickGELU; its state dict holds some of the model's numbers
as tensors, which tell it from open_clip's; saved again without them it cannot be told. Of all others
open_clip_config.json tells; without it they are taken for the usual: exact GELU, the class token read. --set
model.activation=quick_gelu mends that for a fine-tuning.
"""

from typing import Any, Literal

from pydantic import BaseModel, PositiveInt

from vitcli.errors import CheckpointError
from vitcli.weights import Beside, Foreign, Tensors
from vitcli.weights._architecture import add_zero_biases, infer
from vitcli.weights._json import checked
from vitcli.weights._names import rename

BLOCK = "transformer.resblocks.#."
NAMES = {
    "class_embedding": "cls_token",
    "conv1.": "patch_embed.proj.",
    "positional_embedding": "pos_embed",
    "ln_pre.": "norm_pre.",
    BLOCK + "ln_1.": "blocks.#.norm1.",
    BLOCK + "attn.in_proj_": "blocks.#.attn.qkv.",
    BLOCK + "attn.out_proj.": "blocks.#.attn.proj.",
    BLOCK + "ls_1.gamma": "blocks.#.ls1.gamma",
    BLOCK + "ln_2.": "blocks.#.norm2.",
    BLOCK + "mlp.c_fc.": "blocks.#.mlp.fc1.",
    BLOCK + "mlp.c_proj.": "blocks.#.mlp.fc2.",
    BLOCK + "ls_2.gamma": "blocks.#.ls2.gamma",
    "ln_post.": "norm.",
    "proj": "head.weight",
}
TOWER = {"class_embedding", "positional_embedding", "conv1.weight", "ln_post.weight"}
# Towers of other kinds, by the beginning of a name.
OTHERS = {
    "attnpool.": "the tower is a ResNet (ModifiedResNet), not a ViT",
    "trunk.": "the tower is one of timm's (visual.trunk), with names of its own",
    "attn_pool.": "the tower pools by several learned queries (attentional_pool), as CoCa's",
}
NUMBERS = {"input_resolution", "context_length", "vocab_size"}  # of OpenAI's model
TEXT = ("text", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "logit_", *NUMBERS)


class Vision(BaseModel):
    """What open_clip's config says of the tower and its tensors do not."""

    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    head_width: PositiveInt | None = None
    pool_type: Literal["tok", "avg"] = "tok"
    final_ln_after_pool: bool = False


class Model(BaseModel):
    """Both towers."""

    quick_gelu: bool = False
    vision_cfg: Vision = Vision()


class Preprocess(BaseModel):
    """From image to input: `shortest` is a resize of the shorter side and a crop, `squash` stretches."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"


class OpenClip(BaseModel):
    """open_clip_config.json; the defaults are those of OpenAI and open_clip."""

    model_cfg: Model = Model()
    preprocess_cfg: Preprocess = Preprocess()


def matches(names: set[str]) -> bool:
    """True for a tower of CLIP, of whatever kind."""
    tower = _tower(names)
    return (
        tower >= TOWER or "attnpool.c_proj.weight" in tower or any(name.startswith("visual.trunk.") for name in names)
    )


def _tower(names: set[str]) -> set[str]:
    """Names of the image tower, without what comes before them beside a text tower."""
    return {name.removeprefix("visual.") for name in names if name.startswith("visual.")} or names


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """The image tower; the text tower is dropped. Heads are `_architecture`'s unless the config tells."""
    for start, kind in OTHERS.items():
        if any(name.startswith(start) for name in _tower(set(tensors))):
            raise CheckpointError(kind)
    config = checked(OpenClip, beside.config, "open_clip_config.json")
    model, vision = config.model_cfg, config.model_cfg.vision_cfg
    openai = tensors.keys() >= NUMBERS
    _drop_text(tensors)

    after_pool = vision.pool_type == "avg" and vision.final_ln_after_pool
    state = rename(tensors, NAMES | ({"ln_post.": "fc_norm."} if after_pool else {}))
    state["cls_token"], state["pos_embed"] = state["cls_token"][None, None], state["pos_embed"][None]
    if "head.weight" in state:
        state["head.weight"] = state["head.weight"].t()
    add_zero_biases(state, "patch_embed.proj", "head")

    width, size = state["patch_embed.proj.weight"].shape[0], vision.image_size
    architecture, embedding, image_size = infer(
        state,
        (width // vision.head_width if vision.head_width else None),
        (size, size) if isinstance(size, int) else size,
        pool="gap" if vision.pool_type == "avg" else "token",
        activation="quick_gelu" if openai or model.quick_gelu else "gelu",
        norm_eps=1e-5,
        posemb_resize="bicubic_antialias",
    )
    preprocessing = _preprocessing(config.preprocess_cfg, image_size)
    return Foreign("clip", architecture, state, embedding, image_size, preprocessing, classes=())


def _drop_text(tensors: Tensors) -> None:
    """Leave the image tower alone, under names without `visual.`, and whatever is of neither tower."""
    if not any(name.startswith("visual.") for name in tensors):
        return
    kept = {
        name.removeprefix("visual."): value
        for name, value in tensors.items()
        if name.startswith("visual.") or not name.startswith(TEXT)
    }
    tensors.clear()
    tensors.update(kept)


def _preprocessing(told: Preprocess, image_size: tuple[int, int]) -> dict[str, Any]:
    return {
        "res": image_size,
        "resize": max(image_size) if told.resize_mode == "shortest" else None,
        "interpolation": told.interpolation,
        "antialias": True,
        "mean": told.mean,
        "std": told.std,
    }
