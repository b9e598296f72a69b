"""The commands as a user types them, on real images."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import TINY, Vit, finish, process, sets
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from vitcli import checkpoint, recipe_files
from vitcli.processes import Processes


@pytest.fixture
def vit(capsys, monkeypatch, tmp_path) -> Vit:
    monkeypatch.chdir(tmp_path)
    return Vit(capsys, monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run on the digits, good enough to be right more often than not."""
    folder = tmp_path_factory.mktemp("trained")
    few = sets("epochs=8", "runtime.threads=1", "runtime.precision=fp32", "eval_every=88")
    said = finish(process("pretrain", "quickstart", *few, "--json", cwd=folder))
    assert said.code == 0, said.err
    outcome = json.loads(said.out)
    assert outcome["run"] == "runs/quickstart"
    assert outcome["best_score"] > 0.5
    return folder / "runs" / "quickstart"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Held-out digits as files in class folders."""
    folder = tmp_path_factory.mktemp("digits")
    found = load_digits()
    for index in range(0, 300, 5):
        place = folder / str(found.target[index])
        place.mkdir(exist_ok=True)
        pixels = np.round(found.images[index] * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{index:04d}.png")
    return folder


def test_run_folder(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {"recipe.yaml", "recipe.resolved.yaml", "env.json", "train.log", "metrics.jsonl", "results.png"}
    assert names >= {"checkpoints", "best", "last"}
    assert (run / "recipe.yaml").read_text() == recipe_files.text("quickstart")
    with Image.open(run / "results.png") as picture:
        assert picture.width > 800


def test_eval_counts_every_image_whatever_the_batch(vit, run):
    scores = [vit("eval", "--ckpt", run, "--batch", batch, "--json").json for batch in (7, 64, 1000)]
    assert [score["images"] for score in scores] == [359] * 3
    assert len({(score["top1"], score["top5"]) for score in scores}) == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert scores[0]["top1"] == max(row["val_top1"] for row in rows if "val_top1" in row)


def test_eval_finds_the_images_of_the_run_whatever_part_of_it_is_named(vit, run):
    for place in (run, run / "best", run / "best/model.safetensors"):
        said = vit("eval", "--ckpt", place, "--json")
        assert (said.code, said.json["images"]) == (0, 359), said.err


def test_eval_does_not_score_other_images_in_their_stead(vit, photos, tmp_path, monkeypatch):
    """The run's data is named relative to where it was trained."""
    for place in ("one", "two"):
        shutil.copytree(photos, tmp_path / place / "photos")
    (tmp_path / "two/photos/val/a/01.png").rename(tmp_path / "two/photos/val/a/09.png")
    monkeypatch.chdir(tmp_path / "one")
    data = "data={source: {name: folder, path: photos}, res: 8, classes: 2}"
    said = vit("pretrain", "quickstart", *sets(*TINY, data, "steps=6"), "--run", "run")
    assert said.code == 0, said.err
    said = vit("eval", "--ckpt", "run")
    assert said.code == 0
    assert "scoring run/best (step " in said.err
    monkeypatch.chdir(tmp_path / "two")
    for place in ("run", "run/best", "run/checkpoints/step_00000006"):
        said = vit("eval", "--ckpt", tmp_path / "one" / place)
        assert said.code == 3
        assert "not those that the run held out" in said.err
    assert vit("eval", "--ckpt", tmp_path / "one/run", "--data", "photos").code == 0


def test_a_reader_that_has_seen_enough_is_no_mistake(tmp_path):
    with process("recipes", "keys", cwd=tmp_path) as started:
        assert started.stdout
        started.stdout.close()
        assert started.wait() == 0
        assert started.stderr
        assert started.stderr.read() == ""


def test_help_is_not_told_as_a_mistake(vit):
    said = vit("data")
    assert "check" in said.out + said.err
    assert "error:" not in said.err


def test_eval_of_a_table_reads_the_columns_of_the_run(vit, photos, tmp_path):
    for split in ("train", "val"):
        rows = [f"{split}/{path.parent.name}/{path.name},{path.parent.name}" for path in photos.glob(f"{split}/*/*")]
        (tmp_path / f"{split}.csv").write_text("\n".join(["file,kind", *rows]) + "\n")
    source = f"source: {{name: table, train: train.csv, val: val.csv, root: {photos}, image: file, label: kind}}"
    settings = sets(*TINY, f"data={{{source}, res: 8, classes: 2}}", "steps=6")
    said = vit("pretrain", "quickstart", *settings, "--run", "run")
    assert said.code == 0, said.err
    own = vit("eval", "--ckpt", "run", "--json").json
    (tmp_path / "other.csv").write_text((tmp_path / "val.csv").read_text().replace("val/", f"{photos.name}/val/"))
    (tmp_path / photos.name).symlink_to(photos)
    said = vit("eval", "--ckpt", "run", "--data", "other.csv", "--json")
    assert said.code == 0, said.err
    assert (said.json["images"], said.json["top1"]) == (own["images"], own["top1"])


def test_shards_are_not_packed_into_their_images(vit, photos):
    said = vit("data", "pack", photos, f"{photos}/../{photos.name}")
    assert said.code == 2
    assert "is the folder that is to be packed" in said.err


def test_eval_below_the_bar_ends_with_3(vit, run):
    said = vit("eval", "--ckpt", run, "--min-top1", "1.0")
    assert said.code == 3
    assert "below --min-top1" in said.err


def test_eval_of_a_folder_matches_classes_by_name(vit, run, digits, tmp_path):
    whole = vit("eval", "--ckpt", run, "--data", digits, "--json").json
    shared = vit("eval", "--ckpt", run, "--data", digits, "--workers", 2, "--json").json
    assert {key: shared[key] for key in ("images", "loss", "top1")} == {
        key: whole[key] for key in ("images", "loss", "top1")
    }
    assert (whole["images"], whole["seen"]) == (60, 10)
    part = tmp_path / "some"
    part.mkdir()
    right = 0
    for label in ("3", "8"):
        (part / label).symlink_to(digits / label)
        answers = vit("predict", digits / label, "--ckpt", run, "--top", 1, "--jsonl").out.splitlines()
        right += sum(json.loads(line)["top"][0]["class"] == label for line in answers)
    scored = vit("eval", "--ckpt", run, "--data", part, "--json").json
    assert (scored["seen"], scored["classes"]) == (2, 10)
    assert scored["top1"] * scored["images"] == pytest.approx(right)


def test_export_answers_as_the_checkpoint(vit, run, digits, tmp_path):
    said = vit("export", "--onnx", "--ckpt", run, "-o", tmp_path / "model.onnx", "--json")
    assert said.code == 0, said.err
    assert said.json["parity"]["agreement"] == 1.0
    answers = [
        vit("predict", digits, "--ckpt", ckpt, "--json").json["images"] for ckpt in (run, tmp_path / "model.onnx")
    ]
    classes = [[image["top"][0]["class"] for image in images] for images in answers]
    assert classes[0] == classes[1]
    assert sum(name == Path(image["path"]).parent.name for name, image in zip(classes[0], answers[0], strict=True)) > 30
    scores = [vit("eval", "--ckpt", c, "--data", digits, "--json").json["top1"] for c in (run, tmp_path / "model.onnx")]
    assert scores[0] == scores[1]


def test_predict_answers_for_the_readable_and_ends_with_1(vit, run, digits, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = next(digits.glob("*/*.png"))
    said = vit("predict", tmp_path / "broken.png", good, "missing.jpg", "--ckpt", run, "--json")
    assert said.code == 1
    broken, answered, missing = said.json["images"]
    assert "error" in broken
    assert "error" in missing
    assert len(answered["top"]) == 5
    assert "2 of 3 images could not be read" in said.err


def test_newest_finished_run_is_taken_and_said(vit, run, digits, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    said = vit("predict", next(digits.glob("*/*.png")), "--top", 1)
    assert said.code == 0
    assert "using runs/quickstart" in said.err
    assert len(said.out.splitlines()) == 1


@pytest.mark.parametrize("data", [(), ("--data", "nowhere")])
def test_a_checkpoint_that_is_not_there_is_told_first(vit, data):
    said = vit("eval", "--ckpt", "nope", *data)
    assert said.code == 4
    assert said.err.startswith("error: nope does not exist\nhint: --ckpt takes a run folder")


def test_without_a_run(vit):
    said = vit("eval")
    assert said.code == 4
    assert "no finished run" in said.err
    assert "hint: give --ckpt" in said.err


def test_finetune_reports_what_it_changes(vit, run, tmp_path):
    options = sets(
        "batch=64", "steps=6", "optim.warmup_steps=2", "data.source=digits", "eval_every=3", "runtime.threads=1"
    )
    said = vit("finetune", "--ckpt", run, "--classes", 10, "--res", 16, *options, "--run", tmp_path / "tuned", "--json")
    assert said.code == 0, said.err
    assert "position table stretched 4x4 -> 8x8 (bilinear)" in said.err
    assert "old head dropped (10 classes)" in said.err
    assert "new zero head for 10 classes" in said.err
    start = load_file(tmp_path / "tuned" / "checkpoints" / "step_00000003" / "model.safetensors")
    assert start["pos_embed"].shape[1] == 64


def test_finetune_from_deit_weights(vit, shared, tmp_path):
    options = sets(
        "data.source=digits", "batch=4", "steps=1", "optim.warmup_steps=1", "runtime.threads=1", "eval_every=1"
    )
    weights = shared / "data" / "deit_tiny_patch16_224.pth"
    said = vit("finetune", "--ckpt", weights, "--classes", 10, "--res", 32, *options, "--run", tmp_path / "tuned")
    assert said.code == 0, said.err
    assert "position table stretched 14x14 -> 2x2" in said.err
    assert "old head dropped (1000 classes)" in said.err


def test_finetune_checks_the_number_of_classes(vit, run):
    said = vit("finetune", "--ckpt", run, "--data", "digits", "--classes", 11, "--res", 8, *sets("batch=32"))
    assert said.code == 3
    assert "the data has 10 classes, the recipe says 11" in said.err


def test_micro_batches_train_as_the_whole_batch(vit, tmp_path):
    still = [value for value in TINY if not value.startswith("model=")]
    still += ["model={width: 32, depth: 2, mlp_dim: 64, heads: 2, patch: 2}", "steps=8", "eval_every=8"]
    for name, size in (("whole", "null"), ("parts", "12")):
        said = vit("pretrain", "quickstart", *sets(*still, f"runtime.micro_batch={size}"), "--run", tmp_path / name)
        assert said.code == 0, said.err
    whole, parts = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "parts"))
    for key, value in whole.items():
        np.testing.assert_allclose(parts[key], value, atol=2e-5, err_msg=key)


def test_the_average_is_what_is_scored_and_kept(vit, tmp_path):
    said = vit("pretrain", "quickstart", *sets(*TINY, "steps=20", "eval_every=20"), "--run", tmp_path / "run")
    assert said.code == 0, said.err
    final = tmp_path / "run" / "checkpoints" / "step_00000020"
    kept = checkpoint.load(tmp_path / "run" / "last").model.state_dict()
    average = load_file(final / "training.safetensors")
    raw = load_file(final / "model.safetensors")
    for key, value in kept.items():
        np.testing.assert_array_equal(value, average[f"average/model.{key}"])
    assert any((kept[key].numpy() != raw[key]).any() for key in kept)
    top1 = [vit("eval", "--ckpt", place, "--json").json["top1"] for place in (final, tmp_path / "run" / "last")]
    assert top1[0] == top1[1]


def test_not_a_number_ends_with_5_and_saves_no_such_weights(vit, tmp_path):
    wild = sets(*TINY, "optim={lr: 1.0e+30, clip: null}", "steps=20", "log_every=10", "save_every=10")
    said = vit("pretrain", "quickstart", *wild, "--run", tmp_path / "run")
    assert said.code == 5
    assert "lower optim.lr" in said.err
    assert "to the end of training" in said.err
    assert not (tmp_path / "run/last").exists()
    for folder in (tmp_path / "run/checkpoints").iterdir():
        assert all(np.isfinite(tensor).all() for tensor in load_file(folder / "training.safetensors").values())


def test_a_signal_that_comes_while_processes_agree_is_not_lost(vit, tmp_path, monkeypatch):
    turns = iter(range(100))

    def largest(self, number):
        if next(turns) == 2:
            signal.raise_signal(signal.SIGTERM)
        return number

    monkeypatch.setattr(Processes, "largest", largest)
    said = vit("pretrain", "quickstart", *sets(*TINY, "steps=9"), "--run", tmp_path / "run")
    assert said.code == 143
    assert "after step 3 of 9, which is saved" in said.err


@pytest.mark.parametrize("exact", [(), ("runtime.exact=8",)])
def test_a_linear_probe_trains_the_head_alone(vit, run, tmp_path, exact):
    probe = sets("optim.freeze=true", "steps=6", "batch=64", "optim.warmup_steps=1", "runtime.precision=fp32", *exact)
    said = vit("finetune", "--ckpt", run, "--data", "digits", "--res", "8", *probe, "--run", tmp_path / "run")
    assert said.code == 0, said.err
    before, after = (load_file(place / "model.safetensors") for place in (run / "best", tmp_path / "run/last"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}  # as transformers calls the head


def test_a_run_folder_is_never_overwritten(vit, run, tmp_path):
    said = vit("pretrain", "quickstart", "--run", run)
    assert said.code == 4
    assert f"continue it with --resume {run}" in said.err
    wrong = vit("pretrain", "quickstart", *sets(*TINY, "data.classes=9"), "--run", tmp_path / "run")
    assert (wrong.code, "the data has 10 classes" in wrong.err) == (3, True)  # before anything has begun
    assert vit("pretrain", "quickstart", *sets(*TINY, "steps=5"), "--run", tmp_path / "run").code == 0
    (tmp_path / "mine").mkdir()
    assert vit("pretrain", "quickstart", *sets(*TINY, "steps=5"), "--run", tmp_path / "mine").code == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("not a run's")
    assert vit("pretrain", "quickstart", "--run", tmp_path / "other").code == 4


def test_keys_are_listed_with_their_defaults(vit):
    lines = vit("recipes", "keys").out.splitlines()
    of = {line.split()[0]: line.removeprefix(line.split()[0]).strip() for line in lines}
    assert of["optim.lr"].startswith("a number > 0")
    assert "0.001" in of["optim.lr"]
    assert "required" in of["model.width"]
    assert "null" in of["data.workers"]
    assert "constant    cosine" in of["optim.schedule"]


def test_an_unreadable_validation_image_is_told_and_training_goes_on(vit, tmp_path):
    for split, count in (("train", 16), ("val", 4)):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (9 * number, 0, 200 * (name == "a"))).save(
                    tmp_path / "data" / split / name / f"{number}.png"
                )
    (tmp_path / "data/val/b/2.png").write_bytes(b"no image")
    source = f"data.source={{name: folder, path: {tmp_path / 'data'}}}"
    said = vit(
        "pretrain",
        "quickstart",
        *sets(*TINY, source, "data.classes=2", "steps=5", "batch=16"),
        "--run",
        tmp_path / "run",
    )
    assert said.code == 0, said.err
    assert "warning: not scored: " in said.err
    assert "val/b/2.png" in (tmp_path / "run/train.log").read_text()
    assert (tmp_path / "run/best").is_dir()


@pytest.mark.parametrize("name", sorted(recipe_files.shipped()))
def test_dry_run_of_every_shipped_recipe(vit, run, name):
    tuning = name.startswith("finetune")
    command = ["finetune", "--ckpt", run, "--recipe", name] if tuning else ["pretrain", name]
    if name == "finetune":
        command += ["--data", "digits", "--res", "8"]
    said = vit(*command, "--dry-run", "--json")
    assert said.code == 0, said.err
    assert said.json["parameters"] > 0
    assert said.json["steps"] > 0


def test_dry_run_for_several_gpus(vit):
    one, eight = (
        vit("pretrain", "b16_in1k", "--dry-run", "--json", *sets("runtime.device=cpu"), *gpus).json
        for gpus in ((), ("--gpus", "8"))
    )
    assert (eight["processes"], eight["at_a_time"], eight["steps"]) == (8, one["at_a_time"] // 8, one["steps"])
    assert eight["memory"] < one["memory"] / 4
    said = vit("pretrain", "b16_in1k", "--dry-run", "--gpus", "3")
    assert said.code == 2
    assert "cannot be shared equally by 3 processes" in said.err


def test_a_batch_larger_than_the_data_is_refused_by_dry_run_and_training(vit, tmp_path):
    for words in (("--dry-run",), ("--run", tmp_path / "run")):
        said = vit("pretrain", "quickstart", "--set", "batch=5000", *words)
        assert said.code == 3
        assert "a batch of 5000 is more than the 1438 training images" in said.err
        assert "hint: take at most --set batch=1438" in said.err


@pytest.mark.parametrize("name", ["s16_in1k", "b16_in1k", "l16_in1k", "b32_in1k", "l32_in1k"])
def test_dry_run_agrees_with_published_sizes(vit, name):
    backbone = {
        "s16": (21.67, 9.2),
        "b16": (85.8, 35.1),
        "l16": (303.3, 123.1),
        "b32": (87.46, 8.8),
        "l32": (305.5, 30.5),
    }
    parameters, gflops = backbone[name.split("_")[0]]
    said = vit("pretrain", name, "--dry-run", "--json", *sets("model.representation_size=null")).json
    width = {"s16": 384, "b16": 768, "l16": 1024, "b32": 768, "l32": 1024}[name.split("_")[0]]
    assert said["parameters"] / 1e6 - (width + 1) * 1000 / 1e6 == pytest.approx(parameters, rel=0.004)
    assert said["gflops"] == pytest.approx(gflops, rel=0.02)


def test_a_wrong_recipe_and_help_load_no_torch(tmp_path):
    (tmp_path / "wrong.yaml").write_text("model: {varant: B/16}\ndata: {source: digits}\nepochs: 1\n")
    program = (
        "import sys\nfrom vitcli import cli\nsys.argv = ['vit', *sys.argv[1:]]\n"
        "try: cli.main()\nexcept SystemExit as end: code = end.code\n"
        "assert not {'torch', 'torchvision', 'onnx', 'matplotlib'} & sys.modules.keys()\nsys.exit(code)"
    )
    for args, code in ((["pretrain", "wrong.yaml"], 2), (["--help"], 0), (["recipes", "list"], 0)):
        ended = subprocess.run([sys.executable, "-c", program, *args], cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == code, ended.stderr
    assert (
        "did you mean variant?"
        in subprocess.run(
            [sys.executable, "-m", "vitcli", "pretrain", "wrong.yaml"], cwd=tmp_path, capture_output=True, text=True
        ).stderr
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["pretrain", "quickstat"], "did you mean quickstart?"),
        (["pretrain"], "no recipe given"),
        (["pretrain", "quickstart", "--set", "optim.l=1"], "did you mean lr?"),
        (["pretrain", "quickstart", "--bogus"], "No such option"),
        (["finetune"], "no --ckpt given"),
        (["predict"], "Missing argument"),
        (["pretrain", "quickstart", "--set", "track=wandb"], "got 'wandb' (write [wandb])"),
        (
            ["export", "--to", "torchvision", "-o", "model.pth"],
            "writes a .safetensors, not 'model.pth'",
        ),
        (["export", "--onnx", "-o", "model"], "hint: -o model.onnx"),
        (["export"], "no format given"),
        (["pretrain", "quickstart", "--resume", "x"], "a recipe does not go with --resume"),
        (["pretrain", "--resume", "x", "--dry-run"], "--dry-run does not go with --resume"),
        (["finetune", "--resume", "x", "--recipe", "finetune"], "a recipe does not go with --resume"),
    ],
)
def test_mistakes_of_usage_end_with_2(vit, args, words):
    said = vit(*args)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert words in said.err


def test_recipes_commands(vit, tmp_path):
    names = [line.split()[0] for line in vit("recipes", "list").out.splitlines()]
    assert names == sorted(recipe_files.shipped())
    assert vit("recipes", "show", "quickstart").out == recipe_files.text("quickstart")
    assert vit("recipes", "copy", "quickstart").out.strip() == "quickstart.yaml"
    assert (tmp_path / "quickstart.yaml").read_text() == recipe_files.text("quickstart")
    assert vit("recipes", "copy", "quickstart").code == 2
    assert "properties" in vit("recipes", "schema").json
    assert any(line.startswith("optim.lr ") for line in vit("recipes", "keys").out.splitlines())
