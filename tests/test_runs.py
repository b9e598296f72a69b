"""`vit runs`: what is there, how runs compare, and checkpoints that nothing needs."""

import fcntl
import json
import os
import shutil
import socket
import time
from types import SimpleNamespace

import pytest
from command import TINY, Vit, sets
from PIL import Image

from vitcli.errors import LockedError
from vitcli.run import Run

RUN = sets(*TINY, "steps=6", "log_every=1", "eval_every=2")


@pytest.fixture
def vit(capsys, monkeypatch):
    return Vit(capsys, monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, patch = tmp_path_factory.mktemp("trained"), pytest.MonkeyPatch()
    patch.chdir(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sys.argv", ["vit", "pretrain", "quickstart", *RUN])
        from vitcli import cli

        with pytest.raises(SystemExit) as ended:
            cli.main()
    patch.undo()
    assert ended.value.code == 0
    return folder / "runs/quickstart"


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """A finished run and one that was stopped at step 4."""
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "other"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    other = tmp_path / "runs/other"
    shutil.rmtree(other / "last")
    shutil.rmtree(other / "checkpoints/step_00000006")
    shutil.copytree(other / "checkpoints/step_00000004", other / "checkpoints/step_00000002")
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = "".join(line for line in lines if json.loads(line)["step"] <= 4)
    (other / "metrics.jsonl").write_text(kept + '{"step": 5, "lo')
    recipe = (other / "recipe.resolved.yaml").read_text()
    (other / "recipe.resolved.yaml").write_text(recipe.replace("lr: 0.002", "lr: 0.004"))
    return tmp_path / "runs"


def names(run):
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


def test_list(vit, runs):
    said = vit("runs", "--json")
    assert said.code == 0, said.err
    found = {run["path"]: run for run in said.json["runs"]}
    assert list(found) == ["runs/quickstart", "runs/other"]
    finished, stopped = found["runs/quickstart"], found["runs/other"]
    assert [finished[key] for key in ("step", "steps", "state")] == [6, 6, "finished"]
    assert [stopped[key] for key in ("step", "steps", "state")] == [4, 6, "stopped"]
    assert 0 < finished["best"] < 1
    assert finished["size"] > sum(file.stat().st_size for file in (runs / "quickstart").rglob("*.safetensors"))
    assert abs(time.time() - stopped["changed"]) < 100
    lines = vit("runs").out.splitlines()
    assert lines[1].startswith(f"runs/other\t4/6\t{stopped['best']:.2%}\tstopped\t")
    with Run(runs / "other"):
        assert [run["state"] for run in vit("runs", "list", "--json").json["runs"]] == ["finished", "running"]


def test_files_that_go_while_they_are_counted(vit, runs, monkeypatch):
    usual = os.walk

    def walk(path):
        for folder, inside, names in usual(path):
            for gone in (name for name in names if name == "metrics.jsonl"):
                os.remove(os.path.join(folder, gone))
            yield folder, inside, names

    monkeypatch.setattr(os, "walk", walk)
    said = vit("runs", "--json")
    assert said.code == 0, said.err
    assert all(run["size"] > 0 for run in said.json["runs"])


def test_no_runs(vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert vit("runs", "--json").json == {"runs": []}


def test_compare(vit, runs):
    said = vit("runs", "compare", "runs/quickstart", "runs/other", "-o", "both.png")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[::3]] == ["loss", "val_loss", "val_top1", "optim.lr:"]
    curves = [line[19:59] for line in lines if line.startswith("  runs/quickstart")]
    assert all({"▁", "█"} <= set(curve) <= set("▁▂▃▄▅▆▇█ ") for curve in curves)
    assert [curve.rstrip() == curve for curve in curves] == [True, True, True]
    stopped = next(line[19:59] for line in lines if line.startswith("  runs/other"))
    assert 20 < len(stopped.rstrip()) < 40
    log = (runs / "quickstart/metrics.jsonl").read_text().splitlines()
    best = max(json.loads(line).get("val_top1", 0) for line in log)
    assert f"best {best:.4f}" in lines[7]
    assert lines[-1] == "optim.lr: 0.002 | 0.004"
    with Image.open("both.png") as picture:
        assert picture.size == (1320, 396)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["compare", "runs/other"], 2, "one run cannot be compared"),
        (["compare", "runs/other", "runs/none"], 4, "runs/none is not a run folder"),
        (["prune", "runs"], 4, "runs is not a run folder"),
    ],
)
def test_mistakes(vit, runs, words, code, message):
    said = vit("runs", *words)
    assert said.code == code
    assert message in said.err
    assert "hint: " in said.err


def test_prune_says_what_would_go_and_asks(vit, runs, monkeypatch):
    doomed = [f"runs/quickstart/checkpoints/step_0000000{step}" for step in (4, 6)]
    doomed.append("runs/other/checkpoints/step_00000002")
    assert vit("runs", "prune", "--dry-run").out.splitlines() == doomed
    monkeypatch.setattr("typer.confirm", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert vit("runs", "prune").code == 130
    assert names(runs / "quickstart") == ["step_00000004", "step_00000006"]


def test_prune_keeps_what_a_run_needs(vit, runs):
    newest = runs / "other/checkpoints/step_00000004/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with Run(runs / "quickstart"):
        said = vit("runs", "prune", "--yes")
        assert said.out == "runs/other/checkpoints/step_00000004\n"
    assert names(runs / "other") == ["step_00000002"]
    assert vit("runs", "prune", "--yes").code == 0
    assert names(runs / "quickstart") == []
    assert vit("eval", "--ckpt", "runs/quickstart", "--json").code == 0
    assert vit("runs", "prune").err == "nothing to delete\n"


def test_a_running_run_is_not_pruned_by_name(vit, runs):
    with Run(runs / "quickstart"):
        said = vit("runs", "prune", "runs/quickstart", "--yes")
    assert said.code == 7
    assert names(runs / "quickstart") == ["step_00000004", "step_00000006"]


NOBODY = f"process {2**22 + 1} on {socket.gethostname()}"  # a larger number than Linux gives


@pytest.mark.parametrize("before", [NOBODY, ""], ids=["the last one's name", "none"])
def test_an_owner_that_has_not_yet_said_so_is_waited_for(runs, monkeypatch, before):
    place = runs / "other/run.lock"
    place.write_text(before)
    monkeypatch.setattr("vitcli.run.time", SimpleNamespace(sleep=lambda _: place.write_text("process 1 on here")))
    with place.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="in use by process 1 on here"):
            Run(runs / "other")


def test_an_owner_that_never_says_so_is_not_waited_for_forever(runs, monkeypatch):
    monkeypatch.setattr("vitcli.run.time", SimpleNamespace(sleep=lambda _: None))
    with (runs / "other/run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="in use by another process"):
            Run(runs / "other")


def test_one_who_only_asks_keeps_nobody_out(runs, monkeypatch):
    place = runs / "other/run.lock"
    place.write_text(NOBODY)
    with place.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        monkeypatch.setattr("vitcli.run.time", SimpleNamespace(sleep=lambda _: fcntl.flock(lock, fcntl.LOCK_UN)))
        with Run(runs / "other"):
            pass


def test_a_finished_run_without_checkpoints_is_not_begun_again(vit, runs):
    assert vit("runs", "prune", "runs/quickstart", "--yes").code == 0
    before = (runs / "quickstart/last/model.safetensors").read_bytes()
    said = vit("pretrain", "--resume", "runs/quickstart")
    assert said.code == 4
    assert "runs/quickstart is finished, and its checkpoints are deleted" in said.err
    assert "hint: train on: vit finetune --ckpt runs/quickstart" in said.err
    assert (runs / "quickstart/last/model.safetensors").read_bytes() == before
