import json
import os
import shutil
import socket
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from vitcli.data import imagenet
from vitcli.data.images import BadImage
from vitcli.data.loader import fingerprint
from vitcli.data.sources import AnySource
from vitcli.data.sources._split import Subset
from vitcli.data.sources.digits import Digits
from vitcli.data.sources.folder import Folder
from vitcli.data.sources.torchvision import SPLITS, Torchvision
from vitcli.errors import DataError


def fill(folder: Path, count: int = 2, name: str = "{}.png", colour: tuple[int, int, int] = (9, 9, 9)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (4, 4), colour).save(folder / name.format(i))
    return folder


def names(dataset):
    root = dataset.whole.root if isinstance(dataset, Subset) else dataset.root
    return [os.path.relpath(dataset.path(i), root) for i in range(len(dataset))]


def test_sources_are_found_by_their_files():
    adapter = TypeAdapter(AnySource)
    assert adapter.validate_python("digits") == Digits()
    assert adapter.validate_python({"name": "folder", "path": "x"}) == Folder(path="x")
    assert adapter.validate_python({"name": "torchvision", "dataset": "CIFAR10"}).root == "data"


def test_digits():
    train, val = Digits().open("train"), Digits().open("val")
    assert (len(train), len(val)) == (1438, 359)
    assert train.classes == tuple("0123456789")
    assert train.in_memory
    image = val.image(0)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert (np.asarray(image)[..., 0] == np.round(digits.images[4] * 255 / 16)).all()
    assert val.labels[0] == digits.target[4]
    assert np.concatenate([train.labels, val.labels]).sum() == digits.target.sum()
    assert fingerprint(train) != fingerprint(val)


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_train_and_held_out_folders(tmp_path, held_out):
    for split, count in (("train", 3), (held_out, 2)):
        for label in ("b", "a", "c"):
            fill(tmp_path / split / label, count)
    source = Folder(path=str(tmp_path))
    train, val = source.open("train"), source.open("val")
    assert train.classes == val.classes == ("a", "b", "c")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert names(val) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "c/0.png", "c/1.png"]
    assert train.labels.dtype == np.int64
    assert train.image(0).size == (4, 4)
    assert names(source.open_for_scoring()) == names(val)


def test_val_classes_meet_train_classes_by_name(tmp_path):
    for label in ("ant", "bee", "cat"):
        fill(tmp_path / "train" / label)
    fill(tmp_path / "val" / "cat", 1)
    (tmp_path / "val" / "bee").mkdir()
    val = Folder(path=str(tmp_path)).open("val")
    assert (val.classes, val.labels.tolist()) == (("ant", "bee", "cat"), [2])


def test_a_class_only_in_val_is_named(tmp_path):
    fill(tmp_path / "train" / "ant")
    fill(tmp_path / "val" / "aunt")
    with pytest.raises(DataError, match="'aunt'"):
        Folder(path=str(tmp_path)).open("val")


def test_a_share_is_held_out_of_each_class(tmp_path):
    fill(tmp_path / "a", 20)
    fill(tmp_path / "b", 10)
    fill(tmp_path / "c", 1)
    source = Folder(path=str(tmp_path), val=0.1)
    train, val = source.open("train"), source.open("val")
    assert val.labels.tolist() == [0, 0, 1]
    assert sorted(names(train) + names(val)) == sorted(names(Folder(path=str(tmp_path)).open("train")))
    assert names(source.open("val")) == names(val)
    for index in range(len(val)):
        assert val.path(index).split("/")[-2] == val.classes[val.labels[index]]
    before = names(val)
    fill(tmp_path / "b", 14)
    assert names(source.open("val"))[:2] == before[:2]  # other classes keep their images


def test_without_anything_held_out_val_says_what_to_do(tmp_path):
    fill(tmp_path / "a")
    with pytest.raises(DataError, match="no folder val, validation or test") as caught:
        Folder(path=str(tmp_path)).open("val")
    assert "data.source.val=0.1" in caught.value.hint
    assert len(Folder(path=str(tmp_path)).open_for_scoring()) == 2
    fill(tmp_path / "only" / "val" / "a")
    with pytest.raises(DataError, match="no folder train"):
        Folder(path=str(tmp_path / "only")).open("train")
    assert len(Folder(path=str(tmp_path / "only")).open("val")) == 2


def test_a_class_may_be_called_train(tmp_path):
    for label in ("bus", "car", "train", "test"):
        fill(tmp_path / label)
    assert Folder(path=str(tmp_path)).open("train").classes == ("bus", "car", "test", "train")


def test_only_visible_image_files_count(tmp_path):
    fill(tmp_path / "a", 2)
    fill(tmp_path / "a" / "deeper" / "still", 1)
    fill(tmp_path / "a" / ".thumbnails")
    fill(tmp_path / ".ipynb_checkpoints")
    fill(tmp_path / "a", 1, "._{}.png")
    shutil.copy(tmp_path / "a/0.png", tmp_path / "a/UPPER.PNG")
    shutil.copy(tmp_path / "a/0.png", tmp_path / "at_root.png")
    (tmp_path / "a/notes.txt").write_text("x")
    (tmp_path / "readme.md").write_text("x")
    dataset = Folder(path=str(tmp_path)).open("train")
    assert dataset.classes == ("a",)
    assert names(dataset) == ["a/0.png", "a/1.png", "a/UPPER.PNG", "a/deeper/still/0.png"]


def test_what_is_no_file_is_a_bad_image_when_read(tmp_path):
    fill(tmp_path / "a", 1)
    os.mkfifo(tmp_path / "a/fifo.png")
    (tmp_path / "a/gone.png").symlink_to("nowhere")
    dataset = Folder(path=str(tmp_path)).open("train")
    assert names(dataset) == ["a/0.png", "a/fifo.png", "a/gone.png"]
    for index in (1, 2):
        with pytest.raises(BadImage, match=names(dataset)[index]):
            dataset.image(index)


def test_links(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", 3)
    root = tmp_path / "data"
    fill(root / "a", 1)
    (root / "b").symlink_to(elsewhere)  # a class folder may lie elsewhere
    (root / "a/file.png").symlink_to(elsewhere / "0.png")  # and so may an image
    (root / "a/loop").symlink_to(root / "a")
    (root / "a/parent").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "self").symlink_to(root)
    (root / "broken").symlink_to(tmp_path / "nowhere")
    dataset = Folder(path=str(root)).open("train")
    assert dataset.classes == ("a", "b")
    assert names(dataset) == ["a/0.png", "a/file.png", "b/0.png", "b/1.png", "b/2.png"]


ODD = [
    "ünïcödé",
    "日本",
    "🐈",
    "two\nlines",
    "tab\there",
    "esc\x1b[31m",
    "quote'\"",
    "-dash",
    "=cmd()",
    " space ",
    "x" * 200,
]


def test_odd_names_give_the_same_classes_every_time(tmp_path):
    for label in ODD:
        fill(tmp_path / label, 1, "i" + label + "{}.png")
    raw = os.path.join(os.fsencode(tmp_path), b"not-utf8-\xff")
    os.mkdir(raw)
    shutil.copy(tmp_path / "🐈/i🐈0.png", os.path.join(raw, b"\xfe.png"))
    first, again = (Folder(path=str(tmp_path)).open("train") for _ in range(2))
    assert first.classes == again.classes == tuple(sorted([*ODD, os.fsdecode(b"not-utf8-\xff")]))
    assert fingerprint(first) == fingerprint(again)
    for index in range(len(first)):
        assert first.image(index).size == (4, 4)
    assert os.fsencode(first.path(first.classes.index(os.fsdecode(b"not-utf8-\xff")))).endswith(b"\xff/\xfe.png")


def test_accents_are_one_class_however_they_are_written(tmp_path):
    fill(tmp_path / "train" / "caf\u00e9")
    fill(tmp_path / "val" / "cafe\u0301")
    assert Folder(path=str(tmp_path)).open("val").labels.tolist() == [0, 0]
    fill(tmp_path / "train" / "cafe\u0301")
    with pytest.raises(DataError, match="two folders"):
        Folder(path=str(tmp_path)).open("train")


def test_empty_folders_are_named(tmp_path):
    fill(tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="b' has no images") as caught:
        Folder(path=str(tmp_path)).open("train")
    assert ".jpeg" in caught.value.hint
    assert len(Folder(path=str(tmp_path)).open_for_scoring()) == 2
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(DataError, match="no images"):
        Folder(path=str(tmp_path)).open_for_scoring()


def test_a_path_that_cannot_be_used(tmp_path):
    fill(tmp_path, 1)
    for path, message in (
        ("nowhere", "No such file"),
        ("0.png", "Not a directory"),
        ("", "no class folders"),
        ("nul\0", "null byte"),
    ):
        with pytest.raises(DataError, match=message):
            Folder(path=os.path.join(tmp_path, path)).open("train")


def test_many_files_are_listed_quickly(tmp_path):
    for label in range(20):
        (tmp_path / f"{label:02}").mkdir()
        for i in range(100):
            os.close(os.open(tmp_path / f"{label:02}" / f"{i}.jpg", os.O_CREAT))
    begin = time.thread_time()
    dataset = Folder(path=str(tmp_path)).open("train")
    assert time.thread_time() - begin < 5
    assert len(dataset) == 2000
    assert names(dataset)[1999] == "19/99.jpg"


def test_fingerprint_knows_names_and_labels_but_not_the_place(tmp_path):
    for label in ("a", "b"):
        fill(tmp_path / "here" / label)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (fingerprint(Folder(path=str(tmp_path / place)).open("train")) for place in ("here", "there"))
    assert here == there
    (tmp_path / "there/a/0.png").rename(tmp_path / "there/a/7.png")
    renamed = fingerprint(Folder(path=str(tmp_path / "there")).open("train"))
    (tmp_path / "there/a/7.png").rename(tmp_path / "there/b/7.png")
    assert len({here, renamed, fingerprint(Folder(path=str(tmp_path / "there")).open("train"))}) == 3


def test_cifar10_as_class_folders(shared, tmp_path):
    import tarfile

    with tarfile.open(shared / "data/cifar10.tar.gz") as archive:
        for member in archive:
            if member.name.startswith("train/bird") and member.isfile():
                break
            if member.isfile() and member.name.endswith(("1.webp", "2.webp")):
                archive.extract(member, tmp_path, filter="data")
    dataset = Folder(path=str(tmp_path)).open("train")
    assert dataset.classes == ("airplane", "automobile")
    assert len(dataset) > 1000
    mean = np.mean([np.asarray(dataset.image(i)).mean() for i in range(0, len(dataset), 10)])
    assert 110 < mean < 150
    assert dataset.image(0).size == (32, 32)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("dataset", SPLITS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_data_set_says_how_to_fetch_it(tmp_path, offline, capfd, dataset, split):
    with pytest.raises(DataError, match=f"{dataset} is missing") as caught:
        Torchvision(dataset=dataset, root=str(tmp_path)).open(split)
    assert ("data.source.download=true" in caught.value.hint) == (dataset != "ImageNet")
    assert capfd.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_imagenet_cannot_be_downloaded():
    with pytest.raises(ValidationError, match="image-net"):
        Torchvision(dataset="ImageNet", download=True)


def test_a_forged_cifar_is_refused_before_it_is_read(tmp_path, offline):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    marker = tmp_path / "executed"
    payload = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(payload)
    with pytest.raises(DataError, match="damaged"):
        Torchvision(dataset="CIFAR10", root=str(tmp_path)).open("val")
    assert not marker.exists()


def test_fashion_mnist(tmp_path, offline):
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        pixels = np.arange(count * 784, dtype=np.uint32).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, count, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + bytes(range(count)))
    train, val = (Torchvision(dataset="FashionMNIST", root=str(tmp_path)).open(split) for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 4)
    assert train.classes[:2] == ("T-shirt/top", "Trouser")
    assert train.in_memory
    assert train.labels.tolist() == list(range(6))
    assert (np.asarray(train.image(1))[0, :5, 2] == (784 + np.arange(5)) % 256).all()
    assert train.path(1) == "FashionMNIST/train[1]"


def test_eurosat_holds_out_every_fifth(tmp_path, offline):
    fill(tmp_path / "eurosat/2750/Forest", 10)
    fill(tmp_path / "eurosat/2750/River", 5)
    train, val = (Torchvision(dataset="EuroSAT", root=str(tmp_path)).open(split) for split in ("train", "val"))
    assert train.classes == ("Forest", "River")
    assert (len(train), val.labels.tolist()) == (12, [0, 0, 1])
    assert not set(names(train)) & set(names(val))
    assert val.image(2).size == (4, 4)


def test_imagenette_is_named_by_wordnet_ids(tmp_path, offline, monkeypatch):
    for split in ("train", "val"):
        for wnid in ("n01440764", "n03000684"):
            fill(tmp_path / "imagenette2" / split / wnid, 2, "{}.JPEG")
    monkeypatch.chdir(tmp_path)
    val = Torchvision(dataset="Imagenette", root=".").open("val")
    assert val.classes == ("n01440764", "n03000684")
    assert names(val)[0] == "imagenette2/val/n01440764/0.JPEG"
    assert imagenet.match(val.classes, imagenet.WNIDS) == [0, 491]


def test_pets_and_food(tmp_path, offline):
    pets = tmp_path / "oxford-iiit-pet"
    fill(pets / "images", 2, "Abyssinian_{}.jpg")
    fill(pets / "images", 1, "great_dane_{}.jpg")
    (pets / "annotations").mkdir()
    (pets / "annotations/trainval.txt").write_text("Abyssinian_0 1 1 1\ngreat_dane_0 2 2 1\nAbyssinian_1 1 1 1\n")
    found = Torchvision(dataset="OxfordIIITPet", root=str(tmp_path)).open("train")
    assert (found.classes, found.labels.tolist()) == (("Abyssinian", "Great Dane"), [0, 1, 0])
    assert found.image(2).size == (4, 4)

    food = tmp_path / "food-101"
    fill(food / "images/pizza", 2, "{}.jpg")
    (food / "meta").mkdir()
    (food / "meta/test.json").write_text(json.dumps({"pizza": ["pizza/0", "pizza/1"]}))
    found = Torchvision(dataset="Food101", root=str(tmp_path)).open("val")
    assert (found.classes, names(found)) == (("pizza",), ["food-101/images/pizza/0.jpg", "food-101/images/pizza/1.jpg"])


def test_the_thousand_classes():
    assert len(imagenet.WNIDS) == 1000
    assert list(imagenet.WNIDS) == sorted(imagenet.WNIDS)
    assert imagenet.name("n01440764") == "tench, Tinca tinca"
    assert imagenet.name("my own class") == "my own class"


LABELS = tuple(imagenet.name(wnid) for wnid in imagenet.WNIDS)


def test_classes_meet_by_id_label_or_first_synonym():
    assert imagenet.match(imagenet.WNIDS, imagenet.WNIDS) == list(range(1000))
    assert imagenet.match(imagenet.WNIDS, LABELS) == list(range(1000))
    assert imagenet.match(imagenet.WNIDS[::-1], LABELS)[0] == 999
    words = ["Tench", "great_white_shark", "goldfish, Carassius auratus", "n01491361", "COCK"]
    assert imagenet.match(words, imagenet.WNIDS) == [0, 2, 1, 3, 7]
    assert imagenet.match(["b", "a"], ["a", "b", "c"]) == [1, 0]
    assert imagenet.match(["goldfish"], ["x", "n01443537"]) == [1]
    # As written a cardigan is the garment and a Cardigan the dog.
    assert imagenet.match(["cardigan", "Cardigan"], imagenet.WNIDS) == [474, 264]


@pytest.mark.parametrize("label", ["crane", "maillot", "CARDIGAN"])
def test_ambiguous_names_are_refused_with_their_meanings(label):
    with pytest.raises(DataError, match=r"which of n\d+, n\d+"):
        imagenet.match([label], imagenet.WNIDS)


def test_unknown_classes_are_named_with_near_ones():
    with pytest.raises(DataError, match=r"2 of the 3 classes.*'horze'.*near 'horse'.*'zzz'") as caught:
        imagenet.match(["cat", "horze", "zzz"], ["cat", "dog", "horse"])
    assert "'cat', 'dog', 'horse'" in caught.value.hint
    with pytest.raises(DataError, match=r"7 of the 7 classes.* and 2 more"):
        imagenet.match([str(i) for i in range(1001, 1008)], imagenet.WNIDS)
    with pytest.raises(DataError, match="'n01440765'"):
        imagenet.match(["n01440765"], imagenet.WNIDS)
    with pytest.raises(DataError, match="'twin'"):
        imagenet.match(["twin"], ["twin", "twin"])
