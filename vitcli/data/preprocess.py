"""The one way from an image to the model's input, in training's evaluation, scoring, prediction and export checks.

Where other processes decode for a GPU, that does the same to the bit (handover.py).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vitcli.data import Interpolation, Preprocessing

_PIL = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def prepare(image: Image.Image, p: Preprocessing) -> Tensor:
    """An RGB image as uint8 (3, height, width) of the model's resolution, by resize and central crop.

    Equal to torchvision's Resize(p.resize) and CenterCrop(p.res), rounding included.
    """
    size, (top, left) = central_crop((image.height, image.width), p)
    image = resize(image, size, p.interpolation, p.antialias)
    height, width = p.res
    return pixels(image.crop((left, top, left + width, top + height)))


def central_crop(size: tuple[int, int], p: Preprocessing) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (height, width) that an image of such a size is resized to, and the (top, left) of what is kept of it."""
    if p.resize is None:
        return p.res, (0, 0)
    height, width = size
    rows, columns = shorter_side((width, height), p.resize)
    return (rows, columns), (round((rows - p.res[0]) / 2), round((columns - p.res[1]) / 2))


def normalise(images: Tensor, p: Preprocessing) -> Tensor:
    """uint8 (b, 3, h, w) as float32, on the device where it is: (pixel / 255 - mean) / std."""
    mean, std = (_per_channel(values, images.device) for values in (p.mean, p.std))
    return images.float().div(255).sub(mean).div(std)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept, since a GPU is waited for when they go there."""
    return torch.tensor(values, device=device)[:, None, None]


def resize(image: Image.Image, size: tuple[int, int], interpolation: Interpolation, antialias: bool) -> Image.Image:
    """An RGB image stretched to (height, width); in training and evaluation alike.

    Bilinear and bicubic with antialias are PIL's, as in the recipes of timm and torchvision; without, torch's, which
    for bilinear is also TensorFlow's and for bicubic has a = -0.75. Area is TensorFlow's exact mean of the covered
    pixels. All round to the nearest level, where TensorFlow's `cast` rounds down.
    """
    height, width = size
    if image.size == (width, height):
        return image
    if interpolation == "nearest":
        return image.resize((width, height), Image.Resampling.NEAREST)
    if interpolation == "area":
        covered = _cover(_cover(np.asarray(image, dtype=np.float64), height, axis=0), width, axis=1)
        return Image.fromarray((covered + 0.5).astype(np.uint8))
    if antialias:
        return image.resize((width, height), _PIL[interpolation])
    return to_image(stretch(pixels(image), size, interpolation, antialias))


def stretch(x: Tensor, size: tuple[int, int], interpolation: Interpolation, antialias: bool) -> Tensor:
    """The same of uint8 (3, h, w), without a detour where there need be none."""
    if antialias or interpolation in ("nearest", "area"):
        return pixels(resize(to_image(x), size, interpolation, antialias))
    if tuple(x.shape[1:]) == tuple(size):
        return x
    return F.interpolate(x[None], size, mode=interpolation, align_corners=False)[0]


def shorter_side(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) that keep the aspect of an image (width, height) and have this shorter side.

    The longer is rounded down, as torchvision does.
    """
    width, height = size
    return (side, side * width // height) if height <= width else (side * height // width, side)


def pixels(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(x: Tensor) -> Image.Image:
    """The inverse of `pixels`."""
    return Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())


def _cover(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Mean of x over `size` equal intervals of an axis; a pixel cut by an edge counts by its share."""
    length = x.shape[axis]
    edges = np.arange(size + 1) * (length / size)
    whole = np.minimum(edges.astype(int), length - 1)
    share = (edges - whole)[:, None, None] if axis == 0 else (edges - whole)[:, None]
    before = np.insert(np.cumsum(x, axis), 0, 0, axis)
    at_edge = np.take(before, whole, axis) + share * np.take(x, whole, axis)
    return np.diff(at_edge, axis=axis) * (size / length)
