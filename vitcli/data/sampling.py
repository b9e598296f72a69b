"""How often an epoch shows each image, where classes are not equally large. A pure function of the generator given."""

from __future__ import annotations

import numpy as np

from vitcli.data import Sampling
from vitcli.data.sources import Dataset

# Turns and indices of images. A turn is the epoch, and from bit 32 on how often the epoch has shown the image before.
Positions = tuple[np.ndarray, np.ndarray]


def epoch_order(dataset: Dataset, sampling: Sampling, threshold: float, rng: np.random.Generator) -> np.ndarray:
    """The images of an epoch, in their order: as many as the data set has."""
    return dataset.order(rng, _chosen(dataset.labels, sampling, threshold, rng))


def _chosen(labels: np.ndarray, sampling: Sampling, threshold: float, rng: np.random.Generator) -> np.ndarray:
    if sampling == "balanced":
        return _balanced(labels, rng)
    if sampling == "repeat_factor":
        return _repeated(labels, threshold, rng)
    return np.arange(len(labels))


def _balanced(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same number of images of each class: of a large one some, of a small one each as often as any other."""
    by_class = np.argsort(labels, kind="stable")
    own = [part for part in np.split(by_class, np.cumsum(np.bincount(labels))[:-1]) if len(part)]
    share, rest = divmod(len(labels), len(own))
    more = set(rng.permutation(len(own))[:rest].tolist())
    return np.concatenate(
        [np.resize(rng.permutation(images), share + (number in more)) for number, images in enumerate(own)]
    )


def _repeated(labels: np.ndarray, threshold: float, rng: np.random.Generator) -> np.ndarray:
    """Images of rare classes several times, and then as many of all as an epoch has."""
    factors = repeat_factors(labels, threshold)[labels]
    times = np.floor(factors + rng.random(len(labels))).astype(np.int64)  # rounded up as often as it is due
    return rng.permutation(np.repeat(np.arange(len(labels)), times))[: len(labels)]


def repeat_factors(labels: np.ndarray, threshold: float) -> np.ndarray:
    """How often each class is repeated: max(1, sqrt(threshold / share of the images)) (LVIS, arXiv 1908.03195)."""
    share = np.bincount(labels) / len(labels)
    return np.maximum(1.0, np.sqrt(threshold / np.maximum(share, 1e-12)))


def turns(order: np.ndarray, sampling: Sampling) -> np.ndarray:
    """How often each image of an order came before in it."""
    if sampling == "uniform":
        return np.zeros(len(order), dtype=np.int64)
    by_image = np.argsort(order, kind="stable")
    first = np.r_[True, np.diff(order[by_image]) != 0]
    place = np.arange(len(order))
    before = np.empty_like(place)
    before[by_image] = place - np.maximum.accumulate(np.where(first, place, 0))
    return before


def told(dataset: Dataset, sampling: Sampling, threshold: float) -> tuple[str, ...]:
    """What the sampling does to this data set, for a person."""
    counts = np.bincount(dataset.labels)
    counts = np.sort(counts[counts > 0])
    sizes = f"{len(counts):,} classes of {counts[0]:,} to {counts[-1]:,} images"
    if sampling == "balanced":
        each = len(dataset) / len(counts)
        times = each / counts
        return (
            f"balanced sampling of {sizes}: {each:,.1f} of each an epoch, so an image of the smallest class is shown "
            f"{times[0]:.3g} times, of the largest {times[-1]:.3g} times",
        )
    if sampling == "repeat_factor":
        factors = repeat_factors(dataset.labels, threshold)[dataset.labels]
        times = np.sort(factors) / factors.mean()
        return (
            f"repeat-factor sampling of {sizes}, threshold {threshold:g}: an epoch shows an image of the smallest "
            f"class {times[-1]:.3g} times, of the largest {times[0]:.3g} times",
        )
    return ()
