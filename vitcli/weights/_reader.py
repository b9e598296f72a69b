"""The process that reads a PyTorch file (`_pth.py`): it loads torch too, and may do so while this one does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXPANSION_LIMIT = 4, 256 << 20  # a file may take this times its size, and this many bytes more, in memory
ENDINGS = (".pth", ".pt", ".bin")

_begun: dict[Path, subprocess.Popen[bytes]] = {}


@contextmanager
def ahead(path: Path) -> Iterator[None]:
    """Begin to read a file that has a PyTorch file's name, for whoever reads it within the block.

    Once torch is loaded here there is nothing to gain, and nothing is begun. A process that nobody asks for is ended.
    """
    mine = "torch" not in sys.modules and path not in _begun and path.suffix in ENDINGS and path.is_file()
    if mine:
        _begun[path] = start(path)
    try:
        yield
    finally:
        if mine and (process := _begun.pop(path, None)):
            with process:
                process.kill()


def take(path: Path) -> subprocess.Popen[bytes]:
    """The process that reads a file: the one begun ahead, or a new one."""
    return _begun.pop(path, None) or start(path)


def start(path: Path) -> subprocess.Popen[bytes]:
    """A process that sends what `_receive` in `_files.py` takes."""
    # -P keeps this folder, whose files have names of packages, off the child's module path.
    command = [sys.executable, "-P", str(Path(__file__).with_name("_pth.py")), str(path), str(limit(path))]
    return subprocess.Popen(  # noqa: S603 - our own reader, no shell
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def limit(path: Path) -> int:
    """Bytes of memory that reading a file may take."""
    factor, more = EXPANSION_LIMIT
    return factor * path.stat().st_size + more
