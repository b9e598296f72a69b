"""Foreign checkpoints: read right, by what they hold, or refused in one line."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vitcli.errors import CheckpointError
from vitcli.model import ViTConfig
from vitcli.model.vit import ViT
from vitcli.weights import Foreign, load

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


def assert_same(foreign: Foreign, model: ViT) -> None:
    assert foreign.image_size == model.image_size
    x = images(2, 3, *model.image_size)
    assert torch.equal(model_of(foreign)(x), model(x))


def refusal(path: Path) -> str:
    """The message with which a file is refused: one line, that says which file."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def test_kind_of_file_is_not_told_by_its_name(shared, tmp_path):
    path = tmp_path / "model.pth"
    shutil.copy(shared / "golden/token.npz", path)
    assert load(path).format == "google"


# timm's layout, which is our own


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
        ({"dist_token": torch.zeros(1, 1, 48)}, "pos_embed has 17 rows, which is not a square grid of patches"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(tmp_path, changes, message):
    assert message in refusal(saved(tmp_path, **changes))


@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (2, 3, 4), (1, 1, 1, 1, 1)], ids=str)
def test_any_tensor_of_a_wrong_shape(tmp_path, shape):
    state = small(depth=1, patch=1, representation_size=24, stem={"layers": (1,), "width": 32}).state_dict()
    for name in state:
        save_file({**state, name: torch.zeros(shape)}, tmp_path / "model.safetensors")
        refusal(tmp_path / "model.safetensors")


def test_unknown_format_names_the_known_ones(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "model.safetensors")
    assert caught.value.hint.startswith("known formats: ")
    assert {"google", "timm"} <= set(caught.value.hint.removeprefix("known formats: ").split(", "))
