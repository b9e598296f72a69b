"""Checkpoints of other projects, one file each format, found by the names of the tensors.

To add a format, add a file with

    matches(names: set[str]) -> bool                 are these the names of this format, and of no other?
    read(tensors: Tensors, beside: Beside) -> Foreign
    write(foreign: Foreign, out: Path) -> None       only for formats that an exporter offers

`read` takes every tensor that it understands out of `tensors`, renames it, and lets `_architecture.infer` find
width, depth and the rest in the shapes. What it leaves behind is unexpected, and what does not fit the model that it
describes is wrong: `load` says so for all formats. `write` makes the file or folder `out`, from which `read` gives
the same tensors to the bit; it raises CheckpointError with the part of a model that the format cannot express.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
    where the file has no head. `preprocessing` holds keys of `data.Preprocessing`, from the file or by the format's
    convention. `classes` are names in the order of the logits, None where the file has none, and () where the head's
    outputs are no classes but an embedding, as CLIP's. `thresholds` are the probabilities from which on each class
    applies, where an image may be of several; else None.
    """

    format: str
    config: ViTConfig
    state: dict[str, Tensor]
    head_classes: int
    image_size: tuple[int, int]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    thresholds: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Beside:
    """What is known of a checkpoint besides its tensors.

    `config` and `preprocessor` are the folder's config.json (open_clip_config.json for a file of open_clip) and
    preprocessor_config.json, {} where there is none or the file's name does not belong to such a folder. `metadata` is
    what the header of a .safetensors says.
    """

    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


class Tensors(dict[str, "Tensor"]):
    """The tensors of a file by name, for a format to take out one by one."""

    def take(self, name: str) -> Tensor:
        """Remove and return one. Raises CheckpointError if it is not there."""
        if name not in self:
            raise CheckpointError(f"tensor {_some([name])} is missing")
        return self.pop(name)


# Weights in a folder of transformers, timm or open_clip, or the index of their shards; the safest first.
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)


def is_folder(path: Path) -> bool:
    """Whether a folder holds weights as transformers, timm and open_clip lay them."""
    return any((path / name).is_file() for name in NAMES)


def load(path: Path) -> Foreign:
    """Read an .npz, .safetensors or PyTorch file, or a folder of transformers or timm, of a known format.

    Raises CheckpointError with what was found and what was expected.
    """
    from vitcli.weights import _files

    try:
        tensors = Tensors(_files.read_tensors(path))
        foreign = _read(tensors, _files.read_beside(path))
        _settle(foreign, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}", error.hint) from error.__cause__
    return foreign


def _read(tensors: Tensors, beside: Beside) -> Foreign:
    from vitcli.weights import _refused

    formats = folder(__name__)
    found = [name for name, module in formats.items() if module.matches(set(tensors))]
    if len(found) > 1:
        raise CheckpointError(f"it holds tensors of several formats: {', '.join(found)}")
    if not found:
        what = _refused.reason(set(tensors)) or _some(tensors)
        raise CheckpointError(
            f"its tensors are those of no known format: {what}", f"known formats: {', '.join(formats)}"
        )
    try:
        return formats[found[0]].read(tensors, beside)
    except (RuntimeError, IndexError) as error:  # torch cannot bring a tensor into its place
        what = str(error).partition("\n")[0]
        raise CheckpointError(f"a tensor of what looks like a {found[0]} file has a wrong shape: {what}") from error


def _settle(foreign: Foreign, rest: Tensors) -> None:
    """Bring the state into its final form. It must be the model's by name and shape, finite, and all of the file."""
    import torch

    with torch.device("meta"):
        model = foreign.config.build(foreign.head_classes, foreign.image_size)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    if foreign.classes and len(foreign.classes) != foreign.head_classes:
        raise CheckpointError(f"it names {len(foreign.classes)} classes, and its head has {foreign.head_classes}")
    if foreign.thresholds and len(foreign.thresholds) != foreign.head_classes:
        raise CheckpointError(f"it has {len(foreign.thresholds)} thresholds for {foreign.head_classes} classes")
    if missing := expected.keys() - foreign.state.keys():
        raise CheckpointError(f"missing from what looks like a {foreign.format} file: {_some(missing)}")
    if unexpected := set(rest) | (foreign.state.keys() - expected.keys()):
        raise CheckpointError(f"unexpected in a {foreign.format} file: {_some(unexpected)}")
    for name, value in foreign.state.items():
        if tuple(value.shape) != expected[name]:
            raise CheckpointError(f"{name} has shape {tuple(value.shape)}, expected {expected[name]}")
        if not value.is_floating_point():
            raise CheckpointError(f"{name} holds {value.dtype}, expected floating point")
        foreign.state[name] = value.float().contiguous()  # one by one, so that there are never two sets of weights
        if not is_finite(foreign.state[name]):
            raise CheckpointError(f"{name} holds NaN or infinity")


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity: what its extremes tell in one pass, 30 times as fast as isfinite."""
    return not tensor.numel() or all(math.isfinite(extreme) for extreme in tensor.aminmax())


def _some(names: Iterable[str]) -> str:
    """The first few names, fit to print."""
    names = sorted(names)
    shown = ", ".join(ascii(name)[1:-1][:80] or "one without a name" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "there are none"
