"""Several labels an image: tables, loss, mAP, thresholds, and what does not go with them."""

import csv
import hashlib
import io
import json
import shutil
from contextlib import redirect_stdout
from multiprocessing.reduction import ForkingPickler

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command import TINY, Vit, content, sets
from PIL import Image
from rich.console import Console
from sklearn.metrics import average_precision_score, f1_score
from test_inference import Numbered
from test_inference import Table as Answers
from torch.nn import functional as F

from vitcli import checkpoint, storage
from vitcli.data import Augment, DataConfig, Preprocessing, loader
from vitcli.data.loader import eval_batches, fingerprint, train_batches
from vitcli.data.mix import mix, targets_of
from vitcli.data.sampling import epoch_order, told
from vitcli.data.sources import table as tables
from vitcli.data.sources._arrays import Arrays
from vitcli.data.sources._files import Files
from vitcli.data.sources._split import Subset
from vitcli.data.sources.table import Table
from vitcli.errors import CheckpointError, DataError, RecipeError
from vitcli.inference import Answer, Guess, open_predictor
from vitcli.objectives import Objective
from vitcli.objectives.classify import Classify
from vitcli.report import tables as reports
from vitcli.scores import MultiLabelTally, best_threshold
from vitcli.scoring import score

NAMES = ("bar", "line", "square")  # as they are sorted
SMALL = ("model={width: 32, depth: 2, mlp_dim: 64, heads: 2, patch: 4, pool: gap}", "batch=32", "log_every=10")
FAST = ("optim={lr: 3.0e-3, warmup_steps: 5}", "runtime={device: cpu, precision: fp32, threads: 1}")
SIGMOID = "objective.loss=sigmoid"


def data(source: str) -> str:
    return f"data={{source: {source}, res: 16, classes: 3, augment: {{crop: central_crop, flip: false}}}}"


@pytest.fixture
def vit(capsys, monkeypatch):
    return Vit(capsys, monkeypatch)


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    """200 images of noise with any of a red square, a green bar and a blue line; 160 to train on, 40 held out."""
    folder, chance = tmp_path_factory.mktemp("marks"), np.random.default_rng(0)
    (folder / "images").mkdir()
    truth = chance.random((200, 3)) < 0.4
    for number, (bar, line, square) in enumerate(truth):
        pixels = chance.integers(0, 100, (16, 16, 3), dtype=np.uint8)
        pixels[2:8, 2:8] = (250, 20, 20) if square else pixels[2:8, 2:8]
        pixels[:, 10:13] = (20, 250, 20) if bar else pixels[:, 10:13]
        pixels[13:15] = (20, 20, 250) if line else pixels[13:15]
        Image.fromarray(pixels).save(folder / f"images/{number:03}.png")
    labels = [[NAMES[i] for i in np.flatnonzero(row)] for row in truth]
    for name, part in (("train", range(160)), ("val", range(160, 200))):
        rows = [f"images/{number:03}.png,{' | '.join(labels[number])}" for number in part]
        (folder / f"{name}.csv").write_text("\n".join(["image,label", *rows]) + "\n")
        cells = [{"bytes": (folder / f"images/{number:03}.png").read_bytes()} for number in part]
        numbers = pa.array([np.flatnonzero(truth[number]).tolist() for number in part], pa.list_(pa.int64()))
        feature = {"feature": {"names": list(NAMES), "_type": "ClassLabel"}, "_type": "Sequence"}
        described = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": feature}}})
        table = pa.table({"image": pa.array(cells, pa.struct([("bytes", pa.binary())])), "label": numbers})
        pq.write_table(table.replace_schema_metadata({"huggingface": described}), folder / f"{name}.parquet")
    return folder, truth


@pytest.fixture
def folder(marks, monkeypatch):
    monkeypatch.chdir(marks[0])
    return marks[0]


CSV = '{name: table, train: train.csv, val: val.csv, separator: "|"}'


@pytest.fixture
def run(vit, folder):
    """A run on the CSV, good enough to find nearly all."""
    if not (folder / "run").exists():
        said = vit("pretrain", "quickstart", *sets(*SMALL, data(CSV), *FAST, SIGMOID, "steps=60"), "--run", "run")
        assert said.code == 0, said.err
        assert "run: 60 steps in " in said.out
        assert ", best mAP 9" in said.out or ", best mAP 100.00%" in said.out
    return folder / "run"


def log(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def config(run, name="best"):
    return json.loads((run / name / "config.json").read_text())


# Training, and what comes of it.


@pytest.mark.parametrize("kind", ["arrays", "files", "share"])
def test_labels_do_not_travel_to_loader_processes(kind, monkeypatch):
    labels = np.zeros((300, 5000), dtype=bool)
    classes = tuple(map(str, range(5000)))
    if kind == "arrays":
        dataset = Arrays("blank", np.zeros((300, 8, 8), dtype=np.uint8), [0] * 300, classes)
        dataset.labels = labels
    else:
        index = Files.of("photos", [f"{number}.jpg" for number in range(300)], [0] * 300, classes).index
        dataset = Files("photos", index, classes, labels)
    if kind == "share":
        dataset = Subset(dataset, np.arange(1, 300))
        labels = dataset.labels
    sent = []
    monkeypatch.setattr(loader, "load", lambda sample, *_, **__: sent.append(sample) or (part for part in ()))
    list(eval_batches(Preprocessing.parse({"res": 8}), dataset, batch=100))
    assert len(ForkingPickler.dumps(sent[0])) < labels.nbytes / 10
    assert dataset.labels is labels
    assert len(dataset.unlabelled()) == len(labels)


def test_a_run_is_chosen_by_map(vit, run):
    scored = [row for row in log(run) if "val_loss" in row]
    assert all(row.keys() == {"step", "val_loss", "val_map"} for row in scored)
    best = max(row["val_map"] for row in scored)
    assert best > 0.95
    said = vit("eval", "--ckpt", run, "--json")
    assert said.code == 0, said.err
    assert said.json["map"] == best
    assert (said.json["images"], said.json["seen"], said.json["classes"]) == (40, 3, 3)
    assert said.json["best_thresholds"] == pytest.approx(config(run)["vitcli"]["thresholds"])
    assert said.json.keys() == {
        *("model", "images", "loss", "map", "f1_macro", "f1_micro", "best_thresholds", "seen", "classes", "bad"),
        *("seconds", "waiting", "images_per_second"),
    }
    lines = dict(line.split("\t") for line in vit("eval", "--ckpt", run).out.splitlines())
    assert lines["mAP"] == f"{best:.2%}"
    assert {"F1 macro", "F1 micro", "loss"} <= lines.keys()
    assert "  mAP " in (run / "train.log").read_text()


def test_runs_are_listed_and_compared_by_map(vit, run, tmp_path):
    from vitcli import history
    from vitcli.report import runs as report

    past = history.summary(run)
    assert (past.measure, past.best) == ("mAP", max(row.get("val_map", 0) for row in log(run)))
    assert f"\t{past.best:.2%} mAP\tfinished\t" in next(report.lines([past]))
    said = vit("runs", "compare", run, run, "-o", tmp_path / "both.png")
    assert said.code == 0, said.err
    assert "\nval_map from " in said.out
    assert "val_top1" not in said.out
    with Image.open(run / "results.png") as picture:
        assert picture.size == (1320, 396)


def test_eval_of_checkpoint_and_export_agree(vit, run, folder, tmp_path):
    said = vit("export", "--onnx", "--ckpt", run, "-o", tmp_path / "model.onnx")
    assert said.code == 0, said.err
    words = ["--data", "val.csv", "--separator", "|", "--json"]
    scores = [vit("eval", "--ckpt", ckpt, *words).json for ckpt in (run, tmp_path / "model.onnx")]
    for key in ("loss", "map", "f1_macro", "f1_micro", "best_thresholds"):
        assert scores[0][key] == pytest.approx(scores[1][key], rel=1e-5)
    parquet = vit("eval", "--ckpt", tmp_path / "model.onnx", "--data", "val.parquet", "--json").json
    assert parquet["map"] == scores[1]["map"]
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(metadata["thresholds"]) == config(run)["vitcli"]["thresholds"]

    image, code = folder / "images/163.png", said.out[said.out.index("import json") : said.out.index("\n\nTensorRT")]
    with redirect_stdout(io.StringIO()) as printed:
        exec(code.replace("photo.jpg", str(image)), {})
    (answer,) = vit("predict", image, "--ckpt", tmp_path / "model.onnx", "--json").json["images"]
    applies = {guess["class"] for guess in answer["top"] if guess["applies"]}
    assert set(eval(printed.getvalue())) == applies


def test_predict_marks_what_applies(vit, run, folder, marks):
    paths, truth = [f"images/{number}.png" for number in range(160, 200)], marks[1][160:]
    found = vit("predict", *paths, "--ckpt", run, "--top", 1, "--json").json["images"]
    yes = np.zeros((40, 3), dtype=bool)
    for row, answer in zip(yes, found, strict=True):
        top = answer["top"]
        assert [guess["probability"] for guess in top] == sorted((g["probability"] for g in top), reverse=True)
        assert all(guess["applies"] for guess in top[1:])  # beyond the first only what applies
        row[[NAMES.index(guess["class"]) for guess in top if guess["applies"]]] = True
    scores = vit("eval", "--ckpt", run, "--json").json
    assert scores["f1_micro"] == pytest.approx(f1_score(truth, yes, average="micro"))
    assert scores["f1_macro"] == pytest.approx(f1_score(truth, yes, average="macro"))
    assert len({len(answer["top"]) for answer in found}) > 1

    line = vit("predict", paths[3], "--ckpt", run).out.split("\t")
    names = [name.removesuffix(" *").strip() for name in line[2::2]]
    assert sorted(names) == sorted(NAMES)
    assert sum(name.strip().endswith(" *") for name in line[2::2]) == yes[3].sum()
    rows = list(csv.DictReader(vit("predict", paths[3], "none.png", "--ckpt", run, "--csv").out.splitlines()))
    assert list(rows[0])[-2:] == ["error", "applies"]
    assert [row["applies"] == "true" for row in rows[:3]] == [name.strip().endswith(" *") for name in line[2::2]]
    assert rows[3]["applies"] == ""


def test_one_label_answers_have_no_marks():
    answers = [Answer("a.png", (Guess("cat", "cat", 0.5),))]
    assert list(reports.answers_lines(answers)) == ["a.png\t0.5000\tcat"]
    assert json.loads(next(reports.answers_jsonl(answers)))["top"] == [
        {"class": "cat", "name": "cat", "probability": 0.5}
    ]
    assert next(reports.answers_csv(answers)) == "path,rank,class,name,probability,error"
    several = [Answer("a.png", (Guess("cat", "cat", 0.7, True), Guess("dog", "dog", 0.2, False)))]
    console = Console(width=80, file=io.StringIO())
    console.print(reports.answers_table(several))
    assert "cat *" in console.file.getvalue()
    assert "dog *" not in console.file.getvalue()


def test_lists_in_parquet_train_and_resume_to_the_same_bits(vit, folder, tmp_path):
    source = "{name: table, train: train.parquet, val: val.parquet}"
    mixed = data(source).replace("flip: false", "flip: true, mixup: 0.3, cutmix: 0.5")
    rhythm = ("steps=40", "eval_every=10", "save_every=5", "keep_last=20", "data.sampling=repeat_factor")
    said = vit("pretrain", "quickstart", *sets(*SMALL, mixed, *FAST, SIGMOID, *rhythm), "--run", tmp_path / "whole")
    assert said.code == 0, said.err
    assert max(row.get("val_map", 0) for row in log(tmp_path / "whole")) > 0.8
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in range(20, 45, 5):
        shutil.rmtree(tmp_path / f"again/checkpoints/step_{step:08}")
    shutil.rmtree(tmp_path / "again/last")
    before = json.loads((tmp_path / "again/checkpoints/step_00000015/state.json").read_text())["thresholds"]
    assert before == config(tmp_path / "again", "checkpoints/step_00000015")["thresholds"]
    said = vit("pretrain", "--resume", tmp_path / "again")
    assert said.code == 0, said.err
    assert content(tmp_path / "again") == content(tmp_path / "whole")
    for place in ("best", "last"):
        assert config(tmp_path / "again", place) == config(tmp_path / "whole", place)
    thresholds = config(tmp_path / "whole", "last")["vitcli"]["thresholds"]
    assert thresholds != before
    assert content(tmp_path / "whole")["position"]["thresholds"] == thresholds
    start = checkpoint.load(tmp_path / "whole/checkpoints/step_00000005")  # nothing was scored by then
    assert start.thresholds == (0.5, 0.5, 0.5)


def test_transformers_knows_the_kind_of_problem(vit, run, folder, tmp_path):
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(run / "best").problem_type == "multi_label_classification"
    said = vit("export", "--to", "huggingface", "--ckpt", run, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    trained, written = checkpoint.load(run), checkpoint.load(tmp_path / "out")
    assert written.thresholds == trained.thresholds == tuple(config(run)["vitcli"]["thresholds"])
    assert "reaches its threshold" in (tmp_path / "out/README.md").read_text()
    foreign = json.loads((tmp_path / "out/config.json").read_text())
    for own, expected in ((None, (0.5, 0.5, 0.5)), ([0.1, 0.2], CheckpointError), ([0.1, 0.2, 1.5], CheckpointError)):
        foreign["vitcli"]["thresholds"] = own
        (tmp_path / "out/config.json").write_text(json.dumps(foreign))
        if own is None:
            assert checkpoint.load(tmp_path / "out").thresholds == expected
        else:
            with pytest.raises(expected, match="thresholds"):
                checkpoint.load(tmp_path / "out")
    said = vit("export", "--to", "timm", "--ckpt", run, "-o", tmp_path / "model.safetensors")
    assert "left out thresholds, which this format does not hold" in said.out


def rewritten(run, place, **facts):
    """A copy of a run's best/ whose config.json says otherwise."""

    def write(into):
        for file in ("model.safetensors", "preprocessor_config.json"):
            shutil.copy(run / "best" / file, into)
        found = config(run)
        found["vitcli"] |= facts
        found["vitcli"] = {key: value for key, value in found["vitcli"].items() if value != "gone"}
        (into / "config.json").write_text(json.dumps(found))

    storage.write_folder(place, write)
    return place


def test_checkpoints_say_which_kind_they_are(run, tmp_path):
    assert checkpoint.load(run).thresholds == tuple(config(run)["vitcli"]["thresholds"])
    assert checkpoint.load(rewritten(run, tmp_path / "old", thresholds="gone")).thresholds is None
    assert checkpoint.load(rewritten(run, tmp_path / "one", thresholds=None)).thresholds is None
    for number, wrong in enumerate(([0.5], [0.5, 0.5, 2], [0.5, 0.5, "x"], [0.5, 0.5, None], 3)):
        with pytest.raises(CheckpointError, match="is not a vitcli checkpoint's"):
            checkpoint.load(rewritten(run, tmp_path / str(number), thresholds=wrong))


@pytest.mark.parametrize("wrong", ["[0.5]", "[0.5, 0.5, 2]", "[0.5, NaN, 0.5]", "x", "{}"])
def test_thresholds_of_an_onnx_file_are_checked(vit, run, tmp_path, wrong):
    assert vit("export", "--onnx", "--ckpt", run, "-o", tmp_path / "model.onnx").code == 0
    model = onnx.load(tmp_path / "model.onnx")
    next(entry for entry in model.metadata_props if entry.key == "thresholds").value = wrong
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="unusable metadata"):
        open_predictor(tmp_path / "model.onnx")


# What does not go together.

WRONG = {
    "softmax": (
        SIGMOID.replace("sigmoid", "softmax"),
        2,
        "classes exclude one another",
        "--set objective.loss=sigmoid",
    ),
    "class weights": ("objective.class_weights=inverse", 2, "weighs an image by its class", "class_weights=none"),
    "balanced": ("data.sampling=balanced", 2, "which classes that share images do not allow", "repeat_factor"),
    "empty": ("data.source.separator=''", 2, "data.source.separator: is empty", None),
    "lists": ("data.source.train=train.parquet", 3, "holds lists, which data.source.separator is not for", "leave it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_training_refuses(vit, folder, tmp_path, name):
    setting, code, message, hint = WRONG[name]
    words = sets(*SMALL, data(CSV), *FAST, SIGMOID, "steps=5", setting)
    said = vit("pretrain", "quickstart", *words, "--run", tmp_path / "run")
    assert said.code == code
    assert message in said.err
    assert hint is None or f"hint: {hint}" in said.err or hint in said.err.splitlines()[-1]


def test_train_and_val_are_of_one_kind(folder):
    (folder / "one.csv").write_text("image,label\nimages/000.png,bar\n")
    pq.write_table(pa.table({"image": ["images/000.png"], "label": [["bar"]]}), folder / "lists.parquet")
    source = Table.parse({"train": str(folder / "lists.parquet"), "val": str(folder / "one.csv")})
    with pytest.raises(DataError, match="one label a row, the training table lists of labels a row"):
        source.open("val")
    pq.write_table(pa.table({"image": ["images/000.png"], "label": ["bar"]}), folder / "lists-2.parquet")
    with pytest.raises(DataError, match="holds one label a row, and lists of them in"):
        Table.parse({"train": str(folder / "lists*.parquet")}).open("train")


def test_other_commands_refuse(vit, run, folder, tmp_path):
    separated = ["--data", "val.csv", "--separator", "|"]
    for words, code, message, hint in (
        (["eval", "--min-top1", "0.5", *separated], 2, "--min-top1 is for one label an image", "--min-map"),
        (["eval", "--min-map", "1.0", "--data", "one.csv"], 2, "--min-map is for several labels", "--min-top1"),
        (["eval", "--separator", "|"], 2, "--separator goes with --data", "the run knows"),
        (["eval", "--separator", "|", "--data", "digits"], 2, "between the labels of a table", "--separator ';'"),
        (["eval", "--separator", "", "--data", "val.csv"], 2, "between the labels of a table", "--separator ';'"),
        (["export", "--onnx", "--softmax"], 2, "--softmax is for classes that exclude one another", "sigmoid"),
    ):
        (folder / "one.csv").write_text("image,label\nimages/000.png,bar\n")
        said = vit(words[0], "--ckpt", run, *words[1:])
        assert (said.code, said.out) == (code, ""), said
        assert message in said.err
        assert hint in said.err.splitlines()[-1]
    said = vit("data", "pack", "train.parquet", tmp_path / "shards", "--jobs", 1)
    assert said.code == 3
    assert "error: a shard holds one label an image, and these images have several" in said.err
    assert "hint: train from the table" in said.err
    said = vit("eval", "--ckpt", run, "--data", "val.csv")
    assert said.code == 3
    assert "data.source.separator" in said.err  # the first row without a label says so
    said = vit("eval", "--ckpt", run, "--min-map", "1.0", *separated, "--json")
    assert said.code == (0 if said.json["map"] == 1 else 3)
    (folder / "none.csv").write_text("image,label\nimages/000.png,\n")
    said = vit("eval", "--ckpt", run, "--data", "none.csv", "--separator", "|")
    assert said.code == 3
    assert "has no label in any row" in said.err


def test_one_label_scores_of_such_a_model_are_top1_with_a_warning(vit, run, folder):
    (folder / "one.csv").write_text("image,label\nimages/000.png,bar\nimages/001.png,line\n")
    said = vit("eval", "--ckpt", run, "--data", "one.csv", "--json")
    assert said.code == 0, said.err
    assert "top1" in said.json
    assert "--separator says otherwise" in said.err


def test_an_objective_takes_one_label_unless_it_says_otherwise():
    Objective().check(multi_label=False)
    with pytest.raises(RecipeError, match="several labels each"):
        Objective().check(multi_label=True)
    for loss in ("softmax", "sigmoid"):
        Classify.parse({"loss": loss, "class_weights": "inverse"}).check(multi_label=False)
    Classify.parse({"loss": "sigmoid"}).check(multi_label=True)


# Tables.


def opened(text, tmp_path, **settings):
    (tmp_path / "t.csv").write_text(text)
    return Table.parse({"train": str(tmp_path / "t.csv"), **settings}).open("train")


def test_cells_with_a_separator(tmp_path):
    text = "image,label\na.png,dog;cat\nb.png,\nc.png, cat ; cat;\nd.png,9;cat\n"
    dataset = opened(text, tmp_path, separator=";")
    assert (dataset.classes, dataset.labels.dtype, dataset.multi_label) == (("9", "cat", "dog"), bool, True)
    assert dataset.labels.tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]
    assert dataset.counts.tolist() == [1, 3, 1]
    assert opened(text.replace(";", " "), tmp_path, separator=" ").labels.tolist() == dataset.labels.tolist()
    one = opened("image,label\na.png,dog;cat\n", tmp_path)
    assert (one.classes, one.labels.tolist(), one.multi_label, one.counts.tolist()) == (("dog;cat",), [0], False, [1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.png,cat\nb.png,cat;-1\n", r"t.csv\[1\]: the label -1 is negative"),
        ("a.png,cat\n,cat\n", r"t.csv\[1\]: no path"),
        ("a.png,cat;dog\nb.png,\na.png,cat\n", r"t.csv\[2\]: 'a.png' is there twice, as 'cat', 'dog' and 'cat'"),
        ("a.png,\nb.png,x\na.png,cat\n", r"t.csv\[2\]: 'a.png' is there twice, as none and 'cat'"),
        ("a.png,\n", "has no label in any row"),
        ("", "has no rows"),
    ],
)
def test_mistakes_are_named_with_the_row(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        opened(f"image,label\n{rows}", tmp_path, separator=";")


def test_the_order_within_a_cell_says_nothing(tmp_path):
    dataset = opened("image,label\na.png,cat;dog\na.png,dog;cat\n", tmp_path, separator=";")
    assert dataset.labels.tolist() == [[1, 1], [1, 1]]


def test_val_classes_meet_by_name(tmp_path):
    (tmp_path / "v.csv").write_text("image,label\nx.png,\ny.png,b\nz.png,b;c\nw.png,b;e\n")
    source = {"train": str(tmp_path / "t.csv"), "val": str(tmp_path / "v.csv"), "separator": ";"}
    (tmp_path / "t.csv").write_text("image,label\na.png,c;b\nb.png,a\n")
    with pytest.raises(DataError, match=r"v.csv\[3\]: the label 'e' is none of the 3 classes"):
        Table.parse(source).open("val")
    (tmp_path / "t.csv").write_text("image,label\na.png,c;b;e\nb.png,a\n")
    val = Table.parse(source).open("val")
    assert val.classes == ("a", "b", "c", "e")
    assert val.labels.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]


def test_lists_of_parquet(marks, tmp_path):
    folder, truth = marks
    dataset = Table.parse({"train": str(folder / "train.parquet")}).open("train")
    assert dataset.classes == NAMES
    assert (dataset.labels == truth[:160]).all()
    for cells, kind in (
        ([["b", "a"], [], None, ["a", "a"]], pa.list_(pa.string())),
        ([[7, 5], [], None, [5]], pa.large_list(pa.int64())),
    ):
        table = pa.table({"image": list("wxyz"), "label": pa.array(cells, kind)})
        pq.write_table(table, tmp_path / "t.parquet")
        dataset = Table.parse({"train": str(tmp_path / "t.parquet")}).open("train")
        assert dataset.labels.tolist() == [[1, 1], [0, 0], [0, 0], [1, 0]]
        assert len(dataset.classes) == 2
    for cells, message in (
        ([["a"], [None]], r"t.parquet\[1\]: no label"),
        ([[0.5]], r"t.parquet\[0\]: the label 0.5 is neither"),
        ([[["a"]]], r"t.parquet\[0\]: the label \['a'\] is neither"),
    ):
        table = pa.table({"image": [f"{i}" for i in range(len(cells))], "label": cells})
        pq.write_table(table, tmp_path / "t.parquet")
        with pytest.raises(DataError, match=message):
            Table.parse({"train": str(tmp_path / "t.parquet")}).open("train")


def test_a_large_table_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LARGE", 1)
    text = "image,label\na.png,dog;cat\nb.png,\nc.png,cat\n"
    first = opened(text, tmp_path, separator=";")
    with monkeypatch.context() as patch:
        patch.setattr(Table, "_build", lambda *_: pytest.fail("it was read again"))
        again = Table.parse({"train": str(tmp_path / "t.csv"), "separator": ";"}).open("train")
    assert again.labels.tolist() == first.labels.tolist()
    assert fingerprint(again) == fingerprint(first)
    with pytest.raises(DataError, match=r"t.csv\[1\]: no label"):  # with one label a row it is another table
        Table.parse({"train": str(tmp_path / "t.csv")}).open("train")


def test_a_share_of_all_images_is_held_out(marks):
    folder, truth = marks
    source = Table.parse({"train": str(folder / "train.csv"), "separator": "|", "val": 0.25})
    kept, held = source.open("train"), source.open("val")
    assert (len(kept), len(held)) == (120, 40)
    assert (source.open("val").labels == held.labels).all()
    assert (kept.counts + held.counts == truth[:160].sum(0)).all()
    (folder / "two.csv").write_text("image,label\na.png,x\nb.png,y\n")
    source = Table.parse({"train": str(folder / "two.csv"), "separator": "|", "val": 0.01})
    assert (len(source.open("train")), len(source.open("val"))) == (1, 1)
    (folder / "two.csv").write_text("image,label\na.png,x\n")
    with pytest.raises(DataError, match=r"two.csv' has one image, so none can be held out"):
        source.open("val")


def test_check_counts_images_of_none_and_finds_conflicts(vit, folder, marks, tmp_path):
    said = vit(
        "data", "check", "train.csv", "--separator", "|", "--jobs", 1, "--histogram", tmp_path / "h.png", "--json"
    )
    assert said.code == 0, said.err
    truth = marks[1][:160]
    assert said.json["classes"]["train"] == dict(zip(NAMES, truth.sum(0).tolist(), strict=True))
    assert said.json["unlabelled"] == {"train": int((~truth.any(1)).sum())}
    assert said.json["conflicts"] == []
    shutil.copy(folder / "images/000.png", folder / "images/same.png")
    shutil.copy(folder / "images/000.png", folder / "images/other.png")
    (folder / "c.csv").write_text("image,label\nimages/000.png,a|b\nimages/same.png,b|a\nimages/001.png,\n")
    said = vit("data", "check", "c.csv", "--separator", "|", "--jobs", 1)
    assert said.code == 0, said.err
    assert "train\t3 images, 2 classes of 2 to 2, 1 without a label" in said.out
    assert "same bytes\t1" in said.out
    with (folder / "c.csv").open("a") as file:
        file.write("images/other.png,a\n")
    said = vit("data", "check", "c.csv", "--separator", "|", "--jobs", 1, "--json")
    assert said.code == 3
    assert len(said.json["conflicts"]) == 1


# Loading.


def test_labels_are_those_of_the_image_that_was_loaded(marks, tmp_path):
    folder, _ = marks
    text = (folder / "train.csv").read_text().splitlines()[:41]
    shutil.copytree(folder / "images", tmp_path / "images")
    for number in (3, 17):
        (tmp_path / f"images/{number:03}.png").write_bytes(b"broken")
    dataset = opened("\n".join(text), tmp_path, separator="|")
    found = {dataset.pixels(i).numpy().tobytes(): dataset.labels[i] for i in range(40) if i not in (3, 17)}
    for workers in (0, 2):
        crop = {"crop": "central_crop", "flip": False}
        config = {"source": "digits", "res": 16, "augment": crop, "workers": workers, "bad_images": 0.1}
        batches = list(train_batches(DataConfig.parse(config), dataset, batch=20, seed=0, start=0, steps=2))
        assert sum(len(batch.get("bad", ())) for batch in batches) == 2
        for batch in batches:
            assert (batch["labels"].dtype, batch["labels"].shape) == (torch.bool, (20, 3))
            for image, labels in zip(batch["images"], batch["labels"], strict=True):
                assert (found[image.numpy().tobytes()] == labels.numpy()).all()
        scored = list(eval_batches(DataConfig.parse(config).preprocessing, dataset, batch=7, workers=workers))
        labels = torch.cat([batch["labels"] for batch in scored]).numpy()
        assert (labels == np.delete(dataset.labels, (3, 17), axis=0)).all()


def test_kept_images_have_the_same_labels():
    labels = np.random.default_rng(0).random((40, 5)) < 0.3
    dataset = Numbered("abcde", labels)
    augment = {"crop": "random_crop", "pad": 1}
    found = []
    for keep in (False, True):
        config = {"source": "digits", "res": 8, "augment": augment, "workers": 0, "keep": keep}
        batches = train_batches(DataConfig.parse(config), dataset, batch=10, seed=1, start=1, steps=6)
        found.append(torch.cat([batch["labels"] for batch in batches]))
    assert torch.equal(*found)
    assert (found[0].dtype, found[0].shape) == (torch.bool, (50, 5))


def test_the_fingerprint_of_one_label_is_what_it_was_and_of_several_tells_them():
    one = Numbered("ab", [0, 1, 1])
    digest = hashlib.sha256(json.dumps(("a", "b")).encode() + np.array([0, 1, 1], "<i8").tobytes())
    assert fingerprint(one) == digest.hexdigest()
    several = [fingerprint(Numbered("ab", labels)) for labels in ([[True, False]], [[False, True]], [[True, True]])]
    assert len(set(several)) == 3


def test_mixed_targets_are_shares_of_all_labels():
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    targets = targets_of(labels, 3)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, labels.float())
    images = torch.rand(4, 3, 8, 8)
    mixed_images, mixed = mix(images, targets, Augment.parse({"mixup": 0.5}), np.random.default_rng(0))
    share = mixed[0, 0]  # the predecessor, the last, has no such label
    assert 0.5 <= share < 1
    assert torch.allclose(mixed, share * targets + (1 - share) * targets.roll(1, 0))
    assert torch.allclose(mixed_images, share * images + (1 - share) * images.roll(1, 0))


# Sampling.


def test_an_image_is_repeated_as_its_rarest_class():
    labels = np.zeros((1000, 3), dtype=bool)
    labels[:900, 0], labels[880:960, 1], labels[890:899, 2] = True, True, True  # 900, 80 and 9 images
    dataset = Arrays("several", np.zeros((1000, 1, 1), np.uint8), labels, list("abc"))
    dataset.labels = labels
    factor = np.sqrt(0.1 / np.array([1.0, 0.08, 0.009])).clip(1)
    expected = np.ones(1000)
    expected[880:960], expected[890:899] = factor[1], factor[2]
    orders = [epoch_order(dataset, "repeat_factor", 0.1, np.random.default_rng(seed)) for seed in range(300)]
    shown = np.mean([np.bincount(order, minlength=1000) for order in orders], 0)
    scale = expected.mean()
    for part in (slice(0, 880), slice(900, 960), slice(890, 899), slice(960, 1000)):
        assert shown[part].mean() * scale == pytest.approx(expected[part].mean(), rel=0.05)
    (line,) = told(dataset, "repeat_factor", 0.1)
    smallest = f"the smallest class {factor[2] / scale:.3g} times, of the largest {1 / scale:.3g} times"
    assert line.endswith(f"3 classes of 9 to 900 images, threshold 0.1: an epoch shows an image of {smallest}")
    for refuse in (lambda: told(dataset, "balanced", 0.1), lambda: epoch_order(dataset, "balanced", 0.1, None)):
        with pytest.raises(RecipeError, match="which classes that share images do not allow"):
            refuse()
    assert told(dataset, "uniform", 0.1) == ()


# Scores.


def test_scores_are_scikit_learns():
    chance = np.random.default_rng(0)
    logits, truth = chance.normal(size=(60, 10)).round(1).astype(np.float32), chance.random((60, 10)) < 0.3
    truth[:, 4] = False  # a class without images
    order, thresholds = chance.permutation(10), tuple(chance.random(10).tolist())
    names, p = [chr(ord("a") + number) for number in order], 1 / (1 + np.exp(-logits.astype(np.float64)))
    predictor = Answers(logits)

    def check(images=range(60), classes=10, least=thresholds, **options):
        """The scores of these images, of which some classes are told."""
        predictor.thresholds = least
        broken = set(range(60)) - set(images)
        dataset = Numbered(names[:classes], truth[:, order[:classes]], broken=broken)
        scores = score(predictor, dataset, allow_bad=bool(broken), **options)
        known = np.zeros_like(truth)
        known[:, order[:classes]] = truth[:, order[:classes]]
        told, yes, seen = known[images], p[images] >= (least or 0.5), known[images].any(0)
        expected = average_precision_score(told[:, seen], logits[images][:, seen], average="macro")
        assert scores.map == pytest.approx(expected)
        assert scores.f1_macro == pytest.approx(f1_score(told[:, seen], yes[:, seen], average="macro"))
        assert scores.f1_micro == pytest.approx(f1_score(told, yes, average="micro"))
        losses = -(told * np.log(p[images]) + ~told * np.log(1 - p[images])).sum(1)
        assert scores.loss == pytest.approx(losses.mean(), rel=1e-9)
        assert (scores.images, scores.seen, scores.classes) == (len(images), seen.sum(), 10)
        assert scores.headline == ("map", "mAP", scores.map)
        assert scores.best_thresholds[4] == 0.5

    for batch in (1, 7, 60):
        check(batch=batch)
    check(classes=3, batch=9)  # the others are in no image
    check(least=None, batch=9)
    check(images=[*range(1, 5), *range(6, 59)], batch=4)
    with pytest.raises(DataError, match="none of the 60 images has a label"):
        score(predictor, Numbered(names, np.zeros((60, 10), dtype=bool)), batch=9)


def test_shares_of_several_processes_add_up():
    chance = np.random.default_rng(1)
    logits = torch.from_numpy(chance.normal(size=(50, 4)).astype(np.float32))
    labels = torch.from_numpy(chance.random((50, 4)) < 0.4)
    facts = {"seen": 4, "classes": 4, "bad": (), "seconds": 1.0, "waiting": 0.0}
    whole, first, second = (MultiLabelTally(torch.arange(4), None) for _ in range(3))
    whole.add(logits, labels)
    first.add(logits[::2], labels[::2])
    second.add(logits[1::2], labels[1::2])
    both, alone = (first + second).scores(facts), whole.scores(facts)
    assert both.loss == pytest.approx(alone.loss)
    assert {**vars(both), "loss": 0} == {**vars(alone), "loss": 0}


@pytest.mark.parametrize("seed", range(30))
def test_the_best_threshold_has_the_best_f1_of_all(seed):
    chance = np.random.default_rng(seed)
    levels, images = chance.integers(1, 40), chance.integers(1, 40)
    p, truth = chance.integers(0, levels, images) / levels, chance.random(images) < chance.random()
    found = best_threshold(p, truth)
    if not truth.any():
        assert found == 0.5
        return
    f1 = {t: f1_score(truth, p >= t) for t in {*p.tolist(), 0.0}}
    assert f1_score(truth, p >= found) == pytest.approx(max(f1.values()))
    assert 0 <= found <= 1
    highest = max(t for t in p.tolist() if f1[t] >= max(f1.values()) - 1e-12)
    assert (p >= found).sum() == (p >= highest).sum()


def test_a_threshold_lies_midway():
    assert best_threshold(np.array([0.9, 0.2, 0.8]), np.array([True, False, True])) == pytest.approx(0.5)
    assert best_threshold(np.array([0.9, 0.2]), np.array([True, True])) == pytest.approx(0.1)
    assert best_threshold(np.zeros(3), np.ones(3, dtype=bool)) == 0


def test_the_loss_that_training_minimises_is_the_one_that_is_scored():
    logits, labels = torch.randn(6, 4), torch.rand(6, 4) < 0.5
    tally = MultiLabelTally(torch.arange(4), None)
    tally.add(logits, labels)

    class Model(torch.nn.Module):
        def forward(self, images):
            return images

    module = Classify.parse({"loss": "sigmoid"}).build(Model())
    trained = module({"images": logits, "targets": targets_of(labels, 4)})["loss"]
    assert tally.loss / 6 == pytest.approx(float(trained), rel=1e-6)
    assert float(trained) == pytest.approx(
        float(F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum") / 6), rel=1e-6
    )


def test_tiny_runs_on_one_label_are_scored_as_before(vit, tmp_path):
    said = vit("pretrain", "quickstart", *sets(*TINY, "steps=5", "eval_every=2"), "--run", tmp_path / "run", "--json")
    assert said.code == 0, said.err
    assert said.json["measure"] == "top-1"
    assert [row.keys() - {"step"} for row in log(tmp_path / "run") if "val_loss" in row][-1] == {
        "val_loss",
        "val_top1",
        "val_top5",
    }
    assert json.loads((tmp_path / "run/best/config.json").read_text())["vitcli"]["thresholds"] is None
    assert "problem_type" not in json.loads((tmp_path / "run/best/config.json").read_text())
