"""Weights & Biases; the network only where WANDB_MODE=online: `wandb sync RUN/wandb/offline-run-*` sends it later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = "wandb"


class WandB:
    """One run of W&B for one run folder, however often it is resumed."""

    def __init__(self, run: Path, mark: str, step: int, recipe: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(  # pyright: ignore[reportAttributeAccessIssue] (not installed where types are checked)
            project=os.environ.get("WANDB_PROJECT", "vitcli"),
            id=mark,
            name=run.name,
            dir=str(run),
            config=dict(recipe),
            resume="allow",
            mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
            settings={"console": "off", "silent": True, "x_disable_meta": True, "x_disable_stats": True},
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


begin = WandB
