"""Recipes: what loads, in which order layers lie, and what is said of every mistake."""

import json
import random
import re
import string
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vitcli import recipe, yaml_tree
from vitcli import recipe_errors as mistakes
from vitcli.errors import RecipeError
from vitcli.recipe import Recipe
from vitcli.recipe import keys as recipe_keys
from vitcli.yaml_tree import Place

SMALL = "model: {width: 8, depth: 1, mlp_dim: 8, heads: 2, patch: 4}\ndata: {source: digits, res: 8}\nsteps: 10\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "a.yaml"
        path.unlink(missing_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.fixture
def told(write):
    """What is said of a text, without the file's name."""

    def told(text: str | bytes, *sets: str) -> list[str]:
        path = write(text)
        with pytest.raises(RecipeError) as caught:
            recipe.load(path, sets)
        return [line.removeprefix(f"{path}:") for line in str(caught.value).split("\n")]

    return told


# What a scalar is.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("+1.5e+2", 150.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.0", 0.0),
        ("1.0e-3", 1e-3),
        ("12", 12),
        ("-7", -7),
        ("+7", 7),
        ("0", 0),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0b101", "0b101"),
        ("-0x1F", "-0x1F"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("B/16", "B/16"),
        ("'012'", "012"),
        ('"1e-3"', "1e-3"),
        ("'no'", "no"),
        ('"null"', "null"),
        ("=", "="),
        ("+", "+"),
    ],
)
def test_an_unquoted_scalar_is_what_yaml_1_2_says(text, value):
    read = yaml_tree.read(f"[{text}]" if text else "[~]", Place("a", 1, 1))
    assert read.data == [value]
    assert type(read.data[0]) is type(value)
    assert not read.mistakes


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("012", "write 12"),
        ("-08", "write -8"),
        ("0o17", "write 15"),
        (".nan", "not a number"),
        (".NaN", "not a number"),
        (".inf", "not a number"),
        ("-.INF", "not a number"),
        ("1e999", "too large"),
        ("!!float 1", "tags"),
        ("!!python/object/apply:os.system [ls]", "tags"),
        ("! 3", "tags"),
        ("&a 3", "anchors"),
        ('"\\ud800"', "surrogate"),
    ],
)
def test_a_scalar_that_programs_read_differently_is_refused_in_one_line(told, text, hint):
    (line,) = told(SMALL + f"seed: {text}\n")
    assert re.match(r"4:\d+: seed: ", line)
    assert hint in line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: {clip: no}", "optim.clip: expected a number > 0 or null, got 'no'"),
        ("data: {source: digits, res: 8, antialias: no}", "expected true or false, got 'no' (write false)"),
        ("data: {source: digits, res: 8, antialias: ON}", "expected true or false, got 'ON' (write true)"),
        ("seed: 1_000", "(write 1000)"),
        ("seed: 1:30", "got '1:30'"),
        ("seed: 2024-01-01", "got '2024-01-01'"),
        ("seed: 1e3", "got 1000.0 (write 1000)"),
        ("seed: true", "got true"),
        ("optim: {lr: '0.1'}", "got '0.1'"),
        ("data: {source: {name: folder, path: 3}, res: 8}", "expected text, got 3 (write '3')"),
        ("optim: {schedule: cosin}", "(did you mean cosine?)"),
    ],
)
def test_a_value_of_another_type_is_told_with_what_to_write(told, text, line):
    body = "".join(each + "\n" for each in SMALL.split("\n")[:-1] if each.split(":")[0] != text.split(":")[0])
    (found,) = told(body + text + "\n")
    assert line in found


# What a file is.


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"\xef\xbb\xbfsteps: 1\n", "1:1: the character U+FEFF"),
        (b"steps: 1\nseed: \x00\n", "2:7: the character U+0000"),
        (b"steps: 1\nseed: \xff\n", "2:7: not UTF-8 text"),
        ("steps: 1\n\u2028seed: 1\n", "2:1: the character U+2028"),
        ("optim:\n\tlr: 1\n", "2:1: a tab"),
        ("optim: {lr:\t1}\n", "1:12: a tab"),
        ("a: b: c\n", "1:5: not YAML: mapping values are not allowed here"),
        ("a: [1, 2\nb: 3\n", "2:2: not YAML"),
        ("a: 'x\n", "2:1: not YAML"),
        ("a: @x\n", "1:4: not YAML"),
        ("steps: 1\n---\nsteps: 2\n", "2:1: a second document"),
        ("%YAML 1.1\n---\nsteps: 1\n", "1:1: directives"),
        ("- 1\n", "1:1: expected keys and values, got [1]"),
        ("null\n", "1:1: model, data are missing"),
        ("", "1:1: model, data are missing"),
        ("a: " + "[" * 30 + "]" * 30, "1:25: not YAML: more than 20 levels"),
        ("".join(" " * n + "a:\n" for n in range(30)), "21:21: more than 20 levels"),
        ("a: [" + "1, " * 3000 + "]", "more than 2000 values"),
        ("#" * 70_000, "more than 64 KiB"),
        ('a: "\\UFFFFFFFF"\n', "an escape that is no character"),
    ],
    ids=range(20),
)
def test_a_file_that_is_no_recipe_is_refused_at_its_place(told, text, line):
    (found,) = told(text)
    assert line in found


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nseed: 2\n", "5:1: seed: given twice; the first is on line 4"),
        ("seed: *a\n", "4:7: not YAML: found undefined alias|4:7: seed: aliases"),
        ("runtime: &a {}\n", "4:10: runtime: anchors"),
        ("runtime: {<<: {}}\n", "4:11: runtime.<<: merge keys"),
        ("1: 2\n", "4:1: 1: a key is a plain name"),
        ("? [a]\n: 2\n", "a key is a plain name"),
        ("null: 2\n", "a key is a plain name"),
        ("true: 2\n", "a key is a plain name"),
        ("on: 2\n", "4:1: on: unknown key"),
        ("'012': 2\n", "4:1: 012: unknown key"),
        ('"a\\nb\\e[31m": 2\n', "4:1: 'a\\nb\\x1b[31m': unknown key"),
    ],
)
def test_a_key_that_is_no_plain_name_is_refused_in_one_line(told, text, line):
    (found,) = told(SMALL + text)
    assert any(part in found for part in line.split("|"))


def test_windows_line_ends_and_comments_with_tabs_are_fine(write):
    assert recipe.load(write("# a\tb\r\n" + SMALL.replace("\n", "\r\n"))).steps == 10


def test_hostile_files_cost_little(told):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    n = yaml_tree.MAX_BYTES
    texts = [bomb, "[" * n, "{" * n, "[a," * (n // 3), "- " * (n // 2), "? " * (n // 2), "a: 1\n" * (n // 5)]
    texts += [
        "a" * n,
        "\n" * n,
        "'" * n,
        "&a " * (n // 3),
        "1" * n,
        "a: " + "9" * (n - 3),
        "x" * 10_000_000,
        "0" * 60_000,
    ]
    texts += [f"{'a' * 60_000}: 1", "{" + "a," * (n // 2 - 2) + "}", "\\" * n, '"' + "\\n" * (n // 2 - 1) + '"']
    told("seed: 1")
    for text in texts:
        start = time.thread_time()
        told(text)
        assert time.thread_time() - start < 2, text[:20]
    tracemalloc.start()
    for text in texts:
        told(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize(
    ("name", "words", "hint"),
    [
        ("quickstar", "no recipe is called 'quickstar'", "did you mean quickstart?"),
        ("nowhere.yaml", "nowhere.yaml: no such file", ""),
        ("b16_in21k.yaml", "b16_in21k.yaml: no such file", "b16_in21k is a shipped recipe: give the name alone"),
        ("\x1b[31m", "no recipe is called '\\x1b[31m'", "vit recipes"),
        ("a/b\0c.yaml", "a/b\\x00c.yaml: no such file", ""),
    ],
)
def test_a_recipe_that_is_not_there(name, words, hint):
    with pytest.raises(RecipeError, match=re.escape(words)) as caught:
        recipe.load(name)
    assert hint in caught.value.hint


def test_a_folder_or_a_pipe_is_no_recipe(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name, kind in (("pipe", "not a plain file"), ("folder", "a folder")):
        with pytest.raises(RecipeError, match=kind):
            recipe.load(tmp_path / f"{name}.yaml")


# Layers.


def test_sets_lie_on_top_and_make_the_sections_that_they_need(write):
    path = write(SMALL)
    sets = ["optim.lr=3e-4", "data.augment.randaugment={n: 1, m: 5}", "data.res=[8, 16]", "data.source.path=x y#z"]
    loaded = recipe.load(path, [*sets, "data.source.name=folder", "optim.clip=null", "seed=1", "seed=2"])
    assert loaded.optim.lr == 3e-4
    assert loaded.optim.clip is None
    assert loaded.data.res == (8, 16)
    assert (loaded.data.augment.randaugment.n, loaded.data.augment.randaugment.m) == (1, 5)
    assert loaded.data.source.model_dump() == {"name": "folder", "path": "x y#z", "val": None}
    assert loaded.seed == 2
    assert loaded.model.width == 8


def test_sections_merge_and_a_source_of_another_name_replaces(write):
    path = write(SMALL.replace("digits", "{name: folder, path: a, val: 0.1}"))
    assert recipe.load(path, ["data.source.path=b"]).data.source.val == 0.1
    assert recipe.load(path, ["data.source={name: folder, path: b}"]).data.source.val == 0.1
    assert recipe.load(path, ["data.source=digits"]).data.source.name == "digits"
    options = [("--data", "data.source", {"name": "folder", "path": "c"})]
    loaded = recipe.load(path, ["data.source.path=d"], options=options)
    assert loaded.data.source.path == "d"


def test_a_variant_that_is_set_replaces_the_size_but_not_the_rest(write):
    path = write(SMALL.replace("patch: 4", "patch: 4, dropout: 0.1"))
    loaded = recipe.load(path, ["model.variant=Ti/8"])
    assert (loaded.model.width, loaded.model.depth, loaded.model.patch, loaded.model.dropout) == (192, 12, 8, 0.1)
    loaded = recipe.load(path, ["model.depth=3", "model.variant=Ti/8"])
    assert (loaded.model.width, loaded.model.depth) == (192, 3)
    resolved = write(recipe.dump(recipe.load("b16_in1k")))
    assert recipe.load(resolved, ["model.variant=S/16"]).model.width == 384


def test_steps_that_are_set_replace_epochs_and_the_other_way(write):
    path = write(SMALL + "optim: {warmup_steps: 3}\n")
    loaded = recipe.load(path, ["epochs=2", "optim.warmup_epochs=0.5"])
    assert (loaded.epochs, loaded.steps, loaded.optim.warmup_epochs, loaded.optim.warmup_steps) == (2, None, 0.5, None)
    with pytest.raises(RecipeError, match="--set epochs: give epochs or steps, one of them"):
        recipe.load(path, ["epochs=2", "steps=3"])


def test_a_checkpoint_lies_under_the_recipe(write):
    path = write("data: {res: 16}\nmodel: {dropout: 0.5}\nsteps: 3\n")
    under = {"model": {"variant": "Ti/16", "width": 384, "dropout": 0.0}, "data": {"mean": [0.1, 0.2, 0.3]}}
    options = [("--data", "data.source", "digits"), ("--classes", "data.classes", 10)]
    loaded = recipe.load(path, ["data.mean=0.5"], under=under, options=options)
    assert (loaded.model.width, loaded.model.depth, loaded.model.dropout) == (384, 12, 0.5)
    assert loaded.data.mean == (0.5, 0.5, 0.5)
    assert loaded.data.classes == 10


def test_each_mistake_is_told_at_the_layer_that_made_it(write):
    path = write("data: {res: 16, agument: 1}\nmodel: {dropout: 2}\nsteps: 3\n")
    under = {"model": {"variant": "Ti/16", "pool": "best"}}
    options = [("--data", "data.source", {"name": "folder"}), ("--classes", "data.classes", 0)]
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, ["optim.lr=fast", "data.nope=1", "seed=012"], under=under, origin="B.npz", options=options)
    assert str(caught.value).split("\n") == [
        f"{path}:1:17: data.agument: unknown key (did you mean augment?)",
        f"{path}:2:18: model.dropout: must be less than 1.0, got 2",
        "--set seed: programs differ over 012: write 12, or '012' for text",
        "B.npz: model.pool: expected token or gap or token_gap or map or none, got 'best'",
        "--classes: data.classes: must be greater than 0, got 0",
        "--set data.nope: unknown key; there is " + ", ".join(type(recipe.load("quickstart").data).model_fields),
        "--set optim.lr: expected a number > 0, got 'fast'",
        "--data: data.source.path: missing",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim.lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("optim..lr=3", "expected key=value"),
        ("optim.lr={", "--set optim.lr: not YAML"),
        ("optim.lr=@x", "--set optim.lr: not YAML"),
        ("optim.lr=1\n---\n2", "--set optim.lr: a second document"),
        ("optim.lr.x=1", "--set optim.lr.x: optim.lr: expected a number > 0, got {"),
        ("optim=3", "--set optim: expected a section, got 3"),
        ("lr=3", "--set lr: unknown key here (it is optim.lr)"),
        ("optim.lrr=3", "--set optim.lrr: unknown key (did you mean lr?)"),
        ("optim.lr=\udcff", "--set optim.lr: the character U+DCFF"),
        (
            "data.source.name=digit",
            "expected digits or folder or shards or table or torchvision, got 'digit' (did you mean digits?)",
        ),
        ("model.width=", "--set model.width: expected a whole number > 0, got null"),
        ("a" * 100 + ".b=1", "unknown key"),
        (".".join("a" * 30) + "=1", "too long"),
    ],
)
def test_a_wrong_set_is_told_as_such(write, text, words):
    with pytest.raises(RecipeError) as caught:
        recipe.load(write(SMALL), [text])
    (line,) = str(caught.value).split("\n")
    assert any(part in line for part in words.split("|"))


# What is said of a mistake.


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(told):
    lines = told("""
model: {variant: B/16, widht: 3}
data:
  source: foldr
  agument: {}
  augment: {flip: no, area: [0.1, x], randaugment: {n: 2, m: 99}}
lr: 3
optim:
  lr: abc
  lr: 4
  warmup_steps: 012
runtime: 4
epochs: 3
""")
    assert [line.split(": ")[:2] for line in lines] == [
        ["2:24", "model.widht"],
        ["4:11", "data.source"],
        ["5:3", "data.agument"],
        ["6:19", "data.augment.flip"],
        ["6:35", "data.augment.area"],
        ["6:62", "data.augment.randaugment.m"],
        ["7:1", "lr"],
        ["10:3", "optim.lr"],
        ["11:17", "optim.warmup_steps"],
        ["12:10", "runtime"],
    ]


def test_what_is_missing_is_told_at_its_section(told):
    assert told("steps: 3\n") == ["1:1: model, data are missing"]
    assert told("model: {}\ndata: {source: {name: folder}}\nsteps: 3\n") == [
        "1:1: model: width, depth, mlp_dim, heads, patch are missing (variant, such as B/16, gives them all)",
        "2:8: data.source.path: missing",
    ]
    (line,) = told(SMALL.replace("digits", "{path: x}"))
    assert line == "2:8: data.source.name: missing: digits or folder or shards or table or torchvision"


def test_a_key_of_another_kind_of_section_is_told_as_such(told):
    assert told(SMALL.replace("digits", "{name: digits, path: x}")) == [
        "2:31: data.source.path: unknown key here; it is for name: folder or shards"
    ]


def test_a_hint_says_what_brings_what_is_missing(write):
    with pytest.raises(RecipeError) as caught:
        recipe.load(write("model: {dropout: 0.1}\ndata: {res: 16}\nsteps: 1\n"))
    assert caught.value.hint == (
        "a recipe for fine-tuning takes its model from --ckpt; give the images by --data, or as data.source"
    )


def test_many_mistakes_end_with_their_number(told):
    lines = told(SMALL + "".join(f"key{n}: 1\n" for n in range(50)))
    assert len(lines) == mistakes.MAX_LINES + 1
    assert lines[-1] == "and 30 more"


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        (["data.res=9"], "--set data.res: resolution 9x9 is not divisible by 4; the nearest is 8"),
        (["optim.warmup_steps=11"], "--set optim.warmup_steps: 11 is more than steps: 10"),
        (["epochs=3", "optim.warmup_epochs=4"], "optim.warmup_epochs: 4.0 is more than epochs: 3.0"),
        (["runtime.micro_batch=512"], "--set runtime.micro_batch: 512 is more than batch: 256"),
        (["data.resize=7"], "--set data.resize: 7 leaves too little"),
        (["data.augment.area=[0.5, 0.1]"], "--set data.augment.area: [0.5, 0.1] is no range"),
        (["data.augment.pad=1"], "--set data.augment.pad: has no effect with inception_crop; it is for random_crop"),
        (
            ["data.augment={crop: central_crop, antialias: true}"],
            "data.augment.antialias: has no effect with central_crop; it is for inception_crop and random_crop",
        ),
        (["data.augment.crop=random_crop", "data.augment.area=[0.5, 1.0]"], "has no effect with random_crop"),
        (["data.augment.crop=random_crop", "data.augment.resize=6"], "--set data.augment.resize: is smaller than res"),
        (["optim.end_lr=1.0"], "--set optim.end_lr: 1.0 is more than lr: 0.001"),
        (["optim.momentum=0.5"], "--set optim.momentum: has no effect with adam; it is for sgd and muon"),
        (["optim.name=sgd", "optim.beta2=0.5"], "--set optim.beta2: has no effect with sgd; it is for adam and muon"),
        (
            ["optim.name=muon", "runtime.shard=fsdp"],
            "--set runtime.shard: fsdp cuts the matrices that optim.name: muon",
        ),
        (["optim.cooldown_steps=5"], "has no effect with cosine; it is for rsqrt and constant"),
        (["optim.schedule=constant", "optim.end_lr=1e-5"], "optim.end_lr: has no effect with constant"),
        (["optim.schedule=rsqrt", "optim.cooldown_steps=50"], "50 is more than steps: 10"),
        (["optim.warmup_steps=1", "optim.warmup_epochs=1"], "give warmup_steps or warmup_epochs, not both"),
        (["model.heads=3"], "--set model.heads: width 8 is not divisible by heads 3"),
        (["model.variant=Q/16"], "--set model.variant: 'Q/16' is not known"),
    ],
)
def test_keys_that_do_not_go_together(write, sets, line):
    with pytest.raises(RecipeError) as caught:
        recipe.load(write(SMALL), sets)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


# Every key of the schema, wrong in six ways.

FULL = Recipe.parse(
    {
        "model": {"variant": "R50+B/16"},
        "data": {"source": {"name": "folder", "path": "x"}, "augment": {"randaugment": {}}},
        "objective": {"name": "classify"},
        "epochs": 3,
    }
).model_dump(mode="json")
KEYS = [key for key in recipe_keys() if key.choice in ("", "folder", "classify")]


def tree() -> dict:
    return json.loads(json.dumps(FULL))


def section(data: dict, path: tuple[str, ...]) -> dict:
    for part in path:
        data = data[part]
    return data


def one_line(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.check(yaml_tree.read(text, Place("a", 1, 1)))
    (line,) = str(caught.value).split("\n")
    return line


def test_the_full_recipe_is_right():
    assert recipe.check(yaml_tree.read(yaml_tree.dump(tree()), Place("a", 1, 1))).epochs == 3
    assert {key.path for key in KEYS} <= set(yaml_tree.plain(tree(), Place("a")).values)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.dotted)
def test_each_key_wrong_in_six_ways_is_one_line(key):
    *above, name = key.path
    above = tuple(above)
    number = yaml_tree.read(yaml_tree.dump(tree()), Place("a", 1, 1)).keys[key.path].line

    misspelt = tree()
    wrong_name = name[:-1] + name[-1] * 2
    parent = section(misspelt, above)
    renamed = {wrong_name if each == name else each: value for each, value in parent.items()}
    parent.clear()
    parent.update(renamed)
    line = one_line(yaml_tree.dump(misspelt))
    assert line.startswith(f"a:{number}:")
    assert line.endswith(f"{'.'.join((*above, wrong_name))}: unknown key (did you mean {name}?)")

    wrong_type = tree()
    section(wrong_type, above)[name] = 3 if "section" in key.kind or "text" in key.kind else {"no": 1}
    line = one_line(yaml_tree.dump(wrong_type))
    assert line.startswith(f"a:{number}:")
    assert f" {key.dotted}: expected " in line

    if "null" not in key.kind:
        null = tree()
        section(null, above)[name] = None
        line = one_line(yaml_tree.dump(null))
        assert line.startswith(f"a:{number}:")
        assert line.endswith("got null")

    beyond = [float(bound) - (1 if "=" in sign else 0) for sign, bound in re.findall(r"(>=?) ([\d.]+)", key.kind)]
    if beyond or (" or " in key.kind and "section" not in key.kind and "null" not in key.kind):
        out = tree()
        whole = "whole" in key.kind
        section(out, above)[name] = (int(beyond[0]) if whole else beyond[0]) if beyond else "nonsense"
        line = one_line(yaml_tree.dump(out))
        assert line.startswith(f"a:{number}:")
        assert f" {key.dotted}: must be " in line or f" {key.dotted}: expected " in line

    lines = yaml_tree.dump(tree()).split("\n")
    indent = "  " * len(above)
    lines.insert(number, f"{indent}{name}: 1") if "section" not in key.kind else lines.insert(
        number - 1, f"{indent}{name}: {{}}"
    )
    line = one_line("\n".join(lines))
    assert line.startswith(f"a:{number + 1}:")
    assert line.endswith(f"{key.dotted}: given twice; the first is on line {number}")

    moved = tree()
    value = section(moved, above).pop(name)
    to = () if above else ("runtime",) if name == "optim" else ("optim",)
    section(moved, to)[name] = value
    line = one_line(yaml_tree.dump(moved))
    assert f" {'.'.join((*to, name))}: unknown key here (it is " in line


def test_the_key_that_was_meant_is_named_for_95_of_100_typos():
    letters, generator = string.ascii_lowercase + "_", random.Random(0)
    right = total = 0
    for key in KEYS:
        *above, name = key.path
        siblings = section(FULL, tuple(above)).keys()
        typos = {name[:n] + name[n + 1 :] for n in range(len(name))}
        typos |= {name[:n] + a + name[n + 1 :] for n in range(len(name)) for a in letters}
        typos |= {name[:n] + a + name[n:] for n in range(len(name) + 1) for a in letters}
        typos |= {name[:n] + name[n + 1] + name[n] + name[n + 2 :] for n in range(len(name) - 1)}
        for typo in generator.sample(sorted(typos - siblings - {""}), 30):
            data = tree()
            parent = section(data, tuple(above))
            parent[typo] = parent.pop(name)
            whole = yaml_tree.plain(data, Place("a"))
            try:
                Recipe.parse(data)
            except ValidationError as error:
                (mistake,) = mistakes.explain(error, Recipe, whole)
            total += 1
            right += f"did you mean {name}?" in mistake.message
    assert total > 2000
    assert right / total >= 0.95


# There and back.

LEAVES = {
    "model.dropout": st.floats(0, 0.99),
    "model.norm_eps": st.floats(1e-300, 1.0),
    "model.head_bias": st.floats(allow_nan=False, allow_infinity=False),
    "model.registers": st.integers(0, 10**6),
    "model.qk_norm": st.booleans(),
    "model.layerscale": st.none() | st.floats(1e-12, 10),
    "model.variant": st.sampled_from(["B/16", "L/32", "Ti/4", "R50+B/16", "R+Ti/16"]),
    "data.mean": st.tuples(*[st.floats(-1, 1)] * 3).map(list) | st.floats(0, 1),
    "data.interpolation": st.sampled_from(["area", "bicubic"]),
    "data.classes": st.none() | st.integers(1, 10**9),
    "data.source": st.just("digits")
    | st.fixed_dictionaries({"name": st.just("folder"), "path": st.text(st.characters(codec="utf-8"))})
    | st.sampled_from(
        ["012", "1e-3", "no", "null", "", "~", "0o7", "1_0", "- a", "a: b", "#", "'", '"', "\n", "\ufeff"]
    ).map(lambda path: {"name": "folder", "path": path}),
    "data.augment": st.fixed_dictionaries(
        {"area": st.tuples(st.floats(1e-9, 0.5), st.floats(0.5, 1)).map(list), "mixup": st.floats(0, 1e9)}
    ),
    "data.augment.randaugment": st.none() | st.fixed_dictionaries({"n": st.integers(1, 9), "m": st.floats(0, 30)}),
    "objective.label_smoothing": st.floats(0, 0.99),
    "optim.lr": st.floats(1e-300, 1e300),
    "optim.clip": st.none() | st.floats(5e-324, 1e300),
    "optim.beta2": st.floats(0, 0.9999999),
    "runtime.compile": st.none() | st.booleans(),
    "seed": st.integers(0, 2**63 - 1),
    "batch": st.integers(1, 10**12),
    "eval_every": st.none() | st.integers(1, 10**12),
}


@given(st.fixed_dictionaries({}, optional=LEAVES))
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_dump_loads_back_as_the_same_recipe(leaves):
    data: dict = {
        "model": {"variant": "B/16"},
        "data": {"source": "digits"},
        "objective": {"name": "classify"},
        "epochs": 1,
    }
    for dotted, value in sorted(leaves.items()):
        *above, name = dotted.split(".")
        where = data
        for part in above:
            where = where.setdefault(part, {})
        where[name] = value
    made = Recipe.parse(data)
    text = recipe.dump(made)
    again = recipe.check(yaml_tree.read(text, Place("a", 1, 1)))
    assert again == made
    assert recipe.dump(again) == text


def test_a_dump_is_complete_in_order_and_plain_to_read():
    text = recipe.dump(recipe.load("s16_in1k"))
    assert text.startswith("model:\n  variant: S/16\n  width: 384\n")
    assert "\n  mean: [0.5, 0.5, 0.5]\n" in text
    assert "\n    randaugment:\n      n: 2\n      m: 10.0\n" in text
    assert "\n  eps: 1.0e-08\n" in text
    spelt = {path for path in yaml_tree.read(text, Place("a", 1, 1)).values if path and path[-1] != ""}
    assert {key.path for key in recipe_keys() if not key.choice and "stem." not in key.dotted} <= spelt


def test_the_keys_say_type_default_and_meaning():
    keys = {key.dotted: key for key in recipe_keys()}
    assert keys["optim.lr"].kind == "a number > 0"
    assert keys["optim.lr"].default == 1e-3
    assert keys["optim.lr"].description == "peak learning rate"
    assert keys["data.source.dataset"].choice == "torchvision"
    assert keys["model.width"].required
    assert keys["data.res"].kind.startswith("a whole number > 0 or [")
    assert keys["optim.schedule"].kind == "cosine or linear or rsqrt or constant"


def test_the_json_schema_allows_what_a_recipe_may_say():
    described = recipe.json_schema()
    data = described["$defs"]["DataConfig"]["properties"]
    assert {"type": "integer", "exclusiveMinimum": 0} in data["res"]["anyOf"]
    assert {"type": "number"} in data["mean"]["anyOf"]
    assert {"enum": ["digits", "folder", "shards", "table", "torchvision"], "type": "string"} in data["source"]["anyOf"]
    assert described["required"] == ["data"]
    assert "required" not in described["$defs"]["ViTConfig"]
    assert "required" not in described["$defs"]["DataConfig"]
    assert described["additionalProperties"] is False
    assert json.loads(json.dumps(described)) == described


def test_a_wrong_recipe_is_answered_at_once_and_without_torch(write):
    path = write(SMALL + "optmi: {}\n")
    code = f"""
import sys, time
start = time.process_time()
from vitcli import recipe, recipe_files
try:
    recipe.load({str(path)!r}, ["optim.lr=3e-4"])
except recipe.RecipeError as error:
    message = str(error)
spent = time.process_time() - start
recipe.keys(), recipe.json_schema(), recipe_files.summaries()
assert not {{"torch", "torchvision", "PIL"}} & sys.modules.keys(), sys.modules.keys()
print(spent, message)
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert all("did you mean optim?" in run.stdout for run in runs)
    assert min(float(run.stdout.split()[0]) for run in runs) < 3
