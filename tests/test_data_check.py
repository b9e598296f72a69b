"""`vit data check`: what it finds, and that it finds all of it."""

import shutil

import numpy as np
import pytest
from command import Vit
from PIL import Image, ImageEnhance

from vitcli.data.duplicates import DISTANCE, difference_hash, groups, near_pairs


@pytest.fixture
def vit(capsys, monkeypatch):
    return Vit(capsys, monkeypatch)


def picture(seed: int, size: int = 96) -> Image.Image:
    """A smooth picture like no other."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture
def data(tmp_path):
    """Two classes, 12 images each to train on and 4 held out."""
    root = tmp_path / "data"
    for split, first, count in (("train", 0, 12), ("val", 100, 4)):
        for number, label in enumerate(("ant", "bee")):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                picture(first + 50 * number + i).save(root / split / label / f"{i}.jpg", quality=95)
    return root


def test_a_sound_data_set(data, vit, tmp_path):
    said = vit("data", "check", data, "--jobs", "1", "--json", "--histogram", tmp_path / "classes.png")
    assert said.code == 0, said.err
    found = said.json
    assert found["images"] == {"train": 24, "val": 8}
    assert found["classes"] == {"train": {"ant": 12, "bee": 12}, "val": {"ant": 4, "bee": 4}}
    assert set(found["counts"].values()) == {0}
    assert (found["modes"], found["formats"]) == ({"RGB": 32}, {"JPEG": 32})
    assert found["sizes"]["median"] == [96, 96]
    with Image.open(tmp_path / "classes.png") as drawn:
        assert drawn.size[0] > 500
        assert len(set(np.asarray(drawn.convert("L")).ravel().tolist())) > 20
    assert "32" in vit("data", "check", data, "--jobs", "1").out


def test_everything_wrong_is_found(data, vit):
    train, val = data / "train", data / "val"
    (train / "ant/broken.jpg").write_bytes((train / "ant/0.jpg").read_bytes()[:900])
    shutil.copy(train / "ant/1.jpg", val / "ant/same.jpg")  # a leak
    shutil.copy(train / "ant/2.jpg", train / "bee/other.jpg")  # a conflict
    with Image.open(train / "bee/3.jpg") as image:
        changed = ImageEnhance.Brightness(image.resize((128, 128))).enhance(1.1)
    changed.save(val / "bee/near.jpg", quality=60)  # a leak that no bytes tell
    picture(900).save(train / "bee/png.jpg", "PNG")
    picture(901).convert("CMYK").save(train / "bee/cmyk.jpg")
    picture(902, 16).save(train / "bee/small.jpg")
    picture(903).resize((400, 60)).save(train / "bee/long.jpg")
    for name in ("flat", "flatter"):
        Image.new("RGB", (64, 64), (len(name), 90, 90)).save(train / f"bee/{name}.png")  # alike, and no duplicates
    said = vit("data", "check", data, "--jobs", "1", "--json")
    assert said.code == 3
    assert "images that cannot be read" in said.err
    found = said.json
    expected = {"unreadable": 1, "odd": 4, "duplicates": 2, "near_duplicates": 1, "leaks": 2, "conflicts": 1}
    assert found["counts"] == expected
    assert "broken.jpg: broken image" in found["unreadable"][0]
    reasons = {line.rsplit("/", 1)[1] for line in found["odd"]}
    assert reasons == {
        "png.jpg: a PNG under the suffix .jpg",
        "cmyk.jpg: mode CMYK",
        "small.jpg: only 16x16 pixels",
        "long.jpg: longer than 4:1: 400x60",
    }
    leaks = {(held.rsplit("/", 1)[1], trained.rsplit("/", 1)[1], kind) for held, trained, kind in found["leaks"]}
    assert leaks == {("same.jpg", "1.jpg", "same bytes"), ("near.jpg", "3.jpg", "near")}
    assert [path.rsplit("/", 2)[1] for path in found["conflicts"][0]] == ["ant", "bee"]
    text = vit("data", "check", data, "--jobs", "2").out
    assert "held out and trained on\t2" in text
    assert "same.jpg" in text


def test_shards_and_built_in_sets_are_checked_too(data, vit, tmp_path):
    shutil.copy(data / "train/ant/1.jpg", data / "val/ant/same.jpg")
    assert vit("data", "pack", data, tmp_path / "out", "--jobs", "1").code == 0
    said = vit("data", "check", tmp_path / "out", "--jobs", "1", "--json")
    assert (said.code, said.json["counts"]["leaks"]) == (3, 1)
    assert "val-000000.tar/" in said.json["leaks"][0][0]
    assert vit("data", "check", "digits", "--jobs", "1", "--json").json["images"] == {"train": 1438, "val": 359}


def test_odd_class_names_can_be_drawn(tmp_path, vit):
    for label in ("$x^2$", "日本", "🐈", "esc\x1b[31m"):
        (tmp_path / "in" / label).mkdir(parents=True)
        picture(len(label)).save(tmp_path / "in" / label / "0.png")
    said = vit("data", "check", tmp_path / "in", "--jobs", "1", "--histogram", tmp_path / "h.png")
    assert "\x1b" not in said.out
    assert (tmp_path / "h.png").stat().st_size > 1000


def test_nothing_readable_is_told(tmp_path, vit):
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/a/0.jpg").write_bytes(b"broken")
    said = vit("data", "check", tmp_path / "in", "--jobs", "1", "--json")
    assert (said.code, said.json["counts"]["unreadable"]) == (3, 1)


@pytest.mark.parametrize("count", [0, 1, 2, 2000])
def test_near_pairs_are_those_of_comparing_all(count):
    rng = np.random.default_rng(count)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    if count > 2:  # each of the second half is one of the first with up to five bits changed
        for i in range(count // 2, count):
            changed = rng.choice(64, int(rng.integers(6)), replace=False)
            hashes[i] = hashes[i - count // 2] ^ np.bitwise_xor.reduce(np.uint64(1) << changed.astype(np.uint64))
    hashes = np.unique(hashes)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu(apart <= DISTANCE, 1))
    assert (near_pairs(hashes) == expected).all()
    assert len(near_pairs(hashes)) == len(expected)
    assert count < 2000 or 300 < len(expected) < 1000


def test_groups_are_what_is_connected():
    assert groups([(5, 3), (1, 2), (9, 3), (2, 7)]) == [[1, 2, 7], [3, 5, 9]]
    assert groups([]) == []


def test_the_hash_keeps_what_an_eye_keeps(shared):
    files = sorted((shared / "data/imagenet200").rglob("*.JPEG"))
    hashes = []
    for file in files:
        with Image.open(file) as image:
            rgb = image.convert("RGB")
        hashes.append(difference_hash(rgb))
        smaller = difference_hash(rgb.resize((rgb.width * 2 // 3, rgb.height * 2 // 3), Image.Resampling.BICUBIC))
        assert smaller is not None
        assert (hashes[-1] ^ smaller).bit_count() <= 4
    distinct = np.unique(np.array(hashes, dtype=np.uint64))
    assert len(distinct) == 200
    assert len(near_pairs(distinct)) == 0


@pytest.mark.slow
def test_a_million_hashes_are_compared_in_seconds():
    import time

    hashes = np.unique(np.random.default_rng(0).integers(0, 2**64, 1_000_000, dtype=np.uint64))
    begin = time.perf_counter()
    near_pairs(hashes)
    assert time.perf_counter() - begin < 60
