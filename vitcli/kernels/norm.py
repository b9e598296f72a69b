"""A residual addition, the LayerNorm of its sum and two biases in one pass over memory, and so their gradients.

A compiler adds twice rather than write the sum that both the norm and the next addition read, and sums up the gradients
of the biases in passes of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

PROGRAMS = 6336  # 48 for each of a large GPU's multiprocessors
CHUNKS = 1056  # parts of the rows whose sums are apart: eight for each


def add_norm(norm: nn.LayerNorm, bias: Tensor, later: Tensor, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """x + branch + bias + later, and the norm of that without `later`: all (…, width) and as x is.

    `later` is the bias of what will be added next. Its gradient is that of the sum, which is read here anyway.
    """
    width = x.shape[-1]
    rows = (value.reshape(-1, width) for value in (x, branch))
    total, normed = _AddNorm.apply(*rows, bias, later, norm.weight, norm.bias, norm.eps)
    return total.view_as(x), normed.view_as(x)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, branch: Tensor, bias: Tensor, later: Tensor, weight: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed, moments = add_norm_forward(x.contiguous(), branch.contiguous(), bias, later, weight, shift, eps)
        ctx.save_for_backward(total, moments, later, weight)
        return total, normed

    @staticmethod
    def backward(ctx, from_total: Tensor, from_normed: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dx, sums = add_norm_backward(from_total.contiguous(), from_normed.contiguous(), *saved)
        return dx, dx, *sums.sum(0), None


@triton_op("vitcli::add_norm_forward", mutates_args={})
def add_norm_forward(
    x: Tensor, branch: Tensor, bias: Tensor, later: Tensor, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of (rows, width): the sum and the norm, and mean and 1 / deviation of each row, float32 (rows, 2)."""
    rows, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    moments = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
    lanes = triton.next_power_of_2(width)
    at_once, warps = (4, 4) if lanes <= 512 else (1, 2)
    wrap_triton(_add_norm_forward)[(PROGRAMS,)](
        x, branch, bias, later, weight, shift, total, normed, moments, rows, width, eps,
        triton.cdiv(triton.cdiv(rows, at_once), PROGRAMS), at_once, lanes, num_warps=warps,
    )  # fmt: skip
    return total, normed, moments


@triton_op("vitcli::add_norm_backward", mutates_args={})
def add_norm_backward(
    from_total: Tensor, from_normed: Tensor, total: Tensor, moments: Tensor, later: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x (rows, width), and float32 (chunks, 4, width) to be summed: for bias, later, weight, shift."""
    rows, width = total.shape
    dx = torch.empty_like(total)
    sums = torch.empty(CHUNKS, 4, width, dtype=torch.float32, device=total.device)
    lanes = triton.next_power_of_2(width)
    at_once = 4 if lanes <= 512 else 2
    wrap_triton(_add_norm_backward)[(CHUNKS,)](
        from_total, from_normed, total, moments, later, weight, dx, sums, rows, width,
        triton.cdiv(triton.cdiv(rows, at_once), CHUNKS), at_once, lanes, num_warps=2,
    )  # fmt: skip
    return dx, sums


@triton.jit
def _add_norm_forward(
    x, branch, bias, later, weight, shift, total, normed, moments, rows, width, eps, steps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    inside = column < width
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(later + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)
    for step in tl.range(steps, num_stages=3):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        here = row.to(tl.int64)[:, None] * width + column[None, :]
        valid = (row < rows)[:, None] & inside[None, :]
        both = tl.load(x + here, mask=valid, other=0.0).to(tl.float32)
        both += tl.load(branch + here, mask=valid, other=0.0).to(tl.float32) + (b + a)[None, :]
        rounded = both.to(total.dtype.element_ty)
        tl.store(total + here, rounded, mask=valid)
        h = rounded.to(tl.float32) - a[None, :]
        mean = tl.sum(h, axis=1) / width
        away = tl.where(inside[None, :], h - mean[:, None], 0.0)
        scale = 1 / tl.sqrt(tl.sum(away * away, axis=1) / width + eps)
        answer = away * scale[:, None] * w[None, :] + s[None, :]
        tl.store(normed + here, answer.to(normed.dtype.element_ty), mask=valid)
        tl.store(moments + 2 * row, mean, mask=row < rows)
        tl.store(moments + 2 * row + 1, scale, mask=row < rows)


@triton.jit
def _add_norm_backward(
    from_total, from_normed, total, moments, later, weight, dx, sums, rows, width, steps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    inside = column < width
    a = tl.load(later + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    dlater = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    dweight = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    dshift = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for step in tl.range(steps, num_stages=3):  # loads run ahead of what they are for
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        here = row.to(tl.int64)[:, None] * width + column[None, :]
        valid = (row < rows)[:, None] & inside[None, :]
        g = tl.load(from_normed + here, mask=valid, other=0.0).to(tl.float32)
        h = tl.load(total + here, mask=valid, other=0.0).to(tl.float32) - a[None, :]
        direct = tl.load(from_total + here, mask=valid, other=0.0).to(tl.float32)
        mean = tl.load(moments + 2 * row, mask=row < rows, other=0.0)
        scale = tl.load(moments + 2 * row + 1, mask=row < rows, other=0.0)
        z = tl.where(valid, (h - mean[:, None]) * scale[:, None], 0.0)
        weighted = g * w[None, :]
        along = tl.sum(weighted * z, axis=1) / width
        level = tl.sum(weighted, axis=1) / width
        d = direct + (weighted - level[:, None] - z * along[:, None]) * scale[:, None]
        tl.store(dx + here, d.to(dx.dtype.element_ty), mask=valid)
        dbias += tl.where(valid, d, 0.0)
        dlater += direct
        dweight += g * z
        dshift += g
    place = sums + tl.program_id(0) * 4 * width + column
    tl.store(place, tl.sum(dbias, axis=0), mask=inside)
    tl.store(place + width, tl.sum(dlater, axis=0), mask=inside)
    tl.store(place + 2 * width, tl.sum(dweight, axis=0), mask=inside)
    tl.store(place + 3 * width, tl.sum(dshift, axis=0), mask=inside)
