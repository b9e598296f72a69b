"""One update of the weights: forward, backward, clip, step, and the moving average."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vitcli import optim, rng, runtime
from vitcli.optim import Number
from vitcli.processes import Processes, plain
from vitcli.rng import Stream
from vitcli.training.gradients import Engine, exact_size
from vitcli.training.micro_batch import MicroBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vitcli.recipe import Recipe


class Done(NamedTuple):
    """What an update was: the objective's scalars, the gradient's norm, and whether that is finite, on the device."""

    losses: dict[str, Tensor]
    norm: Tensor
    finite: Tensor


class Update:
    """Updates of a module from this process's share of each batch, so many images at a time as memory holds.

    On CUDA an update is recorded, where it takes the batch whole.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        average: optim.Average | None,
        started: runtime.Runtime,
        processes: Processes,
        micro_batch: MicroBatch,
    ):
        self._recipe, self._engine, self._optimizer, self._average = recipe, engine, optimizer, average
        self._runtime, self._rank, self._share = started, processes.rank, len(processes.share(recipe.batch))
        self._micro_batch = micro_batch
        self._recorded = started.recorded(self._learn)

    def __call__(self, step: int, images: Tensor, targets: Tensor, lr: float) -> Done:
        """Update number `step` from images (b, 3, h, w), normalised, and targets (b, classes), on the device."""
        self._step = step
        self._seed(0)
        share_of_new = self._average.share(step) if self._average else 0.0
        work = self._recorded if self._micro_batch.size == self._recipe.batch else self._learn
        return work(images, targets, lr, share_of_new)

    def _learn(self, images: Tensor, targets: Tensor, lr: Number, share_of_new: Number) -> Done:
        means: dict[str, Tensor] = {}
        for attempt in self._micro_batch.attempts():
            with attempt:
                losses, means = {}, {}  # a failed attempt's losses hold what its backward pass needed
                if attempt.again:
                    self._engine.module.zero_grad()
                size = self._micro_batch.size
                parts = list(zip(images.split(size), targets.split(size), strict=True))
                for index, (some, own) in enumerate(parts):
                    if index or attempt.again:
                        self._seed(index)
                    weight = len(some) / self._share
                    with self._engine.part(last=attempt.final and index == len(parts) - 1):
                        with self._runtime.autocast():
                            losses = self._engine.forward({"images": some, "targets": own})
                        (losses["loss"] * weight).backward()
                    for name, value in losses.items():
                        means[name] = means.get(name, 0.0) + value.detach() * weight
        norm = optim.clip(self._engine.module, self._recipe.optim.clip)
        finite = norm.isfinite()
        optim.update(self._optimizer, lr, finite)
        if self._average:
            self._average.update(share_of_new, finite)
        return Done(means, plain(norm), plain(finite))

    def _seed(self, part: int) -> None:
        """Let the model's chance in a part of this process's share follow from the step and the part's place."""
        first = self._rank * -(-self._share // self._micro_batch.size)
        runtime.seed(rng.torch_seed(self._recipe.seed, Stream.MODEL, self._step, first + part))


def at_a_time(recipe: Recipe, processes: Processes, known: int | None = None) -> int:
    """Images that go through the model at a time: as the recipe says, or as `known` to fit into memory."""
    if recipe.runtime.exact:
        return exact_size(recipe.runtime.exact, recipe.batch, processes)
    size = known or recipe.runtime.micro_batch or recipe.batch
    return min(size, len(processes.share(recipe.batch)))
