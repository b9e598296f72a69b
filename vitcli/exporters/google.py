"""Google's .npz, as google-research/vision_transformer writes and reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitcli.exporters import Report, _weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from vitcli.checkpoint import Trained

OUTPUT = "model-google.npz"


def export(trained: Trained, out: Path, *, images: Sequence[Image] | None = None) -> Report:
    """Write `out` and hold it against the checkpoint, as `_weights.export` says."""
    report = _weights.export("google", trained, out, images)
    if trained.config.activation == "gelu":
        report.details["GELU"] = "exact, as vitcli reads it back; the original's code takes the tanh form"
    return report
