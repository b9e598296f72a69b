"""Fine-tuning at another resolution, with other patches, with the layer before the head: from any checkpoint."""

import numpy as np
import pytest
import timm
import torch
from command import TINY, Said, Vit, sets
from safetensors.torch import save_file
from scipy import ndimage
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings
from transformers import ViTConfig as TheirConfig
from transformers import ViTModel

from vitcli import checkpoint
from vitcli.checkpoint import Trained
from vitcli.data import Preprocessing
from vitcli.errors import CheckpointError
from vitcli.model import ViTConfig
from vitcli.model.position import resize, resize_state
from vitcli.model.stem import resize_patches
from vitcli.transfer import start_from

GRIDS = [((4, 4), (7, 7)), ((7, 7), (4, 4)), ((4, 4), (6, 9)), ((5, 7), (8, 6)), ((14, 14), (13, 17))]
SHORT = ("steps=2", "optim.warmup_steps=1", "batch=16", "data.workers=0", "data.augment.crop=central_crop", TINY[3])


@pytest.fixture
def vit(capsys, monkeypatch) -> Vit:
    return Vit(capsys, monkeypatch)


def table(grid: tuple[int, int], width: int = 6) -> Tensor:
    return torch.randn(grid[0] * grid[1], width, generator=torch.Generator().manual_seed(0))


def trained(size: tuple[int, int] = (32, 32), classes: int = 10, **changes) -> Trained:
    sizes = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2, "patch": 8}
    config = ViTConfig.parse(sizes | changes)
    torch.manual_seed(0)
    model = config.build(classes, size).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    names = tuple(map(str, range(classes)))
    return Trained(model, config, names, size, Preprocessing.parse({"res": size}), "model.npz (google)")


# Each mode is that of its peer


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_bilinear_is_scipys_zoom(old, new):
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    expected = ndimage.zoom(table(old).double().numpy().reshape(*old, 6), zoom, order=1).reshape(-1, 6)
    np.testing.assert_allclose(resize(table(old), old, new, "bilinear").numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_bicubic_antialias_is_timms(old, new):
    rows = torch.cat([torch.ones(1, 6), table(old)])[None]
    expected = resample_abs_pos_embed(rows, list(new), list(old), num_prefix_tokens=1)
    found = resize(table(old), old, new, "bicubic_antialias")
    torch.testing.assert_close(found, expected[0, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (14, 24)])
def test_bicubic_corners_is_torchvisions(old, new):
    rows = torch.cat([torch.ones(1, 6), table((old, old))])[None]
    state = interpolate_embeddings(new * 16, 16, {"encoder.pos_embedding": rows})
    found = resize(table((old, old)), (old, old), (new, new), "bicubic_corners")
    torch.testing.assert_close(found, state["encoder.pos_embedding"][0, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(4, (7, 7)), (7, (4, 4)), (4, (6, 9))])
@torch.no_grad()
def test_bicubic_is_transformers(old, new):
    config = TheirConfig(
        hidden_size=6, num_hidden_layers=0, num_attention_heads=1, image_size=old * 8, patch_size=8, intermediate_size=6
    )
    embeddings = ViTModel(config, add_pooling_layer=False).embeddings
    rows = torch.cat([torch.ones(1, 6), table((old, old))])[None]
    embeddings.position_embeddings.copy_(rows)
    tokens = torch.zeros(1, 1 + new[0] * new[1], 6)
    expected = embeddings.interpolate_pos_encoding(tokens, new[0] * 8, new[1] * 8)
    found = resize(table((old, old)), (old, old), new, "bicubic")
    torch.testing.assert_close(found, expected[0, 1:], rtol=0, atol=1e-5)


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def dinov2_side(old: int, new: int) -> np.ndarray:
    """One side by DINOv2's rule: half-pixel centres at a ratio of (new + 0.1) / old, edges repeated."""
    weights = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / (new + 0.1) - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, min(max(j, 0), old - 1)] += cubic(at - j)
    return weights


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_bicubic_offset_is_dinov2s(old, new):
    down, across = (dinov2_side(before, after) for before, after in zip(old, new, strict=True))
    image = table(old).double().numpy().reshape(*old, 6)
    expected = np.einsum("ia,jb,abd->ijd", down, across, image).reshape(-1, 6)
    np.testing.assert_allclose(resize(table(old), old, new, "bicubic_offset").numpy(), expected, rtol=0, atol=1e-5)


def test_the_modes_differ():
    modes = ("bilinear", "bicubic", "bicubic_antialias", "bicubic_corners", "bicubic_offset")
    found = [resize(table((7, 7)), (7, 7), (4, 5), mode) for mode in modes]
    differences = [float((a - b).abs().max()) for i, a in enumerate(found) for b in found[:i]]
    assert min(differences) > 0.01


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({}, 1),
        ({"distilled": True}, 2),
        ({"registers": 3}, 1),
        ({"posemb_class": False}, 0),
        ({"pool": "gap"}, 0),
        ({"pool": "gap", "registers": 2}, 0),
    ],
    ids=str,
)
def test_rows_of_other_tokens_stay(changes, prefix):
    start = trained((24, 40), posemb_resize="bicubic", **changes)
    state = start.model.state_dict()
    new = resize_state(state, start.config, (24, 40), (40, 16))
    start.config.build(10, (40, 16)).load_state_dict(new)
    assert new["pos_embed"].shape[1] == prefix + 5 * 2
    assert torch.equal(new["pos_embed"][:, :prefix], state["pos_embed"][:, :prefix])
    expected = resize(state["pos_embed"][0, prefix:], (3, 5), (5, 2), "bicubic")
    assert torch.equal(new["pos_embed"][0, prefix:], expected)
    assert all(new[name] is state[name] for name in state if name != "pos_embed")


# Patches of another size


@pytest.mark.parametrize(("old", "new"), [(8, 12), (12, 8), (8, 7), (7, 8), (4, 3)])
def test_patches_are_resized_as_timm_does(old, new):
    kernel = torch.randn(5, 3, old, old, generator=torch.Generator().manual_seed(0))
    expected = resample_patch_embed(kernel.double(), [new, new], interpolation="bilinear", antialias=False)
    scale = float(expected.abs().max())
    torch.testing.assert_close(resize_patches(kernel, new), expected.float(), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(("old", "new"), [(8, 12), (14, 16)])
def test_larger_patches_give_the_same_tokens(old, new):
    kernel, patch = (torch.randn(4, 3, old, old, generator=torch.Generator().manual_seed(i)) for i in range(2))
    larger = F.interpolate(patch, (new, new), mode="bilinear", align_corners=False)
    expected = F.conv2d(patch.double(), kernel.double())
    found = F.conv2d(larger.double(), resize_patches(kernel.double(), new))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_smaller_patches_give_the_nearest_tokens():
    """On white noise, no other kernel has a smaller error than the pseudo-inverse's."""
    kernel = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    basis = torch.eye(64).double().reshape(64, 1, 8, 8)
    b = F.interpolate(basis, (6, 6), mode="bilinear", align_corners=False).flatten(1)

    def error(w: Tensor) -> Tensor:
        return (kernel.flatten() - b @ w.flatten()).square().sum()

    best = resize_patches(kernel, 6).requires_grad_()
    error(best).backward()
    assert best.grad is not None
    assert best.grad.abs().max() < 1e-9
    assert error(best) > 0.1


def test_same_patches_stay():
    kernel = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(resize_patches(kernel, 8), kernel)


@torch.no_grad()
def test_start_with_other_patches():
    start = trained((32, 48))
    config = start.config.model_copy(update={"patch": 12})
    model, notes = start_from(start, config, 10, (48, 72))
    assert notes[0] == "patches resized 8x8 -> 12x12 (FlexiViT's pseudo-inverse)"
    assert not any("position" in note for note in notes)  # as many patches as before
    images = torch.randn(2, 3, 4, 8, 6, 8, generator=torch.Generator().manual_seed(1))  # rows and columns of patches
    larger = F.interpolate(images.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 8, 8), (12, 12), mode="bilinear")
    larger = larger.reshape(2, 4, 6, 3, 12, 12).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 48, 72)
    expected = start.model.embed(images.reshape(2, 3, 32, 48))
    torch.testing.assert_close(model.embed(larger), expected, rtol=0, atol=1e-4)


def test_other_patches_on_images_of_the_same_size():
    start = trained((48, 48))
    config = start.config.model_copy(update={"patch": 4})
    model, notes = start_from(start, config, 3, (48, 48))
    assert notes[:2] == [
        "patches resized 8x8 -> 4x4 (FlexiViT's pseudo-inverse)",
        "position table stretched 6x6 -> 12x12 (bilinear)",
    ]
    expected = resize(start.model.pos_embed[0, 1:], (6, 6), (12, 12), "bilinear")
    assert torch.equal(model.pos_embed[0, 1:], expected)
    assert torch.equal(model.pos_embed[0, :1], start.model.pos_embed[0, :1])


def test_patches_of_a_hybrid_are_not_resized():
    start = trained((32, 32), stem={"layers": (), "width": 32}, patch=2)
    with pytest.raises(CheckpointError) as caught:
        start_from(start, start.config.model_copy(update={"patch": 4}), 10, (32, 32))
    assert "a hybrid's patches are not resized" in str(caught.value)
    assert caught.value.hint == "set model.patch=2"


# The head, and the layer before it


def test_pre_logits_go_with_the_head_unless_they_are_wanted():
    start = trained(representation_size=24)
    without, notes = start_from(start, start.config.model_copy(update={"representation_size": None}), 3, (32, 32))
    assert notes == ["old head dropped (10 classes, with pre_logits)", "new zero head for 3 classes"]
    assert "pre_logits.fc.weight" not in without.state_dict()
    kept, notes = start_from(start, start.config, 3, (32, 32))
    assert notes == ["old head dropped (10 classes), pre_logits kept", "new zero head for 3 classes"]
    assert torch.equal(kept.state_dict()["pre_logits.fc.weight"], start.model.state_dict()["pre_logits.fc.weight"])
    assert not kept.head.weight.any()


def test_pre_logits_of_another_size_are_refused():
    start = trained(representation_size=24)
    with pytest.raises(CheckpointError, match=r"pre_logits.fc.weight has shape \[24, 32\], expected \[20, 32\]"):
        start_from(start, start.config.model_copy(update={"representation_size": 20}), 3, (32, 32))


def test_new_pre_logits_on_a_model_without():
    start = trained()
    model, notes = start_from(start, start.config.model_copy(update={"representation_size": 24}), 3, (32, 32))
    assert model.state_dict()["pre_logits.fc.weight"].shape == (24, 32)
    assert notes == ["old head dropped (10 classes)", "new zero head for 3 classes"]


def test_both_heads_of_a_distilled_model_are_new():
    start = trained(distilled=True)
    model, notes = start_from(start, start.config, 3, (32, 32))
    assert model.head.weight.shape == model.head_dist.weight.shape == (3, 32)
    assert not model.head_dist.weight.any()
    assert torch.equal(model.dist_token, start.model.dist_token)
    assert notes == ["old head dropped (10 classes)", "new zero head for 3 classes"]


# Through the command


def finetune(vit: Vit, ckpt: object, *given: object) -> Said:
    return vit("finetune", "--ckpt", ckpt, "--data", "digits", "--classes", 10, *sets(*SHORT), *given)


@pytest.fixture
def torchvision_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_file(VisionTransformer(32, 8, 1, 1, 48, 96, num_classes=7).state_dict(), "theirs.safetensors")
    return "theirs.safetensors"


def test_images_that_are_not_square(vit, torchvision_file):
    said = finetune(vit, torchvision_file, "--set", "data.res=[16,24]", "--run", "run")
    assert said.code == 0, said.err
    assert "position table stretched 4x4 -> 2x3 (bicubic_corners)" in said.err
    assert "old head dropped (7 classes)" in said.err
    run = checkpoint.load(checkpoint.Path("run"))
    assert run.image_size == (16, 24)
    assert run.model.pos_embed.shape == (1, 1 + 2 * 3, 48)
    assert vit("eval", "--ckpt", "run", "--json").json["images"] > 0


def test_other_patches(vit, torchvision_file):
    said = finetune(vit, torchvision_file, "--res", 14, "--set", "model.patch=7", "--run", "run")
    assert said.code == 0, said.err
    assert "patches resized 8x8 -> 7x7 (FlexiViT's pseudo-inverse)" in said.err
    assert "position table stretched 4x4 -> 2x2 (bicubic_corners)" in said.err


def test_a_position_for_the_class_token_that_the_new_model_lacks(vit, torchvision_file):
    said = finetune(vit, torchvision_file, "--res", 16, "--set", "model.posemb_class=false", "--run", "run")
    assert said.code == 4
    assert said.err.splitlines()[-1] == (
        "error: theirs.safetensors (torchvision): pos_embed has shape [1, 5, 48], expected [1, 4, 48]"
    )


def test_keep_pre_logits(vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 1, 1, 48, 96, num_classes=7, representation_size=20)
    save_file(model.state_dict(), "theirs.safetensors")
    said = finetune(vit, "theirs.safetensors", "--res", 16, "--keep-pre-logits", "--set", "optim.lr=1e-9", "--run", "a")
    assert said.code == 0, said.err
    assert "old head dropped (7 classes), pre_logits kept" in said.err
    run = checkpoint.load(tmp_path / "a")
    assert run.config.representation_size == 20
    torch.testing.assert_close(run.model.pre_logits.fc.weight, model.heads.pre_logits.weight, rtol=0, atol=1e-6)
    said = finetune(vit, "theirs.safetensors", "--res", 16, "--run", "b")
    assert "old head dropped (7 classes, with pre_logits)" in said.err
    assert checkpoint.load(tmp_path / "b").config.representation_size is None


def test_keep_pre_logits_where_there_are_none(vit, torchvision_file):
    said = finetune(vit, torchvision_file, "--res", 16, "--keep-pre-logits", "--run", "run")
    assert said.code == 4
    assert "theirs.safetensors (torchvision) has no pre_logits" in said.err
    assert "leave out --keep-pre-logits" in said.err
    said = vit("finetune", "--resume", "run", "--keep-pre-logits")
    assert said.code == 2
    assert "--keep-pre-logits does not go with --resume" in said.err


def test_timm_at_another_resolution_answers_as_timm_does(tmp_path):
    """The whole way: a file, its format's mode, a model for images of another shape."""
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}
    torch.manual_seed(0)
    theirs = timm.models.vision_transformer.VisionTransformer(img_size=32, **sizes).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    start = checkpoint.load(tmp_path / "model.safetensors")
    model, _ = start_from(start, start.config, 0, (48, 40))
    theirs.set_input_size((48, 40))
    images = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), theirs(images), rtol=0, atol=1e-5)
