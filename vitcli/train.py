"""Training: one loop for pretraining and fine-tuning."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vitcli import optim, rng
from vitcli.data.loader import train_batches
from vitcli.data.mix import places, ready
from vitcli.errors import DataError, NumericsError
from vitcli.processes import ALONE, Processes
from vitcli.report.plots import draw_results
from vitcli.report.progress import Progress
from vitcli.rng import Stream
from vitcli.stop import Stop, Stopped
from vitcli.trackers import tracking
from vitcli.training import rollback
from vitcli.training.keeper import Keeper
from vitcli.training.meter import Meter
from vitcli.training.profiling import profiled
from vitcli.training.saver import Saver
from vitcli.training.setup import set_up

if TYPE_CHECKING:
    from vitcli.checkpoint import Trained
    from vitcli.recipe import Recipe
    from vitcli.run import Run


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `best_score` is the `measure`, top-1 or mAP, of the best weights. `bad_images` were unreadable
    and replaced; `skipped` updates had no finite gradient; `balance` says what was done about classes of unequal size;
    `signal` stopped it early, or is None. Of several processes only the `first` tells it to a person.
    """

    run: Path
    step: int
    steps: int
    measure: str
    best_score: float | None
    best_step: int
    bad_images: int
    skipped: int
    balance: tuple[str, ...]
    seconds: float
    signal: int | None
    first: bool


def fit(
    recipe: Recipe,
    run: Run,
    progress: Progress,
    trained: Trained | None = None,
    processes: Processes = ALONE,
    profile: int = 0,
) -> Outcome:
    """Train to the end of the recipe, from where the run folder stands.

    A run folder with a checkpoint is continued to the same bits; an empty one starts from `trained` or from the
    original's initial weights. SIGINT and SIGTERM end it after the update under way, with a checkpoint. Several
    `processes` call this together and share each batch; the first alone writes. So many updates are to `profile`.
    Raises DataError, CheckpointError, NumericsError, ProcessError, StorageError.
    """
    begin = time.monotonic()
    setup = set_up(recipe, run, trained, processes, progress.note)
    position, steps, share, device = setup.position, setup.steps, setup.share, setup.runtime.device
    saved = position.step if setup.resumed else -1
    batches = train_batches(
        recipe.data,
        setup.train_set,
        batch=recipe.batch,
        seed=recipe.seed,
        start=position.step,
        steps=steps,
        places=places(share, recipe.batch, recipe.data.augment),
        neighbours=processes.neighbours,
        device=device,
    )

    trackers = recipe.track if processes.first else ()
    with (
        Stop() as stop,
        Saver() as saver,
        tracking(trackers, run.path, position.step, recipe.model_dump(), progress.note) as run.track,
        profiled(run.path / "profile", profile * processes.first, device, progress.note) as profile_step,
        setup.micro_batch.errors(),
        processes.errors(lambda: f"after step {position.step}"),
        closing(batches),
        progress.training(position.step, steps, recipe.batch),
    ):
        meter = Meter(position, processes)
        keeper = Keeper(setup, meter, saver, stop, progress)
        setup.module.train()
        while True:
            ending = processes.largest(stop.signal or 0)  # at the same step in all; a signal may come meanwhile
            if _due(position.step, setup.eval_every, steps) and position.scored_step < position.step:
                with meter.paused():
                    try:
                        keeper.evaluate()
                        saved = min(saved, position.step - 1)  # a checkpoint that owes this score is written again
                    except Stopped:
                        ending = stop.signal  # the checkpoint then says that this score is still owed
                    except (DataError, NumericsError):  # which all processes meet
                        keeper.save()
                        raise
            if saved < position.step and (position.step == 0 or ending or _due(position.step, setup.save_every, steps)):
                with meter.paused():
                    keeper.save()
                saved = position.step
            if ending or position.step == steps:
                break
            saver.check()

            step, asked = position.step, time.monotonic()
            batch = next(batches)
            meter.wait(time.monotonic() - asked)
            meter.replaced(batch.pop("bad", {}))
            if killed := batch.pop("killed", 0):
                progress.note(f"warning: {killed} loader processes were killed and replaced; is memory short?")
            chance = rng.generator(recipe.seed, Stream.MIX, step)
            images, targets = ready(batch, recipe.data, len(setup.classes), len(share), chance)

            lr = optim.learning_rate(recipe.optim, step, steps, setup.warmup)
            meter.add(step, len(share), setup.update(step, images, targets, lr))
            position.step = step + 1

            profile_step()
            progress.step(position.step)
            if position.step % recipe.log_every == 0 or position.step == steps:
                keeper.settle()
                if rollback.is_due(position):
                    keeper.roll_back()
                values = meter.read()
                run.log(step=position.step, epoch=round(position.step / setup.per_epoch, 4), lr=lr, **values)
                if "loss" in values:
                    progress.log(position.step, lr=lr, **values)

        if not ending:
            keeper.save_last()

    if processes.first:
        draw_results(run.metrics_file, run.path / "results.png", title=run.path.name)
    processes.all(None)  # torchrun would end the first, still writing, half a minute after another has left
    return Outcome(
        run=run.path,
        step=position.step,
        steps=steps,
        measure="mAP" if setup.train_set.multi_label else "top-1",
        best_score=position.best_score,
        best_step=position.best_step,
        bad_images=len(position.bad_images),
        skipped=position.skipped,
        balance=setup.balance,
        seconds=time.monotonic() - begin,
        signal=ending or None,
        first=processes.first,
    )


def _due(step: int, every: int, steps: int) -> bool:
    return step > 0 and (step % every == 0 or step == steps)
