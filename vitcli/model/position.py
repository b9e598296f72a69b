"""Position tables: where a patch stands in the image, and how a table follows the image to another resolution."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vitcli.model import ViTConfig

Grid = tuple[int, int]


def sincos2d(grid: Grid, width: int) -> Float[Tensor, "n d"]:
    """Fixed table of big_vision, after MoCo v3: [sin x, cos x, sin y, cos y], frequencies 1 to 1/10000."""
    down, across = _positions(grid)
    return _waves(across, down, torch.linspace(0, 1, width // 4, dtype=torch.float64))


def sincos2d_mae(grid: Grid, width: int) -> Float[Tensor, "n d"]:
    """Fixed table of MAE: the same order, but the lowest frequency stays above 1/10000."""
    down, across = _positions(grid)
    return _waves(across, down, torch.arange(width // 4, dtype=torch.float64) / (width // 4))


def fixed_table(config: ViTConfig, image_size: tuple[int, int]) -> Float[Tensor, "1 n d"]:
    """The table that `config.posemb` names, for images (height, width), with rows of zeros for the class tokens."""
    table = sincos2d if config.posemb == "sincos2d" else sincos2d_mae
    prefix = torch.zeros(config.posemb_prefix, config.width)
    return torch.cat([prefix, table(config.grid(image_size), config.width)])[None]


def _positions(grid: Grid) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, row by row."""
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    return rows.repeat_interleave(grid[1]), columns.repeat(grid[0])


def _waves(x: Tensor, y: Tensor, exponents: Tensor) -> Tensor:
    frequencies = 10_000.0**-exponents
    x, y = x[:, None] * frequencies, y[:, None] * frequencies
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def resize(table: Float[Tensor, "n d"], old: Grid, new: Grid, mode: str) -> Float[Tensor, "m d"]:
    """Stretch a table of patch rows from one grid (down, across) to another, as `ViTConfig.posemb_resize` says.

    `bilinear` keeps the corners in place, as `scipy.ndimage.zoom(order=1)` in the original, and so does
    `bicubic_corners`. The other three have half-pixel centres: `bicubic` alone, `bicubic_antialias` when it shrinks
    too, `bicubic_offset` with DINOv2's tenth of a patch in the ratio of the sides.
    """
    if old == new:
        return table
    image = table.double().unflatten(0, old).movedim(-1, 0)[None]
    if mode in ("bilinear", "bicubic_corners"):
        image = F.interpolate(image, new, mode=mode.partition("_")[0], align_corners=True)
    elif mode == "bicubic_offset":
        ratio = tuple((after + 0.1) / before for before, after in zip(old, new, strict=True))
        image = F.interpolate(image, scale_factor=ratio, mode="bicubic", recompute_scale_factor=False)
    else:
        image = F.interpolate(image, new, mode="bicubic", antialias=mode == "bicubic_antialias")
    return image[0].movedim(0, -1).flatten(0, 1).to(table.dtype)


def resize_table(table: Float[Tensor, "1 n d"], prefix: int, old: Grid, new: Grid, mode: str) -> Float[Tensor, "1 m d"]:
    """`resize` of a whole table, whose first `prefix` rows, those of class tokens, stay."""
    own, patches = table[0].tensor_split([prefix])
    return torch.cat([own, resize(patches, old, new, mode)])[None]


def resize_state(
    state: dict[str, Tensor], config: ViTConfig, old: tuple[int, int], new: tuple[int, int]
) -> dict[str, Tensor]:
    """A ViT's state for images (height, width) `new` from its state for `old`; the rows of class tokens stay."""
    if "pos_embed" not in state:
        return state
    grids = config.grid(old), config.grid(new)
    return {**state, "pos_embed": resize_table(state["pos_embed"], config.posemb_prefix, *grids, config.posemb_resize)}
