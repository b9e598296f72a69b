"""How the tests use the commands: in this process where nothing is killed, as a process of its own where it is."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

from vitcli import cli

# A ViT with every source of chance on, small enough for a step in milliseconds.
TINY = (
    "model={width: 32, depth: 2, mlp_dim: 64, heads: 2, patch: 2, dropout: 0.1, drop_path: 0.1}",
    "data.augment={crop: random_crop, pad: 1, flip: true, mixup: 0.4, cutmix: 0.5, randaugment: {n: 1, m: 5}}",
    "optim={lr: 2.0e-3, warmup_steps: 5, weight_decay: 0.05, ema: 0.9}",
    "runtime={device: cpu, precision: fp32, threads: 1}",
    "batch=32",
)


def sets(*values: str) -> list[str]:
    """`--set` for each value."""
    return [word for value in values for word in ("--set", value)]


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Vit:
    """`vit(...)` runs a command in this process, through the console script's own function."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *args: object) -> Said:
        # The import hook that checks shapes would make torch.export take the free batch for a constant.
        self.monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        self.monkeypatch.setattr(sys, "argv", ["vit", *map(str, args)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = self.capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)


def process(*args: object, cwd: Path) -> subprocess.Popen[str]:
    """A command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "vitcli", *map(str, args)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(started: subprocess.Popen[str]) -> Said:
    """Wait for a process."""
    out, err = started.communicate(timeout=600)
    return Said(started.returncode, out, err)


def gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(happens: Callable[[], object], seconds: float = 300) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def content(run: Path) -> dict[str, object]:
    """Everything that must be equal: weights, moments, average, position, and the log without its timings."""
    last = max((run / "checkpoints").iterdir())
    files = [last / name for name in ("model.safetensors", "training.safetensors")]
    files += [run / place / "model.safetensors" for place in ("best", "last")]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("images_per_second", None), row.pop("waiting", None)
    position = json.loads((last / "state.json").read_text())
    position.pop("log_bytes")
    return {str(file.relative_to(run)): file.read_bytes() for file in files} | {"log": rows, "position": position}
