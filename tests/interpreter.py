"""Triton's interpreter, which runs our kernels without a GPU. It must be chosen before Triton is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

interpreted = pytest.mark.skipif(
    not hasattr(torch._library.triton, "_is_interpreted_triton_kernel"), reason="this torch wants kernels compiled"
)


def run(script):
    """Run a program, which may import what lies here, and prints "equal" if it ends well."""
    here = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("equal\n", "")
