"""What training does to images: a crop of each, on the way in; then, to a batch on the device, all that keeps its size.

With the generators of (seed, Stream.CROP, epoch, index) and (seed, Stream.PIXELS, epoch, index) the result depends on
nothing else: not on the number of loader processes, the device, or which images share a batch.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from vitcli.data import Augment, DataConfig
from vitcli.data.images import Box, Window, whole
from vitcli.data.prefetch import put
from vitcli.data.preprocess import prepare, shorter_side, stretch, to_image
from vitcli.data.randaugment import Images, blend, grey, randaugment
from vitcli.rng import Generators

TRIES = 10  # of a rectangle to erase
ORDERS = list(permutations(range(3)))


def window(config: DataConfig, rng: np.random.Generator) -> Window:
    """What of an image `crop` is to be given."""
    how = config.augment
    if how.crop != "inception_crop":
        return whole
    return lambda height, width: inception_box((width, height), how.area, how.aspect, rng)


def crop(x: Tensor, config: DataConfig, rng: np.random.Generator) -> Tensor:
    """What lies in an image's window (3, h, w) at the model's resolution, uint8 (3, height, width)."""
    how = config.augment
    if how.crop == "inception_crop":
        return stretch(x, config.res, how.interpolation, how.antialias)
    x = before_crop(x, config)
    return x if how.crop == "central_crop" else random_crop(x, config.res, how.pad, rng)


def before_crop(x: Tensor, config: DataConfig) -> Tensor:
    """What a random or central crop does to an image (3, h, w) that chance has no part in: uint8 (3, h, w)."""
    how = config.augment
    if how.crop == "central_crop":
        return prepare(to_image(x), config.preprocessing)
    size = how.resize or shorter_side((x.shape[2], x.shape[1]), max(config.res))
    return stretch(x, size, how.interpolation, how.antialias)


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


def random_crop(x: Tensor, res: tuple[int, int], pad: int, rng: np.random.Generator) -> Tensor:
    """(height, width) from a random place of an image (3, h, w) that is padded with black."""
    return random_crops(x[None], res, pad, rng.random(2)[None])[0]


def random_crops(images: Images, res: tuple[int, int], pad: int, chance: np.ndarray) -> Images:
    """The same of a batch, with two numbers in [0, 1) for each image: how far down and across."""
    rows, columns = (
        _window(side, length, pad, chance[:, axis], images.device)
        for axis, (side, length) in enumerate(zip(images.shape[-2:], res, strict=True))
    )
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    # The channels come last where rows and columns are chosen for each image.
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _window(side: int, length: int, pad: int, chance: np.ndarray, device: torch.device) -> Tensor:
    """The rows, or columns, that each image keeps of a padded side: int64 (b, length)."""
    first = torch.from_numpy((chance * (side + 2 * pad - length + 1)).astype(np.int64))
    return put(first, device)[:, None] + torch.arange(length, device=device)


def augment(images: Images, config: DataConfig, chance: Generators) -> Images:
    """Cropped images on any device: flip, RandAugment, colour, erasing."""
    how = config.augment
    if how.flip:
        mirrored = put(torch.from_numpy(chance.random(1)[:, 0] < 0.5), images.device)[:, None, None, None]
        images = torch.where(mirrored, images.flip(-1), images)
    if how.randaugment:
        images = randaugment(images, how.randaugment.n, how.randaugment.m, chance)
    if how.color_jitter:
        images = color_jitter(images, how.color_jitter, chance)
    if how.random_erasing:
        images = erase(images, how, config.mean, config.std, chance)
    return images


def color_jitter(images: Images, share: float, chance: Generators) -> Images:
    """Brightness, contrast and saturation, in random order, each times a number from 1 - share to 1 + share."""
    drawn = chance.random(4)
    low = max(0.0, 1 - share)
    factors = put(torch.from_numpy(low + (1 + share - low) * drawn[:, 1:]), images.device).float()
    orders = np.array(ORDERS)[(drawn[:, 0] * len(ORDERS)).astype(int)]
    images = images.clone()
    for place in range(3):
        for which, towards in enumerate((torch.zeros_like, _mean_grey, grey)):
            here = put(torch.from_numpy(np.flatnonzero(orders[:, place] == which)), images.device)
            if len(here):
                some = images[here]
                images[here] = blend(towards(some), some, factors[here, which][:, None, None, None])
    return images


def _mean_grey(images: Images) -> Images:
    """What PIL's contrast pulls towards: the mean luminance of each image."""
    return (grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).to(torch.uint8)


def erase(images: Images, how: Augment, mean: tuple[float, ...], std: tuple[float, ...], chance: Generators) -> Images:
    """Noise in a rectangle of 2 % to 33 % of the area and aspect 0.3 to 3.3 (arXiv 1708.04896), where chance will.

    The noise is normal with the mean and spread of the normalisation, so that the model sees N(0, 1), as in the
    recipes of DeiT and MAE; levels outside 0 to 255 are clipped. After ten tries an image stays as it is.
    """
    height, width = images.shape[-2:]
    first = chance.random(4)
    area, ratio, down, across = np.moveaxis(chance.random(4 * TRIES).reshape(-1, TRIES, 4), -1, 0)
    area = (0.02 + (1 / 3 - 0.02) * area) * height * width
    ratio = 0.3 ** (1 - 2 * ratio)
    h, w = np.rint((area * ratio) ** 0.5), np.rint((area / ratio) ** 0.5)
    fits = (h > 0) & (h < height) & (w > 0) & (w < width)
    each, found = np.arange(len(images)), fits.argmax(1)  # the first that fits
    chosen = np.flatnonzero((first[:, 0] < how.random_erasing) & fits.any(1))
    if not len(chosen):
        return images
    h, w, down, across = (values[each, found][chosen] for values in (h, w, down, across))
    top, left = np.floor(down * (height - h + 1)), np.floor(across * (width - w + 1))
    box = np.stack([top, top + h, left, left + w, np.floor(first[chosen, 1] * 2**32)]).astype(np.int64)
    top, bottom, left, right, seeds = put(torch.from_numpy(box), images.device)[:, :, None, None]
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    inside = (rows[:, None] >= top) & (rows[:, None] < bottom) & (columns >= left) & (columns < right)
    spread, centre = (torch.tensor(values, device=images.device).double()[:, None, None] for values in (std, mean))
    noise = _noise(seeds[..., None], images.shape[1:], images.device) * spread + centre
    noise = (noise * 255).round().clamp(0, 255).to(torch.uint8)
    here = put(torch.from_numpy(chosen), images.device)
    return images.index_put((here,), torch.where(inside[:, None], noise, images[here]))


def _noise(seeds: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Normal numbers, float64 (b, *shape), from the seeds of each image: a hash (murmur3's) of seed and place."""
    bits = (torch.arange(shape.numel(), device=device).view(shape) * 0x9E3779B1 + seeds) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return torch.erfinv((2 * bits.double() + 1) / 2**32 - 1) * 2**0.5
