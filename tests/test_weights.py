"""Foreign checkpoints: read right, by what they hold, or refused in one line."""

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vitcli.data import Preprocessing
from vitcli.errors import CheckpointError
from vitcli.model import ViTConfig
from vitcli.model.vit import ViT
from vitcli.weights import Foreign, google, load

SMALL = {"width": 48, "depth": 2, "mlp_dim": 96, "heads": 3, "patch": 8}


def model_of(foreign: Foreign) -> ViT:
    model = foreign.config.build(foreign.head_classes, foreign.image_size).eval()
    model.load_state_dict(foreign.state)
    return model


def small(classes: int = 10, size: int = 32, **config) -> ViT:
    torch.manual_seed(0)
    model = ViTConfig(**{**SMALL, **config}).build(classes, (size, size)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def as_google(model: ViT, names: tuple[str, ...] = google.RELEASED, prefix: str = "") -> dict[str, np.ndarray]:
    """The model's weights in the layout of vit_jax."""
    norm1, attention, norm2, mlp = names
    state, heads, arrays = model.state_dict(), model.config.heads, {}

    def layer(theirs: str, ours: str) -> None:
        weight = state[f"{ours}.weight"]
        kind = "scale" if weight.ndim == 1 else "kernel"
        arrays[f"{theirs}/{kind}"] = (
            weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.mT if kind == "kernel" else weight
        )
        if f"{ours}.bias" in state:
            arrays[f"{theirs}/bias"] = state[f"{ours}.bias"]
        if theirs.rpartition("/")[2].startswith("gn"):
            for part in ("scale", "bias"):
                arrays[f"{theirs}/{part}"] = arrays[f"{theirs}/{part}"].reshape(1, 1, 1, -1)

    layer("embedding", "patch_embed.proj")
    layer("Transformer/encoder_norm", "norm")
    layer("head", "head")
    if "pre_logits.fc.weight" in state:
        layer("pre_logits", "pre_logits.fc")
    if "cls_token" in state:
        arrays["cls"] = state["cls_token"]
    arrays["Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    for i in range(model.config.depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        layer(f"{theirs}/{norm1}", f"{ours}.norm1")
        layer(f"{theirs}/{norm2}", f"{ours}.norm2")
        layer(f"{theirs}/{mlp}/Dense_0", f"{ours}.mlp.fc1")
        layer(f"{theirs}/{mlp}/Dense_1", f"{ours}.mlp.fc2")
        qkv = zip(state[f"{ours}.attn.qkv.weight"].chunk(3), state[f"{ours}.attn.qkv.bias"].chunk(3), strict=True)
        for name, (weight, bias) in zip(("query", "key", "value"), qkv, strict=True):
            arrays[f"{theirs}/{attention}/{name}/kernel"] = weight.mT.unflatten(1, (heads, -1))
            arrays[f"{theirs}/{attention}/{name}/bias"] = bias.unflatten(0, (heads, -1))
        arrays[f"{theirs}/{attention}/out/kernel"] = state[f"{ours}.attn.proj.weight"].mT.unflatten(0, (heads, -1))
        arrays[f"{theirs}/{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
    if model.config.stem:
        layer("conv_root", "patch_embed.backbone.stem.conv")
        layer("gn_root", "patch_embed.backbone.stem.norm")
        for i, units in enumerate(model.config.stem.layers):
            for j in range(units):
                theirs, ours = f"block{i + 1}/unit{j + 1}", f"patch_embed.backbone.stages.{i}.blocks.{j}"
                for n in (1, 2, 3):
                    layer(f"{theirs}/conv{n}", f"{ours}.conv{n}")
                    layer(f"{theirs}/gn{n}", f"{ours}.norm{n}")
                if f"{ours}.downsample.conv.weight" in state:
                    layer(f"{theirs}/conv_proj", f"{ours}.downsample.conv")
                    layer(f"{theirs}/gn_proj", f"{ours}.downsample.norm")
    return {prefix + name: value.contiguous().numpy() for name, value in arrays.items()}


def assert_same(foreign: Foreign, model: ViT) -> None:
    assert foreign.image_size == model.image_size
    x = images(2, 3, *model.image_size)
    assert torch.equal(model_of(foreign)(x), model(x))


def refusal(path: Path, **options) -> str:
    """The message with which a file is refused: one line, that says which file."""
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


# What the originals computed


def test_google_file_gives_the_logits_of_flax(shared):
    foreign = load(shared / "golden/token.npz")
    io = np.load(shared / "golden/token_io.npz")
    logits = model_of(foreign)(torch.from_numpy(io["images"]).permute(0, 3, 1, 2))
    np.testing.assert_allclose(logits.detach().numpy(), io["logits"], rtol=0, atol=1e-5)
    assert (foreign.format, foreign.config.heads, foreign.config.activation) == ("google", 3, "gelu_tanh")
    assert (foreign.config.pool, foreign.image_size, foreign.head_classes) == ("token", (32, 32), 10)


def test_timm_file_gives_the_logits_of_timm(shared):
    foreign = load(shared / "golden/timm_token.safetensors")
    io = np.load(shared / "golden/timm_token_io.npz")
    logits = model_of(foreign)(torch.from_numpy(io["images"]))
    np.testing.assert_allclose(logits.detach().numpy(), io["logits"], rtol=0, atol=1e-5)
    assert (foreign.format, foreign.config.heads, foreign.config.activation) == ("timm", 3, "gelu")


def test_deit_tiny_gives_the_logits_of_timm(shared):
    path = shared / "data/deit_tiny_patch16_224.pth"
    foreign = load(path)
    reference = timm.create_model("deit_tiny_patch16_224").eval()
    reference.load_state_dict(torch.load(path, weights_only=True)["model"])
    x = images(2, 3, 224, 224)
    torch.testing.assert_close(model_of(foreign)(x), reference(x), rtol=0, atol=1e-4)
    assert Preprocessing.parse(foreign.preprocessing) == Preprocessing(
        res=(224, 224), resize=256, interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )


def test_kind_of_file_is_not_told_by_its_name(shared, tmp_path):
    path = tmp_path / "model.pth"
    shutil.copy(shared / "golden/token.npz", path)
    assert load(path).format == "google"


# Google's layouts


@pytest.mark.parametrize("names", [google.RELEASED, google.CURRENT], ids=["released", "current"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pool": "gap"},
        {"representation_size": 24},
        {"patch": 1, "stem": {"layers": (2, 1), "width": 32}},
        {"patch": 8, "stem": {"layers": ()}},
    ],
    ids=["token", "gap", "pre_logits", "hybrid", "root alone"],
)
def test_google_layouts(tmp_path, names, config):
    model = small(size=32, **config)
    np.savez(tmp_path / "model.npz", **as_google(model, names))
    foreign = load(tmp_path / "model.npz")
    assert_same(foreign, model)
    assert foreign.config == model.config


def test_google_file_with_its_optimiser(tmp_path):
    model = small()
    arrays = as_google(model, prefix="opt/target/")
    np.savez(
        tmp_path / "model.npz", **arrays, **{"opt/state/step": np.array(7), "opt/state/param_states/cls": np.ones(3)}
    )
    assert_same(load(tmp_path / "model.npz"), model)


def test_google_file_in_bfloat16(tmp_path):
    """numpy knows no bfloat16 and shows it as two bytes without a meaning."""
    model = small().bfloat16()
    arrays = as_google(model.float())
    halves = {name: (array.view(np.uint32) >> 16).astype(np.uint16).view("V2") for name, array in arrays.items()}
    np.savez(tmp_path / "model.npz", **halves)
    foreign = load(tmp_path / "model.npz")
    assert all(value.dtype == torch.float32 for value in foreign.state.values())
    assert_same(foreign, model)


def test_google_preprocessing(tmp_path):
    for size, expected in (
        (224, Preprocessing(res=(224, 224), resize=256, interpolation="area")),
        (384, Preprocessing(res=(384, 384), resize=None, interpolation="bilinear", antialias=False)),
    ):
        np.savez(tmp_path / "model.npz", **as_google(small(size=size)))
        assert Preprocessing.parse(load(tmp_path / "model.npz").preprocessing) == expected


# timm's layouts


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {}),
        ({"class_token": False, "global_pool": "map"}, {}),
        ({"init_values": 0.1, "qk_norm": True, "num_heads": 6}, {}),
        ({"num_heads": 4}, {"heads": 4}),
        ({"reg_tokens": 2, "no_embed_class": True}, {}),
        ({"reg_tokens": 2}, {}),
        ({"num_classes": 0}, {}),
    ],
    ids=["gap", "map", "qk_norm tells heads", "heads given", "registers", "registers with positions", "no head"],
)
def test_timm_layouts(tmp_path, theirs, options):
    config = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10, **theirs}
    reference = timm.models.vision_transformer.VisionTransformer(**config).eval()
    torch.manual_seed(0)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    foreign = load(tmp_path / "model.safetensors", **options)
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(model_of(foreign)(x), reference(x), rtol=0, atol=1e-5)


def test_timm_hybrid_of_the_root_alone(tmp_path):
    reference = timm.create_model("vit_tiny_r_s16_p8_224", img_size=32, num_classes=3, depth=1)
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").config.stem.layers == ()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_removed(tmp_path, prefix):
    model = small(activation="gelu")
    save_file({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert_same(load(tmp_path / "model.safetensors"), model)


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (1280, 16), (1152, 16), (48, 3), (96, 3), (256, 4), (1536, 24), (40, 5)]
)
def test_heads_of_a_width(tmp_path, width, heads):
    model = small(width=width, depth=1, heads=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").config.heads == heads


# PyTorch files


def test_averaged_weights_are_taken_out_of_a_training_checkpoint(tmp_path):
    model = small(activation="gelu")
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"model": zeros, "model_ema": state, "epoch": 7, "optimizer": {"lr": 0.1}}, tmp_path / "model.pth")
    assert_same(load(tmp_path / "model.pth"), model)


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_code_in_a_pytorch_file_is_not_run(tmp_path, old):
    marker = tmp_path / "ran"
    state = {**small().state_dict(), "payload": Payload(marker)}
    torch.save(state, tmp_path / "model.pth", _use_new_zipfile_serialization=not old)
    assert "only tensors are read" in refusal(tmp_path / "model.pth")
    assert not marker.exists()


def test_small_pytorch_file_cannot_take_all_memory(tmp_path):
    torch.save({"pos_embed": torch.zeros(1).expand(1 << 33)}, tmp_path / "model.pth")
    assert "far more memory" in refusal(tmp_path / "model.pth")


# Files that are refused without a reader of their own


def test_no_file(tmp_path):
    assert refusal(tmp_path / "model.npz") == "no such file"


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1"])
def test_other_files(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    assert refusal(tmp_path / "model.pth") == "neither an .npz, a .safetensors nor a PyTorch file"


def test_npz_of_objects(tmp_path):
    marker = tmp_path / "ran"
    np.savez(tmp_path / "model.npz", cls=np.array([Payload(marker)], dtype=object))
    assert "damaged or holds more than arrays" in refusal(tmp_path / "model.npz")
    assert not marker.exists()


def test_npz_that_unpacks_to_far_more(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("cls.npy", bytes(1000))
        archive.infolist()[0].file_size = 3 << 30
    assert refusal(tmp_path / "model.npz") == "the file would take 3 GiB in memory, far beyond its size"


def test_npz_whose_header_claims_too_much(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 60,)})
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("cls.npy", header.getvalue())
    assert "damaged" in refusal(tmp_path / "model.npz")


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_truncated_files(tmp_path, keep):
    model = small()
    np.savez(tmp_path / "model.npz", **as_google(model))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path / "model.npz", tmp_path / "model.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        assert "damaged" in refusal(path)


def test_damaged_array(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, **as_google(small()))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("length", [1 << 40, (16 << 20) + 1, 300])
def test_safetensors_header_that_claims_too_much(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{" + bytes(200))
    assert f"claims {length} bytes" in refusal(tmp_path / "model.safetensors")


def test_safetensors_with_overlapping_tensors(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "damaged" in refusal(tmp_path / "model.safetensors")


# Tensors that do not fit


def saved(tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    """A file in timm's layout with some tensors changed, added or, by None, left out."""
    state = {**small().state_dict(), **changes}
    save_file({name: value for name, value in state.items() if value is not None}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.attn.proj.bias": None}, "missing from what looks like a timm file: blocks.1.attn.proj.bias"),
        ({"blocks.0.mlp.fc1.weight": None}, "tensor blocks.0.mlp.fc1.weight is missing"),
        ({"surprise": torch.zeros(1)}, "unexpected in a timm file: surprise"),
        ({"\x1b[31mred\n": torch.zeros(1)}, r"unexpected in a timm file: \x1b[31mred\n"),
        ({"norm.weight": torch.zeros(47)}, "norm.weight has shape (47,), expected (48,)"),
        ({"pos_embed": torch.zeros(17, 48)}, "pos_embed has shape (17, 48), expected 3 dimensions"),
        ({"pos_embed": torch.zeros(1, 15, 48)}, "pos_embed has 15 rows, which is not a square grid of patches"),
        ({"patch_embed.proj.weight": torch.zeros(0, 3, 8, 8)}, "patch_embed.proj.weight has shape (0, 3, 8, 8)"),
        ({"norm.bias": torch.full((48,), torch.nan)}, "norm.bias holds NaN or infinity"),
        ({"norm.bias": torch.zeros(48, dtype=torch.int64)}, "norm.bias holds torch.int64, expected floating point"),
        ({"dist_token": torch.zeros(1, 1, 48)}, "its tensors are those of no known format"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(tmp_path, changes, message):
    assert message in refusal(saved(tmp_path, **changes))


@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (2, 3, 4), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["google", "timm"])
def test_any_tensor_of_a_wrong_shape(tmp_path, layout, shape):
    model = small(depth=1, patch=1, representation_size=24, stem={"layers": (1,), "width": 32})
    tensors = as_google(model) if layout == "google" else {k: v.numpy() for k, v in model.state_dict().items()}
    for name in tensors:
        changed = {**tensors, name: np.zeros(shape, np.float32)}
        if layout == "google":
            np.savez(tmp_path / "model.npz", **changed)
            refusal(tmp_path / "model.npz")
        else:
            save_file({k: torch.from_numpy(v) for k, v in changed.items()}, tmp_path / "model.safetensors")
            refusal(tmp_path / "model.safetensors")


def test_heads_that_do_not_fit(tmp_path):
    assert "width 48 is not divisible by heads 5" in refusal(saved(tmp_path), heads=5)


def test_heads_against_the_file(tmp_path):
    np.savez(tmp_path / "model.npz", **as_google(small()))
    assert refusal(tmp_path / "model.npz", heads=4) == "the file has 3 heads, not 4"


def test_google_file_with_a_missing_array(tmp_path):
    arrays = as_google(small())
    name = "Transformer/encoderblock_1/LayerNorm_2/bias"
    del arrays[name]
    np.savez(tmp_path / "model.npz", **arrays)
    assert refusal(tmp_path / "model.npz") == f"tensor {name} is missing"


def test_google_file_with_more_arrays(tmp_path):
    np.savez(tmp_path / "model.npz", **as_google(small()), **{"Transformer/extra": np.zeros(1)})
    assert refusal(tmp_path / "model.npz") == "unexpected in a google file: Transformer/extra"


def test_unknown_format_names_the_known_ones(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "model.safetensors")
    assert caught.value.hint.startswith("known formats: google, ")
