"""Google's .npz files, of vision_transformer and big_vision: the original's logits in, the original's arrays out."""

from dataclasses import replace
from pathlib import Path

import flax_files
import numpy as np
import pytest
import torch
from command import Vit
from flax_files import CURRENT, RELEASED, Arrays, Reference
from PIL import Image
from torch import nn

from vitcli import checkpoint
from vitcli.checkpoint import Trained
from vitcli.data import Preprocessing
from vitcli.data.imagenet import WNIDS
from vitcli.errors import CheckpointError
from vitcli.exporters import google as to_google
from vitcli.model import HYBRIDS, ViTConfig
from vitcli.schema import folder
from vitcli.weights import google, load

CONFIG = "vitcli/config"
SMALL = {"width": 48, "depth": 2, "mlp_dim": 96, "heads": 3, "patch": 8}
GAP = {"cls": False, "rows": 16}
HYBRID = {"units": (2, 1), "patch": 1, "rows": 17}
NOISE = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8))]


def saved(folder: Path, arrays: Arrays) -> Path:
    np.savez(folder / "model.npz", **arrays)
    return folder / "model.npz"


def opened(path: Path) -> Arrays:
    with np.load(path) as arrays:
        return dict(arrays)


def assert_answers(path: Path, reference: Reference) -> Trained:
    """The file gives the reference's logits for random numbers in place of images."""
    trained = checkpoint.load(path)
    x = torch.randn(2, *trained.image_size, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = trained.model(x.permute(0, 3, 1, 2))
    expected = reference(x)
    assert logits.shape == expected.shape
    assert expected.std() > 0.01
    assert (logits - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    return trained


def refusal(folder: Path, arrays: Arrays) -> str:
    path = saved(folder, arrays)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"{path}: ")


# vision_transformer, read


def test_google_file_gives_the_logits_of_flax(shared):
    trained = checkpoint.load(shared / "golden/token.npz")
    io = np.load(shared / "golden/token_io.npz")
    with torch.no_grad():
        logits = trained.model(torch.from_numpy(io["images"]).permute(0, 3, 1, 2))
    np.testing.assert_allclose(logits.numpy(), io["logits"], rtol=0, atol=1e-5)
    config = ViTConfig(**SMALL)
    assert (trained.config, trained.image_size, trained.model.classes) == (config, (32, 32), 10)


def test_reference_gives_the_logits_of_flax(shared):
    io = np.load(shared / "golden/token_io.npz")
    logits = Reference(opened(shared / "golden/token.npz"))(torch.from_numpy(io["images"]))
    np.testing.assert_allclose(logits.numpy(), io["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "prefix"),
    [(RELEASED, ""), (CURRENT, ""), (RELEASED, "opt/target/")],
    ids=["released", "current", "with optimiser"],
)
@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ({}, {}),
        (GAP, {"pool": "gap"}),
        ({"representation": 24}, {"representation_size": 24}),
        (HYBRID, {"patch": 1, "stem": {"layers": (2, 1), "width": 32}}),
    ],
    ids=["token", "gap", "pre_logits", "hybrid"],
)
def test_google_layouts(tmp_path, layout, config, names, prefix):
    arrays = flax_files.arrays(names=names, **layout)
    others = {"opt/state/step": np.array(7), "opt/state/param_states/cls": np.ones(3)} if prefix else {}
    path = saved(tmp_path, {prefix + name: value for name, value in arrays.items()} | others)
    trained = assert_answers(path, Reference(arrays))
    assert trained.config == ViTConfig(**{**SMALL, **config})
    assert load(path).format == "google"


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids(tmp_path, name):
    units, patch = HYBRIDS[name]
    arrays = flax_files.arrays(units=units, patch=patch, rows=5)
    trained = assert_answers(saved(tmp_path, arrays), Reference(arrays))
    stride = 32 if name in ("R+Ti/16", "R26+S/32", "R26+B/32", "R50+L/32") else 16  # R+Ti/16 has 7x7 patches at 224
    assert (trained.config.stride, trained.image_size) == (stride, (2 * stride, 2 * stride))
    assert trained.config.stem.layers == units


@pytest.mark.parametrize("units", [None, (1, 2)], ids=["patches alone", "ResNet"])
def test_no_encoder(tmp_path, units):
    arrays = flax_files.arrays(units=units, depth=0, cls=False, table=None, patch=8 if units is None else 1)
    trained = assert_answers(saved(tmp_path, arrays), Reference(arrays))
    assert (trained.config.depth, trained.config.pool, trained.image_size) == (0, "gap", (224, 224))


def test_classes_without_names(tmp_path):
    def classes(count: int) -> tuple[str, ...]:
        layout = {"classes": count, "depth": 1, "width": 12}
        return checkpoint.load(saved(tmp_path, flax_files.arrays(**layout))).classes

    assert classes(1000) == WNIDS
    assert classes(21843) == tuple(map(str, range(21843)))


def test_no_head(tmp_path):
    arrays = flax_files.arrays(classes=None)
    assert assert_answers(saved(tmp_path, arrays), Reference(arrays)).classes == ()


def test_bfloat16(tmp_path):
    """numpy knows no bfloat16 and shows it as two bytes without a meaning."""
    arrays = flax_files.arrays()
    halves = {name: (value.view(np.uint32) >> 16).astype(np.uint16) for name, value in arrays.items()}
    path = saved(tmp_path, {name: value.view("V2") for name, value in halves.items()})
    assert all(value.dtype == torch.float32 for value in load(path).state.values())
    rounded = {name: (value.astype(np.uint32) << 16).view(np.float32) for name, value in halves.items()}
    assert_answers(path, Reference(rounded))


AT_224 = Preprocessing(res=(224, 224), resize=256, interpolation="area")


def stretched(res: int) -> Preprocessing:
    return Preprocessing(res=(res, res), resize=None, interpolation="bilinear", antialias=False)


@pytest.mark.parametrize(
    ("layout", "prefix", "rows", "expected"),
    [
        ({}, "", 1 + 28**2, AT_224),
        ({}, "", 1 + 48**2, stretched(384)),
        ({"table": "pos_embedding"}, "params/", 28**2, AT_224),
        ({"table": "pos_embedding"}, "params/", 32**2, stretched(256)),
        ({"table": "pos_embedding"}, "params/img/", 28**2, stretched(224)),
    ],
    ids=["vit 224", "vit 384", "big_vision 224", "big_vision 256", "tower 224"],
)
def test_preprocessing(tmp_path, layout, prefix, rows, expected):
    arrays = flax_files.arrays(rows=rows, depth=1, **layout)
    path = saved(tmp_path, {prefix + name: value for name, value in arrays.items()})
    assert checkpoint.load(path).preprocessing == expected


# big_vision, read

PATCHES = {"names": CURRENT, "table": "pos_embedding", "rows": 16}
BIG_VISION = {
    "token": (PATCHES, {"posemb_class": False}),
    "gap": ({**PATCHES, "cls": False, "representation": 24}, {"pool": "gap", "representation_size": 24}),
    "map": ({**PATCHES, "cls": False, "map_head": True}, {"pool": "map"}),
    "no head": ({**PATCHES, "cls": False, "map_head": True, "classes": None}, {"pool": "map"}),
    "table in encoder": ({**PATCHES, "table": "Transformer/pos_embedding"}, {"posemb_class": False}),
    "row for the class token": ({**PATCHES, "rows": 17}, {"posemb_class": False}),
    "row without class token": ({**PATCHES, "rows": 17, "cls": False}, {"pool": "gap"}),
}


@pytest.mark.parametrize("scan", [False, True], ids=["apart", "scan"])
@pytest.mark.parametrize(
    ("name", "prefix"),
    [(name, "params/") for name in BIG_VISION]
    + [(name, prefix) for name in ("map", "token") for prefix in ("", "img/", "params/img/", "opt/target/")],
)
def test_big_vision_layouts(tmp_path, name, scan, prefix):
    layout, config = BIG_VISION[name]
    arrays = flax_files.arrays(**layout)
    stored = {prefix + name: value for name, value in (flax_files.stacked(arrays) if scan else arrays).items()}
    whole = prefix.removesuffix("img/")
    if whole:
        stored |= {"opt/count": np.array(7), "opt/0/mu/cls": np.ones(3), "chrono/accum_train_time": np.array(1.5)}
    if prefix != whole:
        stored |= {f"{whole}{name}": np.ones(1) for name in ("t", "b", "txt/Embed_0/embedding", "txt/head/bias")}
    path = saved(tmp_path, stored)
    trained = assert_answers(path, Reference(arrays))
    assert trained.config == ViTConfig(**{**SMALL, **config})
    assert load(path).format == "big_vision"
    numbered = tuple(map(str, range(trained.model.classes)))
    assert trained.classes == (() if prefix.endswith("img/") else numbered)


@pytest.mark.parametrize("prefix", ["params/", "img/", "params/img/"])
def test_towers_in_vit_jax_names(tmp_path, prefix):
    """LiT's image towers are vit_jax's, below a prefix."""
    arrays = flax_files.arrays(classes=None)
    path = saved(tmp_path, {prefix + name: value for name, value in arrays.items()})
    assert_answers(path, Reference(arrays))
    assert load(path).format == "big_vision"


def test_released_names_with_the_newer_table(tmp_path):
    arrays = flax_files.arrays(**{**PATCHES, "names": RELEASED})
    path = saved(tmp_path, arrays)
    assert_answers(path, Reference(arrays))
    assert load(path).format == "big_vision"


def test_map_head_inline(tmp_path):
    """Of the time when ViT-G was developed."""
    arrays = flax_files.arrays(**BIG_VISION["map"][0])
    path = saved(tmp_path, {name.removeprefix("MAPHead_0/"): value for name, value in arrays.items()})
    assert assert_answers(path, Reference(arrays)).config.pool == "map"


def test_file_without_positions_is_of_sincos2d(tmp_path):
    arrays = flax_files.arrays(names=CURRENT, cls=False, table=None, patch=32)
    trained = assert_answers(saved(tmp_path, arrays), Reference(arrays))
    assert (trained.config.posemb, trained.config.pool, trained.image_size) == ("sincos2d", "gap", (224, 224))


ONE = [{}, GAP, HYBRID, {**HYBRID, **GAP, "table": None, "depth": 0}, *(layout for layout, _ in BIG_VISION.values())]


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
@pytest.mark.parametrize("layout", ONE, ids=str)
def test_every_layout_has_one_format(layout, prefix):
    names = {prefix + name for name in flax_files.shapes(**layout)}
    assert len([name for name, entry in folder("vitcli.weights").items() if entry.matches(names)]) == 1


# Files that are refused


@pytest.mark.parametrize(("kind", "layout"), [("google", {}), ("big_vision", PATCHES)])
def test_missing_and_unexpected_arrays(tmp_path, kind, layout):
    arrays = flax_files.arrays(**layout)

    def without(name: str) -> str:
        return refusal(tmp_path, {key: value for key, value in arrays.items() if key != name})

    norm = f"Transformer/encoderblock_1/{layout.get('names', RELEASED)[2]}"
    assert without(f"{norm}/bias") == f"tensor {norm}/bias is missing"
    assert without("embedding/bias") == f"missing from what looks like a {kind} file: patch_embed.proj.bias"
    for extra in ("Transformer/extra", "txt/head/bias", "encoder/kernel"):
        assert refusal(tmp_path, {**arrays, extra: np.zeros(1)}) == f"unexpected in a {kind} file: {extra}"


@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (2, 3, 4), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        {"depth": 1, "patch": 1, "rows": 17, "representation": 24, "units": (1,)},
        {**BIG_VISION["map"][0], "depth": 1},
    ],
    ids=["google", "big_vision"],
)
def test_any_array_of_a_wrong_shape(tmp_path, layout, shape):
    arrays = flax_files.arrays(**layout)
    for name in arrays if "units" in layout else [name for name in arrays if "Transformer/encoderblock" not in name]:
        refusal(tmp_path, {**arrays, name: np.zeros(shape, np.float32)})


def test_stack_of_a_wrong_shape(tmp_path):
    arrays = flax_files.stacked(flax_files.arrays(**PATCHES))
    for name in (name for name in arrays if name.startswith("Transformer/encoderblock/")):
        for value in (arrays[name][:1], np.zeros((), np.float32), np.zeros((2, 5), np.float32)):
            refusal(tmp_path, {**arrays, name: value})


def test_heads_that_disagree(tmp_path):
    arrays = flax_files.arrays()
    name = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"
    other = {**arrays, name: arrays[name].reshape(48, 4, 12)}
    assert refusal(tmp_path, other) == "its attention has 3 and 4 heads; one number is known"


# Written


def written(folder: Path, path: Path) -> Arrays:
    """The arrays that come out after a file went in."""
    to_google.export(checkpoint.load(path), folder / "out.npz", images=NOISE)
    return opened(folder / "out.npz")


def assert_same_arrays(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape, value.flags.c_contiguous) == (np.float32, expected[name].shape, True)
        assert value.tobytes() == expected[name].tobytes()


@pytest.mark.parametrize(
    "layout",
    [
        {},
        GAP,
        {"classes": None, "representation": 24},
        {"classes": 1000},
        HYBRID,
        {"units": (), "rows": 5},
        {"units": (1,), "patch": 1, "depth": 0, "cls": False, "table": None},
        {"rows": 1 + 28**2, "depth": 1},
    ],
    ids=str,
)
def test_what_came_from_google_goes_back_to_the_bit(tmp_path, layout):
    arrays = flax_files.arrays(**layout)
    assert_same_arrays(written(tmp_path, saved(tmp_path, arrays)), arrays)


def test_golden_file_goes_back_to_the_bit(tmp_path, shared):
    path = shared / "golden/token.npz"
    kept_as_float32 = {name: value.astype(np.float32) for name, value in opened(path).items()}
    assert_same_arrays(written(tmp_path, path), kept_as_float32)


def test_new_names_come_out_as_the_released_ones(tmp_path):
    found = written(tmp_path, saved(tmp_path, flax_files.arrays(names=CURRENT)))
    assert_same_arrays(found, flax_files.arrays(names=RELEASED))


def test_the_same_bytes_each_time(tmp_path):
    foreign = load(saved(tmp_path, flax_files.arrays(classes=4)))
    foreign = replace(foreign, classes=("tench", "owl", "=1+1", "Glühwürmchen"))
    for name in ("a.npz", "b.npz"):
        google.write(foreign, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def small(size: tuple[int, int] = (32, 32), classes: tuple[str, ...] = ("tench", "owl"), **config) -> Trained:
    """A model of ours with random weights, and a preprocessing that is not Google's."""
    torch.manual_seed(0)
    config = ViTConfig(**{**SMALL, **config})
    model = config.build(len(classes), size).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    preprocessing = Preprocessing(res=size, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    return Trained(model, config, classes, size, preprocessing, "a random model")


@pytest.mark.parametrize(
    ("size", "config"),
    [
        ((32, 32), {}),
        ((32, 32), {"activation": "gelu", "posemb_resize": "bicubic"}),
        ((24, 40), {"pool": "gap"}),  # with a class token, as many rows as a square grid without one
        ((24, 40), {}),
        ((32, 32), {"pool": "none", "representation_size": 24}),
        ((64, 96), {"patch": 1, "stem": {"layers": (1, 1), "width": 32}}),
        ((32, 64), {"pool": "gap", "depth": 0, "mlp_dim": 48}),
    ],
    ids=str,
)
def test_what_google_does_not_say_is_kept(tmp_path, size, config):
    trained = small(size, **config)
    report = to_google.export(trained, tmp_path / "model.npz", images=NOISE)
    found = checkpoint.load(tmp_path / "model.npz")
    assert found.config == trained.config
    assert found.classes == trained.classes
    assert (found.image_size, found.preprocessing) == (size, trained.preprocessing)
    assert report.parity.difference == 0
    assert "left out" not in report.details

    # All that the original's code takes is there, of its shape; the rest is one array, with which it can train.
    arrays = opened(tmp_path / "model.npz")
    extra = arrays.pop(CONFIG)
    assert extra.dtype == np.float32
    reference = Reference(arrays, config.get("pool"), exact_gelu=config.get("activation") == "gelu")
    assert_answers(tmp_path / "model.npz", reference)


def test_fixed_tables_are_written_as_learned_ones(tmp_path):
    for posemb in ("sincos2d", "sincos2d_mae"):
        trained = small(pool="gap", posemb=posemb)
        to_google.export(trained, tmp_path / f"{posemb}.npz", images=NOISE)
        found = assert_answers(tmp_path / f"{posemb}.npz", Reference(opened(tmp_path / f"{posemb}.npz")))
        assert found.config.posemb == "learned"
        assert torch.equal(found.model.pos_embed, trained.model.pos_embed)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"registers": 2}, "registers"),
        ({"layerscale": 0.1}, "LayerScale"),
        ({"qk_norm": True}, "QK-norm"),
        ({"activation": "swiglu"}, "activation swiglu"),
        ({"activation": "quick_gelu"}, "activation quick_gelu"),
        ({"distilled": True}, "distillation token"),
        ({"pool": "map"}, "pooling map"),
        ({"pool": "token_gap"}, "pooling token_gap"),
        ({"pool": "gap", "class_token": True}, "class token with pooling gap"),
        ({"posemb_class": False}, "class token without a position"),
        ({"pool": "gap", "posemb": "none"}, "encoder without positions"),
        ({"pre_norm": True}, "norm before the blocks"),
        ({"norm_after_pool": True}, "norm after pooling"),
        ({"norm_eps": 1e-12}, "norm_eps: 1e-12, only 1e-06"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_original_cannot_compute_is_named(tmp_path, config, part):
    with pytest.raises(CheckpointError) as caught:
        to_google.export(small(**config), tmp_path / "model.npz", images=NOISE)
    assert str(caught.value) == f"Google's format has no {part}"
    assert caught.value.hint == "vit export --onnx takes any model"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is damaged: it holds no JSON"),
        (b"\xff{", "is damaged: it holds no JSON"),
        (b"[" * 100_000, "is damaged: it holds no JSON"),
        (b"[1]", "holds a list, not an object"),
        (b'{"__class__": 1}', "has a wrong '__class__'"),
        (b'{"activation": ["gelu"]}', "has a wrong 'activation'"),
        (b'{"classes": [1, 2]}', "has a wrong 'classes'"),
        (b'{"image_size": [32]}', "has a wrong 'image_size'"),
    ],
    ids=str,
)
def test_tampered_config(tmp_path, text, message):
    numbers = np.frombuffer(text, np.uint8).astype(np.float32)
    assert refusal(tmp_path, {**flax_files.arrays(), CONFIG: numbers}) == f"{CONFIG} {message}"


@pytest.mark.parametrize(
    "text",
    [
        '{"image_size": [1073741824, 1073741824]}',
        '{"image_size": [-32, -32]}',
        '{"image_size": [32, 40]}',
        '{"activation": "os.system"}',
        '{"activation": "swiglu"}',
        '{"pool": "map"}',
        '{"classes": ["only one"]}',
        '{"preprocessing": {"resize": -1}}',
        '{"preprocessing": {"mean": [NaN, 0, 0]}}',
    ],
)
def test_config_that_does_not_fit(tmp_path, text):
    numbers = np.frombuffer(text.encode(), np.uint8).astype(np.float32)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(saved(tmp_path, {**flax_files.arrays(), CONFIG: numbers}))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("numbers", [np.full(3, np.nan), np.full(3, 1e30), np.full((2, 2), 123.0), np.array(1.0)])
def test_config_of_other_numbers(tmp_path, numbers):
    assert refusal(tmp_path, {**flax_files.arrays(), CONFIG: numbers}) == f"{CONFIG} is damaged: it holds no JSON"


def test_deit_answers_the_same_from_an_npz(tmp_path, shared, capsys, monkeypatch):
    vit = Vit(capsys, monkeypatch)
    deit, npz = shared / "data/deit_tiny_patch16_224.pth", tmp_path / "deit.npz"
    said = vit("export", "--to", "google", "--ckpt", deit, "-o", npz, "--json")
    assert said.code == 0, said.err
    assert said.json["parity"]["difference"] == 0
    photos = sorted((shared / "data/imagenet200").glob("*/*.JPEG"))[::70]
    answers = [
        vit("predict", *photos, "--ckpt", path, "--device", "cpu", "--json").json["images"] for path in (deit, npz)
    ]
    assert len(answers[0]) == 3
    assert answers[0] == answers[1]
