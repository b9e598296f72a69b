"""A state dict of torchvision's VisionTransformer, as .safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitcli.exporters import Report, _weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from vitcli.checkpoint import Trained

OUTPUT = "model-torchvision.safetensors"


def export(trained: Trained, out: Path, *, images: Sequence[Image] | None = None) -> Report:
    """Write `out` and hold it against the checkpoint, as `_weights.export` says."""
    return _weights.export("torchvision", trained, out, images)
