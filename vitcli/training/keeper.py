"""What becomes of the weights between two updates: scored, saved, taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitcli import checkpoint
from vitcli.data.loader import eval_batches
from vitcli.data.resident import Kept, is_small
from vitcli.errors import DataError
from vitcli.inference import TorchPredictor
from vitcli.processes import whole
from vitcli.scores import MultiLabelScores
from vitcli.scoring import score, share_of
from vitcli.training import rollback
from vitcli.training.state import prune, resume, save_training, training_state

if TYPE_CHECKING:
    from vitcli.optim import Average
    from vitcli.report.progress import Progress
    from vitcli.stop import Stop
    from vitcli.training.meter import Meter
    from vitcli.training.saver import Saver
    from vitcli.training.setup import Setup


class Keeper:
    """Several processes call its methods together; the first alone writes."""

    def __init__(self, setup: Setup, meter: Meter, saver: Saver, stop: Stop, progress: Progress):
        self._setup, self._meter, self._saver, self._stop, self._progress = setup, meter, saver, stop, progress
        recipe, runtime, val_set = setup.recipe, setup.runtime, setup.val_set
        self._predictor = TorchPredictor(
            setup.module.model, setup.classes, recipe.data.preprocessing, runtime, origin=str(setup.run.path)
        )
        self._held_out = Kept(
            lambda: eval_batches(
                recipe.data.preprocessing,
                val_set,
                batch=setup.micro_batch.size,
                workers=recipe.data.workers,
                share=share_of(len(val_set), setup.processes)[0],
                neighbours=setup.processes.neighbours,
                device=runtime.device,
            ),
            small=runtime.device.type == "cuda" and is_small(len(val_set), recipe.data.res),
        )

    def evaluate(self) -> None:
        """Score the weights (the average, if there is one) and keep them if they are the best.

        Raises Stopped, after which the score is still owed, DataError and NumericsError.
        """
        setup, position = self._setup, self._setup.position
        with _averaged(setup.average):
            scores = score(
                self._predictor,
                setup.val_set,
                batch=setup.micro_batch.size,
                allow_bad=True,
                on_batch=self._stop.check if setup.processes.count == 1 else None,
                processes=setup.processes,
                batches=self._held_out(),
            )
            if isinstance(scores, MultiLabelScores):
                position.thresholds = list(scores.best_thresholds)
            if position.best_score is None or scores.headline.value > position.best_score:
                position.best_score, position.best_step = scores.headline.value, position.step
                self._save_model("best")
        position.scored_step = position.step
        for bad in scores.bad:
            self._progress.note(f"warning: not scored: {bad}")
        setup.run.log(step=position.step, **scores.logged)
        _, measure, value = scores.headline
        self._progress.scored(position.step, scores.loss, measure, value, best=position.best_step == position.step)

    def settle(self) -> None:
        """Know what became of every update so far. Raises DataError for too many unreadable images."""
        position, allowed, images = self._setup.position, self._setup.recipe.data.bad_images, len(self._setup.train_set)
        for image in self._meter.unreadable():
            self._progress.note(f"replaced an unreadable image: {image}")
        if len(position.bad_images) > allowed * images:
            raise DataError(
                f"{len(position.bad_images)} of {images} images so far cannot be read, more than "
                f"data.bad_images={allowed:g} allows; train.log names them",
                "mend or remove them, or allow more",
            )
        for skipped in self._meter.settle():
            self._setup.run.log(step=skipped + 1, skipped="its gradient was not finite")
            self._progress.note(f"warning: update {skipped + 1} skipped: its gradient was NaN or infinite")

    def save(self) -> None:
        """Write a checkpoint beside training, and clear older ones away."""
        self.settle()
        setup, recipe = self._setup, self._setup.recipe
        setup.position.log_bytes = setup.run.log_size()
        state, here = training_state(setup.module, setup.optimizer, setup.average), replace(setup.position)

        def write() -> None:
            save_training(setup.run.checkpoints, here, state, recipe, setup.classes)
            prune(setup.run.checkpoints, setup.save_every, recipe.keep_last, recipe.keep_every)

        if setup.processes.first:
            self._saver.begin(write)

    def save_last(self) -> None:
        """Write the model that training ends with."""
        with _averaged(self._setup.average):
            self._save_model("last")

    def roll_back(self) -> None:
        """Take the weights of the last good checkpoint; the step, and so the images, go on. Raises NumericsError."""
        setup, position = self._setup, self._setup.position

        def find() -> Path:
            self._saver.wait()
            return rollback.target(setup.run.checkpoints, position, setup.save_every, setup.steps)

        good = resume(setup.processes.of_first(find), setup.module, setup.optimizer, setup.average)
        position.skipped_in_a_row, position.rollbacks = 0, position.rollbacks + 1
        setup.run.log(step=position.step, rolled_back_to=good.step)
        self._progress.note(
            f"warning: skipped too often: back to the weights of step {good.step}, on with other images"
        )

    def _save_model(self, name: str) -> None:
        setup, position = self._setup, self._setup.position
        state, step, thresholds = whole(setup.module.model.state_dict()), position.step, position.thresholds
        folder, recipe, classes = setup.run.path / name, setup.recipe, setup.classes
        if setup.processes.first:
            self._saver.begin(lambda: checkpoint.save_model(folder, state, recipe, classes, step, thresholds))


@contextmanager
def _averaged(average: Average | None) -> Iterator[None]:
    """The averaged weights in place of the live ones."""
    if average:
        average.swap()
    try:
        yield
    finally:
        if average:
            average.swap()
