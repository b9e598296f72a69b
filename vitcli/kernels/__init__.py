"""Kernels of our own, in Triton, for what compilers and libraries leave apart."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@cache
def can_be_built(device: torch.device) -> bool:
    """Whether Triton builds for a device here, which takes a trial: it wants a C compiler and Python's headers, too."""
    if device.type != "cuda":
        return False
    import torch

    try:
        from vitcli.kernels.resize import resize

        one_pixel = torch.tensor([44, 1, 1, 9, 1, 1, 9, 1, 1, 0, 2, 200], dtype=torch.int32, device=device).view(
            torch.uint8
        )
        found = torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=device)
        resize(one_pixel, found, rows=1)
    except Exception:  # of many kinds, by what is missing
        return False
    return found[0, 0].item() == 200
