"""TensorBoard: event files in the run's tensorboard/. `tensorboard --logdir runs` shows all runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = "tensorboard"


class TensorBoard:
    """One event file a process. What an earlier one logged after `step` is hidden."""

    def __init__(self, run: Path, mark: str, step: int, recipe: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


begin = TensorBoard
