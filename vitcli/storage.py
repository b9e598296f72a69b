"""Folders that exist whole or not at all, and that tell when a byte of them has changed.

A folder is written beside its place, every file synced, sealed by `manifest.json` (size and SHA-256 of each file),
and renamed; so a reader never sees half of one, whenever the writer was killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vitcli.errors import CheckpointError, StorageError

MANIFEST = "manifest.json"


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Make the folder `path` with the files that `write` puts into the folder it is given; replace an older one.

    Raises StorageError; then nothing under the final name has changed.
    """
    from safetensors import SafetensorError

    temporary = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        _seal(temporary)
        _rename(temporary, path)
    except (OSError, SafetensorError) as error:  # either may say that the disk is full
        raise StorageError(f"cannot write {path}: {error}", "free space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder; killed half-way, what is left no longer has its name."""
    doomed = path.with_name(f".del-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Clear away what a killed writer left in `parent`, and take back a replacement that it was in the middle of."""
    for replaced in list(parent.glob(".old-*")):
        place = parent / replaced.name.removeprefix(".old-")
        if place.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(place)
    for left in [*parent.glob(".del-*"), *parent.glob(".tmp-*")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def verify(path: Path) -> None:
    """Hold every file of a sealed folder against its manifest. Raises CheckpointError naming the file."""
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: {MANIFEST} is missing or damaged") from None
    for name, (size, digest) in expected.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != size or _sha256(file) != digest:
            raise CheckpointError(f"{file}: damaged (its SHA-256 is not the one written in {MANIFEST})")


def write_file(path: Path, content: bytes) -> None:
    """Replace one file, whole or not at all. Raises StorageError."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_bytes(content)
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def publish(folder: Path) -> None:
    """Give the files below a folder the mode of any new file: safetensors makes its own readable by one user only."""
    new = folder / ".new"
    new.touch()  # asking for the umask would change it for a moment, for other threads too
    mode = new.stat().st_mode
    new.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _rename(folder: Path, path: Path) -> None:
    """Give a folder its name. One that has it is deleted, or keeps it if this fails."""
    replaced = path.with_name(f".old-{path.name}")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    try:
        folder.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _seal(folder: Path) -> None:
    publish(folder)
    files = sorted(folder.iterdir())
    for file in files:
        _sync(file)
    entries = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "files": entries}, indent=1))
    _sync(manifest)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
