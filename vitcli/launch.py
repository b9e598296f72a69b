"""Begin a run in a new folder, or continue one in its own."""

from __future__ import annotations

import json
from pathlib import Path

from vitcli import checkpoint, recipe_files
from vitcli import recipe as recipes
from vitcli import run as runs
from vitcli.checkpoint import Trained
from vitcli.console import err
from vitcli.errors import CheckpointError
from vitcli.recipe import Recipe
from vitcli.report.progress import Progress
from vitcli.train import Outcome, fit


def begin(
    recipe: Recipe, name: str, folder: Path | None, ckpt: Path | None = None, trained: Trained | None = None
) -> Outcome:
    """Train in a new run folder, from scratch or from `trained`, which `ckpt` holds; `name` is the recipe's."""
    with runs.create(Path(name).stem, folder) as run:
        run.write("recipe.yaml", recipe_files.text(name))
        if ckpt:
            run.write("start.json", json.dumps({"ckpt": str(ckpt.resolve())}))
        run.write("recipe.resolved.yaml", recipes.dump(recipe))
        err.print(f"run folder {run.path}", highlight=False)
        return fit(recipe, run, Progress(err, run.path / "train.log"), trained)


def resume(folder: Path) -> Outcome:
    """Train on in an old run folder; one that was killed before its first checkpoint starts again as it began."""
    resolved, start = folder / "recipe.resolved.yaml", folder / "start.json"
    if not resolved.is_file():
        raise CheckpointError(
            f"{folder} is not a run folder: it has no {resolved.name}", "--resume takes a folder under runs/"
        )
    recipe = recipes.load(resolved)
    with runs.Run(folder) as run:
        fresh = start.exists() and not any(run.checkpoints.iterdir())
        trained = checkpoint.load(Path(json.loads(start.read_text())["ckpt"])) if fresh else None
        return fit(recipe, run, Progress(err, run.path / "train.log"), trained)
