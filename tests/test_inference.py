import csv
import io
import json
import os
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

from vitcli import inference, runtime
from vitcli.checkpoint import Trained
from vitcli.data import Preprocessing
from vitcli.data.imagenet import WNIDS
from vitcli.data.images import BadImage
from vitcli.data.sources import Dataset
from vitcli.data.sources.folder import Folder
from vitcli.errors import CheckpointError, DataError, NumericsError, UserError
from vitcli.exporters import onnx as to_onnx
from vitcli.inference import Answer, Guess, find_images, open_predictor, predict, torch_predictor
from vitcli.model import ViTConfig
from vitcli.report import tables
from vitcli.runtime import RuntimeConfig
from vitcli.scoring import score

NAMES = tuple("abcdefghij")
RES = Preprocessing(res=(8, 8))


class Numbered(Dataset):
    """Images of one grey level, which says which image it is. Those in `broken` cannot be read."""

    in_memory = True

    def __init__(self, classes, labels, broken=()):
        self.classes, self.labels, self.broken = tuple(classes), np.array(labels), set(broken)

    @property
    def identity(self):
        return b""

    def image(self, index):
        if index in self.broken:
            raise BadImage(self.path(index), "broken")
        return Image.new("RGB", (8, 8), (index, index, index))

    def path(self, index):
        return f"image {index}"


class Table:
    """A predictor that looks the answer for an image up by its grey level."""

    thresholds, whole = None, False

    def __init__(self, logits, classes=NAMES):
        self.table, self.classes = torch.as_tensor(logits, dtype=torch.float32), tuple(classes)
        self.preprocessing, self.origin, self.batches = RES, "table", []

    def logits(self, images):
        self.batches.append(len(images))
        return self.table[images[:, 0, 0, 0].long()]


def brute_force(logits, truth, allowed):
    """Share of images whose best class, among the allowed, is the true one; ties to the first."""
    right = 0
    for row, label in zip(logits, truth, strict=True):
        right += max(allowed, key=lambda c: (row[c], -c)) == label
    return right / len(truth)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("levels", [3, 1000])
def test_score_is_brute_force_by_name(seed, levels):
    """Whatever the order of the data's classes, however many it holds, and with many equal logits (3 levels)."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(NAMES)[: rng.integers(1, 11)]
    labels = rng.integers(0, len(classes), 60)
    logits = rng.integers(0, levels, (60, 10)).astype(np.float32)
    truth = [NAMES.index(classes[label]) for label in labels]
    scores = score(Table(logits), Numbered(classes, labels), batch=7)

    assert scores.images == 60
    assert scores.classes == 10
    assert scores.seen == len(set(truth))
    assert scores.top1 == brute_force(logits, truth, range(10))
    order = [sorted(range(10), key=lambda c: (-row[c], c)) for row in logits]
    assert scores.top5 == sum(t in best[:5] for t, best in zip(truth, order, strict=True)) / 60
    expected = F.cross_entropy(torch.tensor(logits, dtype=torch.float64), torch.tensor(truth)).item()
    assert scores.loss == pytest.approx(expected, rel=1e-12)
    if scores.seen < 10:
        assert scores.top1_seen == brute_force(logits, truth, sorted(set(truth)))
    else:
        assert scores.top1_seen is None


def test_score_does_not_depend_on_the_batch():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 61)
    logits = rng.normal(size=(61, 10))
    results = []
    for batch in (1, 7, 60, 61, 500):
        table = Table(logits)
        scores = score(table, Numbered(NAMES, labels), batch=batch)
        assert sum(table.batches) == 61
        results.append((scores.images, scores.top1, scores.top5, round(scores.loss, 12)))
    assert len(set(results)) == 1


def test_imagenet_classes_meet_by_wordnet_id():
    """A data set of a few ImageNet folders in any order, against all 1,000 columns."""
    chosen = [WNIDS[i] for i in (999, 7, 388)]
    logits = np.zeros((3, 1000))
    logits[[0, 1, 2], [999, 7, 388]] = 1
    scores = score(Table(logits, WNIDS), Numbered(chosen, [0, 1, 2]), batch=2)
    assert (scores.top1, scores.seen, scores.classes) == (1.0, 3, 1000)
    shuffled = score(Table(logits, WNIDS), Numbered(chosen[::-1], [0, 1, 2]), batch=2)
    assert shuffled.top1 == pytest.approx(1 / 3)


def test_a_class_that_the_model_does_not_know_is_named():
    with pytest.raises(DataError, match="'zebra'"):
        score(Table(np.zeros((1, 10))), Numbered(["a", "zebra"], [0]), batch=1)


def test_a_class_without_images_is_not_seen():
    scores = score(Table(np.eye(10)), Numbered("abc", [0, 0, 2]), batch=2)
    assert scores.seen == 2


def test_a_broken_image_ends_the_score_or_is_counted():
    logits = np.eye(10)
    data = Numbered(NAMES, range(10), broken=[3, 4])
    with pytest.raises(DataError, match="image 3: broken"):
        score(Table(logits), data, batch=4)
    for batch in (1, 2, 10):  # at 1, whole batches are broken
        done = []
        scores = score(Table(logits), data, batch=batch, allow_bad=True, on_batch=done.append)
        assert (scores.images, scores.top1, scores.seen) == (8, 1.0, 10)
        assert [bad.split(":")[0] for bad in scores.bad] == ["image 3", "image 4"]
        assert sum(done) == 10


def test_nothing_but_broken_images_is_an_error():
    with pytest.raises(DataError, match="no image to score"):
        score(Table(np.eye(10)), Numbered(NAMES, [0, 1], broken=[0, 1]), batch=2, allow_bad=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_never_scored_as_right(value):
    with pytest.raises(NumericsError, match="NaN"):
        score(Table(np.full((1, 10), value)), Numbered(NAMES, [0]), batch=1)


def random_model(classes=NAMES, size=(32, 32), **options) -> Trained:
    config = ViTConfig.parse({"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2, "patch": 8, **options})
    torch.manual_seed(0)
    model = config.build(len(classes), size).eval()
    if classes:
        torch.nn.init.normal_(model.head.weight)
    return Trained(model, config, tuple(classes), size, Preprocessing(res=size), "a random model")


def test_a_model_in_training_is_scored_in_eval_mode_and_left_as_it_was():
    trained = random_model(dropout=0.5)
    started = runtime.start(RuntimeConfig(device="cpu", precision="fp32"))
    predictor = inference.TorchPredictor(trained.model, NAMES, trained.preprocessing, started, "run")
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = predictor.logits(images)
    trained.model.train()
    data = Numbered(NAMES, range(10))
    first, second = (score(predictor, data, batch=4) for _ in range(2))
    assert trained.model.training
    assert all(part.training for part in trained.model.modules())
    assert first.loss == second.loss
    assert torch.equal(predictor.logits(images), expected)
    assert not expected.requires_grad


def test_a_model_without_pooling_answers_with_the_mean_of_its_tokens():
    trained = random_model(pool="none")
    predictor = torch_predictor(trained, "cpu")
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    assert predictor.logits(images).shape == (3, 10)
    with torch.no_grad():
        assert torch.allclose(predictor.logits(images), trained.model(torch.full((3, 3, 32, 32), -1.0)).mean(1))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Class folders of noise, a nested folder, and what is not an image."""
    rng = np.random.default_rng(0)
    for name in ("b/2.png", "b/1.PNG", "a/deep/x.jpg", "a/0.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"")
    return tmp_path / "images"


def test_a_folder_is_walked_in_order(folder):
    (folder / "loop").symlink_to(folder)
    found = find_images([str(folder)])
    assert [os.path.relpath(path, folder) for path in found] == ["a/0.png", "a/deep/x.jpg", "b/1.PNG", "b/2.png"]


def test_files_patterns_and_missing_ones_keep_their_order(folder, monkeypatch):
    monkeypatch.chdir(folder)
    args = ["./b/2.png", "absent.jpg", "b/*.*", "**/*.jpg", "no*match", "notes.txt"]
    assert find_images(args) == [
        "./b/2.png", "absent.jpg", "b/1.PNG", "b/2.png", "a/deep/x.jpg", "no*match", "notes.txt",
    ]  # fmt: skip


def test_a_name_with_pattern_characters_is_a_name(tmp_path):
    (tmp_path / "a[1].png").touch()
    assert find_images([str(tmp_path / "a[1].png")]) == [str(tmp_path / "a[1].png")]


def test_a_list_on_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b.png\n\n*.jpg\r\ncaf\xe9.png")))
    assert find_images(["first.png", "-"]) == ["first.png", "a b.png", "*.jpg", "caf\udce9.png"]


def test_no_images_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no images in"):
        find_images([str(tmp_path)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(DataError, match="no images given"):
        find_images(["-"])


@pytest.fixture(scope="module")
def model_files(tmp_path_factory) -> dict[str, inference.Predictor]:
    """A model with ImageNet's classes, and its export."""
    trained = random_model(WNIDS, (32, 48))
    file = tmp_path_factory.mktemp("model") / "model.ONNX"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        to_onnx.export(trained, file)
    return {"checkpoint": torch_predictor(trained, "cpu"), "onnx": open_predictor(file)}


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_predict_answers_in_order_and_tells_what_failed(model_files, folder, kind):
    predictor = model_files[kind]
    good = find_images([str(folder)])
    paths = [good[0], "absent.jpg", good[3], str(folder / "notes.txt"), good[1], str(folder)]
    for batch in (1, 2, 4, 100):
        answers = list(predict(predictor, paths, top=3, batch=batch))
        assert [answer.path for answer in answers] == paths
        assert [answer.error is None for answer in answers] == [True, False, True, False, True, False]
        assert "No such file" in answers[1].error
        for answer in (answers[0], answers[2], answers[4]):
            assert len(answer.top) == 3
            assert [guess.probability for guess in answer.top] == sorted(
                (guess.probability for guess in answer.top), reverse=True
            )
            assert all(guess.id in WNIDS and guess.name != guess.id for guess in answer.top)
        assert all(not answers[i].top for i in (1, 3, 5))


def test_checkpoint_and_onnx_name_and_score_alike(model_files, folder):
    answers = {kind: list(predict(p, find_images([str(folder)]), top=1000)) for kind, p in model_files.items()}
    for ours, theirs in zip(answers["checkpoint"], answers["onnx"], strict=True):
        assert sum(guess.probability for guess in ours.top) == pytest.approx(1)
        assert [guess.id for guess in ours.top[:3]] == [guess.id for guess in theirs.top[:3]]
        assert ours.top[0].probability == pytest.approx(theirs.top[0].probability, rel=1e-4)
    data = Numbered([WNIDS[i] for i in range(50)], range(50))
    scores = {kind: score(predictor, data, batch=8) for kind, predictor in model_files.items()}
    assert scores["checkpoint"].top5 == scores["onnx"].top5
    assert scores["checkpoint"].loss == pytest.approx(scores["onnx"].loss, rel=1e-5)


def test_equal_probabilities_go_to_the_lower_index():
    predictor = Table(np.zeros((256, 10)))
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert [guess.id for guess in inference._guesses(predictor, images, 4)[0]] == ["a", "b", "c", "d"]


def test_more_guesses_than_classes_gives_all(folder):
    (answer,) = predict(Table(np.zeros((256, 10))), [str(folder / "a" / "0.png")], top=99)
    assert len(answer.top) == 10


def test_no_paths_no_answers():
    assert list(predict(Table(np.zeros((256, 10))), [])) == []


def test_open_predictor_says_what_an_option_is_for(tmp_path):
    with pytest.raises(UserError, match="--device cuda does not apply"):
        open_predictor(tmp_path / "model.onnx", device="cuda")
    with pytest.raises(UserError, match="--provider cpu applies to"):
        open_predictor(tmp_path, provider="cpu")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_predictor(tmp_path / "absent")


def test_a_checkpoint_without_head_names_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(inference.checkpoint, "load", lambda path: random_model(()))
    with pytest.raises(CheckpointError, match="names no classes"):
        open_predictor(tmp_path)


ANSWERS = [
    Answer("ok.jpg", (Guess("n01440764", "tench, Tinca tinca", 0.75), Guess("=1+1", "=1+1", 0.25))),
    Answer("-rm \x1b[2J\n[red]\udce9.jpg", (Guess("a", "a", 1.0),)),
    Answer("bad\u202e.jpg", error="broken \x07image"),
]


def test_json_round_trips_any_file_name():
    text = tables.answers_json(ANSWERS, "a model")
    assert text.isascii()
    assert "\n" not in text
    parsed = json.loads(text)
    assert parsed["model"] == "a model"
    assert [image["path"] for image in parsed["images"]] == [answer.path for answer in ANSWERS]
    assert os.fsencode(parsed["images"][1]["path"]).endswith(b"\xe9.jpg")
    first = {"class": "n01440764", "name": "tench, Tinca tinca", "probability": 0.75}
    assert parsed["images"][0]["top"][0] == first
    assert parsed["images"][2] == {"path": "bad\u202e.jpg", "error": "broken \x07image"}
    assert [json.loads(line) for line in tables.answers_jsonl(ANSWERS)] == parsed["images"]


def test_csv_cells_are_no_formulas():
    text = "\n".join(tables.answers_csv(ANSWERS))
    assert text.encode()  # no lone surrogates
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[0] == ["path", "rank", "class", "name", "probability", "error"]
    assert rows[1] == ["ok.jpg", "1", "n01440764", "tench, Tinca tinca", "0.75", ""]
    assert rows[2][2:4] == ["'=1+1", "'=1+1"]
    assert rows[3][0] == "'-rm \x1b[2J\n[red]\\udce9.jpg"
    assert rows[4] == ["bad\u202e.jpg", "", "", "", "", "broken \x07image"]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_every_start_of_a_formula_is_quoted(start):
    (_, line) = tables.answers_csv([Answer(f"{start}x", error="e")])
    assert next(csv.reader(io.StringIO(line, newline="")))[0] == f"'{start}x"


def test_lines_and_table_hold_no_control_characters():
    lines = list(tables.answers_lines(ANSWERS))
    assert lines[0] == "ok.jpg\t0.7500\ttench, Tinca tinca\t0.2500\t=1+1"
    assert lines[1] == "-rm \\x1b[2J\\n[red]\\udce9.jpg\t1.0000\ta"
    assert lines[2] == "bad\\u202e.jpg\terror: broken \\x07image"
    for width, color in ((100, None), (20, None), (100, "truecolor")):
        console = Console(width=width, file=io.StringIO(), color_system=color, force_terminal=bool(color))
        console.print(tables.answers_table(ANSWERS))
        shown = console.file.getvalue()
        assert "\x1b[2J" not in shown
        assert "\x07" not in shown
        assert "\u202e" not in shown
        assert width == 20 or "75.00%" in shown
    assert "[red]" in shown


def test_scores_are_shown(model_files):
    scores = score(Table(np.eye(10)), Numbered("ba", [0, 1, 0, 1], broken=[3]), batch=3, allow_bad=True)
    lines = dict(line.split("\t") for line in tables.scores_lines(scores))
    assert lines["images"] == "3"
    assert lines["classes"] == "2 of 10"
    assert lines["top-1"] == "0.00%"
    assert lines["top-1 among the 2 classes"] == "0.00%"
    assert lines["unreadable, not scored"] == "1"
    console = Console(width=80, file=io.StringIO())
    console.print(tables.scores_table(scores))
    assert "2 of 10" in console.file.getvalue()
    parsed = json.loads(tables.scores_json(scores, "a model"))
    assert parsed["images"] == 3
    assert parsed["bad"] == ["image 3: broken"]
    assert parsed["images_per_second"] > 0


@pytest.mark.slow
def test_deit_tiny_names_real_images(shared):
    """The weights' README says 79.5 % on all 1,000 sample images; of these 200, at least 70 % must be right."""
    predictor = open_predictor(shared / "data" / "deit_tiny_patch16_224.pth", device="cpu")
    dataset = Folder(path=str(shared / "data" / "imagenet200")).open_for_scoring()
    scores = score(predictor, dataset, batch=16)
    print(scores)
    assert (scores.images, scores.seen, scores.classes) == (200, 200, 1000)
    assert scores.top1 > 0.7
    assert scores.top1_seen >= scores.top1
    paths = [dataset.path(i) for i in range(len(dataset))]
    answers = list(predict(predictor, paths, top=1))
    right = [answer.top[0].id == dataset.classes[dataset.labels[i]] for i, answer in enumerate(answers)]
    assert sum(right) == round(scores.top1 * 200)
