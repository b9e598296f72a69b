"""Checkpoints of other projects, one file each format, found by the names of the tensors.

To add a format, add a file with `matches(names) -> bool` and `read(tensors) -> Foreign`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from vitcli.model import ViTConfig


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint in our terms.

    `state` fits `config.build(len(classes), image_size)` by name and shape. `classes` is None where the file has a
    head but no names, () where it has no head. `preprocessing` holds keys of `data.Preprocessing`, by the format's
    convention.
    """

    format: str
    config: ViTConfig
    state: dict[str, Tensor]
    head_classes: int
    image_size: tuple[int, int]
    preprocessing: dict[str, Any] = field(default_factory=dict)


def load(path: Path) -> Foreign:
    """Read a foreign checkpoint. Raises CheckpointError with what was found and what was expected."""
    raise NotImplementedError
