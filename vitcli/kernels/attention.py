"""Self-attention that leaves q, k and v where a matrix product put them, and their gradients where the next reads them.

Libraries give three gradients apart, in a layout of their own; to bring them together, and to sum them for the bias,
costs half as much as the attention of an image's few hundred tokens itself. Here both come with the gradients. The
backward pass is that of FlashAttention-2 (arXiv 2307.08691) but for the gradient of q, which is summed in one program,
that of the keys if it has all of them, else one of its own: no atomic additions, so the result is the same each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

from vitcli.kernels import products

# pyright: reportArgumentType=false

LOG2E = tl.constexpr(1.4426950408889634)
HEAD_WIDTHS = (32, 64)  # as tried on a GPU
MOST_TOKENS = 600  # beyond, the gradient of q costs more apart than it saves
WHOLE = 256  # keys whose gradients one program can hold


def self_attention(qkv: nn.Linear, x: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √c) v of all heads side by side, (b, n, d), of q, k and v in qkv(x), (b, n, 3 d).

    In bfloat16 or float16; products of float32 would be rounded to TF32.
    """
    return _SelfAttention.apply(products.linear(x, qkv.weight, qkv.bias), qkv.bias, heads)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
        out, sums = attention_forward(qkv, heads)
        ctx.save_for_backward(qkv, out, sums)
        ctx.heads, ctx.dtype = heads, bias.dtype
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        qkv, out, sums = ctx.saved_tensors
        dqkv, columns = attention_backward(gradient.contiguous(), qkv, out, sums, ctx.heads)
        return dqkv, columns.sum((0, 1)).to(ctx.dtype), None


@triton_op("vitcli::attention_forward", mutates_args={})
def attention_forward(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Of (b, n, 3 d), contiguous: the answer (b, n, d), and log2 of each softmax's sum, float32 (b, heads, n)."""
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = qkv.new_empty(batch, tokens, width)
    sums = torch.empty(batch, heads, tokens, dtype=torch.float32, device=qkv.device)
    rows, keys = 64, 32
    wrap_triton(_forward)[(triton.cdiv(tokens, rows), batch * heads)](
        qkv,
        out,
        sums,
        tokens,
        heads,
        (width // heads) ** -0.5,
        width // heads,
        rows,
        keys,
        num_warps=4,
    )
    return out, sums


@triton_op("vitcli::attention_backward", mutates_args={})
def attention_backward(gradient: Tensor, qkv: Tensor, out: Tensor, sums: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, and its sums over the rows of each tile, float32 (b, tiles, 3 d)."""
    batch, tokens, width = out.shape
    whole = 128 < tokens <= WHOLE and width == 64 * heads  # not of narrower heads, which lose by it
    tile = WHOLE if whole else 128 if tokens > 64 else 64
    tiles = triton.cdiv(tokens, tile)
    dqkv = torch.empty_like(qkv)
    columns = torch.empty(batch, tiles, 3 * width, dtype=torch.float32, device=qkv.device)
    wrap_triton(_backward)[(1 if whole else 2 * tiles, batch * heads)](
        gradient, qkv, out, sums, dqkv, columns, tokens, heads, tiles,
        (width // heads) ** -0.5, width // heads, tile, 32, whole, 4 if whole else 1, num_warps=8 if whole else 4,
    )  # fmt: skip
    return dqkv, columns


@triton.jit
def _forward(
    qkv, out, sums, tokens, heads, SCALE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """So many rows of one head's answer."""
    head = tl.program_id(1).to(tl.int64)
    width = heads * C
    own = (head // heads) * tokens * width + (head % heads) * C
    q_at = qkv + (head // heads) * tokens * 3 * width + (head % heads) * C
    rows, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    valid = rows[:, None] < tokens
    q = tl.load(q_at + rows[:, None] * 3 * width + c[None, :], mask=valid, other=0.0)
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    answer = tl.zeros((ROWS, C), tl.float32)
    for first in tl.range(0, tokens, KEYS, num_stages=3):  # pyright: ignore[reportGeneralTypeIssues]
        keys = first + tl.arange(0, KEYS)
        k_at = q_at + width + keys[:, None] * 3 * width + c[None, :]
        k = tl.load(k_at, mask=keys[:, None] < tokens, other=0.0)
        v = tl.load(k_at + width, mask=keys[:, None] < tokens, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * (SCALE * LOG2E)
        scores = tl.where(keys[None, :] < tokens, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink, weights = tl.exp2(highest - higher), tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        answer = tl.dot(weights.to(v.dtype), v, answer * shrink[:, None])
        highest = higher
    answer = (answer / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + own + rows[:, None] * width + c[None, :], answer, mask=valid)
    tl.store(sums + head * tokens + rows, highest + tl.log2(total), mask=rows < tokens)


@triton.jit
def _backward(
    gradient, qkv, out, sums, dqkv, columns, tokens, heads, tiles,
    SCALE: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, ALL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of so many keys and values of one head, or, in the other half of the programs, of queries.

    If these are ALL keys, those of the queries come with them, and there is no other half.
    """
    head = tl.program_id(1).to(tl.int64)
    width = heads * C
    batch, place = head // heads, (head % heads) * C
    at, own = batch * tokens * 3 * width + place, batch * tokens * width + place
    tile = tl.program_id(0) % tiles
    mine, c = tile * TILE + tl.arange(0, TILE), tl.arange(0, C)
    here, valid = mine[:, None] * 3 * width + c[None, :], mine[:, None] < tokens
    summed = columns + (batch * tiles + tile) * 3 * width + place + c
    q_at, k_at, v_at = qkv + at, qkv + at + width, qkv + at + 2 * width
    exponent: tl.constexpr = SCALE * LOG2E
    if ALL or tl.program_id(0) < tiles:
        k = tl.load(k_at + here, mask=valid, other=0.0)
        v = tl.load(v_at + here, mask=valid, other=0.0)
        dk, dv = tl.zeros((TILE, C), tl.float32), tl.zeros((TILE, C), tl.float32)
        total_dq = tl.zeros((C, STEP), tl.float32)
        for first in tl.range(0, tokens, STEP, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
            rows = first + tl.arange(0, STEP)
            q, g, total, delta = _queries(q_at, gradient + own, out + own, sums + head * tokens, rows, c, tokens, width)
            p = tl.exp2(tl.minimum(tl.dot(k, tl.trans(q)) * exponent - total[None, :], 0.0))
            dv += tl.dot(p.to(q.dtype), g)
            dp = tl.dot(v, tl.trans(g))
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk += tl.dot(ds, q)
            if ALL:
                dq = tl.dot(tl.trans(k), ds) * SCALE  # upright, (C, STEP): a product wants 64 rows
                total_dq += dq
                q_here = rows[None, :] * 3 * width + c[:, None]
                tl.store(dqkv + at + q_here, dq.to(dqkv.dtype.element_ty), mask=rows[None, :] < tokens)
        if ALL:
            tl.store(summed, tl.sum(total_dq, 1))
        dk = tl.where(valid, dk * SCALE, 0.0)
        dv = tl.where(valid, dv, 0.0)
        tl.store(dqkv + at + width + here, dk.to(dqkv.dtype.element_ty), mask=valid)
        tl.store(dqkv + at + 2 * width + here, dv.to(dqkv.dtype.element_ty), mask=valid)
        tl.store(summed + width, tl.sum(dk, 0))
        tl.store(summed + 2 * width, tl.sum(dv, 0))
    else:
        q, g, total, delta = _queries(q_at, gradient + own, out + own, sums + head * tokens, mine, c, tokens, width)
        dq = tl.zeros((TILE, C), tl.float32)
        for first in tl.range(0, tokens, STEP, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
            keys = first + tl.arange(0, STEP)
            there = keys[:, None] * 3 * width + c[None, :]
            k = tl.load(k_at + there, mask=keys[:, None] < tokens, other=0.0)  # zeros add nothing to dq
            v = tl.load(v_at + there, mask=keys[:, None] < tokens, other=0.0)
            p = tl.exp2(tl.minimum(tl.dot(q, tl.trans(k)) * exponent - total[:, None], 0.0))
            dp = tl.dot(g, tl.trans(v))
            dq += tl.dot((p * (dp - delta[:, None])).to(q.dtype), k)
        dq *= SCALE
        tl.store(dqkv + at + here, dq.to(dqkv.dtype.element_ty), mask=valid)
        tl.store(summed, tl.sum(dq, 0))


@triton.jit
def _queries(q_at, gradient, out, sums, rows, c, tokens, width):
    """Queries, their answers' gradients, the log2 of their denominators, and what their scores' gradients add up to."""
    valid = rows[:, None] < tokens
    here = rows[:, None] * width + c[None, :]
    q = tl.load(q_at + rows[:, None] * 3 * width + c[None, :], mask=valid, other=0.0)
    g = tl.load(gradient + here, mask=valid, other=0.0)
    o = tl.load(out + here, mask=valid, other=0.0)
    total = tl.load(sums + rows, mask=rows < tokens, other=0.0)
    return q, g, total, tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
