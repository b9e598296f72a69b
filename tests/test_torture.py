"""The whole matrix of faults: `pytest -m torture -n 0 -s`, in a share of its counts with VITCLI_TORTURE=0.05.

Each test prints how many cases it ran. The counts of the whole are those of the functions' arguments.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import test_faults
from command import content, sets
from test_images import _SEEDS
from zygote import RECIPE, RESUME

from vitcli.data.images import BadImage, decode

pytestmark = pytest.mark.torture
SHARE = float(os.environ.get("VITCLI_TORTURE", "1"))


def cases(count: int) -> int:
    """So many cases, or the share of them that was asked for."""
    return max(1, round(SHARE * count))


def told(what: str, count: int) -> None:
    print(f"\n{count:,} {what}", file=sys.__stderr__, flush=True)


def signalled(zygote, folder, seconds, number):
    """Begin or go on, and send a signal so long after; how it ended."""
    begun = (folder / "run/recipe.resolved.yaml").exists()
    if not begun:
        shutil.rmtree(folder / "run", ignore_errors=True)
    pid = zygote.begin(folder, *(RESUME if begun else RECIPE))
    time.sleep(seconds)
    os.kill(pid, number)  # it is the zygote's child until it is waited for, so the number is no other's
    return zygote.finish(folder, pid)


def length(zygote, folder):
    """Seconds that a whole run takes."""
    begin = time.monotonic()
    assert zygote(folder, *RECIPE).code == 0
    return time.monotonic() - begin


def test_killed_at_random(zygote, undisturbed, tmp_path):
    wanted = cases(1000)
    (tmp_path / "timed").mkdir()
    longest, chance, killed, runs = length(zygote, tmp_path / "timed"), random.Random(0), 0, 0
    while killed < wanted:
        folder = tmp_path / "case"
        folder.mkdir()
        for _ in range(20):
            ended = signalled(zygote, folder, chance.uniform(0, longest), signal.SIGKILL)
            assert ended.code in (0, -9), ended.err
            killed += ended.code == -9
            if ended.code == 0:
                break
        test_faults.goes_on(zygote, folder, undisturbed)
        shutil.rmtree(folder)
        runs += 1
    told(f"SIGKILLs in {runs} runs, each of which came to the same bits", killed)


def test_ended_at_random(zygote, undisturbed, tmp_path):
    wanted = cases(200)
    (tmp_path / "timed").mkdir()
    longest, chance, ends = length(zygote, tmp_path / "timed"), random.Random(1), Counter()
    while ends.total() < wanted:
        folder = tmp_path / "case"
        folder.mkdir()
        number = chance.choice((signal.SIGTERM, signal.SIGINT))
        ended = signalled(zygote, folder, chance.uniform(0.1, longest), number)
        ends[ended.code] += 1
        # Before training begins, and while its curves are drawn, a signal ends the process as it ends any other.
        drawing = (folder / "run/last").exists()
        if "training: step" in ended.err and not drawing:
            assert ended.code == 128 + number, ended.err
            assert "which is saved" in ended.err
        assert ended.code in (0, 128 + number, -number), ended.err
        test_faults.goes_on(zygote, folder, undisturbed)
        shutil.rmtree(folder)
    told(f"SIGTERMs and SIGINTs, by exit code {dict(ends)}", ends.total())


def test_killed_at_every_change_that_a_save_makes(zygote, undisturbed, tmp_path):
    last = test_faults.changes(undisturbed)
    numbers = random.Random(0).sample(range(1, last + 1), cases(last))
    for number in numbers:
        test_faults.killed_at(zygote, tmp_path / "case", undisturbed, "kill_before_change", number)
    told(f"crash points of {last}", len(numbers))


def test_killed_in_the_midst_of_every_file(zygote, undisturbed, tmp_path):
    parts = 8
    every = [(file, part / parts) for file in range(1, 9) for part in range(parts + 1)]
    chosen = random.Random(0).sample(every, cases(len(every)))
    for number, share in chosen:
        test_faults.killed_at(zygote, tmp_path / "case", undisturbed, "tear_file", number, share)
    told("torn files of checkpoints", len(chosen))


def test_damaged_newest_checkpoints(undisturbed, tmp_path):
    wanted = cases(600)
    for seed in range(wanted):
        test_faults.damaged(undisturbed, tmp_path, 1000 + seed)
    told("damaged newest checkpoints, all noticed, the one before taken", wanted)


def test_a_disk_that_is_full_at_any_size(zygote, undisturbed, tmp_path):
    wanted = cases(60)
    sizes = [8 + 1400 * step // wanted for step in range(wanted)]
    ends = Counter(test_faults.filled(zygote, tmp_path / "case", undisturbed, size) for size in sizes)
    told(f"disks of 8 to 1,400 KiB, by exit code {dict(ends)}", len(sizes))


def test_processes_that_start_together(zygote, undisturbed, tmp_path):
    wanted = cases(200)
    for number in range(wanted):
        (tmp_path / str(number)).mkdir()
        test_faults.test_two_processes_that_start_together_in_one_folder(zygote, undisturbed, tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number))
    told("threes of processes in one run folder, one of which ran", wanted)


def test_lost_loader_processes(zygote, photos, tmp_path):
    wanted = cases(50)
    ends = Counter()
    for number in range(wanted):
        (tmp_path / str(number)).mkdir()
        lost = signal.SIGSTOP if number % 5 == 0 else signal.SIGKILL
        ends[test_faults.lost_loader(zygote, tmp_path / str(number), photos, lost).splitlines()[-2]] += 1
    told(f"lost loader processes: {dict(ends)}", wanted)


def mutant(chance):
    data = bytearray(chance.choice(_SEEDS))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        data[at : at + chance.randint(0, 30)] = chance.randbytes(chance.randint(0, 12))
    return bytes(data[: chance.randrange(len(data) + 1)]) if chance.random() < 0.4 else bytes(data)


def test_mutated_images_are_decoded_or_refused():
    wanted = cases(200_000)
    chance, ends, slowest = random.Random(0), Counter(), 0.0
    for _ in range(wanted):
        data, begin = mutant(chance), time.process_time()
        try:
            image = decode(data)
        except BadImage as error:
            assert error.reason  # noqa: PT017 (either outcome is right)
            ends["refused"] += 1
        else:
            assert image.mode == "RGB"
            ends["read"] += 1
        slowest = max(slowest, time.process_time() - begin)
    assert slowest < 2
    told(f"mutated images {dict(ends)}, the slowest took {slowest:.3f} s", ends.total())


def test_mutated_images_through_the_commands(zygote, undisturbed, photos, tmp_path):
    wanted = cases(2000)
    chance, count = random.Random(1), wanted
    folder = tmp_path / "mixed/0"
    folder.mkdir(parents=True)
    expected = {}
    for number in range(count):
        data = mutant(chance) if number % 10 else Path(photos / "val/a/00.png").read_bytes()
        (folder / f"{number:05}.png").write_bytes(data)
        try:
            decode(data)
        except BadImage:
            expected[f"{number:05}.png"] = False
        else:
            expected[f"{number:05}.png"] = True
    bad = sum(not fine for fine in expected.values())
    ckpt = ["--ckpt", undisturbed / "run"]
    said = zygote(tmp_path, "predict", folder, *ckpt, "--jsonl")
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert {Path(answer["path"]).name: "top" in answer for answer in answers} == expected
    assert said.code == (1 if bad else 0)
    said = zygote(tmp_path, "eval", "--data", tmp_path / "mixed", *ckpt)
    assert said.code == (3 if bad else 0), said.err
    if bad < count:
        said = zygote(tmp_path, "eval", "--data", tmp_path / "mixed", *ckpt, "--allow-bad", "--json")
        assert said.code == 0, said.err
        assert said.json["images"] == count - bad
        assert len(said.json["bad"]) == bad
    told(f"images through predict and eval, {bad} of them refused", count)


def ranks(count, folder, *words, fault=""):
    """A command in so many processes on this machine, with a line of Python run in each before: its exit code."""
    driver = folder / "driver.py"
    driver.write_text(f"import os\nrank = int(os.environ['RANK'])\n{fault}\nfrom vitcli import cli\ncli.main()\n")
    here = ("--standalone", f"--nproc-per-node={count}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", *here, "--", str(driver)]
    with (folder / "log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*torchrun, *words], cwd=folder, stdout=log, stderr=log, env=environment, timeout=600)
    return done.returncode, (folder / "log").read_text()


def same_bits(run, other):
    """Everything is equal but the rounding of sums in the log, which each process adds up for itself."""
    found, expected = content(run), content(other)
    for row, wanted in zip(found.pop("log"), expected.pop("log"), strict=True):
        assert {key: value for key, value in row.items() if isinstance(value, str)} == {
            key: wanted.pop(key) for key in list(wanted) if isinstance(wanted[key], str)
        }
        assert {key: row[key] for key in row if not isinstance(row[key], str)} == pytest.approx(wanted, rel=1e-6)
    assert found == expected


EXACT = sets("runtime={device: cpu, precision: fp32, threads: 1, exact: 8}")
SPOIL = """
import torch
from vitcli.data import mix, preprocess
seen = iter(range(1000))
def normalise(images, data):
    images = preprocess.normalise(images, data)
    if next(seen) in {steps} and rank == 1:
        images[:] = torch.nan  # a cut from another image would hide one
    return images
mix.normalise = normalise
"""
LIMIT = """
import torch
from vitcli.objectives.classify import Classify
losses = Classify.losses
def limited(self, module, batch):
    if rank == 1 and module.training and len(batch["images"]) > 4:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return losses(self, module, batch)
Classify.losses = limited
"""


STOP = """
import signal
from vitcli.training.meter import Meter
add = Meter.add
def stopped(self, step, *rest):
    add(self, step, *rest)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGTERM)
Meter.add = stopped
"""


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_in_all(tmp_path):
    code, log = ranks(2, tmp_path, *RECIPE, *EXACT, fault=SPOIL.format(steps=(2,)))
    assert code == 0, log
    assert "update 3 skipped" in log
    shutil.move(tmp_path / "run", tmp_path / "two")
    code, log = ranks(1, tmp_path, *RECIPE, *EXACT, fault=SPOIL.replace("rank == 1", "True").format(steps=(2,)))
    assert code == 0, log
    same_bits(tmp_path / "run", tmp_path / "two")
    for count, rank, kept in ((2, "rank == 1", "several"), (1, "True", "alone")):
        shutil.rmtree(tmp_path / "run")
        fault = SPOIL.replace("rank == 1", rank).format(steps=(2, 3, 4))
        code, log = ranks(count, tmp_path, *RECIPE, *EXACT, fault=fault)
        assert code == 0, log
        assert "skipped too often: back to the weights of step 2" in log
        shutil.copytree(tmp_path / "run", tmp_path / kept)
    same_bits(tmp_path / "several", tmp_path / "alone")
    shutil.rmtree(tmp_path / "run")
    code, log = ranks(2, tmp_path, *RECIPE, *EXACT, fault=SPOIL.format(steps=range(100)))
    assert code != 0
    assert "was not finite, to the end of training" in log
    told("runs with NaN in one process", 5)


@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_too_little_memory_in_one_process(tmp_path, shard):
    settings = sets(f"runtime={{device: cpu, precision: fp32, threads: 1, shard: {shard}, timeout: 30}}")
    code, log = ranks(2, tmp_path, *RECIPE, *settings, fault=LIMIT)
    if shard == "ddp":
        assert code == 0, log
        assert "8 images at a time do not fit into memory, going on with 4" in log
        newest = max((tmp_path / "run/checkpoints").iterdir())
        assert '"micro_batch": 4' in (newest / "state.json").read_text()
    else:
        assert code != 0
        assert "--set runtime.micro_batch=" in log


def test_any_number_of_processes_goes_on_to_the_same_bits(tmp_path):
    (tmp_path / "one").mkdir()
    code, log = ranks(1, tmp_path / "one", *RECIPE, *EXACT)
    assert code == 0, log
    words = [*RECIPE, *EXACT]
    for count, at in ((1, 0), (2, 1), (4, 2), (2, 3), (1, 99)):
        code, log = ranks(count, tmp_path, *words, fault=STOP.format(step=at))
        assert (code == 0) == (at == 99), log
        words = RESUME
    same_bits(tmp_path / "run", tmp_path / "one/run")
    told("numbers of processes one after another: 1, 2, 4, 2, 1", 5)
