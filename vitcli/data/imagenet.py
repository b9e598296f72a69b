"""The 1,000 classes of ImageNet-1k, and how class names of a data set meet those of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.resources import files

from vitcli.errors import DataError

_LABELS = dict(
    line.split(" ", 1) for line in (files("vitcli.data") / "imagenet.txt").read_text(encoding="utf-8").splitlines()
)
WNIDS: tuple[str, ...] = tuple(_LABELS)


def name(wnid: str) -> str:
    """A class in words, "tench, Tinca tinca"; a name that is no WordNet id stands for itself."""
    return _LABELS.get(wnid, wnid)


def in_words(classes: Sequence[str]) -> tuple[str, ...]:
    """ImageNet's 1,000 ids in words; any other classes as they are."""
    return tuple(map(name, classes)) if tuple(classes) == WNIDS else tuple(classes)


def as_ids(classes: Sequence[str]) -> tuple[str, ...]:
    """ImageNet's 1,000 classes in words, told by the first synonyms, as ids; any other classes as they are."""
    return WNIDS if _first_words(classes) == _first_words(map(name, WNIDS)) else tuple(classes)


def _first_words(labels: Iterable[str]) -> list[str]:
    return [label.partition(",")[0].casefold() for label in labels]


def match(dataset_classes: Sequence[str], model_classes: Sequence[str]) -> list[int]:
    """For each class of a data set its index in the model's classes.

    Equal names meet; else both sides may name an ImageNet class by id, by its full label or by its first synonym,
    in any case and with underscores. Raises DataError that names the classes without a partner, and near ones.
    """
    known = _unique((label, index) for index, label in enumerate(model_classes))
    ids = WNIDS if list(model_classes) == [name(wnid) for wnid in WNIDS] else map(_wnid, model_classes)
    by_wnid = _unique((wnid, index) for index, wnid in enumerate(ids) if wnid)
    found = [known.get(label, by_wnid.get(_wnid(label) or "")) for label in dataset_classes]
    missing = [label for label, index in zip(dataset_classes, found, strict=True) if index is None]
    if missing:
        shown = "; ".join(_describe(label, model_classes) for label in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"{len(missing)} of the {len(dataset_classes)} classes of the data are unknown to the model: {shown}{more}",
            f"rename the class folders to classes of the model, such as {', '.join(map(repr, model_classes[:3]))}",
        )
    return [index for index in found if index is not None]


def _describe(label: str, model_classes: Sequence[str]) -> str:
    if wnids := _ambiguous(label):
        return f"{label!r} (which of {', '.join(wnids)}?)"
    words = {name(known): known for known in model_classes}
    near = [words[word] for word in get_close_matches(name(label), words, n=2)]
    return f"{label!r} (near {', '.join(map(repr, near))})" if near else repr(label)


def _wnid(label: str) -> str | None:
    """The one ImageNet class of this id, label or first synonym; None if there is none, or more than one."""
    if label in _LABELS:
        return label
    exact, folded = _names()
    label = label.replace("_", " ")
    wnids = exact.get(label) or folded.get(label.casefold(), set())
    return next(iter(wnids)) if len(wnids) == 1 else None


def _ambiguous(label: str) -> list[str]:
    exact, folded = _names()
    label = label.replace("_", " ")
    return sorted(exact.get(label) or folded.get(label.casefold(), set())) if _wnid(label) is None else []


@cache
def _names() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Which classes a full label or first synonym may mean, as written and without case."""
    exact, folded = defaultdict(set), defaultdict(set)
    for wnid, label in _LABELS.items():
        for word in (label, label.split(", ")[0]):
            exact[word].add(wnid)
            folded[word.casefold()].add(wnid)
    return dict(exact), dict(folded)


def _unique(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """A lookup without the names that stand for more than one index."""
    indices = defaultdict(list)
    for key, index in pairs:
        indices[key].append(index)
    return {key: found[0] for key, found in indices.items() if len(found) == 1}
