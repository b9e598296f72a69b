"""Where training stands, and all that it needs to go on to the same bits: written, found again, cleared away."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vitcli import optim, storage
from vitcli.checkpoint import saved, write_model
from vitcli.processes import spread, whole
from vitcli.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vitcli.objectives._module import ObjectiveModule


@dataclass
class Position:
    """Where training stands, between two updates. All else follows from the step."""

    step: int = 0
    best_score: float | None = None
    best_step: int = 0
    scored_step: int = 0
    log_bytes: int = 0
    # Sums since the last line of metrics.jsonl: "images", and each of the objective's scalars times images.
    sums: dict[str, float] = field(default_factory=dict)
    # Indices of the training images that could not be read and were replaced, in order.
    bad_images: list[int] = field(default_factory=list)
    # Updates that were skipped because their gradient was not finite.
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    # Images that a process computes at a time, where memory held no more; None: as the recipe says.
    micro_batch: int | None = None
    # Of the last evaluation, as Trained has them.
    thresholds: list[float] | None = None


def training_state(
    module: ObjectiveModule, optimizer: torch.optim.Optimizer, average: optim.Average | None
) -> dict[str, Tensor]:
    """All tensors that training needs to go on, whole and on the CPU. Processes that train together call it at once."""
    tensors = {f"module/{name}": tensor for name, tensor in module.state_dict().items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optim.state(optimizer, module).items()}
    if average:
        tensors |= {f"average/{name}": tensor for name, tensor in average.tensors.items()}
    return whole(tensors)


def save_training(
    folder: Path, position: Position, state: dict[str, Tensor], recipe: Recipe, classes: tuple[str, ...]
) -> None:
    """Write a checkpoint to resume from, with what `training_state` gave."""
    from safetensors.torch import save_file

    prefix = "module/model."
    model = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    rest = {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(prefix)}

    def write(place: Path) -> None:
        write_model(place, model, recipe, classes, position.step, position.thresholds)
        save_file(rest, place / "training.safetensors")
        (place / "state.json").write_text(json.dumps(asdict(position), indent=1))

    storage.write_folder(folder / f"step_{position.step:08d}", write)


def resume(
    folder: Path, module: ObjectiveModule, optimizer: torch.optim.Optimizer, average: optim.Average | None
) -> Position:
    """Put a verified checkpoint back into training's parts, to the bit."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "training.safetensors")
    own = load_file(folder / "model.safetensors")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    live = dict(module.state_dict())
    found = {f"model.{name}": tensor for name, tensor in own.items()} | part("module/")
    module.load_state_dict({name: spread(tensor, like=live[name]) for name, tensor in found.items()})
    optim.load_state(optimizer, module, part("optimizer/"))
    if average:
        for name, tensor in part("average/").items():
            average.tensors[name].copy_(spread(tensor, like=average.tensors[name]))
    return Position(**json.loads((folder / "state.json").read_text()))


def prune(checkpoints: Path, save_every: int, keep_last: int, keep_every: int | None) -> None:
    """Delete checkpoints but for the newest, the last `keep_last` at multiples of `save_every` steps, and those at
    multiples of `keep_every`.

    So others, of interruptions, do not change to which a run may go back.
    """
    found = saved(checkpoints)
    usual = [folder for folder, step in found.items() if step % save_every == 0]
    needed = {*usual[-keep_last:], *list(found)[-1:]}
    for folder, step in found.items():
        if folder not in needed and (not keep_every or step % keep_every):
            storage.remove_folder(folder)
