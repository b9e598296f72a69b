"""The recipes that come with vitcli: all load, say where they are from, and hold the published numbers."""

import re
import shlex

import pytest

from vitcli import recipe, recipe_files, yaml_tree
from vitcli.errors import RecipeError
from vitcli.model import ViTConfig

SUMMARIES = {summary.name: summary for summary in recipe_files.summaries()}


def load(name: str, *sets: str) -> recipe.Recipe:
    """A shipped recipe; one for fine-tuning gets a model and, where it has none, images."""
    if not SUMMARIES[name].finetunes:
        return recipe.load(name, sets)
    under = {"model": ViTConfig.parse({"variant": "B/16"}).model_dump(mode="json"), "data": {"source": "digits"}}
    return recipe.load(name, sets, under=under)


def test_the_promised_recipes_are_there():
    paper = {f"{size}_{data}" for size in ("b16", "b32", "l16", "l32") for data in ("in21k", "in1k")} | {"h14_in21k"}
    augreg = {
        f"augreg_{size}_{data}" for size in ("ti16", "s32", "s16", "b32", "b16", "l16") for data in ("in1k", "in21k")
    }
    tuning = {f"finetune_{data}" for data in ("in1k_384", "cifar10", "cifar100", "pets", "flowers")} | {"finetune"}
    other = {"quickstart", "cifar10", "s16_in1k", "s16_in1k_300ep", "r50_b16_in21k"}
    assert paper | augreg | tuning | other <= SUMMARIES.keys()


@pytest.mark.parametrize("name", SUMMARIES)
def test_each_loads_and_its_header_says_what_it_is(name):
    text = recipe_files.text(name)
    header = [line for line in text.split("\n") if line.startswith("#")]
    body = text.split("\n")[len(header) : -1]
    assert text.startswith("\n".join(header))
    assert 8 <= len(body) <= 20
    assert max(map(len, text.split("\n"))) <= 120
    assert len(header[0]) > 20
    assert sum(line.startswith("# Source: ") for line in header) == 1
    assert name in ("quickstart",) or sum(line.startswith("# Published: ") for line in header) == 1

    (command,) = [line.removeprefix("# Command: ") for line in header if line.startswith("# Command: ")]
    words = shlex.split(command)
    if SUMMARIES[name].finetunes:
        assert words[:3] == ["vit", "finetune", "--ckpt"]
        assert name == "finetune" or words[4:] == ["--recipe", name]
    else:
        assert words == ["vit", "pretrain", name]

    loaded = load(name)
    again = recipe.check(yaml_tree.read(recipe.dump(loaded), yaml_tree.Place(name, 1, 1)))
    assert again == loaded
    for sets in re.findall(r"--set ([\w.]+=[\w.-]+?)(?=[\s.,;)]*\s|$)", " ".join(header)):
        load(name, sets.rstrip("."))


@pytest.mark.parametrize("name", [name for name, summary in SUMMARIES.items() if summary.finetunes])
def test_one_for_fine_tuning_asks_for_its_model(name):
    with pytest.raises(RecipeError, match=r"model: width, .* are missing") as caught:
        recipe.load(name)
    assert "--ckpt" in caught.value.hint


@pytest.mark.parametrize(
    ("size", "width", "variant"),
    [("b16", 768, "B/16"), ("b32", 768, "B/32"), ("l16", 1024, "L/16"), ("l32", 1024, "L/32"), ("h14", 1280, "H/14")],
)
def test_the_papers_imagenet_21k(size, width, variant):
    r = load(f"{size}_in21k")
    assert (r.model.variant, r.model.representation_size, r.model.head_bias, r.model.dropout) == (
        variant,
        width,
        -10,
        0.1,
    )
    assert (r.epochs, r.batch, r.data.res, r.data.classes, r.objective.loss) == (90, 4096, (224, 224), 21843, "sigmoid")
    o = r.optim
    assert (o.name, o.lr, o.schedule, o.end_lr, o.warmup_steps) == ("adam", 1e-3, "linear", 1e-5, 10_000)
    assert (o.beta1, o.beta2, o.weight_decay, o.clip) == (0.9, 0.999, 0.03, None)
    a = r.data.augment
    assert (a.crop, a.area, a.flip, a.randaugment, a.mixup) == ("inception_crop", (0.05, 1.0), True, None, 0)


@pytest.mark.parametrize("size", ["b16", "b32", "l16", "l32"])
def test_the_papers_imagenet_1k(size):
    r = load(f"{size}_in1k")
    assert (r.epochs, r.batch, r.model.dropout, r.data.classes) == (300, 4096, 0.1, 1000)
    o = r.optim
    assert (o.lr, o.schedule, o.warmup_steps, o.weight_decay, o.clip) == (3e-3, "cosine", 10_000, 0.3, 1)


LEVELS = {
    "none": (0, None),
    "light1": (0, (2, 0)),
    "light2": (0.2, (2, 10)),
    "medium1": (0.2, (2, 15)),
    "medium2": (0.5, (2, 15)),
}


@pytest.mark.parametrize(
    ("size", "in1k", "in21k"),
    [
        ("ti16", "light1", "none"),
        ("s32", "medium1", "none"),
        ("s16", "medium2", "light1"),
        ("b32", "medium2", "light2"),
        ("b16", "medium2", "light2"),
        ("l16", "medium2", "medium2"),
    ],
)
def test_augreg(size, in1k, in21k):
    for name, level in ((f"augreg_{size}_in1k", in1k), (f"augreg_{size}_in21k", in21k)):
        r = load(name)
        mixup, randaugment = LEVELS[level]
        a = r.data.augment
        assert (a.mixup, a.randaugment and (a.randaugment.n, a.randaugment.m)) == (mixup, randaugment)
        assert (r.epochs, r.batch, r.objective.loss, r.model.dropout) == (300, 4096, "sigmoid", 0)
        o = r.optim
        assert (o.lr, o.schedule, o.warmup_steps, o.weight_decay, o.clip) == (1e-3, "cosine", 10_000, 0.1, 1)
        assert (r.data.res, r.data.resize, r.data.interpolation) == ((224, 224), 256, "area")
        assert f"({level})" in SUMMARIES[name].title
    r, big = load(f"augreg_{size}_in1k"), load(f"augreg_{size}_in21k")
    assert (r.model.pool, r.model.posemb_class, r.model.head_bias) == ("token", False, -6.9)
    assert r.model.representation_size == r.model.width
    assert (big.model.pool, big.model.class_token, big.model.head_bias, big.model.representation_size) == (
        "gap",
        False,
        -10,
        None,
    )


@pytest.mark.parametrize(("name", "epochs"), [("s16_in1k", 90), ("s16_in1k_300ep", 300)])
def test_better_plain_vit(name, epochs):
    r = load(name)
    assert (r.model.variant, r.model.pool, r.model.posemb, r.model.representation_size) == (
        "S/16",
        "gap",
        "sincos2d",
        384,
    )
    assert (r.epochs, r.batch, r.objective.loss, r.objective.label_smoothing) == (epochs, 1024, "softmax", 0)
    assert (r.optim.lr, r.optim.weight_decay, r.optim.warmup_steps, r.optim.clip) == (1e-3, 0.1, 10_000, 1)
    a = r.data.augment
    assert (a.randaugment.n, a.randaugment.m, a.mixup, a.cutmix) == (2, 10, 0.2, 0)


@pytest.mark.parametrize(
    ("name", "lr", "steps", "warmup", "classes", "resize"),
    [
        ("finetune", 0.03, 10_000, 500, None, None),
        ("finetune_cifar10", 0.01, 10_000, 500, 10, None),
        ("finetune_cifar100", 0.03, 10_000, 500, 100, None),
        ("finetune_in1k_384", 0.03, 20_000, 500, 1000, None),
        ("finetune_pets", 0.003, 500, 100, 37, 448),
        ("finetune_flowers", 0.003, 500, 100, 102, 448),
    ],
)
def test_fine_tuning(name, lr, steps, warmup, classes, resize):
    r = load(name)
    assert (r.optim.name, r.optim.lr, r.optim.momentum, r.optim.clip) == ("sgd", lr, 0.9, 1)
    assert (r.optim.schedule, r.optim.warmup_steps, r.optim.weight_decay) == ("cosine", warmup, 0)
    assert (r.steps, r.batch, r.data.classes, r.data.resize, r.data.res) == (steps, 512, classes, resize, (384, 384))


def test_published_results_are_those_of_the_sources():
    results = {
        "b16_in21k": "47.88", "b32_in21k": "44.04", "l16_in21k": "49.90", "l32_in21k": "45.42", "h14_in21k": "49.06",
        "b16_in1k": "74.79", "b32_in1k": "69.19", "l16_in1k": "72.59", "l32_in1k": "66.90", "s16_in1k": "76.5",
        "augreg_ti16_in21k": "78.22", "augreg_s32_in21k": "79.58", "augreg_s16_in21k": "83.73",
        "augreg_b32_in21k": "83.59", "augreg_b16_in21k": "85.49", "augreg_l16_in21k": "85.59",
        "finetune_cifar10": "99.02", "finetune_cifar100": "92.06",
        "finetune_pets": "93.78", "finetune_flowers": "99.43",
    }  # fmt: skip
    for name, result in results.items():
        (line,) = [line for line in recipe_files.text(name).split("\n") if line.startswith("# Published: ")]
        assert result in line, name


def test_a_summary_is_one_line():
    assert SUMMARIES["b16_in21k"]._asdict() == {
        "name": "b16_in21k",
        "title": "ViT-B/16 pre-trained on ImageNet-21k, as in the paper.",
        "model": "B/16",
        "data": "data/imagenet21k",
        "length": "90 epochs",
        "finetunes": False,
    }
    assert SUMMARIES["finetune_pets"][2:] == ("--ckpt", "OxfordIIITPet", "500 steps", True)
    assert SUMMARIES["finetune"].data == "--data"


def test_a_copy_is_the_same_and_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = recipe_files.copy("quickstart")
    assert path.name == "quickstart.yaml"
    assert path.read_text() == recipe_files.text("quickstart")
    assert recipe.load("quickstart.yaml") == recipe.load("quickstart")
    with pytest.raises(RecipeError, match=r"quickstart\.yaml exists"):
        recipe_files.copy("quickstart")
    assert recipe_files.copy("quickstart", tmp_path / "mine.yaml").is_file()
    (tmp_path / "folder").mkdir()
    assert recipe_files.copy("quickstart", tmp_path / "folder") == tmp_path / "folder" / "quickstart.yaml"
    with pytest.raises(RecipeError, match="No such file"):
        recipe_files.copy("quickstart", tmp_path / "nowhere" / "a.yaml")
    with pytest.raises(RecipeError, match="no recipe is called"):
        recipe_files.copy("quickstar")
