"""config.json of timm, in and out: what no tensor shows of a model, and how its images are prepared.

timm's defaults stand where a file says nothing. Some architectures set more than that in timm's code; `HEADS`,
`SIGLIP2` and the two words of CLIP repeat it.
"""

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from vitcli.errors import CheckpointError
from vitcli.weights import Foreign
from vitcli.weights._json import Mean, Pixels, Side, Std, checked

FILE = "config.json"
HEADS = {r"vit_giantopt_.*": 16, r"vit_base_patch16_gap_224": 16, r"test_vit2?": 2}
SIGLIP2 = r"vit_(base_patch32|giantopt_patch16|so400m_patch16)_siglip_.*|vit_large_patch16_siglip(_gap)?_512"
# Architectures whose tensors look like a plain ViT's.
HIDDEN = {
    r".*(rope|dinov3|_pe_).*": "needs rotary positions",
    r".*_rpn_.*": "has its norms after attention and MLP",
    r"test_vit3": "pools over class token and registers too",
}
POOLS = {"token": "token", "avg": "gap", "map": "map", "": "none"}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "swiglu"}
INTERPOLATIONS = {"nearest": "nearest", "bilinear": "bilinear", "bicubic": "bicubic", "box": "area"}


class Section(BaseModel):
    """Keys that nobody here asks for are left alone."""

    model_config = ConfigDict(allow_inf_nan=False)


class Arguments(Section):
    """What was given to the model's class."""

    img_size: Side | tuple[Side, Side] | None = None
    num_heads: PositiveInt | None = None
    global_pool: str | None = None
    act_layer: str | None = None
    norm_layer: str | None = None
    pool_include_prefix: bool = False


class Pretrained(Section):
    """How images are prepared. `crop_pct` is the crop's share of the resized side; squash stretches the image."""

    input_size: tuple[int, Side, Side] | None = None
    fixed_input_size: bool = False
    interpolation: str = "bicubic"
    crop_pct: Annotated[float, Field(ge=0.25, le=1)] = 0.875
    crop_mode: str = "center"
    mean: Mean = (0.485, 0.456, 0.406)
    std: Std = (0.229, 0.224, 0.225)
    label_names: tuple[str, ...] | dict[int, str] | None = None


class Own(Section):
    """What our own files say besides: see `write`."""

    preprocessing: Pixels | None = None
    posemb_resize: str | None = None


class Config(Section):
    """The keys that decide about logits and classes."""

    architecture: str = ""
    global_pool: str | None = None
    model_args: Arguments = Arguments()
    pretrained_cfg: Pretrained = Pretrained()
    label_names: tuple[str, ...] | dict[int, str] | None = None
    vitcli: Own = Own()

    @property
    def heads(self) -> int | None:
        """Attention heads where a width's usual number is wrong."""
        usual = (heads for name, heads in HEADS.items() if re.fullmatch(name, self.architecture))
        return self.model_args.num_heads or next(usual, None)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) that the position table is for."""
        size = self.model_args.img_size
        if size is None and self.pretrained_cfg.fixed_input_size and self.pretrained_cfg.input_size:
            return self.pretrained_cfg.input_size[1:]
        return (size, size) if isinstance(size, int) else size

    def conventions(self) -> dict[str, Any]:
        """Keys of ViTConfig as far as the file tells. Raises CheckpointError for what is not a plain ViT's."""
        name, given = self.architecture, self.model_args
        pool = given.global_pool if given.global_pool is not None else self.global_pool
        for pattern, what in HIDDEN.items():
            if re.fullmatch(pattern, name):
                raise CheckpointError(f"{FILE}: architecture {ascii(name)[1:-1][:80]} {what}")
        for key, value, known in (
            ("global_pool", pool, POOLS),
            ("act_layer", given.act_layer, ACTIVATIONS),
            ("norm_layer", given.norm_layer, ("layernorm",)),
        ):
            if value is not None and value not in known:
                raise CheckpointError(f"{FILE}: {key} {ascii(value)[:80]} is none of {', '.join(map(repr, known))}")
        if given.pool_include_prefix:
            raise CheckpointError(f"{FILE}: pool_include_prefix: it pools over class token and registers too")
        found: dict[str, Any] = {}
        if pool is not None:
            found["pool"] = POOLS[pool]
        if name:
            found["norm_eps"] = 1e-5 if "clip" in name and not given.norm_layer else 1e-6
            found["activation"] = ACTIVATIONS[given.act_layer] if given.act_layer else _activation(name)
        if self.vitcli.posemb_resize:
            found["posemb_resize"] = self.vitcli.posemb_resize
        return found

    def preprocessing(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """The keys of data.Preprocessing for images (height, width).

        timm's squash to more than the crop, and its border round the image, become a stretch of the whole image.
        """
        if self.vitcli.preprocessing:
            return self.vitcli.preprocessing.model_dump()
        said = self.pretrained_cfg
        return {
            "res": image_size,
            "resize": math.floor(max(image_size) / said.crop_pct) if said.crop_mode == "center" else None,
            "interpolation": INTERPOLATIONS.get(said.interpolation, "bicubic"),
            "antialias": True,
            "mean": said.mean,
            "std": said.std,
        }

    def names(self, count: int) -> tuple[str, ...] | None:
        """Names of the head's classes; () in our own files for a head whose outputs are no classes."""
        names = self.label_names if self.label_names is not None else self.pretrained_cfg.label_names
        if isinstance(names, dict):
            return tuple(names.get(index, str(index)) for index in range(count))
        return names if count else None


def _activation(architecture: str) -> str:
    if "quickgelu" in architecture:
        return "quick_gelu"
    return "gelu_tanh" if re.fullmatch(SIGLIP2, architecture) else "gelu"


def read(found: dict[str, Any], crop_pct: float) -> Config:
    """The file's keys, of timm's older files too, which have all in one object; `crop_pct` is for no file at all.

    Raises CheckpointError.
    """
    if not isinstance(found.get("architecture"), str):
        return Config(pretrained_cfg=Pretrained(crop_pct=crop_pct))
    older = {} if "pretrained_cfg" in found else {"pretrained_cfg": found, "label_names": found.get("labels")}
    return checked(Config, {**found, **older}, FILE)


def write(foreign: Foreign, architecture: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """The file for `architecture` of timm with other arguments.

    timm reads neither `vitcli` nor what it cannot do: another filter than PIL's, a shorter side that no share of a
    rectangle gives, a way to stretch the position table.
    """
    pixels = Pixels.model_validate(foreign.preprocessing)
    classifier = ["head", "head_dist"] if foreign.config.distilled else "head"
    interpolations = {ours: theirs for theirs, ours in INTERPOLATIONS.items()}
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": foreign.head_classes,
        "num_features": foreign.config.width,
        "global_pool": model_args["global_pool"],
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [3, *foreign.image_size],
            "fixed_input_size": True,
            "interpolation": interpolations[pixels.interpolation],
            "crop_pct": _share(max(pixels.res), pixels.resize) if pixels.resize else 1.0,
            "crop_mode": "center" if pixels.resize else "squash",
            "mean": pixels.mean,
            "std": pixels.std,
            "num_classes": foreign.head_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": classifier,
        },
        "vitcli": {"preprocessing": pixels.model_dump(), "posemb_resize": foreign.config.posemb_resize},
    }
    if foreign.classes is not None:
        config["label_names"] = foreign.classes
    return config


def _share(side: int, resize: int) -> float:
    """What timm divides `side` by, and rounds down, to get `resize`."""
    share = side / resize
    return share if math.floor(side / share) == resize else side / (resize + 0.5)
