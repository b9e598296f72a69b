"""Position tables and their stretching."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vitcli.model import ViTConfig
from vitcli.model.position import resize, resize_state, sincos2d, sincos2d_mae


def waves(x: int, y: int, exponents: list[float]) -> list[float]:
    angles = [[at / 10_000**e for e in exponents] for at in (x, y)]
    return [f(angle) for row in angles for f in (math.sin, math.cos) for angle in row]


def test_big_vision_table():
    expected = waves(x=2, y=1, exponents=[i / 7 for i in range(8)])
    assert sincos2d((3, 4), 32)[1 * 4 + 2].tolist() == pytest.approx(expected, abs=1e-6)


def test_mae_table():
    expected = waves(x=2, y=1, exponents=[i / 8 for i in range(8)])
    assert sincos2d_mae((3, 4), 32)[1 * 4 + 2].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("new", [(24, 24), (7, 7), (14, 20), (13, 9), (1, 1)])
@pytest.mark.parametrize("old", [(14, 14), (7, 10)])
def test_bilinear_is_the_zoom_of_the_original(old, new):
    ndimage = pytest.importorskip("scipy.ndimage")
    table = torch.randn(old[0] * old[1], 6, generator=torch.Generator().manual_seed(0))
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    expected = ndimage.zoom(table.double().numpy().reshape(*old, 6), zoom, order=1).reshape(-1, 6)
    np.testing.assert_allclose(resize(table, old, new, "bilinear").numpy(), expected, rtol=0, atol=1e-6)


def test_bicubic_is_that_of_deit():
    table = torch.randn(14 * 14, 6, generator=torch.Generator().manual_seed(0))
    image = table.reshape(1, 14, 14, 6).permute(0, 3, 1, 2)
    expected = F.interpolate(image, (24, 16), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(-1, 6)
    torch.testing.assert_close(resize(table, (14, 14), (24, 16), "bicubic"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_same_grid_changes_nothing(mode):
    table = torch.randn(12, 6)
    assert torch.equal(resize(table, (3, 4), (3, 4), mode), table)


@pytest.mark.parametrize("class_token", [True, False])
def test_state_is_brought_to_another_resolution(class_token):
    config = ViTConfig(variant="mu/8", pool="token" if class_token else "gap")
    state = config.build(5, (32, 32)).state_dict()
    new = resize_state(state, config, (32, 32), (48, 64))
    config.build(5, (48, 64)).load_state_dict(new)
    prefix = int(class_token)
    assert torch.equal(new["pos_embed"][:, :prefix], state["pos_embed"][:, :prefix])
    # Corners stay in place.
    old_grid = state["pos_embed"][0, prefix:].reshape(4, 4, -1)
    new_grid = new["pos_embed"][0, prefix:].reshape(6, 8, -1)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(new_grid[corner], old_grid[corner])
    assert all(new[name] is state[name] for name in state if name != "pos_embed")


def test_fixed_tables_are_made_anew():
    config = ViTConfig(variant="mu/8", pool="gap", posemb="sincos2d")
    state = config.build(5, (32, 32)).state_dict()
    assert resize_state(state, config, (32, 32), (64, 64)) == state
    model = config.build(5, (64, 64))
    assert torch.equal(model.pos_embed[0], sincos2d((8, 8), 32))
