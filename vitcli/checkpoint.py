"""Checkpoints: what a run saves, and what every command reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitcli.data import Preprocessing
    from vitcli.model import ViTConfig
    from vitcli.model.vit import ViT
    from vitcli.recipe import Recipe


@dataclass(frozen=True)
class Trained:
    """A model that can be used: on the CPU, in fp32, in evaluation mode.

    `classes` are names in the order of the logits. `recipe` is None for a foreign file. `origin` says in a few
    words where it came from.
    """

    model: ViT
    config: ViTConfig
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    origin: str
    recipe: Recipe | None = None


def load(path: Path) -> Trained:
    """The model of a run folder, of one of its checkpoints, or of a foreign file.

    Raises CheckpointError for a missing, damaged or unknown file.
    """
    raise NotImplementedError
