"""A PyTorch file begins to be read before this process loads torch, and no process is left behind."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitcli.model import ViTConfig

# Runs a command; says of each process that reads a PyTorch file whether torch was loaded when it began, and whether
# it has ended when the command has.
WATCHED = """
import sys
from vitcli import cli
from vitcli.weights import _reader
start, began = _reader.start, []
def watched(path):
    process = start(path)
    began.append(("torch" in sys.modules, process))
    return process
_reader.start = watched
try:
    cli.main()
finally:
    print("began", [(loaded, process.poll() is not None) for loaded, process in began], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("startup")
    config = ViTConfig.parse({"width": 192, "depth": 1, "mlp_dim": 64, "heads": 3, "patch": 16})
    torch.save(config.build(1000, (32, 32)).state_dict(), folder / "model.pth")
    (folder / "model.pt").write_bytes(b"<html>")
    Image.new("RGB", (40, 40), "red").save(folder / "red.png")
    return folder


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("predict", "red.png", "--ckpt", "model.pth", "--device", "cpu"), 0, ""),
        (("predict", "red.png", "--ckpt", "model.pt"), 4, "it is a web page"),
    ],
)
def test_the_file_is_read_while_torch_is_loaded(folder, words, code, message):
    done = subprocess.run([sys.executable, "-c", WATCHED, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stderr.splitlines()[-1] == "began [(False, True)]"
