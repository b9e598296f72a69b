"""What is said of answers for labelled images: top-1, or where images may be of several classes mAP and F1."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitcli.errors import DataError


class Headline(NamedTuple):
    """The score by which weights are chosen: its key, its name for a person, its value."""

    key: str
    name: str
    value: float


@dataclass(frozen=True)
class Scores:
    """What is said of every score.

    `loss` is a mean over the images; `seen` of the model's `classes` have images. `bad` names the images that could not
    be read; they are in no other number. `seconds` is all the time, `waiting` the part spent waiting for data.
    """

    images: int
    loss: float
    seen: int
    classes: int
    bad: tuple[str, ...]
    seconds: float
    waiting: float

    @property
    def images_per_second(self) -> float:
        """Images scored in a second of all the time."""
        return self.images / self.seconds

    @property
    def headline(self) -> Headline:
        """The one number."""
        raise NotImplementedError

    @property
    def shares(self) -> dict[str, float]:
        """Those of its numbers that are between 0 and 1, by their names for a person."""
        raise NotImplementedError

    @property
    def logged(self) -> dict[str, float]:
        """What training keeps of it in metrics.jsonl."""
        return {"val_loss": self.loss, f"val_{self.headline.key}": self.headline.value}


@dataclass(frozen=True)
class OneLabelScores(Scores):
    """How well images of one class each are classified.

    `loss` is the cross-entropy; `top1` and `top5` are shares over all the model's classes; `top1_seen` is the share
    when only the `seen` classes may answer, as is usual for ImageNet-A and -R, or None if they are all.
    """

    top1: float
    top5: float
    top1_seen: float | None

    @property
    def headline(self) -> Headline:
        """Top-1."""
        return Headline("top1", "top-1", self.top1)

    @property
    def shares(self) -> dict[str, float]:
        """Top-1 and top-5, and top-1 among the seen classes."""
        seen = {} if self.top1_seen is None else {f"top-1 among the {self.seen:,} classes": self.top1_seen}
        return {"top-1": self.top1, "top-5": self.top5} | seen

    @property
    def logged(self) -> dict[str, float]:
        """Top-5 too."""
        return super().logged | {"val_top5": self.top5}


@dataclass(frozen=True)
class MultiLabelScores(Scores):
    """How well the classes of images that may be of several are told.

    `loss` is the binary cross-entropy, summed over the classes. `map` is the average precision, a mean over the classes
    with images. F1 is at the model's thresholds, 0.5 where it has none: `f1_macro` the same mean, `f1_micro` of all
    answers together. `best_thresholds` are those of each class's best F1 on these very images.
    """

    map: float
    f1_macro: float
    f1_micro: float
    best_thresholds: tuple[float, ...]

    @property
    def headline(self) -> Headline:
        """The mean average precision."""
        return Headline("map", "mAP", self.map)

    @property
    def shares(self) -> dict[str, float]:
        """The mean average precision, and both F1."""
        return {"mAP": self.map, "F1 macro": self.f1_macro, "F1 micro": self.f1_micro}


class Tally(Protocol):
    """What is kept of the batches. Those of several processes add up."""

    loss: float

    @property
    def images(self) -> int:
        """How many there are so far."""
        ...

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Another batch: logits (b, classes), and labels as the data has them."""
        ...

    def __add__(self, other: Any) -> Tally: ...

    def scores(self, facts: dict[str, Any]) -> OneLabelScores | MultiLabelScores:
        """What comes of it; `facts` are the fields that do not follow from the batches."""
        ...


@dataclass
class OneLabelTally:
    """Counts of images of one class each. `columns` are the data's classes in the model, `seen` those with images."""

    columns: Tensor
    seen: Tensor
    images: int = 0
    loss: float = 0.0
    top1: int = 0
    top5: int = 0
    top1_seen: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Another batch: (b, classes), (b,). By numpy: torch would call all threads together, which others need."""
        answers, truth, seen = logits.numpy(), self.columns[labels].numpy(), self.seen.numpy()
        place = rank(answers, truth)
        self.images += len(truth)
        self.loss += cross_entropy(answers, truth)
        self.top1 += int((place < 1).sum())
        self.top5 += int((place < 5).sum())
        if len(seen) < answers.shape[1]:
            place = rank(answers[:, seen], np.searchsorted(seen, truth))
        self.top1_seen += int((place < 1).sum())

    def __add__(self, other: OneLabelTally) -> OneLabelTally:
        counts = ("images", "loss", "top1", "top5", "top1_seen")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in counts})

    def scores(self, facts: dict[str, Any]) -> OneLabelScores:
        """Shares of the images."""
        return OneLabelScores(
            images=self.images,
            loss=self.loss / self.images,
            top1=self.top1 / self.images,
            top5=self.top5 / self.images,
            top1_seen=self.top1_seen / self.images if facts["seen"] < facts["classes"] else None,
            **facts,
        )


@dataclass
class MultiLabelTally:
    """Every answer for images that may be of several classes, since precision is not a sum over images.

    `columns` are the data's classes in the model, `thresholds` the model's.
    """

    columns: Tensor
    thresholds: tuple[float, ...] | None
    loss: float = 0.0
    logits: list[Tensor] = field(default_factory=list)
    truth: list[Tensor] = field(default_factory=list)

    @property
    def images(self) -> int:
        """The images of all batches."""
        return sum(map(len, self.logits))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Another batch: (b, classes), bool (b, classes of the data)."""
        truth = torch.zeros(logits.shape).index_add_(1, self.columns, labels.float()) > 0
        self.loss += F.binary_cross_entropy_with_logits(logits.double(), truth.double(), reduction="sum").item()
        self.logits.append(logits)
        self.truth.append(truth)

    def __add__(self, other: MultiLabelTally) -> MultiLabelTally:
        logits, truth = self.logits + other.logits, self.truth + other.truth
        return replace(self, loss=self.loss + other.loss, logits=logits, truth=truth)

    def scores(self, facts: dict[str, Any]) -> MultiLabelScores:
        """Precision, F1 and thresholds of all images at once. Raises DataError where none has a label."""
        logits, truth = torch.cat(self.logits), torch.cat(self.truth).numpy()
        seen = truth.any(0)
        if not seen.any():
            raise DataError(f"none of the {self.images} images has a label", "precision needs some that have")
        probabilities = logits.double().sigmoid().numpy()
        yes = probabilities >= np.array(self.thresholds or (0.5,))
        hits, total = (yes & truth).sum(0), yes.sum(0) + truth.sum(0)
        return MultiLabelScores(
            images=self.images,
            loss=self.loss / self.images,
            map=float(np.mean(average_precisions(logits.numpy()[:, seen], truth[:, seen]))),
            f1_macro=float(np.mean(2 * hits[seen] / total[seen])),
            f1_micro=float(2 * hits.sum() / total.sum()),
            best_thresholds=tuple(map(best_threshold, probabilities.T, truth.T)),
            **facts,
        )


def average_precisions(logits: np.ndarray, truth: np.ndarray) -> list[float]:
    """The average precision of each class, scikit-learn's: (n, classes), bool (n, classes), none without images."""
    from sklearn.metrics import average_precision_score

    return [float(average_precision_score(own, found)) for own, found in zip(truth.T, logits.T, strict=True)]


def best_threshold(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The probability from which on yes, said of images (n,), has the best F1 with the truth (n,); 0.5 without images.

    It lies midway between two probabilities, or between the least and 0; of several as good it is the highest.
    """
    if not truth.any():
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    falling, hits = np.append(probabilities[order], -1.0), truth[order].cumsum()
    last = np.flatnonzero(falling[:-1] > falling[1:])  # the last image of each probability
    best = last[np.argmax(2 * hits[last] / (last + 1 + hits[-1]))]
    return float((falling[best] + max(falling[best + 1], 0.0)) / 2)


def rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the label's, of equals the lower index first: (b, classes), (b,) -> (b,)."""
    own = np.take_along_axis(logits, labels[:, None], 1)
    lower = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & lower)).sum(1)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The sum over the images: (b, classes), (b,). NaN for answers that are no numbers."""
    below = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        below -= below.max(1, keepdims=True)
    own = np.take_along_axis(below, labels[:, None], 1)[:, 0]
    return float((np.log(np.exp(below).sum(1)) - own).sum())
