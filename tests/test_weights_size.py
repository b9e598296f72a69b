"""Full size: loading takes hardly more memory than the file, in every container. `-s` shows the table."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from vitcli.model import ViTConfig
from vitcli.weights import Foreign, google

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells how memory is shared"),
]

LOAD = """
import json, re, resource, sys, time
from pathlib import Path
import torch
from vitcli import checkpoint
from vitcli.model import vit
from vitcli.weights import _files
def processor():
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(who.ru_utime + who.ru_stime for who in both)
begin, before = time.monotonic(), processor()
if len(sys.argv) > 1:
    checkpoint.load(Path(sys.argv[1]))
seconds, used = time.monotonic() - begin, processor() - before
print(json.dumps([seconds, used, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024]))
"""
CONTAINERS = {
    ".npz": (".npz", google.write),
    ".safetensors": (".safetensors", lambda foreign, path: save_file(foreign.state, path)),
    ".pth": (".pth", lambda foreign, path: torch.save(foreign.state, path)),
    ".bin of 2019": (
        ".bin",
        lambda foreign, path: torch.save(foreign.state, path, _use_new_zipfile_serialization=False),
    ),
}


class Load(NamedTuple):
    """What loading took: wall and processor seconds, and MiB of peak memory.

    `own` and `child` are of one process (resident pages, shared ones too), and not at the same time. `peak` is of both
    at one time: all of the first's pages, and of the second's those that it shares with no other, as it does torch's
    libraries. A page mapped from a file counts as any other.
    """

    seconds: float
    processor: float
    own: float
    child: float
    peak: float


def measure(*path: Path) -> Load:
    """Load in a fresh process."""
    child = peak = 0.0
    with subprocess.Popen([sys.executable, "-c", LOAD, *path], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for part in children(process.pid):
                child = max(child, pages(part, "Rss"))
                peak = max(peak, pages(process.pid, "Rss") + pages(part, "Private_.*"))
            time.sleep(0.02)
        assert process.returncode == 0
        assert process.stdout
        seconds, processor, own = json.loads(process.stdout.read())
    return Load(seconds, processor, own, child, max(own, peak))


def children(process: int) -> list[int]:
    """Running children that read PyTorch files; torch starts others when it is imported."""
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [int(child) for child in found if "_pth.py" in Path(f"/proc/{child}/cmdline").read_text()]
    except OSError:
        return []


def pages(process: int, kind: str) -> float:
    """MiB; 0 for a process that has gone."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(map(int, re.findall(rf"^{kind}:\s+(\d+)", rollup, re.M))) / 1024


@pytest.fixture(scope="module")
def torchs() -> float:
    """MiB of one process that has loaded torch and no weights."""
    return measure().own


@pytest.mark.parametrize("size", ["Ti/16", "B/16", "L/16", "H/14"])
def test_memory_of_loading(tmp_path, torchs, size):
    torch.manual_seed(0)
    config = ViTConfig.parse({"variant": size})
    model = config.build(1000, (224, 224))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    foreign = Foreign("google", config, model.state_dict(), 1000, (224, 224), {"res": 224, "mean": 0.5, "std": 0.5})
    for kind, (suffix, write) in CONTAINERS.items():
        path = tmp_path / f"model{suffix}"
        write(foreign, path)
        file = path.stat().st_size / 2**20
        load = measure(path)
        path.unlink()
        print(
            f"\n{size:5} {kind:12} {file:6.0f} MiB: loaded in {load.seconds:5.1f} s ({load.processor:4.1f} s of a "
            f"processor); peak {load.peak:5.0f} MiB = torch's {torchs:.0f} + {load.peak - torchs:5.0f}, allowed "
            f"{1.5 * file + 500:5.0f}; the first process {load.own:5.0f}, the second {load.child:5.0f}",
            end="",
        )
        assert load.peak - torchs < 1.5 * file + 500
