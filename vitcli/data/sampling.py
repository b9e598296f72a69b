"""How often an epoch shows each image, where classes are not equally large. A pure function of the generator given."""

from __future__ import annotations

import numpy as np

from vitcli.data import Sampling
from vitcli.data.sources import Dataset
from vitcli.errors import RecipeError

# Turns and indices of images. A turn is the epoch, and from bit 32 on how often the epoch has shown the image before.
Positions = tuple[np.ndarray, np.ndarray]


def epoch_order(dataset: Dataset, sampling: Sampling, threshold: float, rng: np.random.Generator) -> np.ndarray:
    """The images of an epoch, in their order: as many as the data set has. Raises RecipeError as `told` does."""
    return dataset.order(rng, _chosen(dataset, sampling, threshold, rng))


def _chosen(dataset: Dataset, sampling: Sampling, threshold: float, rng: np.random.Generator) -> np.ndarray:
    if sampling == "balanced":
        return _balanced(dataset, rng)
    if sampling == "repeat_factor":
        return _repeated(dataset, threshold, rng)
    return np.arange(len(dataset))


def _balanced(dataset: Dataset, rng: np.random.Generator) -> np.ndarray:
    """The same number of images of each class: of a large one some, of a small one each as often as any other."""
    _refuse_overlap(dataset)
    by_class = np.argsort(dataset.labels, kind="stable")
    own = [part for part in np.split(by_class, np.cumsum(dataset.counts)[:-1]) if len(part)]
    share, rest = divmod(len(dataset), len(own))
    more = set(rng.permutation(len(own))[:rest].tolist())
    return np.concatenate(
        [np.resize(rng.permutation(images), share + (number in more)) for number, images in enumerate(own)]
    )


def _refuse_overlap(dataset: Dataset) -> None:
    if dataset.multi_label:
        message = "data.sampling: balanced shows each class equally often, which classes that share images do not allow"
        raise RecipeError(message, "for rare classes more often: --set data.sampling=repeat_factor")


def _repeated(dataset: Dataset, threshold: float, rng: np.random.Generator) -> np.ndarray:
    """Images of rare classes several times, and then as many of all as an epoch has."""
    factors, images = _factors(dataset, threshold), len(dataset)
    times = np.floor(factors + rng.random(images)).astype(np.int64)  # rounded up as often as it is due
    return rng.permutation(np.repeat(np.arange(images), times))[:images]


def repeat_factors(dataset: Dataset, threshold: float) -> np.ndarray:
    """How often each class is repeated: max(1, sqrt(threshold / share of the images)) (LVIS, arXiv 1908.03195)."""
    share = dataset.counts / len(dataset)
    return np.maximum(1.0, np.sqrt(threshold / np.maximum(share, 1e-12)))


def _factors(dataset: Dataset, threshold: float) -> np.ndarray:
    """How often each image is repeated: as its class, or as the rarest of its classes."""
    by_class = repeat_factors(dataset, threshold)
    if not dataset.multi_label:
        return by_class[dataset.labels]
    factors = np.ones(len(dataset))
    for label in np.flatnonzero(by_class > 1):
        np.maximum(factors, by_class[label], out=factors, where=dataset.labels[:, label])
    return factors


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
    """What the sampling does to this data set, for a person.

    Raises RecipeError for balanced sampling where an image may be of several classes.
    """
    if sampling == "uniform":
        return ()
    counts = np.sort(dataset.counts)
    counts = counts[counts > 0]
    sizes = f"{len(counts):,} classes of {counts[0]:,} to {counts[-1]:,} images"
    if sampling == "balanced":
        _refuse_overlap(dataset)
        each = len(dataset) / len(counts)
        times = each / counts
        return (
            f"balanced sampling of {sizes}: {each:,.1f} of each an epoch, so an image of the smallest class is shown "
            f"{times[0]:.3g} times, of the largest {times[-1]:.3g} times",
        )
    factors = _factors(dataset, threshold)
    times = np.sort(factors) / factors.mean()
    return (
        f"repeat-factor sampling of {sizes}, threshold {threshold:g}: an epoch shows an image of the smallest "
        f"class {times[-1]:.3g} times, of the largest {times[0]:.3g} times",
    )
