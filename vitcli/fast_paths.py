"""What a runtime puts in place of a model's own parts: the same functions, computed faster or in less memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from vitcli.model.attention import Attention, AttentionPool, explicit_attention, fused_attention
from vitcli.model.feedforward import FeedForward
from vitcli.model.stem import PatchEmbed, project_as_rows
from vitcli.model.vit import Block, ViT

if TYPE_CHECKING:
    from vitcli.runtime import Runtime


def put_in_place(module: nn.Module, runtime: Runtime) -> None:
    """Set how a module computes, which is on the runtime's device already."""
    attend = explicit_attention if runtime.attention == "explicit" else sdpa
    for part in module.modules():
        if isinstance(part, Attention | AttentionPool):
            part.attend = attend
        if isinstance(part, Attention) and runtime.attention == "packed":
            _pack(part)
        if isinstance(part, ViT) and runtime.residual == "bf16":
            part.norm_pre.register_forward_hook(_in_bf16)
    blocks = [part for name, part in module.named_modules() if name.rpartition(".")[0].endswith("blocks")]
    if runtime.checkpoint:
        for block in blocks:
            block.forward = _checkpointed(block.forward)
    if runtime.compile and runtime.device.type == "cuda":
        _fuse(module, join=runtime.precision == runtime.residual == "bf16")
    if runtime.compile:
        # A block is a graph of its own: DistributedDataParallel need not have it cut where its messages end.
        torch._dynamo.config.optimize_ddp = False
        for block in blocks:
            block.compile()


def _fuse(module: nn.Module, join: bool) -> None:
    """Our kernels in place of what a compiler leaves apart, and what comes before the blocks compiled, too."""
    from vitcli.kernels.gelu import linear_gelu
    from vitcli.kernels.products import biased

    for part in module.modules():
        if isinstance(part, Attention):
            part.out = partial(biased, part.proj)
        if isinstance(part, FeedForward):
            part.out = partial(biased, part.fc2)
        if isinstance(part, FeedForward) and getattr(part.activation, "approximate", "") == "tanh":
            part.hidden = partial(linear_gelu, part.fc1)
        if isinstance(part, PatchEmbed):
            part.project = partial(project_as_rows, part.proj)
        if isinstance(part, ViT) and not part.config.stem:
            part.embed = torch.compile(part.embed)
    for part in module.modules() if join else ():  # once its parts are as they would be without
        if isinstance(part, Block):
            _join(part)


def _join(block: Block) -> None:
    """In training, have the first addition, the norm that follows and the biases of both branches in one kernel.

    Only if nothing comes between a branch and its addition.
    """
    from vitcli.kernels.norm import add_norm
    from vitcli.kernels.products import unbiased

    usual, norm, attention, mlp = block.between, block.norm2, block.attn, block.mlp
    first, second = attention.proj, mlp.fc2

    def between(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(norm, first.bias, second.bias, x, branch) if torch.is_grad_enabled() else usual(x, branch)

    scaled = not (isinstance(block.ls1, nn.Identity) and isinstance(block.ls2, nn.Identity))
    if not (scaled or block.drop_path.active or attention.dropout.p or mlp.dropout.p):
        attention.out, mlp.out, block.between = partial(unbiased, first), partial(unbiased, second), between


def _pack(attention: Attention) -> None:
    """In training, have all tokens' attention computed by our kernels, if it is the plain one that they know."""
    from vitcli.kernels.attention import HEAD_WIDTHS, MOST_TOKENS, self_attention

    usual = attention.mix

    def mix(x: Tensor, first: int | None) -> Tensor:
        if first is not None or x.shape[1] > MOST_TOKENS or not torch.is_grad_enabled():
            return usual(x, first)
        return self_attention(attention.qkv, x, attention.heads)

    plain = isinstance(attention.q_norm, nn.Identity) and not attention.attention_dropout
    if plain and attention.qkv.in_features // attention.heads in HEAD_WIDTHS:
        attention.mix = mix


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """`fused_attention` by a kernel whose gradients can be trusted.

    cuDNN's on Hopper (torch 2.11 to at least 2.13) are NaN where the keys are 64 beyond a multiple of 128, as in
    images of 8x8 patches, once all scores of a query are below -88 (pytorch issue 196678).
    """
    if k.shape[-2] % 128 != 64:
        return fused_attention(q, k, v, dropout)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return fused_attention(q, k, v, dropout)


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` whose insides are computed again in the backward pass, with the same chance (arXiv 1604.06174)."""

    def again(*values: Any) -> Tensor:
        return checkpoint(forward, *values, use_reentrant=False)

    return again


def _in_bf16(_: nn.Module, __: Any, tokens: Tensor) -> Tensor:
    return tokens.to(torch.bfloat16)
