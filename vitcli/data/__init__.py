"""Images in: `DataConfig` says which and how they are prepared.

`Preprocessing` is the one function from an image to the model's input; training's evaluation, `vit eval`,
`vit predict` and the exported file all use it. Augmentation comes on top of it, in training only.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from vitcli.data.sources import AnySource
from vitcli.schema import Schema, only_for, wrong

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "area"]
Sampling = Literal["uniform", "balanced", "repeat_factor"]
# One number stands for both sides, or for all three channels.
Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(lambda v: (v, v) if isinstance(v, int) else v)]
PerChannel = Annotated[
    tuple[float, float, float], BeforeValidator(lambda v: (v,) * 3 if isinstance(v, int | float) else v)
]


class Preprocessing(Schema):
    """From any image to the model's input, without randomness: resize, central crop, normalise.

    `resize` is what the shorter side becomes before the crop (big_vision's resize_small); null stretches the
    whole image to `res`. A pixel in [0, 1] becomes (pixel - mean) / std: 0.5 and 0.5 give the original's [-1, 1].
    """

    res: Size = Field((224, 224), description="the model's resolution: a side, or [height, width]")
    resize: PositiveInt | None = Field(None, description="shorter side before the central crop; null: no crop")
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    mean: PerChannel = (0.5, 0.5, 0.5)
    std: PerChannel = (0.5, 0.5, 0.5)

    @model_validator(mode="after")
    def _check_sizes(self) -> Preprocessing:
        if self.resize is not None and self.resize < max(self.res):
            raise wrong("resize", f"{self.resize} leaves too little for the central crop: at least {max(self.res)}")
        if min(self.std) <= 0:
            raise wrong("std", "must be greater than 0")
        return self


class RandAugment(Schema):
    """`n` random operations of magnitude `m` (arXiv 1909.13719; m up to 10 is the paper's scale, 0 is not nothing)."""

    n: PositiveInt = 2
    m: float = Field(10, ge=0, le=30)


class Augment(Schema):
    """What training does to an image, in this order, and then to a batch (mixup, cutmix)."""

    crop: Literal["inception_crop", "random_crop", "central_crop"] = Field(
        "inception_crop", description="random area and aspect; or `resize`, pad, random place; or as in evaluation"
    )
    area: tuple[Share, Share] = Field((0.05, 1.0), description="inception_crop: share of the image's area")
    aspect: tuple[PositiveFloat, PositiveFloat] = Field((3 / 4, 4 / 3), description="inception_crop: width / height")
    resize: Size | None = Field(
        None, description="random_crop: stretch the image to this first; null: shorter side = res"
    )
    pad: int = Field(0, ge=0, description="random_crop: zero pixels added on each side before cropping")
    interpolation: Interpolation = "bilinear"
    antialias: bool = Field(False, description="the original's training crop has none")
    flip: bool = Field(True, description="mirror left and right half of the time (flip_lr)")
    randaugment: RandAugment | None = None
    color_jitter: float = Field(0.0, ge=0, description="brightness, contrast and saturation by up to this share")
    random_erasing: Share = Field(0.0, description="probability of erasing a rectangle (arXiv 1708.04896)")
    mixup: float = Field(0.0, ge=0, description="alpha of Beta(alpha, alpha); 0: off (arXiv 1710.09412)")
    cutmix: float = Field(0.0, ge=0, description="alpha of Beta(alpha, alpha); 0: off (arXiv 1905.04899)")
    # With both on, each batch takes one of them, half of the time each.
    mix: Share = Field(1.0, description="share of the batches that mixup and cutmix are for")

    @model_validator(mode="after")
    def _check(self) -> Augment:
        for key in ("area", "aspect"):
            low, high = getattr(self, key)
            if low > high or high == 0:
                raise wrong(key, f"[{low:g}, {high:g}] is no range: the smaller number first")
        for keys, crops in (
            (("area", "aspect"), ("inception_crop",)),
            (("resize", "pad"), ("random_crop",)),
            (("interpolation", "antialias"), ("inception_crop", "random_crop")),
        ):
            for key in keys:
                only_for(self, key, self.crop, crops)
        return self


class DataConfig(Preprocessing):
    """Which images, and how they are prepared: `Preprocessing` for evaluation, `augment` for training."""

    source: AnySource  # pyright: ignore[reportInvalidTypeForm]
    classes: PositiveInt | None = Field(None, description="expected number of classes; checked against the data")
    images: PositiveInt | None = Field(None, description="training images; only --dry-run without the data needs it")
    augment: Augment = Augment.parse({})
    sampling: Sampling = Field(
        "uniform", description="images an epoch shows: each once; of each class as many; of rare classes more"
    )
    repeat_threshold: float = Field(1e-3, gt=0, lt=1, description="repeat_factor: share below which a class is rare")
    bad_images: Share = Field(0.0, description="share of unreadable training images to replace; above it training ends")
    keep: bool | None = Field(
        None, description="training images stay on the device, for random and central crops; null: few, on cuda"
    )
    workers: int | None = Field(None, ge=0, description="loader processes; null: chosen by the source and the cores")

    @model_validator(mode="after")
    def _check_augment(self) -> DataConfig:
        crop = self.augment
        if crop.resize and any(side + 2 * crop.pad < res for side, res in zip(crop.resize, self.res, strict=True)):
            raise wrong("augment.resize", "is smaller than res: nothing is left to crop")
        only_for(self, "repeat_threshold", self.sampling, ("repeat_factor",))
        if self.keep and crop.crop == "inception_crop":
            raise wrong("keep", "goes with augment.crop: random_crop or central_crop")
        return self

    @property
    def preprocessing(self) -> Preprocessing:
        """What evaluation, prediction and export do to an image."""
        return Preprocessing(**{key: getattr(self, key) for key in Preprocessing.model_fields})
