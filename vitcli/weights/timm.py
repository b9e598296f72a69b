"""State dicts in timm's layout, which is also DeiT's and our own: names need no change.

The files tell neither heads nor preprocessing. Heads are guessed as `_architecture` says; the preprocessing is that
of DeiT and of most of timm's models: 0.875 of the shorter side, bicubic, ImageNet's mean and deviation.
"""

import re

from vitcli.weights import Beside, Foreign, Tensors
from vitcli.weights._architecture import infer

CORE = {"patch_embed.proj.weight", "pos_embed", "norm.weight", "blocks.0.attn.qkv.weight"}
# Layouts of other projects that share timm's core.
OTHERS = {
    "dist_token",  # distilled DeiT
    "blocks.0.gamma_1",  # DeiT III
    "mask_token",  # MAE, DINOv2
    "register_tokens",  # DINOv2
    "storage_tokens",  # DINOv3
    "blocks.0.attn.rel_pos_h",  # SAM
}


def matches(names: set[str]) -> bool:
    """True for timm's VisionTransformer with its last norm before pooling."""
    return names >= CORE and not names & OTHERS


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """Weights as they are; a hybrid of the root alone keeps it one level higher than the others."""
    root = re.compile(r"^patch_embed\.backbone\.(?=conv\.|norm\.)")
    state = {root.sub("patch_embed.backbone.stem.", name): value for name, value in tensors.items()}
    tensors.clear()
    config, classes, image_size = infer(state, beside.heads, activation="gelu", posemb_resize="bicubic_antialias")
    preprocessing = {
        "res": image_size[0],
        "resize": image_size[0] * 256 // 224,
        "interpolation": "bicubic",
        "antialias": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    return Foreign("timm", config, state, classes, image_size, preprocessing)
