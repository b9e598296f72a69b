"""A trained model once more: at another resolution, or with its weights in another precision."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vitcli.errors import RecipeError
from vitcli.model.position import resize_state

if TYPE_CHECKING:
    from vitcli.checkpoint import Trained
    from vitcli.model.vit import ViT


def rebuilt(trained: Trained, image_size: tuple[int, int], dtype: torch.dtype = torch.float32) -> ViT:
    """A second model, in evaluation mode; weights of the same precision are shared, not copied.

    The position table is stretched as `posemb_resize` says. Raises RecipeError where the patches do not divide.
    """
    config, state = trained.config, trained.model.state_dict()
    try:
        config.grid(image_size)
    except ValueError as error:
        raise RecipeError(f"--res: {error}") from None
    resized = resize_state(state, config, trained.image_size, image_size)
    state = {name: tensor.to(dtype) for name, tensor in resized.items()}
    with torch.device("meta"):
        model = config.build(trained.model.classes, image_size)
    model.load_state_dict(state, assign=True)
    model.fix_positions()
    return model.to(dtype).eval()


def at_resolution(trained: Trained, side: int) -> Trained:
    """The model for square images of another side; the crop keeps its share of the image.

    Raises RecipeError where the patches do not divide it.
    """
    size, p = (side, side), trained.preprocessing
    model = rebuilt(trained, size)
    resize = p.resize and max(side, round(p.resize * side / max(p.res)))
    preprocessing = p.model_copy(update={"res": size, "resize": resize})
    return replace(trained, model=model, image_size=size, preprocessing=preprocessing)
