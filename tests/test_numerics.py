"""Gradients that are not numbers: the update is skipped and told; too many in a row take the weights back."""

import json
import signal

import pytest
import torch
from command import TINY, Vit, content, sets

from vitcli.data import mix, preprocess

RUN = [*TINY, "steps=12", "log_every=4", "eval_every=6", "keep_last=9", "save_every=1"]


@pytest.fixture
def vit(capsys, monkeypatch):
    return Vit(capsys, monkeypatch)


@pytest.fixture
def spoil(monkeypatch):
    """Puts NaN into one pixel of the training batches of some steps, and sends SIGTERM in the step `stop`."""

    def spoil(*bad: int, stop: int | None = None) -> None:
        seen = iter(range(1000))

        def normalise(images, preprocessing):
            images = preprocess.normalise(images, preprocessing)
            step = next(seen)
            if step in bad:
                images[0, 0, 0, 0] = torch.nan
            if step == stop:
                signal.raise_signal(signal.SIGTERM)
            return images

        monkeypatch.setattr(mix, "normalise", normalise)

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


OFTEN = [*TINY, "steps=12", "log_every=3", "eval_every=6", "keep_last=9", "save_every=4"]


def test_too_many_in_a_row_go_back_to_weights_from_before(vit, spoil, tmp_path):
    spoil(5, 6, 7, 8)  # update 4 is the only one between the last good checkpoint and these
    said = vit("pretrain", "quickstart", *sets(*OFTEN), "--run", tmp_path / "run", "--json")
    assert said.code == 0, said.err
    assert said.json["skipped"] == 4
    assert "skipped too often: back to the weights of step 4" in said.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["rolled_back_to"] for row in rows if row["step"] == 9 and "rolled_back_to" in row] == [4]

    spoil(4, 5, 6, 7, 8)  # as if that one had been skipped, too
    said = vit("pretrain", "quickstart", *sets(*OFTEN, "log_every=12"), "--run", tmp_path / "patient", "--json")
    assert said.json["skipped"] == 5
    run, patient = content(tmp_path / "run"), content(tmp_path / "patient")
    assert run["last/model.safetensors"] == patient["last/model.safetensors"]


def test_a_run_that_was_interrupted_goes_back_to_the_same_place(vit, spoil, tmp_path, monkeypatch):
    settings = sets(*OFTEN, "keep_last=2")
    spoil(5, 6, 7, 8)
    assert vit("pretrain", "quickstart", *settings, "--run", tmp_path / "whole").code == 0
    spoil(5, 6, 7, 8, stop=6)
    assert vit("pretrain", "quickstart", *settings, "--run", tmp_path / "run").code == 143
    assert (tmp_path / "run/checkpoints/step_00000007").is_dir()
    spoil(0, 1)
    said = vit("pretrain", "--resume", tmp_path / "run")
    assert said.code == 0, said.err
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_run_whose_name_looks_like_markup_is_named_in_full(vit, spoil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil(stop=2)
    said = vit("pretrain", "quickstart", *sets(*RUN), "--run", "sweep[seed=1]")
    assert said.code == 143
    assert said.err.startswith("run folder sweep[seed=1]\non cpu in fp32, ")
    assert said.err.endswith("hint: vit pretrain --resume 'sweep[seed=1]'\n")


def test_a_run_that_went_back_in_vain_ends(vit, spoil, tmp_path):
    spoil(*range(2, 100))
    said = vit("pretrain", "quickstart", *sets(*OFTEN, "steps=40"), "--run", tmp_path / "run")
    assert said.code == 5
    assert said.err.count("back to the weights of step") == 3
    assert "was not finite, after going back to an earlier checkpoint 3 times" in said.err
    assert "hint: " in said.err
