"""What run folders tell of their runs, whoever is writing in them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitcli import checkpoint, storage, yaml_tree
from vitcli.errors import CheckpointError
from vitcli.run import RUNS, Run
from vitcli.yaml_tree import Place

Row = dict[str, Any]
# What runs are chosen by, in metrics.jsonl and in words: of images of one class each, and of several.
MEASURES = {"val_top1": "top-1", "val_map": "mAP"}


class Past(NamedTuple):
    """A run at a glance. `steps` is None where the recipe does not tell and training has not begun.

    `best` is the best `measure`, top-1 or mAP; both are None before the first evaluation. `changed` is seconds since
    1970.
    """

    path: Path
    step: int
    steps: int | None
    best: float | None
    measure: str | None
    state: Literal["running", "finished", "stopped"]
    size: int
    changed: float


def find(parent: Path = RUNS) -> list[Path]:
    """The run folders under `parent`, the one that changed last at the end."""
    return sorted((file.parent for file in parent.glob("*/recipe.resolved.yaml")), key=_changed)


def check(paths: list[Path]) -> None:
    """Raise CheckpointError for the first path that is no run folder."""
    for path in paths:
        if not (path / "recipe.resolved.yaml").is_file():
            raise CheckpointError(f"{path} is not a run folder", "`vit runs` lists those under runs/")


def summary(path: Path) -> Past:
    """A run folder at a glance."""
    logged, finished = rows(path), (path / "last").is_dir()
    step = max((row["step"] for row in logged), default=0)
    key = measure(logged)
    return Past(
        path=path,
        step=step,
        steps=step if finished else _steps(path),
        best=max((row[key] for row in logged if key in row), default=None),
        measure=MEASURES.get(key),
        state="running" if _locked(path) else "finished" if finished else "stopped",
        size=size(path),
        changed=_changed(path),
    )


def measure(logged: list[Row]) -> str:
    """The key in a log of what the run is chosen by, "" before the first evaluation."""
    return next((key for row in logged for key in MEASURES if key in row), "")


def rows(path: Path) -> list[Row]:
    """The lines of a run's metrics.jsonl; one that is being written is left out."""
    file = path / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def recipe(path: Path) -> dict[str, Any]:
    """A run's recipe by dotted keys, with every default."""
    file = path / "recipe.resolved.yaml"
    return _flat(yaml_tree.read(file.read_text(), Place(str(file), 1, 1)).data)


def size(path: Path) -> int:
    """Bytes of all files below a folder."""
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(status.st_size for status in _there(files))


def spare(path: Path) -> list[Path]:
    """Checkpoints that nothing needs: of a finished run all, of another all but the newest whole one.

    best/ and last/ are none of them, nor those that the recipe keeps (`keep_every`).
    """
    every = recipe(path)["keep_every"]
    steps = checkpoint.saved(path / "checkpoints")
    found = [folder for folder, step in steps.items() if not every or step % every]
    if (path / "last").is_dir():
        return found
    needed, _ = checkpoint.newest(path / "checkpoints")
    return [folder for folder in found if needed and folder != needed]


def prune(path: Path) -> None:
    """Delete what a run can spare. Raises LockedError if it is running."""
    with Run(path):
        for folder in spare(path):
            storage.remove_folder(folder)


def _steps(path: Path) -> int | None:
    environment = path / "env.json"
    begun = json.loads(environment.read_text()) if environment.exists() else {}
    return begun.get("steps") or recipe(path)["steps"]


def _locked(path: Path) -> bool:
    lock = path / "run.lock"
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _changed(path: Path) -> float:
    return max((status.st_mtime for status in _there([path, *path.glob("*")])), default=0.0)


def _there(files: Iterable[Path]) -> Iterator[os.stat_result]:
    """Of those that have not gone meanwhile."""
    for file in files:
        with suppress(FileNotFoundError):
            yield file.lstat()


def _flat(tree: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {".".join(path): tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, (*path, name)).items()}
