"""Faults from outside, at random and everywhere: nothing is lost, nothing hangs, and each ends as design.md says.

Each kind has a few cases that always run, and the whole of it in test_torture.py.
"""

import os
import random
import shutil
import signal

import pytest
from command import TINY, content, gone, sets, until
from zygote import RECIPE, RESUME

from vitcli import checkpoint
from vitcli.data import workers


def goes_on(zygote, folder, undisturbed):
    """Resume a run that was killed, or begin it again if nothing was kept; it comes to the same bits."""
    run = folder / "run"
    _, passed = checkpoint.newest(run / "checkpoints")
    assert passed == []  # what has its name is whole
    begun = (run / "recipe.resolved.yaml").exists()
    if not begun:
        shutil.rmtree(run, ignore_errors=True)
    said = zygote(folder, *(RESUME if begun else RECIPE))
    assert said.code == 0, said.err
    assert content(run) == content(undisturbed / "run")
    assert [left.name for left in run.rglob(".*")] == []


def changes(undisturbed):
    return int((undisturbed / "changes.txt").read_text())


def killed_at(zygote, folder, undisturbed, *fault):
    folder.mkdir()
    assert zygote(folder, *RECIPE, fault=fault).code == -signal.SIGKILL
    goes_on(zygote, folder, undisturbed)
    shutil.rmtree(folder)


def test_killed_at_any_change_that_a_save_makes(zygote, undisturbed, tmp_path):
    last = changes(undisturbed)
    assert last > 100
    for number in random.Random(0).sample(range(1, last + 1), 6):
        killed_at(zygote, tmp_path / "case", undisturbed, "kill_before_change", number)


def test_killed_in_the_midst_of_a_file(zygote, undisturbed, tmp_path):
    for number, share in ((2, 0.0), (4, 0.5)):
        killed_at(zygote, tmp_path / "case", undisturbed, "tear_file", number, share)


def test_killed_while_it_resumes(zygote, undisturbed, tmp_path):
    for number in (1, 30):
        (tmp_path / str(number)).mkdir()
        assert zygote(tmp_path / str(number), *RECIPE, fault=("kill_before_change", 60)).code == -9
        assert zygote(tmp_path / str(number), *RESUME, fault=("kill_before_change", number)).code == -9
        goes_on(zygote, tmp_path / str(number), undisturbed)


@pytest.mark.parametrize("number", [1, 2])
def test_a_score_that_a_signal_cut_short_is_owed(zygote, undisturbed, tmp_path, number):
    """The second evaluation is that of the last step."""
    said = zygote(tmp_path, *RECIPE, fault=("signal_while_scoring", number))
    assert said.code == 143
    assert f"after step {3 * number} of 6, which is saved" in said.err
    goes_on(zygote, tmp_path, undisturbed)


def damage(run, chance):
    """Spoil the newest checkpoint in one way; says which."""
    newest = max((run / "checkpoints").iterdir())
    file = chance.choice(sorted(newest.iterdir()))
    data = bytearray(file.read_bytes())
    kind = chance.choice(("flip", "cut", "grow", "delete", "empty", "swap"))
    if kind == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[chance.randrange(len(data)) :]
    elif kind == "grow":
        data += b"\0"
    elif kind == "empty":
        data.clear()
    if kind == "delete":
        file.unlink()
    elif kind == "swap":
        other = chance.choice([path for path in newest.iterdir() if path != file])
        (newest / "other").mkdir()
        moved = newest / "other" / other.name
        file.rename(moved)
        other.rename(file)
        moved.rename(other)
        moved.parent.rmdir()
    else:
        file.write_bytes(data)
    return f"{kind} {file.name}"


def damaged(undisturbed, folder, seed):
    """Whether a damaged newest checkpoint is passed over and the one before is taken."""
    shutil.copytree(undisturbed / "run/checkpoints", folder / "checkpoints")
    before = sorted((folder / "checkpoints").iterdir())[-2]
    what = damage(folder, random.Random(seed))
    found, passed = checkpoint.newest(folder / "checkpoints")
    shutil.rmtree(folder / "checkpoints")
    assert found == before, what
    assert len(passed) == 1, what


def test_a_damaged_newest_checkpoint_is_always_noticed(undisturbed, tmp_path):
    for seed in range(60):
        damaged(undisturbed, tmp_path, seed)


def filled(zygote, folder, undisturbed, kilobytes):
    """A disk of that size is full in the midst of a run; once there is space the run goes on. Says how it ended."""
    place = folder / "disk"
    place.mkdir(parents=True)
    said = zygote(folder, *RECIPE, fault=("full_then_freed", kilobytes, str(place)))
    if "mount" in said.err or "unshare" in said.err:
        pytest.skip(f"no small disk can be made here: {said.err.splitlines()[-1]}")
    assert said.code == 0, said.err
    code = int((folder / "first.txt").read_text())
    assert (code == 74) == ("error: cannot " in said.err), said.err
    assert code in (0, 74), said.err
    assert content(folder / "run") == content(undisturbed / "run")
    shutil.rmtree(folder)
    return code


def test_a_full_disk(zygote, undisturbed, tmp_path):
    codes = [filled(zygote, tmp_path / "case", undisturbed, size) for size in (8, 100, 400, 900, 20_000)]
    assert codes == [74, 74, 74, 74, 0]


def test_two_processes_that_start_together_in_one_folder(zygote, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    for left in ("last", "checkpoints/step_00000006"):
        shutil.rmtree(tmp_path / "run" / left)
    pids = [zygote.begin(tmp_path, *RESUME, fault=("held", 5)) for _ in range(3)]
    until(lambda: sum(map(gone, pids)) >= 2)
    (tmp_path / "go").touch()
    ended = [zygote.finish(tmp_path, pid) for pid in pids]
    assert sorted(said.code for said in ended) == [0, 7, 7]
    winner = pids[[said.code for said in ended].index(0)]
    assert all(f"run is in use by process {winner} on" in said.err for said in ended if said.code == 7)
    assert content(tmp_path / "run") == content(undisturbed / "run")


def children(pid):
    """The processes that load for a command: those that its server has forked."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid:
                found.append(int(entry))
    return sorted(found)


def lost_loader(zygote, folder, photos, number):
    """Loader processes get a signal in the midst of training, one after the other until it ends: what the command
    says, and that nothing is left."""
    source = f"data.source={{name: folder, path: {photos}}}"
    length = "steps=100000", "eval_every=100000", "log_every=1"
    words = [*sets(*TINY, source, "data.classes=2", "data.workers=2", "batch=16", *length), "--run", "run"]
    pid = zygote.begin(folder, "pretrain", "quickstart", *words, fault=("hasty_loader", 5))
    log = folder / "run/metrics.jsonl"
    until(log.exists)
    seen = set()
    for lost in range(1 if number == signal.SIGSTOP else workers.SPARE + 1):
        loaders = [grandchild for child in children(pid) for grandchild in children(child)]
        assert len(loaders) == 2
        seen |= set(loaders)
        if lost == 0 and number == signal.SIGSTOP:
            os.kill(pid, signal.SIGUSR1)
        size = log.stat().st_size
        until(lambda size=size: log.stat().st_size > size + 1000)
        os.kill(loaders[0], number)
        if number == signal.SIGKILL and lost < workers.SPARE:
            until(
                lambda lost=lost: (
                    (folder / "run/train.log").read_text().count("1 loader processes were killed and replaced")
                    == lost + 1
                )
            )
    said = zygote.finish(folder, pid)
    assert said.code == 3, said.err
    for left in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(left, 0)
    return said.err


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "loader processes were killed"),
        (signal.SIGSTOP, "the loader processes gave nothing for 5 seconds"),
    ],
    ids=["killed", "hung"],
)
def test_lost_loader_processes_end_training_with_a_line(zygote, photos, tmp_path, number, message):
    assert message in lost_loader(zygote, tmp_path, photos, number)
