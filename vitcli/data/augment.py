"""What training does to one image. All chance comes from the generator that is handed in.

With `rng.generator(seed, Stream.AUGMENT, epoch, index)` the result depends on nothing else: not on the number of
loader processes, nor on which images came before.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from vitcli.data import Augment, DataConfig
from vitcli.data.preprocess import pixels, prepare, resize, shorter_side
from vitcli.data.randaugment import randaugment

Box = tuple[int, int, int, int]


def augment(image: Image.Image, config: DataConfig, rng: np.random.Generator) -> Tensor:
    """An RGB image as uint8 (3, height, width) of the model's resolution: crop, flip, RandAugment, colour, erasing."""
    how = config.augment
    image = _crop(image, config, rng)
    if how.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if how.randaugment:
        image = randaugment(image, how.randaugment.n, how.randaugment.m, rng)
    if how.color_jitter:
        image = color_jitter(image, how.color_jitter, rng)
    x = pixels(image)
    if how.random_erasing and rng.random() < how.random_erasing:
        x = erase(x, config, rng)
    return x


def _crop(image: Image.Image, config: DataConfig, rng: np.random.Generator) -> Image.Image:
    how = config.augment
    if how.crop == "inception_crop":
        image = image.crop(inception_box(image.size, how.area, how.aspect, rng))
        return resize(image, config.res, how.interpolation, how.antialias)
    if how.crop == "random_crop":
        return random_crop(image, config.res, how, rng)
    return Image.fromarray(prepare(image, config.preprocessing).permute(1, 2, 0).numpy())


def inception_box(
    size: tuple[int, int], area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A random (left, top, right, bottom) in an image (width, height): a share of its area, of random aspect.

    The distribution is that of TensorFlow's sample_distorted_bounding_box, which the original trained with: aspect
    and height are uniform, so that crops are smaller than torchvision's, whose area is uniform. Like it, after 100
    tries the whole image is taken.
    """
    width, height = size
    smallest, largest = (share * width * height for share in area)
    for _ in range(100):
        ratio = rng.uniform(*aspect)
        low = round((smallest / ratio) ** 0.5)
        high = min(round((largest / ratio) ** 0.5), int((width + 0.5) / ratio), height)
        h = int(rng.integers(low, high, endpoint=True)) if low < high else high
        h += round(h * ratio) * h < smallest
        h -= round(h * ratio) * h > largest
        w = round(h * ratio)
        if 0 < h <= height and 0 < w <= width and smallest <= h * w <= largest:
            top, left = int(rng.integers(max(1, height - h))), int(rng.integers(max(1, width - w)))
            return left, top, left + w, top + h
    return 0, 0, width, height


def random_crop(image: Image.Image, res: tuple[int, int], how: Augment, rng: np.random.Generator) -> Image.Image:
    """Resize, pad with black, and cut (height, width) from a random place."""
    height, width = res
    image = resize(image, how.resize or shorter_side(image, max(res)), how.interpolation, how.antialias)
    top = int(rng.integers(-how.pad, image.height - height + how.pad, endpoint=True))
    left = int(rng.integers(-how.pad, image.width - width + how.pad, endpoint=True))
    return image.crop((left, top, left + width, top + height))


def color_jitter(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, in random order, each times a number from 1 - share to 1 + share."""
    jitters = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in rng.permutation(3):
        image = jitters[which](image).enhance(rng.uniform(max(0.0, 1 - share), 1 + share))
    return image


def erase(x: Tensor, config: DataConfig, rng: np.random.Generator) -> Tensor:
    """uint8 (3, h, w) with noise in a rectangle of 2 % to 33 % of the area and aspect 0.3 to 3.3 (arXiv 1708.04896).

    The noise is normal with the mean and spread of the normalisation, so that the model sees N(0, 1), as in the
    recipes of DeiT and MAE; levels outside 0 to 255 are clipped. After 10 tries the image stays as it is.
    """
    _, height, width = x.shape
    for _ in range(10):
        area, ratio = rng.uniform(0.02, 1 / 3) * height * width, np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h, endpoint=True)), int(rng.integers(width - w, endpoint=True))
            noise = rng.standard_normal((h, w, 3)) * config.std + config.mean
            noise = torch.from_numpy((noise * 255).clip(0, 255).round().astype(np.uint8)).permute(2, 0, 1)
            x[:, top : top + h, left : left + w] = noise
            return x
    return x
