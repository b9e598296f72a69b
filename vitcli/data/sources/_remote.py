"""Shards of any URL that fsspec knows, fetched whole into a folder of bounded size that all processes share."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vitcli.data import index
from vitcli.errors import DataError, StorageError

ASKED_AT_A_TIME = 16  # files whose size is asked for
STALE = 3600.0  # seconds after which a fetch that wrote nothing is dead
PATIENCE, PAUSE = 60.0, 1.0  # seconds that a server may fail, and between tries, doubled after each
SILENT = 60.0  # seconds after which a server that sends nothing has failed
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": '"vitcli[remote]"', "https": '"vitcli[remote]"'}
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what goes wrong here, not there

for _name in ("fsspec", "s3fs", "gcsfs"):
    logging.getLogger(_name).addHandler(logging.NullHandler())  # what they log, DataError says

Result = TypeVar("Result")


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
            listed: dict[str, dict[str, Any]] = files.glob(f"{base}/{names}", detail=True)
        else:
            listed = {f"{base}/{name}": {} for name in names}

        def shard(name: str) -> Shard:
            known = listed[name].get("size") is not None  # a web server's listing has none
            return _shard(files, name, listed[name] if known else files.info(name))

        with ThreadPoolExecutor(ASKED_AT_A_TIME) as pool:
            return list(pool.map(shard, sorted(listed)))


def texts(urls: Iterable[str]) -> dict[str, bytes]:
    """The content of those of these small files that are there, by URL."""
    places = [(*connect(url), url) for url in urls]
    if not places:
        return {}

    def ask() -> dict[str, bytes]:
        with _told(places[0][2]):
            found: Any = places[0][0].cat([path for _, path, _ in places], on_error="return")
        contents = {}
        for _, path, url in places:
            with _told(url):
                content = found.get(path)
                if isinstance(content, bytes):
                    contents[url] = content
                elif isinstance(content, Exception) and not _is_missing(content):
                    raise content
        return contents

    return _patiently(ask)


def connect(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Raises DataError."""
    if "::" in url:
        raise DataError(f"{url}: chained URLs are not read", "name the files themselves")
    with _told(url):
        import fsspec.core

        files, base = fsspec.core.url_to_fs(url, **_options(url))
    return files, base.rstrip("/")


def _options(url: str) -> dict[str, Any]:
    """Patience with large shards, none with silent servers: aiohttp's own limit is five minutes for whatever it is."""
    scheme = url.split(":")[0]
    if scheme not in ("http", "https", "gs"):
        return {}
    import aiohttp  # pyright: ignore[reportMissingImports] (of the extra)

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT, sock_read=SILENT)
    return {"requests_timeout": timeout} if scheme == "gs" else {"client_kwargs": {"timeout": timeout}}


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
                with suppress(FileNotFoundError):  # another process has fetched it
                    return _open(place)
                self._make_room(folder, shard.size)
                return _fetch(shard, place, digest)
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


def _fetch(shard: Shard, place: Path, digest: str | None) -> int:
    temporary = place.with_name(f".tmp-{place.name}")

    def fetch() -> int:
        files, path = connect(shard.name)
        with _told(shard.name):
            files.get_file(path, str(temporary))
        _check(shard, temporary, digest)
        descriptor = _open(temporary)  # before others see the copy, and may remove it
        temporary.replace(place)
        return descriptor

    try:
        return _patiently(fetch)
    finally:
        temporary.unlink(missing_ok=True)


def _patiently(ask: Callable[[], Result]) -> Result:
    """What a server answers. One that fails is asked again for a while; then raises DataError."""
    failing, pause = 0.0, PAUSE
    while True:
        try:
            return ask()
        except DataError as error:
            failing = failing or time.monotonic()
            if _is_missing(error.__cause__) or time.monotonic() - failing >= PATIENCE:
                raise
        time.sleep(pause)
        pause *= 2


def _is_missing(error: BaseException | None) -> bool:
    """Whether a file is not there. Of a store that may not be listed, one that may not be read may be none."""
    return isinstance(error, FileNotFoundError | PermissionError) or "forbidden" in str(error).lower()


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
        if not isinstance(error, Exception) or isinstance(error, DataError):
            return
        if isinstance(error, OSError) and error.errno in DISK:
            return
        reason, hint = " ".join(str(error).split()) or type(error).__name__, "check the network and your credentials"
        if isinstance(error, ImportError):
            package = PACKAGES.get(self.url.split(":")[0], '"vitcli[remote]", and what is named')
            hint = f"pip install {package}"
        elif isinstance(error, FileNotFoundError):
            reason, hint = f"not found ({error.__cause__ or reason})", "check data.source.path"
        elif isinstance(error, ValueError):
            hint = "check data.source.path"
        raise DataError(f"{self.url} cannot be read: {reason}", hint) from error
