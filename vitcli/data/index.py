"""What a large data set holds, kept on disk: arrays that are mapped into memory, so that processes share them.

A listing of 14 million files costs minutes and gigabytes as Python's strings; kept here it costs neither again. The
folder is $VITCLI_CACHE, else $XDG_CACHE_HOME/vitcli, else ~/.cache/vitcli; it may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vitcli import storage
from vitcli.errors import DataError, StorageError

LARGE = 100_000  # entries from which on an index is kept on disk: fewer are found again as fast as they are loaded
FACTS = "facts.json"


class Index:
    """Named arrays, and facts about them that JSON can hold. One that is on disk goes to other processes as its place.

    Its arrays may be written to; the disk never changes (copy on write).
    """

    def __init__(self, arrays: dict[str, np.ndarray], facts: dict[str, Any], place: Path | None = None):
        self.arrays, self.facts, self.place = arrays, facts, place

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __reduce__(self) -> tuple[Any, ...]:
        if self.place is None:
            return Index, (self.arrays, self.facts)
        return _same, (self.place, self.facts)

    def names(self, index: int) -> str:
        """The text of an entry, of those that `block` made."""
        ends = self.arrays["name_ends"]
        start = int(ends[index - 1]) if index else 0
        return os.fsdecode(self.arrays["names"][start : int(ends[index])].tobytes())


def block(names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of an index that hold a text for each entry: all bytes in one, and where each text ends."""
    joined, ends = bytearray(), array("q")
    for name in names:
        joined += os.fsencode(name)
        ends.append(len(joined))
    return {"names": np.frombuffer(joined, dtype=np.uint8), "name_ends": np.array(ends, dtype=np.int64)}


def kept(
    key: Any, worth: Callable[[Index], bool], current: Callable[[Index], bool], build: Callable[[], Index]
) -> Index:
    """The index of `key` (any JSON): as found on disk if it is `current`, else built, and kept if it is `worth` it.

    Processes that want the same one wait for the first. Where the disk refuses, it is built anew each time.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    place = folder() / "index" / digest
    with _alone(place):
        found = _read(place)
        if found and current(found):
            return found
        built = build()
        if not (worth(built) and current(built)):
            return built
        try:
            storage.write_folder(place, lambda into: _write(into, built))
        except StorageError:
            return built
        return _read(place) or built


def folder() -> Path:
    """Where indexes and fetched shards are kept."""
    if chosen := os.environ.get("VITCLI_CACHE"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "vitcli"


def _read(place: Path) -> Index | None:
    try:
        facts = json.loads((place / FACTS).read_bytes())
        arrays = {name: np.load(place / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in facts["arrays"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Index(arrays, facts, place)


def _same(place: Path, facts: dict[str, Any]) -> Index:
    """The index that another process opened there."""
    found = _read(place)
    if not found or found.facts != facts:
        raise DataError(f"the index {place} changed while it was in use", "start again")
    return found


def _write(into: Path, index: Index) -> None:
    for name, values in index.arrays.items():
        np.save(into / f"{name}.npy", values, allow_pickle=False)
    (into / FACTS).write_text(json.dumps(index.facts | {"arrays": list(index.arrays)}))


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
