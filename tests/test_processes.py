"""Several processes train one model: they share a batch, agree, and lose nothing when one of them is lost.

Run on CPUs by torchrun's own launcher, as `vit pretrain --gpus` starts them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import TINY, Said, Vit, finish, process, sets, until
from safetensors.torch import load_file
from torch.distributed import TCPStore  # noqa: TID251

from vitcli import processes, run
from vitcli.errors import RecipeError
from vitcli.processes import Processes
from vitcli.training import keeper
from vitcli.training.gradients import exact_size

RUN = [
    "runtime={device: cpu, precision: fp32, threads: 1}",
    "data.augment={mixup: 0.4, cutmix: 0.5}",
    "optim={ema: 0.9, warmup_steps: 2}",
    "batch=32",
    "steps=12",
    "log_every=4",
    "eval_every=6",
    "save_every=6",
]
CHANCE = ["model.dropout=0.1", "model.drop_path=0.1"]
# The command where `--gpus` finds as many as it is asked for.
LAUNCH = "from vitcli import cli, processes; processes.visible = int; cli.main()"


def started(count: int, *args: object, cwd: Path) -> subprocess.Popen[str]:
    """A command in `count` processes. Its output goes to a file: processes that linger must not hold a pipe."""
    with (cwd / f"{time.monotonic_ns()}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, args), "--gpus", str(count)],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            text=True,
        )


def several(count: int, *args: object, cwd: Path) -> int:
    return started(count, *args, cwd=cwd).wait(timeout=600)


def told(folder: Path) -> str:
    """What all processes of all commands in a folder said."""
    return "".join(file.read_text() for file in folder.glob("*.log"))


def alone(*args: object, cwd: Path) -> Said:
    return finish(process(*args, cwd=cwd))


def final(run: Path) -> dict[str, torch.Tensor]:
    """Everything that training would go on from after the last step."""
    folder = run / "checkpoints/step_00000012"
    return load_file(folder / "model.safetensors") | load_file(folder / "training.safetensors")


def assert_same_bits(run: Path, other: Path) -> None:
    found, expected = final(run), final(other)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def curve(run: Path, key: str) -> list[float]:
    return [row[key] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in row]


def test_a_batch_is_shared_equally_or_refused():
    assert [list(Processes(rank, 4).share(8)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(RecipeError, match="batch 10 cannot be shared equally by 4 processes") as caught:
        Processes(0, 4).share(10)
    assert caught.value.hint == "--set batch=8 or 12"


@pytest.mark.parametrize(
    ("parts", "batch", "count", "words"),
    [(6, 32, 1, "not a power of two"), (8, 36, 1, "cannot be cut"), (2, 32, 4, "cannot be shared")],
)
def test_exact_parts_must_fit(parts, batch, count, words):
    assert exact_size(8, 32, Processes(0, 2)) == 4
    with pytest.raises(RecipeError, match=words):
        exact_size(parts, batch, Processes(0, count))


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, "MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "first"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "4"}, "RANK, MASTER_ADDR, MASTER_PORT"),
    ],
    ids=["slurm", "some", "none"],
)
def test_processes_need_a_meeting_place(capsys, monkeypatch, tmp_path, variables, missing):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ | variables)
    said = Vit(capsys, monkeypatch)("pretrain", "quickstart")
    assert said.code == 2
    assert f"4 processes are to train together, but these variables are not set: {missing}\n" in said.err
    assert "export MASTER_ADDR=" in said.err


def test_in_a_batch_job_a_process_of_slurm_is_alone(monkeypatch):
    """Where `srun` did not start it: its script is task 0 of the job's many."""
    monkeypatch.setattr(os, "environ", os.environ | {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    with processes.start(10) as found:
        assert found == Processes()


def test_processes_of_slurm_find_out_who_shares_their_cores(tmp_path):
    """Two as `srun` starts them, on the same core."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    script = "import os; from vitcli import processes\n"
    script += "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    script += "with processes.start(60) as found: print(found)"
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | place | {"SLURM_PROCID": str(task), "SLURM_STEP_NUM_TASKS": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    assert [finish(task).out for task in tasks] == [f"{Processes(rank, 2, neighbours=2)}\n" for rank in range(2)]


@pytest.mark.parametrize(
    ("gpus", "taken", "neighbours"),
    [(4, [0, 1, 0, 1, 2], [2, 2, 1, 2, 2]), (1, [0, 0, 0, 0, 0], [2, 2, 1, 2, 2])],
    ids=["all seen", "one each"],
)
def test_each_process_takes_a_gpu_and_its_part_of_the_cores(monkeypatch, gpus, taken, neighbours):
    """Of two machines, the second binds a process to cores of its own."""
    everyone = [("one", {0, 1}), ("one", {0, 1}), ("two", {0, 1}), ("two", {2, 3}), ("two", {2, 3})]
    took = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", took.append)
    monkeypatch.setattr(Processes, "all", lambda self, value: everyone)
    found = [processes._meet(Processes(rank, 5)) for rank in range(5)]
    assert took == taken
    assert found == [Processes(rank, 5, shared) for rank, shared in enumerate(neighbours)]


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """`launched(**fates)`: how `launch` ends, and what it told, where a shell stands for the command in two processes.

    A fate is what it does: `first0` in process 0 at the first start, `again1` in process 1 at each other start.
    """

    def launch(**fates: str) -> tuple[int, list[str]]:
        python, notes = tmp_path / "python", []
        cases = "".join(f"{name}) {fate};;\n" for name, fate in fates.items())
        python.write_text(
            f'#!/bin/sh\n[ "$TORCHELASTIC_RESTART_COUNT" = 0 ] && start=first || start=again\n'
            f'case "$start$RANK" in\n{cases}esac\n'
        )
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        return processes.launch(["pretrain"], 2, notes.append, restarts=2), notes

    return launch


KILLED, LOST, HANGS = "kill -9 $$", "exit 75", "exec sleep 1000"


@pytest.mark.parametrize(
    ("fates", "code"),
    [
        ({}, 0),
        ({"first0": "exit 3", "first1": "exit 3"}, 3),
        ({"first0": LOST, "first1": "exit 3"}, 3),
        ({"first0": "exit 6", "first1": KILLED}, 6),
        ({"first0": "exit 143", "first1": "exit 143"}, 143),
        ({"first0": LOST, "first1": "exit 130"}, 130),
    ],
    ids=["done", "all", "one", "both", "signal", "signal and loss"],
)
def test_what_is_decided_is_not_tried_again(launched, fates, code):
    assert launched(**fates) == (code, [])


def test_who_hangs_when_another_failed_is_ended(launched, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.2)
    assert launched(first0=HANGS, first1="exit 3") == (3, [])


@pytest.mark.parametrize(
    ("fates", "told"),
    [
        ({"first0": LOST, "first1": KILLED}, "process 1 was ended by signal 9"),
        ({"first0": LOST, "first1": LOST}, "the processes lost one another"),
    ],
    ids=["killed", "connection"],
)
def test_lost_processes_are_started_again(launched, fates, told):
    assert launched(**fates) == (0, [f"warning: {told}; all start again"])
    assert launched(**fates, again0=LOST, again1="exit 4") == (4, [f"warning: {told}; all start again"])
    code, notes = launched(**fates, again0=LOST, again1=KILLED)
    assert (code, len(notes)) == (75, 3)
    assert notes[-1] == "warning: process 1 was ended by signal 9; given up after 2 new starts"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("saves", [True, False])
def test_a_signal_goes_to_all_processes(launched, number, saves):
    """To those that save, and to those that have not come so far."""
    waits = f"trap 'exit {128 + number}' TERM INT; " * saves + "while :; do sleep 0.01; done"
    assert launched(first0=f"kill -{number.value} $PPID; {waits}", first1=waits) == (128 + number, [])


def test_the_newest_run_of_a_launch_is_continued(monkeypatch, tmp_path):
    """torchrun calls every launch "none" that is not given a name."""
    monkeypatch.chdir(tmp_path)
    assert run.launched("none", None, "quickstart") is None
    for launch in ("none", "none", "other"):
        with run.create("quickstart") as created:
            created.write("launch.txt", launch)
            (created.checkpoints / "step_00000000").mkdir()
    assert run.launched("none", None, "quickstart") == Path("runs/quickstart-2")
    assert run.launched("none", Path("runs/quickstart"), "quickstart") == Path("runs/quickstart")


@pytest.fixture
def damaged(tmp_path, photos):
    """`photos`, where every eighth training image cannot be read: 10 of 80."""
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for index in range(0, 40, 8):
        for name in "ab":
            (root / f"train/{name}/{index:02}.png").write_bytes(b"broken")
    return root


def replacing(root: Path, share: float, *further: str) -> list[str]:
    """Training over images some of which are replaced: five updates an epoch, for four epochs."""
    source = f"data.source={{name: folder, path: {root}}}"
    length = "steps=20", "optim.warmup_steps=2", "batch=16", "log_every=3", "save_every=4"
    return sets(*TINY, source, "data.classes=2", f"data.bad_images={share}", *length, *further)


def replaced(run: Path) -> list[str]:
    return sorted(line[20:] for line in (run / "train.log").read_text().splitlines() if "unreadable" in line)


def bad_images(run: Path) -> list[int]:
    return json.loads((max((run / "checkpoints").iterdir()) / "state.json").read_text())["bad_images"]


@pytest.mark.slow
def test_unreadable_images_are_counted_once_by_all_processes_together(tmp_path, damaged):
    settings = replacing(damaged, 0.125)
    said = alone("pretrain", "quickstart", *settings, "--run", "one", "--json", cwd=tmp_path)
    assert said.json["bad_images"] == 10
    assert len(replaced(tmp_path / "one")) == 10
    assert several(2, "pretrain", "quickstart", *settings, "--run", "two", cwd=tmp_path) == 0
    assert replaced(tmp_path / "two") == replaced(tmp_path / "one")
    assert bad_images(tmp_path / "two") == bad_images(tmp_path / "one") == [*range(0, 80, 8)]


def test_unreadable_images_are_counted_to_the_same_after_an_interruption(capsys, monkeypatch, tmp_path, damaged):
    monkeypatch.chdir(tmp_path)
    vit = Vit(capsys, monkeypatch)
    settings = replacing(damaged, 0.125, "save_every=1", "keep_last=99")
    assert vit("pretrain", "quickstart", *settings, "--run", "one").code == 0
    shutil.copytree("one", "again")
    for later in sorted(Path("again/checkpoints").iterdir())[2:]:
        shutil.rmtree(later)
    assert 0 < len(bad_images(Path("again"))) < 10
    assert vit("pretrain", "--resume", "again", "--json").json["bad_images"] == 10
    assert bad_images(Path("again")) == bad_images(Path("one"))


def test_more_unreadable_images_than_allowed_end_training(capsys, monkeypatch, tmp_path, damaged):
    monkeypatch.chdir(tmp_path)
    said = Vit(capsys, monkeypatch)("pretrain", "quickstart", *replacing(damaged, 0.1), "--run", "one")
    assert said.code == 3
    assert "of 80 images so far cannot be read, more than data.bad_images=0.1 allows; train.log names them" in said.err
    assert len(replaced(Path("one"))) in (9, 10)


@pytest.mark.slow
def test_all_processes_together_may_replace_no_more_than_one(tmp_path, damaged):
    assert several(2, "pretrain", "quickstart", *replacing(damaged, 0.1), "--run", "two", cwd=tmp_path) == 3
    assert told(tmp_path).count("error:") == 1
    assert "of 80 images so far cannot be read, more than data.bad_images=0.1 allows" in told(tmp_path)


@pytest.mark.slow
def test_an_unreadable_image_of_one_process_is_told_by_it(tmp_path, damaged):
    """Image 8 is in the share of process 0 or 1 alone; the other only loses it."""
    assert several(2, "pretrain", "quickstart", *replacing(damaged, 0.0), "--run", "two", cwd=tmp_path) == 3
    assert re.search(r"error: .*/train/[ab]/\d\d.png: not an image", told(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_an_unreadable_image_that_is_held_out_is_told_once_and_not_scored(tmp_path, damaged, shard):
    (damaged / "val/a/01.png").write_bytes(b"broken")
    settings = replacing(damaged, 1.0, f"runtime.shard={shard}", "runtime.timeout=60", "runtime.micro_batch=1")
    assert several(2, "pretrain", "quickstart", *settings, "--run", "two", cwd=tmp_path) == 0
    log, rows = told(tmp_path), (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    assert log.count("val/a/01.png: not an image") == sum("val_top1" in row for row in rows)
    assert "error:" not in log


def test_a_mistake_is_told_once_and_not_made_again(tmp_path):
    assert several(2, "pretrain", "quickstart", *sets(*RUN, "batch=2000"), cwd=tmp_path) == 3
    assert told(tmp_path).splitlines() == [
        "run folder runs/quickstart",
        "error: a batch of 2000 is more than the 1438 training images",
        "hint: take at most --set batch=1438",
    ]


def test_gpus_that_are_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    said = Vit(capsys, monkeypatch)("pretrain", "quickstart", "--gpus", 2)
    assert said.code == 2
    assert "--gpus 2: 1 are visible here" in said.err


def test_two_processes_come_to_the_bits_of_one(tmp_path):
    """With every source of chance on."""
    settings = sets(*RUN, *CHANCE, "runtime.exact=8")
    assert alone("pretrain", "quickstart", *settings, "--run", "one", cwd=tmp_path).code == 0
    assert several(2, "pretrain", "quickstart", *settings, "--run", "two", cwd=tmp_path) == 0
    assert_same_bits(tmp_path / "two", tmp_path / "one")
    assert curve(tmp_path / "two", "loss") == pytest.approx(curve(tmp_path / "one", "loss"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_run_goes_on_to_the_same_bits_in_another_number_of_processes(tmp_path, optimizer):
    settings = sets(*RUN, *CHANCE, f"optim.name={optimizer}", "runtime.exact=8")
    assert alone("pretrain", "quickstart", *settings, "--run", "one", cwd=tmp_path).code == 0
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    shutil.rmtree(tmp_path / "four/checkpoints/step_00000012")
    assert several(4, "pretrain", "--resume", "four", cwd=tmp_path) == 0
    assert_same_bits(tmp_path / "four", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_sharded_training_follows_that_of_one_process(tmp_path, shard):
    assert alone("pretrain", "quickstart", *sets(*RUN), "--run", "one", cwd=tmp_path).code == 0
    further = sets(*RUN, f"runtime.shard={shard}", "runtime.micro_batch=8")
    assert several(2, "pretrain", "quickstart", *further, "--run", "two", cwd=tmp_path) == 0
    for name, tensor in final(tmp_path / "one").items():
        torch.testing.assert_close(final(tmp_path / "two")[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    for key in ("loss", "val_loss", "grad_norm"):
        assert curve(tmp_path / "two", key) == pytest.approx(curve(tmp_path / "one", key), rel=1e-5), key
    assert curve(tmp_path / "two", "val_top1") == curve(tmp_path / "one", "val_top1")


@pytest.mark.slow
def test_sharded_training_may_go_on_with_a_score_that_is_owed(capsys, monkeypatch, tmp_path):
    score = keeper.score

    def stopped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return score(*args, **kwargs)

    monkeypatch.setattr(keeper, "score", stopped)
    settings = sets(*RUN, "runtime.shard=fsdp")
    said = Vit(capsys, monkeypatch)("pretrain", "quickstart", *settings, "--run", tmp_path / "run")
    assert said.code == 143, said.err
    assert curve(tmp_path / "run", "val_loss") == []
    assert several(2, "pretrain", "--resume", tmp_path / "run", cwd=tmp_path) == 0, told(tmp_path)
    assert len(curve(tmp_path / "run", "val_loss")) == 2


def ranks(launcher: subprocess.Popen[str]) -> list[int]:
    """The process ids of the training processes, in the order of their ranks."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [int(pid) for pid, parent, args in rows if parent == str(launcher.pid) and "-m vitcli" in args]


def reached(run: Path, step: int) -> None:
    until(lambda: any(int(folder.name[5:]) >= step for folder in run.glob("checkpoints/step_*")))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_lost_process_costs_nothing_but_time(tmp_path, number):
    """All start again from the newest checkpoint, and come to the bits of a run that nothing happened to."""
    settings = sets(*RUN, *CHANCE, "runtime.exact=8", "runtime.timeout=15", "save_every=1", "log_every=1")
    assert alone("pretrain", "quickstart", *settings, "--run", "one", cwd=tmp_path).code == 0
    launcher = started(2, "pretrain", "quickstart", *settings, "--run", "two", cwd=tmp_path)
    reached(tmp_path / "two", 3)
    os.kill(ranks(launcher)[1], number)
    assert launcher.wait(timeout=600) == 0
    assert_same_bits(tmp_path / "two", tmp_path / "one")
    assert "process 0 of 2 lost the others after step" in told(tmp_path)
    assert "warning: process 1 was ended by signal 9; all start again" in told(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_ends_it_with_a_checkpoint(tmp_path, number):
    launcher = started(2, "pretrain", "quickstart", *sets(*RUN, "steps=100000"), "--run", "two", cwd=tmp_path)
    reached(tmp_path / "two", 6)
    launcher.send_signal(number)
    assert launcher.wait(timeout=300) == 128 + number
    step = int(max((tmp_path / "two/checkpoints").iterdir()).name[5:])
    assert told(tmp_path).count("error:") == 1
    assert f"stopped by signal {number} after step {step} of 100000, which is saved" in told(tmp_path)


@pytest.mark.slow
def test_processes_end_with_a_checkpoint_when_their_launcher_is_killed(tmp_path):
    launcher = started(2, "pretrain", "quickstart", *sets(*RUN, "steps=100000"), "--run", "two", cwd=tmp_path)
    reached(tmp_path / "two", 6)
    launcher.kill()
    launcher.wait()
    until(lambda: "which is saved" in told(tmp_path))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path):
    settings = sets(*RUN, "steps=100000")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "--"]
    command = [*torchrun, "vitcli", "pretrain", "quickstart", *settings, "--run", "two"]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    reached(tmp_path / "two", 6)
    os.kill(ranks(launcher)[1], signal.SIGTERM)
    assert launcher.wait(timeout=600) != 0
    assert "exitcode  : 143" in (tmp_path / "log").read_text()
    newest = max((tmp_path / "two/checkpoints").iterdir())
    step = json.loads((newest / "state.json").read_text())["step"]
    assert f"stopped by signal 15 after step {step} of 100000, which is saved" in (tmp_path / "log").read_text()
