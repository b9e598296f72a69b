"""DeiT III (facebookresearch/deit, models_v2.py): LayerScale under its own names, a class token without position.

It is evaluated on the whole shorter side.
"""

import re

from vitcli.weights import Beside, Foreign, Tensors, _refused
from vitcli.weights.timm import CORE, plain


def matches(names: set[str]) -> bool:
    """True for DeiT III. The BEiT family has LayerScale under these names too, but no bias of q, k and v in one."""
    return names >= CORE | {"blocks.0.gamma_1", "blocks.0.attn.qkv.bias"} and not _refused.reason(names)


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """Weights, LayerScale renamed."""
    for name in [name for name in tensors if re.fullmatch(r"blocks\.\d+\.gamma_[12]", name)]:
        block, _, gamma = name.rpartition(".")
        tensors[f"{block}.ls{gamma[-1]}.gamma"] = tensors.pop(name)
    return plain("deit3", tensors, beside, posemb_resize="bicubic", crop_pct=1.0)
