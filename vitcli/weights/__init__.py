"""Checkpoints of other projects, one file each format, found by the names of the tensors.

To add a format, add a file with

    matches(names: set[str]) -> bool                 are these the names of this format, and of no other?
    read(tensors: Tensors, heads: int | None) -> Foreign

`read` takes every tensor that it understands out of `tensors`, renames it, and lets `_architecture.infer` find
width, depth and the rest in the shapes. What it leaves behind is unexpected, and what does not fit the model that it
describes is wrong: `load` says so for all formats.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vitcli.errors import CheckpointError
from vitcli.schema import folder

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from vitcli.model import ViTConfig


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint in our terms.

    `state` (float32, on the CPU) loads strictly into `config.build(head_classes, image_size)`; `head_classes` is 0
    where the file has no head. `preprocessing` holds keys of `data.Preprocessing`, by the format's convention: such
    files do not say it themselves.
    """

    format: str
    config: ViTConfig
    state: dict[str, Tensor]
    head_classes: int
    image_size: tuple[int, int]
    preprocessing: dict[str, Any] = field(default_factory=dict)


class Tensors(dict[str, "Tensor"]):
    """The tensors of a file by name, for a format to take out one by one."""

    def take(self, name: str) -> Tensor:
        """Remove and return one. Raises CheckpointError if it is not there."""
        if name not in self:
            raise CheckpointError(f"tensor {name} is missing")
        return self.pop(name)


def load(path: Path, heads: int | None = None) -> Foreign:
    """Read an .npz, .safetensors or PyTorch file of a known format.

    `heads` is for files that do not tell the number of attention heads, where the usual one is wrong. Raises
    CheckpointError with what was found and what was expected.
    """
    from vitcli.weights._files import read_tensors

    try:
        tensors = Tensors(read_tensors(path))
        foreign = _read(tensors, heads)
        _check(foreign, tensors, heads)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}", error.hint) from error.__cause__
    return replace(foreign, state={name: value.float().contiguous() for name, value in foreign.state.items()})


def _read(tensors: Tensors, heads: int | None) -> Foreign:
    formats = folder(__name__)
    found = [name for name, module in formats.items() if module.matches(set(tensors))]
    assert len(found) < 2, f"formats {found} claim the same names"
    if not found:
        raise CheckpointError(
            f"its tensors are those of no known format: {_some(tensors)}", f"known formats: {', '.join(formats)}"
        )
    try:
        return formats[found[0]].read(tensors, heads)
    except (RuntimeError, IndexError) as error:  # torch cannot bring a tensor into its place
        what = str(error).partition("\n")[0]
        raise CheckpointError(f"a tensor of what looks like a {found[0]} file has a wrong shape: {what}") from error


def _check(foreign: Foreign, rest: Tensors, heads: int | None) -> None:
    """The state must be the model's by name and shape, finite, and all that the file held."""
    import torch

    with torch.device("meta"):
        model = foreign.config.build(foreign.head_classes, foreign.image_size)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    if heads and heads != foreign.config.heads:
        raise CheckpointError(f"the file has {foreign.config.heads} heads, not {heads}", "leave out heads")
    if missing := expected.keys() - foreign.state.keys():
        raise CheckpointError(f"missing from what looks like a {foreign.format} file: {_some(missing)}")
    if unexpected := set(rest) | (foreign.state.keys() - expected.keys()):
        raise CheckpointError(f"unexpected in a {foreign.format} file: {_some(unexpected)}")
    for name, value in foreign.state.items():
        if tuple(value.shape) != expected[name]:
            raise CheckpointError(f"{name} has shape {tuple(value.shape)}, expected {expected[name]}")
        if not value.is_floating_point():
            raise CheckpointError(f"{name} holds {value.dtype}, expected floating point")
        if not value.float().isfinite().all():
            raise CheckpointError(f"{name} holds NaN or infinity")


def _some(names: Iterable[str]) -> str:
    """The first few names, fit to print."""
    names = sorted(names)
    shown = ", ".join(ascii(name)[1:-1][:80] for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "there are none"
