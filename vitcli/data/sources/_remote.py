"""Shards of any URL that fsspec knows, fetched whole into a folder of bounded size that all processes share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from vitcli.data import index
from vitcli.errors import DataError, StorageError

ASKED_AT_A_TIME = 16  # files whose size is asked for
STALE = 3600.0  # seconds after which a fetch that wrote nothing is dead
TRIES, PAUSE = 4, 1.0  # of a fetch; seconds, doubled after each


class Shard(NamedTuple):
    """A tar: its path or URL, its size in bytes, and what changes when its content does."""

    name: str
    size: int
    version: str


def find(root: str, names: Iterable[str] | str) -> list[Shard]:
    """The shards below a URL: those of the given names, or those that match a pattern."""
    files, base = connect(root)
    with _told(root):
        if isinstance(names, str):
            found: list[str] = files.glob(f"{base}/{names}")
        else:
            found = [f"{base}/{name}" for name in names]
        with ThreadPoolExecutor(ASKED_AT_A_TIME) as pool:
            return [
                _shard(files, *pair) for pair in zip(sorted(found), pool.map(files.info, sorted(found)), strict=True)
            ]


def texts(urls: Iterable[str]) -> dict[str, bytes]:
    """The content of those of these small files that are there, by URL."""
    places = [(*connect(url), url) for url in urls]
    if not places:
        return {}
    files, url = places[0][0], places[0][2]
    with _told(url):
        found: Any = files.cat([path for _, path, _ in places], on_error="omit")
    return {url: found[path] for _, path, url in places if path in found}


def connect(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Raises DataError."""
    if "::" in url:
        raise DataError(f"{url}: chained URLs are not read", "name the files themselves")
    with _told(url):
        import fsspec.core

        files, base = fsspec.core.url_to_fs(url)
    return files, base.rstrip("/")


class Cache:
    """Fetched shards. No more than `limit` bytes are kept, besides what other processes fetch at the moment.

    Those not read for longest go first.
    """

    def __init__(self, limit: int):
        self.limit = limit

    def open(self, shard: Shard, digest: str | None = None) -> int:
        """A descriptor of the shard's copy, fetched if it is not there. Close it.

        Raises DataError if it cannot be fetched, or if its SHA-256 is not `digest`.
        """
        folder = index.folder() / "shards"
        place = folder / f"{hashlib.sha256(repr(shard).encode()).hexdigest()[:32]}.tar"
        with suppress(FileNotFoundError):
            return _open(place)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with place.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    return _open(place)  # another process has fetched it
                self._make_room(folder, shard.size)
                temporary = place.with_name(f".tmp-{place.name}")
                _fetch(shard, temporary, digest)
                descriptor = _open(temporary)  # once it has its name, others may delete it to make room
                temporary.replace(place)
                return descriptor
        except OSError as error:
            hint = "free space, or keep less: --set data.source.cache_gb=10"
            raise StorageError(f"cannot keep {shard.name} in {folder}: {error.strerror or error}", hint) from error

    def _make_room(self, folder: Path, size: int) -> None:
        kept = []
        for file in folder.glob("*.tar"):
            try:
                status = file.stat()
            except FileNotFoundError:  # another process made room, too
                continue
            if file.name.startswith(".tmp-") and time.time() - status.st_mtime < STALE:
                continue
            kept.append((status.st_mtime_ns, status.st_size, file))
        held = sum(size for _, size, _ in kept)
        for _, length, file in sorted(kept):
            if held + size <= self.limit:
                return
            file.unlink(missing_ok=True)
            held -= length


def _open(place: Path) -> int:
    descriptor, now = os.open(place, os.O_RDONLY), time.time_ns()
    os.utime(descriptor, ns=(now, now))  # a file system's own clock is too coarse to tell reads apart
    return descriptor


def _fetch(shard: Shard, into: Path, digest: str | None) -> None:
    for attempt in range(TRIES):
        try:
            files, path = connect(shard.name)
            with _told(shard.name):
                files.get_file(path, str(into))
            _check(shard, into, digest)
            return
        except DataError:
            into.unlink(missing_ok=True)
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE * 2**attempt)


def _check(shard: Shard, file: Path, digest: str | None) -> None:
    size = file.stat().st_size
    if size != shard.size:
        raise DataError(f"{shard.name}: {size} of {shard.size} bytes came", "is it being changed?")
    if digest:
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                raise DataError(f"{shard.name}: its SHA-256 is not the one in its list", "pack or upload it again")


def _shard(files: Any, name: str, facts: dict[str, Any]) -> Shard:
    url, size = files.unstrip_protocol(name), facts.get("size")
    if size is None:
        raise DataError(f"{url}: its size is unknown", "the server must tell the length of a file")
    known = (facts.get(key) for key in ("ETag", "etag", "LastModified", "Last-Modified", "mtime", "updated"))
    return Shard(url, size, str(next((value for value in known if value is not None), "")))


class _told:  # noqa: N801 (a context manager that reads as a word)
    """What a file system raises, as a DataError."""

    def __init__(self, url: str):
        self.url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, DataError):
            return
        if isinstance(error, ImportError):
            raise DataError(f"{self.url} cannot be read: {error}", 'pip install "vitcli[remote]"') from error
        if isinstance(error, Exception):
            reason = str(error) or type(error).__name__
            raise DataError(f"{self.url} cannot be read: {reason}", "check data.source.path") from error
