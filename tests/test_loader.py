import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from command import gone, until
from PIL import Image

from vitcli.data import DataConfig
from vitcli.data.handover import CHUNK, Decoded, Ready
from vitcli.data.images import BadImage
from vitcli.data.loader import eval_batches, train_batches
from vitcli.data.parallel import METHOD
from vitcli.data.shared import Shared
from vitcli.data.workers import load
from vitcli.errors import DataError

AUGMENT = {"randaugment": {"n": 2, "m": 10}, "color_jitter": 0.2, "random_erasing": 0.3}
BROKEN = (3, 17)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 20 images, each of a colour of its own."""
    root = tmp_path_factory.mktemp("data")
    for label in range(2):
        (root / f"class{label}").mkdir()
        for i in range(20):
            Image.new("RGB", (20, 16), (10 * i, 100 * label, 50)).save(root / f"class{label}/{i:02}.png")
    return root


@pytest.fixture(scope="module")
def damaged(folder, tmp_path_factory):
    """The same, with images 3 and 17 broken."""
    root = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(folder, root)
    for index in BROKEN:
        (root / f"class0/{index:02}.png").write_bytes(b"broken")
    return root


def config(root, **data):
    return DataConfig.parse({"source": {"name": "folder", "path": str(root)}, "res": 16, "augment": AUGMENT} | data)


def batches(data, start=0, steps=6, batch=16, seed=5):
    dataset = data.source.open("train")
    return list(train_batches(data, dataset, batch=batch, seed=seed, start=start, steps=steps))


def equal(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["images"], b["images"])
        assert torch.equal(a["labels"], b["labels"])
        assert a.get("bad") == b.get("bad")
    return True


def test_a_batch_is_uint8_images_and_int64_labels(folder):
    (first, *_) = batches(config(folder, workers=0))
    assert first.keys() == {"images", "labels"}
    assert (first["images"].dtype, first["images"].shape) == (torch.uint8, (16, 3, 16, 16))
    assert (first["labels"].dtype, first["labels"].shape) == (torch.int64, (16,))
    assert first["images"].is_contiguous()


def test_an_epoch_shows_each_image_once_without_the_partial_batch(folder):
    plain = {"crop": "central_crop", "flip": False}
    data = config(folder, workers=0, augment=plain)
    colours = [
        {tuple(x[:, 8, 8].tolist()) for part in batches(data, start=step, steps=step + 2) for x in part["images"]}
        for step in (0, 2, 4)
    ]
    assert [len(epoch) for epoch in colours] == [32, 32, 32]
    assert len({frozenset(epoch) for epoch in colours}) == 3
    for part in batches(data):
        assert ((part["images"][:, 1, 8, 8] == 100) == part["labels"].bool()).all()


def test_a_run_can_start_anywhere(folder):
    data = config(folder, workers=0)
    whole = batches(data, 0, 7)
    for start in (1, 2, 5):
        assert equal(batches(data, start, 7), whole[start:])
    assert batches(data, 7, 7) == []


def test_epochs_and_seeds_differ(folder):
    data = config(folder, workers=0)
    assert not torch.equal(batches(data)[0]["images"], batches(data, seed=6)[0]["images"])
    assert not torch.equal(batches(data)[0]["images"], batches(data)[2]["images"])


@pytest.mark.parametrize("workers", [1, 5])
def test_the_number_of_processes_changes_nothing(damaged, workers):
    one, several = (config(damaged, bad_images=0.1, workers=count) for count in (0, workers))
    expected = batches(one, 1, 9)
    assert any("bad" in part for part in expected)
    assert equal(batches(several, 1, 9), expected)
    assert equal(list(evaluate(several, workers)), list(evaluate(one, 0)))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("augment", [{}, {"crop": "random_crop", "resize": [18, 20]}])
def test_jpegs_are_decoded_by_other_processes_as_by_this_one(jpegs, augment):
    """Those decode no more of a file than the crop needs."""
    here, there = (config(jpegs, workers=count, augment=augment) for count in (0, 2))
    assert equal(batches(there), batches(here))


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    root, chance = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for number in range(32):
        image = Image.fromarray(chance.integers(0, 256, (8, 5, 3), dtype=np.uint8)).resize((70 + number, 120 - number))
        (root / f"class{number % 2}").mkdir(exist_ok=True)
        image.save(root / f"class{number % 2}/{number}.jpg", quality=90)
    return root


LOADING = """
import sys
from vitcli.commands.console import open_standard_streams
from vitcli.data import DataConfig
from vitcli.data.loader import train_batches

if __name__ == "__main__":
    open_standard_streams()
    data = DataConfig.parse({"source": {"name": "folder", "path": sys.argv[1]}, "res": 16, "workers": 2})
    found = train_batches(data, data.source.open("train"), batch=16, seed=0, start=0, steps=2)
    print(sum(len(batch["images"]) for batch in found))
"""


@pytest.mark.parametrize("circumstance", ["usual", "stderr closed", "torchvision for another torch"])
def test_other_processes_load_without_a_word(jpegs, tmp_path, circumstance):
    (tmp_path / "loading.py").write_text(LOADING)
    if circumstance.startswith("torchvision"):
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    closed = " 2>&-" if circumstance.startswith("stderr") else ""
    command = f"{shlex.join([sys.executable, 'loading.py', str(jpegs)])}{closed}"
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("32\n", "")


def evaluate(data, workers, batch=7):
    return eval_batches(data.preprocessing, data.source.open("train"), batch=batch, workers=workers)


def test_images_that_are_kept_are_those_that_are_loaded(folder):
    augment = AUGMENT | {"crop": "random_crop", "pad": 3, "resize": [18, 20]}
    loaded, kept = (config(folder, workers=0, augment=augment, keep=keep) for keep in (False, True))
    for start, steps in ((0, 7), (3, 9)):
        assert equal(batches(kept, start, steps), batches(loaded, start, steps))


def test_devices_without_float64_get_batches_that_are_made_on_the_cpu(folder):
    """The meta device stands in for MPS: it computes nothing, but refuses what is not there."""
    for data in (config(folder, workers=0), config(folder, workers=0, augment={"crop": "random_crop"}, keep=True)):
        dataset = data.source.open("train")
        found = train_batches(data, dataset, batch=16, seed=0, start=0, steps=2, device=torch.device("meta"))
        assert [(x["images"].device.type, tuple(x["images"].shape)) for x in found] == [("meta", (16, 3, 16, 16))] * 2


def test_images_of_many_sizes_cannot_be_kept(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "data")
    Image.new("RGB", (30, 16)).save(tmp_path / "data/class1/07.png")
    with pytest.raises(BadImage, match=r"07.png: its size is not that of the first image, 20x16: 30x16") as caught:
        batches(config(tmp_path / "data", augment={"crop": "random_crop"}, keep=True, workers=0))
    assert "data.augment.resize" in caught.value.hint


def test_where_images_are_broken_none_are_kept(damaged):
    augment = {"crop": "random_crop"}
    loaded, kept = (config(damaged, bad_images=0.1, workers=0, augment=augment, keep=keep) for keep in (False, True))
    assert equal(batches(kept, 0, 4), batches(loaded, 0, 4))


def test_large_batches_come_in_parts():
    data = DataConfig.parse({"source": "digits", "res": 8, "augment": {"crop": "central_crop"}})
    size = 16 * CHUNK + 5
    apart, together = (batches(data.model_copy(update={"workers": count}), 0, 3, batch=size) for count in (0, 2))
    assert [len(part["labels"]) for part in apart] == [size] * 3
    assert equal(apart, together)


def number_as_image(folder, number):
    """Number 0 waits for number 200, which other processes come to, if they are asked for what it holds up."""
    (folder / str(number)).touch()
    while number == 0 and not (folder / "200").exists():
        time.sleep(0.01)
    return Decoded(torch.full((3, 2, 2), number % 256, dtype=torch.uint8)), number, []


def test_a_process_that_is_held_up_delays_no_other(tmp_path):
    batches = [list(range(first, first + 100)) for first in (0, 100, 200)]
    found = list(load(partial(number_as_image, tmp_path), Ready((2, 2)), batches, workers=2))
    assert [part.indices.tolist() for part in found] == batches
    assert [part.images[:, 0, 0, 0].tolist() for part in found] == [[n % 256 for n in batch] for batch in batches]


def test_no_global_generator_is_used(folder):
    def state():
        return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002

    before = state()
    for workers in (0, 1):
        batches(config(folder, workers=workers))
    assert state() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_training_with_its_name(damaged, workers):
    with pytest.raises(DataError, match=r"class0/(03|17).png: not an image") as caught:
        batches(config(damaged, workers=workers))
    assert "data.bad_images=0.01" in caught.value.hint
    assert multiprocessing.active_children() == []


def test_a_share_of_broken_images_is_replaced(damaged, folder):
    plain = {"crop": "central_crop", "flip": False}
    found = batches(config(damaged, bad_images=0.05, workers=0, augment=plain), 0, 8)
    whole = batches(config(folder, workers=0, augment=plain), 0, 8)
    replaced = 0
    for part, before in zip(found, whole, strict=True):
        assert ((part["images"][:, 1, 8, 8] == 100) == part["labels"].bool()).all()  # labels are the replacement's
        changed = (part["images"] != before["images"]).flatten(1).any(1)
        assert set(before["images"][changed][:, 0, 8, 8].tolist()) <= {10 * index for index in BROKEN}
        bad = part.get("bad", {})  # the first replacement may be broken, too
        assert all(f"{index:02}.png: not an image" in wrong for index, wrong in bad.items())
        assert 0 < int(changed.sum()) <= len(bad) if bad else not changed.any()
        replaced += int(changed.sum())
    assert replaced >= 4


def test_nothing_readable_is_no_endless_search(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(4):
        (tmp_path / f"a/{i}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"100 images in a row cannot be read, the first .*\.png: not an image"):
        batches(config(tmp_path, bad_images=1.0, workers=0), batch=2)


@pytest.mark.parametrize("batch", [1, 7, 40, 64])
def test_evaluation_takes_every_image_in_order(folder, batch):
    data = config(folder)
    found = list(evaluate(data, 0, batch))
    assert [len(part["labels"]) for part in found] == [batch] * (40 // batch) + [40 % batch] * (40 % batch > 0)
    images, labels = (torch.cat([part[key] for part in found]) for key in ("images", "labels"))
    assert images[:, 0, 8, 8].tolist() == [10 * i for i in range(20)] * 2
    assert labels.tolist() == [0] * 20 + [1] * 20


def test_evaluation_leaves_broken_images_out_and_names_them(damaged):
    found = list(evaluate(config(damaged), 0))
    assert [len(part["labels"]) for part in found] == [6, 7, 6, 7, 7, 5]
    bad = {index: wrong for part in found for index, wrong in part.get("bad", {}).items()}
    assert list(bad) == list(BROKEN)
    assert all(f"class0/{index:02}.png: not an image" in wrong for index, wrong in bad.items())


def training(folder, workers):
    data = config(folder, workers=workers, augment={"crop": "inception_crop"})
    return train_batches(data, data.source.open("train"), batch=8, seed=0, start=0, steps=100_000)


def kill_one():
    process = multiprocessing.active_children()[0]
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)


def test_what_killed_processes_were_asked_for_others_do(folder):
    running, killed = training(folder, workers=2), 0
    for number, expected in zip(range(200), training(folder, workers=0), strict=False):
        if number in (1, 60, 120):
            kill_one()
        batch = next(running)
        killed += batch.get("killed", 0)
        assert torch.equal(batch["images"], expected["images"])
        assert torch.equal(batch["labels"], expected["labels"])
    assert killed == 3
    assert len(multiprocessing.active_children()) == 2
    running.close()


def test_processes_that_are_killed_again_and_again_are_an_error_not_a_hang(folder):
    running, turns = training(folder, workers=2), count()

    def go_on():
        for number in turns:
            next(running)
            if number % 50 == 0:
                kill_one()

    with pytest.raises(DataError, match="were killed") as caught:
        go_on()
    assert "data.workers" in caught.value.hint
    assert 150 < next(turns) < 250
    assert multiprocessing.active_children() == []


SCRIPT = """
import multiprocessing, os, signal, sys, time
from vitcli.data import DataConfig
from vitcli.data.loader import train_batches

if __name__ == "__main__":
    data = DataConfig.parse({"source": {"name": "folder", "path": sys.argv[1]}, "res": 16, "workers": 2})
    running = train_batches(data, data.source.open("train"), batch=8, seed=0, start=0, steps=100_000)
    next(running)
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # this process decides for itself; its workers must not mind
        os.killpg(0, number)
    for _ in range(50):
        next(running)
    print("still loading", flush=True)
    if sys.argv[2] == "wait":
        time.sleep(1000)
    multiprocessing.keep = running  # leaves without closing
    print("leaving", flush=True)
"""


def start(tmp_path, folder, what):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "error", str(script), str(folder), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_signals_to_the_group_and_an_exit_without_closing(tmp_path, folder):
    with start(tmp_path, folder, "leave") as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    pids, *rest = output.splitlines()
    assert rest == ["still loading", "leaving"]
    assert all(gone(pid) for pid in pids.split())


def test_processes_end_when_the_main_process_is_killed(tmp_path, folder):
    with start(tmp_path, folder, "wait") as process:
        assert process.stdout
        pids = process.stdout.readline().split()
        assert len(pids) == 2
        assert process.stdout.readline() == "still loading\n"
        assert not any(gone(pid) for pid in pids)
        process.kill()
        until(lambda: all(map(gone, pids)))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory is shared in another way here")
def test_a_container_with_little_shared_memory_is_no_hindrance(tmp_path, folder):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace('"res": 16', '"res": 256'))
    inside = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} {script} {folder} leave"
    command = ["unshare", "-rm", "sh", "-c", inside]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, start_new_session=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"cannot mount a small /dev/shm here: {done.stderr.splitlines()[0]}")
    assert done.stdout.splitlines()[1:] == ["still loading", "leaving"], done.stderr


@pytest.mark.parametrize("memfd", [True, False])
def test_memory_is_shared_on_every_system(monkeypatch, memfd):
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    memory = Shared((2, 3, 1000))
    process = multiprocessing.get_context(METHOD).Process(target=torch.Tensor.fill_, args=(memory, 7))
    process.start()
    memory.close()
    process.join()
    assert memory.tensor.shape == (2, 3, 1000)
    assert (memory.tensor == 7).all()
