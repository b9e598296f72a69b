"""Begin a run in a new folder, or continue one in its own; in one process or in several."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vitcli import checkpoint, processes, recipe_files, trackers
from vitcli import recipe as recipes
from vitcli import run as runs
from vitcli.checkpoint import Trained
from vitcli.commands.console import err, nowhere, tell
from vitcli.errors import CheckpointError
from vitcli.processes import Processes
from vitcli.recipe import Recipe
from vitcli.report.progress import Progress
from vitcli.run import Run
from vitcli.train import Outcome, fit


def begin(
    recipe: Recipe,
    name: str,
    folder: Path | None,
    ckpt: Path | None = None,
    trained: Trained | None = None,
    profile: int = 0,
) -> Outcome:
    """Train in a new run folder, from scratch or from `trained`, which `ckpt` holds; `name` is the recipe's.

    So many updates are to `profile`.

    Where processes are started again after one was lost, the run that they had begun is continued.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")

    def create() -> Run:
        trackers.require(recipe.track)
        run = runs.create(Path(name).stem, folder)
        run.write("recipe.yaml", recipe_files.text(name))
        if ckpt:
            run.write("start.json", json.dumps({"ckpt": str(ckpt.resolve())}))
        if launch:
            run.write("launch.txt", launch)
        run.write("recipe.resolved.yaml", recipes.dump(recipe))
        tell(f"run folder {run.path}")
        return run

    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if again and (begun := runs.launched(launch, folder, Path(name).stem)):
        return resume(begun, recipe_of(begun), profile)
    with processes.start(recipe.runtime.timeout) as several, _shared(several, create) as run:
        return fit(recipe, run, _progress(run), trained, several, profile)


def recipe_of(folder: Path) -> Recipe:
    """The recipe of an old run folder."""
    resolved = folder / "recipe.resolved.yaml"
    if not resolved.is_file():
        raise CheckpointError(
            f"{folder} is not a run folder: it has no {resolved.name}", "--resume takes a folder under runs/"
        )
    return recipes.load(resolved)


def resume(folder: Path, recipe: Recipe, profile: int = 0) -> Outcome:
    """Train on in an old run folder; one that was killed before its first checkpoint starts again as it began."""
    start = folder / "start.json"

    def reopen() -> Run:
        trackers.require(recipe.track)
        return Run(folder)

    with processes.start(recipe.runtime.timeout) as several, _shared(several, reopen) as run:
        fresh = not any(run.checkpoints.iterdir())
        if fresh and (folder / "last").exists():
            raise CheckpointError(
                f"{folder} is finished, and its checkpoints are deleted", f"train on: vit finetune --ckpt {folder}"
            )
        trained = checkpoint.load(Path(json.loads(start.read_text())["ckpt"])) if fresh and start.exists() else None
        return fit(recipe, run, _progress(run), trained, several, profile)


@contextmanager
def _shared(several: Processes, make: Callable[[], Run]) -> Iterator[Run]:
    """The run folder that the first process opens; the others follow it."""
    own: list[Run] = []

    def path() -> Path:
        own.append(make())
        return own[0].path

    place = several.of_first(path)
    with own[0] if own else Run.follow(place) as run:
        yield run


def _progress(run: Run) -> Progress:
    return Progress(nowhere() if run.silent else err, Path(os.devnull) if run.silent else run.path / "train.log")
