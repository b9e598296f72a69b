"""The process that reads PyTorch files, forked from one that has loaded torch: in milliseconds, not in seconds."""

import io
import multiprocessing
import os
import subprocess
from contextlib import suppress
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from vitcli.weights import _reader

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "vitcli.weights._pth"])


class Child:
    """Stands in for Popen, of which it has what `_files` and `_reader` use. Memory is limited as in a real one."""

    def __init__(self, command: list[str], **_: Any):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        with theirs:
            self.process = CONTEXT.Process(target=_run, args=(*command[-2:], theirs))
            self.process.start()
        with ours:
            self.stdout = io.BufferedReader(io.FileIO(os.dup(ours.fileno())))

    def kill(self) -> None:
        self.process.kill()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.process.join()
        self.process.close()


class Sandbox:
    """One process for many files, one after another: for fuzzing. A new one follows where it dies or hangs.

    Its memory is limited as for the first of the files.
    """

    def __init__(self) -> None:
        self.process, self.deaths, self.hangs = None, 0, 0

    def __call__(self, command: list[str], **_: Any) -> "Sandbox":
        if self.process is None:
            self.pipe, theirs = CONTEXT.Pipe()
            with theirs:
                self.process = CONTEXT.Process(target=_serve, args=(command[-1], theirs))
                self.process.start()
        try:
            self.pipe.send(command[-2:])
            hangs = not self.pipe.poll(10)
            sent = b"" if hangs else self.pipe.recv_bytes()
        except (EOFError, ConnectionError):
            hangs, sent = False, b""
        if not sent:
            self.hangs += hangs
            self.deaths += not hangs
            self.close()
        self.stdout = io.BufferedReader(io.BytesIO(sent))  # pyright: ignore[reportArgumentType]
        return self

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join()
            self.process.close()
            self.pipe.close()
            self.process = None

    def kill(self) -> None:
        """It goes on with the next file."""

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()


def _run(source: str, limit: str, pipe: Connection) -> None:
    from vitcli.weights import _pth

    _quiet()
    _pth.limit_memory(int(limit))
    with open(pipe.fileno(), "wb", closefd=False) as out:
        _pth.main(source, int(limit), out)


def _serve(limit: str, pipe: Connection) -> None:
    from vitcli.weights import _pth

    _quiet()
    _pth.limit_memory(int(limit))
    with suppress(EOFError):
        while True:
            source, limit = pipe.recv()
            out = io.BytesIO()
            _pth.main(source, int(limit), out)
            pipe.send_bytes(out.getvalue())


def _quiet() -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def install(monkeypatch: Any, popen: Any = Child) -> None:
    """Let `_reader` start forked children from now on."""
    names = {name: getattr(subprocess, name) for name in ("PIPE", "DEVNULL")}
    monkeypatch.setattr(_reader, "subprocess", SimpleNamespace(Popen=popen, **names))
