"""A folder that transformers opens: AutoModelForImageClassification.from_pretrained(FOLDER)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitcli.data import imagenet
from vitcli.exporters import Report, _weights
from vitcli.weights._huggingface_processor import note
from vitcli.weights._json import Pixels

if TYPE_CHECKING:
    from PIL.Image import Image

    from vitcli.checkpoint import Trained

OUTPUT = "model-huggingface"


def export(trained: Trained, out: Path, *, images: Sequence[Image] | None = None) -> Report:
    """Write `out` and hold it against the checkpoint, as `_weights.export` says. ImageNet's classes get their words."""
    words = replace(trained, classes=imagenet.in_words(trained.classes))
    report = _weights.export("huggingface", words, out, images)
    said = note(Pixels.model_validate(trained.preprocessing.model_dump()))
    return replace(report, details=report.details | {"in transformers": said}) if said else report
