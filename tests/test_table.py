"""Tables: CSV of paths, Parquet of paths or images; whatever they say, a label means its name."""

import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import TINY, Vit, sets
from PIL import Image

from vitcli.data.images import BadImage
from vitcli.data.loader import fingerprint
from vitcli.data.parallel import each
from vitcli.data.sources import table as tables
from vitcli.data.sources._parquet import Parquet
from vitcli.data.sources.table import Table
from vitcli.errors import DataError


@pytest.fixture
def vit(capsys, monkeypatch):
    return Vit(capsys, monkeypatch)


def png(red: int) -> bytes:
    into = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 20, 30)).save(into, "PNG")
    return into.getvalue()


@pytest.fixture
def images(tmp_path):
    """Images 0.png to 29.png, whose red is their number."""
    (tmp_path / "images").mkdir()
    for i in range(30):
        (tmp_path / f"images/{i}.png").write_bytes(png(i))
    return tmp_path


def write(path, rows, header="image,label"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def opened(split="train", **settings):
    return Table.parse(settings).open(split)


def reds(dataset):
    return [dataset.image(i).getpixel((0, 0))[0] for i in range(len(dataset))]


def told(**settings):
    with pytest.raises(DataError) as caught:
        opened(**settings)
    return f"{caught.value}; {caught.value.hint}"


def test_csv_of_names(images):
    train = write(images / "train.csv", [(f"images/{i}.png", "cat" if i % 2 else "ant") for i in range(6)])
    val = write(images / "val.csv", [("images/7.png", "cat"), ("images/8.png", "ant")])
    dataset, held = opened(train=train, val=val), opened("val", train=train, val=val)
    assert dataset.classes == held.classes == ("ant", "cat")
    assert (dataset.labels.tolist(), reds(dataset)) == ([0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5])
    assert (held.labels.tolist(), reds(held)) == ([1, 0], [7, 8])
    assert dataset.path(3) == str(images / "images/3.png")
    assert Table.parse({"train": train}).splits() == ("train",)
    assert "data.source.val=0.1" in told(split="val", train=train)


def test_numbers_are_names_too_and_sorted_by_value(images):
    train = write(images / "t.csv", [(f"images/{i}.png", i % 12 + 1) for i in range(24)])
    val = write(images / "v.csv", [("images/25.png", 10), ("images/26.png", 2)])
    dataset = opened(train=train, val=val)
    assert dataset.classes == tuple(str(i) for i in range(1, 13))  # 1 to K, as many tables count
    assert dataset.labels.tolist() == [i % 12 for i in range(24)]
    assert opened("val", train=train, val=val).labels.tolist() == [9, 1]
    outside = write(images / "o.csv", [("images/25.png", 13)])
    assert "o.csv[0]: the label '13' is none of the 12 classes" in told(split="val", train=train, val=outside)
    negative = write(images / "n.csv", [("images/1.png", 1), ("images/2.png", -1)])
    assert "n.csv[1]: the label -1 is negative" in told(train=negative)


def test_a_share_is_held_out_of_each_class(images):
    train = write(images / "t.csv", [(f"images/{i}.png", "ab"[i % 2]) for i in range(20)])
    kept, held = (opened(split, train=train, val=0.2) for split in ("train", "val"))
    assert len(kept) == 16
    assert sorted(held.labels.tolist()) == [0, 0, 1, 1]
    assert sorted(reds(kept) + reds(held)) == list(range(20))


def test_columns_and_roots_are_named(images):
    train = write(images / "t.csv", [("1.png", "x", "a"), ("2.png", "y", "b")], header="file,note,species")
    message = told(train=train)
    assert "no column 'image'" in message
    assert "file, note, species" in message
    dataset = opened(train=train, image="file", label="species", root=str(images / "images"))
    assert (reds(dataset), dataset.classes) == ([1, 2], ("a", "b"))
    assert "data.source.label=species" in told(train=train, image="file", label="specie")
    write(images / "twice.csv", [("1.png", "x", "a")], header="image,label,label")
    assert "several columns 'label'" in told(train=str(images / "twice.csv"))


WRONG = {
    "image,label\nimages/1.png,a\nimages/2.png\n": r"csv:3: 1 cells, where the header has 2",
    "image,label\nimages/1.png,a\nimages/2.png,b,c\n": r"csv:3: 3 cells",
    'image,label\n"images/1.png,a\n': r"is no CSV: unexpected end",
    "image,label\nimages/1.png,\n": r"csv\[0\]: no label",
    "image,label\n,a\n": r"csv\[0\]: no path",
    "image,label\n../outside.png,a\n": r"csv\[0\]: '../outside.png' is not below",
    "image,label\n/etc/passwd,a\n": r"csv\[0\]: '/etc/passwd' is not below",
    "image,label\nimages/../../x.png,a\n": r"is not below",
    "image,label\nimages/1.png,a\nx,b\nimages/./1.png,b\n": r"csv\[2\]: 'images/1.png' is there twice, as 'a' and 'b'",
    "image,label\n": "has no rows",
    "": "no column 'image'",
}


@pytest.mark.parametrize("content", WRONG)
def test_wrong_tables_are_named_with_the_row(images, content):
    (images / "wrong.csv").write_text(content)
    with pytest.raises(DataError, match=WRONG[content]):
        opened(train=str(images / "wrong.csv"))


def test_files_that_are_no_tables(images):
    assert "No such file" in told(train=str(images / "nowhere.csv"))
    assert "no table is called" in told(train=str(images / "nowhere-*.csv"))
    assert "is no table" in told(train=str(images))
    (images / "x.parquet").write_bytes(b"PAR1 no more")
    assert "x.parquet' cannot be read" in told(train=str(images / "x.parquet"))


def test_odd_csv_that_is_right(images):
    rows = (
        'id,"image","label"',
        '0,"images/1.png","a ""b"", c"',
        "1,images/2.png,日本",
        "",
        '2,images/1.png,"a ""b"", c"',
    )
    text = "\ufeff" + "\r\n".join(rows)
    (images / "odd.csv").write_bytes(text.encode())
    dataset = opened(train=str(images / "odd.csv"))
    assert dataset.classes == ('a "b", c', "日本")
    assert dataset.labels.tolist() == [0, 1, 0]
    missing = write(images / "m.csv", [("images/99.png", "a")])
    with pytest.raises(BadImage, match=r"images/99.png: No such file"):
        opened(train=missing).image(0)


def test_a_large_table_is_read_once_and_again_when_it_changes(images, monkeypatch, cache):
    monkeypatch.setattr(tables, "LARGE", 1)
    train = write(images / "t.csv", [(f"images/{i}.png", "ab"[i % 2]) for i in range(4)])
    first = opened(train=train)
    monkeypatch.setattr(Table, "_build", lambda *_: pytest.fail("it was read again"))
    assert fingerprint(opened(train=train)) == fingerprint(first)
    monkeypatch.undo()
    monkeypatch.setenv("VITCLI_CACHE", str(cache))
    write(images / "t.csv", [(f"images/{i}.png", "ab"[i % 2]) for i in range(5)])
    assert len(opened(train=train)) == 5


def huggingface(path, reds, labels, names, group=4):
    """A file as `datasets` writes an image data set."""
    cells = [{"bytes": png(red), "path": f"{red}.png"} for red in reds]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    image = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": image, "label": pa.array(labels, pa.int64())})
    described = json.dumps({"info": {"features": features}})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": described}), path, row_group_size=group)


@pytest.fixture
def hub(tmp_path):
    """A data set as it comes from the hub: two files to train on and one held out."""
    for number in range(2):
        numbers = range(10 * number, 10 * number + 10)
        path = tmp_path / f"hub/data/train-0000{number}-of-00002.parquet"
        huggingface(path, numbers, [i % 3 for i in numbers], ["cat", "ant", "bee"])
    huggingface(
        tmp_path / "hub/data/validation-00000-of-00001.parquet", range(40, 46), [0, 1, 2] * 2, ["cat", "ant", "bee"]
    )
    return tmp_path / "hub"


def test_the_layout_of_the_hub(hub):
    source = {"train": f"{hub}/data/train-*.parquet", "val": f"{hub}/data/validation-*.parquet"}
    dataset, held = opened(**source), opened("val", **source)
    assert dataset.classes == held.classes == ("cat", "ant", "bee")
    assert (reds(dataset), dataset.labels.tolist()) == (list(range(20)), [i % 3 for i in range(20)])
    assert (reds(held), held.labels.tolist()) == (list(range(40, 46)), [0, 1, 2] * 2)
    assert dataset.path(13) == f"{hub}/data/train-00001-of-00002.parquet[3]"
    assert set(each(dataset.read, range(20), jobs=2)) == {png(red) for red in range(20)}
    huggingface(hub / "data/other.parquet", range(3), [0, 1, 2], ["bee", "cat", "ant"])
    other = opened("val", train=source["train"], val=f"{hub}/data/other.parquet")
    assert other.labels.tolist() == [2, 0, 1]  # by name, not by place
    huggingface(hub / "data/other.parquet", range(3), [0, 1, 3], ["bee", "cat", "ant"])
    with pytest.raises(DataError, match=r"other.parquet\[2\]: the label '3' is none of the 3 classes"):
        opened("val", train=source["train"], val=f"{hub}/data/other.parquet")


def test_an_epoch_of_parquet_reads_each_row_group_once(tmp_path, monkeypatch):
    numbers = [i % 200 for i in range(400)]
    huggingface(tmp_path / "t.parquet", numbers, [i % 2 for i in numbers], ["a", "b"])
    dataset = opened(train=str(tmp_path / "t.parquet"))
    assert isinstance(dataset, Parquet)
    dataset.window, read = 8, []
    group = Parquet._group

    def counted(self, number):
        if number not in self._kept:
            read.append(number)
        return group(self, number)

    monkeypatch.setattr(Parquet, "_group", counted)
    order = dataset.order(np.random.default_rng(0), np.arange(400))
    assert sorted(order.tolist()) == list(range(400))
    for index in order.tolist():
        assert dataset.read(index) == png(numbers[index])
    assert len(read) < 1.3 * 100
    assert len(set((order[:20] // 4).tolist())) > 5


def test_parquet_of_paths_and_of_names(images):
    table = pa.table({"image": [f"images/{i}.png" for i in range(4)], "label": ["x", "y", "x", "y"]})
    pq.write_table(table, images / "t.parquet")
    dataset = opened(train=str(images / "t.parquet"))
    assert (reds(dataset), dataset.classes, dataset.labels.tolist()) == ([0, 1, 2, 3], ("x", "y"), [0, 1, 0, 1])
    pq.write_table(pa.table({"image": [png(1), None, b""], "label": [5, 7, 5]}), images / "b.parquet")
    dataset = opened(train=str(images / "b.parquet"))
    assert (dataset.classes, dataset.image(0).size) == (("5", "7"), (8, 8))
    for index in (1, 2):
        with pytest.raises(BadImage, match=rf"b.parquet\[{index}\]: no bytes of an image"):
            dataset.image(index)
    for labels, message in (([0.5], "neither text nor a whole number"), ([None], "no label"), ([True], "neither text")):
        pq.write_table(pa.table({"image": ["images/1.png"], "label": labels}), images / "w.parquet")
        assert message in told(train=str(images / "w.parquet"))


def test_rows_of_several_files_are_named(images):
    for name, label in (("a", "cat"), ("b", 0.5)):
        pq.write_table(pa.table({"image": ["images/1.png"] * 3, "label": [label] * 3}), images / f"p-{name}.parquet")
    assert "p-b.parquet[0]: the label 0.5 is neither" in told(train=f"{images}/p-*.parquet")
    write(images / "c-0.csv", [("images/1.png", "a"), ("images/2.png", "b")])
    write(images / "c-1.csv", [("images/3.png", "a"), ("images/1.png", "b")])
    assert "c-1.csv[1]: 'images/1.png' is there twice" in told(train=f"{images}/c-*.csv")
    (images / "c-1.csv").write_text("image,label\nimages/3.png,a\n")
    train = write(images / "a.csv", [("images/1.png", "a")])
    assert "c-0.csv[1]: the label 'b' is none" in told(split="val", train=train, val=f"{images}/c-*.csv")


def test_without_pyarrow_the_hint_says_what_to_install(images, monkeypatch):
    import sys

    (images / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert 'pip install "vitcli[parquet]"' in told(train=str(images / "x.parquet"))


def test_commands_take_tables(hub, images, vit, monkeypatch):
    monkeypatch.chdir(images)
    said = vit("data", "pack", hub, images / "out", "--jobs", "1", "--json")
    assert (said.code, said.json["images"], said.json["classes"]) == (0, 26, 3)
    rows = [(f"images/{i}.png", "ab"[i % 2]) for i in range(20)]
    table = write(images / "t.csv", rows)
    assert vit("data", "check", table, "--jobs", "1", "--json").json["classes"]["train"] == {"a": 10, "b": 10}
    data = f"data={{source: {{name: table, train: {table}, val: 0.2}}, res: 8, resize: null, classes: 2}}"
    said = vit("pretrain", "quickstart", *sets(data, *TINY, "batch=4", "steps=8"), "--run", "run", "--json")
    assert said.code == 0, said.err
    swapped = write(images / "swapped.csv", [(path, label) for path, label in reversed(rows)])
    scores = [vit("eval", "--ckpt", "run", "--data", place, "--json").json for place in (table, swapped)]
    assert scores[0]["top1"] == scores[1]["top1"]
    assert os.path.exists("run/last")


@pytest.mark.parametrize("source", ["{name: table, train: x.csv, val: 2}", "{name: shards, path: x, val: 0.0}"])
def test_a_share_is_between_0_and_1(vit, source):
    said = vit("pretrain", "quickstart", *sets(f"data.source={source}"))
    assert said.code == 2
    assert "data.source.val: " in said.err
    assert "is no share: between 0 and 1" in said.err
    assert said.err.count("\n") == 1
