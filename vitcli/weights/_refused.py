"""Transformers that share names with a plain ViT and compute something else: known, and not read."""

import re

# What a name shows, by a pattern in it; the first one that is found is said.
SIGNS = {
    r"^layers\.\d+\.blocks\.\d+\.norm1\.weight$": "a transformer in stages, such as Swin",
    r"(^|\.)(storage_tokens$|rope_embed\.periods$)": "DINOv3, which needs rotary positions",
    r"(^|\.)rope\w*\.": "a ViT with rotary positions",
    r"\.attn\.rel_pos_[hw]$": "SAM's image encoder, with windows and relative positions",
    r"(^|\.)(relative_position_bias_table$|(shared_)?rel_pos(_bias)?\.)": "a transformer with relative positions, "
    "such as BEiT",
    r"^blocks\.\d+\.attn\.(q_bias|q_proj\.weight)$": "a ViT of the BEiT and EVA family",
    r"^blocks\.\d+\.attn\.proj_l\.weight$": "CaiT, whose heads talk to each other",
    r"^blocks\.\d+\.(attn|mlp)\.norm\.weight$": "a ViT with norms within attention or MLP, as BEiT-3's",
    r"^blocks\.\d+\.(attns\.\d|in_proj\.|attn1\.)": "a ViT with parallel blocks",
    r"^blocks\.\d+\.attn\.lambda_": "a ViT with differential attention",
    r"^patch_embed\.backbone\.(conv1|0)\.": "a hybrid whose convolutions are not Google's ResNet",
}
BLOCK = re.compile(r"(backbone\.)?blocks\.(\d+\.)+attn\.qkv\.weight")


def reason(names: set[str]) -> str | None:
    """What a file with these names is, and by which of them one sees it; None if it may be a plain ViT."""
    for sign, what in SIGNS.items():
        if found := min(filter(re.compile(sign).search, names), default=None):
            return f"{ascii(found)[1:-1][:80]} belongs to {what}"
    if any(map(BLOCK.fullmatch, names)) and not any(name.endswith("pos_embed") for name in names):
        return "there is no pos_embed, so its positions are rotary, as DINOv3's, or relative"
    if "blocks.0.norm1.weight" in names and not any(name.endswith("norm1.bias") for name in names):
        return "its norms have no bias, so they are RMSNorm, as AIMv2's"
    if names >= {"blocks.0.gamma_1", "norm_pre.weight"}:
        return "norm_pre beside gamma_1 belongs to Perception Encoder, which needs rotary positions"
    return None
