"""DINO and DINOv2 (facebookresearch): a backbone, or the teacher of a training checkpoint with heads beside it.

The class token is read. With DINOv2's linear classifier beside the backbone the head reads the mean of the patches
too. DINOv2's released weights have a table for 518 pixels, and DINOv2 evaluates them at 224, stretching it: so does
`read`, as for transformers' folders of the same models, whose processor says 224.
"""

import re
from dataclasses import replace

from vitcli.errors import CheckpointError
from vitcli.weights import Beside, Foreign, Tensors, _refused
from vitcli.weights._architecture import stretched
from vitcli.weights.timm import plain

CORE = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"}
TRAINED, EVALUATED = (518, 518), (224, 224)
DROPPED = ("mask_token", "dino_head.", "ibot_head.", "head.mlp.", "head.last_layer.")  # used in training only
NAMES = {
    r"^linear_head\.": "head.",
    r"^register_tokens$": "reg_token",
    r"^blocks\.\d+\.(?=\d+\.)": "blocks.",  # chunks for FSDP; the number of a block is its second
    r"\.mlp\.w12\.": ".mlp.fc1.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
}


def matches(names: set[str]) -> bool:
    """True where the names show a training of DINO's; what is left of DINO without is timm's layout."""
    bare = {name.removeprefix("backbone.") for name in names}
    shown = names & {"backbone.pos_embed", "mask_token", "register_tokens"} and "decoder_embed.weight" not in names
    return bool(shown) and bare >= CORE and not _refused.reason(bare)


def read(tensors: Tensors, beside: Beside) -> Foreign:
    """Weights, renamed; what only training uses is dropped."""
    # As dinov2/hub/backbones.py builds them: models with registers have an antialiased stretch, the others an offset.
    registers = any(name.endswith("register_tokens") for name in tensors)
    posemb_resize = "bicubic_antialias" if registers else "bicubic_offset"
    renamed = Tensors()
    for name in list(tensors):
        value = tensors.pop(name)
        ours = name.removeprefix("backbone.")
        if ours.startswith(DROPPED):
            continue
        for theirs, new in NAMES.items():
            ours = re.sub(theirs, new, ours)
        if ours in renamed:
            raise CheckpointError(f"there is a second tensor for {ascii(ours)[1:-1][:80]}")
        renamed[ours] = value
    foreign = plain("dino", renamed, beside, posemb_resize)
    if foreign.image_size != TRAINED:
        return foreign
    return stretched(replace(foreign, preprocessing=foreign.preprocessing | {"resize": 256}), EVALUATED)
