"""Too little memory halves the micro-batch; the batch, the step and the images stay as they are."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from command import TINY, Vit, sets
from safetensors.torch import load_file

from vitcli.objectives.classify import Classify

STILL = ("model.dropout=0", "model.drop_path=0")
RUN = [*TINY, "steps=6", "log_every=2", "eval_every=3", "save_every=3"]


@pytest.fixture
def vit(capsys, monkeypatch):
    return Vit(capsys, monkeypatch)


@pytest.fixture
def small(monkeypatch):
    """A device that computes at most so many images at a time, from the so-manieth part of training on."""
    losses, seen = Classify.losses, []

    def small(most: int, after: int = 0) -> list[int]:
        def limited(self, module, batch):
            found = losses(self, module, batch)
            if module.training:
                seen.append(len(batch["images"]))
                if len(seen) > after and seen[-1] > most:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return found

        monkeypatch.setattr(Classify, "losses", limited)
        return seen

    return small


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_half_as_many_images_at_a_time_train_the_same_and_are_remembered(vit, small, tmp_path):
    assert vit("pretrain", "quickstart", *sets(*RUN, *STILL), "--run", tmp_path / "whole").code == 0
    seen = small(8, after=2)
    said = vit("pretrain", "quickstart", *sets(*RUN, *STILL), "--run", tmp_path / "run")
    assert said.code == 0, said.err
    assert seen == [32, 32, 32, 16] + [8] * 16
    assert "32 images at a time do not fit into memory, going on with 16" in said.err
    assert "16 images at a time do not fit into memory, going on with 8" in said.err
    for found, expected in zip(rows(tmp_path / "run"), rows(tmp_path / "whole"), strict=True):
        assert found["step"] == expected["step"]
        for key in expected.keys() & {"lr", "loss", "grad_norm", "val_loss"}:
            assert found[key] == pytest.approx(expected[key], rel=1e-5)
    ends = [load_file(tmp_path / name / "last/model.safetensors") for name in ("run", "whole")]
    for name, tensor in ends[1].items():
        torch.testing.assert_close(ends[0][name], tensor, rtol=1e-4, atol=1e-5)

    newest = tmp_path / "run/checkpoints/step_00000006"
    assert json.loads((newest / "state.json").read_text())["micro_batch"] == 8
    before = (newest / "training.safetensors").read_bytes()
    shutil.rmtree(newest)
    seen.clear()
    assert vit("pretrain", "--resume", tmp_path / "run").code == 0
    assert seen == [8] * 12
    assert (newest / "training.safetensors").read_bytes() == before


def test_where_one_image_is_too_many_the_sizes_tried_are_said(vit, small, tmp_path):
    small(0)
    said = vit("pretrain", "quickstart", *sets(*RUN), "--run", tmp_path / "run")
    assert said.code == 6
    assert "not even one image at a time fits into memory (tried 32, 16, 8, 4, 2, 1)" in said.err
    assert "hint: take a smaller model" in said.err


def test_exact_parts_are_not_halved(vit, small, tmp_path):
    small(4)
    said = vit("pretrain", "quickstart", *sets(*RUN, "runtime.exact=4"), "--run", tmp_path / "run")
    assert said.code == 6
    assert "8 images at a time do not fit into memory: CUDA out of memory" in said.err


LIMITED = """
import resource, sys
from vitcli import cli
from vitcli.commands import launch

def limited(*args):
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
    return fit(*args)

megabytes = int(sys.argv.pop(1))
fit, launch.fit = launch.fit, limited
cli.main()
"""


@pytest.mark.slow
def test_a_real_limit_on_memory(tmp_path):
    """What the backward pass needs of 512 images of 257 tokens is more than 800 MB."""
    settings = sets(*TINY[:1], *TINY[3:], "model.patch=1", "data.res=16", "batch=512", "steps=1")
    command = [sys.executable, "-c", LIMITED, "800", "pretrain", "quickstart", *settings, "--run", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "512 images at a time do not fit into memory, going on with 256" in done.stderr
