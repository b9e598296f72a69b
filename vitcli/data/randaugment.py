"""RandAugment as the AugReg and big_vision recipes ran it (big_vision/pp/archive/autoaugment.py; arXiv 1909.13719).

Sixteen operations on a scale where level 10 was meant as the strongest; the recipes go to 20. Level 0 is not
nothing: then Posterize leaves one bit, Solarize inverts, Color, Contrast and Brightness keep a tenth, Sharpness
smooths. Four properties of the original are kept, because its models were trained with them: Solarize's threshold
and Posterize's shift wrap round as 8-bit numbers (so Solarize inverts at levels 10 and 20), Contrast pulls towards
the grey value (pixels / 256) instead of the image's mean, and the shears turn about the corner. Distances are in
pixels of images of 224 and more; smaller images scale them down.

Images are uint8 (b, 3, h, w) on any device, and the results are PIL's to the level: tables, integers and fixed-point
coordinates are exact everywhere. `chance` holds three numbers in [0, 1) for each image: direction, and a place (x, y).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vitcli.data.prefetch import put
from vitcli.rng import Generators

FILL = 128
LUMA = (19595, 38470, 7471)  # PIL's weights of red, green and blue, of 65536

Images = UInt8[Tensor, "b 3 h w"]
Operation = Callable[[Images, float, np.ndarray], Images]


def randaugment(images: Images, n: int, m: float, chance: Generators) -> Images:
    """`n` operations of level `m` on each image, each drawn from all sixteen."""
    images = images.clone()
    for _ in range(n):
        drawn = chance.random(4)
        which = (drawn[:, 0] * len(OPERATIONS)).astype(int)
        order = np.argsort(which, kind="stable")
        places, bounds = put(torch.from_numpy(order), images.device), np.searchsorted(which[order], range(17))
        for operation, begin, end in zip(OPERATIONS, bounds, bounds[1:], strict=False):
            if begin < end:
                here = places[begin:end]
                images[here] = operation(images[here], m, drawn[order[begin:end], 1:])
    return images


def auto_contrast(images: Images, level: float, chance: np.ndarray) -> Images:
    """Stretch each channel to 0 to 255."""
    flat = images.flatten(2)
    low, high = (bound[..., None].double() for bound in (flat.amin(2), flat.amax(2)))
    scale = torch.full_like(low, 255) / (high - low)  # infinite where a channel has one value, which stays
    table = _levels(images) * scale - low * scale
    return _look_up(images, torch.where(high > low, table, _levels(images)).clamp(0, 255))


def equalize(images: Images, level: float, chance: np.ndarray) -> Images:
    """Flatten each channel's histogram."""
    counts = histogram(images)
    last = counts.gather(2, images.flatten(2).amax(2, keepdim=True).long())
    step = (counts.sum(2, keepdim=True) - last) // 255
    before = counts.cumsum(2) - counts
    table = (step // 2 + before) // step.clamp(min=1)
    return _look_up(images, torch.where(step > 0, table, _levels(images).long()).clamp(0, 255))


def invert(images: Images, level: float, chance: np.ndarray) -> Images:
    """255 minus each value."""
    return 255 - images


def rotate(images: Images, level: float, chance: np.ndarray) -> Images:
    """Up to 30 degrees at level 10, either way."""
    height, width = images.shape[-2:]

    def turn(sign: int) -> tuple[float, ...]:
        angle = -math.radians(sign * 3 * level % 360)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        return cos, sin, (cos * -x + sin * -y) + x, -sin, cos, (-sin * -x + cos * -y) + y

    return _either_way(images, turn, chance)


def posterize(images: Images, level: float, chance: np.ndarray) -> Images:
    """Keep the highest bits: 4 at level 10, all 8 at level 20."""
    bits = int(level / 10 * 4)
    return images & (256 - 2 ** (8 - (bits if 1 <= bits <= 8 else 1)))


def solarize(images: Images, level: float, chance: np.ndarray) -> Images:
    """Invert values from a threshold on: 128 at levels 5 and 15, 0 at levels 0, 10 and 20."""
    return torch.where(images < int(level / 10 * 256) % 256, images, 255 - images)


def solarize_add(images: Images, level: float, chance: np.ndarray) -> Images:
    """Add 110 at level 10 to the values below 128."""
    more = min(255, int(level / 10 * 110))
    return torch.where(images < 128, images.clamp(max=255 - more) + more, images)


def color(images: Images, level: float, chance: np.ndarray) -> Images:
    """From nearly grey at level 0 to almost twice the colour at level 10."""
    return blend(grey(images), images, _strength(level))


def contrast(images: Images, level: float, chance: np.ndarray) -> Images:
    """Towards, and beyond level 5 away from, a grey that only the image's size decides: 196 at 224x224."""
    middle = min(255, images.shape[-1] * images.shape[-2] // 256)
    return blend(torch.full_like(images[:1], middle), images, _strength(level))


def brightness(images: Images, level: float, chance: np.ndarray) -> Images:
    """From nearly black at level 0 to almost twice as bright at level 10."""
    return blend(torch.zeros_like(images[:1]), images, _strength(level))


def sharpness(images: Images, level: float, chance: np.ndarray) -> Images:
    """From smoothed at level 0 to sharpened at level 10; the outermost pixels stay."""
    smooth, levels = images.clone(), images.short()
    if min(images.shape[-2:]) > 2:
        across = levels[..., :-2] + levels[..., 1:-1] + levels[..., 2:]
        sums = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :] + 4 * levels[..., 1:-1, 1:-1]
        smooth[..., 1:-1, 1:-1] = ((2 * sums + 13).float() / 26).to(torch.uint8)
    return blend(smooth, images, _strength(level))


def shear_x(images: Images, level: float, chance: np.ndarray) -> Images:
    """Shift rows by up to 0.3 of their height at level 10, either way."""
    return _either_way(images, lambda sign: (1, sign * 0.03 * level, -sign * 0.015 * level, 0, 1, 0), chance)


def shear_y(images: Images, level: float, chance: np.ndarray) -> Images:
    """Shift columns by up to 0.3 of their distance from the left at level 10, either way."""
    return _either_way(images, lambda sign: (1, 0, 0, sign * 0.03 * level, 1, -sign * 0.015 * level), chance)


def translate_x(images: Images, level: float, chance: np.ndarray) -> Images:
    """Move by 100 pixels at level 10, left or right."""
    return _either_way(images, lambda sign: (1, 0, sign * 10 * level * _small(images), 0, 1, 0), chance)


def translate_y(images: Images, level: float, chance: np.ndarray) -> Images:
    """Move by 100 pixels at level 10, up or down."""
    return _either_way(images, lambda sign: (1, 0, 0, 0, 1, sign * 10 * level * _small(images)), chance)


def cutout(images: Images, level: float, chance: np.ndarray) -> Images:
    """Grey out a square of side 80 at level 10; its centre may lie anywhere in the image."""
    half = int(4 * level * _small(images))
    centres = (chance[:, 1:] * images.shape[:1:-1]).astype(int)
    x, y = put(torch.from_numpy(centres), images.device).T[..., None, None]
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    inside = (rows[:, None] >= y - half) & (rows[:, None] < y + half) & (columns >= x - half) & (columns < x + half)
    return images.masked_fill(inside[:, None], FILL)


OPERATIONS: tuple[Operation, ...] = (
    auto_contrast,
    equalize,
    invert,
    rotate,
    posterize,
    solarize,
    color,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    cutout,
    solarize_add,
)


def blend(first: Images, second: Images, share: float | Tensor) -> Images:
    """first + share x (second - first), cut to levels as PIL does: rounded down, within 0 to 255."""
    share = torch.as_tensor(share, dtype=torch.float32)
    return (first.float() + share * (second.short() - first.short())).clamp(0, 255).to(torch.uint8)


def grey(images: Images) -> UInt8[Tensor, "b 1 h w"]:
    """PIL's luminance."""
    red, green, blue = images.int().unbind(1)
    return ((red * LUMA[0] + green * LUMA[1] + blue * LUMA[2] + 0x8000) >> 16).to(torch.uint8)[:, None]


def histogram(images: Images) -> Tensor:
    """How often each level occurs in each channel: int64 (b, 3, 256)."""
    flat = images.flatten(2).long()
    return torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device).scatter_add_(
        2, flat, torch.ones_like(flat)
    )


def _levels(images: Images) -> Tensor:
    return torch.arange(256, dtype=torch.float64, device=images.device)


def _look_up(images: Images, table: Tensor) -> Images:
    """Each value replaced by its entry in the table (b, 3, 256) of its channel."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def _either_way(images: Images, matrix: Callable[[int], tuple[float, ...]], chance: np.ndarray) -> Images:
    """Each image moved by the matrix of its direction, +1 or -1."""
    height, width = images.shape[-2:]
    directions = (_source(matrix(sign), height, width, images.device) for sign in (1, -1))
    index, outside = (torch.stack(both) for both in zip(*directions, strict=True))
    back = put(torch.from_numpy((chance[:, 0] >= 0.5).astype(np.int64)), images.device)
    moved = images.flatten(2).gather(2, index[back, None].expand(-1, 3, -1))
    return moved.masked_fill(outside[back, None], FILL).view_as(images)


def _source(matrix: tuple[float, ...], height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which pixel comes to (x, y): that which holds (a x + b y + c, d x + e y + f); and where there is none.

    Both (height width). In 16.16 fixed point, as PIL computes it.
    """
    a, b, c, d, e, f = matrix
    y, x = (torch.arange(side, device=device) for side in (height, width))
    y = y[:, None]
    from_x = (_fixed(a) * x + _fixed(b) * y + _fixed(c + a * 0.5 + b * 0.5)) >> 16
    from_y = (_fixed(d) * x + _fixed(e) * y + _fixed(f + d * 0.5 + e * 0.5)) >> 16
    outside = (from_x < 0) | (from_x >= width) | (from_y < 0) | (from_y >= height)
    return (from_y * width + from_x).masked_fill(outside, 0).flatten(), outside.flatten()


def _fixed(number: float) -> int:
    return math.floor(number * 65536 + 0.5)


def _strength(level: float) -> float:
    return level / 10 * 1.8 + 0.1


def _small(images: Images) -> float:
    return min(1.0, min(images.shape[-2:]) / 224)
