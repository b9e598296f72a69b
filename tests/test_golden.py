"""The losses of short runs, written down: what changes them has changed training."""

import json
from pathlib import Path

import pytest
import torch
from command import Vit, sets

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(("2.14.", "2.15.")),
    reason="the numbers are those of torch 2.14 and 2.15: other versions start from others",
)

RUN = ["runtime={device: cpu, precision: fp32, threads: 1}", "steps=30", "log_every=5", "eval_every=30"]
RUN += ["optim.warmup_steps=5", "seed=0"]
# Of training after 5, 10, ... 30 steps, and of validation. One thread or two and with or without AVX differ by 1e-6.
SOFTMAX = [2.301254, 2.267649, 2.164885, 2.159015, 2.060562, 2.048551, 2.036672]
SIGMOID = [3.266910, 3.248481, 3.208773, 3.169891, 3.092002, 3.082473, 2.150080]


def losses(vit: Vit, run: Path, *further: str) -> list[float]:
    """What a run logs: the training loss of every five steps, and at last the validation loss."""
    said = vit("pretrain", "quickstart", *sets(*RUN, *further), "--run", run)
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [5, 10, 15, 20, 25, 30]
    return [row[key] for key in ("loss", "val_loss") for row in rows if key in row]


def test_softmax_with_mixup(capsys, monkeypatch, tmp_path):
    found = losses(Vit(capsys, monkeypatch), tmp_path / "run")
    assert found == pytest.approx(SOFTMAX, rel=1e-4)


# Without MKL torch draws other dropout masks from the same seed.
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the numbers are those of MKL's random bits")
def test_sigmoid_with_dropout_and_an_average(capsys, monkeypatch, tmp_path):
    further = ["objective.loss=sigmoid", "model.dropout=0.1", "model.head_bias=-2.0", "optim.ema=0.9"]
    found = losses(Vit(capsys, monkeypatch), tmp_path / "run", *further)
    assert found == pytest.approx(SIGMOID, rel=1e-4)
