"""torchvision's decoder of JPEGs, which takes longer to import than many images to decode: processes inherit it."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from vitcli.data.images import quiet

with quiet:
    try:  # its successor to come is torchcodec, of which it warns
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError):  # it is gone, or another torch's
        decode_jpeg = None


def by_torchvision(jpeg: bytearray) -> Tensor | None:
    """An RGB JPEG as uint8 (3, h, w); None where that cannot be, of which PIL can say why."""
    if decode_jpeg is None:
        return None
    with quiet, suppress(RuntimeError):
        return decode_jpeg([torch.frombuffer(jpeg, dtype=torch.uint8)], mode=ImageReadMode.RGB)[0]
    return None
