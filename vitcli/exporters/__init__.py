"""Other programs' formats, one file each: a target's name is the file's name.

To add a target, add a file with

    OUTPUT = "model.onnx"                    the usual name of what it writes, a file or a folder
    def export(trained: Trained, out: Path, *, images: Sequence[Image] | None = None, OPTIONS) -> Report

where OPTIONS are the target's own, typed and with defaults. It writes into `place_for(out)`, opens what it wrote as
a Predictor, and passes it to `check`: what answers otherwise than the checkpoint never gets its final name. For a
format of vitcli/weights, `_weights.export` does all of this.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vitcli.errors import DataError, RecipeError, StorageError
from vitcli.schema import folder

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vitcli.data import Preprocessing
    from vitcli.inference import Predictor

TOLERANCE = 1e-5  # of the largest logit, or of 1; DeiT-Tiny on 200 photographs needs a third of it
MARGIN = 1e-4  # between the two best logits, above which both must choose the same class
ENOUGH = 10  # images: one batch of 1, of 2 and of 7


@dataclass(frozen=True)
class Parity:
    """How an exported file agrees with its checkpoint on real images.

    `difference` is the largest of two logits, `largest` the largest logit; `agreement` the share of the images with
    the same first class.
    """

    difference: float
    largest: float
    agreement: float
    images: int


@dataclass(frozen=True)
class Report:
    """What was exported, and how well it agrees. `details` are the target's own numbers."""

    target: str
    file: str
    megabytes: float
    details: dict[str, str | int]
    parity: Parity
    seconds: float


def targets() -> dict[str, ModuleType]:
    """The targets by name."""
    return folder(__name__)


def target(name: str) -> ModuleType:
    """One of the targets. Raises RecipeError for a name that is none."""
    found = targets()
    if name not in found:
        near = get_close_matches(name, found, 1)
        raise RecipeError(
            f"--to {name}: no such format" + (f", did you mean {near[0]}?" if near else ""),
            f"known: {', '.join(found)}",
        )
    return found[name]


@contextmanager
def place_for(out: Path) -> Iterator[Path]:
    """A path to write a file or a folder `out` at. What lies there and beside it afterwards gets its final place;
    after an error, nothing does.

    Raises StorageError where the disk refuses.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise StorageError(f"{out} is a folder", "name what is not there yet")
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as place:
            yield Path(place) / out.name
            for file in sorted(Path(place).iterdir(), reverse=True):  # model.onnx.data before model.onnx
                file.replace(out.parent / file.name)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror}", "free space or choose another place") from error


def sample(preprocessing: Preprocessing, images: Sequence[Image] | None) -> Tensor:
    """At least ten prepared images, uint8 (n, 3, h, w): the given ones, repeated if fewer, or `photographs`."""
    import torch

    from vitcli.data.preprocess import prepare

    given = list(images or photographs())
    given = [given[i % len(given)] for i in range(max(len(given), ENOUGH))]
    return torch.stack([prepare(image, preprocessing) for image in given])


def photographs() -> list[Image]:
    """Corners and middle of the two photographs that scikit-learn brings."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    return [
        Image.fromarray(photo[y : y + 320, x : x + 400])
        for photo in load_sample_images().images
        for x, y in ((0, 0), (240, 0), (0, 107), (240, 107), (120, 53))
    ]


def check(reference: Predictor, exported: Predictor, images: Tensor) -> Parity:
    """Hold the exported file against its checkpoint at batches of 1, 2 and 7. Raises DataError beyond the tolerance."""
    import torch

    parts = list(_batches(images))
    expected = torch.cat([reference.logits(part) for part in parts])
    found = torch.cat([exported.logits(part) for part in parts])
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    same = found.argmax(1) == expected.argmax(1)
    best = expected.topk(min(2, expected.shape[1]), dim=1).values
    decided = best[:, 0] - best[:, -1] > MARGIN
    parity = Parity(difference, largest, float(same.float().mean()), len(images))
    if not difference <= TOLERANCE * max(1.0, largest) or not bool(same[decided].all()):
        raise DataError(
            f"the exported file does not answer as its checkpoint: logits differ by {difference:.2g} where the largest "
            f"is {largest:.3g}, first class equal in {parity.agreement:.1%} of {parity.images} images",
            "nothing was written; this is worth a report",
        )
    return parity


def _batches(images: Tensor) -> Iterator[Tensor]:
    """The images as batches of 1, 2, 7, 7, …"""
    yield images[:1]
    yield images[1:3]
    yield from images[3:].split(7)
