"""Training: one loop for pretraining and fine-tuning."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcli import checkpoint, optim, rng
from vitcli import runtime as runtimes
from vitcli.checkpoint import Trained
from vitcli.data.loader import eval_batches, fingerprint, train_batches
from vitcli.data.mix import mix_share, places, targets_of
from vitcli.data.prefetch import put
from vitcli.data.preprocess import normalise
from vitcli.data.resident import Kept, is_small
from vitcli.data.sampling import told
from vitcli.errors import CheckpointError, DataError, NumericsError
from vitcli.inference import TorchPredictor
from vitcli.processes import ALONE, Processes, whole
from vitcli.report.plots import draw_results
from vitcli.report.progress import Progress
from vitcli.rng import Stream
from vitcli.scores import MultiLabelScores
from vitcli.scoring import score, share_of
from vitcli.stop import Stop, Stopped
from vitcli.trackers import tracking
from vitcli.training import rollback
from vitcli.training.gradients import Engine
from vitcli.training.meter import Meter
from vitcli.training.micro_batch import MicroBatch
from vitcli.training.profiling import profiled
from vitcli.training.saver import Saver
from vitcli.training.state import Position, prune, resume, save_training, training_state
from vitcli.training.update import Update, at_a_time
from vitcli.transfer import start_from

if TYPE_CHECKING:
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
    found, passed = checkpoint.newest(run.checkpoints)
    if passed and not found:
        raise CheckpointError("; ".join(passed), "no checkpoint of this run is whole: start a new run")
    for reason in passed:
        progress.note(f"warning: {reason}; going on from {found}")
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
        progress.note(f"warning: the warm-up of {warmup} steps is longer than the training of {steps}")
    eval_every = recipe.eval_every or per_epoch
    save_every = recipe.save_every or eval_every

    environment = runtime.describe() | {"data": fingerprint(train_set), "val": fingerprint(val_set)}
    if earlier:
        _compare(environment, earlier, progress)
    else:
        run.write("env.json", json.dumps(environment, indent=1))

    runtimes.seed(rng.torch_seed(recipe.seed, Stream.INIT))
    if trained and not found:
        model, notes = start_from(trained, recipe.model, len(classes), recipe.data.res)
        for note in [f"starting from {trained.origin}", *notes]:
            progress.note(note)
    else:
        model = recipe.model.build(len(classes), recipe.data.res)
    counts = train_set.counts.tolist()
    balance = told(train_set, recipe.data.sampling, recipe.data.repeat_threshold) + recipe.objective.notes(counts)
    for note in (*train_set.notes, *val_set.notes, *balance):
        progress.note(note)
    if recipe.optim.freeze:
        optim.freeze(model)
    module = runtime.prepare(recipe.objective.build(model, counts))
    engine = Engine(module, processes, recipe.runtime.shard, recipe.runtime.exact, runtime.device)
    optimizer = optim.build(recipe.optim, module)
    average = optim.Average(module, recipe.optim.ema) if recipe.optim.ema else None
    position = resume(found, module, optimizer, average) if found else Position()
    if train_set.multi_label and not found:
        position.thresholds = [0.5] * len(classes)
    run.rewind_log(position.log_bytes)

    rigid = bool(recipe.runtime.exact) or (processes.count > 1 and recipe.runtime.shard == "fsdp")
    size = at_a_time(recipe, processes, position.micro_batch)
    micro_batch = MicroBatch(size, position, processes, rigid, progress.note)
    update = Update(recipe, engine, optimizer, average, runtime, processes, micro_batch)

    predictor = TorchPredictor(module.model, classes, recipe.data.preprocessing, runtime, origin=str(run.path))
    held_out = Kept(
        lambda: eval_batches(
            recipe.data.preprocessing,
            val_set,
            batch=micro_batch.size,
            workers=recipe.data.workers,
            share=share_of(len(val_set), processes)[0],
            neighbours=processes.neighbours,
            device=runtime.device,
        ),
        small=runtime.device.type == "cuda" and is_small(len(val_set), recipe.data.res),
    )

    def evaluate() -> None:
        """Score the weights (the average, if there is one) and keep them if they are the best."""
        with _averaged(average):
            scores = score(
                predictor,
                val_set,
                batch=micro_batch.size,
                allow_bad=True,
                on_batch=stop.check if processes.count == 1 else None,
                processes=processes,
                batches=held_out(),
            )
            if isinstance(scores, MultiLabelScores):
                position.thresholds = list(scores.best_thresholds)
            if position.best_score is None or scores.headline.value > position.best_score:
                position.best_score, position.best_step = scores.headline.value, position.step
                save_model("best")
        position.scored_step = position.step
        for bad in scores.bad:
            progress.note(f"warning: not scored: {bad}")
        run.log(step=position.step, **scores.logged)
        _, measure, value = scores.headline
        progress.scored(position.step, scores.loss, measure, value, best=position.best_step == position.step)

    def settle() -> None:
        """Know what became of every update so far."""
        for image in meter.unreadable():
            progress.note(f"replaced an unreadable image: {image}")
        if len(position.bad_images) > recipe.data.bad_images * len(train_set):
            raise DataError(
                f"{len(position.bad_images)} of {len(train_set)} images so far cannot be read, more than "
                f"data.bad_images={recipe.data.bad_images:g} allows; train.log names them",
                "mend or remove them, or allow more",
            )
        for skipped in meter.settle():
            run.log(step=skipped + 1, skipped="its gradient was not finite")
            progress.note(f"warning: update {skipped + 1} skipped: its gradient was NaN or infinite")

    def save() -> None:
        settle()
        position.log_bytes = run.log_size()
        state, here = training_state(module, optimizer, average), replace(position)

        def write() -> None:
            save_training(run.checkpoints, here, state, recipe, classes)
            prune(run.checkpoints, recipe.keep_last, recipe.keep_every)

        if processes.first:
            saver.begin(write)

    def roll_back() -> None:
        """Take the weights of the last good checkpoint; the step, and so the images, go on."""

        def find() -> Path:
            saver.wait()
            return rollback.target(run.checkpoints, position, save_every, steps)

        good = resume(processes.of_first(find), module, optimizer, average)
        position.skipped_in_a_row, position.rollbacks = 0, position.rollbacks + 1
        run.log(step=position.step, rolled_back_to=good.step)
        progress.note(f"warning: skipped too often: back to the weights of step {good.step}, on with other images")

    def save_model(name: str) -> None:
        state, step, thresholds = whole(module.model.state_dict()), position.step, position.thresholds
        if processes.first:
            saver.begin(lambda: checkpoint.save_model(run.path / name, state, recipe, classes, step, thresholds))

    saved = position.step if found else -1
    batches = train_batches(
        recipe.data,
        train_set,
        batch=recipe.batch,
        seed=recipe.seed,
        start=position.step,
        steps=steps,
        places=places(share, recipe.batch, recipe.data.augment),
        neighbours=processes.neighbours,
        device=runtime.device,
    )

    trackers = recipe.track if processes.first else ()
    with (
        Stop() as stop,
        Saver() as saver,
        tracking(trackers, run.path, position.step, recipe.model_dump(), progress.note) as run.track,
        profiled(run.path / "profile", profile * processes.first, runtime.device, progress.note) as profile_step,
        micro_batch.errors(),
        processes.errors(lambda: f"after step {position.step}"),
        progress.training(position.step, steps, recipe.batch),
    ):
        meter = Meter(position, processes)
        module.train()
        while True:
            ending = processes.largest(stop.signal or 0)  # at the same step in all; a signal may come meanwhile
            if _due(position.step, eval_every, steps) and position.scored_step < position.step:
                with meter.paused():
                    try:
                        evaluate()
                        saved = min(saved, position.step - 1)  # a checkpoint that owes this score is written again
                    except Stopped:
                        ending = stop.signal  # the checkpoint then says that this score is still owed
                    except (DataError, NumericsError):  # which all processes meet
                        save()
                        raise
            if saved < position.step and (position.step == 0 or ending or _due(position.step, save_every, steps)):
                with meter.paused():
                    save()
                saved = position.step
            if ending or position.step == steps:
                break
            saver.check()

            step, asked = position.step, time.monotonic()
            batch = next(batches)
            meter.wait(time.monotonic() - asked)
            meter.replaced(batch.pop("bad", {}))
            images = normalise(batch["images"], recipe.data)
            targets = targets_of(put(batch["labels"], runtime.device), len(classes))
            chance = rng.generator(recipe.seed, Stream.MIX, step)
            images, targets = mix_share(images, targets, len(share), recipe.data.augment, chance)

            lr = optim.learning_rate(recipe.optim, step, steps, warmup)
            meter.add(step, len(share), update(step, images, targets, lr))
            position.step = step + 1

            profile_step()
            progress.step(position.step)
            if position.step % recipe.log_every == 0 or position.step == steps:
                settle()
                if rollback.is_due(position):
                    roll_back()
                values = meter.read()
                run.log(step=position.step, epoch=round(position.step / per_epoch, 4), lr=lr, **values)
                if "loss" in values:
                    progress.log(position.step, lr=lr, **values)

        if not ending:
            with _averaged(average):
                save_model("last")

    if processes.first:
        draw_results(run.metrics_file, run.path / "results.png", title=run.path.name)
    processes.all(None)  # torchrun would end the first, still writing, half a minute after another has left
    return Outcome(
        run=run.path,
        step=position.step,
        steps=steps,
        measure="mAP" if train_set.multi_label else "top-1",
        best_score=position.best_score,
        best_step=position.best_step,
        bad_images=len(position.bad_images),
        skipped=position.skipped,
        balance=balance,
        seconds=time.monotonic() - begin,
        signal=ending or None,
        first=processes.first,
    )


def _due(step: int, every: int, steps: int) -> bool:
    return step > 0 and (step % every == 0 or step == steps)


@contextmanager
def _averaged(average: optim.Average | None) -> Iterator[None]:
    """The averaged weights in place of the live ones."""
    if average:
        average.swap()
    try:
        yield
    finally:
        if average:
            average.swap()


def _compare(environment: dict[str, Any], earlier: dict[str, Any], progress: Progress) -> None:
    """Refuse to resume on other data; say where bits may differ."""
    for key in ("data", "val"):
        if environment[key] != earlier[key]:
            raise CheckpointError(
                f"the {'training' if key == 'data' else 'validation'} images are not those that the run began with",
                "restore them, or start a new run from its weights: vit finetune --ckpt RUN",
            )
    changed = [f"{key} {earlier[key]} -> {value}" for key, value in environment.items() if earlier.get(key) != value]
    if changed:
        progress.note(f"warning: resuming is right but not to the bit: {', '.join(changed)}")
