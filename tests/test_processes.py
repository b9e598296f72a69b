"""Several processes train one model: they share a batch, agree, and lose nothing when one of them is lost.

Run on CPUs by torchrun's own launcher, as `vit pretrain --gpus` starts them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import Said, Vit, finish, process, sets, until
from safetensors.torch import load_file

from vitcli.engine import exact_size
from vitcli.errors import RecipeError
from vitcli.processes import Processes

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
LAUNCH = "import sys; from vitcli import processes; sys.exit(processes.launch(sys.argv[2:], int(sys.argv[1])))"


def started(count: int, *args: object, cwd: Path) -> subprocess.Popen[str]:
    """A command in `count` processes. Its output goes to a file: processes that linger must not hold a pipe."""
    with (cwd / f"{time.monotonic_ns()}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(count), *map(str, args)],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            text=True,
        )


def several(count: int, *args: object, cwd: Path) -> int:
    return started(count, *args, cwd=cwd).wait(timeout=600)


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


def test_slurm_needs_a_meeting_place(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    said = Vit(capsys, monkeypatch)("pretrain", "quickstart")
    assert said.code == 2
    assert "MASTER_ADDR and MASTER_PORT are not set" in said.err


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
def test_a_run_goes_on_to_the_same_bits_in_another_number_of_processes(tmp_path):
    settings = sets(*RUN, *CHANCE, "runtime.exact=8")
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
    log = "".join(file.read_text() for file in tmp_path.glob("*.log"))
    assert "process 0 of 2 lost the others after step" in log


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path):
    settings = sets(*RUN, "steps=400")
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
    assert f"stopped by signal 15 after step {step} of 400, which is saved" in (tmp_path / "log").read_text()
