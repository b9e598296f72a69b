"""A run that is killed goes on to the same bits as one that is left alone."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from command import TINY, content, finish, process, sets, until

from vitcli import run, storage
from vitcli.errors import StorageError

STEPS = 60
RECIPE = ["quickstart", *sets(*TINY, f"steps={STEPS}", "eval_every=20", "save_every=5", "log_every=4")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    said = finish(process("pretrain", *RECIPE, "--run", "run", cwd=folder))
    assert said.code == 0, said.err
    return folder / "run"


def words(folder: Path) -> list[str]:
    """The command, or its resumption where the run has begun."""
    begun = (folder / "run" / "recipe.resolved.yaml").exists()
    return ["pretrain", *(["--resume", "run"] if begun else [*RECIPE, "--run", "run"])]


def killed(folder: Path, moments: list[float]) -> None:
    """Kill -9 at these times after a start that has come as far as training, then let it finish."""
    for moment in moments:
        started = process(*words(folder), cwd=folder)
        log = folder / "run" / "train.log"
        before = log.stat().st_size if log.exists() else 0
        while started.poll() is None and not (log.exists() and log.stat().st_size > before):
            time.sleep(0.01)
        time.sleep(moment)
        started.kill()
        started.communicate()
    said = finish(process(*words(folder), cwd=folder))
    assert said.code == 0, said.err


def test_killed_at_random_moments(undisturbed, tmp_path):
    chance = random.Random(0)
    killed(tmp_path, [chance.uniform(0, 1.2) for _ in range(2)])
    assert content(tmp_path / "run") == content(undisturbed)


@pytest.mark.slow
def test_killed_twenty_times(undisturbed, tmp_path):
    chance = random.Random(1)
    killed(tmp_path, [chance.uniform(0, 0.6) for _ in range(20)])
    assert content(tmp_path / "run") == content(undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_says_how_to_go_on(zygote, undisturbed, tmp_path, number, code):
    started = zygote.begin(tmp_path, *words(tmp_path), fault=("held", 9))
    until((tmp_path / "run" / "metrics.jsonl").exists)
    os.kill(started, number)
    (tmp_path / "go").touch()
    said = zygote.finish(tmp_path, started)
    assert said.code == code
    assert "hint: vit pretrain --resume run" in said.err
    steps = [int(folder.name[5:]) for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert f"after step {max(steps)} of {STEPS}" in said.err
    assert max(steps) < STEPS
    assert not (tmp_path / "run" / "last").exists()
    assert zygote(tmp_path, *words(tmp_path)).code == 0
    assert content(tmp_path / "run") == content(undisturbed)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "manifest.json",
        pytest.param("training.safetensors", marks=pytest.mark.slow),
        pytest.param("state.json", marks=pytest.mark.slow),
    ],
)
def test_damaged_newest_checkpoint_is_passed_over(zygote, undisturbed, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "last")
    newest = run / "checkpoints" / f"step_{STEPS:08d}" / name
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    said = zygote(tmp_path, *words(tmp_path))
    assert said.code == 0
    assert f"step_{STEPS:08d}" in said.err
    assert "warning" in said.err
    assert content(run) == content(undisturbed)


def test_a_copy_beside_the_checkpoints_is_none_of_them(zygote, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "last")
    newest = run / "checkpoints" / f"step_{STEPS:08d}"
    copy = newest.rename(newest.with_name(f"{newest.name} copy"))
    said = zygote(tmp_path, *words(tmp_path))
    assert said.code == 0, said.err
    shutil.rmtree(copy)
    assert content(run) == content(undisturbed)


def test_no_whole_checkpoint_left(zygote, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for folder in (run / "checkpoints").iterdir():
        (folder / "model.safetensors").write_bytes(b"")
    said = zygote(tmp_path, *words(tmp_path))
    assert said.code == 4
    assert "no checkpoint of this run is whole" in said.err


def test_one_process_a_run_folder(zygote, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    for left in ("checkpoints", "last"):
        shutil.rmtree(tmp_path / "run" / left)
    first = zygote.begin(tmp_path, *words(tmp_path), fault=("held", 0))
    until((tmp_path / "run" / "checkpoints").exists)
    second = zygote(tmp_path, *words(tmp_path))
    (tmp_path / "go").touch()
    assert second.code == 7
    assert f"process {first}" in second.err
    assert zygote.finish(tmp_path, first).code == 0


def test_other_data_is_refused(zygote, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    environment = tmp_path / "run" / "env.json"
    environment.write_text(json.dumps(json.loads(environment.read_text()) | {"data": "other"}))
    said = zygote(tmp_path, *words(tmp_path))
    assert said.code == 4
    assert "not those that the run began with" in said.err


def test_a_fine_tuning_killed_before_its_first_checkpoint_starts_from_its_weights_again(zygote, undisturbed, tmp_path):
    tuning = sets(
        "data.source=digits", "batch=64", "steps=4", "optim.warmup_steps=1", "runtime.threads=1", "log_every=1"
    )
    command = ["finetune", "--ckpt", undisturbed, "--res", "8", *tuning, *sets("runtime.precision=fp32")]
    assert zygote(tmp_path, *command, "--run", "whole").code == 0
    assert zygote(tmp_path, *command, "--run", "run").code == 0
    for left in ("checkpoints", "best", "last"):
        shutil.rmtree(tmp_path / "run" / left)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    said = zygote(tmp_path, *words(tmp_path))
    assert said.code == 0, said.err
    assert "starting from" in said.err
    ended = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert ended[0] == ended[1]


def test_a_mistake_of_the_program_is_not_told_as_a_full_disk(tmp_path):
    with pytest.raises(KeyError):
        storage.write_folder(tmp_path / "folder", lambda place: {}["absent"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["step_00000004", "best"])
def test_a_replacement_that_is_cut_off_is_taken_back(tmp_path, monkeypatch, name):
    def write(content):
        storage.write_folder(tmp_path / name, lambda place: (place / "file").write_text(content))

    def rename(self, target):
        if self.name.startswith(".tmp-"):
            raise KeyboardInterrupt
        return os.rename(self, target)

    write("old")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    assert not (tmp_path / name).exists()
    (tmp_path / ".tmp-env.json").write_text("{")
    storage.sweep(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    storage.verify(tmp_path / name)
    assert (tmp_path / name / "file").read_text() == "old"


def test_a_run_that_was_killed_in_its_first_file_may_begin_again(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".tmp-recipe.yaml").write_text("mod")
    with run.create("name", tmp_path):
        assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "run.lock"]


def test_a_run_that_never_began_leaves_its_name_to_the_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with run.create("name") as first:
        first.write("recipe.yaml", "left over")
        with run.create("name") as second:  # while the first may still begin
            assert second.path.name == "name-2"
    with run.create("name") as third:
        assert third.path.name == "name"
        assert not (third.path / "recipe.yaml").exists()
        (third.checkpoints / "step_00000000").mkdir()
    with run.create("name") as fourth:
        assert fourth.path.name == "name-2"


def test_a_folder_that_cannot_be_replaced_keeps_its_name(tmp_path, monkeypatch):
    def write(content):
        storage.write_folder(tmp_path / "folder", lambda place: (place / "file").write_text(content))

    def rename(self, target):
        if self.name == ".tmp-folder":
            raise OSError(errno.EIO, "the disk is gone")
        return os.rename(self, target)

    write("old")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StorageError, match="the disk is gone"):
        write("new")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder/file").read_text() == "old"
