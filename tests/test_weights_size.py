"""Full size: loading takes hardly more memory than the file, in every container. `-s` shows the table."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from vitcli.model import ViTConfig
from vitcli.weights import Foreign, google

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak of memory"),
]

LOAD = """
import json, re, sys, time
from pathlib import Path
import torch
from vitcli import checkpoint
from vitcli.model import vit
from vitcli.weights import _files

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before, begin = peak(), time.monotonic()
checkpoint.load(Path(sys.argv[1]))
print(json.dumps([time.monotonic() - begin, before, peak()]))
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
    """What loading took in a fresh process: seconds, and MiB of resident memory, before and at most."""

    seconds: float
    before: float
    peak: float


def measure(path: Path) -> Load:
    ended = subprocess.run([sys.executable, "-c", LOAD, path], stdout=subprocess.PIPE, text=True, check=True)
    return Load(*json.loads(ended.stdout))


@pytest.mark.parametrize("size", ["Ti/16", "B/16", "L/16", "H/14"])
def test_memory_of_loading(tmp_path, size):
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
            f"\n{size:5} {kind:12} {file:6.0f} MiB: loaded in {load.seconds:5.1f} s; peak {load.peak:5.0f} MiB = "
            f"{load.before:.0f} with torch imported + {load.peak - load.before:5.0f}; 1.5 x file + 500 MB is "
            f"{1.5 * file + 500e6 / 2**20:5.0f}",
            end="",
        )
        assert load.peak - load.before < 1.5 * file + 500e6 / 2**20
