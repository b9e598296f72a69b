"""Other programs' formats, one file each: a target's name is the file's name.

To add a target, add a file with

    OUTPUT = "model.onnx"                    the usual name of what it writes, a file or a folder
    def export(trained: Trained, out: Path, *, images: Sequence[Image] | None = None) -> Report

It writes into `place_for(out)`, opens what it wrote as a Predictor, and passes it to `check`: what answers otherwise
than the checkpoint never gets its final name. For a format of vitcli/weights, `_weights.export` does all of this.

Where there is more to choose, OPTIONS is a frozen dataclass of it, each field named as its flag; then `export` takes
`options`, `source` and `on_stage`, too, as that of `onnx`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice, repeat
from math import inf, log10
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from safetensors import SafetensorError

from vitcli import storage
from vitcli.errors import DataError, RecipeError, StorageError
from vitcli.schema import folder

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vitcli.data import Preprocessing
    from vitcli.inference import Predictor

Precision = Literal["fp32", "fp16", "int8"]
Image_ = TypeVar("Image_")
ENOUGH = 10  # images: one batch of 1, of 2 and of 7
BATCHES = (1, 2, 7)
MARGIN = 1e-4


class Bound(NamedTuple):
    """How far a file may be from its checkpoint in fp32.

    `tolerance` is for the largest difference of two logits, as a share of the largest logit, or of 1. A first class is
    decided where the two best logits differ by more than MARGIN and by the share `margin` of the largest; `agreement`
    is the share of the decided images that must keep it. `snr` is in dB; `hint` is for who meets the bound.
    """

    tolerance: float
    margin: float
    agreement: float
    snr: float
    hint: str


BOUNDS = {
    # Sums in another order: DeiT-Tiny on 200 photographs needs a third of it.
    "fp32": Bound(1e-5, 0.0, 1.0, -inf, "this is worth a report"),
    # Each number keeps 11 bits, an error of 5e-4, and a ViT's dozens of layers add theirs up: 1.4e-3 for DeiT-Tiny.
    "fp16": Bound(1e-2, 2e-3, 0.999, -inf, "this model needs more than fp16: leave out --fp16"),
    # The graph's own resizing may differ by one level of 255, which is 4e-3 of the input's range.
    "full": Bound(1e-2, 2e-3, 0.999, -inf, "leave out --preprocess full, and resize as the metadata says"),
    # 8 bits change logits by tenths, so here only nonsense is refused; what counts is top-1 on held-out images.
    "int8": Bound(inf, inf, 0.0, 10.0, "leave layers in fp32 with --skip, or calibrate on images like yours"),
}


@dataclass(frozen=True)
class Parity:
    """How an exported file agrees with its checkpoint in fp32 on real images.

    `difference` is the largest of two logits, `largest` the largest logit; `agreement` the share of the images with
    the same first class; `snr` the power of the logits over that of the differences in dB, None where there is no
    difference; `images_per_second` the rate of the file, normalising included, at the largest batch on this CPU.
    """

    difference: float
    largest: float
    agreement: float
    images: int
    snr: float | None = None
    images_per_second: float = 0.0


@dataclass(frozen=True)
class HeldOut:
    """Top-1 on images that calibration has not seen, as shares; `drop` in points.

    `measure` is `labels`, or `agreement` with fp32 where there are no labels that the model knows.
    """

    images: int
    measure: str
    fp32: float
    exported: float
    drop: float


@dataclass(frozen=True)
class Report:
    """What was exported, and how well it agrees. `details` are the target's own numbers; `snippet` runs the file."""

    target: str
    file: str
    megabytes: float
    details: dict[str, str | int]
    parity: Parity
    seconds: float
    precision: str = "fp32"
    held_out: HeldOut | None = None
    snippet: str = ""


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
            storage.publish(Path(place))
            for file in sorted(Path(place).iterdir(), reverse=True):  # model.onnx.data before model.onnx
                file.replace(out.parent / file.name)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = error.strerror if isinstance(error, OSError) else error
        reason = f"{out.parent} is a file" if isinstance(error, FileExistsError) else reason
        raise StorageError(f"cannot write {out}: {reason}", "free space or choose another place") from error


def sample(preprocessing: Preprocessing, images: Sequence[Image] | None) -> Tensor:
    """At least ten prepared images, uint8 (n, 3, h, w): the given ones, repeated if fewer, or `photographs`."""
    import torch

    from vitcli.data.preprocess import prepare

    return torch.stack([prepare(image, preprocessing) for image in enough(images)])


def enough(images: Sequence[Image] | None) -> Iterator[Image]:
    """At least ten images: the given ones, repeated if fewer, or `photographs`."""
    given = images or photographs()
    return (given[i % len(given)] for i in range(max(len(given), ENOUGH)))


def photographs() -> list[Image]:
    """Corners and middle of the two photographs that scikit-learn brings."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    return [
        Image.fromarray(photo[y : y + 320, x : x + 400])
        for photo in load_sample_images().images
        for x, y in ((0, 0), (240, 0), (0, 107), (240, 107), (120, 53))
    ]


def check(
    reference: Predictor,
    exported: Predictor,
    images: Tensor,
    precision: str = "fp32",
    *,
    max_batch: int | None = None,
) -> Parity:
    """Hold the exported file against its checkpoint at batches of 1, 2 and 7, or up to `max_batch`.

    Raises DataError beyond the bound of that name in BOUNDS.
    """
    import torch

    expected, found, seconds = [], [], []
    for batch in map(torch.stack, batches(images, max_batch)):
        expected.append(reference.logits(batch))
        begin = time.perf_counter()
        found.append(exported.logits(batch))
        seconds.append((len(batch), time.perf_counter() - begin))
    return compare(torch.cat(expected), torch.cat(found), precision, images_per_second=rate(seconds))


def compare(expected: Tensor, found: Tensor, precision: str, *, images_per_second: float = 0.0) -> Parity:
    """Logits (n, classes) of the checkpoint and of a file. Raises DataError beyond the bound of that name in BOUNDS."""
    import torch

    bound = BOUNDS[precision]
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    noise, power = float((found - expected).double().square().sum()), float(expected.double().square().sum())
    snr = round(10 * log10(power / noise), 1) if 0 < noise < inf and power else None
    same = found.argmax(1) == expected.argmax(1)
    agreement = float(same.float().mean())
    best = expected.topk(min(2, expected.shape[1]), dim=1).values
    decided = same[best[:, 0] - best[:, -1] > max(MARGIN, bound.margin * largest)]
    close = difference <= bound.tolerance * max(1.0, largest) and bool(torch.isfinite(found).all())
    kept = not len(decided) or float(decided.double().mean()) >= bound.agreement
    if not close or not kept or (snr is not None and snr < bound.snr):
        raise DataError(
            f"the exported file does not answer as its checkpoint: logits differ by {difference:.2g} where the largest "
            f"is {largest:.3g}, first class equal in {agreement:.1%} of {len(expected)} images",
            f"nothing was written; {bound.hint}",
        )
    return Parity(difference, largest, agreement, len(expected), snr, images_per_second)


def batches(images: Iterable[Image_], max_batch: int | None = None) -> Iterator[list[Image_]]:
    """The images as batches of 1, 2, 7, 7, … none larger than `max_batch`."""
    rest = iter(images)
    for size in chain(BATCHES, repeat(BATCHES[-1])):
        if not (batch := list(islice(rest, min(size, max_batch or size)))):
            return
        yield batch


def rate(seconds: Sequence[tuple[int, float]]) -> float:
    """Images a second at the largest batch, from (images, seconds) of each batch."""
    largest = max(count for count, _ in seconds)
    times = [spent for count, spent in seconds if count == largest]
    return float(f"{largest * len(times) / sum(times):.3g}")


def alike(images: Sequence[Image]) -> list[Image]:
    """The images as large as the first of them: all that one batch can hold, and each still whole."""
    return [image.resize(images[0].size) for image in images]
