"""The listing of a large folder is kept on disk: as long as it holds, and no longer."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vitcli.data import index
from vitcli.data.loader import fingerprint
from vitcli.data.parallel import each
from vitcli.data.sources import folder as folders
from vitcli.data.sources.folder import Folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Three classes of images that nobody has touched for long."""
    monkeypatch.setattr(folders, "LARGE", 1)
    for label in ("a", "b", "c"):
        (tmp_path / "data" / label / "deep").mkdir(parents=True)
        for name in ("1.jpg", "2.jpg", "deep/3.jpg"):
            (tmp_path / "data" / label / name).write_bytes(f"{label}/{name}".encode())
    settle(tmp_path / "data")
    return tmp_path / "data"


def settle(root: Path) -> None:
    """Give all folders an age; each a different one, so that a swap is seen."""
    for number, place in enumerate([root, *(path for path in root.rglob("*") if path.is_dir())]):
        os.utime(place, ns=(0, time.time_ns() - (100 + number) * 10**9))


def opened(root: Path):
    return Folder(path=str(root)).open("train")


@pytest.fixture
def listed(monkeypatch):
    """The class folders that are listed from now on."""
    names = []
    images = folders._images
    monkeypatch.setattr(folders, "_images", lambda root, folder: names.append(folder) or images(root, folder))
    return names


def test_a_kept_listing_is_the_same_and_is_not_made_again(root, listed, cache):
    first = opened(root)
    assert listed == ["a", "b", "c"]
    assert first.index.place.is_relative_to(cache)
    again = opened(root)
    assert listed == ["a", "b", "c"]
    assert (again.classes, again.labels.tolist()) == (first.classes, first.labels.tolist())
    assert fingerprint(again) == fingerprint(first)
    for i in range(9):
        assert again.read(i).decode() == os.path.relpath(again.path(i), root)


CHANGES = {
    "a new image": lambda root: (root / "b/9.jpg").touch(),
    "an image gone": lambda root: (root / "b/1.jpg").unlink(),
    "renamed": lambda root: (root / "b/1.jpg").rename(root / "b/8.jpg"),
    "deep": lambda root: (root / "c/deep/3.jpg").rename(root / "c/deep/4.jpg"),
    "a new class": lambda root: (root / "d").mkdir() or (root / "d/1.jpg").touch(),
    "a folder gone": lambda root: (root / "c/deep/3.jpg").unlink() or (root / "c/deep").rmdir(),
    "swapped": lambda root: (root / "a").rename(root / "x") and (root / "b").rename(root / "a").parent / "x",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_listed_again(root, listed, change, monkeypatch):
    before = fingerprint(opened(root))
    listed.clear()
    CHANGES[change](root)
    if (root / "x").exists():
        (root / "x").rename(root / "b")
        (root / "a/1.jpg").rename(root / "a/7.jpg")
    changed = opened(root)
    assert listed
    monkeypatch.setattr(folders, "LARGE", 100)
    assert fingerprint(changed) == fingerprint(opened(root)) != before


def test_a_folder_that_may_still_be_changing_is_not_kept(root, listed, monkeypatch):
    monkeypatch.setattr(folders, "RACY_NS", 50 * 10**9)  # this test may be slow
    (root / "a/5.jpg").touch()
    assert opened(root).index.place is None
    assert opened(root).index.place is None
    assert listed == ["a", "b", "c"] * 2
    settle(root)
    assert opened(root).index.place is not None


def test_a_damaged_or_forbidden_cache_costs_time_only(root, listed, cache, monkeypatch):
    expected = fingerprint(opened(root))
    for file in sorted((cache / "index").glob("*/*")):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert fingerprint(opened(root)) == expected
    for name in ("VITCLI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv("VITCLI_CACHE", raising=False)
        monkeypatch.setenv(name, "/proc/nowhere")
        assert opened(root).index.place is None


def test_other_processes_map_the_same_index(root):
    dataset = opened(root)
    read = sorted(each(dataset.read, range(9), jobs=2))
    assert read == sorted(dataset.read(i) for i in range(9))
    assert isinstance(dataset.index["names"], np.memmap)


def test_an_index_that_was_replaced_is_not_taken_for_the_old_one(root):
    dataset = opened(root)
    reopen, place = dataset.index.__reduce__()
    assert reopen(*place).facts == dataset.index.facts
    (root / "a/5.jpg").touch()
    settle(root)
    opened(root)
    with pytest.raises(index.DataError, match="changed while it was in use"):
        reopen(*place)


MEASURE = """
import json, sys, time
from vitcli.data.sources.folder import Folder
def rss():
    with open("/proc/self/status") as file:
        return {line.split(":")[0]: int(line.split()[1]) for line in file if line.startswith(("VmHWM", "RssAnon"))}
before = rss()
begin = time.perf_counter()
dataset = Folder(path=sys.argv[1]).open("train")
seconds = time.perf_counter() - begin
paths = [dataset.path(i) for i in (0, len(dataset) - 1)]
print(json.dumps({"images": len(dataset), "seconds": seconds, "before": before, "after": rss(), "paths": paths,
                  "kept": dataset.index.place is not None}))
"""


@pytest.mark.slow
def test_a_million_files_cost_little_memory_and_are_listed_once(tmp_path, cache):
    """21,843 class folders, as ImageNet-21k has, of 46 names each: 1,004,778 names of one empty file."""
    one = tmp_path / "one"
    one.write_bytes(b"x")
    for label in range(21_843):
        place = tmp_path / f"data/n{label:08}"
        place.mkdir(parents=True)
        for i in range(46):
            os.symlink(one, place / f"n{label:08}_{i:05}.JPEG")
    settle(tmp_path / "data")

    def measured():
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "data")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    first, again = measured(), measured()
    print(first, again)
    assert first["images"] == again["images"] == 21_843 * 46
    assert first["kept"]
    assert again["kept"]
    assert first["paths"] == again["paths"]
    grown = [run["after"]["VmHWM"] - run["before"]["VmHWM"] for run in (first, again)]
    assert grown[0] < 8 * 2**20 / 14  # kilobytes: 14 times as many stay below 8 GB
    assert grown[1] < grown[0]
    assert again["seconds"] < first["seconds"] / 2
