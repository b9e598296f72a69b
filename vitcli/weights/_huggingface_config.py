"""config.json of transformers, in and out: which class a model is, and with which numbers."""

from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from vitcli.errors import CheckpointError
from vitcli.model import ViTConfig
from vitcli.weights import Foreign
from vitcli.weights._json import Pixels, checked

FILE = "config.json"
MULTI_LABEL = "multi_label_classification"
OWN = "vitcli"  # the key under which our files hold what transformers has no word for
HALF = (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


class Family(NamedTuple):
    """What transformers takes for granted about a kind of model where its files say nothing."""

    eps: float
    activation: str
    crop: float | None  # shorter side before the crop, in sides of the crop; None stretches
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    posemb_resize: str = "bicubic"

    def pixels(self, res: tuple[int, int]) -> Pixels:
        """The usual preprocessing for images (height, width)."""
        resize = round(max(res) * self.crop) if self.crop else None
        found = {"res": res, "resize": resize, "interpolation": self.interpolation, "mean": self.mean, "std": self.std}
        return checked(Pixels, found, "position table")


FAMILIES = {
    "vit": Family(1e-12, "gelu", None, "bilinear", HALF, HALF),
    "deit": Family(1e-12, "gelu", 256 / 224, "bicubic", *IMAGENET),
    "dinov2": Family(1e-6, "gelu", 256 / 224, "bicubic", *IMAGENET),
    "dinov2_with_registers": Family(1e-6, "gelu", 256 / 224, "bicubic", *IMAGENET, "bicubic_antialias"),
    "siglip": Family(1e-6, "gelu_pytorch_tanh", None, "bicubic", HALF, HALF),
    "clip": Family(1e-5, "quick_gelu", 1.0, "bicubic", *CLIP),
}

# With a head, and without.
CLASSES = {
    "vit": ("ViTForImageClassification", "ViTModel"),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTModel"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersModel"),
    "siglip": ("SiglipForImageClassification", "SiglipVisionModel"),
}


class Own(BaseModel):
    """What our own files say besides: see `write`."""

    posemb_class: bool = True
    posemb_resize: str | None = None
    preprocessing: Pixels | None = None
    thresholds: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None


class Config(BaseModel):
    """The keys that decide about logits."""

    model_config = ConfigDict(allow_inf_nan=False)

    hidden_act: str | None = None
    layer_norm_eps: float | None = Field(None, gt=0)
    num_attention_heads: int | None = Field(None, gt=0)
    image_size: int | tuple[int, int] | None = None
    layerscale_value: float = Field(1.0, gt=0)
    pooler_act: str = "tanh"
    id2label: dict[int, str] = Field(default_factory=dict)
    problem_type: str | None = None
    vitcli: Own = Own()

    def conventions(self, name: str) -> dict[str, Any]:
        """Keys of ViTConfig that no tensor tells, for a family."""
        family = FAMILIES[name]
        activation = self.hidden_act or family.activation
        if activation not in ACTIVATIONS:
            raise CheckpointError(f"{FILE}: hidden_act {activation!a} is none of {', '.join(ACTIVATIONS)}")
        return {
            "activation": ACTIVATIONS[activation],
            "norm_eps": self.layer_norm_eps or family.eps,
            "posemb_resize": self.vitcli.posemb_resize or family.posemb_resize,
            **({"layerscale": self.layerscale_value} if name.startswith("dinov2") else {}),
        }

    @property
    def sides(self) -> tuple[int, int] | None:
        """Image size (height, width)."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def names(self, count: int) -> tuple[str, ...] | None:
        """Names of the head's classes, None where they are transformers' own LABEL_0, LABEL_1, ..."""
        if not count or not self.id2label:
            return None
        if sorted(self.id2label) != list(range(count)):
            raise CheckpointError(f"{FILE} names {len(self.id2label)} classes, the head has {count}")
        names = tuple(self.id2label[index] for index in range(count))
        return None if names == _labels(count) else names

    def thresholds(self, count: int) -> tuple[float, ...] | None:
        """The head's, where an image may be of several classes; transformers itself knows that, but no thresholds."""
        if not count or self.problem_type != MULTI_LABEL:
            return None
        return self.vitcli.thresholds or (0.5,) * count


def read(found: dict[str, Any]) -> Config:
    """The file's keys; those of the image tower where there is a text tower beside it. Raises CheckpointError."""
    tower = found.get("vision_config")
    return checked(Config, {**found, **tower} if isinstance(tower, dict) else found, FILE)


def write(foreign: Foreign, pixels: Pixels) -> dict[str, Any]:
    """The file for a model that transformers can express. Raises CheckpointError with the part that it cannot."""
    c, family = foreign.config, family_of(foreign)
    height, width = foreign.image_size
    numbers = {
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_dim,
        "hidden_act": next((theirs for theirs, ours in ACTIVATIONS.items() if ours == c.activation), "gelu"),
        "layer_norm_eps": c.norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": c.patch,
        "num_channels": 3,
    }
    if family == "vit" and c.representation_size:
        numbers |= {"pooler_output_size": c.representation_size, "pooler_act": "tanh"}
    if c.layerscale:
        del numbers["intermediate_size"]
        swiglu = c.activation == "swiglu"
        numbers |= {"mlp_ratio": _mlp_ratio(c), "use_swiglu_ffn": swiglu, "layerscale_value": c.layerscale}
    if c.registers:
        numbers["num_register_tokens"] = c.registers
    model_type = family
    if family == "siglip":
        numbers["vision_use_head"] = c.pool == "map"
        if foreign.head_classes:
            numbers = {"vision_config": numbers}
        else:
            model_type = "siglip_vision_model"
    labels = foreign.classes or _labels(foreign.head_classes)
    return {
        "architectures": [class_name(foreign)],
        "model_type": model_type,
        **numbers,
        "id2label": {str(index): name for index, name in enumerate(labels)},
        "label2id": {name: index for index, name in enumerate(labels)},
        **({} if foreign.thresholds is None else {"problem_type": MULTI_LABEL}),
        "dtype": "float32",
        OWN: {
            "posemb_class": c.posemb_class,
            "posemb_resize": c.posemb_resize,
            "preprocessing": pixels.model_dump(mode="json"),
            "thresholds": foreign.thresholds,
        },
    }


def class_name(foreign: Foreign) -> str:
    """The class of transformers that opens the model."""
    return CLASSES[family_of(foreign)][0 if foreign.head_classes else 1]


def family_of(foreign: Foreign) -> str:
    """The family that computes exactly this. Raises CheckpointError with a part that none has."""
    c, head = foreign.config, foreign.head_classes > 0
    height, width = foreign.image_size
    if c.layerscale:
        family = "dinov2_with_registers" if c.registers else "dinov2"
    elif c.pool == "token":
        family = "deit" if c.distilled else "vit"
    else:
        family = "siglip"
    scaled, pool = bool(c.layerscale), f"pool: {c.pool}"
    parts = {
        "depth: 0": not c.depth,
        "a ResNet before the patches": c.stem,
        "qk_norm": c.qk_norm,
        "a norm before the blocks (pre_norm)": c.pre_norm,
        "the last norm after pooling (norm_after_pool)": c.norm_after_pool,
        "pool: none": c.pool == "none",
        "pool: token_gap without LayerScale": c.pool == "token_gap" and not scaled,
        "registers without LayerScale": c.registers and not scaled,
        "swiglu without LayerScale": c.activation == "swiglu" and not scaled,
        "LayerScale and a distillation token": scaled and c.distilled,
        f"LayerScale and {pool}": scaled and c.pool != ("token_gap" if head else "token"),
        f"LayerScale and an MLP of {c.mlp_dim} channels": scaled and not _mlp_ratio(c),
        f"{pool} beside a class token": family == "siglip" and c.class_token,
        "pool: map with a head": family == "siglip" and c.pool == "map" and head,
        "representation_size": c.representation_size and (head or family != "vit"),
        f"images of {height}x{width} and {pool}": height != width and family not in ("vit", "deit"),
    }
    for part, there in parts.items():
        if there:
            raise CheckpointError(f"transformers has no model with {part}", "vit export --onnx takes any model")
    return family


def _mlp_ratio(c: ViTConfig) -> int | None:
    """DINOv2's mlp_ratio, from which transformers computes the MLP's channels; None if no whole number does."""
    for ratio in range(1, 17):
        hidden = c.width * ratio
        if c.mlp_dim == ((int(hidden * 2 / 3) + 7) // 8 * 8 if c.activation == "swiglu" else hidden):
            return ratio
    return None


def _labels(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{index}" for index in range(count))
