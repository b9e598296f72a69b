"""All that training needs, made before its first update: from a recipe, and from where the run folder stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcli import checkpoint, optim, rng
from vitcli import runtime as runtimes
from vitcli.data.loader import fingerprint
from vitcli.data.sampling import told
from vitcli.errors import CheckpointError, DataError
from vitcli.processes import Processes
from vitcli.rng import Stream
from vitcli.training.gradients import Engine
from vitcli.training.micro_batch import MicroBatch
from vitcli.training.state import Position, resume
from vitcli.training.update import Update, at_a_time
from vitcli.transfer import start_from

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitcli.checkpoint import Trained
    from vitcli.data.sources import Dataset
    from vitcli.objectives._module import ObjectiveModule
    from vitcli.recipe import Recipe
    from vitcli.run import Run
    from vitcli.runtime import Runtime


@dataclass(frozen=True)
class Setup:
    """What `fit` works with. `share` are the places of a batch that this process computes; `steps` are those of the
    whole training, `warmup` of them with a growing learning rate; `balance` says what is done about classes of unequal
    size; `resumed`, that the run folder had a checkpoint.
    """

    recipe: Recipe
    run: Run
    processes: Processes
    share: range
    runtime: Runtime
    train_set: Dataset
    val_set: Dataset
    per_epoch: int
    steps: int
    warmup: int
    module: ObjectiveModule
    optimizer: torch.optim.Optimizer
    average: optim.Average | None
    position: Position
    micro_batch: MicroBatch
    update: Update
    balance: tuple[str, ...]
    resumed: bool

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.train_set.classes

    @property
    def eval_every(self) -> int:
        """Updates from one evaluation to the next."""
        return self.recipe.eval_every or self.per_epoch

    @property
    def save_every(self) -> int:
        """Updates from one checkpoint to the next."""
        return self.recipe.save_every or self.eval_every


def set_up(
    recipe: Recipe, run: Run, trained: Trained | None, processes: Processes, tell: Callable[[str], None]
) -> Setup:
    """A run folder with a checkpoint is continued; an empty one starts from `trained`, or from initial weights.

    `tell` is for what a person should know. Raises DataError and CheckpointError.
    """
    found, passed = processes.of_first(lambda: checkpoint.newest(run.checkpoints))
    if passed and not found:
        raise CheckpointError("; ".join(passed), "no checkpoint of this run is whole: start a new run")
    for reason in passed:
        tell(f"warning: {reason}; going on from {found}")
    earlier = run.environment()
    runtime = runtimes.start(recipe.runtime, earlier, processes)
    share = processes.share(recipe.batch)

    train_set, val_set = recipe.data.source.open("train"), recipe.data.source.open("val")
    classes = train_set.classes
    if recipe.data.classes not in (None, len(classes)):
        raise DataError(
            f"the data has {len(classes)} classes, the recipe says {recipe.data.classes}", "mend data.classes"
        )
    recipe.objective.check(multi_label=train_set.multi_label)
    per_epoch, steps, warmup = recipe.length(len(train_set))
    if warmup > steps:
        tell(f"warning: the warm-up of {warmup} steps is longer than the training of {steps}")

    environment = runtime.describe() | {"data": fingerprint(train_set), "val": fingerprint(val_set)}
    if earlier:
        _compare(environment, earlier, tell)
    else:
        run.write("env.json", json.dumps(environment | {"steps": steps}, indent=1))

    counts = train_set.counts.tolist()
    balance = told(train_set, recipe.data.sampling, recipe.data.repeat_threshold) + recipe.objective.notes(counts)
    model = _model(recipe, None if found else trained, len(classes), tell)
    computing = f"on {environment['device']} in {runtime.settings()}"
    for note in (computing, *train_set.notes, *val_set.notes, *balance):
        tell(note)

    module = runtime.prepare(recipe.objective.build(model, counts))
    engine = Engine(module, processes, recipe.runtime.shard, recipe.runtime.exact, runtime.device)
    optimizer = optim.build(recipe.optim, module)
    average = optim.Average(module, recipe.optim.ema) if recipe.optim.ema else None
    position = _position(found, module, optimizer, average, train_set)
    run.rewind_log(position.log_bytes)

    rigid = bool(recipe.runtime.exact) or (processes.count > 1 and recipe.runtime.shard == "fsdp")
    micro_batch = MicroBatch(at_a_time(recipe, processes, position.micro_batch), position, processes, rigid, tell)
    return Setup(
        recipe=recipe,
        run=run,
        processes=processes,
        share=share,
        runtime=runtime,
        train_set=train_set,
        val_set=val_set,
        per_epoch=per_epoch,
        steps=steps,
        warmup=warmup,
        module=module,
        optimizer=optimizer,
        average=average,
        position=position,
        micro_batch=micro_batch,
        update=Update(recipe, engine, optimizer, average, runtime, processes, micro_batch),
        balance=balance,
        resumed=found is not None,
    )


def _model(recipe: Recipe, trained: Trained | None, classes: int, tell: Callable[[str], None]) -> nn.Module:
    """The recipe's model with the weights of `trained`, or its first ones."""
    runtimes.seed(rng.torch_seed(recipe.seed, Stream.INIT))
    if trained:
        model, notes = start_from(trained, recipe.model, classes, recipe.data.res)
        for note in [f"starting from {trained.origin}", *notes]:
            tell(note)
    else:
        model = recipe.model.build(classes, recipe.data.res)
    if recipe.optim.freeze:
        optim.freeze(model)
    return model


def _position(
    found: Path | None,
    module: ObjectiveModule,
    optimizer: torch.optim.Optimizer,
    average: optim.Average | None,
    train_set: Dataset,
) -> Position:
    """Where training stands: as the checkpoint says, whose tensors are taken, or at its beginning."""
    if found:
        return resume(found, module, optimizer, average)
    return Position(thresholds=[0.5] * len(train_set.classes) if train_set.multi_label else None)


def _compare(environment: dict[str, Any], earlier: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Refuse to resume on other data; say where bits may differ."""
    for key in ("data", "val"):
        if environment[key] != earlier[key]:
            raise CheckpointError(
                f"the {'training' if key == 'data' else 'validation'} images are not those that the run began with",
                "restore them, or start a new run from its weights: vit finetune --ckpt RUN",
            )
    changed = [f"{key} {earlier[key]} -> {value}" for key, value in environment.items() if earlier.get(key) != value]
    if changed:
        tell(f"warning: resuming is right but not to the bit: {', '.join(changed)}")
