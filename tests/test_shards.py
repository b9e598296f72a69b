"""Tar shards: what they mean, what is wrong with them, where they are kept."""

import errno
import hashlib
import io
import json
import os
import random
import re
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from command import TINY, Vit, finish, process, sets
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from vitcli.data import DataConfig
from vitcli.data.images import BadImage
from vitcli.data.loader import fingerprint, train_batches
from vitcli.data.parallel import each
from vitcli.data.sources import _remote, shards
from vitcli.data.sources.folder import Folder
from vitcli.data.sources.shards import Shards
from vitcli.errors import DataError

BLOCK = tarfile.BLOCKSIZE


@pytest.fixture
def vit(capsys, monkeypatch):
    return Vit(capsys, monkeypatch)


def png(red: int = 0, size: int = 6) -> bytes:
    into = io.BytesIO()
    Image.new("RGB", (size, size), (red, 20, 30)).save(into, "PNG")
    return into.getvalue()


def write(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            header = tarfile.TarInfo(member[0])
            header.size = len(member[1])
            archive.addfile(header, io.BytesIO(member[1]))
    return path


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Images 0.png, 1.png, ... whose red is their number, with labels of three classes."""
    pairs = [((f"{i}.png", png(i)), (f"{i}.cls", str(i % 3).encode())) for i in range(first, first + count)]
    return [member for pair in pairs for member in pair]


def opened(root: Path, split="train", **settings):
    return Shards.parse({"path": str(root)} | settings).open(split)


def reds(dataset) -> list[int]:
    return [dataset.image(i).getpixel((0, 0))[0] for i in range(len(dataset))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders with 18 images to train on and 6 held out."""
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.png").write_bytes(png(40 * label + i, size=16))
    return root


def test_a_packed_folder_holds_the_same_bytes_under_the_same_classes(folder, tmp_path, vit):
    said = vit("data", "pack", folder, tmp_path / "out", "--per-shard", "4", "--jobs", "1", "--json")
    assert said.code == 0, said.err
    assert (said.json["images"], said.json["classes"], said.json["shards"]) == (24, 3, 5 + 2)
    for split in ("train", "val"):
        packed, loose = opened(tmp_path / "out", split), Folder(path=str(folder)).open(split)
        assert packed.classes == loose.classes == ("ant", "bee", "cat")
        order = [reds(loose).index(red) for red in reds(packed)]
        assert sorted(order) == list(range(len(loose)))
        assert order != sorted(order)  # shuffled
        for i, j in enumerate(order):
            assert packed.read(i) == loose.read(j)
            assert packed.labels[i] == loose.labels[j]
    listed = opened(tmp_path / "out")
    for file in (tmp_path / "out").glob("train-*.json"):
        file.unlink()
    scanned = opened(tmp_path / "out")  # the lists only say what the tars hold
    assert fingerprint(scanned) == fingerprint(listed)
    with tarfile.open(tmp_path / "out/train-000000.tar") as archive:
        assert [name.split(".")[1] for name in archive.getnames()] == ["png", "cls"] * 4


def test_a_pack_goes_on_behind_the_shards_that_are_whole(folder, tmp_path, vit):
    out, pack = (
        tmp_path / "out",
        ("data", "pack", folder, tmp_path / "out", "--per-shard", "4", "--jobs", "1", "--json"),
    )
    vit(*pack)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (out / "train-000001.json").unlink()  # killed between the tar and its list
    (out / "train-000003.tar").write_bytes(before["train-000003.tar"][:1000])
    (out / ".tmp-train-000001.tar").write_bytes(b"left over")
    untouched = (out / "train-000000.tar").stat().st_mtime_ns
    said = vit(*pack)
    assert (said.code, said.json["found"], said.json["shards"]) == (0, 5, 7)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert (out / "train-000000.tar").stat().st_mtime_ns == untouched
    said = vit("data", "pack", folder, out, "--per-shard", "5")
    assert said.code == 3
    assert "holds shards of other images or settings" in said.err


def test_large_images_are_shrunk_and_broken_ones_left_out(tmp_path, vit):
    (tmp_path / "in/a").mkdir(parents=True)
    Image.effect_noise((400, 200), 50).convert("RGB").save(tmp_path / "in/a/0.png")
    Image.new("RGB", (64, 32), "red").save(tmp_path / "in/a/1.png")
    (tmp_path / "in/a/2.jpg").write_bytes(b"broken")
    said = vit(
        "data", "pack", tmp_path / "in", tmp_path / "out", "--max-side", "100", "-q", "80", "--jobs", "2", "--json"
    )
    assert said.code == 1
    assert "2.jpg: not an image" in said.err
    assert (said.json["images"], len(said.json["bad"])) == (2, 1)
    dataset = opened(tmp_path / "out")
    found = {dataset.path(i).rsplit(".")[-1]: dataset.image(i).size for i in range(2)}
    assert found == {"jpg": (100, 50), "png": (64, 32)}
    said = vit("data", "pack", tmp_path / "in", tmp_path / "other", "-q", "80")
    assert (said.code, "--max-side" in said.err) == (2, True)


def test_processes_pack_the_same_bytes(folder, tmp_path, vit):
    for jobs in (1, 2):
        assert vit("data", "pack", folder, tmp_path / str(jobs), "--per-shard", "4", "--jobs", jobs).code == 0
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / str(jobs)).iterdir()} for jobs in (1, 2))
    assert first == second
    assert len(first) == 16


def test_labels_are_numbers_names_or_json(tmp_path):
    numbers = write(tmp_path / "numbers/train-0.tar", *samples(7)).parent
    assert opened(numbers).classes == ("0", "1", "2")
    assert opened(numbers).labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    assert opened(numbers, classes=str(tmp_path / "names.txt")).classes == ("ant", "bee", "cat")
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match=r"train-0.tar/2.png: its label '2' is none of the 2 classes"):
        opened(numbers, classes=str(tmp_path / "names.txt"))

    write(
        tmp_path / "named/train-0.tar", ("a.png", png(1)), ("a.cls", b"zebra\n"), ("b.png", png(2)), ("b.cls", b"ape")
    )
    write(tmp_path / "named/val-0.tar", ("c.png", png(3)), ("c.cls", b"zebra"))
    assert (opened(tmp_path / "named").classes, opened(tmp_path / "named").labels.tolist()) == (
        ("ape", "zebra"),
        [1, 0],
    )
    assert opened(tmp_path / "named", "val").labels.tolist() == [1]
    write(tmp_path / "named/val-0.tar", ("c.png", png(3)), ("c.cls", b"gnu"))
    with pytest.raises(DataError, match=r"val-0.tar/c.png: its label 'gnu' is none of the 2 classes"):
        opened(tmp_path / "named", "val")

    described = [("a.jpg", png(1)), ("a.json", b'{"species": 1}'), ("b.jpg", png(2)), ("b.json", b'{"species": 0}')]
    write(tmp_path / "json/train-0.tar", *described)
    assert opened(tmp_path / "json", json_label="species").labels.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"no label for 'a.jpg'"):
        opened(tmp_path / "json")


def test_class_tars_as_imagenet_21k_is_published(tmp_path, vit):
    for number, wnid in enumerate(("n00004475", "n00005787")):
        write(tmp_path / f"in/{wnid}.tar", *[(f"{wnid}_{i}.JPEG", png(10 * number + i)) for i in range(4)])
    source = {"train": "*.tar", "val": 0.25, "class_tars": True}
    train, val = (opened(tmp_path / "in", split, **source) for split in ("train", "val"))
    assert train.classes == val.classes == ("n00004475", "n00005787")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1])
    assert sorted(reds(train) + reds(val)) == [0, 1, 2, 3, 10, 11, 12, 13]
    assert vit("data", "pack", tmp_path / "in", tmp_path / "out", "--jobs", "1").code == 0
    assert opened(tmp_path / "out").classes == train.classes


def test_names_are_spelt_with_stars_and_ranges(tmp_path):
    for number in range(12):
        write(tmp_path / f"x-{number:02}.tar", *samples(1, first=number))
    assert reds(opened(tmp_path, train="x-{03..06}.tar")) == [3, 4, 5, 6]
    assert reds(opened(tmp_path, train="x-{03..05}.tar", val="x-1*.tar", split="val")) == [10, 11]
    assert reds(opened(tmp_path, train="x-0{1,7}.tar")) == [1, 7]
    with pytest.raises(DataError, match=r"x-12.tar' cannot be read: No such file"):
        opened(tmp_path, train="x-{10..12}.tar")
    with pytest.raises(DataError, match="has no shards 'train-"):
        opened(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        opened(tmp_path / "pipe:touch x")


@pytest.mark.parametrize("words", [("check",), ("pack", "out")])
def test_without_shards_of_the_usual_names_it_says_how_to_name_them(tmp_path, vit, words):
    write(tmp_path / "x-0.tar", *samples(1))
    name, *out = words
    said = vit("data", name, f"file://{tmp_path}", *(tmp_path / place for place in out))
    assert said.code == 3
    assert "has no shards 'train-*.tar'" in said.err
    assert "hint: name them: --set data.source.train='*.tar'" in said.err


def test_members_need_not_be_neighbours_and_other_kinds_are_counted(tmp_path):
    marker = tmp_path / "executed"
    payload = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    others = [(f"{key}.{kind}", payload) for key in "ab" for kind in ("pkl", "pyd", "pth", "txt")]
    members = [("a.png", png(1)), ("b.cls", b"1"), *others, ("b.png", png(2)), ("a.seg.png", png(9)), ("a.cls", b"0")]
    write(tmp_path / "train-0.tar", *members)
    dataset = opened(tmp_path)
    assert (reds(dataset), dataset.labels.tolist()) == ([1, 2], [0, 1])
    assert "2 .pkl" in dataset.notes[0]
    assert "1 .seg.png" in dataset.notes[0]
    assert not marker.exists()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, link
    return header


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_members_are_read_in_place_and_never_made(tmp_path, form):
    long = "d/" * 90 + "x" * 100
    members = [
        ("../../outside.png", png(1)),
        ("../../outside.cls", b"0"),
        ("/etc/absolute.png", png(2)),
        ("/etc/absolute.cls", b"1"),
        (f"{long}.png", png(3)),
        (f"{long}.cls", b"2"),
        special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("link.cls", tarfile.LNKTYPE, "../../outside.cls"),
        special("device.png", tarfile.CHRTYPE),
        special("fifo.png", tarfile.FIFOTYPE),
        special("folder.png", tarfile.DIRTYPE),
    ]
    write(tmp_path / "deep/er/train-0.tar", *members, form=form)
    before = sorted(tmp_path.rglob("*"))
    dataset = opened(tmp_path / "deep/er")
    assert (reds(dataset), dataset.labels.tolist()) == ([1, 2, 3], [0, 1, 2])
    assert dataset.path(2).endswith(f"train-0.tar/{long}.png")
    assert "5 no plain file" in dataset.notes[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sparse_member_costs_its_sample_only(tmp_path):
    path = write(tmp_path / "train-0.tar", *samples(3))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        at = archive.getmember("1.png").offset
    content[at + 156 : at + 157] = b"S"
    header = content[at : at + BLOCK]
    header[148:156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"damaged at byte {at}: the member '1.png' of a kind not understood; 1 samples"
    ):
        opened(tmp_path)
    assert reds(opened(tmp_path, broken="skip")) == [0, 2]


@pytest.mark.parametrize("size", ["-0000001000", "77777777777", "\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"])
def test_impossible_sizes_end_nothing_but_the_shard(tmp_path, size):
    path = write(tmp_path / "train-0.tar", *samples(3))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        at = archive.getmember("1.cls").offset
    content[at + 124 : at + 136] = size.encode("latin-1").ljust(12, b"\0")
    header = content[at : at + BLOCK]
    header[148:156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"damaged at byte {at}"):
        opened(tmp_path)
    assert 1 not in reds(opened(tmp_path, broken="skip"))


def test_wherever_a_shard_is_cut_it_is_named_and_the_whole_samples_stay(tmp_path):
    path = write(tmp_path / "train-0.tar", *samples(8))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        ends = [archive.getmember(f"{i}.cls").offset_data + 1 for i in range(8)]
        last = archive.offset
    for cut in np.linspace(BLOCK + 1, last - 1, 200).astype(int).tolist():
        path.write_bytes(whole[:cut])
        with pytest.raises(
            DataError, match=rf"train-0.tar: damaged at byte \d+: .*{cut}.*unknown number of samples lost"
        ):
            opened(tmp_path)
        expected = [i for i, end in enumerate(ends) if end <= cut]
        if not expected:
            with pytest.raises(DataError, match="hold no images with labels"):
                opened(tmp_path, broken="skip")
            continue
        dataset = opened(tmp_path, broken="skip")
        assert reds(dataset) == expected
        assert str(cut) in dataset.notes[0]


def test_the_list_of_a_packed_shard_tells_how_many_samples_are_lost(folder, tmp_path, vit):
    vit("data", "pack", folder, tmp_path / "out", "--jobs", "1")
    path = tmp_path / "out/train-000000.tar"
    whole, told = path.read_bytes(), json.loads((tmp_path / "out/train-000000.json").read_bytes())["samples"]
    for cut in np.linspace(BLOCK, len(whole) - 1, 50).astype(int).tolist():
        path.write_bytes(whole[:cut])
        left = sum(offset + size <= cut for _, offset, size, *_ in told)
        with pytest.raises(DataError, match=rf"damaged at byte {cut}: .*; {18 - left} samples lost"):
            opened(tmp_path / "out")
        if left:
            assert len(opened(tmp_path / "out", broken="skip")) == left
    path.write_bytes(whole)
    dataset = opened(tmp_path / "out")
    path.write_bytes(whole[:1200])  # while it is in use
    with pytest.raises(BadImage, match=r"train-000000.tar/\d+.png: the shard ends at byte 1200"):
        dataset.read(17)


def test_a_flipped_bit_of_a_header_costs_one_sample(tmp_path):
    path = write(tmp_path / "train-0.tar", *samples(8))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        headers = {member.name: member.offset for member in archive}
    rng = np.random.default_rng(0)
    for name, at in headers.items():
        for _ in range(6):
            content = bytearray(whole)
            content[at + int(rng.integers(500))] ^= 1 << int(rng.integers(8))
            path.write_bytes(content)
            with pytest.raises(DataError, match=rf"train-0.tar: damaged at byte {at}: no header.*; 1 samples lost"):
                opened(tmp_path)
            left = reds(opened(tmp_path, broken="skip"))
            assert left == [i for i in range(8) if i != int(name.split(".")[0])]


def test_samples_that_are_not_whole_are_counted(tmp_path):
    twice = [*samples(3), ("1.png", png(7)), ("1.cls", b"2")]
    write(tmp_path / "twice/train-0.tar", *twice)
    with pytest.raises(DataError, match=r"'1.png' is there twice"):
        opened(tmp_path / "twice")
    assert reds(opened(tmp_path / "twice", broken="skip")) == [0, 1, 2]

    write(tmp_path / "alone/train-0.tar", *samples(3), ("x.png", png(7)), ("y.cls", b"2"), ("z.json", b"[]"))
    with pytest.raises(DataError, match=r"no label for 'x.png'; 3 samples lost"):
        opened(tmp_path / "alone")
    assert reds(opened(tmp_path / "alone", broken="skip")) == [0, 1, 2]

    (tmp_path / "twice/train-0.tar").write_bytes(b"no tar at all" * 500)
    with pytest.raises(DataError, match="damaged at byte 0: no header"):
        opened(tmp_path / "twice")


def test_a_forged_list_is_not_believed(folder, tmp_path, vit):
    vit("data", "pack", folder, tmp_path, "--jobs", "1")
    expected = reds(opened(tmp_path))
    for forged in (
        '{"samples": [["x", -5, 3, 0]], "size": 1}',
        "[" * 100_000,
        '{"samples": 3}',
        '{"samples": [[1, 2]]}',
    ):
        (tmp_path / "train-000000.json").write_text(forged)
        assert reds(opened(tmp_path)) == expected
    (tmp_path / "index.json").write_text('{"classes": [1, 2]}')
    with pytest.raises(DataError, match="names no classes"):
        opened(tmp_path)


def test_a_large_index_is_kept_and_made_again_when_a_shard_changes(tmp_path, monkeypatch, cache):
    for number in range(3):
        write(tmp_path / f"train-{number}.tar", *samples(4, first=4 * number))
    monkeypatch.setattr(shards, "LARGE", 1)
    first = opened(tmp_path)
    assert first.index.place.is_relative_to(cache)
    assert first.index.__reduce__()[1] == (first.index.place, first.index.facts)  # a place goes to loader processes
    looked = []
    scan = shards.scan
    monkeypatch.setattr(shards, "scan", lambda *args: looked.append(args) or scan(*args))
    again = opened(tmp_path)
    assert (looked, reds(again), fingerprint(again)) == ([], reds(first), fingerprint(first))
    write(tmp_path / "train-1.tar", *samples(5, first=100))
    assert reds(opened(tmp_path))[4:9] == [100, 101, 102, 103, 104]
    assert len(looked) == 3


def batches(root: Path, workers: int, start: int = 0) -> list:
    data = DataConfig.parse({"source": {"name": "shards", "path": str(root)}, "res": 6, "workers": workers})
    return list(train_batches(data, data.source.open("train"), batch=8, seed=1, start=start, steps=8))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_training_goes_on_at_any_sample_with_any_number_of_workers(tmp_path, monkeypatch, workers):
    for number in range(4):
        write(tmp_path / f"train-{number}.tar", *samples(8, first=8 * number))
    monkeypatch.setattr(shards, "LARGE", 1)
    for expected, found in zip(batches(tmp_path, 0)[3:], batches(tmp_path, workers, start=3), strict=True):
        assert (expected["images"] == found["images"]).all()
        assert (expected["labels"] == found["labels"]).all()


def test_other_processes_read_the_index_from_disk(tmp_path, monkeypatch):
    write(tmp_path / "train-0.tar", *samples(8))
    for large in (100, 1):
        monkeypatch.setattr(shards, "LARGE", large)
        dataset = opened(tmp_path)
        assert (dataset.index.place is None) == (large == 100)
        assert set(each(dataset.read, range(8), jobs=2)) == {dataset.read(i) for i in range(8)}


def fetched(monkeypatch) -> list[str]:
    """The names of the shards that are fetched from now on."""
    names = []
    fetch = _remote._fetch

    def counted(shard, *rest):
        names.append(os.path.basename(shard.name))
        return fetch(shard, *rest)

    monkeypatch.setattr(_remote, "_fetch", counted)
    return names


def test_shards_of_a_url_are_fetched_once_an_epoch_and_the_cache_stays_small(tmp_path, monkeypatch, cache):
    for number in range(24):
        write(tmp_path / f"train-{number:02}.tar", *samples(10, first=10 * number))
    size = (tmp_path / "train-00.tar").stat().st_size
    source = Shards.parse({"path": f"file://{tmp_path}", "cache_gb": 8.5 * size / 1e9})
    dataset = source.open("train")
    assert (len(dataset), dataset.window) == (240, 4)
    names, held, seen = fetched(monkeypatch), [], []
    for epoch in range(2):
        order = dataset.order(np.random.default_rng(epoch), np.arange(240))
        assert sorted(order.tolist()) == list(range(240))
        for index in order:
            seen.append(dataset.image(int(index)).getpixel((0, 0))[0])
            held.append(sum(file.stat().st_size for file in (cache / "shards").glob("*.tar")))
    assert seen[:240] != seen[240:]
    assert len(set(seen)) == 240
    assert max(held) <= 8.5 * size
    assert 2 * 24 - 8 <= len(names) <= 2 * 24
    neighbours = dataset.index["shards"][order]
    assert max(len(set(neighbours[i : i + 10].tolist())) for i in range(0, 230, 10)) > 2  # mixed across shards
    write(tmp_path / "train-07.tar", *samples(10, first=15))
    again = source.open("train")  # a shard that changed is fetched again
    assert reds(again)[70:80] == list(range(15, 25))


def test_a_url_says_what_is_wrong(tmp_path, monkeypatch):
    write(tmp_path / "train-0.tar", *samples(3))
    with pytest.raises(DataError, match="does not hold two shards") as caught:
        opened(f"file://{tmp_path}", cache_gb=1e-6)
    assert "data.source.cache_gb" in caught.value.hint
    for url, message in {
        "nonsense://x": "nonsense",
        f"simplecache::file://{tmp_path}": "chained",
        f"file://{tmp_path}/nowhere": "has no shards",
    }.items():
        with pytest.raises(DataError, match=message):
            opened(url)
    with pytest.raises(DataError, match="cannot be read"):
        opened(f"file://{tmp_path}", train="train-{0..1}.tar")
    dataset = opened(f"file://{tmp_path}", cache_gb=1.0)
    (tmp_path / "train-0.tar").rename(tmp_path / "moved.tar")
    dataset.cache.open(dataset.shards[0])  # it is here
    forget()
    with pytest.raises(DataError, match=r"train-0.tar cannot be read: not found"):
        dataset.read(1)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match="s3://a/b cannot be read") as caught:
        opened("s3://a/b")
    assert caught.value.hint == "pip install s3fs"


def forget() -> None:
    """Remove all that was fetched."""
    for file in (_remote.index.folder() / "shards").glob("*.tar"):
        file.unlink()


def test_a_check_of_a_url_without_shards_says_so(tmp_path, vit):
    said = vit("data", "check", f"file://{tmp_path}")
    assert (said.code, "has no shards 'train-*.tar'" in said.err) == (3, True)


def failing(monkeypatch, name: str, error: Exception, times: int) -> None:
    """Let a method of fsspec's local files fail so often."""
    method, left = getattr(LocalFileSystem, name), [error] * times

    def fail(*args: object, **options: object) -> object:
        if left:
            raise left.pop()
        return method(*args, **options)

    monkeypatch.setattr(LocalFileSystem, name, fail)


def test_a_server_that_fails_for_a_while_is_asked_again(folder, tmp_path, monkeypatch, vit):
    vit("data", "pack", folder, tmp_path, "--jobs", "1")
    monkeypatch.setattr(_remote, "PAUSE", 0.0)
    failing(monkeypatch, "cat_file", OSError("503 Slow Down"), times=3)
    failing(monkeypatch, "get_file", TimeoutError(), times=3)
    dataset = opened(f"file://{tmp_path}")
    assert dataset.classes == ("ant", "bee", "cat")  # not what they are without index.json
    assert len(reds(dataset)) == 18


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError("503 Slow\nDown"), "503 Slow Down"), (OSError("Forbidden: x"), "Forbidden"), (TimeoutError(), "Timeout")],
)
def test_a_server_that_fails_for_good_is_told(folder, tmp_path, monkeypatch, vit, error, told):
    vit("data", "pack", folder, tmp_path, "--jobs", "1")
    monkeypatch.setattr(_remote, "PATIENCE", 0.0)
    failing(monkeypatch, "get_file", error, times=1)
    said = vit("data", "check", f"file://{tmp_path}", "--jobs", "1")
    assert said.code == 3
    first, second = said.err.splitlines()
    assert re.fullmatch(rf"error: .*000000.tar cannot be read: {told}.*", first)
    assert second == "hint: check the network and your credentials"
    assert not list((_remote.index.folder() / "shards").glob(".tmp-*"))


def test_a_full_disk_is_not_the_servers_fault(folder, tmp_path, monkeypatch, vit):
    vit("data", "pack", folder, tmp_path, "--jobs", "1")
    failing(monkeypatch, "get_file", OSError(errno.ENOSPC, "No space left on device"), times=1)
    said = vit("data", "check", f"file://{tmp_path}", "--jobs", "1")
    assert said.code == 74
    assert "cannot keep" in said.err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_out_of_reach_is_no_bad_image(tmp_path, workers):
    write(tmp_path / "train-0.tar", *samples(8))
    source = {"name": "shards", "path": f"file://{tmp_path}"}
    data = DataConfig.parse({"source": source, "res": 6, "workers": workers, "bad_images": 1.0})
    dataset = data.source.open("train")
    (tmp_path / "train-0.tar").unlink()
    forget()
    with pytest.raises(DataError, match=r"^file://\S*train-0.tar cannot be read: not found \(.*\)$"):
        list(train_batches(data, dataset, batch=8, seed=1, start=0, steps=1))


def test_a_fetched_shard_is_held_against_its_list(folder, tmp_path, monkeypatch, vit):
    monkeypatch.setattr(_remote, "PATIENCE", 0.0)
    vit("data", "pack", folder, tmp_path, "--jobs", "1")
    dataset = opened(f"file://{tmp_path}")
    assert dataset.classes == ("ant", "bee", "cat")
    assert len(reds(dataset)) == 18
    forget()
    content = bytearray((tmp_path / "train-000000.tar").read_bytes())
    content[700] ^= 1
    (tmp_path / "train-000000.tar").write_bytes(content)
    with pytest.raises(DataError, match="SHA-256 is not the one in its list"):
        opened(f"file://{tmp_path}").read(0)


def test_a_shard_that_another_process_deletes_at_once_is_read(tmp_path, monkeypatch):
    write(tmp_path / "train-0.tar", *samples(3))
    dataset = opened(f"file://{tmp_path}", cache_gb=1.0)
    for file in (_remote.index.folder() / "shards").glob("*.tar"):
        file.unlink()
    monkeypatch.setattr(Path, "replace", lambda here, there: os.replace(here, there) or os.unlink(there))
    assert reds(dataset) == [0, 1, 2]


def test_training_and_scoring_on_shards(folder, tmp_path, monkeypatch, vit):
    monkeypatch.chdir(tmp_path)
    assert vit("data", "pack", folder, "out", "--jobs", "1").code == 0
    data = f"data={{source: {{name: shards, path: {tmp_path}/out}}, res: 8, resize: null, classes: 3}}"
    said = vit("pretrain", "quickstart", *sets(data, *TINY, "batch=6", "steps=8"), "--run", "run", "--json")
    assert said.code == 0, said.err
    assert said.json["best_score"] is not None
    loose, packed = (vit("eval", "--ckpt", "run", "--data", place, "--json").json for place in (folder, "out"))
    assert (packed["images"], packed["top1"]) == (6, loose["top1"])
    assert packed["loss"] == pytest.approx(loose["loss"], abs=1e-6)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one to three flips, cuts, insertions, or blocks in another order."""
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(changed)))
        match int(rng.integers(6)):
            case 0:
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                del changed[at : at + int(rng.integers(1, 2000))]
            case 2:
                changed[at:at] = rng.bytes(int(rng.integers(1, 1500)))
            case 3:
                changed[at:] = b""
            case 4:
                start = at // BLOCK * BLOCK
                other = int(rng.integers(len(changed))) // BLOCK * BLOCK
                block = changed[start : start + BLOCK]
                changed[start : start + BLOCK], changed[other : other + BLOCK] = changed[other : other + BLOCK], block
            case 5:
                start = at // BLOCK * BLOCK  # a field of a header, with a checksum that is right
                changed[start + 100 : start + 160] = rng.choice([*b"01234567 \0-7L"], 60).astype(np.uint8).tobytes()
                header = changed[start : start + BLOCK]
                if len(header) == BLOCK:
                    header[148:156] = b" " * 8
                    changed[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def test_a_check_names_every_damaged_shard(folder, tmp_path, vit):
    vit("data", "pack", folder, tmp_path, "--per-shard", "4", "--jobs", "1")
    paths = [tmp_path / f"train-00000{number}.tar" for number in range(5)]
    paths[1].write_bytes(paths[1].read_bytes()[:2000])
    content = bytearray(paths[3].read_bytes())
    content[-1] ^= 1  # behind the end mark, where no header and no image is
    paths[3].write_bytes(content)
    said = vit("data", "check", tmp_path, "--jobs", "1", "--json")
    assert said.code == 3
    first, second = said.json["damaged"]
    assert "train-000001.tar: damaged at byte 2000" in first
    assert "3 samples lost" in first
    assert "train-000003.tar: its SHA-256 is not the one in its list" in second
    assert said.json["counts"]["unreadable"] == 0


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_whatever_happens_to_a_shard_it_is_used_or_refused(tmp_path, count):
    path = write(tmp_path / "in/train-0.tar", *samples(5), form=tarfile.PAX_FORMAT)
    whole, rng, ends = path.read_bytes(), np.random.default_rng(count), {"refused": 0, "used": 0, "bad": 0}
    for _ in range(count):
        path.write_bytes(mutated(whole, rng))
        for broken in ("error", "skip"):
            told = ""
            try:
                dataset = opened(tmp_path / "in", broken=broken)
            except DataError as error:
                told = str(error)
            if told:
                assert "train-0.tar" in told or "hold no images" in told
                ends["refused"] += 1
                continue
            ends["used"] += 1
            assert len(dataset) <= 5
            for i in range(len(dataset)):
                try:
                    dataset.image(i)
                except BadImage as error:
                    told = error.path
                    ends["bad"] += 1
                assert told in ("", dataset.path(i))
                told = ""
    assert min(ends.values()) > count / 40
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "train-0.tar"]


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_pack_leaves_nothing_half_and_goes_on(folder, tmp_path, kills):
    pack = ("data", "pack", folder, tmp_path / "out", "--per-shard", "1", "--jobs", "1")
    rng = np.random.default_rng(kills)
    assert finish(process("data", "pack", folder, tmp_path / "whole", "--per-shard", "1", cwd=tmp_path)).code == 0
    for _ in range(kills):
        started = process(*pack, cwd=tmp_path)
        begin = time.monotonic()
        while not list(tmp_path.glob("out/*.json")) and time.monotonic() - begin < 30:
            time.sleep(0.001)
        time.sleep(float(rng.random()) * 0.02)
        started.kill()
        finish(started)
        for listing in (tmp_path / "out").glob("[tv]*.json"):
            tar, told = listing.with_suffix(".tar"), json.loads(listing.read_bytes())
            assert hashlib.sha256(tar.read_bytes()).hexdigest() == told["sha256"]
    assert finish(process(*pack, cwd=tmp_path)).code == 0
    left, expected = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("out", "whole")
    )
    assert left == expected


@pytest.mark.parametrize("times", [2, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_pack_ends_its_processes(folder, tmp_path, number, times):
    chance = random.Random(times)
    for turn in range(times):
        out = tmp_path / f"out{turn}"
        started = process("data", "pack", folder, out, "--per-shard", "1", "--jobs", "2", cwd=tmp_path)
        while not (out / ".lock").exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.25))
        started.send_signal(number)
        said = finish(started)  # which waits for all that hold its stderr
        assert said.code in (0, 130 if number == signal.SIGINT else -signal.SIGTERM)
        assert "Traceback" not in said.err


def test_two_processes_share_the_cache(tmp_path, cache):
    for number in range(6):
        write(tmp_path / f"train-{number}.tar", *samples(5, first=5 * number))
    size = (tmp_path / "train-0.tar").stat().st_size
    dataset = opened(f"file://{tmp_path}", cache_gb=2.5 * size / 1e9)
    order = np.random.default_rng(0).integers(0, 30, 120).tolist()
    read = list(each(dataset.image, order, jobs=2))
    assert sorted(image.getpixel((0, 0))[0] for image in read) == sorted(order)
    assert len(list((cache / "shards").glob("*.tar"))) <= 3


@pytest.mark.slow
def test_the_21843_class_tars_of_imagenet_21k(tmp_path, vit):
    content = png(7)
    for number in range(21_843):
        wnid = f"n{number:08}"
        write(tmp_path / f"in/{wnid}.tar", (f"{wnid}_0.JPEG", content), (f"{wnid}_1.JPEG", content))
    said = vit("data", "pack", tmp_path / "in", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    assert (said.json["images"], said.json["classes"], said.json["shards"]) == (43_686, 21_843, 44)
    dataset = opened(tmp_path / "out")
    assert dataset.classes == tuple(f"n{number:08}" for number in range(21_843))
    assert np.bincount(dataset.labels).tolist() == [2] * 21_843
    picture = tmp_path / "classes.png"
    said = vit("data", "check", tmp_path / "out", "--json", "--histogram", picture)
    assert said.code == 3  # all are the same image
    assert said.json["counts"]["conflicts"] == 1
    assert picture.stat().st_size > 1000


@pytest.fixture
def bucket(monkeypatch):
    """S3's API on this machine, with a bucket; the environment points there."""
    s3fs = pytest.importorskip("s3fs", reason="pip install s3fs")
    server = pytest.importorskip("moto.server", reason='pip install "moto[server]"').ThreadedMotoServer(port=0)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    server.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # theirs
def test_training_and_scoring_on_s3(folder, tmp_path, bucket, vit):
    import s3fs

    assert vit("data", "pack", folder, tmp_path / "out", "--per-shard", "4", "--jobs", "1").code == 0
    s3fs.S3FileSystem().put(f"{tmp_path}/out/", f"{bucket}/out/", recursive=True)
    assert vit("data", "check", f"{bucket}/out", "--json").json["images"] == {"train": 18, "val": 6}
    scores = []
    for place in (f"file://{tmp_path}/out", f"{bucket}/out"):
        data = f"data={{source: {{name: shards, path: '{place}'}}, res: 8, resize: null, classes: 3}}"
        run = tmp_path / f"run{len(scores)}"
        said = vit("pretrain", "quickstart", *sets(data, *TINY, "batch=6", "steps=8"), "--run", run, "--json")
        assert said.code == 0, said.err
        scores.append((said.json["best_score"], (run / "last/model.safetensors").read_bytes()))
    assert scores[0] == scores[1]
    said = vit("eval", "--ckpt", tmp_path / "run1", "--json")
    assert (said.code, said.json["images"]) == (0, 6)
    for url, message in {f"{bucket}/none": "has no shards", "s3://none/out": "bucket does not exist"}.items():
        said = vit("data", "check", url)
        assert (said.code, message in said.err, len(said.err.splitlines())) == (3, True, 2)
