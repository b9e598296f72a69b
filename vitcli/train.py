"""Training: one loop for pretraining and fine-tuning."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitcli import checkpoint, optim, rng
from vitcli import runtime as runtimes
from vitcli.checkpoint import Position, Trained
from vitcli.data.kept import Kept, is_small
from vitcli.data.loader import epoch_steps, eval_batches, fingerprint, train_batches
from vitcli.data.mix import mix_share, one_hot, places
from vitcli.data.place import put
from vitcli.data.preprocess import normalise
from vitcli.data.sampling import told
from vitcli.engine import Engine, exact_size
from vitcli.errors import CheckpointError, DataError
from vitcli.inference import TorchPredictor, score, share_of
from vitcli.memory import MicroBatch
from vitcli.meter import Meter
from vitcli.optim import Number
from vitcli.processes import Processes, plain, whole
from vitcli.profiling import profiled
from vitcli.report.plots import draw_results
from vitcli.report.progress import Progress
from vitcli.rng import Stream
from vitcli.saver import Saver
from vitcli.stop import Stop, Stopped
from vitcli.trackers import tracking

if TYPE_CHECKING:
    from torch import Tensor

    from vitcli.recipe import Recipe
    from vitcli.run import Run


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `bad_images` were unreadable and replaced; `skipped` updates had no finite gradient; `balance`
    says what was done about classes of unequal size; `signal` stopped it early, or is None. Of several processes only
    the `first` tells it to a person.
    """

    run: Path
    step: int
    steps: int
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
    processes: Processes = Processes(),  # noqa: B008 (frozen)
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
    per_epoch = epoch_steps(train_set, recipe.batch)
    steps = recipe.steps or max(1, round((recipe.epochs or 0) * per_epoch))
    warmup = recipe.optim.warmup(per_epoch)
    if warmup > steps:
        progress.note(f"warning: the warm-up of {warmup} steps is longer than the training of {steps}")
    eval_every = recipe.eval_every or per_epoch
    save_every = recipe.save_every or eval_every

    runtimes.seed(rng.torch_seed(recipe.seed, Stream.INIT))
    if trained and not found:
        model, notes = checkpoint.start_from(trained, recipe.model, len(classes), recipe.data.res)
        for note in [f"starting from {trained.origin}", *notes]:
            progress.note(note)
    else:
        model = recipe.model.build(len(classes), recipe.data.res)
    counts = np.bincount(train_set.labels, minlength=len(classes)).tolist()
    balance = told(train_set, recipe.data.sampling, recipe.data.repeat_threshold) + recipe.objective.notes(counts)
    for note in (*train_set.notes, *val_set.notes, *balance):
        progress.note(note)
    module = runtime.prepare(recipe.objective.build(model, counts))
    engine = Engine(module, processes, recipe.runtime.shard, recipe.runtime.exact, runtime.device)
    optimizer = optim.build(recipe.optim, module)
    average = optim.Average(module, recipe.optim.ema) if recipe.optim.ema else None
    position = checkpoint.resume(found, module, optimizer, average) if found else Position()
    run.rewind_log(position.log_bytes)

    environment = runtime.describe() | {"data": fingerprint(train_set), "val": fingerprint(val_set)}
    _compare(environment, earlier, progress)
    run.write("env.json", json.dumps(environment, indent=1))
    predictor = TorchPredictor(module.model, classes, recipe.data.preprocessing, runtime, origin=str(run.path))
    held_out = Kept(
        partial(
            eval_batches,
            recipe.data.preprocessing,
            val_set,
            batch=len(share),
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
                batch=len(share),
                on_batch=stop.check if processes.count == 1 else None,
                processes=processes,
                batches=held_out(),
            )
            if position.best_score is None or scores.top1 > position.best_score:
                position.best_score, position.best_step = scores.top1, position.step
                save_model("best")
        position.scored_step = position.step
        run.log(step=position.step, val_loss=scores.loss, val_top1=scores.top1, val_top5=scores.top5)
        progress.scored(position.step, scores.loss, scores.top1, best=position.best_step == position.step)

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
        state, here = checkpoint.training_state(module, optimizer, average), replace(position)

        def write() -> None:
            checkpoint.save_training(run.checkpoints, here, state, recipe, classes)
            checkpoint.prune(run.checkpoints, recipe.keep_last, recipe.keep_every)

        if processes.first:
            saver.begin(write)

    def save_model(name: str) -> None:
        state, step = whole(module.model.state_dict()), position.step
        if processes.first:
            saver.begin(lambda: checkpoint.save_model(run.path / name, state, recipe, classes, step))

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
    rigid = bool(recipe.runtime.exact) or (processes.count > 1 and recipe.runtime.shard == "fsdp")
    micro_batch = MicroBatch(_at_a_time(recipe, position, processes), position, processes, rigid, progress.note)

    def seed(part: int) -> None:
        """Let the model's chance in a part of this process's share follow from the step and the part's place."""
        first = processes.rank * -(-len(share) // micro_batch.size)
        runtimes.seed(rng.torch_seed(recipe.seed, Stream.MODEL, position.step, first + part))

    def learn(
        images: Tensor, targets: Tensor, lr: Number, share_of_new: Number
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """One update of the weights and their average: the objective's scalars, the gradient's norm, is it finite."""
        means: dict[str, Tensor] = {}
        for attempt in micro_batch.attempts():
            with attempt:
                losses, means = {}, {}  # a failed attempt's losses hold what its backward pass needed
                if attempt.again:
                    module.zero_grad()
                for index, part in enumerate(parts := _micro_batches(images, targets, micro_batch.size)):
                    if index or attempt.again:
                        seed(index)
                    weight = len(part["images"]) / len(share)
                    with engine.part(last=attempt.final and index == len(parts) - 1):
                        with runtime.autocast():
                            losses = engine.forward(part)
                        (losses["loss"] * weight).backward()
                    for name, value in losses.items():
                        means[name] = means.get(name, 0.0) + value.detach() * weight
        norm = optim.clip(module, recipe.optim.clip)
        finite = norm.isfinite()
        optim.update(optimizer, lr, finite)
        if average:
            average.update(share_of_new, finite)
        return means, plain(norm), plain(finite)

    recorded = runtime.recorded(learn)
    with (
        Stop() as stop,
        Saver() as saver,
        tracking(recipe.track if processes.first else (), run.path, position.step, recipe.model_dump()) as run.track,
        profiled(run.path / "profile", profile * processes.first, runtime.device, progress.note) as profile_step,
        micro_batch.errors(),
        processes.errors(lambda: f"after step {position.step}"),
        progress.training(position.step, steps, recipe.batch),
    ):
        meter = Meter(position, processes)
        module.train()
        while True:
            stop.signal = processes.largest(stop.signal or 0) or None
            if _due(position.step, eval_every, steps) and position.scored_step < position.step:
                with suppress(Stopped):  # the checkpoint then says that this score is still owed
                    evaluate()
                    saved = min(saved, position.step - 1)  # a checkpoint that owes this score is written again
            if saved < position.step and (position.step == 0 or stop.signal or _due(position.step, save_every, steps)):
                save()
                saved = position.step
            if stop.signal or position.step == steps:
                break
            saver.check()

            step, asked = position.step, time.monotonic()
            batch = next(batches)
            meter.wait(time.monotonic() - asked)
            meter.replaced(batch.pop("bad", {}))
            images = normalise(batch["images"], recipe.data)
            targets = one_hot(put(batch["labels"], runtime.device), len(classes))
            chance = rng.generator(recipe.seed, Stream.MIX, step)
            images, targets = mix_share(images, targets, len(share), recipe.data.augment, chance)

            lr = optim.learning_rate(recipe.optim, step, steps, warmup)
            seed(0)
            update = recorded if micro_batch.size == recipe.batch else learn
            losses, norm, finite = update(images, targets, lr, average.share(step) if average else 0.0)
            meter.add(step, len(share), losses, norm, finite)
            position.step = step + 1

            profile_step()
            progress.step(position.step)
            if position.step % recipe.log_every == 0 or position.step == steps:
                settle()
                values = meter.read()
                run.log(step=position.step, epoch=round(position.step / per_epoch, 4), lr=lr, **values)
                if "loss" in values:
                    progress.log(position.step, lr=lr, **values)

        if not stop.signal:
            with _averaged(average):
                save_model("last")

    if processes.first:
        draw_results(run.metrics_file, run.path / "results.png", title=run.path.name)
    processes.all(None)  # torchrun would end the first, still writing, half a minute after another has left
    return Outcome(
        run=run.path,
        step=position.step,
        steps=steps,
        best_score=position.best_score,
        best_step=position.best_step,
        bad_images=len(position.bad_images),
        skipped=position.skipped,
        balance=balance,
        seconds=time.monotonic() - begin,
        signal=stop.signal,
        first=processes.first,
    )


def _due(step: int, every: int, steps: int) -> bool:
    return step > 0 and (step % every == 0 or step == steps)


def _at_a_time(recipe: Recipe, position: Position, processes: Processes) -> int:
    """Images that go through the model at a time, as the recipe says, or as memory held them before."""
    if recipe.runtime.exact:
        return exact_size(recipe.runtime.exact, recipe.batch, processes)
    size = position.micro_batch or recipe.runtime.micro_batch or recipe.batch
    return min(size, len(processes.share(recipe.batch)))


def _micro_batches(images: Tensor, targets: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Parts of a batch that fit into memory."""
    pairs = zip(images.split(size), targets.split(size), strict=True)
    return [{"images": images, "targets": targets} for images, targets in pairs]


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
    if not earlier:
        return
    for key in ("data", "val"):
        if environment[key] != earlier[key]:
            raise CheckpointError(
                f"the {'training' if key == 'data' else 'validation'} images are not those that the run began with",
                "restore them, or start a new run from its weights: vit finetune --ckpt RUN",
            )
    changed = [f"{key} {earlier[key]} -> {value}" for key, value in environment.items() if earlier.get(key) != value]
    if changed:
        progress.note(f"warning: resuming is right but not to the bit: {', '.join(changed)}")
