"""RandAugment's operations by PIL, one image at a time: what the batched ones are held against.

`chance` is three numbers in [0, 1): direction, and a place (x, y).
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (128, 128, 128)


def auto_contrast(image, level, chance):
    return ImageOps.autocontrast(image)


def equalize(image, level, chance):
    return ImageOps.equalize(image)


def invert(image, level, chance):
    return ImageOps.invert(image)


def rotate(image, level, chance):
    return image.rotate(_sign(chance) * 3 * level, Image.Resampling.NEAREST, fillcolor=FILL)


def posterize(image, level, chance):
    bits = int(level / 10 * 4)
    return ImageOps.posterize(image, bits if 1 <= bits <= 8 else 1)


def solarize(image, level, chance):
    return ImageOps.solarize(image, int(level / 10 * 256) % 256)


def color(image, level, chance):
    return ImageEnhance.Color(image).enhance(_strength(level))


def contrast(image, level, chance):
    grey = min(255, image.width * image.height // 256)
    return Image.blend(Image.new("RGB", image.size, (grey,) * 3), image, _strength(level))


def brightness(image, level, chance):
    return ImageEnhance.Brightness(image).enhance(_strength(level))


def sharpness(image, level, chance):
    return ImageEnhance.Sharpness(image).enhance(_strength(level))


def shear_x(image, level, chance):
    shift = _sign(chance) * 0.03 * level
    return _affine(image, (1, shift, -shift / 2, 0, 1, 0))


def shear_y(image, level, chance):
    shift = _sign(chance) * 0.03 * level
    return _affine(image, (1, 0, 0, shift, 1, -shift / 2))


def translate_x(image, level, chance):
    return _affine(image, (1, 0, _sign(chance) * 10 * level * _small(image), 0, 1, 0))


def translate_y(image, level, chance):
    return _affine(image, (1, 0, 0, 0, 1, _sign(chance) * 10 * level * _small(image)))


def cutout(image, level, chance):
    half = int(4 * level * _small(image))
    x, y = int(chance[1] * image.width), int(chance[2] * image.height)
    image = image.copy()
    image.paste(FILL, (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half)))
    return image


def solarize_add(image, level, chance):
    values = np.asarray(image).astype(int)
    return Image.fromarray(np.where(values < 128, np.minimum(255, values + int(level / 10 * 110)), values).astype("u1"))


OPERATIONS = (auto_contrast, equalize, invert, rotate, posterize, solarize, color, contrast, brightness, sharpness)
OPERATIONS += (shear_x, shear_y, translate_x, translate_y, cutout, solarize_add)


def _sign(chance):
    return 1 if chance[0] < 0.5 else -1


def _strength(level):
    return level / 10 * 1.8 + 0.1


def _small(image):
    return min(1.0, min(image.size) / 224)


def _affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=FILL)
