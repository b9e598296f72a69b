"""What the exporters of plain weights share: written by the format's own file in vitcli/weights, and read back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vitcli import checkpoint
from vitcli.errors import DataError
from vitcli.exporters import Report, check, place_for, sample
from vitcli.weights import Foreign

if TYPE_CHECKING:
    from PIL.Image import Image

    from vitcli.checkpoint import Trained


def export(format: str, trained: Trained, out: Path, images: Sequence[Image] | None) -> Report:
    """Write `out`, read it as any user's file, and hold it against the checkpoint: tensors to the bit, then logits.

    Raises CheckpointError with the part of the model that the format cannot express, StorageError, DataError if what
    was written is not the same model.
    """
    import torch

    from vitcli.inference import torch_predictor

    begin = time.monotonic()
    state = trained.model.state_dict()
    foreign = Foreign(
        format=format,
        config=trained.config,
        state=dict(state),
        head_classes=trained.model.classes,
        image_size=trained.image_size,
        preprocessing=trained.preprocessing.model_dump(mode="json"),
        classes=trained.classes,
        thresholds=trained.thresholds,
    )
    with place_for(out) as place:
        import_module(f"vitcli.weights.{format}").write(foreign, place)
        written = checkpoint.load(place)
        for name, tensor in written.model.state_dict().items():
            if name in state and not torch.equal(tensor, state[name]):
                raise DataError(f"{name} did not come back as it was written", "this is worth a report")
        same = replace(written, preprocessing=trained.preprocessing)
        prepared = sample(trained.preprocessing, images)
        parity = check(torch_predictor(trained, "cpu"), torch_predictor(same, "cpu"), prepared)
        files = [part for part in place.rglob("*") if part.is_file()] if place.is_dir() else [place]
        size = sum(part.stat().st_size for part in files)
    details: dict[str, str | int] = {"tensors": len(state)}
    lost = [key for key in ("preprocessing", "thresholds") if getattr(written, key) != getattr(trained, key)]
    if lost:
        details["left out"] = f"{' and '.join(lost)}, which this format does not hold"
    return Report(format, str(out), round(size / 1e6, 1), details, parity, round(time.monotonic() - begin, 1))
