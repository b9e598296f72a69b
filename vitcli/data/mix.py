"""Mixup and cutmix: what training does to a batch. Numbers are drawn on the host, tensors may be anywhere."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from vitcli.data import Augment, DataConfig
from vitcli.data.prefetch import Batch, put
from vitcli.data.preprocess import normalise


def targets_of(labels: Tensor, classes: int) -> Tensor:
    """Labels, int64 (b,) or bool (b, classes), as float32 (b, classes): 1 for each class of an image, else 0."""
    return (labels if labels.ndim == 2 else F.one_hot(labels, classes)).float()


def places(share: range, batch: int, config: Augment) -> list[int]:
    """The places of a batch that a process with this share of it loads: where images are mixed, one before it too."""
    whole = len(share) == batch
    before = [(share[0] - 1) % batch] if (config.mixup or config.cutmix) and not whole else []
    return [*before, *share]


def ready(batch: Batch, data: DataConfig, classes: int, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """What an update takes, of a batch of `train_batches`: its last `size` images, normalised, and their targets
    (size, classes), both mixed, on the device of the images."""
    images = normalise(batch["images"], data)
    targets = targets_of(put(batch["labels"], images.device), classes)
    images, targets = mix(images, targets, data.augment, rng)
    return images[-size:], targets[-size:]


def mix(images: Tensor, targets: Tensor, config: Augment, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images (b, 3, h, w) and targets (b, classes), each mixed with its predecessor in the batch.

    One decision and one share for the whole batch. With both mixup and cutmix on, each is taken half of the time.
    `rng` is that of (seed, Stream.MIX, step).
    """
    if config.mix < 1 and rng.random() >= config.mix:
        return images, targets
    if config.mixup and config.cutmix:
        return (mixup if rng.random() < 0.5 else cutmix)(images, targets, config, rng)
    if config.mixup:
        return mixup(images, targets, config, rng)
    if config.cutmix:
        return cutmix(images, targets, config, rng)
    return images, targets


def mixup(images: Tensor, targets: Tensor, config: Augment, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """share * own + (1 - share) * other, the share at least a half, as big_vision's (arXiv 1710.09412)."""
    share = float(rng.beta(config.mixup, config.mixup))
    share = max(share, 1 - share)
    return _blend(images, share), _blend(targets, share)


def cutmix(images: Tensor, targets: Tensor, config: Augment, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A rectangle of the other image; targets are shared by the area that it really covers (arXiv 1905.04899)."""
    *_, height, width = images.shape
    side = (1 - float(rng.beta(config.cutmix, config.cutmix))) ** 0.5
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(0, y - half_height), min(height, y + half_height)
    left, right = max(0, x - half_width), min(width, x + half_width)

    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    return mixed, _blend(targets, 1 - (bottom - top) * (right - left) / (height * width))


def _blend(x: Tensor, share: float) -> Tensor:
    return share * x + (1 - share) * x.roll(1, 0)
