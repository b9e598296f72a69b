"""Gradients that are not numbers: the update is skipped and told, and too many in a row end the run."""

import json

import pytest
import torch
from command import TINY, Vit, sets

from vitcli import train
from vitcli.data import preprocess

RUN = [*TINY, "steps=12", "log_every=4", "eval_every=6", "keep_last=9", "save_every=1"]


@pytest.fixture
def vit(capsys, monkeypatch):
    return Vit(capsys, monkeypatch)


@pytest.fixture
def spoil(monkeypatch):
    """Puts NaN into one pixel of the training batches of some steps."""

    def spoil(*bad: int) -> None:
        seen = iter(range(1000))

        def normalise(images, preprocessing):
            images = preprocess.normalise(images, preprocessing)
            if next(seen) in bad:
                images[0, 0, 0, 0] = torch.nan
            return images

        monkeypatch.setattr(train, "normalise", normalise)

    return spoil


def test_a_step_without_a_finite_gradient_is_skipped_and_told(vit, spoil, tmp_path):
    spoil(2, 7, 8)
    said = vit("pretrain", "quickstart", *sets(*RUN), "--run", tmp_path / "run", "--json")
    assert said.code == 0, said.err
    assert said.json["skipped"] == 3
    assert "update 3 skipped" in said.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "skipped" in row] == [3, 8, 9]
    assert all(row["loss"] < 3 and row["grad_norm"] > 0 for row in rows if "loss" in row)


def test_three_in_a_row_end_the_run_with_the_weights_from_before(vit, spoil, tmp_path):
    spoil(5, 6, 7, 8)
    said = vit("pretrain", "quickstart", *sets(*RUN), "--run", tmp_path / "run")
    assert said.code == 5
    assert "the gradient of 3 updates in a row, up to step 7, was NaN or infinite" in said.err
    assert "hint: " in said.err
    kept = sorted(folder.name for folder in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [f"step_{step:08d}" for step in range(8)]
    spoil()
    said = vit("pretrain", "--resume", tmp_path / "run", "--json")
    assert said.code == 0, said.err
    assert said.json["skipped"] == 2
