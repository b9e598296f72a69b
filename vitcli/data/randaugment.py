"""RandAugment as the AugReg and big_vision recipes ran it (big_vision/pp/archive/autoaugment.py; arXiv 1909.13719).

Sixteen operations on a scale where level 10 was meant as the strongest; the recipes go to 20. Level 0 is not
nothing: then Posterize leaves one bit, Solarize inverts, Color, Contrast and Brightness keep a tenth, Sharpness
smooths. Four properties of the original are kept, because its models were trained with them: Solarize's threshold
and Posterize's shift wrap round as 8-bit numbers (so Solarize inverts at levels 10 and 20), Contrast pulls towards
the grey value (pixels / 256) instead of the image's mean, and the shears turn about the corner. Distances are in
pixels of images of 224 and more; smaller images scale them down.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (128, 128, 128)

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def randaugment(image: Image.Image, n: int, m: float, rng: np.random.Generator) -> Image.Image:
    """`n` operations of level `m`, each drawn from all sixteen."""
    for _ in range(n):
        image = OPERATIONS[int(rng.integers(len(OPERATIONS)))](image, m, rng)
    return image


def auto_contrast(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Stretch each channel to 0 to 255."""
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Flatten each channel's histogram."""
    return ImageOps.equalize(image)


def invert(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """255 minus each value."""
    return ImageOps.invert(image)


def rotate(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Up to 30 degrees at level 10, either way."""
    return image.rotate(_either(3 * level, rng), Image.Resampling.NEAREST, fillcolor=FILL)


def posterize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Keep the highest bits: 4 at level 10, all 8 at level 20."""
    bits = int(level / 10 * 4)
    return ImageOps.posterize(image, bits if 1 <= bits <= 8 else 1)


def solarize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Invert values from a threshold on: 128 at levels 5 and 15, 0 at levels 0, 10 and 20."""
    return ImageOps.solarize(image, int(level / 10 * 256) % 256)


def solarize_add(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Add 110 at level 10 to the values below 128."""
    return image.point([min(255, v + int(level / 10 * 110)) if v < 128 else v for v in range(256)] * 3)


def color(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """From nearly grey at level 0 to almost twice the colour at level 10."""
    return ImageEnhance.Color(image).enhance(_strength(level))


def contrast(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Towards, and beyond level 5 away from, a grey that only the image's size decides: 196 at 224x224."""
    grey = min(255, image.width * image.height // 256)
    return Image.blend(Image.new("RGB", image.size, (grey,) * 3), image, _strength(level))


def brightness(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """From nearly black at level 0 to almost twice as bright at level 10."""
    return ImageEnhance.Brightness(image).enhance(_strength(level))


def sharpness(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """From smoothed at level 0 to sharpened at level 10."""
    return ImageEnhance.Sharpness(image).enhance(_strength(level))


def shear_x(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Shift rows by up to 0.3 of their height at level 10, either way."""
    shift = _either(0.03 * level, rng)
    return _affine(image, (1, shift, -shift / 2, 0, 1, 0))


def shear_y(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Shift columns by up to 0.3 of their distance from the left at level 10, either way."""
    shift = _either(0.03 * level, rng)
    return _affine(image, (1, 0, 0, shift, 1, -shift / 2))


def translate_x(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Move by 100 pixels at level 10, left or right."""
    return _affine(image, (1, 0, _either(10 * level, rng) * _small(image), 0, 1, 0))


def translate_y(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Move by 100 pixels at level 10, up or down."""
    return _affine(image, (1, 0, 0, 0, 1, _either(10 * level, rng) * _small(image)))


def cutout(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Grey out a square of side 80 at level 10; its centre may lie anywhere in the image."""
    half = int(4 * level * _small(image))
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    image = image.copy()
    image.paste(FILL, (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half)))
    return image


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


def _either(amount: float, rng: np.random.Generator) -> float:
    return amount if rng.random() < 0.5 else -amount


def _strength(level: float) -> float:
    return level / 10 * 1.8 + 0.1


def _small(image: Image.Image) -> float:
    return min(1.0, min(image.size) / 224)


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=FILL)
