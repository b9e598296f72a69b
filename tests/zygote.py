"""Commands in processes forked from one that has loaded everything: in milliseconds, so that many can be killed.

`python zygote.py` is that process. It takes requests as JSON lines: what to run, in which folder, with which of
`faults`' functions called first; or which process to wait for.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from command import TINY, Said, sets

LOADED = (
    "matplotlib.backends.backend_agg",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.distributed.tensor",
    "vitcli.commands.export",
    "vitcli.commands.launch",
    "vitcli.weights.huggingface",
)
# A run that saves four times, and how it goes on.
RECIPE = [
    "pretrain",
    "quickstart",
    *sets(*TINY, "steps=6", "eval_every=3", "save_every=2", "keep_last=2", "log_every=1"),
    "--run",
    "run",
]
RESUME = ["pretrain", "--resume", "run"]


class Zygote:
    """`begin` starts a command, `finish` waits for it; a call does both."""

    def __enter__(self) -> "Zygote":
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def __call__(self, cwd: Path, *words: object, fault: tuple[Any, ...] = ()) -> Said:
        return self.finish(cwd, self.begin(cwd, *words, fault=fault))

    def begin(self, cwd: Path, *words: object, fault: tuple[Any, ...] = ()) -> int:
        """The process id of `vit WORDS` in a folder, once `faults.NAME(*rest)` has been called in it."""
        return self._ask({"words": list(map(str, words)), "cwd": str(cwd), "fault": fault})

    def finish(self, cwd: Path, pid: int) -> Said:
        """How a command ended; its exit code is -9 if it was killed."""
        code = self._ask({"wait": pid})
        out, err = (cwd / f"{pid}.{name}" for name in ("out", "err"))
        said = Said(code, out.read_text(), err.read_text()) if out.exists() else Said(code, "", "")
        assert "Traceback" not in said.err, said.err
        return said

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def serve() -> None:
    for name in LOADED:
        import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            command(**request)
        print(pid, flush=True)


def command(words: list[str], cwd: str, fault: list[Any]) -> None:
    """Become a command, which ends with this server if a test leaves it behind."""
    import faults

    from vitcli import cli

    code, parent_death = 1, 1
    ctypes.CDLL(None).prctl(parent_death, signal.SIGKILL)
    try:
        os.chdir(cwd)
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{os.getpid()}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["vit", *words]
        if fault:
            getattr(faults, fault[0])(*fault[1:])
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
