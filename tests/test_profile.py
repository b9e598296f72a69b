"""`--profile N` records N updates of a run and changes nothing of it."""

import json

import pytest
from command import TINY, Vit, sets

RUN = ["quickstart", *sets(*TINY, "steps=8", "log_every=8", "eval_every=8")]


@pytest.fixture
def vit(capsys, monkeypatch):
    return Vit(capsys, monkeypatch)


def test_a_trace_and_the_slowest_kernels(vit, tmp_path):
    said = vit("pretrain", *RUN, "--run", tmp_path / "run", "--profile", 2)
    assert said.code == 0, said.err
    profile = tmp_path / "run/profile"
    events = json.loads((profile / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step#Adam") for event in events) == 2
    table = (profile / "kernels.txt").read_text()
    assert "Self CPU time total" in table
    assert "aten::" in table
    assert any(event.get("name") == "aten::addmm" for event in events)  # a busy machine may have slower ones
    assert table in said.err
    assert "2 updates profiled" in said.err


def test_a_profile_changes_nothing_and_may_be_cut_short_by_the_end(vit, tmp_path):
    said = vit("pretrain", *RUN, "--run", tmp_path / "run", "--profile", 100)
    assert said.code == 0, said.err
    assert "3 updates profiled" in said.err
    assert vit("pretrain", *RUN, "--run", tmp_path / "other").code == 0
    ends = [(tmp_path / name / "last/model.safetensors").read_bytes() for name in ("run", "other")]
    assert ends[0] == ends[1]
    said = vit("pretrain", "--resume", tmp_path / "run", "--profile", 6)
    assert said.code == 0, said.err
    assert "warning: nothing was profiled: --profile 6 begins after 5 updates" in said.err
