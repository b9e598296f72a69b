"""Kernels of our own, in Triton, for what compilers and libraries leave apart."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@cache
def why_not(device: torch.device) -> str | None:
    """Why Triton builds nothing for a device here; None if it does, which takes a trial.

    It wants a C compiler and Python's headers, too.
    """
    if device.type != "cuda":
        return f"kernels are for cuda, not for {device.type}"
    import torch

    try:
        from vitcli.kernels.resize import resize

        one_pixel = torch.tensor([44, 1, 1, 9, 1, 1, 9, 1, 1, 0, 2, 200], dtype=torch.int32, device=device)
        found = torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=device)
        resize(one_pixel.view(torch.uint8), found, rows=1)
        return None if found[0, 0].item() == 200 else "its kernels answer wrongly"
    except Exception as error:  # of many kinds, by what is missing
        return str(error).partition("\n")[0] or type(error).__name__
