"""preprocessor_config.json, in and out: what transformers does to an image before its model sees it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from vitcli.weights._json import Mean, Pixels, Positive, Side, Std, checked

FILE = "preprocessor_config.json"
RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


class Size(BaseModel):
    """A rectangle, or the shorter side; in old files a bare number, the side of a square."""

    height: Side | None = None
    width: Side | None = None
    shortest_edge: Side | None = None

    @property
    def rectangle(self) -> tuple[int, int] | None:
        """(height, width), a square where only the shorter side is said."""
        height, width = self.height or self.shortest_edge, self.width or self.shortest_edge
        return (height, width) if height and width else None


def _square(size: Any) -> Any:
    return {"height": size, "width": size} if isinstance(size, int) else size


AnySize = Annotated[Size, BeforeValidator(_square)]


class Processor(BaseModel):
    """The keys that decide about pixels: p becomes (p * rescale_factor - image_mean) / image_std."""

    model_config = ConfigDict(allow_inf_nan=False)

    size: AnySize = Size()
    resample: Literal[0, 2, 3] | None = None
    do_center_crop: bool | None = None
    crop_size: AnySize = Size()
    do_rescale: bool = True
    rescale_factor: Positive = 1 / 255
    do_normalize: bool = True
    image_mean: Mean | None = None
    image_std: Std | None = None

    def pixels(self, usual: Pixels) -> Pixels:
        """The same in our terms; what the file leaves out is as `usual`.

        A rectangle before a crop, as DeiT's files have it, is taken for its shorter side: what DeiT itself does.
        """
        size, crop = self.size.rectangle, self.crop_size.rectangle
        cropped = crop is not None if self.do_center_crop is None else self.do_center_crop
        if cropped:
            res, resize = crop or usual.res, min(size) if size else usual.resize
        elif size:
            res, resize = size, self.size.shortest_edge and min(size)
        else:
            res, resize = usual.res, usual.resize
        mean, std = self.image_mean or usual.mean, self.image_std or usual.std
        if not self.do_normalize:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        scale = 255 * self.rescale_factor if self.do_rescale else 255.0
        found = {
            "res": res,
            "resize": resize,
            "interpolation": usual.interpolation if self.resample is None else RESAMPLE[self.resample],
            "mean": tuple(value / scale for value in mean),
            "std": tuple(value / scale for value in std),
        }
        return checked(Pixels, found, FILE)


def write(pixels: Pixels) -> dict[str, Any]:
    """The file, for a class that all versions of transformers have; what it cannot say, `note` does."""
    height, width = pixels.res
    resample = {name: number for number, name in RESAMPLE.items()}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": pixels.resize} if pixels.resize else {"height": height, "width": width},
        "resample": resample.get(pixels.interpolation, resample["bilinear"]),
        "do_center_crop": pixels.resize is not None,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }


def note(pixels: Pixels) -> str | None:
    """What transformers does otherwise than vit, in words; None if only roundings differ."""
    if pixels.interpolation == "area":
        return "it cannot average the covered pixels (interpolation: area) and resizes bilinearly"
    if not pixels.antialias and pixels.interpolation != "nearest":
        return f"it always resizes with antialias, and this model was made for {pixels.interpolation} without"
    return None
