"""MAE before fine-tuning (facebookresearch/mae): an encoder, and the decoder that repainted the image.

Without the decoder, and after fine-tuning, its files are in timm's layout.
"""

from vitcli.weights import Beside, Foreign, Tensors
from vitcli.weights.timm import CORE, plain

DROPPED = ("mask_token", "decoder_")


def matches(names: set[str]) -> bool:
    """True for encoder and decoder in one file."""
    return names >= CORE | {"mask_token", "decoder_embed.weight"}


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """The encoder."""
    for name in [name for name in tensors if name.startswith(DROPPED)]:
        del tensors[name]
    return plain("mae", tensors, beside, posemb_resize="bicubic")
