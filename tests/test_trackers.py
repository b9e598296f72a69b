"""Trackers get the numbers of metrics.jsonl, none is needed, and one that is missing is told before anything begins."""

import json
import shutil
from importlib.util import find_spec

import pytest
from command import TINY, Vit, sets

from vitcli import trackers

RUN = ["quickstart", *sets(*TINY, "steps=6", "log_every=2", "eval_every=3")]
SHOWN = ("loss", "lr", "grad_norm", "val_loss", "val_top1")


@pytest.fixture
def vit(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return Vit(capsys, monkeypatch)


def tracked(vit, tmp_path, name):
    """A run that is resumed from its middle, as its tracker and as its log have it: a curve for each name."""
    if not find_spec(trackers.FOUND[name].PACKAGE):
        pytest.skip(f"{name} is not installed")
    said = vit("pretrain", *RUN, *sets(f"track=[{name}]"), "--run", "run")
    assert said.code == 0, said.err
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    said = vit("pretrain", "--resume", "run")
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    return {key: [(row["step"], pytest.approx(row[key])) for row in rows if key in row] for key in SHOWN}


def test_tensorboard(vit, tmp_path):
    logged = tracked(vit, tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert {key: [(event.step, event.value) for event in events.Scalars(key)] for key in SHOWN} == logged


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own of SQLAlchemy
def test_mlflow(vit, tmp_path):
    logged = tracked(vit, tmp_path, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("vitcli").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    found = {key: {m.step: m.value for m in client.get_metric_history(run.info.run_id, key)} for key in SHOWN}
    assert {key: sorted(curve.items()) for key, curve in found.items()} == logged


def test_wandb_stays_offline_and_goes_on_with_its_run(vit, tmp_path):
    tracked(vit, tmp_path, "wandb")
    begun = [path.name for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(begun) == 2
    assert {name.rsplit("-", 1)[1] for name in begun} == {(tmp_path / "run/track.txt").read_text()}
    files = [path.read_bytes() for path in (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")]
    assert all(b"grad_norm" in file and b"val_top1" in file for file in files)


@pytest.mark.parametrize("name", sorted(trackers.FOUND))
def test_a_missing_package_is_told_before_anything_begins(vit, tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    said = vit("pretrain", *RUN, *sets(f"track=[{name}]"))
    assert said.code == 2
    assert f"error: track: {name} is not installed" in said.err
    assert f'hint: pip install "vitcli[{name}]"' in said.err
    assert not (tmp_path / "runs").exists()


def test_an_unknown_tracker_is_a_mistake_of_the_recipe(vit):
    said = vit("pretrain", *RUN, *sets("track=[tensorbord]"))
    assert said.code == 2
    assert "--set track" in said.err
    assert "tensorboard" in said.err


class Broken:
    PACKAGE = "json"

    @staticmethod
    def begin(run, mark, step, recipe):
        return Broken()

    def log(self, step, values):
        if step > 2:
            raise ConnectionError("the server is gone")

    def close(self):
        raise AssertionError("one that failed is not asked again")


def test_a_tracker_that_fails_does_not_end_training(vit, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.FOUND, "tensorboard", Broken)
    said = vit("pretrain", *RUN, *sets("track=[tensorboard]"), "--run", "run")
    assert said.code == 0, said.err
    assert said.err.count("tensorboard takes no more of this run's numbers") == 1
    assert "the server is gone" in said.err
    assert (tmp_path / "run/last").is_dir()
