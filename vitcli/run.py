"""A run folder: its name, its lock, its log of metrics.

recipe.yaml  recipe.resolved.yaml  env.json  metrics.jsonl  results.png
checkpoints/step_00012000/  best/  last/  export/
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from vitcli import storage
from vitcli.errors import CheckpointError, LockedError, StorageError

RUNS = Path("runs")
# What a run folder holds before its first checkpoint.
BEGINNING = ("recipe.yaml", "recipe.resolved.yaml", "start.json", "launch.txt", "env.json", "train.log", "track.txt")


class Run:
    """A run folder that this process owns until it leaves the `with`. Raises LockedError if another one does."""

    def __init__(self, path: Path):
        self.path = path
        self.silent = False
        self.track: Callable[[dict[str, Any]], None] = lambda row: None
        self._lock: TextIO | None = (path / "run.lock").open("a+")
        if owner := _owner(self._lock):
            self._lock.close()
            raise LockedError(f"{path} is in use by {owner}", "wait for it, or choose another folder with --run")
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        self.checkpoints.mkdir(exist_ok=True)
        storage.sweep(path)
        storage.sweep(self.checkpoints)

    @classmethod
    def follow(cls, path: Path) -> Run:
        """A run folder that another process owns, for one that trains with it: it reads, and writes nothing."""
        run = cls.__new__(cls)
        run.path, run.silent, run._lock = path, True, None
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints of the steps are."""
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line: training's progress and each evaluation."""
        return self.path / "metrics.jsonl"

    def write(self, name: str, text: str) -> None:
        """Write a small file of the run folder, whole or not at all."""
        if self.silent:
            return
        storage.write_file(self.path / name, text.encode())

    def environment(self) -> dict[str, Any]:
        """What the run's numbers depend on besides its recipe, as written when it began; {} for a new run."""
        file = self.path / "env.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def log(self, **values: Any) -> None:
        """Append a line to metrics.jsonl, and hand it to `track`."""
        if self.silent:
            return
        try:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.metrics_file}: {error.strerror}") from error
        self.track(values)

    def log_size(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    def rewind_log(self, size: int) -> None:
        """Forget the lines after `size` bytes: the steps that a resumed run takes again."""
        if self.metrics_file.exists() and not self.silent:
            os.truncate(self.metrics_file, min(size, self.log_size()))


def _owner(lock: TextIO) -> str | None:
    """Who owns the run; None if this process does from now on.

    An owner has the lock a moment before it says so, and one who only asks has it for a moment and says nothing. Until
    then the file names nobody, or an owner that has ended.
    """
    owner = ""
    for _ in range(100):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except OSError:
            lock.seek(0)
            owner = lock.read().strip()
        if owner and not _ended(owner):
            break
        time.sleep(0.01)
    return owner or "another process"


def _ended(owner: str) -> bool:
    """Whether an owner that a lock names was a process of this machine, and is no more."""
    named = re.fullmatch(r"process (\d+) on (.+)", owner)
    if not named or named[2] != socket.gethostname():
        return False
    try:
        os.kill(int(named[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        pass
    return False


def create(name: str, path: Path | None = None) -> Run:
    """A new run folder: `path`, or runs/NAME, runs/NAME-2, …

    One that is there already must be empty, or left by a run that ended before it had begun.
    """
    for folder in [path] if path else _names(name):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not _is_unused(folder):
                continue
        except OSError as error:
            raise StorageError(f"cannot make the run folder {folder}: {error.strerror}") from error
        try:
            run = Run(folder)
        except LockedError:
            if path:
                raise
            continue
        for name in BEGINNING:
            (folder / name).unlink(missing_ok=True)
        return run
    raise CheckpointError(f"{path} exists already", f"continue it with --resume {path}, or choose another --run")


def _is_unused(folder: Path) -> bool:
    names = {file.name.removeprefix(".tmp-") for file in folder.iterdir()} if folder.is_dir() else {""}
    return names <= {*BEGINNING, "run.lock", "checkpoints"} and not any((folder / "checkpoints").glob("*"))


def launched(launch: str, path: Path | None, name: str) -> Path | None:
    """The folder of the run that this launch began, if it came so far: the newest, since torchrun calls all "none"."""
    found = None
    for folder in [path] if path else _names(name):
        if not folder.is_dir():
            break
        mark = folder / "launch.txt"
        if mark.is_file() and mark.read_text() == launch:
            found = folder
    return found


def _names(name: str) -> Iterator[Path]:
    yield RUNS / name
    for number in range(2, 10_000):
        yield RUNS / f"{name}-{number}"


def newest_finished() -> Path:
    """The run under runs/ that finished last."""
    finished = [marker.parent for marker in RUNS.glob("*/last")]
    if not finished:
        raise CheckpointError(
            f"no finished run under {RUNS}/ and no --ckpt given",
            "give --ckpt PATH, or train one: vit pretrain quickstart",
        )
    return max(finished, key=lambda path: (path / "last").stat().st_mtime_ns)
